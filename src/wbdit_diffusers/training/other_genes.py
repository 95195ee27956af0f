"""The genes that do not define the programs: each is a regression on the programs."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

from ..data.latents import CellDataset
from ..models.codec_programs import ProgramCodec
from .config import CodecConfig


MAX_CELLS, MAX_PRODUCTS = 10_000, 2**26  # more cells change little; products of two covariates, of all cells
GENES_AT_ONCE = 1000
NUM_FITS, NUM_ITERATIONS = 2, 6  # of the dispersion, and of Fisher scoring after each
MAX_STEP = 1.0  # of a log rate in an iteration: one linear step goes too far
GRID = torch.linspace(-3, 7, 21)  # of the log inverse dispersion
TYPICAL_LOG_THETA, SPREAD_LOG_THETA = 2.0, 1.5  # its prior: genes with few counts say little
NO_OUTLIERS = -12.0  # log odds


@torch.no_grad()
def add_genes(
    config: CodecConfig, cells: CellDataset, codec: ProgramCodec, variable: np.ndarray, programs: torch.Tensor
) -> ProgramCodec:
    """Adds all other genes to the decoder: each one's share of the counts is log-linear in programs and labels."""
    num_genes, device, codec = cells.matrix.shape[1], codec.device, codec.cpu()
    wide = ProgramCodec(**codec.config | {"num_genes": num_genes, "num_encoder_genes": len(variable)})
    wide.fit_statistics(cells.matrix, cells.library_size)
    for name in ("encoder", "to_mean", "to_log_variance"):
        getattr(wide, name).load_state_dict(getattr(codec, name).state_dict())
    wide.encoder_genes.copy_(torch.from_numpy(variable))
    # The last bin of either codec holds the counts in genes that it does not model.
    others = np.setdiff1d(np.arange(num_genes + 1), variable)
    rates, theta, outliers = wide.heads["log_rates"], wide.heads["log_theta"], wide.gene_parameters
    start = rates.bias[others] - rates.bias[others].logsumexp(0)
    old, new = codec.state_dict(), wide.state_dict()
    for name in new:
        if name.startswith(("heads.", "gene_parameters.", "label_effects.")):
            target, source = (values.T if "effects" in name else values for values in (new[name], old[name]))
            target[variable] = source[:-1]
            if "log_rates" in name:
                target[others] = source[-1]
    # Genes that fill a few cells keep these as their outliers, and their share is constant.
    is_few = outliers["outlier_logits"][others] != outliers["outlier_logits"][-1]
    rates.bias[others[is_few]] += start[is_few]

    fitted, num_programs = others[~is_few], programs.shape[1]
    sizes = cells.condition_sizes if wide.label_effects else ()
    precision = torch.tensor([1e-3] + [config.program_prior_precision] * num_programs)
    precision = torch.cat([precision, torch.full((sum(sizes),), config.label_prior_precision)])
    max_cells = min(MAX_CELLS, MAX_PRODUCTS // len(precision) ** 2)
    chosen = torch.randperm(len(cells), generator=torch.Generator().manual_seed(config.seed))[:max_cells].sort().values
    labels = None if cells.class_labels is None else cells.class_labels[chosen]
    indicators = [F.one_hot(codes, size) for codes, size in zip([] if labels is None else labels.T, sizes)]
    design = torch.cat([torch.ones(len(chosen), 1), programs[chosen], *indicators], dim=1)
    library_size = torch.from_numpy(cells.library_size[chosen]).float()
    decoded: Any = codec.decode_programs(programs[chosen], library_size, labels)
    offset = library_size.log() + decoded.log_proportions[:, -1]  # of the counts in all other genes
    matrix = cells.matrix[chosen.numpy()]
    unmodelled = np.maximum(cells.library_size[chosen] - np.asarray(matrix.sum(axis=1)).ravel(), 0)
    matrix = sparse.hstack([matrix, unmodelled[:, None]], format="csc")
    regressions = [
        regress(torch.from_numpy(matrix[:, part].toarray()).float(), offset, design, precision)
        for part in np.array_split(fitted, -(-len(fitted) // GENES_AT_ONCE))
    ]
    coefficients = torch.cat([one for one, _ in regressions], dim=1)  # (covariates, genes)
    rates.bias[fitted] += coefficients[0]
    rates.weight[fitted] += coefficients[1 : num_programs + 1].T
    if sizes:
        wide.label_effects["log_rates"].weight[:, fitted] += coefficients[num_programs + 1 :]
    theta.bias[fitted] = torch.cat([log_theta for _, log_theta in regressions])
    outliers["outlier_logits"][fitted] = NO_OUTLIERS
    return wide.to(device)


def regress(
    counts: torch.Tensor, offset: torch.Tensor, design: torch.Tensor, precision: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative binomial regressions by Fisher scoring: coefficients and log inverse dispersions of the genes."""
    products = (design[:, :, None] * design[:, None]).flatten(1)  # (cells, covariates²)
    coefficients = torch.zeros(design.shape[1], counts.shape[1])
    coefficients[0] = ((counts.sum(0) + 0.5) / offset.exp().sum()).log()
    log_theta = torch.full((counts.shape[1],), TYPICAL_LOG_THETA)
    for _ in range(NUM_FITS):
        for _ in range(NUM_ITERATIONS):
            means = (offset[:, None] + design @ coefficients).clamp(max=15).exp()  # (cells, genes)
            weights = 1 / (1 + means * (-log_theta).exp())
            score = design.T @ ((counts - means) * weights) - precision[:, None] * coefficients
            information = (products.T @ (means * weights)).T.unflatten(1, (len(precision), -1)) + precision.diag()
            step = torch.linalg.solve(information.double(), score.T.double()).T.float()
            coefficients += step * (MAX_STEP / (design @ step).abs().amax(0)).clamp(max=1)
        log_theta = fit_dispersion(counts, (offset[:, None] + design @ coefficients).clamp(max=15).exp())
    return coefficients, log_theta


def fit_dispersion(counts: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Log inverse dispersion `(genes,)` of counts with known means: the most likely value of a grid."""
    cells, genes = counts.nonzero(as_tuple=True)
    count = counts[cells, genes]
    scores = []
    for log_theta in GRID:
        theta = log_theta.exp()
        of_expressed = torch.lgamma(count + theta) - torch.lgamma(theta) - count * log_theta
        score = -((counts + theta) * torch.log1p(means / theta)).sum(0).index_add(0, genes, -of_expressed)
        scores.append(score - (log_theta - TYPICAL_LOG_THETA) ** 2 / (2 * SPREAD_LOG_THETA**2))
    return GRID[torch.stack(scores).argmax(0)]
