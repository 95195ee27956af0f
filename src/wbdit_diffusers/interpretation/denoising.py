"""What the denoiser does to a cell: what it knows at which noise, when a cell decides, which programs hear which."""

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from sklearn.linear_model import LogisticRegression
from torch import nn

from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import GaussianMixtureDenoiser


DECISION_STEPS = 50  # of DDIM, from pure noise


def clean_latents(
    denoiser: nn.Module,
    mixture: GaussianMixtureDenoiser,
    noisy: torch.Tensor,
    timestep: int,
    class_labels: torch.Tensor | None,
) -> torch.Tensor:
    """The clean cell that a denoiser expects, from its velocity: `a x - s v`. The mixture knows the noise schedule."""
    a, s = mixture.signal_and_noise(timestep, len(noisy))
    return a * noisy - s * denoiser(noisy, timestep, class_labels, return_dict=False)[0]


@torch.no_grad()
def measure_knowledge(
    denoiser: nn.Module,
    mixture: GaussianMixtureDenoiser,
    codec: ProgramCodec,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    timesteps: list[int],
    seed: int = 0,
) -> list[dict]:
    """
    How much of a cell network and closed form know at each noise, and how much of the network the closed form is.

    Args:
        denoiser (`torch.nn.Module`): The network.
        mixture ([`GaussianMixtureDenoiser`]): Of the same training cells.
        codec ([`ProgramCodec`]): Gives the programs.
        latents (`torch.Tensor` of shape `(cells, num_features)`): Clean latents of held-out cells.
        class_labels (`torch.LongTensor`, *optional*): Their labels.
        timesteps (`list[int]`): At which noise is added.
        seed (`int`, defaults to 0): Of the noise.

    Returns:
        `list[dict]`: for each timestep `"network"`, `"mixture"`, for each program the share of its variance (around
        what is known at pure noise) that is foretold, and `"network_mean"`, `"mixture_mean"` over programs; and
        `"closed_form"`, the share of what the network says beyond that which the mixture says too.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    last = len(mixture.alphas_cumprod) - 1
    prior = codec.activities(clean_latents(mixture, mixture, torch.zeros_like(latents), last, class_labels))
    truth = codec.activities(latents)
    scale = (truth - prior).square().mean(0)  # (programs,)
    rows = []
    for timestep in timesteps:
        a, s = mixture.signal_and_noise(timestep, len(latents))
        noisy = a * latents + s * noise
        of_network, of_mixture = (
            codec.activities(clean_latents(one, mixture, noisy, timestep, class_labels)) for one in (denoiser, mixture)
        )
        foretold = [1 - (truth - guess).square().mean(0) / scale for guess in (of_network, of_mixture)]
        unlike = (of_network - of_mixture).square().sum() / (of_network - prior).square().sum()
        rows.append(
            {
                "timestep": timestep,
                "network": foretold[0].tolist(),
                "mixture": foretold[1].tolist(),
                "network_mean": foretold[0].mean().item(),
                "mixture_mean": foretold[1].mean().item(),
                "closed_form": 1 - unlike.item(),
            }
        )
    return rows


@torch.no_grad()
def denoise_from(
    denoiser: nn.Module, scheduler: SchedulerMixin, latents: torch.Tensor, timestep: int, seed: int
) -> torch.Tensor:
    """Cells with noise up to a timestep, denoised again by DDIM, without labels: they may become anything."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(DECISION_STEPS)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    x = ddim.add_noise(latents, noise, torch.tensor([timestep]))
    for t in ddim.timesteps[ddim.timesteps <= timestep]:
        x = ddim.step(denoiser(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
    return x


def measure_decisions(
    denoiser: nn.Module,
    mixture: GaussianMixtureDenoiser,
    scheduler: SchedulerMixin,
    codec: ProgramCodec,
    train: tuple[torch.Tensor, np.ndarray],
    latents: torch.Tensor,
    seed: int = 0,
) -> list[dict]:
    """
    When a cell decides: noise is added up to a timestep, and taken away again; is it the same cell?

    Args:
        denoiser (`torch.nn.Module`): The network.
        mixture ([`GaussianMixtureDenoiser`]): The control.
        scheduler ([`SchedulerMixin`]): The noise schedule.
        codec ([`ProgramCodec`]): Gives the programs.
        train (`tuple`): Latents `(cells, num_features)` and cell types `(cells,)` of training cells: a logistic
            regression of these tells the type of a cell before and after.
        latents (`torch.Tensor` of shape `(cells, num_features)`): Clean latents of held-out cells.
        seed (`int`, defaults to 0): Of the noise.

    Returns:
        `list[dict]`: for each timestep and each denoiser (`"network"`, `"mixture"`): `"changed"`, the share of cells
        whose type is another one; `"chance"`, that of cells that were mixed up; `"correlation"` before and after of
        each program, and `"correlation_mean"`.
    """
    classifier = None
    if len(np.unique(train[1])) > 1:
        classifier = LogisticRegression(max_iter=2000).fit(train[0].cpu().numpy(), train[1])
    before = codec.activities(latents).cpu().numpy()
    types = None if classifier is None else classifier.predict(latents.cpu().numpy())
    chance = None if types is None else float((types != np.random.default_rng(seed).permutation(types)).mean())
    rows = []
    for timestep in range(99, 1000, 100):
        for name, one in (("network", denoiser), ("mixture", mixture)):
            again = denoise_from(one, scheduler, latents, timestep, seed)
            after = codec.activities(again).cpu().numpy()
            correlation = [float(np.corrcoef(before[:, i], after[:, i])[0, 1]) for i in range(before.shape[1])]
            row = {"timestep": timestep, "denoiser": name, "correlation": correlation}
            row["correlation_mean"] = float(np.mean(correlation))
            if classifier is not None:
                row |= {"changed": float((classifier.predict(again.cpu().numpy()) != types).mean()), "chance": chance}
            rows.append(row)
    return rows


def measure_listening(
    denoiser: nn.Module,
    mixture: GaussianMixtureDenoiser,
    codec: ProgramCodec,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    timestep: int,
    seed: int = 0,
) -> torch.Tensor:
    """
    Which programs each program listens to: by how much the expected clean program (row) rises with a noisy one
    (column), on average over cells, `(programs, programs)`.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    a, s = mixture.signal_and_noise(timestep, len(latents))
    noisy = (a * latents + s * noise).requires_grad_()
    programs = codec.activities(clean_latents(denoiser, mixture, noisy, timestep, class_labels))
    # A step of one program's activity, the others left as they are, is a column of the inverse axes.
    steps = torch.linalg.inv(codec.program_axes.float()).to(latents)  # (num_programs, num_programs)
    rows = []
    for i in range(programs.shape[1]):
        (gradient,) = torch.autograd.grad(programs[:, i].sum(), noisy, retain_graph=True)
        rows.append(gradient[:, : len(steps)].mean(0) @ steps)
    return torch.stack(rows).detach()
