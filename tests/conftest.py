import os
from pathlib import Path


if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from hub_server import HubServer
from scipy import sparse

from wbdit_diffusers import ExpressionCodec, ProgramCodec, ScRNAGenerationPipeline, ScRNAProcessor, WhiteBoxDiTModel
from wbdit_diffusers.data import CellDataset, encode_cells, load_pbmc
from wbdit_diffusers.sampling import training_scheduler


ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def pbmc() -> ad.AnnData:
    return load_pbmc()


@pytest.fixture(scope="session")
def pbmc_path(pbmc, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pbmc") / "pbmc.h5ad"
    pbmc.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def shared_data():
    """A function from a dataset's name to its path; skips where the reproduction datasets are absent."""

    def path(name: str) -> Path:
        file = SHARED_DATA / f"{name}.h5ad"
        if not file.is_file():
            pytest.skip(f"the reproduction dataset {file.name} is not on this machine")
        return file

    return path


@pytest.fixture(scope="session")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def hub_environment(hub, tmp_path) -> dict[str, str]:
    """The environment of a process that takes the local server for the Hub, with an empty cache."""
    return {**os.environ, **hub.environment(tmp_path / "hf-home")}


def awkward(cells: ad.AnnData) -> tuple[ad.AnnData, dict]:
    """The same counts in `raw`, as decimals and next to antibodies, and the settings that read them."""
    rng = np.random.default_rng(0)
    counts = cells.X.toarray() + rng.uniform(-0.4, 0.4, cells.shape)
    antibodies = rng.poisson(50, (cells.n_obs, 12))
    names = [*cells.var_names[:12], *cells.var_names]  # antibodies have the names of genes
    kinds = pd.Categorical(["Antibody Capture"] * 12 + ["Gene Expression"] * cells.n_vars)
    raw = ad.AnnData(
        sparse.csr_matrix(np.maximum(np.hstack([antibodies, counts]), 0), dtype=np.float32),
        obs=cells.obs,
        var=pd.DataFrame({"feature_types": kinds}, index=names),
    )
    normalised = ad.AnnData(cells.X.log1p(), obs=cells.obs, var=cells.var)[:, :50].copy()
    normalised.raw = raw
    return normalised, {"layer": "raw", "round_counts": True}


def randomize(model: torch.nn.Module, std: float = 0.05, seed: int = 0) -> torch.nn.Module:
    """Weights as of a trained model: adaLN-Zero starts with an output of zero, in which every mistake is invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def make_program_codec(processor: ScRNAProcessor, adata: ad.AnnData) -> ProgramCodec:
    """A tiny codec with random weights that knows the cells' statistics."""
    codec = ProgramCodec(
        num_genes=len(processor.var_names), num_programs=6, hidden_size=8, condition_sizes=processor.condition_sizes
    )
    randomize(codec, std=0.3)
    codec.to_mean.weight.data.mul_(0.1)  # programs of about unit variance
    for effects in codec.label_effects.values():
        effects.weight.data.mul_(0.3)
    cells = CellDataset(adata, processor)
    codec.fit_statistics(cells.matrix, cells.library_size)
    codec.heads["log_theta"].bias.data.fill_(2.5)  # little noise: what a cell has is what was asked for
    codec.gene_parameters["outlier_logits"].data.fill_(-6.0)
    codec.eval().standardize_latents(encode_cells(cells, codec))
    return codec


def make_expression_codec(processor: ScRNAProcessor, adata: ad.AnnData, **codec_kwargs) -> ExpressionCodec:
    """The paper's space for the given cells."""
    cells = CellDataset(adata, processor)
    codec = ExpressionCodec(num_genes=len(processor.var_names), values=processor.config.values, **codec_kwargs)
    codec.fit_statistics(cells.matrix, cells.library_size)
    return codec


def make_pipeline(
    adata: ad.AnnData, codec: str = "expression", codec_kwargs: dict | None = None, **processor_kwargs
) -> ScRNAGenerationPipeline:
    """A tiny pipeline with random weights for the given cells; `codec` is "program" or "expression"."""
    processor = ScRNAProcessor(**processor_kwargs).fit(adata)
    make_codec = {"program": make_program_codec, "expression": make_expression_codec}[codec]
    cell_codec = make_codec(processor, adata, **(codec_kwargs or {}))
    denoiser = WhiteBoxDiTModel(
        sample_size=cell_codec.num_features,
        patch_size={"program": 3, "expression": 100}[codec],
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        block_type={"program": "descent", "expression": "white_box"}[codec],
        condition_sizes=processor.condition_sizes,
    )
    pipe = ScRNAGenerationPipeline(
        denoiser=randomize(denoiser).eval(),
        scheduler=training_scheduler("v_prediction"),
        processor=processor,
        codec=cell_codec,
        num_inference_steps=4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(pbmc) -> ScRNAGenerationPipeline:
    """With an expression codec."""
    return make_pipeline(pbmc, label_keys=["cell_type", "phase"])


@pytest.fixture
def program_pipe(pbmc) -> ScRNAGenerationPipeline:
    """With a program codec."""
    return make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"])
