"""Stage one: fits the codec to the training cells."""

import math
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from tqdm.auto import tqdm

from ..data.dataset import CellDataset, encode_cells
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..models.likelihoods import LIKELIHOODS
from .config import TrainingConfig


logger = get_logger(__name__)

MAX_VALIDATION_CELLS = 2000
MAX_STEPS_BETWEEN_VALIDATIONS = 100
SKEWED = 0.75  # skewness of a program's activities from which a few cells have it
MIN_STEPS = 100  # before which the loss says little
MIN_IMPROVEMENT = 0.001  # share of the loss by which it must fall for patience to begin anew
STOP_TOLERANCES = {"nb_mixture": 0.003, "quantile_hurdle": 0.1}
MIN_PROGRAM_GAINS = {"nb_mixture": 0.01, "quantile_hurdle": 0.1}


def prepare_codec(
    config: TrainingConfig, accelerator: Accelerator, dataset: CellDataset, checkpoint: Path | None
) -> ProgramCodec | ExpressionCodec:
    """
    Fits the codec on the main process, or takes that of the run to resume; all processes get the same one.

    Args:
        config ([`TrainingConfig`]): Which codec, and how it is fitted.
        accelerator (`Accelerator`): The processes.
        dataset ([`CellDataset`]): Training cells.
        checkpoint (`Path`, *optional*): The checkpoint to go on from, beside which its run has left the codec.

    Returns:
        [`ProgramCodec`] or [`ExpressionCodec`]: on the CPU, whose latents of the training cells are standardised.
    """
    folder = (config.output_dir if checkpoint is None else checkpoint.parent) / "codec"
    codec_class, fit = CODECS[config.codec]
    if accelerator.is_main_process and checkpoint is None:
        fit(config, dataset, accelerator.device).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return codec_class.from_pretrained(folder)


def fit_expression_codec(config: TrainingConfig, dataset: CellDataset, device: torch.device) -> ExpressionCodec:
    """Measures the mean and the deviation of each gene's expression."""
    codec = ExpressionCodec(
        num_genes=dataset.matrix.shape[1],
        values=config.values,
        standardize=config.standardize,
        model_library_size=config.model_library_size,
    )
    codec.fit_statistics(dataset.matrix, dataset.library_size)
    return codec


def fit_program_codec(config: TrainingConfig, dataset: CellDataset, device: torch.device) -> ProgramCodec:
    """
    Fits gene programs, as many as cells set aside ask for.

    Unless their number is given, there are twice as many programs as long as they make the loss of the cells set aside
    lower by `min_program_gain`: each one is a dimension more for the denoiser to learn, and smaller gains cost more
    there than they bring here. Then the decoder alone is fitted once more, the latents are standardised, and
    axes are found along which programs can be read.
    """
    minutes = math.inf if config.max_train_minutes is None else config.max_train_minutes * config.codec_time_fraction
    deadline = time.monotonic() + 60 * minutes
    codec, best_loss = fit_programs(config, dataset, config.num_programs or config.min_programs, device, deadline)
    min_gain = config.min_program_gain
    if min_gain is None:
        min_gain = MIN_PROGRAM_GAINS[codec.config.likelihood]
    while config.num_programs is None and 2 * codec.config.num_programs <= config.max_programs:
        larger, loss = fit_programs(config, dataset, 2 * codec.config.num_programs, device, deadline)
        if best_loss - loss < min_gain * abs(best_loss):
            break
        codec, best_loss = larger, loss
    latents = encode_cells(dataset, codec)  # not yet standardised: the programs, and of counts the log library size
    refit_decoder(config, dataset, codec, latents[:, : codec.config.num_programs])
    codec.standardize_latents(latents)
    find_program_axes(codec, encode_cells(dataset, codec)[:, : codec.config.num_programs])
    return codec.eval()


def fit_programs(
    config: TrainingConfig, dataset: CellDataset, num_programs: int, device: torch.device, deadline: float
) -> tuple[ProgramCodec, float]:
    """
    Fits encoder and decoder together, until cells set aside say that it is enough, or the clock reaches the deadline.

    The cells set aside are *training* cells; held-out cells are never seen. The weights returned are the last ones,
    not those of the best loss: programs that follow their cells a little more closely, with a decoder fitted to them
    afterwards, give better cells (lab/experiments.md).

    Args:
        config ([`TrainingConfig`]): How it is fitted, and when it ends.
        dataset ([`CellDataset`]): Training cells.
        num_programs (`int`): How many programs.
        device (`torch.device`): Where to fit.
        deadline (`float`): Time of `time.monotonic()` at which it ends at the latest.

    Returns:
        `tuple[ProgramCodec, float]`: the codec, and the best loss of the cells set aside, in nats per cell; of log
        values it is counted from where the fit begins.

    Raises:
        `ValueError`: if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = torch.randperm(len(dataset), generator=generator).numpy()
    num_validation = min(max(1, int(len(dataset) * config.codec_validation_fraction)), MAX_VALIDATION_CELLS)
    validation_cells, train_cells = shuffled[:num_validation], shuffled[num_validation:]
    torch.manual_seed(config.seed)
    likelihood = "nb_mixture" if dataset.is_of_counts else "quantile_hurdle"
    codec = ProgramCodec(
        dataset.matrix.shape[1], num_programs, config.codec_hidden_size, likelihood, dataset.condition_sizes
    )
    codec.fit_statistics(dataset.matrix, dataset.library_size)
    codec = codec.to(device)
    optimizer = _optimizer(config, codec, codec.parameters(), config.codec_learning_rate)

    def loss_of(cells: np.ndarray) -> torch.Tensor:
        negative_log_likelihood, divergence = codec(*(values.to(device) for values in dataset.cells(cells)))
        return negative_log_likelihood + config.kl_weight * divergence

    @torch.no_grad()
    def validation_loss() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # always the same draws from the posterior
            losses = [loss_of(validation_cells[start : start + 512]) for start in range(0, num_validation, 512)]
        return torch.cat(losses).mean().item()

    # What the loss may rise by is a share of it; that of log values, whose density has no zero point, counts from
    # programs that say nothing.
    zero_point = 0.0 if dataset.is_of_counts else validation_loss()
    fitted = dataset.matrix[train_cells], dataset.library_size[train_cells]
    codec.start_programs(*fitted, config.program_prior_precision)
    tolerance = config.codec_stop_tolerance
    if tolerance is None:
        tolerance = STOP_TOLERANCES[likelihood]
    # Few cells are soon fitted too closely.
    steps_between_validations = min(MAX_STEPS_BETWEEN_VALIDATIONS, max(10, len(train_cells) // 10))
    best_loss, best_step, improved_loss, improved_step, step, stop = math.inf, 0, math.inf, 0, 0, False
    progress_bar = tqdm(desc=f"Gene programs ({num_programs})", unit=" steps", mininterval=1)
    while not stop:
        cells = torch.randint(len(train_cells), (config.codec_batch_size,), generator=generator).numpy()
        loss = loss_of(train_cells[cells]).mean() + prior_loss(config, codec, len(train_cells))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress_bar.update()
        stop = step == config.codec_max_steps or time.monotonic() > deadline
        if step % steps_between_validations == 0 or stop:
            aside = validation_loss()
            if not math.isfinite(aside):
                raise ValueError(
                    f"The loss of the gene programs is {aside} after {step} steps. Lower --codec_learning_rate."
                )
            best_loss, best_step = min((best_loss, best_step), (aside, step))
            scale = abs(best_loss - zero_point)
            if best_loss < improved_loss - MIN_IMPROVEMENT * scale:
                improved_loss, improved_step = best_loss, step
            stop = stop or (aside - best_loss > tolerance * scale and step >= MIN_STEPS)
            stop = stop or step - improved_step >= config.codec_patience
            progress_bar.set_postfix(loss=round(loss.item(), 2), loss_set_aside=round(aside, 2))
    progress_bar.close()
    logger.info(f"{num_programs} programs: {best_loss:.2f} nats per cell set aside after {best_step} steps.")
    return codec, best_loss - zero_point


def refit_decoder(config: TrainingConfig, dataset: CellDataset, codec: ProgramCodec, programs: torch.Tensor):
    """
    Fits the decoder once more, to all training cells and the encoder's final programs of them.

    The denoiser will imitate these programs, without the noise under which the decoder was trained: what varies in the
    cells and is not in the programs must be in the decoder's noise, no more and no less. Here labels get their
    effects: with them in the first fit, programs would not tell types apart.

    Args:
        config ([`TrainingConfig`]): How many steps, and their learning rate.
        dataset ([`CellDataset`]): Training cells.
        codec ([`ProgramCodec`]): Its heads are changed.
        programs (`torch.Tensor` of shape `(cells, num_programs)`): Programs of the training cells.
    """
    generator = torch.Generator().manual_seed(config.seed)
    parameters = [*codec.heads.parameters(), *codec.label_effects.parameters()]
    optimizer = _optimizer(config, codec, parameters, config.decoder_learning_rate)
    lr_scheduler = get_scheduler("cosine", optimizer, num_training_steps=config.decoder_steps, num_warmup_steps=0)
    for _ in tqdm(range(config.decoder_steps), desc="Decoder", unit=" steps", mininterval=1):
        cells = torch.randint(len(dataset), (2 * config.codec_batch_size,), generator=generator)
        counts, library_size = (values.to(codec.device) for values in dataset.cells(cells.numpy()))
        class_labels = None if dataset.class_labels is None else dataset.class_labels[cells]
        loss = codec.decoder_loss(programs[cells].to(codec.device), counts, library_size, class_labels).mean()
        loss = loss + prior_loss(config, codec, len(dataset))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise ValueError("The decoder's weights are not finite. Lower --decoder_learning_rate.")


@torch.no_grad()
def find_program_axes(codec: ProgramCodec, programs: torch.Tensor):
    """
    Independent component analysis of the training cells' programs: what is decoded is the same along any axes, and
    along these a response such as that to interferon is one program instead of several (lab/experiments.md). The
    latents keep their own axes.

    These programs are uncorrelated, come in the order of what they explain, and point to the few cells that have them;
    where about as many do as don't, to where they raise few genes by much rather than many by little.

    Args:
        codec ([`ProgramCodec`]): Fitted, its latents standardised; gets its `program_axes`.
        programs (`torch.Tensor` of shape `(cells, num_programs)`):
            Standardised programs of the training cells. With fewer than two cells for each program, or one that is the
            same in all cells, they keep their axes.
    """
    is_flat = torch.linalg.matrix_rank(programs - programs.mean(0)) < programs.shape[1]
    if len(programs) < 2 * programs.shape[1] or is_flat:
        return
    centered = (programs - programs.mean(0)).double()
    variances, directions = torch.linalg.eigh(centered.T @ centered / len(centered))
    # The whitening that moves the programs least: from the same start, fits to other cells find the same components.
    whitening = directions @ torch.diag(variances.rsqrt()) @ directions.T
    analysis = FastICA(whiten=False, w_init=np.eye(len(whitening)), max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # any rotation will do, if there is no best one
        analysis.fit((centered @ whitening).numpy())
    codec.program_axes.copy_(torch.from_numpy(analysis.components_) @ whitening)
    loadings = codec.weighted_loadings  # (genes, num_programs)
    skewness = (centered.to(loadings) @ codec.program_axes.T).pow(3).mean(0)  # of activities, whose variance is 1
    signs = torch.where(skewness.abs() > SKEWED, skewness, loadings.pow(3).sum(0)).sign()
    order = loadings.square().sum(0).argsort(descending=True)
    codec.program_axes.copy_((signs[:, None] * codec.program_axes)[order])


def prior_loss(config: TrainingConfig, codec: ProgramCodec, num_cells: int) -> torch.Tensor:
    """The Gaussian prior on what programs and labels do to a gene, in nats per cell: few counts tell little of it."""
    squares = sum(head.weight.square().sum() for head in codec.heads.values()) * config.program_prior_precision
    for effects in codec.label_effects.values():
        squares = squares + effects.weight.square().sum() * config.label_prior_precision
    for name, precision in LIKELIHOODS[codec.config.likelihood].PRIOR_PRECISIONS.items():
        squares = squares + precision * codec.gene_parameters[name].square().sum()
    return squares / (2 * num_cells)


def _optimizer(
    config: TrainingConfig, codec: ProgramCodec, parameters: Iterable[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Adam:
    """Adam with a learning rate of its own for what says how much each gene varies in cells of the same programs."""
    noise = [*(head.bias for head in list(codec.heads.values())[1:]), *codec.gene_parameters.values()]
    others = [parameter for parameter in parameters if all(parameter is not one for one in noise)]
    groups = [{"params": others}, {"params": noise, "lr": config.dispersion_learning_rate}]
    return torch.optim.Adam(groups, lr=learning_rate)


CODECS: dict[str, tuple[Any, Any]] = {
    "program": (ProgramCodec, fit_program_codec),
    "expression": (ExpressionCodec, fit_expression_codec),
}
