"""A repository that Diffusers loads where our package is installed but not imported, over HTTP."""

import json
import os
import subprocess
import sys
import textwrap

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline


pytestmark = pytest.mark.slow  # processes of their own, which see the Hub's address before they import anything

PUSH = ["-m", "wbdit_diffusers.cli", "push", "FOLDER", "--repo_id", "me/with-code", "--with_code", "--variant", "bf16"]

PIPELINE = """
    import json, sys, warnings
    warnings.simplefilter("error", FutureWarning)
    import torch
    from diffusers import DiffusionPipeline
    said = {}
    load = DiffusionPipeline.from_pretrained
    try:
        load("me/with-code")
    except ValueError as error:
        said["untrusted"] = str(error)
    sys.modules["wbdit_diffusers"] = None  # as if it were not installed
    try:
        load("me/with-code", trust_remote_code=True)
    except ImportError as error:
        said["absent"] = str(error)
    del sys.modules["wbdit_diffusers"]
    pipe = load("me/with-code", trust_remote_code=True)
    said["type"] = type(pipe).__module__.split(".")[0]
    pipe.set_progress_bar_config(disable=True)
    pipe(num_cells=70, generator=torch.Generator().manual_seed(5)).cells.write_h5ad(sys.argv[1])
    half = load("me/with-code", trust_remote_code=True, variant="bf16", dtype={"denoiser": torch.bfloat16})
    said["half"] = str(half.denoiser.dtype)
    from wbdit_diffusers import ScRNAGenerationPipeline
    ScRNAGenerationPipeline.from_pretrained("me/with-code")  # needs no trust: the class is at hand
    print(json.dumps(said))
"""

BLOCKS = """
    import json, sys
    import torch
    from diffusers import ModularPipeline, ModularPipelineBlocks
    said = {}
    try:
        ModularPipeline.from_pretrained("me/with-code")
    except ValueError as error:
        said["untrusted"] = str(error)
    blocks = ModularPipelineBlocks.from_pretrained("me/with-code", trust_remote_code=True)
    said["blocks"] = list(blocks.sub_blocks)
    pipe = ModularPipeline.from_pretrained("me/with-code", trust_remote_code=True)
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    cells = pipe(num_cells=70, generator=torch.Generator().manual_seed(5), output="cells")
    said["model_id"] = cells.uns["wbdit"]["model_id"]
    cells.write_h5ad(sys.argv[1])
    print(json.dumps(said))
"""


def run_python(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    result = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def expected(pbmc, hub, tmp_path_factory) -> ad.AnnData:
    """Cells of the pipeline that is then on the Hub."""
    folder = tmp_path_factory.mktemp("pushed") / "pipeline"
    make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"]).save_pretrained(folder)
    env = {**os.environ, **hub.environment(tmp_path_factory.mktemp("hf-home"))}
    result = run_python([str(folder) if word == "FOLDER" else word for word in PUSH], env)
    assert f"Published: {hub.endpoint}/me/with-code" in result.stdout
    assert "Warning" not in result.stderr and "float32" not in result.stderr
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_cells=70, generator=torch.Generator().manual_seed(5)).cells


def load_and_compare(code: str, env: dict[str, str], path, expected: ad.AnnData) -> dict:
    result = run_python(["-c", textwrap.dedent(code), str(path)], env)
    cells = ad.read_h5ad(path)
    np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())
    assert (cells.obs == expected.obs).all().all()
    assert "float32: []" not in result.stderr and "torch_dtype" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_diffusion_pipeline(expected, hub_environment, tmp_path):
    said = load_and_compare(PIPELINE, hub_environment, tmp_path / "cells.h5ad", expected)
    assert "trust_remote_code=True" in said["untrusted"]
    absent = "This pipeline is one of the package wbdit_diffusers: pip install wbdit_diffusers"
    assert said["absent"] == absent
    assert said["type"] == "wbdit_diffusers" and said["half"] == "torch.bfloat16"


def test_modular_pipeline(expected, hub_environment, tmp_path):
    said = load_and_compare(BLOCKS, hub_environment, tmp_path / "cells.h5ad", expected)
    assert "trust_remote_code=True" in said["untrusted"]
    assert said["blocks"] == ["labels", "denoise", "decode"]
    assert said["model_id"] == "me/with-code"
