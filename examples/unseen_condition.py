"""
Cells of a type under a condition that was not measured, and how good they are.

The cells of this type and condition are held out, predicted in two ways, and compared with the real ones:

    python examples/unseen_condition.py kang.h5ad --cell_type B --condition STIM --control CTRL

Without arguments, it predicts monocytes in phase S from 700 PBMCs that come with Scanpy.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import torch

from wbdit_diffusers import ScRNAGenerationPipeline, ScRNAToScRNAPipeline
from wbdit_diffusers.data import load_pbmc
from wbdit_diffusers.training import TrainingConfig, train


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "cells", nargs="?", type=Path, help="An .h5ad file of counts. Default: PBMCs that come with Scanpy."
)
parser.add_argument("--label_keys", nargs=2, default=["cell_type", "phase"], help="Columns of type and condition.")
parser.add_argument("--cell_type", default="CD14+ Monocyte")
parser.add_argument("--condition", default="S")
parser.add_argument("--control", default="G1")
parser.add_argument("--output_dir", type=Path, default=Path("unseen"))
parser.add_argument("--max_train_minutes", type=float)
args = parser.parse_args()

cells = load_pbmc() if args.cells is None else ad.read_h5ad(args.cells)
cell_type, condition = (cells.obs[key].astype(str) for key in args.label_keys)
held_out = ((cell_type == args.cell_type) & (condition == args.condition)).to_numpy()
control = ((cell_type == args.cell_type) & (condition == args.control)).to_numpy()
settings = {"label_keys": args.label_keys, "max_train_minutes": args.max_train_minutes}
train(cells[~held_out].copy(), TrainingConfig(output_dir=args.output_dir, **settings))

new_label = {args.label_keys[1]: args.condition}
pipe = ScRNAGenerationPipeline.from_pretrained(args.output_dir)
generated = pipe(500, args.cell_type, new_label, generator=torch.Generator().manual_seed(0)).cells
translated = ScRNAToScRNAPipeline(**pipe.components)(cells[control].copy(), conditions=new_label).cells
for column, values in generated.uns["wbdit"]["unseen_combinations"].items():
    print(f"{column}: {values[0]}")

means = {}
named = {"control": cells[control], "real": cells[held_out], "generated": generated, "translated": translated}
for name, some in named.items():
    some = some[:, generated.var_names].copy()
    sc.pp.normalize_total(some, target_sum=1e4)
    sc.pp.log1p(some)
    means[name] = np.asarray(some.X.mean(axis=0)).ravel()
change = means["real"] - means["control"]
top = np.argsort(-np.abs(change))[:100]
for name in ("generated", "translated"):
    correlation = np.corrcoef((means[name] - means["control"])[top], change[top])[0, 1]
    print(f"{name}: correlation {correlation:.2f} with the real change in the 100 genes that change most")
generated.write_h5ad(args.output_dir / "generated.h5ad")
translated.write_h5ad(args.output_dir / "translated.h5ad")
