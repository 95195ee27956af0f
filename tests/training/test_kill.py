"""A training that is killed goes on as if nothing had happened."""

import kill
import pytest


@pytest.mark.slow
def test_a_killed_training_ends_as_one_that_was_not(tmp_path):
    """SIGKILL while cells are read, in stage one, in its second fit, between steps, in a save, and at the end."""
    result = kill.measure(tmp_path, num_processes=1, num_kills=8, seed=0)
    killed = [one["killed"] for one in result["kills"]]
    assert len(killed) == 8 and killed.count("1 of 1") >= 5  # a quick machine may end before its moment
    assert result["same_weights"] == {"codec": True, "denoiser": True, "processor": True}
    assert result["same_log"] and result["same_split"]
    assert result["partial_files_left"] == []


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_in_the_same_order(tmp_path):
    """Killed with two processes, gone on with by one: its cells are the next ones, and each is seen once an epoch."""
    result = kill.measure_elastic(tmp_path, [2, 1])
    assert [run["processes"] for run in result["runs"]] == [2, 1] and result["epochs"] > 2
    assert all(run["those_of_the_order"] and run["same_number_on_every_process"] for run in result["runs"])
    assert set(result["cells_by_times_seen"]) == {int(result["epochs"]), int(result["epochs"]) + 1}
