"""The closed form that the denoiser learns from at first."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..data.dataset import CellDataset
from ..models.gaussian_mixture import MAX_COMPONENTS, GaussianMixtureDenoiser
from ..sampling import training_scheduler
from .checkpoints import write_whole
from .config import TrainingConfig
from .processes import interruption, together


logger = get_logger(__name__)

MAX_CELLS = 20_000  # to which the mixture is fitted
MAX_SIZE = 2**19  # components x values², beyond which it would take longer than the network


def prepare_mixture(
    config: TrainingConfig, accelerator: Accelerator, dataset: CellDataset, folder: Path
) -> GaussianMixtureDenoiser | None:
    """
    Fits the mixture on the main process, unless the run has one; all processes get the same one.

    Args:
        config ([`TrainingConfig`]): What is trained.
        accelerator (`Accelerator`): The processes.
        dataset ([`CellDataset`]): Training cells, encoded.
        folder (`Path`): Where the run keeps it.

    Returns:
        [`GaussianMixtureDenoiser`], or `None` if the network learns from the cells alone: it was told to, or the
        labels have so many combinations that a mixture would take longer than the network.
    """
    if config.codec != "program" or config.mixture_share == 0:
        return None
    finished = folder / "mixture"
    with together(accelerator), interruption.deferred():
        known, combinations = _combinations(dataset)
        assert dataset.codec is not None  # the cells are encoded
        num_combinations, num_values = len(known), dataset.codec.num_features
        max_components = MAX_SIZE // (num_values**2 * num_combinations)
        if max_components == 0:
            logger.warning(
                f"--mixture_share {config.mixture_share}: the labels have {num_combinations:,} combinations,"
                f" and a mixture of {num_values} values for each would take longer than the network, which learns from"
                " the cells alone."
            )
            return None
        if accelerator.is_main_process and not finished.is_dir():
            folder.mkdir(exist_ok=True)
            max_components = min(max_components, MAX_COMPONENTS)
            mixture = fit_mixture(dataset, known, combinations, max_components, config.seed)
            write_whole(finished, mixture.save_pretrained)
            logger.info(
                f"A Gaussian mixture of {mixture.config.num_components} components, from which the denoiser learns at"
                f" first: at the end it is {config.mixture_share:.0%} of the target (--mixture_share)."
            )
    try:
        mixture = GaussianMixtureDenoiser.from_pretrained(finished)
    except Exception as error:  # of Diffusers and safetensors
        raise OSError(f"{finished} is damaged: train again, with --overwrite_output_dir.") from error
    return mixture.to(accelerator.device)


def fit_mixture(
    dataset: CellDataset, known: list[list[int]], combinations: np.ndarray, max_components: int, seed: int
) -> GaussianMixtureDenoiser:
    """
    The mixture of 20,000 training cells at most, of every combination of labels as many as of any other, where there
    are: a rare one would have no component else.

    Args:
        dataset ([`CellDataset`]): Training cells, encoded.
        known (`list[list[int]]`): Every combination of labels that a cell has.
        combinations (`np.ndarray` of shape `(cells,)`): Which of them each cell has.
        max_components (`int`): Of one combination.
        seed (`int`): Of the cells and of the fit.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    by_label = order[np.argsort(combinations[order], kind="stable")]
    counts = np.bincount(combinations)
    rank = np.arange(len(dataset)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the combination
    chosen = np.sort(by_label[np.argsort(rank, kind="stable")[:MAX_CELLS]])
    mixture = GaussianMixtureDenoiser.fit(
        **dataset.__getitems__(chosen.tolist()),
        condition_sizes=dataset.condition_sizes,
        noise_scheduler=training_scheduler("v_prediction"),
        max_components=max_components,
        seed=seed,
    )
    # A cell without labels is of each combination as often as all cells are, and not as the chosen ones.
    numbers = [known.index(labels) for labels in mixture.component_labels.tolist()]
    of_chosen = np.bincount(combinations[chosen], minlength=len(counts)) / len(chosen)
    ratios = (counts / len(dataset) / of_chosen)[numbers]
    with torch.no_grad():
        mixture.log_weights += torch.from_numpy(np.log(ratios)).to(mixture.log_weights)
    return mixture


def share_of_mixture(config: TrainingConfig, progress: float) -> float:
    """What part of the target is the mixture's, when `progress` of the training, from 0 to 1, is over."""
    return 1 - (1 - config.mixture_share) * progress


def _combinations(dataset: CellDataset) -> tuple[list[list[int]], np.ndarray]:
    """Every combination of labels that a cell has, and which of them each cell has, `(cells,)`."""
    if not dataset.condition_sizes:
        return [[]], np.zeros(len(dataset), dtype=np.int64)
    known, numbers = np.unique(np.asarray(dataset.class_labels), axis=0, return_inverse=True)
    return known.tolist(), numbers.ravel()
