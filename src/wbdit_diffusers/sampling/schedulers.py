"""The forward process of training, and solvers of the reverse one: all of them Diffusers' own."""

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler


SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


def training_scheduler(prediction_type: str) -> DDPMScheduler:
    """
    The noise schedule of arXiv 2411.06785: 1,000 steps, β linear from 1e-4 to 0.02.

    Expression is no image in [-1, 1], so samples are never clipped. "trailing" spaces the steps from the end: from any
    number of steps, and with any solver made `from_config`, the first is at pure noise.

    Args:
        prediction_type (`str`): What the denoiser predicts: `"epsilon"`, `"v_prediction"` or `"sample"`.
    """
    return DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
