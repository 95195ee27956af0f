"""Folders that are no pipeline, or a damaged one: each is refused in one line, before anything is built of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from wbdit_diffusers import ScRNAGenerationPipeline, WhiteBoxDiTModel


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(pbmc, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"], num_genes=30).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(pbmc, tmp_path_factory) -> Path:
    """Another model, of the same sizes."""
    folder = tmp_path_factory.mktemp("other") / "model"
    pipe = make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"], num_genes=30)
    pipe.denoiser.proj_in.weight.data.add_(1)
    pipe.save_pretrained(folder)
    return folder


def config(part: str, **changes) -> Callable:
    """Changes entries of a part's config."""

    def damage(folder: Path, _):
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def index(**changes) -> Callable:
    def damage(folder: Path, _):
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def tensors(part: str, change: Callable) -> Callable:
    """Changes the tensors of a part."""

    def damage(folder: Path, _):
        path = folder / part / WEIGHTS
        values = load_file(path)
        save_file(change(values) or values, path)

    return damage


def text(name: str, content: bytes | str) -> Callable:
    return lambda folder, _: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def unlink(name: str) -> Callable:
    return lambda folder, _: (folder / name).unlink()


def swap(part: str) -> Callable:
    """The part of another model."""

    def damage(folder: Path, other: Path):
        shutil.rmtree(folder / part)
        shutil.copytree(other / part, folder / part)

    return damage


def flip(name: str, position: int) -> Callable:
    """One bit of a file."""

    def damage(folder: Path, _):
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)

    return damage


def truncate(name: str, share: float) -> Callable:
    def damage(folder: Path, _):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def pickled(folder: Path, _):
    torch.save(load_file(folder / "denoiser" / WEIGHTS), folder / "denoiser" / "diffusion_pytorch_model.bin")
    (folder / "denoiser" / WEIGHTS).unlink()


def set_value(name: str, value: float) -> Callable:
    def change(values):
        values[name].view(-1)[0] = value

    return change


def without(name: str) -> Callable:
    return lambda values: {key: tensor for key, tensor in values.items() if key != name}


def same_genes_twice(folder: Path, _):
    path = folder / "processor" / "config.json"
    names = json.loads(path.read_text())["var_names"]
    config("processor", var_names=[names[0], *names[:-1]])(folder, _)


DAMAGES = {
    "empty folder": (lambda folder, _: [shutil.rmtree(folder), folder.mkdir()], "is no pipeline: it has no model_ind"),
    "no index": (unlink("model_index.json"), "is no pipeline: it has no model_index.json"),
    "empty index": (text("model_index.json", ""), "model_index.json is no JSON"),
    "binary index": (text("model_index.json", b"\xff\x00\x01"), "model_index.json is no JSON"),
    "list index": (text("model_index.json", "[1]"), "holds no configuration but a list"),
    "deep index": (text("model_index.json", "[" * 100_000), "model_index.json is no JSON"),
    "foreign class": (index(_class_name="StableDiffusionPipeline"), "holds a StableDiffusionPipeline"),
    "no format": (index(_format_version=None), "has no format version: it was written before wbdit_diffusers 0.2"),
    "no id": (index(_model_id=None), "is damaged, it names no id: copy or download it again"),
    "newer format": (index(_format_version=99), "written by a newer wbdit_diffusers .format 99.*upgrade"),
    "odd format": (index(_format_version="one"), "has no format version that this wbdit_diffusers knows: 'one'"),
    "unknown class": (index(denoiser=["wbdit_diffusers", "Nothing"]), "cannot be loaded as a pipeline"),
    "unknown library": (index(denoiser=["nothing_here", "Nothing"]), "cannot be loaded as a pipeline"),
    "part is no pair": (index(denoiser="WhiteBoxDiTModel"), "does not say what class 'denoiser' is of"),
    "part is none": (index(codec=[None, None]), "codec"),
    "steps": (index(num_inference_steps=0), "`num_inference_steps` is a whole number"),
    "steps of text": (index(num_inference_steps="many"), "`num_inference_steps` is a whole number"),
    "no denoiser": (lambda folder, _: shutil.rmtree(folder / "denoiser"), "denoiser.config.json is missing"),
    "no scheduler": (lambda folder, _: shutil.rmtree(folder / "scheduler"), "scheduler_config.json is missing"),
    "no weights": (unlink(f"codec/{WEIGHTS}"), "codec has no .safetensors file: the weights are missing"),
    "pickle": (pickled, "diffusion_pytorch_model.bin is a pickle file, which can run any code"),
    "cut weights": (truncate(f"denoiser/{WEIGHTS}", 0.5), f"denoiser.{WEIGHTS} is truncated or damaged"),
    "cut header": (truncate(f"codec/{WEIGHTS}", 0.01), f"codec.{WEIGHTS} is truncated or damaged"),
    "empty weights": (truncate(f"codec/{WEIGHTS}", 0), f"codec.{WEIGHTS} is truncated or damaged"),
    "cut tables": (truncate(f"processor/{WEIGHTS}", 0.5), f"processor.{WEIGHTS} is truncated or damaged"),
    "weights are text": (text(f"denoiser/{WEIGHTS}", "no weights at all"), "is truncated or damaged"),
    "bit of the denoiser": (flip(f"denoiser/{WEIGHTS}", -3), "is damaged, or its parts are not of one model"),
    "bit of the codec": (flip(f"codec/{WEIGHTS}", -7), "is damaged, or its parts are not of one model|NaN"),
    "bit of a table": (flip(f"processor/{WEIGHTS}", -7), "damaged|is missing, truncated or not a ScRNAProcessor's"),
    "cut config": (truncate("denoiser/config.json", 0.5), "denoiser.config.json is no JSON, cut off"),
    "cut genes": (truncate("processor/config.json", 0.7), "processor.config.json is no JSON, cut off"),
    "cut schedule": (truncate("scheduler/scheduler_config.json", 0.5), "scheduler_config.json is no JSON"),
    "other denoiser": (swap("denoiser"), "are not of one model: denoiser was saved with another one"),
    "other codec": (swap("codec"), "are not of one model: codec was saved"),
    "other schedule": (swap("scheduler"), "are not of one model: scheduler was saved"),
    "other weights": (
        lambda folder, other: shutil.copy(other / "denoiser" / WEIGHTS, folder / "denoiser"),
        "the weights are not those that were saved",
    ),
    "nan": (tensors("denoiser", set_value("proj_in.weight", np.nan)), "proj_in.weight holds 1 NaN or infinite"),
    "infinite": (tensors("codec", set_value("latents_std", np.inf)), "codec are damaged: latents_std holds 1 NaN"),
    "missing tensor": (
        tensors("denoiser", without("proj_in.weight")),
        "proj_in.weight|dam",
    ),
    "one tensor more": (
        tensors("denoiser", lambda values: values | {"extra": torch.zeros(1)}),
        "unexpected keys .*extra",
    ),
    "layers": (config("denoiser", num_layers=100_000), "`num_layers` is a whole number from 1 to 1,000, not 100000"),
    "hidden size": (config("denoiser", attention_head_dim=10**9), "`attention_head_dim` is a whole number"),
    "too many parameters": (config("denoiser", attention_head_dim=10**6, num_layers=500), "parameters, more than"),
    "type": (config("denoiser", num_layers="two"), "`num_layers` is a whole number from 1 to 1,000, not 'two'"),
    "null": (config("denoiser", patch_size=None), "`patch_size` is a whole number"),
    "half a layer": (config("denoiser", num_layers=1.5), "`num_layers` is a whole number"),
    "no layer": (config("denoiser", num_layers=0), "`num_layers` is a whole number"),
    "other layers": (config("denoiser", num_layers=3), "config.json: missing keys|cannot be loaded"),
    "block": (config("denoiser", block_type="unet"), "`block_type` is 'white_box', 'descent' or 'dit', not 'unet'"),
    "labels": (config("denoiser", condition_sizes=[10**12]), "`condition_sizes` is a whole number"),
    "labels of text": (config("denoiser", condition_sizes="10"), "`condition_sizes` is a list of whole numbers"),
    "dropout": (config("denoiser", condition_dropout=7), "`condition_dropout` is a number from 0 to 1"),
    "programs": (config("codec", num_programs=10**9), "`num_programs` is a whole number"),
    "genes of the codec": (config("codec", num_genes=31), "cannot be loaded as a pipeline"),
    "likelihood": (config("codec", likelihood="zinb"), "`likelihood` is one of nb_mixture, quantile_hurdle"),
    "genes twice": (same_genes_twice, "`var_names` holds .* more than once"),
    "genes of another length": (config("processor", var_names=["A", "B"]), "30 genes and 2 genes"),
    "no genes": (config("processor", var_names=[]), "`var_names` is empty"),
    "genes are numbers": (config("processor", var_names=[1] * 30), "`var_names` is a list of names"),
    "genes are text": (config("processor", var_names="ABC"), "`var_names` is a list of names, not 'ABC'"),
    "labels twice": (config("processor", categories=[["a", "a"], ["b"]]), "categories of 'cell_type'` holds 'a' more"),
    "label keys": (config("processor", label_keys="cell_type"), "`label_keys` is a list of obs keys"),
    "other label keys": (config("processor", label_keys=["cell_type"]), "`categories` has a list of labels for each"),
    "values": (config("processor", values="raw"), "`values` is 'counts' or 'log', not 'raw'"),
    "log scale": (config("processor", log_scale={"ln_base": 0}), "ln_base above zero"),
    "unfitted": (config("processor", var_names=None, categories=None), "not fitted|not of one model|processor"),
    "table of another shape": (
        tensors("processor", lambda values: values | {"label_frequencies": torch.ones(2)}),
        "library_size_quantiles has shape|label_combinations has shape",
    ),
    "table of nan": (tensors("processor", set_value("label_frequencies", np.nan)), "label_frequencies holds NaN"),
    "table of labels": (tensors("processor", set_value("label_combinations", 99)), "labels that the configuration"),
    "no table": (tensors("processor", without("label_frequencies")), "ScRNAProcessor's"),
    "steps of the schedule": (config("scheduler", num_train_timesteps="x"), "cannot be loaded as a pipeline"),
    "kind of schedule": (config("scheduler", beta_schedule="nothing"), "cannot be loaded as a pipeline"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(name, saved, other, tmp_path):
    damage, message = DAMAGES[name]
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage(folder, other)
    with pytest.raises(OSError, match=message) as error:
        ScRNAGenerationPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and len(str(error.value)) < 1000


def test_a_file_a_path_and_an_absent_folder_are_named(saved, tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "file", "file is a file, not the folder of a pipeline"),
        (tmp_path / "absent", "absent is no pipeline"),
        (saved / "denoiser", "denoiser is no pipeline"),
    ):
        with pytest.raises(OSError, match=message):
            ScRNAGenerationPipeline.from_pretrained(path)


def test_pickles_are_neither_read_nor_written(saved, tmp_path):
    for cls in (ScRNAGenerationPipeline, WhiteBoxDiTModel):
        with pytest.raises(ValueError, match="would load .*pickle"):
            cls.from_pretrained(saved, use_safetensors=False)
    pipe = ScRNAGenerationPipeline.from_pretrained(saved)
    with pytest.raises(ValueError, match="would write pickle files"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)


# ==================== What belongs together ====================


def ids(folder: Path) -> set[str]:
    return {json.loads(path.read_text()).get("_model_id") for path in folder.rglob("*.json")}


def test_all_parts_have_one_id_that_says_what_the_model_is(saved, other, tmp_path):
    assert len(ids(saved)) == 1 and None not in ids(saved) and ids(saved) != ids(other)
    pipe = ScRNAGenerationPipeline.from_pretrained(saved)
    pipe.save_pretrained(tmp_path / "again")
    assert ids(tmp_path / "again") == ids(saved)
    pipe.denoiser.proj_out.bias.data.view(-1)[0] += 1
    pipe.save_pretrained(tmp_path / "trained on")
    assert len(ids(tmp_path / "trained on")) == 1 and ids(tmp_path / "trained on") != ids(saved)


def test_parts_may_be_swapped_in_memory_and_when_loading(saved, other, tmp_path):
    pipe = ScRNAGenerationPipeline.from_pretrained(saved)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert isinstance(ScRNAGenerationPipeline.from_pretrained(tmp_path).scheduler, DDIMScheduler)
    denoiser = WhiteBoxDiTModel.from_pretrained(other, subfolder="denoiser")
    assert ScRNAGenerationPipeline.from_pretrained(saved, denoiser=denoiser).denoiser is denoiser
    assert ScRNAGenerationPipeline.from_pretrained(saved, dtype=torch.float16).denoiser.dtype == torch.float16


def test_half_precision_is_the_same_model_wherever_it_is_loaded(saved, tmp_path):
    ScRNAGenerationPipeline.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(tmp_path)
    ScRNAGenerationPipeline.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_the_model_that_was_there(saved, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.denoiser.proj_out.bias.data.view(-1)[0] += 1

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(pipe.codec, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(folder)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(tmp_path / "new")
    assert ids(folder) == ids(saved)
    ScRNAGenerationPipeline.from_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_into_a_folder_keeps_its_other_files(saved, tmp_path):
    (tmp_path / "split.json").write_text("{}")
    ScRNAGenerationPipeline.from_pretrained(saved).save_pretrained(tmp_path)
    assert (tmp_path / "split.json").read_text() == "{}" and ids(tmp_path) - {None} == ids(saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file is a file: give a folder"):
        ScRNAGenerationPipeline.from_pretrained(saved).save_pretrained(tmp_path / "file")
