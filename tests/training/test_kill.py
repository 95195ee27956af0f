"""A training that is killed continues as if nothing had happened."""

import kill
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_training_ends_as_an_undisturbed_one(num_processes, tmp_path):
    """SIGKILL between steps, in a save of a checkpoint, and while the pipeline is written."""
    result = kill.measure(tmp_path, num_processes, ["steps", "save", "pipeline"], max_train_steps=220)
    assert any(one["was_alive"] for one in result["kills"])  # a fast machine may end before a moment
    assert all("\n" not in one["folder"] for one in result["kills"])
    assert result["same_weights"] == {"codec": True, "denoiser": True, "processor": True}
    assert result["same_log"] and result["same_split"] and not result["partial_files_left"]
