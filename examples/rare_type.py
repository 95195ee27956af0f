"""
Generated cells for a type that has too few, and what they are worth.

All but a few cells of a type are removed from the training half of 700 PBMCs. A classifier then learns from the cells
that are left, with and without generated ones, and looks for the type in the other half:

    python examples/rare_type.py --cell_type "CD19+ B" --num_cells 10
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from wbdit_diffusers.data import load_pbmc
from wbdit_diffusers.pipelines import augment
from wbdit_diffusers.training import TrainingConfig, train


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cell_type", default="CD19+ B")
parser.add_argument("--num_cells", type=int, default=10, help="Number of cells of this type that are left.")
parser.add_argument("--output_dir", type=Path, default=Path("rare_type"))
parser.add_argument("--max_train_minutes", type=float)
args = parser.parse_args()

cells = load_pbmc()
order = np.random.default_rng(0).permutation(cells.n_obs)
half, test = order[: cells.n_obs // 2], cells[np.sort(order[cells.n_obs // 2 :])]
is_rare = (cells.obs["cell_type"] == args.cell_type).to_numpy()
few = cells[np.sort(np.concatenate([half[~is_rare[half]], half[is_rare[half]][: args.num_cells]]))].copy()
config = TrainingConfig(output_dir=args.output_dir, label_keys=["cell_type"], max_train_minutes=args.max_train_minutes)
pipe = train(few, config)
more = augment(pipe, few, args.cell_type, generator=torch.Generator().manual_seed(0))
print(f"{few.n_obs} real cells, {more.n_obs - few.n_obs} generated ones.")


def f1(train_cells: ad.AnnData) -> float:
    """F1 of the rare type in the real cells of the other half."""
    expression = [cells[:, more.var_names].X.toarray() for cells in (train_cells, test)]
    expression = [np.log1p(1e4 * values / values.sum(axis=1, keepdims=True)) for values in expression]
    classifier = LogisticRegression(max_iter=500).fit(expression[0], train_cells.obs["cell_type"].astype(str))
    predicted = classifier.predict(expression[1]) == args.cell_type
    return f1_score(test.obs["cell_type"] == args.cell_type, predicted)


print(f"F1 of {args.cell_type}: {f1(few):.2f} with real cells alone, {f1(more):.2f} with generated ones.")
