"""Loading, casting and saving say nothing that nobody asked."""

import logging
import warnings

import pytest
import torch
from accelerate import init_empty_weights
from conftest import make_pipeline
from diffusers.utils import logging as diffusers_logging

from wbdit_diffusers import ScRNAGenerationPipeline


@pytest.fixture(scope="module", params=["program", "expression"])
def folder(request, pbmc, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_pipeline(pbmc, codec=request.param, label_keys=["cell_type"]).save_pretrained(folder)
    return folder


@pytest.fixture
def told(caplog):
    """What Diffusers says at its own default level, whatever commands ran before in this process."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()
    diffusers_logging.enable_propagation()  # its own handler is out of sight
    yield caplog
    diffusers_logging.disable_propagation()
    diffusers_logging.set_verbosity(verbosity)


def test_loading_casting_and_saving_are_quiet(folder, tmp_path, told):
    with warnings.catch_warnings(), told.at_level(logging.WARNING):
        warnings.simplefilter("error")
        pipe = ScRNAGenerationPipeline.from_pretrained(folder)
        pipe.to(torch.bfloat16).to(dtype=torch.float32).save_pretrained(tmp_path / "again")
        half = ScRNAGenerationPipeline.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert half.denoiser.dtype == torch.bfloat16
    assert [record.getMessage() for record in told.records] == []


def test_other_warnings_of_diffusers_are_still_told(told):
    logging.getLogger("diffusers.models.modeling_utils").warning(
        "There are modules in X that should be kept in float32: ['a']. Casting ..."
    )
    assert "['a']" in told.text


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(folder, device_map):
    pipe = ScRNAGenerationPipeline.from_pretrained(folder, device_map=device_map)
    pipe.set_progress_bar_config(disable=True)
    cells = pipe(num_cells=3, generator=torch.Generator().manual_seed(0)).cells
    plain = ScRNAGenerationPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    expected = plain(num_cells=3, generator=torch.Generator().manual_seed(0)).cells
    assert cells.shape == (3, 765)
    if not torch.cuda.is_available():  # on a GPU the last digits differ
        assert (cells.X != expected.X).nnz == 0


@pytest.mark.parametrize("device_map", ["auto", "nowhere", {"denoiser": "cpu"}])
def test_a_device_map_that_diffusers_has_not_is_one_clear_error(folder, device_map):
    with pytest.raises(OSError, match="cannot be loaded as a pipeline: .*(not supported|must be a string)"):
        ScRNAGenerationPipeline.from_pretrained(folder, device_map=device_map)


def test_models_are_made_without_memory_for_a_device_map(folder):
    """What `balanced` does where there are GPUs, to see how large the components are."""
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    for part in (pipe.denoiser, pipe.codec):
        with init_empty_weights():
            empty = type(part).from_config(part.config)
        assert all(parameter.is_meta for parameter in empty.parameters())
