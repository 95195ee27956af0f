import os
from pathlib import Path

import anndata as ad
import pytest
import torch
from diffusers import DDPMScheduler
from hub_server import HubServer

from wbdit_diffusers import CountAutoencoder, ScRNAGenerationPipeline, ScRNAProcessor, WhiteBoxDiTModel
from wbdit_diffusers.data import load_pbmc


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


def randomize(model: torch.nn.Module, std: float = 0.05, seed: int = 0) -> torch.nn.Module:
    """Weights as of a trained model: adaLN-Zero starts with an output of zero, in which every mistake is invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def make_autoencoder(processor: ScRNAProcessor, adata: ad.AnnData) -> CountAutoencoder:
    """A tiny autoencoder with random weights that knows the cells' statistics."""
    autoencoder = CountAutoencoder(num_genes=len(processor.var_names), num_programs=6, hidden_size=8)
    matrix, library_size = processor.select(adata)
    randomize(autoencoder, std=0.3)
    autoencoder.to_mean.weight.data.mul_(0.1)  # programs of about unit variance
    autoencoder.fit_statistics(matrix, library_size)
    autoencoder.dispersion.bias.data.fill_(2.5)  # little noise: what a cell has is what was asked for
    autoencoder.zero_inflation.bias.data.fill_(-6.0)
    autoencoder.eval().standardize_latents(autoencoder.encode(processor.counts(matrix, library_size)))
    return autoencoder


def make_pipeline(adata: ad.AnnData, space: str = "expression", **processor_kwargs) -> ScRNAGenerationPipeline:
    """A tiny pipeline with random weights for the given cells."""
    processor = ScRNAProcessor(**processor_kwargs).fit(adata)
    autoencoder = make_autoencoder(processor, adata) if space == "program" else None
    denoiser = WhiteBoxDiTModel(
        num_genes=processor.num_features if autoencoder is None else autoencoder.num_features,
        patch_size=100 if autoencoder is None else 3,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        condition_sizes=processor.condition_sizes,
    )
    pipe = ScRNAGenerationPipeline(
        denoiser=randomize(denoiser).eval(),
        scheduler=DDPMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"),
        processor=processor,
        autoencoder=autoencoder,
        num_inference_steps=4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(pbmc) -> ScRNAGenerationPipeline:
    """In expression space."""
    return make_pipeline(pbmc, label_keys=["cell_type", "phase"])


@pytest.fixture
def program_pipe(pbmc) -> ScRNAGenerationPipeline:
    """In program space."""
    return make_pipeline(pbmc, space="program", label_keys=["cell_type", "phase"])
