"""The count autoencoder alone: what the cells would be, if the denoiser were perfect.

    python benchmarks/autoencoder.py --dataset ../shared/data/pbmc3k.h5ad --output results.json --kl_weight 1

Fits the first stage of training/train.py to four fifths of the training cells, whose programs a perfect denoiser would
imitate; draws counts from the programs of some of them, and judges those on the training cells that were set aside, of
the same cell types. The held-out cells play no part, so that choices can be made here. Flags that this script does not
have go to train.py. `--floors` adds what real cells reach.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import torch

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import CellDataset, drop_empty_cells, read_cells, split_cells
from wbdit_diffusers.evaluation.report import evaluate_cells, same_labels


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import train as training  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, required=True)
    parser.add_argument("--label_key", default="cell_type")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--floors", action="store_true", help="Judge real cells as well.")
    parser.add_argument("--output", type=Path, required=True, help="JSON list; a result is appended to it.")
    args, train_flags = parser.parse_known_args()

    for path in args.dataset:
        flags = training.parse_args([*train_flags, "--dataset", str(path), "--output_dir", "."])
        adata = drop_empty_cells(read_cells(path))
        adata = adata[split_cells(adata, label_key=args.label_key)[0]].copy()
        train, aside = (adata[cells] for cells in split_cells(adata, label_key=args.label_key, seed=1))
        processor = ScRNAProcessor(label_keys=[args.label_key], num_genes=flags.num_genes or None).fit(train)
        dataset = CellDataset(train, processor)
        start = time.monotonic()
        autoencoder = training.choose_autoencoder(flags, dataset, torch.device("cpu"))
        seconds = time.monotonic() - start
        dataset.encode(autoencoder)

        samples, labels = [], train.obs[args.label_key].astype(str).to_numpy()
        for seed in range(args.num_seeds):
            cells = same_labels(labels, aside.obs[args.label_key].astype(str).to_numpy(), np.random.default_rng(seed))
            shape, generator = (len(cells), len(processor.var_names)), torch.Generator().manual_seed(seed)
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
            counts = autoencoder.sample(*autoencoder.decode(dataset.latents[cells]), uniform)
            samples.append(
                ad.AnnData(counts, obs=train.obs.iloc[cells], var=processor.to_anndata(counts, None, None).var)
            )
        reports = evaluate_cells(samples, train, aside, args.label_key, floors=args.floors)["metrics"]
        result = {
            "dataset": path.stem,
            "flags": " ".join(train_flags),
            "num_genes": len(processor.var_names),
            "num_programs": autoencoder.config.num_programs,
            "seconds": round(seconds),
            "metrics": {
                cells: {name: [round(value, 4) for value in values] for name, values in report.items()}
                for cells, report in reports.items()
            },
        }
        results = json.loads(args.output.read_text()) if args.output.exists() else []
        args.output.write_text(json.dumps([*results, result], indent=1))
        print(path.stem, *train_flags, result["num_programs"], "programs,", result["seconds"], "s", flush=True)
        for cells, report in reports.items():
            print(cells, {name: round(float(np.mean(values)), 3) for name, values in report.items()}, flush=True)


if __name__ == "__main__":
    training.logger = training.logging.getLogger(__name__)  # accelerate's asks for an Accelerator
    main()
