"""The program codec alone: what the cells would be, if the denoiser were perfect.

    python benchmarks/codec.py --dataset ../shared/data/pbmc3k.h5ad --output codec.json --kl_weight 1

Fits stage one of the training to four fifths of the training cells, whose latents a perfect denoiser would imitate;
draws cells from the latents of some of them, and judges those on the training cells that were set aside, of the same
cell types. The held-out cells play no part, so that choices can be made here. Flags that this script does not have are
those of the training.

Beside the judges' metrics: how well a cell is described by its own latents, as the negative log-likelihood of its
counts in nats, for cells that the codec was fitted to and for those set aside; and how well a random forest tells the
latents of both apart (AUC, 0.5 = not at all), which they must not be, as a denoiser learns those of the first alone.
"""

import argparse
import json
import time
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from accelerate import PartialState
from scipy import sparse

from wbdit_diffusers import ProgramCodec, ScRNAProcessor
from wbdit_diffusers.data import CellDataset, CellSplit, drop_empty_cells, encode_cells, read_cells
from wbdit_diffusers.evaluation import evaluate_cells
from wbdit_diffusers.evaluation.cells import CellArrays
from wbdit_diffusers.evaluation.classifiers import expression_view, forest, two_sample_auc
from wbdit_diffusers.evaluation.references import draw_matching
from wbdit_diffusers.training import TrainingConfig, config_from_args
from wbdit_diffusers.training.codec import fit_program_codec


CELLS_AT_ONCE = 512  # cells × genes that are dense in memory


@torch.no_grad()
def nats_per_cell(codec: ProgramCodec, dataset: CellDataset) -> float:
    """Mean negative log-likelihood of the modelled genes, given each cell's own latents and library size."""
    total = 0.0
    for start in range(0, len(dataset), CELLS_AT_ONCE):
        cells = slice(start, start + CELLS_AT_ONCE)
        counts, library_size = dataset.cells(cells)
        given = library_size if codec.models_library_size else None
        class_labels = None if dataset.class_labels is None else dataset.class_labels[cells]
        distribution = codec.decode(codec.encode(counts, library_size), given, class_labels)
        total -= distribution.log_prob(counts).sum().item()
    return total / len(dataset)


@torch.no_grad()
def draw_cells(
    codec: ProgramCodec, processor: ScRNAProcessor, latents: torch.Tensor, class_labels: torch.Tensor, seed: int
) -> ad.AnnData:
    """Cells with given latents `(cells, num_features)` and labels, as a pipeline draws them."""
    generator = torch.Generator().manual_seed(seed)
    matrices, library_sizes = [], []
    for part, labels in zip(latents.split(CELLS_AT_ONCE), class_labels.split(CELLS_AT_ONCE)):
        distribution = codec.decode(part, class_labels=labels)
        uniform = torch.rand(len(part), distribution.num_values, generator=generator, dtype=torch.float64)
        counts = distribution.icdf(uniform)
        matrices.append(sparse.csr_matrix(counts[:, : codec.config.num_genes].numpy()))
        library_sizes.append(counts.sum(1))
    sizes = torch.cat(library_sizes) if codec.models_library_size else None
    return processor.to_anndata(sparse.vstack(matrices, format="csr"), class_labels, sizes)


def judge_codec(adata: ad.AnnData, label_key: str, config: TrainingConfig, num_samples: int) -> dict:
    """
    Fits a codec to four fifths of the cells and judges it on the others.

    Args:
        adata (`AnnData`): Training cells.
        label_key (`str`): Column of `obs` with the cell type.
        config ([`TrainingConfig`]): How the codec is fitted.
        num_samples (`int`): Samples to draw.

    Returns:
        `dict`: `num_genes`, `num_programs`, `seconds`, `nats_per_cell`, `latents_auc` (a value for each sample), and
        `excess` and `metrics` of [`~evaluation.evaluate_cells`].
    """
    fitted_cells, aside_cells = CellSplit.draw(adata, label_key=label_key, seed=1).apply(adata)
    processor = ScRNAProcessor(
        values=config.values, layer=config.layer, label_keys=[label_key], num_genes=config.num_genes or None
    ).fit(fitted_cells)
    fitted, aside = CellDataset(fitted_cells, processor), CellDataset(aside_cells, processor)
    start = time.monotonic()
    codec = fit_program_codec(config, fitted, torch.device("cpu"))
    seconds = time.monotonic() - start

    latents, aside_latents = encode_cells(fitted, codec), encode_cells(aside, codec)
    labels, aside_labels = (dataset.class_labels[:, 0].numpy() for dataset in (fitted, aside))
    samples, aucs = [], []
    for seed in range(num_samples):
        drawn = draw_matching(labels, aside_labels, np.random.default_rng(seed))
        samples.append(draw_cells(codec, processor, latents[drawn], fitted.class_labels[drawn], seed))
        sides = (
            CellArrays(values.numpy(), values.numpy(), labels=aside_labels)
            for values in (aside_latents, latents[drawn])
        )
        aucs.append(two_sample_auc(*sides, expression_view, forest, seed))
    report = evaluate_cells(samples, fitted_cells, aside_cells, label_key, config.layer, config.values)
    return {
        "num_genes": report["num_genes"],
        "num_programs": codec.config.num_programs,
        "seconds": round(seconds),
        "nats_per_cell": {"fitted": nats_per_cell(codec, fitted), "set aside": nats_per_cell(codec, aside)},
        "latents_auc": aucs,
        "excess": report["excess"],
        "metrics": report["metrics"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, required=True)
    parser.add_argument("--label_key", default="cell_type")
    parser.add_argument("--num_seeds", type=int, default=3, help="Samples to judge.")
    parser.add_argument("--output", type=Path, required=True, help="JSON list; a result is appended to it.")
    args, train_flags = parser.parse_known_args()
    PartialState(cpu=True)  # the training's log asks for it

    for path in args.dataset:
        config = config_from_args([*train_flags, "--dataset", str(path), "--output_dir", "."])
        if config.codec != "program":
            parser.error("Only the program codec is fitted: expression is its own latents.")
        adata = drop_empty_cells(read_cells(path), config.layer)
        adata = CellSplit.draw(adata, config.test_fraction, args.label_key).apply(adata)[0].copy()
        result = {
            "dataset": path.stem,
            "flags": " ".join(train_flags),
            **judge_codec(adata, args.label_key, config, args.num_seeds),
        }
        results = json.loads(args.output.read_text()) if args.output.exists() else []
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps([*results, result], indent=1))
        print(path.stem, *train_flags, result["num_programs"], "programs,", result["seconds"], "s")
        print("nats per cell:", {cells: round(value, 2) for cells, value in result["nats_per_cell"].items()})
        print(f"AUC of latents, set aside against fitted: {np.mean(result['latents_auc']):.3f}")
        for cells, report in result["metrics"].items():
            means = {name: round(float(np.nanmean(values)), 3) for name, values in report.items()}
            print(cells, means, flush=True)


if __name__ == "__main__":
    main()
