import pytest
import torch

from wbdit_diffusers.sampling import SCHEDULERS, make_scheduler, training_scheduler


def test_schedule_is_the_paper_s():
    scheduler = training_scheduler("epsilon")
    torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 0.02, 1000))
    assert scheduler.config.prediction_type == "epsilon"
    assert training_scheduler("v_prediction").config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_inference_steps", [3, 20, 100, 250, 1000])
def test_every_solver_starts_at_pure_noise_and_goes_down(name, num_inference_steps):
    scheduler = make_scheduler(name, training_scheduler("v_prediction").config)
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.tolist()
    assert timesteps[0] == 999
    assert len(timesteps) == num_inference_steps
    assert timesteps == sorted(timesteps, reverse=True)
    # Of steps that are equal in the log of the noise, several lie in one training step where there is hardly any.
    if num_inference_steps <= 20 or name not in ("dpmsolver++", "unipc"):
        assert len(set(timesteps)) > 0.8 * num_inference_steps
    assert scheduler.init_noise_sigma == 1 and scheduler.alphas_cumprod[999] < 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_are_never_clipped(name):
    """Expression is no image in [-1, 1]: a solver that knows the clean cell at 7 ends there."""
    scheduler = make_scheduler(name, training_scheduler("sample").config)
    scheduler.set_timesteps(10)
    sample = torch.zeros(1, 3)
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.full_like(sample, 7.0), t, sample).prev_sample
    torch.testing.assert_close(sample, torch.full((1, 3), 7.0), atol=0.05, rtol=0)
