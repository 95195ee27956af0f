"""Stage one: fits the codec to the training cells."""

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from tqdm.auto import tqdm

from ..data.latents import CellDataset, encode_cells
from ..files import write_whole
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..models.likelihoods import LIKELIHOODS
from .config import TrainingConfig
from .processes import sync_errors


logger = get_logger(__name__)

# The number of programs is doubled while that lowers the validation loss by this fraction. Log values have a density,
# whose logarithm has no zero point: their fractions are of the improvement since the start of the fit.
MIN_PROGRAMS = 16
MIN_GAINS = {"nb_mixture": 0.01, "quantile_hurdle": 0.1}
# Each gene's noise spans orders of magnitude, and must get there before the programs overfit.
DISPERSION_LEARNING_RATE = 1e-2
# A fit ends when the validation loss is above its best by this fraction, or after so many steps without improvement.
STOP_TOLERANCES = {"nb_mixture": 0.003, "quantile_hurdle": 0.1}
PATIENCE = 1000
MIN_IMPROVEMENT = 0.001
MIN_STEPS = 100
VALIDATION_FRACTION, MAX_VALIDATION_CELLS = 0.1, 2000  # of the training cells
MAX_STEPS_BETWEEN_VALIDATIONS = 100
TIME_FRACTION = 1 / 3  # of max_train_minutes
REFIT_FRACTION = 0.3  # of the time of stage one, for the second fit of the decoder
SKEWED = 0.75  # skewness of the activities above which a program belongs to a few cells


def prepare_codec(
    config: TrainingConfig, accelerator: Accelerator, cells: CellDataset, folder: Path, deadline: float = math.inf
) -> ProgramCodec | ExpressionCodec:
    """Fits the codec in the main process, which saves it in `folder` for the others and for resumed runs."""
    path, codec = folder / "codec", None
    with sync_errors(accelerator):
        if accelerator.is_main_process and not path.is_dir():
            if config.codec == "program":
                codec = fit_program_codec(config, cells, accelerator.device, deadline).cpu()
            else:
                codec = fit_expression_codec(config, cells)
            folder.mkdir(exist_ok=True)
            write_whole(path, codec.save_pretrained)
    codec_class = ProgramCodec if config.codec == "program" else ExpressionCodec
    return codec if codec is not None else codec_class.from_pretrained(path)


def fit_expression_codec(config: TrainingConfig, cells: CellDataset) -> ExpressionCodec:
    """Measures the mean and standard deviation of each gene."""
    num_genes = cells.matrix.shape[1]
    codec = ExpressionCodec(num_genes, config.values, config.standardize, config.model_library_size)
    codec.fit_statistics(cells.matrix, cells.library_size)
    return codec.eval()


def fit_program_codec(
    config: TrainingConfig, cells: CellDataset, device: torch.device, deadline: float = math.inf
) -> ProgramCodec:
    """
    Fits gene programs, standardises the latents, and finds axes along which the programs can be read.

    A number of programs that is not given is doubled while that lowers the validation loss enough. Each program is one
    more dimension for the denoiser to learn, and a smaller gain is not worth it. The fit ends at `deadline` at the
    latest, a time of `time.monotonic()`.
    """
    num_genes = cells.matrix.shape[1]
    search_deadline = deadline
    if config.decoder_steps > 0 and math.isfinite(deadline):
        search_deadline -= REFIT_FRACTION * max(0.0, deadline - time.monotonic())
    max_programs = min(config.max_programs, num_genes)
    first = config.num_programs or min(MIN_PROGRAMS, max_programs)
    codec, best_loss = fit_programs(config, cells, first, device, search_deadline)
    min_gain = MIN_GAINS[codec.config.likelihood]
    while config.num_programs is None and 2 * codec.config.num_programs <= max_programs:
        if time.monotonic() > search_deadline:
            break
        larger, loss = fit_programs(config, cells, 2 * codec.config.num_programs, device, search_deadline)
        if best_loss - loss < min_gain * abs(best_loss):
            break
        codec, best_loss = larger, loss
    num_programs = codec.config.num_programs
    latents = encode_cells(cells, codec)  # (cells, num_features), not standardised yet
    refit_decoder(config, cells, codec, latents[:, :num_programs], deadline)
    codec.standardize_latents(latents)
    latents = (latents - codec.latents_mean.cpu()) / codec.latents_std.cpu()  # as `codec.encode` returns them now
    find_program_axes(codec, latents[:, :num_programs])
    return codec.eval()


@dataclass
class EarlyStopping:
    """Ends a fit when its validation loss rises, or no longer falls. Fractions of it count from the zero point."""

    tolerance: float
    zero_point: float
    best_loss: float = math.inf
    best_step: int = 0
    improved_loss: float = math.inf
    improved_step: int = 0

    def should_stop(self, loss: float, step: int) -> bool:
        self.best_loss, self.best_step = min((self.best_loss, self.best_step), (loss, step))
        scale = abs(self.best_loss - self.zero_point)
        if self.best_loss < self.improved_loss - MIN_IMPROVEMENT * scale:
            self.improved_loss, self.improved_step = self.best_loss, step
        is_worse = loss - self.best_loss > self.tolerance * scale and step >= MIN_STEPS
        return is_worse or step - self.improved_step >= PATIENCE


def fit_programs(
    config: TrainingConfig, cells: CellDataset, num_programs: int, device: torch.device, deadline: float = math.inf
) -> tuple[ProgramCodec, float]:
    """
    Fits encoder and decoder together, until the loss of validation cells ends the fit.

    The validation cells are *training* cells; held-out cells are never seen. The weights are the last ones, not those
    of the best loss. Programs that follow their cells more closely give better cells once the decoder is fitted to
    them (lab/experiments.md). Returns the codec and its best validation loss in nats per cell. For log
    values, the loss counts from the start of the fit.
    """
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = torch.randperm(len(cells), generator=generator).numpy()
    num_validation = min(max(1, int(len(cells) * VALIDATION_FRACTION)), MAX_VALIDATION_CELLS)
    validation_cells, train_cells = shuffled[:num_validation], shuffled[num_validation:]
    codec = _new_codec(config, cells, num_programs).to(device)
    optimizer = _optimizer(codec, codec.parameters(), config.codec_learning_rate)
    zero_point = 0.0 if cells.is_counts else _validation_loss(config, cells, codec, validation_cells)
    codec.start_programs(cells.matrix[train_cells], cells.library_size[train_cells], config.program_prior_precision)
    stopping = EarlyStopping(STOP_TOLERANCES[codec.config.likelihood], zero_point)
    # A fit to few cells overfits soon.
    steps_between_validations = min(MAX_STEPS_BETWEEN_VALIDATIONS, max(10, len(train_cells) // 10))
    progress_bar = tqdm(desc=f"Gene programs ({num_programs})", unit=" steps", mininterval=1)
    step, stop = 0, False
    while not stop:
        batch = train_cells[torch.randint(len(train_cells), (config.codec_batch_size,), generator=generator).numpy()]
        loss = _loss(config, cells, codec, batch).mean() + prior_loss(config, codec, len(train_cells))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress_bar.update()
        stop = step == config.codec_max_steps or time.monotonic() > deadline
        if step % steps_between_validations == 0 or stop:
            validation_loss = _validation_loss(config, cells, codec, validation_cells)
            if not math.isfinite(validation_loss):
                raise ValueError(f"Gene programs: validation loss {validation_loss}. Lower --codec_learning_rate.")
            stop = stopping.should_stop(validation_loss, step) or stop
            progress_bar.set_postfix(loss=round(loss.item(), 2), validation_loss=round(validation_loss, 2))
    progress_bar.close()
    found = f"validation loss {stopping.best_loss:.2f} nats per cell"
    logger.info(f"Gene programs: {found} ({num_programs} programs, {stopping.best_step} steps).")
    return codec, stopping.best_loss - zero_point


def _new_codec(config: TrainingConfig, cells: CellDataset, num_programs: int) -> ProgramCodec:
    """A codec with random weights and the statistics of the cells."""
    torch.manual_seed(config.seed)
    codec = ProgramCodec(
        num_genes=cells.matrix.shape[1],
        num_programs=num_programs,
        hidden_size=config.codec_hidden_size,
        likelihood="nb_mixture" if cells.is_counts else "quantile_hurdle",
        condition_sizes=cells.condition_sizes,
    )
    codec.fit_statistics(cells.matrix, cells.library_size)
    return codec


def _loss(config: TrainingConfig, cells: CellDataset, codec: ProgramCodec, indices: np.ndarray) -> torch.Tensor:
    """The loss of each of some cells, `(cells,)`."""
    values, library_size = cells.cells(indices)
    negative_log_likelihood, divergence = codec(values.to(codec.device), library_size.to(codec.device))
    return negative_log_likelihood + config.kl_weight * divergence


@torch.no_grad()
def _validation_loss(config: TrainingConfig, cells: CellDataset, codec: ProgramCodec, indices: np.ndarray) -> float:
    """The mean loss of some cells, always with the same draws from the posterior."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = [_loss(config, cells, codec, indices[start : start + 512]) for start in range(0, len(indices), 512)]
    return torch.cat(losses).mean().item()


def refit_decoder(
    config: TrainingConfig, cells: CellDataset, codec: ProgramCodec, programs: torch.Tensor, deadline: float = math.inf
):
    """
    Fits the decoder once more, to all training cells and their final programs.

    The denoiser imitates these programs, without the posterior noise under which the decoder was first trained. So
    all variation that is not in the programs must be in the decoder's noise. Labels get their effects here: with them
    in the first fit, the programs would not distinguish cell types. The learning rate falls to zero by the last step,
    or by `deadline`. `programs` has the shape `(cells, num_programs)`.
    """
    generator = torch.Generator().manual_seed(config.seed)
    parameters = [*codec.heads.parameters(), *codec.label_effects.parameters()]
    optimizer = _optimizer(codec, parameters, config.decoder_learning_rate)
    highest = [group["lr"] for group in optimizer.param_groups]
    step, start = 0, time.monotonic()
    progress_bar = tqdm(total=config.decoder_steps, desc="Decoder", unit=" steps", mininterval=1)
    while step < config.decoder_steps and (time.monotonic() < deadline or step == 0):
        progress = step / config.decoder_steps
        if math.isfinite(deadline):
            progress = max(progress, min((time.monotonic() - start) / max(deadline - start, 1e-9), 1.0))
        for group, rate in zip(optimizer.param_groups, highest):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        batch = torch.randint(len(cells), (2 * config.codec_batch_size,), generator=generator)
        values, library_size = cells.cells(batch.numpy())
        class_labels = None if cells.class_labels is None else cells.class_labels[batch]
        some, values, library_size = (one.to(codec.device) for one in (programs[batch], values, library_size))
        loss = codec.decoder_loss(some, values, library_size, class_labels).mean()
        loss = loss + prior_loss(config, codec, len(cells))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress_bar.update()
    progress_bar.close()
    if step < config.decoder_steps:
        logger.warning(f"Decoder: time for {step} of {config.decoder_steps} steps. Raise --max_train_minutes.")
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise ValueError("Decoder: the weights are not finite. Lower --decoder_learning_rate.")


@torch.no_grad()
def find_program_axes(codec: ProgramCodec, programs: torch.Tensor):
    """
    Finds independent components of the programs. Decoded cells are the same along any axes. Along these, a response
    such as that to interferon is one program instead of several (lab/experiments.md). The latents keep their axes.

    The components are uncorrelated and sorted by the variance that they explain. A program is positive in the few
    cells that have it. If its activities are not skewed, it is positive where it raises few genes by much. The
    standardised programs `(cells, num_programs)` keep their axes if cells are few or a program is constant.
    """
    is_flat = torch.linalg.matrix_rank(programs - programs.mean(0)) < programs.shape[1]
    if len(programs) < 2 * programs.shape[1] or is_flat:
        return
    centered = (programs - programs.mean(0)).double()
    variances, directions = torch.linalg.eigh(centered.T @ centered / len(centered))
    # This whitening moves the programs least, so that fits to other cells find the same components.
    whitening = directions @ torch.diag(variances.rsqrt()) @ directions.T
    analysis = FastICA(whiten=False, w_init=np.eye(len(whitening)), max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # without a best rotation, any will do
        analysis.fit((centered @ whitening).numpy())
    codec.program_axes.copy_(torch.from_numpy(analysis.components_) @ whitening)
    loadings = codec.weighted_loadings  # (genes, num_programs)
    skewness = (centered.to(loadings) @ codec.program_axes.T).pow(3).mean(0)  # of activities, whose variance is 1
    signs = torch.where(skewness.abs() > SKEWED, skewness, loadings.pow(3).sum(0)).sign()
    order = loadings.square().sum(0).argsort(descending=True)
    codec.program_axes.copy_((signs[:, None] * codec.program_axes)[order])


def prior_loss(config: TrainingConfig, codec: ProgramCodec, num_cells: int) -> torch.Tensor:
    """The Gaussian prior on the effects of programs and labels on a gene, in nats per cell."""
    squares = sum(head.weight.square().sum() for head in codec.heads.values()) * config.program_prior_precision
    for effects in codec.label_effects.values():
        squares = squares + effects.weight.square().sum() * config.label_prior_precision
    for name, precision in LIKELIHOODS[codec.config.likelihood].PRIOR_PRECISIONS.items():
        squares = squares + precision * codec.gene_parameters[name].square().sum()
    return squares / (2 * num_cells)


def _optimizer(
    codec: ProgramCodec, parameters: Iterable[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Adam:
    """Adam with a separate learning rate for each gene's noise."""
    noise = [*(head.bias for head in list(codec.heads.values())[1:]), *codec.gene_parameters.values()]
    others = [parameter for parameter in parameters if all(parameter is not one for one in noise)]
    groups = [{"params": others}, {"params": noise, "lr": DISPERSION_LEARNING_RATE}]
    return torch.optim.Adam(groups, lr=learning_rate)
