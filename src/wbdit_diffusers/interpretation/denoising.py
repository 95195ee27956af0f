"""Measurements of denoising: explained variance of programs, stability of the type, influence between programs."""

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from sklearn.linear_model import LogisticRegression
from torch import nn

from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..sampling import CellNoise, denoise, signal_and_noise, to_clean


RENOISING_STEPS = 50  # of DDIM, from pure noise


def clean_latents(
    denoiser: nn.Module,
    scheduler: SchedulerMixin,
    noisy: torch.Tensor,
    timestep: int,
    class_labels: torch.Tensor | None,
) -> torch.Tensor:
    """A denoiser's estimate of the clean latents, `(cells, num_features)`."""
    return to_clean(denoiser(noisy, timestep, class_labels, return_dict=False)[0], noisy, timestep, scheduler)


def add_noise(latents: torch.Tensor, timestep: int, scheduler: SchedulerMixin, seed: int) -> torch.Tensor:
    """Latents with noise up to a timestep."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    a, s = signal_and_noise(scheduler, timestep, latents)
    return a * latents + s * noise


@torch.no_grad()
def measure_explained_variance(
    denoiser: nn.Module,
    gaussian_mixture: GaussianMixtureDenoiser,
    scheduler: SchedulerMixin,
    codec: ProgramCodec,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    timesteps: list[int],
    seed: int = 0,
) -> list[dict]:
    """
    Measures how well the network and the closed form predict the programs of noisy cells, and how far they agree.

    Args:
        denoiser (`torch.nn.Module`): The network.
        gaussian_mixture ([`GaussianMixtureDenoiser`]): The closed form, fitted to the same training cells.
        scheduler ([`SchedulerMixin`]): The noise schedule.
        codec ([`ProgramCodec`]): Defines the programs.
        latents (`torch.Tensor` of shape `(cells, num_features)`): Clean latents of held-out cells.
        class_labels (`torch.LongTensor`, *optional*): Their labels.
        timesteps (`list[int]`): Timesteps up to which noise is added.
        seed (`int`, defaults to 0): Seed of the noise.

    Returns:
        `list[dict]`: for each timestep, `"network"` and `"closed_form"` (the fraction of each program's variance that
        is explained, relative to the prediction at pure noise), their means `"network_mean"` and `"closed_form_mean"`,
        and `"agreement"`, the fraction of the network's prediction that the closed form makes too.
    """
    last = scheduler.config.num_train_timesteps - 1
    pure_noise = torch.zeros_like(latents)
    prior = codec.activities(clean_latents(gaussian_mixture, scheduler, pure_noise, last, class_labels))
    truth = codec.activities(latents)
    scale = (truth - prior).square().mean(0)  # (programs,)
    rows = []
    for timestep in timesteps:
        noisy = add_noise(latents, timestep, scheduler, seed)
        network, closed_form = (
            codec.activities(clean_latents(one, scheduler, noisy, timestep, class_labels))
            for one in (denoiser, gaussian_mixture)
        )
        explained = [1 - (truth - guess).square().mean(0) / scale for guess in (network, closed_form)]
        difference = (network - closed_form).square().sum() / (network - prior).square().sum()
        rows.append(
            {
                "timestep": timestep,
                "network": explained[0].tolist(),
                "closed_form": explained[1].tolist(),
                "network_mean": explained[0].mean().item(),
                "closed_form_mean": explained[1].mean().item(),
                "agreement": 1 - difference.item(),
            }
        )
    return rows


@torch.no_grad()
def renoise(
    denoiser: nn.Module, scheduler: SchedulerMixin, latents: torch.Tensor, timestep: int, seed: int
) -> torch.Tensor:
    """Adds noise to latents up to a timestep, and denoises them by DDIM without labels: `(cells, num_features)`."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(RENOISING_STEPS)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    noisy = ddim.add_noise(latents, noise, torch.tensor([timestep]))
    cell_noise = CellNoise(torch.Generator().manual_seed(seed)).batch(0, len(latents))
    timesteps = ddim.timesteps[ddim.timesteps <= timestep]
    return denoise(lambda x, t: denoiser(x, t, return_dict=False)[0], ddim, cell_noise, noisy, timesteps)


def measure_type_stability(
    denoiser: nn.Module,
    gaussian_mixture: GaussianMixtureDenoiser,
    scheduler: SchedulerMixin,
    codec: ProgramCodec,
    train: tuple[torch.Tensor, np.ndarray],
    latents: torch.Tensor,
    seed: int = 0,
) -> list[dict]:
    """
    Measures at which timestep the cell type is fixed: noise is added up to a timestep and removed again, and a
    classifier compares the type before and after.

    Args:
        denoiser (`torch.nn.Module`): The network.
        gaussian_mixture ([`GaussianMixtureDenoiser`]): The closed form, as the control.
        scheduler ([`SchedulerMixin`]): The noise schedule.
        codec ([`ProgramCodec`]): Defines the programs.
        train (`tuple`):
            Latents `(cells, num_features)` and cell types `(cells,)` of training cells, for the classifier (logistic
            regression).
        latents (`torch.Tensor` of shape `(cells, num_features)`): Clean latents of held-out cells.
        seed (`int`, defaults to 0): Seed of the noise.

    Returns:
        `list[dict]`: for each timestep and `"denoiser"` (`"network"`, `"closed_form"`), `"changed"`, the fraction of
        cells whose type changed; `"chance"`, the same for shuffled cells; `"correlation"` of each program before and
        after, and its mean `"correlation_mean"`.
    """
    classifier = None
    if len(np.unique(train[1])) > 1:
        classifier = LogisticRegression(max_iter=2000).fit(train[0].cpu().numpy(), train[1])
    before = codec.activities(latents).cpu().numpy()
    types = None if classifier is None else classifier.predict(latents.cpu().numpy())
    chance = None if types is None else float((types != np.random.default_rng(seed).permutation(types)).mean())
    rows = []
    for timestep in range(99, 1000, 100):
        for name, one in (("network", denoiser), ("closed_form", gaussian_mixture)):
            again = renoise(one, scheduler, latents, timestep, seed)
            after = codec.activities(again).cpu().numpy()
            correlation = [float(np.corrcoef(before[:, i], after[:, i])[0, 1]) for i in range(before.shape[1])]
            row = {"timestep": timestep, "denoiser": name, "correlation": correlation}
            row["correlation_mean"] = float(np.mean(correlation))
            if classifier is not None:
                row |= {"changed": float((classifier.predict(again.cpu().numpy()) != types).mean()), "chance": chance}
            rows.append(row)
    return rows


def measure_program_jacobian(
    denoiser: nn.Module,
    scheduler: SchedulerMixin,
    codec: ProgramCodec,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    timestep: int,
    seed: int = 0,
) -> torch.Tensor:
    """
    Measures which programs influence each other: the mean derivative over cells of each expected clean program (row)
    with respect to each noisy program (column), `(programs, programs)`. The arguments are those of
    [`measure_explained_variance`].
    """
    noisy = add_noise(latents, timestep, scheduler, seed).requires_grad_()
    programs = codec.activities(clean_latents(denoiser, scheduler, noisy, timestep, class_labels))
    # A column of the inverse axes changes one program's activity and leaves the others.
    steps = torch.linalg.inv(codec.program_axes.float()).to(latents)  # (num_programs, num_programs)
    rows = []
    for i in range(programs.shape[1]):
        (gradient,) = torch.autograd.grad(programs[:, i].sum(), noisy, retain_graph=True)
        rows.append(gradient[:, : len(steps)].mean(0) @ steps)
    return torch.stack(rows).detach()
