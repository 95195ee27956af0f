"""Stage one: fits the codec to the training cells."""

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from tqdm.auto import tqdm

from ..data.dataset import CellDataset, encode_cells
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..models.likelihoods import LIKELIHOODS
from .checkpoints import check_finite, write_whole
from .config import TrainingConfig
from .processes import interruption, together
from .progress import FitProgress, save_seconds


logger = get_logger(__name__)

MAX_VALIDATION_CELLS = 2000
MAX_STEPS_BETWEEN_VALIDATIONS = 100
SKEWED = 0.75  # skewness of a program's activities from which a few cells have it
REFIT_SHARE = 0.3  # of stage one's time, for the decoder's second fit
MIN_STEPS = 100  # before which the loss says little
MIN_IMPROVEMENT = 0.001  # share of the loss by which it must fall for patience to begin anew
STOP_TOLERANCES = {"nb_mixture": 0.003, "quantile_hurdle": 0.1}
MIN_PROGRAM_GAINS = {"nb_mixture": 0.01, "quantile_hurdle": 0.1}


def prepare_codec(
    config: TrainingConfig, accelerator: Accelerator, dataset: CellDataset, folder: Path, start_time: float
) -> ProgramCodec | ExpressionCodec:
    """
    Fits the codec on the main process, unless the run has a finished one; all processes get the same one.

    Args:
        config ([`TrainingConfig`]): Which codec, and how it is fitted.
        accelerator (`Accelerator`): The processes.
        dataset ([`CellDataset`]): Training cells.
        folder (`Path`):
            Where the run keeps the finished codec, and what an unfinished one goes on from. The pipeline gets a codec
            of its own: this one stays whole whatever happens to that.
        start_time (`float`): Time of `time.monotonic()` at which the training began.

    Returns:
        [`ProgramCodec`] or [`ExpressionCodec`]: on the CPU, whose latents of the training cells are standardised.

    Raises:
        ValueError: If there are fewer genes than programs, or weights that are not finite.
        TrainingInterrupted: If a signal came; the same call then goes on.
    """
    codec_class, fit = CODECS[config.codec]
    finished = folder / "codec"
    with together(accelerator), interruption.deferred():
        if accelerator.is_main_process and not finished.is_dir():
            folder.mkdir(exist_ok=True)
            # Of more cells than fit in memory, a random part says enough.
            codec = fit(config, dataset.sample(config.seed), accelerator.device, folder, start_time)
            named = dict(codec.named_parameters()) | {
                "latents_mean": codec.latents_mean,
                "latents_std": codec.latents_std,
            }
            check_finite("The codec", named, "Lower --codec_learning_rate, or look for odd values in the cells.")
            save_seconds(folder, time.monotonic() - start_time)
            write_whole(finished, codec.save_pretrained)
            for path in folder.glob("*.pt"):
                path.unlink()
    try:
        return codec_class.from_pretrained(finished)
    except Exception as error:  # of Diffusers and safetensors
        raise OSError(f"{finished} is damaged: train again, with --overwrite_output_dir.") from error


def fit_expression_codec(
    config: TrainingConfig,
    dataset: CellDataset,
    device: torch.device,
    folder: Path | None = None,
    start_time: float | None = None,
) -> ExpressionCodec:
    """Measures the mean and the deviation of each gene's expression. There is nothing to go on from, and no hurry."""
    codec = ExpressionCodec(
        num_genes=dataset.matrix.shape[1],
        values=config.values,
        standardize=config.standardize,
        model_library_size=config.model_library_size,
    )
    codec.fit_statistics(dataset.matrix, dataset.library_size)
    return codec


def fit_program_codec(
    config: TrainingConfig,
    dataset: CellDataset,
    device: torch.device,
    folder: Path | None = None,
    start_time: float | None = None,
) -> ProgramCodec:
    """
    Fits gene programs, as many as cells set aside ask for.

    Unless their number is given, there are twice as many programs as long as they make the loss of the cells set aside
    lower by `min_program_gain`: each one is a dimension more for the denoiser to learn, and smaller gains cost more
    there than they bring here. Then the decoder alone is fitted once more, the latents are standardised, and
    axes are found along which programs can be read.

    Each fit goes on from its file in `folder`, where there is one. Of the time since `start_time` stage one has a
    share, and of that the decoder's second fit.
    """
    num_genes = dataset.matrix.shape[1]
    if config.num_programs is not None and config.num_programs > num_genes:
        raise ValueError(f"--num_programs {config.num_programs}: there are only {num_genes} genes; ask for fewer.")
    start_time = time.monotonic() if start_time is None else start_time
    minutes = math.inf if config.max_train_minutes is None else config.max_train_minutes * config.codec_time_fraction
    deadline = start_time + 60 * minutes
    has_refit = config.decoder_steps > 0 and math.isfinite(minutes)
    search_deadline = deadline - REFIT_SHARE * 60 * minutes if has_refit else deadline
    first = config.num_programs or min(config.min_programs, num_genes)
    codec, best_loss = fit_programs(config, dataset, first, device, search_deadline, folder, start_time)
    min_gain = config.min_program_gain
    if min_gain is None:
        min_gain = MIN_PROGRAM_GAINS[codec.config.likelihood]
    while config.num_programs is None and 2 * codec.config.num_programs <= min(config.max_programs, num_genes):
        if time.monotonic() > search_deadline:
            break
        number = 2 * codec.config.num_programs
        larger, loss = fit_programs(config, dataset, number, device, search_deadline, folder, start_time)
        if best_loss - loss < min_gain * abs(best_loss):
            break
        codec, best_loss = larger, loss
    latents = encode_cells(dataset, codec)  # not yet standardised: the programs, and of counts the log library size
    programs = latents[:, : codec.config.num_programs]
    refit_decoder(config, dataset, codec, programs, deadline, folder, start_time)
    codec.standardize_latents(latents)
    find_program_axes(codec, encode_cells(dataset, codec)[:, : codec.config.num_programs])
    return codec.eval()


@dataclass
class EarlyStopping:
    """
    The losses of the cells set aside, in nats per cell, and whether they say that it is enough.

    Args:
        tolerance (`float`): The fit ends when the loss is above its best by this share of it.
        patience (`int`): It also ends when it has not improved by a thousandth for so many steps.
        zero_point (`float`):
            What shares are counted from: that of log values, whose density has no zero point, is the loss of programs
            that say nothing.
    """

    tolerance: float
    patience: int
    zero_point: float
    best_loss: float = math.inf
    best_step: int = 0
    improved_loss: float = math.inf
    improved_step: int = 0

    def losses(self) -> dict[str, float]:
        """What it has seen, for a fit that goes on."""
        return {name: getattr(self, name) for name in ("best_loss", "best_step", "improved_loss", "improved_step")}

    def is_enough(self, loss: float, step: int) -> bool:
        self.best_loss, self.best_step = min((self.best_loss, self.best_step), (loss, step))
        scale = abs(self.best_loss - self.zero_point)
        if self.best_loss < self.improved_loss - MIN_IMPROVEMENT * scale:
            self.improved_loss, self.improved_step = self.best_loss, step
        is_worse = loss - self.best_loss > self.tolerance * scale and step >= MIN_STEPS
        return is_worse or step - self.improved_step >= self.patience


def fit_programs(
    config: TrainingConfig,
    dataset: CellDataset,
    num_programs: int,
    device: torch.device,
    deadline: float = math.inf,
    folder: Path | None = None,
    start_time: float = 0.0,
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
        deadline (`float`, defaults to never): Time of `time.monotonic()` at which it ends at the latest.
        folder (`Path`, *optional*): Where an interrupted fit is kept, to go on from.
        start_time (`float`): Time at which the training began.

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
    codec = _new_codec(config, dataset, num_programs).to(device)
    optimizer = _optimizer(config, codec, codec.parameters(), config.codec_learning_rate)

    tolerance = config.codec_stop_tolerance
    if tolerance is None:
        tolerance = STOP_TOLERANCES[codec.config.likelihood]
    zero_point = 0.0 if dataset.is_of_counts else _validation_loss(config, dataset, codec, validation_cells)
    path = None if folder is None else folder / f"programs-{num_programs}.pt"
    progress = FitProgress(path, codec, optimizer, generator, start_time)
    saved = progress.load()
    if saved is None:
        fitted = dataset.matrix[train_cells], dataset.library_size[train_cells]
        codec.start_programs(*fitted, config.program_prior_precision)
    stopping = EarlyStopping(tolerance, config.codec_patience, zero_point, **(saved or {}).get("losses", {}))
    step, stop = (0, False) if saved is None else (saved["step"], saved["is_finished"])
    # Few cells are soon fitted too closely.
    steps_between_validations = min(MAX_STEPS_BETWEEN_VALIDATIONS, max(10, len(train_cells) // 10))
    progress_bar = tqdm(desc=f"Gene programs ({num_programs})", initial=step, unit=" steps", mininterval=1)
    while not stop:
        cells = torch.randint(len(train_cells), (config.codec_batch_size,), generator=generator).numpy()
        loss = _loss_of(config, dataset, codec, train_cells[cells]).mean() + prior_loss(
            config, codec, len(train_cells)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress_bar.update()
        stop = step == config.codec_max_steps or time.monotonic() > deadline
        if step % steps_between_validations == 0 or stop:
            aside = _validation_loss(config, dataset, codec, validation_cells)
            if not math.isfinite(aside):
                raise ValueError(
                    f"The loss of the gene programs is {aside} after {step} steps. Lower --codec_learning_rate."
                )
            stop = stopping.is_enough(aside, step) or stop
            progress_bar.set_postfix(loss=round(loss.item(), 2), loss_set_aside=round(aside, 2))
        progress.step({"step": step, "is_finished": stop, "losses": stopping.losses()}, must_save=stop)
    progress_bar.close()
    logger.info(
        f"{num_programs} programs: {stopping.best_loss:.2f} nats per cell set aside after {stopping.best_step} steps."
    )
    return codec, stopping.best_loss - zero_point


def _new_codec(config: TrainingConfig, dataset: CellDataset, num_programs: int) -> ProgramCodec:
    """With random weights, and the cells' statistics."""
    torch.manual_seed(config.seed)
    likelihood = "nb_mixture" if dataset.is_of_counts else "quantile_hurdle"
    codec = ProgramCodec(
        dataset.matrix.shape[1], num_programs, config.codec_hidden_size, likelihood, dataset.condition_sizes
    )
    codec.fit_statistics(dataset.matrix, dataset.library_size)
    return codec


def _loss_of(config: TrainingConfig, dataset: CellDataset, codec: ProgramCodec, cells: np.ndarray) -> torch.Tensor:
    """Of each of some cells, `(cells,)`."""
    negative_log_likelihood, divergence = codec(*(values.to(codec.device) for values in dataset.cells(cells)))
    return negative_log_likelihood + config.kl_weight * divergence


@torch.no_grad()
def _validation_loss(config: TrainingConfig, dataset: CellDataset, codec: ProgramCodec, cells: np.ndarray) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # always the same draws from the posterior
        losses = [_loss_of(config, dataset, codec, cells[start : start + 512]) for start in range(0, len(cells), 512)]
    return torch.cat(losses).mean().item()


def refit_decoder(
    config: TrainingConfig,
    dataset: CellDataset,
    codec: ProgramCodec,
    programs: torch.Tensor,
    deadline: float = math.inf,
    folder: Path | None = None,
    start_time: float = 0.0,
):
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
        deadline (`float`, defaults to never):
            Time of `time.monotonic()` at which it ends at the latest. The learning rate falls to zero by then.
        folder (`Path`, *optional*): Where an interrupted fit is kept, to go on from.
        start_time (`float`): Time at which the training began.
    """
    generator = torch.Generator().manual_seed(config.seed)
    parameters = [*codec.heads.parameters(), *codec.label_effects.parameters()]
    optimizer = _optimizer(config, codec, parameters, config.decoder_learning_rate)
    highest = [group["lr"] for group in optimizer.param_groups]
    path = None if folder is None else folder / f"decoder-{codec.config.num_programs}.pt"
    progress = FitProgress(path, codec, optimizer, generator, start_time)
    step = (progress.load() or {"step": 0})["step"]
    first_step, began = step, time.monotonic()
    progress_bar = tqdm(total=config.decoder_steps, initial=step, desc="Decoder", unit=" steps", mininterval=1)
    while step < config.decoder_steps and (time.monotonic() < deadline or step == 0):
        done = step / config.decoder_steps
        if math.isfinite(deadline):  # by steps, or from where it began by the clock, whichever is further
            begun = first_step / config.decoder_steps
            by_clock = (time.monotonic() - began) / max(deadline - began, 1e-9)
            done = max(done, begun + (1 - begun) * min(by_clock, 1.0))
        for group, rate in zip(optimizer.param_groups, highest):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
        cells = torch.randint(len(dataset), (2 * config.codec_batch_size,), generator=generator)
        counts, library_size = (values.to(codec.device) for values in dataset.cells(cells.numpy()))
        class_labels = None if dataset.class_labels is None else dataset.class_labels[cells]
        loss = codec.decoder_loss(programs[cells].to(codec.device), counts, library_size, class_labels).mean()
        loss = loss + prior_loss(config, codec, len(dataset))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress_bar.update()
        progress.step({"step": step})
    progress_bar.close()
    if step < config.decoder_steps:
        logger.warning(f"The decoder took {step} of {config.decoder_steps} steps, as --max_train_minutes are few.")
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
