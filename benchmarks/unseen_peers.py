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
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import scanpy as sc


COMMON = ["torch==2.13.0", "numpy==2.4.6", "scanpy==1.11.5", "anndata==0.12.19"]
PACKAGES = {
    "scgen": ["scgen==2.1.0", "scvi-tools==1.4.2"],
    "trvae": ["trvaep==0.1.0"],
    "scpram": ["pot==0.9.7.post1", "adjusttext==1.4.0"],
    "cellflow": ["cellflow-tools==0.0.9", "jax==0.10.2", "ott-jax==0.6.0", "requests==2.34.2"],
}
WITHOUT_DEPENDENCIES = {"scpram": ["scpram==0.0.3"]}  # It pins torch 1.13 and scanpy 1.9, and runs on current ones.
NOT_RUN = {
    "biolord": "its tutorials train 500 epochs, of which 200 took 8 minutes of a busy core",
    "cpa": "cpa-tools needs Python < 3.11",
    "scvidr": "no release on PyPI",
}
Prediction = tuple[np.ndarray, float, int]  # Cells in the order of the control cells, CPU seconds, and epochs.


def scgen(cells: ad.AnnData, controls: ad.AnnData, args: argparse.Namespace) -> Prediction:
    """scGen: a VAE, and the mean difference of the two conditions in its latents. Settings of its tutorial."""
    import scvi
    from scvi.module import _constants, base

    # scGen imports two names that scvi-tools has since changed, and calls its posterior by two others.
    sys.modules["scvi._compat"] = types.SimpleNamespace(Literal=Literal)
    base.LossRecorder = base.LossOutput
    _constants.MODULE_KEYS = _constants.MODULE_KEYS._replace(QZM_KEY="qz_m", QZV_KEY="qz_v")
    from scgen import SCGEN

    scvi.settings.seed = args.seed
    SCGEN.setup_anndata(cells, batch_key="condition", labels_key="cell_type")
    model, start = SCGEN(cells), time.process_time()
    model.train(args.epochs or 100, batch_size=32, accelerator="cpu", early_stopping=True, early_stopping_patience=25)
    seconds = time.process_time() - start
    return model.predict(args.control, args.condition, controls)[0].X, seconds, model.trainer.current_epoch


def trvae(cells: ad.AnnData, controls: ad.AnnData, args: argparse.Namespace) -> Prediction:
    """trVAE: a conditional VAE whose first decoder layer an MMD makes alike in both conditions. Its own defaults."""
    import torch
    import trvaep
    from trvaep.model import train

    # Each of its batches reads rows of a view, and that copies the view's whole matrix. Copies of both parts cure it.
    split = train.train_test_split
    train.train_test_split = lambda *given: tuple(part.copy() for part in split(*given))
    torch.manual_seed(args.seed)
    sizes = {"encoder_layer_sizes": [128, 32], "decoder_layer_sizes": [32, 128], "latent_dim": 10}
    model = trvaep.CVAE(cells.n_vars, num_classes=cells.obs.condition.nunique(), **sizes, alpha=1e-4, beta=10)
    trainer, start = trvaep.Trainer(model, cells, condition_key="condition", seed=args.seed), time.process_time()
    trainer.train_trvae(args.epochs or 300, batch_size=512, early_patience=50)
    seconds, epochs = time.process_time() - start, len(trainer.logs["loss_valid"])
    return model.predict(controls.X, controls.obs.condition.tolist(), args.condition), seconds, epochs


def scpram(cells: ad.AnnData, controls: ad.AnnData, args: argparse.Namespace) -> Prediction:
    """scPRAM: a VAE, transport between the conditions in its latents, and attention over the nearest control cells."""
    import torch
    from scpram import models

    torch.nn.utils.clip_grad_norm = torch.nn.utils.clip_grad_norm_  # The name that it uses is gone.
    torch.manual_seed(args.seed)
    keys = {"condition_key": "condition", "cell_type_key": "cell_type", "pred_key": "predicted"}
    keys |= {"ctrl_key": args.control, "stim_key": args.condition}
    model, start, epochs = models.SCPRAM(cells.n_vars, device="cpu"), time.process_time(), args.epochs or 100
    model.train_SCPRAM(cells, epochs=epochs)
    seconds = time.process_time() - start
    return model.predict(cells, args.cell_type, keys).X, seconds, epochs


def cellflow(cells: ad.AnnData, controls: ad.AnnData, args: argparse.Namespace) -> Prediction:
    """CellFlow: flow matching with optimal transport on 50 components. It has narrower layers than on its GPUs."""
    import optax
    from cellflow import preprocessing
    from cellflow.model import CellFlow

    preprocessing.centered_pca(cells, n_comps=50)
    cells.obs["is_control"] = cells.obs.condition == args.control
    names = cells.obs.condition.cat.categories
    cells.uns["conditions"] = dict(zip(names, np.eye(len(names), dtype=np.float32)))
    # A type is known by the mean of its control cells: a one-hot code says nothing of a type that was left out.
    control, names = cells[cells.obs.is_control], cells.obs.cell_type.cat.categories
    means = np.stack([control.obsm["X_pca"][control.obs.cell_type == name].mean(0) for name in names])
    cells.uns["types"] = dict(zip(names, np.float32(means / means.std())))
    known = cells[cells.obs.cell_type != args.cell_type].copy()
    flow = CellFlow(known, solver="otfm")
    reps = {"perturbation_covariates": {"condition": ["condition"]}, "sample_covariates": ["cell_type"]}
    reps |= {
        "perturbation_covariate_reps": {"condition": "conditions"},
        "sample_covariate_reps": {"cell_type": "types"},
    }
    flow.prepare_data("X_pca", "is_control", split_covariates=["cell_type"], **reps)
    widths = {"time_encoder_dims": [256] * 3, "hidden_dims": [256] * 3, "decoder_dims": [512] * 3}
    flow.prepare_model(**widths, condition_embedding_dim=32, optimizer=optax.adam(3e-4), seed=args.seed)
    start, iterations = time.process_time(), args.epochs or 1000
    flow.train(iterations, batch_size=256, valid_freq=iterations)
    seconds, controls = time.process_time() - start, cells[controls.obs_names].copy()
    wanted = controls.obs.iloc[:1].assign(condition=args.condition, is_control=False)
    moved = np.asarray(next(iter(flow.predict(controls, wanted, sample_rep="X_pca").values())))
    return moved @ cells.varm["PCs"].T + cells.varm["X_mean"].T, seconds, iterations


PEERS = {peer.__name__: peer for peer in (scgen, trvae, scpram, cellflow)}


def predict(args: argparse.Namespace):
    """Runs the peer and writes its cells. Rows are control cells of the type, drawn again if there are too few."""
    cells = ad.read_h5ad(args.train)
    cells.obs = cells.obs[["cell_type", "condition"]].astype(str).astype("category")
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=2000, flavor="seurat")
    cells = cells[:, cells.var.highly_variable].copy()
    cells.X = cells.X.toarray().astype(np.float32)
    of_type = cells[cells.obs.cell_type == args.cell_type]
    controls = of_type[of_type.obs.condition == args.control].copy()
    if controls.n_obs == 0 or (of_type.obs.condition == args.condition).any():
        raise SystemExit(f"{args.train} needs {args.cell_type} under {args.control} and none under {args.condition}.")
    np.random.seed(args.seed)
    values, seconds, epochs = PEERS[args.peer](cells, controls, args)
    rows, num_cells = np.arange(len(values)), args.num_cells or len(values)
    if num_cells != len(rows):
        rows = np.random.choice(rows, num_cells, replace=num_cells > len(rows))
    predicted = ad.AnnData(np.asarray(values, np.float32)[rows], var=controls.var[[]])
    predicted.obs["cell_type"], predicted.obs["condition"] = args.cell_type, args.condition
    predicted.uns = {"peer": args.peer, "seed": args.seed, "values": "log", "cpu_seconds": seconds, "epochs": epochs}
    predicted.uns["packages"] = COMMON + PACKAGES[args.peer] + WITHOUT_DEPENDENCIES.get(args.peer, [])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    predicted.write_h5ad(args.output)
    print(f"{args.peer}: {predicted.n_obs} cells, {epochs} epochs or iterations, {seconds:.0f} CPU seconds")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=[*PEERS, *NOT_RUN])
    parser.add_argument("--train", type=Path, required=True, help="Counts, without cells of the type and condition.")
    for flag in ("--cell_type", "--condition", "--control"):
        parser.add_argument(flag, required=True)
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
    from common import environment  # not to be had in a peer's environment

    packages = COMMON + PACKAGES[args.peer], WITHOUT_DEPENDENCIES.get(args.peer, [])
    python = environment(packages[0], args.work_dir / "envs" / args.peer, packages[1])
    subprocess.run([python, *sys.argv], env={**os.environ, "UNSEEN_PEER": args.peer}, check=True)


if __name__ == "__main__":
    main()
