"""Saving and loading: a family that shares folders, damaged folders that are refused, folders that are never half."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors.torch import load_file, save_file

import wbdit_diffusers
from wbdit_diffusers import ProgramCodec, ScRNAGenerationPipeline, ScRNAPipeline, ScRNAProcessor, WhiteBoxDiTModel


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(pbmc, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"], num_genes=30).save_pretrained(folder)
    return folder


# ==================== The family ====================


class AnnotatedPipeline(ScRNAPipeline):
    """A pipeline of somebody else's, with an optional component."""

    _optional_components = ["annotator"]

    def __init__(
        self,
        denoiser: WhiteBoxDiTModel,
        scheduler: SchedulerMixin,
        processor: ScRNAProcessor,
        codec: ProgramCodec,
        annotator: WhiteBoxDiTModel | None = None,
        num_inference_steps: int = 20,
    ):
        super().__init__()
        self.register_modules(
            denoiser=denoiser, scheduler=scheduler, processor=processor, codec=codec, annotator=annotator
        )
        self.register_to_config(num_inference_steps=num_inference_steps)

    def __call__(self, adata):
        return self.decode_latents(self.encode_cells(adata), generator=torch.Generator().manual_seed(0))


class SeededPipeline(ScRNAGenerationPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, generator=torch.Generator().manual_seed(7), **kwargs)


def test_subclasses_load_each_others_folders(saved, tmp_path, pbmc):
    subclass = SeededPipeline.from_pretrained(saved)
    expected = subclass(num_cells=5).cells
    subclass.save_pretrained(tmp_path / "subclass")
    pipe = ScRNAGenerationPipeline.from_pretrained(tmp_path / "subclass")
    cells = pipe(num_cells=5, generator=torch.Generator().manual_seed(7)).cells
    assert (cells.X != expected.X).nnz == 0
    assert AnnotatedPipeline.from_pretrained(tmp_path / "subclass")(pbmc[:3]).n_obs == 3


def test_an_optional_component_may_be_none(saved, tmp_path, pbmc):
    pipe = AnnotatedPipeline.from_pretrained(saved)
    assert pipe.annotator is None
    pipe.save_pretrained(tmp_path / "annotated")
    index = json.loads((tmp_path / "annotated" / "model_index.json").read_text())
    assert index["annotator"] == [None, None]
    again = AnnotatedPipeline.from_pretrained(tmp_path / "annotated")
    assert again.annotator is None and (again(pbmc[:3]).X != pipe(pbmc[:3]).X).nnz == 0
    generation = ScRNAGenerationPipeline.from_pretrained(tmp_path / "annotated")
    assert generation(num_cells=2).cells.n_obs == 2


def test_components_are_shared_in_memory(saved, pbmc):
    pipe = ScRNAGenerationPipeline.from_pretrained(saved)
    for other in (AnnotatedPipeline.from_pipe(pipe), AnnotatedPipeline(**pipe.components)):
        assert other.denoiser is pipe.denoiser and other(pbmc[:3]).n_obs == 3


def test_parts_may_be_swapped_in_memory_and_when_loading(saved, tmp_path):
    pipe = ScRNAGenerationPipeline.from_pretrained(saved)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert isinstance(ScRNAGenerationPipeline.from_pretrained(tmp_path).scheduler, DDIMScheduler)
    denoiser = WhiteBoxDiTModel.from_pretrained(saved, subfolder="denoiser")
    assert ScRNAGenerationPipeline.from_pretrained(saved, denoiser=denoiser).denoiser is denoiser
    half = ScRNAGenerationPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.denoiser.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    ScRNAGenerationPipeline.from_pretrained(tmp_path / "half")


# ==================== Damaged folders ====================


def config(part: str, **changes) -> Callable:
    """Changes entries of a part's config."""

    def damage(folder: Path):
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def tensors(part: str, change: Callable) -> Callable:
    """Changes the tensors of a part."""

    def damage(folder: Path):
        path = folder / part / WEIGHTS
        values = load_file(path)
        save_file(change(values) or values, path)

    return damage


def truncate(name: str, share: float) -> Callable:
    def damage(folder: Path):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def pickled(folder: Path):
    torch.save(load_file(folder / "denoiser" / WEIGHTS), folder / "denoiser" / "diffusion_pytorch_model.bin")
    (folder / "denoiser" / WEIGHTS).unlink()


def without(name: str) -> Callable:
    return lambda values: {key: tensor for key, tensor in values.items() if key != name}


DAMAGES = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "is not a complete pipeline"),
    "cut index": (truncate("model_index.json", 0.5), "cannot be loaded"),
    "no part": (lambda folder: shutil.rmtree(folder / "codec"), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "codec" / WEIGHTS).unlink(), "cannot be loaded"),
    "no tables": (lambda folder: (folder / "processor" / WEIGHTS).unlink(), "cannot be loaded"),
    "pickle": (pickled, "cannot be loaded.*safetensors"),
    "cut weights": (truncate(f"denoiser/{WEIGHTS}", 0.5), "cannot be loaded"),
    "empty weights": (truncate(f"codec/{WEIGHTS}", 0), "cannot be loaded"),
    "cut tables": (truncate(f"processor/{WEIGHTS}", 0.5), "cannot be loaded.*truncated"),
    "cut config": (truncate("denoiser/config.json", 0.5), "cannot be loaded"),
    "cut genes": (truncate("processor/config.json", 0.7), "cannot be loaded"),
    "missing tensor": (tensors("denoiser", without("proj_in.weight")), "proj_in.weight"),
    "other layers": (config("denoiser", num_layers=3), "cannot be loaded"),
    "block": (config("denoiser", block_type="unet"), "`block_type`.*unet"),
    "likelihood": (config("codec", likelihood="zinb"), "zinb"),
    "genes of the codec": (config("codec", num_genes=31), "cannot be loaded"),
    "genes of another length": (config("processor", var_names=["A", "B"]), "2 and 30 genes"),
    "schedule": (config("scheduler", beta_schedule="nothing"), "cannot be loaded"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(name, saved, tmp_path):
    damage, message = DAMAGES[name]
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(OSError, match=message) as error:
        ScRNAGenerationPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and len(str(error.value)) < 1000


def test_other_paths_are_named(saved, tmp_path):
    for path in (saved / "denoiser", tmp_path):
        with pytest.raises(OSError, match="is not a complete pipeline: it has no model_index.json"):
            ScRNAGenerationPipeline.from_pretrained(path)
    with pytest.raises(OSError, match="There is no folder .*absent"):
        ScRNAGenerationPipeline.from_pretrained(tmp_path / "absent")


def test_components_of_different_models_are_refused(pipe, pbmc):
    other = WhiteBoxDiTModel(sample_size=10, num_attention_heads=2, attention_head_dim=8)
    with pytest.raises(ValueError, match="come from different models: 766 and 10 values per cell"):
        ScRNAGenerationPipeline(**{**pipe.components, "denoiser": other})
    with pytest.raises(ValueError, match=r"\(10, 3\) and \(\) labels"):
        ScRNAGenerationPipeline(**{**pipe.components, "denoiser": make_pipeline(pbmc).denoiser})


# ==================== Saving ====================


def test_a_new_folder_appears_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    pipe = ScRNAGenerationPipeline.from_pretrained(saved)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.codec, "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            pipe.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moved", [0, 3, 7])
def test_a_save_that_is_killed_over_another_model_is_incomplete(saved, tmp_path, moved, monkeypatch):
    folder, replace, calls = tmp_path / "model", Path.replace, []
    shutil.copytree(saved, folder)
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.denoiser.proj_out.bias.data.view(-1)[0] += 1

    def killed(self, target):
        calls.append(target)
        if len(calls) > moved + 1:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pipe.save_pretrained(folder)
    with pytest.raises(OSError, match="is not a complete pipeline"):
        ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder)
    again = ScRNAGenerationPipeline.from_pretrained(folder)
    assert torch.equal(again.denoiser.proj_out.bias, pipe.denoiser.proj_out.bias)


def test_other_files_of_a_folder_stay_and_only_safetensors_are_written(saved, tmp_path):
    (tmp_path / "split.json").write_text("{}")
    pipe = ScRNAGenerationPipeline.from_pretrained(saved)
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "split.json").read_text() == "{}"
    assert not [
        path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pkl", ".pt") or ".partial" in path.name
    ]
    ScRNAGenerationPipeline.from_pretrained(tmp_path, use_safetensors=False)  # reads safetensors all the same
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file is a file: give a folder"):
        pipe.save_pretrained(tmp_path / "file")


def test_every_class_of_the_index_is_in_the_package(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert all(hasattr(wbdit_diffusers, name) for library, name in (index[key] for key in ("denoiser", "codec")))
