"""
Genes that a panel lacks, drawn given those that it has, and how well they are predicted.

Cells that were held out from training keep 100 genes. The others are drawn, and compared with what was measured:

    python examples/complete_panel.py
    python examples/complete_panel.py --model wbdit-cells --dataset cells.h5ad --num_genes 300
"""

import argparse

import numpy as np
import torch

from wbdit_diffusers import ScRNAInpaintPipeline
from wbdit_diffusers.data import CellSplit, load_pbmc


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="pbmc68k_reduced", help="Pipeline that `wbdit train` wrote.")
parser.add_argument("--dataset", help="The cells that it was trained on. Default: PBMCs that come with Scanpy.")
parser.add_argument("--num_genes", type=int, default=100, help="Number of genes in the panel.")
args = parser.parse_args()

split = CellSplit.load(args.model)
train, test = split.apply(load_pbmc()) if args.dataset is None else split.read(args.dataset)
pipe = ScRNAInpaintPipeline.from_pretrained(args.model)
genes = pipe.processor.var_names
frequent = np.argsort(-np.asarray(train[:, genes].X.sum(axis=0)).ravel())[: args.num_genes]
panel = test[:, genes[frequent]].copy()
panel = panel[np.asarray(panel.X.sum(axis=1)).ravel() > 0].copy()
panel.obs = panel.obs[[]]  # without labels

full = pipe(panel, num_samples=10, generator=torch.Generator().manual_seed(0)).cells
print(full.obs.head(3))
others = genes.difference(panel.var_names)
drawn = full[:, others].X.toarray().reshape(panel.n_obs, 10, -1).mean(axis=1)  # (cells, genes)
real = test[panel.obs_names, others].X.toarray()
seen = (real > 0).sum(axis=0) >= 10
correlations = [np.corrcoef(np.log1p(a), np.log1p(b))[0, 1] for a, b in zip(real.T[seen], drawn.T[seen])]
print(f"Correlation of {seen.sum()} genes outside the panel over {panel.n_obs} cells: {np.nanmean(correlations):.3f}.")
