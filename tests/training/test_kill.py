"""A training that is killed goes on as if nothing had happened."""

import kill
import pytest


@pytest.mark.slow
def test_a_killed_training_ends_as_one_that_was_not(tmp_path):
    """SIGKILL while cells are read, in stage one, in its second fit, between steps, and in a save."""
    result = kill.measure(tmp_path, num_processes=1, num_kills=5, seed=0)
    assert len(result["kills"]) == 5
    assert result["same_weights"] == {"codec": True, "denoiser": True, "processor": True}
    assert result["same_log"] and result["same_split"]
    assert result["partial_files_left"] == []
