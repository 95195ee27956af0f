"""The Gaussian mixture whose closed-form denoiser teaches the network."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..data.latents import Latents
from ..files import write_whole
from ..models.gaussian_mixture import MAX_COMPONENTS, GaussianMixtureDenoiser
from ..sampling import training_scheduler
from .config import TrainingConfig
from .processes import sync_errors


logger = get_logger(__name__)

MAX_CELLS = 20_000  # of the fit
MAX_SIZE = 2**19  # components x features², beyond which the closed form is slower than the network


def prepare_gaussian_mixture(
    config: TrainingConfig, accelerator: Accelerator, latents: Latents, folder: Path
) -> GaussianMixtureDenoiser | None:
    """
    Fits the Gaussian mixture in the main process, which saves it in `folder` for the others and for resumed runs.

    Returns `None` if `mixture_share` is 0, the latents are expression, or there are too many combinations of labels.
    """
    if config.codec != "program" or config.mixture_share == 0:
        return None
    path, mixture = folder / "gaussian_mixture", None
    known, combinations = np.unique(latents.class_labels.numpy(), axis=0, return_inverse=True)
    if not latents.condition_sizes:
        known, combinations = np.zeros((1, 0), dtype=np.int64), np.zeros(len(latents), dtype=np.int64)
    max_components = min(MAX_SIZE // (latents.values.shape[1] ** 2 * len(known)), MAX_COMPONENTS)
    if max_components == 0:
        reason = f"a Gaussian mixture of {len(known):,} combinations of labels is too slow"
        logger.warning(f"--mixture_share {config.mixture_share}: {reason}. The network learns from the cells alone.")
        return None
    with sync_errors(accelerator):
        if accelerator.is_main_process and not path.is_dir():
            mixture = fit_gaussian_mixture(latents, known, combinations.ravel(), max_components, config.seed)
            write_whole(path, mixture.save_pretrained)
            share = f"Its share of the training target falls to {config.mixture_share:.0%} (--mixture_share)."
            logger.info(f"Gaussian mixture: {mixture.config.num_components} components. {share}")
    return (mixture or GaussianMixtureDenoiser.from_pretrained(path)).to(accelerator.device)


def fit_gaussian_mixture(
    latents: Latents, known: np.ndarray, combinations: np.ndarray, max_components: int, seed: int
) -> GaussianMixtureDenoiser:
    """
    Fits a Gaussian mixture to at most 20,000 cells, with `max_components` for each combination of labels.

    Each combination gives the same number of cells, if it has enough. Otherwise a rare one would have no component.
    `known` are the combinations, `(num_combinations, num_label_keys)`; `combinations` is the index of each cell's.
    """
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
    )
    # A cell without labels has each combination as often as the training cells have it, not as the chosen ones do.
    numbers = [known.tolist().index(labels) for labels in mixture.component_labels.tolist()]
    share_of_chosen = np.bincount(combinations[chosen], minlength=len(counts)) / len(chosen)
    ratios = (counts / len(latents) / share_of_chosen)[numbers]
    with torch.no_grad():
        mixture.log_weights += torch.from_numpy(np.log(ratios)).to(mixture.log_weights)
    return mixture


def share_of_mixture(config: TrainingConfig, progress: float) -> float:
    """The share of the Gaussian mixture in the training target, which falls from 1, for a progress from 0 to 1."""
    return 1 - (1 - config.mixture_share) * progress
