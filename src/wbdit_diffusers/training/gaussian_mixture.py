"""The Gaussian mixture whose closed-form denoiser teaches the network."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..data.latents import Latents
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import MAX_COMPONENTS, GaussianMixtureDenoiser
from ..sampling import training_scheduler
from .config import TrainingConfig
from .processes import fit_once


logger = get_logger(__name__)

MAX_CELLS = 20_000  # of the fit
MAX_SIZE = 2**19  # components x features², beyond which the closed form is slower than the network


def prepare_gaussian_mixture(
    config: TrainingConfig,
    accelerator: Accelerator,
    latents: Latents,
    codec: ProgramCodec | ExpressionCodec,
    folder: Path,
) -> GaussianMixtureDenoiser | None:
    """The Gaussian mixture of a run, or `None` if the network learns from the cells alone."""
    if not isinstance(codec, ProgramCodec) or config.mixture_share == 0:
        return None
    known, combinations = np.unique(latents.class_labels.numpy(), axis=0, return_inverse=True)
    max_components = min(MAX_SIZE // (latents.values.shape[1] ** 2 * len(known)), MAX_COMPONENTS)
    if max_components == 0:
        logger.warning(f"No Gaussian mixture: {len(known):,} combinations of labels are too many (--mixture_share).")
        return None
    inputs = latents, known, combinations.ravel(), max_components, config.seed, codec.metric
    fit = partial(fit_gaussian_mixture, *inputs)
    mixture = fit_once(accelerator, folder / "gaussian_mixture", GaussianMixtureDenoiser, fit)
    if number := mixture.config.num_composed:
        logger.info(f"{number:,} combinations of labels that no training cell has are composed from others.")
    return mixture.to(accelerator.device)


def fit_gaussian_mixture(
    latents: Latents,
    known: np.ndarray,
    combinations: np.ndarray,
    max_components: int,
    seed: int,
    metric: torch.Tensor | None = None,
) -> GaussianMixtureDenoiser:
    """Fits a Gaussian mixture, with at most `max_components` for each of the `known` combinations of labels."""
    # Each combination gives the same number of cells, if it has enough: a rare one needs a component too.
    order = np.random.default_rng(seed).permutation(len(latents))
    by_label = order[np.argsort(combinations[order], kind="stable")]
    counts = np.bincount(combinations)
    rank = np.arange(len(latents)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the combination
    chosen = np.sort(by_label[np.argsort(rank, kind="stable")[:MAX_CELLS]])
    mixture = GaussianMixtureDenoiser.fit(
        **latents.batch(chosen, torch.device("cpu")),
        condition_sizes=latents.condition_sizes,
        noise_scheduler=training_scheduler("v_prediction"),
        max_components=max_components,
        seed=seed,
        metric=metric,
    )
    # A cell without labels has each combination as often as the training cells have it, not as the chosen ones do.
    share_of_chosen = np.bincount(combinations[chosen], minlength=len(counts)) / len(chosen)
    ratios = dict(zip(map(tuple, known.tolist()), counts / len(latents) / share_of_chosen))
    with torch.no_grad():
        of_components = [ratios.get(tuple(labels), 1.0) for labels in mixture.component_labels.tolist()]
        mixture.log_weights += torch.tensor(of_components).log()
    return mixture
