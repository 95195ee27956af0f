"""Cells of a cell type under a condition that training lacks, as published tools predict them.

    python benchmarks/unseen_peers.py --peer scgen --train train.h5ad --cell_type B --condition STIM --control CTRL \
        --seed 0 --output pred.h5ad --work_dir WORK

Each peer has an environment of its own, WORK/envs/PEER, which the first call makes. There this script runs itself.
A peer gets log1p(CP10k) of the 2,000 most variable genes of the training cells, learns from all of them, and moves the
control cells of the type to the condition. Values below zero are left as the peer gives them.
"""

import argparse
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import scanpy as sc


TORCH = ["torch==2.13.0", "numpy==2.4.6", "scanpy==1.11.5", "anndata==0.12.19"]
PACKAGES = {
    "scgen": [*TORCH, "scgen==2.1.0", "scvi-tools==1.4.2"],
    "trvae": [*TORCH, "trvaep==0.1.0"],
}
NOT_RUN = {
    "cpa": "cpa-tools needs Python < 3.11",
    "scvidr": "no release on PyPI",
}


def scgen(cells: ad.AnnData, controls: ad.AnnData, args: argparse.Namespace) -> tuple[np.ndarray, dict]:
    """scGen 2.1: a VAE, and the mean difference of the two conditions in its latents. Settings of its tutorial."""
    import scvi
    from scvi.module import _constants, base

    # scGen imports two names that scvi-tools has since renamed, and its posterior has two older names.
    sys.modules["scvi._compat"] = types.SimpleNamespace(Literal=Literal)
    base.LossRecorder = base.LossOutput
    _constants.MODULE_KEYS = _constants.MODULE_KEYS._replace(QZM_KEY="qz_m", QZV_KEY="qz_v")
    from scgen import SCGEN

    scvi.settings.seed = args.seed
    SCGEN.setup_anndata(cells, batch_key="condition", labels_key="cell_type")
    model = SCGEN(cells)
    seconds = time.process_time()
    epochs = args.epochs or 100
    model.train(max_epochs=epochs, batch_size=32, early_stopping=True, early_stopping_patience=25, accelerator="cpu")
    facts = {"cpu_seconds": time.process_time() - seconds, "epochs": model.trainer.current_epoch}
    moved, _ = model.predict(args.control, args.condition, adata_to_predict=controls)
    return moved.X, facts


def trvae(cells: ad.AnnData, controls: ad.AnnData, args: argparse.Namespace) -> tuple[np.ndarray, dict]:
    """trVAE: a conditional VAE whose first decoder layer an MMD makes alike in both conditions. Its own defaults."""
    import torch
    import trvaep
    from trvaep.model import train

    # Each of its batches reads rows of a view, and that copies the view's whole matrix. Copies of both parts cure it.
    split = train.train_test_split
    train.train_test_split = lambda *given: tuple(part.copy() for part in split(*given))
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    conditions = cells.obs.condition.nunique()
    sizes = {"encoder_layer_sizes": [128, 32], "decoder_layer_sizes": [32, 128], "latent_dim": 10}
    model = trvaep.CVAE(cells.n_vars, num_classes=conditions, **sizes, alpha=1e-4, use_mmd=True, beta=10)
    seconds = time.process_time()
    trainer = trvaep.Trainer(model, cells, condition_key="condition", seed=args.seed)
    trainer.train_trvae(args.epochs or 300, batch_size=512, early_patience=50)
    facts = {"cpu_seconds": time.process_time() - seconds, "epochs": len(trainer.logs["loss_valid"])}
    return model.predict(controls.X, controls.obs.condition.tolist(), args.condition), facts


PEERS: dict[str, Callable] = {"scgen": scgen, "trvae": trvae}


def prepare(args: argparse.Namespace) -> tuple[ad.AnnData, ad.AnnData]:
    """Training cells, log-normalised, on variable genes, and the control cells of the type."""
    cells = ad.read_h5ad(args.train)
    cells.obs = cells.obs[["cell_type", "condition"]].astype(str).astype("category")
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=2000, flavor="seurat")
    cells = cells[:, cells.var.highly_variable].copy()
    cells.X = cells.X.toarray().astype(np.float32)
    of_type, condition = cells.obs.cell_type == args.cell_type, cells.obs.condition
    if not (of_type & (condition == args.control)).any() or (of_type & (condition == args.condition)).any():
        raise SystemExit(
            f"{args.train} needs cells of {args.cell_type} under {args.control}, none under {args.condition}"
        )
    return cells, cells[of_type & (condition == args.control)].copy()


def predict(args: argparse.Namespace):
    """Runs the peer and writes its cells. Rows are control cells of the type, drawn again if there are too few."""
    cells, controls = prepare(args)
    values, facts = PEERS[args.peer](cells, controls, args)
    rows = np.arange(len(values))
    if args.num_cells is not None and args.num_cells != len(rows):
        rows = np.random.default_rng(args.seed).choice(rows, args.num_cells, replace=args.num_cells > len(rows))
    predicted = ad.AnnData(np.asarray(values, np.float32)[rows], var=controls.var[[]])
    predicted.obs["cell_type"], predicted.obs["condition"] = args.cell_type, args.condition
    predicted.uns = {"peer": args.peer, "seed": args.seed, "values": "log", "packages": PACKAGES[args.peer], **facts}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    predicted.write_h5ad(args.output)
    print(f"{args.peer}: {predicted.n_obs} cells, {facts}")


def environment(peer: str, work_dir: Path) -> Path:
    """Python of the peer's environment, which is made if it is not there."""
    python = work_dir / "envs" / peer / "bin" / "python"
    made = work_dir / "envs" / peer / "made"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", python.parent.parent], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[peer]], check=True)
        made.touch()
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=[*PEERS, *NOT_RUN])
    parser.add_argument("--train", type=Path, required=True, help="Counts, without cells of the type and condition.")
    parser.add_argument("--cell_type", required=True)
    parser.add_argument("--condition", required=True)
    parser.add_argument("--control", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="Epochs or iterations, instead of the peer's own.")
    parser.add_argument("--num_cells", type=int, help="Defaults to the number of control cells of the type.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="Environments are made in its folder envs.")
    args = parser.parse_args()
    if args.peer in NOT_RUN:
        parser.error(f"{args.peer} is not run: {NOT_RUN[args.peer]}.")
    if os.environ.get("UNSEEN_PEER") == args.peer:
        return predict(args)
    python = environment(args.peer, args.work_dir)
    subprocess.run([python, *sys.argv], env={**os.environ, "UNSEEN_PEER": args.peer}, check=True)


if __name__ == "__main__":
    main()
