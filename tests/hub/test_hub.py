"""A round trip through a Hub over HTTP: pushed by one process, loaded by others with an empty cache."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import make_pipeline
from safetensors.torch import load_file

from wbdit_diffusers import ScRNAGenerationPipeline


pytestmark = pytest.mark.slow  # processes of their own, which see the Hub's address before they import anything

PUSH = """
    import sys
    from huggingface_hub import create_repo, upload_file
    from wbdit_diffusers import ScRNAGenerationPipeline
    from wbdit_diffusers.hub import publish

    pipe = ScRNAGenerationPipeline.from_pretrained(sys.argv[1])
    pipe.push_to_hub("me/wbdit-test")

    create_repo("me/own-card")
    card = b"---\\nlibrary_name: diffusers\\n---\\nMy own words."
    upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/own-card")
    pipe.push_to_hub("me/own-card")

    publish(pipe, sys.argv[1], "me/published")
"""

PULL = """
    import json, sys
    import torch
    import wbdit_diffusers

    pipe = wbdit_diffusers.ScRNAGenerationPipeline.from_pretrained("me/wbdit-test")
    pipe.save_pretrained(sys.argv[2])
    pipe(num_cells=70, generator=torch.Generator().manual_seed(5)).cells.write_h5ad(sys.argv[1])

    processor = wbdit_diffusers.ScRNAProcessor.from_pretrained("me/wbdit-test", subfolder="processor")
    denoiser = wbdit_diffusers.WhiteBoxDiTModel.from_pretrained("me/wbdit-test", subfolder="denoiser")
    codec = wbdit_diffusers.ProgramCodec.from_pretrained("me/wbdit-test", subfolder="codec")
    said = {"genes": len(processor.var_names), "features": codec.num_features, "size": denoiser.config.sample_size}
    try:
        wbdit_diffusers.ScRNAGenerationPipeline.from_pretrained("me/absent")
    except OSError as error:
        said["absent"] = str(error)
    print(json.dumps(said))
"""

PULL_BY_DIFFUSERS = """
    import json, sys
    import torch
    import wbdit_diffusers
    from diffusers import AutoModel, DiffusionPipeline

    said = {}
    for repo_id in ("me/wbdit-test", "me/published"):
        parts = [AutoModel.from_pretrained(repo_id, subfolder=part) for part in ("denoiser", "codec")]
        said[repo_id] = [type(part).__name__ for part in parts]
        assert type(DiffusionPipeline.from_pretrained(repo_id)).__name__ == "ScRNAGenerationPipeline"
    pipe = DiffusionPipeline.from_pretrained("me/published")
    pipe(num_cells=70, generator=torch.Generator().manual_seed(5)).cells.write_h5ad(sys.argv[1])
    print(json.dumps(said))
"""


def run_python(code: str, env: dict[str, str], *args: Path) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def pushed(pbmc, hub, tmp_path_factory) -> Path:
    """The folder of a pipeline that was pushed."""
    folder = tmp_path_factory.mktemp("pushed") / "pipeline"
    make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"]).save_pretrained(folder)
    run_python(PUSH, {**os.environ, **hub.environment(tmp_path_factory.mktemp("hf-home"))}, folder)
    return folder


def check_cells(path: Path, folder: Path):
    """The cells in a file are those of the pipeline in a folder."""
    cells = ad.read_h5ad(path)
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    expected = pipe(num_cells=70, generator=torch.Generator().manual_seed(5)).cells
    np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())
    assert (cells.obs == expected.obs).all().all()


def test_pushed_files(pushed, hub):
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("codec", "denoiser", "processor")]
    configs = ["codec/config.json", "denoiser/config.json", "processor/config.json", "scheduler/scheduler_config.json"]
    assert set(hub.repos["me/wbdit-test"]) == {"README.md", "model_index.json", *weights, *configs}  # and no code


def test_round_trip_keeps_weights_and_cells(pushed, hub_environment, tmp_path):
    said = json.loads(run_python(PULL, hub_environment, tmp_path / "cells.h5ad", tmp_path / "pipeline"))
    assert (said["genes"], said["features"], said["size"]) == (765, 7, 7) and "me/absent" in said["absent"]
    for part in ("denoiser", "codec", "processor"):
        before, after = (
            load_file(folder / part / "diffusion_pytorch_model.safetensors")
            for folder in (pushed, tmp_path / "pipeline")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    check_cells(tmp_path / "cells.h5ad", pushed)
    assert ad.read_h5ad(tmp_path / "cells.h5ad").uns["wbdit"]["model_id"] == "me/wbdit-test"


def test_diffusers_loads_what_was_pushed(pushed, hub_environment, tmp_path):
    said = json.loads(run_python(PULL_BY_DIFFUSERS, hub_environment, tmp_path / "cells.h5ad").splitlines()[-1])
    assert said["me/wbdit-test"] == said["me/published"] == ["WhiteBoxDiTModel", "ProgramCodec"]
    check_cells(tmp_path / "cells.h5ad", pushed)


def test_a_model_card_is_rendered_unless_there_is_one(pushed, hub):
    card = hub.repos["me/wbdit-test"]["README.md"].decode()
    assert "library_name: wbdit-diffusers" in card
    assert 'ScRNAGenerationPipeline.from_pretrained("me/wbdit-test")' in card
    assert "765 genes" in card and "CD19+ B" in card and "automatically generated" not in card
    assert b"My own words." in hub.repos["me/own-card"]["README.md"]
    assert "codec/config.json" in hub.repos["me/own-card"]
    assert b"after `import wbdit_diffusers`" in hub.repos["me/published"]["README.md"]
