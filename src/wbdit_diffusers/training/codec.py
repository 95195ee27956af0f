"""Stage one: fits the codec to the training cells."""

import copy
import math
import time
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from tqdm.auto import tqdm

from ..data.latents import CellDataset, encode_cells
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..models.likelihoods import LIKELIHOODS
from ..processing.genes import most_variable
from ..processing.normalize import log_normalize
from ..progress import bar_options, duration
from .config import CodecConfig
from .init_from import Prior, Start
from .other_genes import add_genes


logger = get_logger(__name__)

# Genes that define the programs: variable ones, and those with most counts, such as ribosomal ones
NUM_VARIABLE_GENES, NUM_FREQUENT_GENES = 2000, 200
# The number of programs is doubled while that lowers the validation loss by this fraction. Log values have a density,
# whose logarithm has no zero point: their fractions are of the improvement since the start of the fit.
MIN_PROGRAMS = 16
MIN_GAINS = {"nb_mixture": 0.01, "quantile_hurdle": 0.1}
# Each gene's noise spans orders of magnitude, and must get there before the programs overfit.
DISPERSION_LEARNING_RATE = 1e-2
# A fit ends when the validation loss is above its best by this fraction, or after so many steps without improvement.
STOP_TOLERANCES = {"nb_mixture": 0.003, "quantile_hurdle": 0.1}
PATIENCE, MIN_STEPS, MIN_IMPROVEMENT = 1000, 100, 0.001
VALIDATION_FRACTION, MAX_VALIDATION_CELLS = 0.1, 2000  # of the training cells
TIME_FRACTION = 1 / 3  # of max_train_minutes
REFIT_FRACTION = 0.3  # of the time of stage one, for the second fit of the decoder
MEAN_TOLERANCE, NUM_CORRECTIONS = 0.08, 4  # of a gene's mean; more of one gene is less of the others
MEAN_FACTORS = (1e-3, 1e3)  # of one correction: a gene may have no counts
SKEWED = 0.75  # skewness of the activities above which a program belongs to a few cells


def fit_any_codec(
    config: CodecConfig,
    cells: CellDataset,
    device: torch.device,
    deadline: float = math.inf,
    start: Start | None = None,
) -> ProgramCodec | ExpressionCodec:
    """Fits gene programs, or measures the mean and standard deviation of each gene for an expression codec."""
    if config.codec == "program":
        return fit_program_codec(config, cells, device, deadline, start)
    codec = ExpressionCodec(cells.matrix.shape[1], config.values, config.standardize, config.model_library_size)
    codec.fit_statistics(cells.matrix, cells.library_size)
    return codec


def fit_program_codec(
    config: CodecConfig,
    cells: CellDataset,
    device: torch.device,
    deadline: float = math.inf,
    start: Start | None = None,
) -> ProgramCodec:
    """
    Fits gene programs, standardises the latents, and finds axes along which the programs can be read. Programs that
    start from another pipeline keep its scale and axes.
    """
    if start is not None:
        return fit_from(config, cells, device, deadline, start)
    search_deadline = deadline
    if config.decoder_steps > 0 and math.isfinite(deadline):
        search_deadline -= REFIT_FRACTION * max(0.0, deadline - time.monotonic())
    all_cells, variable = cells, None
    if cells.is_counts and cells.matrix.shape[1] > NUM_VARIABLE_GENES:
        variable = most_variable(log_normalize(cells.matrix, cells.library_size), NUM_VARIABLE_GENES)
        frequent = np.argsort(-np.asarray(cells.matrix.sum(axis=0)).ravel())[:NUM_FREQUENT_GENES]
        variable = np.union1d(variable, frequent)
        cells = copy.copy(all_cells)  # library sizes stay those over all genes
        cells.matrix = all_cells.matrix[:, variable]
    max_programs = min(config.num_programs or config.max_programs, cells.matrix.shape[1])
    num_programs = max_programs if config.num_programs else min(MIN_PROGRAMS, max_programs)
    codec, best_loss = fit_programs(config, cells, num_programs, device, search_deadline)
    while 2 * num_programs <= max_programs and time.monotonic() <= search_deadline:
        larger, loss = fit_programs(config, cells, 2 * num_programs, device, search_deadline)
        if best_loss - loss < MIN_GAINS[codec.config.likelihood] * abs(best_loss):
            break
        codec, best_loss, num_programs = larger, loss, 2 * num_programs
    latents = encode_cells(cells, codec)  # (cells, num_features), not standardised yet
    programs = latents[:, :num_programs]
    refit_decoder(config, cells, codec, programs, deadline)
    if variable is not None:
        codec = add_genes(config, all_cells, codec, variable, programs)
    if cells.is_counts:
        match_means(all_cells, codec, programs)
    codec.standardize_latents(latents)
    latents = (latents - codec.latents_mean.cpu()) / codec.latents_std.cpu()  # as `codec.encode` returns them now
    find_program_axes(codec, latents[:, :num_programs])
    return codec.eval()


def fit_from(
    config: CodecConfig, cells: CellDataset, device: torch.device, deadline: float, start: Start
) -> ProgramCodec:
    """
    Fits the codec of another pipeline to new cells, with a prior that keeps it near. Means are not matched: those of a
    few cells are noise.
    """
    codec, prior = start.start_codec(config, cells)
    codec.to(device)
    prior = {
        name: (mean.to(device), torch.as_tensor(precision, device=device)) for name, (mean, precision) in prior.items()
    }
    if config.freeze_codec:
        known = torch.from_numpy(np.append(start.genes >= 0, True)).to(device)[:, None]
        for head in codec.heads.values():  # loadings of the old genes stay
            head.weight.register_hook(lambda gradient: gradient.masked_fill(known, 0.0))
    else:
        codec, _ = fit_programs(config, cells, codec.config.num_programs, device, deadline, (codec, prior))
    latents = encode_cells(cells, codec)  # programs are standardised as those of the old cells
    programs = (latents * codec.latents_std.cpu() + codec.latents_mean.cpu())[:, :-1]
    refit_decoder(config, cells, codec, programs, deadline, prior)
    log_library_size = torch.from_numpy(np.log(cells.library_size)).float()
    codec.latents_mean[-1], codec.latents_std[-1] = log_library_size.mean(), log_library_size.std().clamp(min=1e-3)
    return codec.eval()


def fit_programs(
    config: CodecConfig,
    cells: CellDataset,
    num_programs: int,
    device: torch.device,
    deadline: float = math.inf,
    init: tuple[ProgramCodec, Prior] | None = None,
) -> tuple[ProgramCodec, float]:
    """Fits encoder and decoder together. Returns the codec and its best validation loss in nats per cell."""
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = torch.randperm(len(cells), generator=generator).numpy()
    num_validation = min(max(1, int(len(cells) * VALIDATION_FRACTION)), MAX_VALIDATION_CELLS)
    validation_cells, train_cells = shuffled[:num_validation], shuffled[num_validation:]
    torch.manual_seed(config.seed)
    zero_point = 0.0
    if init is None:
        codec = ProgramCodec(
            num_genes=cells.matrix.shape[1],
            num_programs=num_programs,
            hidden_size=config.codec_hidden_size,
            likelihood="nb_mixture" if cells.is_counts else "quantile_hurdle",
            condition_sizes=cells.condition_sizes,
        )
        codec.fit_statistics(cells.matrix, cells.library_size)
        codec.to(device)
        if not cells.is_counts:
            zero_point = _validation_loss(config, cells, codec, validation_cells)
        train_data = cells.matrix[train_cells], cells.library_size[train_cells]
        codec.start_programs(*train_data, config.program_prior_precision)
        init = codec, make_prior(config, codec)
    codec, prior = init
    optimizer = _optimizer(codec, codec.parameters(), config.codec_learning_rate)
    best_loss, improved_loss, improved_step = math.inf, math.inf, 0
    steps_between_validations = min(100, max(10, len(train_cells) // 10))  # a fit to few cells overfits soon
    progress_bar = tqdm(**bar_options(desc=f"Gene programs ({num_programs})", unit=" steps", mininterval=1))
    start, step, stop = time.monotonic(), 0, False
    while not stop:
        batch = train_cells[torch.randint(len(train_cells), (config.codec_batch_size,), generator=generator).numpy()]
        loss = _loss(config, cells, codec, batch).mean() + prior_loss(codec, prior, len(train_cells))
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
            best_loss = min(best_loss, validation_loss)
            scale = abs(best_loss - zero_point)
            if best_loss < improved_loss - MIN_IMPROVEMENT * scale:
                improved_loss, improved_step = best_loss, step
            is_worse = validation_loss - best_loss > STOP_TOLERANCES[codec.config.likelihood] * scale
            stop |= (is_worse and step >= MIN_STEPS) or step - improved_step >= PATIENCE
            progress_bar.set_postfix(loss=round(loss.item(), 2), validation_loss=round(validation_loss, 2))
    progress_bar.close()
    facts = f"{num_programs} programs, {step} steps, {duration(time.monotonic() - start)}"
    logger.info(f"Step 1 of 3, gene programs: validation loss {best_loss:.1f} nats per cell ({facts}).")
    # The weights stay the last ones: programs that follow their cells more closely give better cells once the decoder
    # is fitted to them (lab/experiments.md).
    return codec, best_loss - zero_point


def _loss(config: CodecConfig, cells: CellDataset, codec: ProgramCodec, indices: np.ndarray) -> torch.Tensor:
    """The loss of each of some cells, `(cells,)`."""
    values, library_size = cells.cells(indices)
    negative_log_likelihood, divergence = codec(values.to(codec.device), library_size.to(codec.device))
    return negative_log_likelihood + config.kl_weight * divergence


@torch.no_grad()
def _validation_loss(config: CodecConfig, cells: CellDataset, codec: ProgramCodec, indices: np.ndarray) -> float:
    """The mean loss of some cells, always with the same draws from the posterior."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = [_loss(config, cells, codec, indices[start : start + 512]) for start in range(0, len(indices), 512)]
    return torch.cat(losses).mean().item()


def refit_decoder(
    config: CodecConfig,
    cells: CellDataset,
    codec: ProgramCodec,
    programs: torch.Tensor,
    deadline: float = math.inf,
    prior: Prior | None = None,
):
    """
    Fits the decoder to the final `programs` `(cells, num_programs)`, which the denoiser imitates. Labels get their
    effects here: with them in the first fit, the programs would not distinguish cell types.
    """
    generator, prior = torch.Generator().manual_seed(config.seed), prior or make_prior(config, codec)
    parameters = [*codec.heads.parameters(), *codec.label_effects.parameters()]
    optimizer = _optimizer(codec, parameters, config.decoder_learning_rate)
    highest = [group["lr"] for group in optimizer.param_groups]  # falls to zero by the last step or the deadline
    start = time.monotonic()
    for step in tqdm(range(config.decoder_steps), **bar_options(desc="Decoder", unit=" steps", mininterval=1)):
        if step > 0 and time.monotonic() >= deadline:
            logger.warning(f"Decoder: time for {step} of {config.decoder_steps} steps. Raise --max_train_minutes.")
            break
        time_share = min((time.monotonic() - start) / max(deadline - start, 1e-9), 1.0)
        progress = max(step / config.decoder_steps, time_share)
        for group, rate in zip(optimizer.param_groups, highest):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        batch = torch.randint(len(cells), (2 * config.codec_batch_size,), generator=generator)
        class_labels = None if cells.class_labels is None else cells.class_labels[batch]
        parts = programs[batch], *cells.cells(batch.numpy())
        some, values, library_size = (part.to(codec.device) for part in parts)
        loss = codec.decoder_loss(some, values, library_size, class_labels).mean()
        loss = loss + prior_loss(codec, prior, len(cells))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logger.info(f"Step 2 of 3, decoder: fitted to the final programs ({duration(time.monotonic() - start)}).")


@torch.no_grad()
def match_means(cells: CellDataset, codec: ProgramCodec, programs: torch.Tensor):
    """
    Corrects the mean of each gene that is off by more than `MEAN_TOLERANCE` in the decoded training cells, unless they
    have most counts. A fit by likelihood loses most counts of a gene that fills a few cells, as haemoglobin does.
    """
    observed = np.asarray(cells.matrix.sum(axis=0), dtype=np.float64).ravel()
    others = max(cells.library_size.sum(dtype=np.float64) - observed.sum(), 0)
    observed = torch.from_numpy(np.append(observed, others))  # (genes + 1,)
    is_off = torch.zeros(len(observed), dtype=torch.bool)
    for _ in range(NUM_CORRECTIONS):
        expected = torch.zeros_like(observed)
        for start in range(0, len(cells), 1024):
            batch = slice(start, start + 1024)
            library_size = torch.from_numpy(cells.library_size[batch]).float().to(codec.device)
            class_labels = None if cells.class_labels is None else cells.class_labels[batch]
            decoded: Any = codec.decode_programs(programs[batch].to(codec.device), library_size, class_labels)
            expected += decoded.bin_means().double().sum(0).cpu()
        factor = (observed / expected).clamp(*MEAN_FACTORS)
        is_off |= factor.log().abs() > MEAN_TOLERANCE
        if observed[:-1][is_off[:-1]].sum() > observed[:-1].sum() / 2:  # as for reads of full-length protocols
            return  # the likelihood does not fit the counts, and cells with the right means would be less real
        factor = torch.where(is_off, factor, 1.0).to(codec.heads["log_rates"].bias)
        for name, values in decoded.scaled_means(factor).items():
            if name in codec.heads:
                codec.heads[name].bias += values
            else:
                codec.gene_parameters[name].copy_(values)


@torch.no_grad()
def find_program_axes(codec: ProgramCodec, programs: torch.Tensor):
    """
    Finds independent components of the programs `(cells, num_programs)`, so that a response such as that to interferon
    is one of them, not several (lab/experiments.md). Few cells and flat programs keep their axes, as latents do.
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
    # A program is positive in the few cells that have it, or else where it raises few genes by much.
    signs = torch.where(skewness.abs() > SKEWED, skewness, loadings.pow(3).sum(0)).sign()
    order = loadings.square().sum(0).argsort(descending=True)
    codec.program_axes.copy_((signs[:, None] * codec.program_axes)[order])


def make_prior(config: CodecConfig, codec: ProgramCodec) -> Prior:
    """The prior on the effects of programs and labels on a gene."""
    prior: Prior = {f"heads.{name}.weight": (0.0, config.program_prior_precision) for name in codec.heads}
    prior |= {f"label_effects.{name}.weight": (0.0, config.label_prior_precision) for name in codec.label_effects}
    precisions = LIKELIHOODS[codec.config.likelihood].PRIOR_PRECISIONS
    return prior | {f"gene_parameters.{name}": (0.0, precision) for name, precision in precisions.items()}


def prior_loss(codec: ProgramCodec, prior: Prior, num_cells: int) -> torch.Tensor:
    """The negative log density of a Gaussian prior, in nats per cell."""
    terms = [
        (precision * (codec.get_parameter(name) - mean).square()).sum() for name, (mean, precision) in prior.items()
    ]
    return torch.stack(terms).sum() / (2 * num_cells)


def _optimizer(codec: ProgramCodec, parameters: Iterable[Any], learning_rate: float) -> torch.optim.Adam:
    """Adam with a separate learning rate for each gene's noise."""
    noise = [*(head.bias for head in list(codec.heads.values())[1:]), *codec.gene_parameters.values()]
    others = [parameter for parameter in parameters if all(parameter is not one for one in noise)]
    groups = [{"params": others}, {"params": noise, "lr": DISPERSION_LEARNING_RATE}]
    return torch.optim.Adam(groups, lr=learning_rate)
