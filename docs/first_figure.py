"""Draws the first figure of the README, held-out and generated cells on one UMAP: `python docs/first_figure.py`."""

from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import scanpy as sc
import torch

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, load_pbmc
from wbdit_diffusers.evaluation.figure import type_colours
from wbdit_diffusers.pretrained import locate


NAME = "pbmc68k_reduced"

plt.switch_backend("Agg")
_, held_out = CellSplit.load(locate(NAME)).apply(load_pbmc())
pipe = ScRNAGenerationPipeline.from_pretrained(NAME)
types = held_out.obs["cell_type"].tolist()
generated = pipe(cell_types=types, generator=torch.Generator().manual_seed(0)).cells

panels = {"held-out cells": held_out, "generated cells": generated}
both = ad.concat(panels, label="source", index_unique="-")
sc.pp.normalize_total(both, target_sum=1e4)
sc.pp.log1p(both)
sc.pp.pca(both, n_comps=20)
sc.pp.neighbors(both)
sc.tl.umap(both, random_state=0)

plt.rcParams["font.size"] = 16
figure, axes = plt.subplots(1, 2, figsize=(10, 6), layout="constrained", sharex=True, sharey=True)
for axis, source in zip(axes, panels):
    shown = both[both.obs["source"] == source].copy()
    sc.pl.umap(shown, color="cell_type", palette=type_colours([types]), size=150, ax=axis, show=False)
    axis.set(title=f"{shown.n_obs} {source}", xlabel="", ylabel="")
    axis.set_frame_on(False)
    axis.get_legend().remove()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
figure.savefig(Path(__file__).with_name("first_figure.png"), dpi=110)
