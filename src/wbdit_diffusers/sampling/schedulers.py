"""The forward process of training, and solvers of the reverse one: all of them Diffusers' own."""

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin


SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}

MULTISTEP = ("dpmsolver++", "unipc")


def make_scheduler(name: str, config: dict) -> SchedulerMixin:
    """
    A solver by name, with the noise schedule of another scheduler.

    DPM-Solver++ and UniPC take steps that are equal in the log of the noise (`use_exponential_sigmas`): equal steps in
    time leave little of them for the end, where codes of one type get their spread (lab/experiments.md).

    Args:
        name (`str`): A key of `SCHEDULERS`.
        config (`dict`): The `config` of a scheduler, such as `pipe.scheduler.config`.

    Returns:
        `SchedulerMixin`: the solver.

    Raises:
        ValueError: If there is no such solver.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"`scheduler` is one of {', '.join(SCHEDULERS)}, not {name!r}.")
    options = {"use_exponential_sigmas": True} if name in MULTISTEP else {}
    return SCHEDULERS[name].from_config(config, **options)


def training_scheduler(prediction_type: str) -> DDPMScheduler:
    """
    The noise schedule of arXiv 2411.06785: 1,000 steps, β linear from 1e-4 to 0.02.

    Expression is no image in [-1, 1], so samples are never clipped. "trailing" spaces the steps from the end: from any
    number of steps, and with any solver made `from_config`, the first is at pure noise.

    Args:
        prediction_type (`str`): What the denoiser predicts: `"epsilon"`, `"v_prediction"` or `"sample"`.
    """
    return DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
