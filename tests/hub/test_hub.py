"""The round trip through a Hub over HTTP, each side in a process of its own."""

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


pytestmark = pytest.mark.slow  # two processes, which see the Hub's address before they import anything


def run_python(code: str, env: dict[str, str], *args: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


PUSH = """
    import sys
    from huggingface_hub import create_repo, upload_file
    from wbdit_diffusers import ScRNAGenerationPipeline

    pipe = ScRNAGenerationPipeline.from_pretrained(sys.argv[1])
    pipe.push_to_hub("me/wbdit-test")

    create_repo("me/own-card")
    card = b"---\\nlibrary_name: diffusers\\n---\\nMy own words."
    upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/own-card")
    pipe.push_to_hub("me/own-card")
"""

PULL = """
    import json, sys
    import torch
    import wbdit_diffusers

    pipe = wbdit_diffusers.ScRNAGenerationPipeline.from_pretrained("me/wbdit-test")
    pipe.save_pretrained(sys.argv[1])
    pipe(num_cells=30, generator=torch.Generator().manual_seed(5)).cells.write_h5ad(sys.argv[2])

    processor = wbdit_diffusers.ScRNAProcessor.from_pretrained("me/wbdit-test", subfolder="processor")
    denoiser = wbdit_diffusers.WhiteBoxDiTModel.from_pretrained("me/wbdit-test", subfolder="denoiser")
    codec = wbdit_diffusers.ProgramCodec.from_pretrained("me/wbdit-test", subfolder="codec")
    try:
        wbdit_diffusers.ScRNAGenerationPipeline.from_pretrained("me/absent")
    except OSError as error:
        absent = str(error)
    parts = {"genes": len(processor.var_names), "features": codec.num_features, "size": denoiser.config.sample_size}
    print(json.dumps({"parts": parts, "absent": absent}))
"""


@pytest.fixture(scope="module")
def pushed(pbmc, hub, tmp_path_factory) -> Path:
    """The folder of a pipeline that was pushed."""
    folder = tmp_path_factory.mktemp("pushed") / "pipeline"
    make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"]).save_pretrained(folder)
    run_python(PUSH, hub_process(hub, tmp_path_factory), folder)
    return folder


@pytest.fixture(scope="module")
def pulled(pushed, hub, tmp_path_factory) -> tuple[Path, ad.AnnData, dict]:
    """What another process, with an empty cache, has of it: the folder it saved, cells, and what it printed."""
    folder = tmp_path_factory.mktemp("pulled")
    printed = run_python(PULL, hub_process(hub, tmp_path_factory), folder / "pipeline", folder / "cells.h5ad")
    return folder / "pipeline", ad.read_h5ad(folder / "cells.h5ad"), json.loads(printed)


def hub_process(hub, tmp_path_factory) -> dict[str, str]:
    return {**os.environ, **hub.environment(tmp_path_factory.mktemp("hf-home"))}


def test_what_is_pushed(pushed, hub):
    assert sorted(hub.repos["me/wbdit-test"]) == [
        "README.md",
        "codec/config.json",
        "codec/diffusion_pytorch_model.safetensors",
        "denoiser/config.json",
        "denoiser/diffusion_pytorch_model.safetensors",
        "model_index.json",
        "processor/config.json",
        "processor/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ]


def test_round_trip_keeps_weights_and_cells(pushed, pulled):
    folder, cells, _ = pulled
    for component in ("denoiser", "codec", "processor"):
        before, after = (
            load_file(path / component / "diffusion_pytorch_model.safetensors") for path in (pushed, folder)
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    pipe = ScRNAGenerationPipeline.from_pretrained(pushed)
    expected = pipe(num_cells=30, generator=torch.Generator().manual_seed(5)).cells
    np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())
    assert (cells.obs == expected.obs).all().all()
    assert cells.uns["wbdit"]["model_id"] == "me/wbdit-test"


def test_each_component_is_loaded_by_itself(pulled):
    assert pulled[2]["parts"] == {"genes": 765, "features": 7, "size": 7}


def test_unknown_repository_is_named(pulled):
    assert "me/absent" in pulled[2]["absent"]


def test_model_card_is_rendered_and_one_s_own_is_kept(pushed, hub):
    card = hub.repos["me/wbdit-test"]["README.md"].decode()
    assert "library_name: wbdit-diffusers" in card
    assert 'ScRNAGenerationPipeline.from_pretrained("me/wbdit-test")' in card
    assert "765 genes" in card and "CD19+ B" in card and "automatically generated" not in card

    assert b"My own words." in hub.repos["me/own-card"]["README.md"]
    assert "codec/config.json" in hub.repos["me/own-card"]
