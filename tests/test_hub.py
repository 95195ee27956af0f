"""The round trip through a Hub over HTTP, each side in a process of its own."""

import subprocess
import sys
import textwrap

import anndata as ad
import numpy as np
import torch
from safetensors.torch import load_file


def run_python(code: str, env: dict[str, str], *args: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


PUSH = """
    import sys
    from wbdit_diffusers import ScRNAGenerationPipeline

    pipe = ScRNAGenerationPipeline.from_pretrained(sys.argv[1])
    pipe.push_to_hub(sys.argv[2])
"""

PULL = """
    import sys
    import wbdit_diffusers

    pipe = wbdit_diffusers.ScRNAGenerationPipeline.from_pretrained(sys.argv[1])
    pipe.save_pretrained(sys.argv[2])
    import torch

    pipe(num_cells=30, generator=torch.Generator().manual_seed(5)).cells.write_h5ad(sys.argv[3])
"""


def test_round_trip(program_pipe, hub, hub_environment, tmp_path):
    pipe = program_pipe
    pipe.save_pretrained(tmp_path / "pushed")
    run_python(PUSH, hub_environment, tmp_path / "pushed", "me/wbdit-test")
    assert sorted(hub.repos["me/wbdit-test"]) == [
        "README.md",
        "autoencoder/config.json",
        "autoencoder/diffusion_pytorch_model.safetensors",
        "denoiser/config.json",
        "denoiser/diffusion_pytorch_model.safetensors",
        "model_index.json",
        "processor/config.json",
        "processor/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ]

    run_python(PULL, hub_environment, "me/wbdit-test", tmp_path / "pulled", tmp_path / "cells.h5ad")
    pushed = load_file(tmp_path / "pushed" / "denoiser" / "diffusion_pytorch_model.safetensors")
    pulled = load_file(tmp_path / "pulled" / "denoiser" / "diffusion_pytorch_model.safetensors")
    assert pushed.keys() == pulled.keys()
    assert all(torch.equal(pushed[name], pulled[name]) for name in pushed)

    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    expected = pipe(num_cells=30, generator=torch.Generator().manual_seed(5)).cells
    np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())
    assert (cells.obs == expected.obs).all().all()
    assert cells.uns["wbdit"]["model_id"] == "me/wbdit-test"


def test_generic_diffusers_classes_load_it_too(pipe, hub_environment, tmp_path):
    pipe.save_pretrained(tmp_path / "pushed")
    run_python(PUSH, hub_environment, tmp_path / "pushed", "me/generic")
    code = """
        import wbdit_diffusers

        processor = wbdit_diffusers.ScRNAProcessor.from_pretrained("me/generic", subfolder="processor")
        denoiser = wbdit_diffusers.WhiteBoxDiTModel.from_pretrained("me/generic", subfolder="denoiser")
        print(processor.num_features == denoiser.config.num_genes)
    """
    assert run_python(code, hub_environment) == "True\n"


def test_model_card_is_rendered_and_one_s_own_is_kept(pipe, hub, hub_environment, tmp_path):
    pipe.save_pretrained(tmp_path)
    run_python(PUSH, hub_environment, tmp_path, "me/card")
    card = hub.repos["me/card"]["README.md"].decode()
    assert "library_name: diffusers" in card
    assert 'ScRNAGenerationPipeline.from_pretrained("me/card")' in card
    assert "765 genes" in card and "CD19+ B" in card and "automatically generated" not in card

    hub.repos["me/card"]["README.md"] = b"---\nlibrary_name: diffusers\n---\nMy own words."
    run_python(PUSH, hub_environment, tmp_path, "me/card")
    assert b"My own words." in hub.repos["me/card"]["README.md"]


def test_unknown_repository_is_named(hub_environment):
    code = """
        from wbdit_diffusers import ScRNAGenerationPipeline

        try:
            ScRNAGenerationPipeline.from_pretrained("me/absent")
        except OSError as error:
            print(error)
    """
    assert "me/absent" in run_python(code, hub_environment)
