"""Diffusers finds our classes, and those that users derive from them."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from conftest import make_pipeline
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

import wbdit_diffusers as wbdit


class WithExtra(wbdit.ScRNAGenerationPipeline):
    """A pipeline of a user, with another component and another call."""

    _optional_components = ["extra"]

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler,
        processor: wbdit.ScRNAProcessor,
        codec: wbdit.ProgramCodec,
        extra: ModelMixin | None = None,
        num_inference_steps: int = 12,
    ):
        super().__init__(denoiser, scheduler, processor, codec, num_inference_steps)
        self.register_modules(extra=extra)

    def __call__(self, num_cells: int) -> int:
        return super().__call__(num_cells).cells.n_obs


class MyDenoiser(wbdit.WhiteBoxDiTModel):
    pass


class MyCodec(wbdit.ProgramCodec):
    pass


class MyProcessor(wbdit.ScRNAProcessor):
    pass


class OwnDenoiser(ModelMixin, ConfigMixin):
    """A network that shares no code with ours."""

    @register_to_config
    def __init__(self, sample_size: int, condition_sizes: tuple = ()):
        super().__init__()
        self.condition_sizes = tuple(condition_sizes)
        self.linear = torch.nn.Linear(sample_size + len(self.condition_sizes) + 1, sample_size)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        labels = torch.zeros(len(sample), len(self.condition_sizes)) if class_labels is None else class_labels
        time = torch.as_tensor(timestep).reshape(-1, 1).expand(len(sample), 1)
        return (self.linear(torch.cat([sample, labels.to(sample), time / 1000], dim=1)),)


@pytest.fixture
def user_module(monkeypatch):
    """The classes in a module that imports nothing else: Diffusers looks for base classes there."""
    module = ModuleType("a_user_module")
    for one in (WithExtra, MyDenoiser, MyCodec, MyProcessor, OwnDenoiser):
        monkeypatch.setattr(one, "__module__", module.__name__)
        setattr(module, one.__name__, one)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def own(component: str, pipe: wbdit.ScRNAGenerationPipeline, folder):
    """A component of the user's class, with the weights of ours."""
    classes = {"denoiser": MyDenoiser, "codec": MyCodec, "processor": MyProcessor}
    getattr(pipe, component).save_pretrained(folder)
    return classes[component].from_pretrained(folder)


@pytest.mark.parametrize("component", ["denoiser", "codec", "processor", "extra"])
def test_a_subclass_of_a_user_is_saved_and_loaded(component, pbmc, user_module, tmp_path):
    pipe = make_pipeline(pbmc, codec="program", label_keys=["cell_type"])
    part = pipe.codec if component == "extra" else own(component, pipe, tmp_path / component)
    pipe = WithExtra(**{**pipe.components, component: part}, num_inference_steps=4)
    pipe.save_pretrained(tmp_path / "pipe")
    for loaded in (cls.from_pretrained(tmp_path / "pipe") for cls in (WithExtra, DiffusionPipeline)):
        assert type(loaded) is WithExtra and type(getattr(loaded, component)) is type(part)
        assert loaded(3) == 3 and loaded.config.num_inference_steps == 4
    ours = wbdit.ScRNAGenerationPipeline.from_pretrained(tmp_path / "pipe")
    assert type(ours) is wbdit.ScRNAGenerationPipeline and ours(num_cells=2).cells.n_obs == 2


def test_another_denoiser_replaces_ours(program_pipe, user_module, tmp_path):
    program_pipe.save_pretrained(tmp_path / "ours")
    sizes = program_pipe.codec.num_features, program_pipe.processor.condition_sizes
    load = wbdit.ScRNAGenerationPipeline.from_pretrained
    pipe = load(tmp_path / "ours", denoiser=OwnDenoiser(*sizes))
    pipe.save_pretrained(tmp_path / "theirs")
    for guidance_scale in (1.0, 2.0):
        first, second = (
            one(num_cells=5, guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(0)).cells
            for one in (pipe, load(tmp_path / "theirs"))
        )
        assert (first.X != second.X).nnz == 0


@pytest.mark.parametrize(
    "imports",
    [
        "import wbdit_diffusers; assert 'diffusers' not in sys.modules; from diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline; import wbdit_diffusers",
    ],
)
def test_diffusers_loads_a_folder_after_one_import(imports):
    code = f"import sys; {imports}; from wbdit_diffusers.pretrained import FOLDER, PBMC;"
    code += "print(type(DiffusionPipeline.from_pretrained(FOLDER / PBMC)).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "ScRNAGenerationPipeline\n", result.stderr
