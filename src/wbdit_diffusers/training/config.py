"""What a training is told, and the only defaults of it.

Python code, YAML files and flags of the command line all make a [`TrainingConfig`]: what one of them knows all know,
and each value is checked in the same way.
"""

import dataclasses
import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from ..files import one_line
from ..flags import did_you_mean


SHIPPED_CONFIGS = resources.files(__package__) / "configs"

# Defaults that depend on what is denoised. With an expression codec they are the published network.
CODEC_DEFAULTS = {
    "program": {
        "block_type": "descent",
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "train_batch_size": 256,
    },
    "expression": {
        "block_type": "white_box",
        "patch_size": 10,
        "num_layers": 3,
        "num_attention_heads": 8,
        "attention_head_dim": 96,
        "train_batch_size": 64,
    },
}

# Bounds are far above what is of use, and below what would keep a machine busy for hours with a slip of the finger.
MAX_PARAMETERS = 2_000_000_000
RESERVED_LABELS = ("library_size", "_index")  # of obs, which generated cells have besides

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(gt=0, le=10**9)]  # of steps, epochs and cells
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(gt=0, le=16_384)]
Programs = Annotated[int, Field(gt=0, le=1024)]
Name = Annotated[str, Field(min_length=1)]
# An address such as hf://datasets/me/cells is no path: that would lose one of its slashes.
Address = Annotated[str | Path, AfterValidator(lambda value: value if "://" in str(value) else Path(value))]
Labels = Annotated[list[Name], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
pydantic_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(config=pydantic_config, kw_only=True)
class DataConfig:
    """The cells."""

    dataset: Address | None = None
    """The cells to train on: an .h5ad or .zarr file, or a folder that `wbdit prepare` wrote, here or on the Hub
    (hf://datasets/me/cells)."""
    layer: Name | None = None
    """The layer that holds the matrix. X when not given."""
    values: Literal["counts", "log"] = "counts"
    """What the matrix holds: integer counts, or values that are on a log scale already."""
    label_keys: Labels = Field(default_factory=list)
    """Columns of obs that condition the cells, the cell type first."""
    num_genes: Annotated[int, Field(ge=0, le=10**6)] = 2000
    """How many genes to model, the most variable ones. 0 for all."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the cells that is held out from training, within each label of the first label key."""
    split: Path | None = None
    """The split.json of another run, whose cells are held out instead."""


@dataclass(config=pydantic_config, kw_only=True)
class ProgramCodecConfig:
    """Stage one with gene programs: a linear decoder under a likelihood of counts, or of log values."""

    num_programs: Programs | None = None
    """How many gene programs. When not given they are doubled for as long as cells set aside gain by it."""
    min_programs: Programs = 16
    """The number of programs that the search begins with."""
    max_programs: Programs = 64
    """The number of programs that the search does not exceed."""
    min_program_gain: Fraction | None = None
    """By which share twice as many programs must lower the loss of the cells set aside to be worth their cost, or for
    log values by which share of what the fit has gained (a density has no zero point). Default: 0.01, or 0.1 for log
    values."""
    codec_hidden_size: Width = 256
    """Width of the encoder's hidden layer."""
    codec_learning_rate: LearningRate = 1e-3
    """Learning rate of encoder and decoder."""
    dispersion_learning_rate: LearningRate = 1e-2
    """Learning rate of each gene's noise. It spans orders of magnitude, and must get there before programs overfit."""
    program_prior_precision: NonNegativeFloat = 30.0
    """Precision of the Gaussian prior on the decoder's weights. Genes with few counts are drawn to zero by it."""
    label_prior_precision: NonNegativeFloat = 4.0
    """Precision of the Gaussian prior on what labels do to a gene beside the programs."""
    codec_batch_size: Annotated[int, Field(gt=0, le=10**5)] = 128
    """Cells in a step of stage one."""
    codec_max_steps: Count = 20_000
    """Steps after which stage one ends at the latest. Cells set aside mostly end it much earlier."""
    codec_validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training cells, 2,000 at most, that stage one sets aside to decide when it ends."""
    codec_stop_tolerance: NonNegativeFloat | None = None
    """Stage one ends when the loss of the cells set aside is above its best by this share of it, or for log values by
    this share of what the fit has gained (a density has no zero point). Programs that follow their cells a little more
    closely than that best give better cells, once the decoder is fitted to them. Default: 0.003, or 0.1 for log
    values."""
    codec_patience: Count = 1000
    """Stage one also ends when that loss has not improved by a thousandth for so many steps."""
    codec_time_fraction: Annotated[float, Field(gt=0, lt=1)] = 1 / 3
    """The part of max_train_minutes that stage one may take."""
    kl_weight: NonNegativeFloat = 0.3
    """Weight of the divergence between a cell's encoded programs and a standard normal distribution. It keeps the
    encoder from fitting the noise of single counts."""
    decoder_steps: CountOrZero = 600
    """Steps in which the decoder alone is fitted at the end, to the final programs of all training cells."""
    decoder_learning_rate: LearningRate = 3e-3
    """Learning rate of these steps, which falls to zero along a cosine."""


@dataclass(config=pydantic_config, kw_only=True)
class ExpressionCodecConfig:
    """Latents that are the expression itself, as in the paper."""

    standardize: bool = True
    """Whether each gene's expression gets mean 0 and variance 1 before it is denoised."""
    model_library_size: bool = True
    """Whether the log library size is denoised with the expression. If not, it is drawn from training cells."""


@dataclass(config=pydantic_config, kw_only=True)
class DenoiserConfig:
    """The network that denoises latents."""

    block_type: Literal["descent", "white_box", "dit"] | None = None
    """The block whose two steps descend what they are derived from, the published White-Box block (MSSA and ISTA), or
    the plain DiT block as a baseline."""
    patch_size: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """How many values of a cell make one token. Default: 10 with expression; one with gene programs, so that each is a
    token, or as many as keep a cell at 32 tokens."""
    num_layers: Annotated[int, Field(gt=0, le=256)] | None = None
    """Number of blocks."""
    num_attention_heads: Annotated[int, Field(gt=0, le=256)] | None = None
    """Number of attention heads, in a White-Box block the number of subspaces."""
    attention_head_dim: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Dimension of a head. The width of the network is this times the number of heads."""
    mixture_share: Fraction = 0.3
    """With gene programs the network first learns what a Gaussian mixture for each combination of labels predicts in
    closed form, and then more and more from the cells themselves: at the end this share of its target is still the
    mixture's. With exactly 0 there is no mixture, and the network learns from the cells alone."""
    condition_dropout: Share = 0.1
    """Share of the cells that are trained on without their labels, which guidance needs."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    """What the network predicts: the noise, the velocity or the clean cell."""
    scheduler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"] = "dpmsolver++"
    """The solver of the finished pipeline. It has no effect on training."""
    num_inference_steps: Annotated[int, Field(gt=0, le=1000)] = 20
    """How many steps the finished pipeline takes by default. It has no effect on training."""


@dataclass(config=pydantic_config, kw_only=True)
class OptimizationConfig:
    """How the denoiser is trained."""

    max_train_steps: Count = 3000
    """Steps of the optimizer after which training ends."""
    max_train_epochs: Count = 1000
    """Passes over the training cells after which training ends, if they are over before the steps. With more of them
    a network learns few cells by heart."""
    max_train_minutes: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Minutes after which training ends, if they are over before the steps. Stage one is included."""
    train_batch_size: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Cells in a batch of each process."""
    gradient_accumulation_steps: Annotated[int, Field(gt=0, le=10**6)] = 1
    """Batches in a step of the optimizer."""
    learning_rate: LearningRate = 2e-3
    """Highest learning rate of AdamW."""
    lr_warmup_steps: CountOrZero = 100
    """Steps in which the learning rate rises from zero."""
    lr_decay_fraction: Fraction = 0.3
    """The last part of the training, in steps or minutes, in which the learning rate falls to zero."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to it."""
    use_ema: bool = True
    """Whether the pipeline gets a moving average of the weights instead of the last ones."""
    ema_decay: Share = 0.999
    """Decay of the moving average. It starts lower and reaches this by and by."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Type of the forward pass. The setting of `accelerate config` when not given."""
    compile: bool = False
    """Whether to compile the blocks with torch.compile: slower to start, faster steps."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the split, of all weights and of every random number in training."""


@dataclass(config=pydantic_config, kw_only=True)
class OutputConfig:
    """What a training writes."""

    output_dir: Path
    """The folder for the pipeline, split.json, training_log.csv and checkpoints."""
    validation_steps: Count = 200
    """Steps between two lines of the log, each with the loss of held-out cells."""
    checkpointing_steps: Count = 1000
    """Steps between two checkpoints."""
    checkpoints_total_limit: Count | None = None
    """How many checkpoints to keep, the newest ones. All when not given."""
    resume_from_checkpoint: Name | None = None
    """A checkpoint folder to go on from, or "latest" for the newest in output_dir, or its beginning if there is none.
    Cells and flags must be those of that run; what is logged and kept, and how long it takes, may be otherwise."""
    overwrite_output_dir: bool = False
    """Whether to remove what another training has written to output_dir, which is refused otherwise."""
    report_to: Name | None = None
    """A tracker that Accelerate knows, such as tensorboard or wandb."""
    push_to_hub: bool = False
    """Whether to upload the finished pipeline to the Hugging Face Hub."""
    hub_model_id: str | None = None
    """The repository to upload to. The name of output_dir in your namespace when not given."""
    data_name: str | None = None
    """What the training data are called, for the model card."""
    data_license: str | None = None
    """The licence of the training data, for the model card."""
    data_source: str | None = None
    """The accession of the training data, or where they are, for the model card."""


@dataclass(config=pydantic_config, kw_only=True)
class TrainingConfig(
    OutputConfig, OptimizationConfig, DenoiserConfig, ExpressionCodecConfig, ProgramCodecConfig, DataConfig
):
    """
    Everything that a training can be told. All fields but `output_dir` have defaults; what each means stands below it
    in `training/config.py`, and in `wbdit train --help`.

    Raises:
        pydantic.ValidationError: (a `ValueError`) If a field is unknown, of another type or out of range, or has no
            effect with the codec that was chosen.
    """

    codec: Literal["program", "expression"] = "program"
    """What is denoised: gene programs under a likelihood of counts, or of log values where no counts can be recovered
    from them; or expression itself, as in the paper."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_switches_for_numbers(cls, values: Any) -> Any:
        """Pydantic would take `true` for 1."""
        for name, value in ((values.kwargs or {}) if isinstance(values, ArgsKwargs) else dict(values)).items():
            field = cls.__dataclass_fields__.get(name)
            if isinstance(value, bool) and field is not None and field.type is not bool:
                raise ValueError(f"--{name} {value}: Input should not be true or false.")
        return values

    def __post_init__(self):
        """Refuses fields that have no effect with others, and fills in what depends on the codec."""
        self._refuse_what_has_no_effect()
        for name, value in CODEC_DEFAULTS[self.codec].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_labels()
        self._check_network()
        if self.num_programs is None and self.min_programs > self.max_programs:
            raise ValueError(f"--min_programs {self.min_programs} is above --max_programs {self.max_programs}.")
        if self.resume_from_checkpoint == "latest" and self.overwrite_output_dir:
            raise ValueError(
                "--overwrite_output_dir removes what --resume_from_checkpoint goes on from: leave one out."
            )
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"--hub_model_id {self.hub_model_id}: {error}") from error

    def _refuse_what_has_no_effect(self):
        other = ExpressionCodecConfig if self.codec == "program" else ProgramCodecConfig
        idle = [(f"--codec {self.codec}", [field.name for field in dataclasses.fields(other)])]
        if self.codec == "expression":
            idle.append(("--codec expression", ["mixture_share"]))
        if self.num_programs is not None:
            idle.append(("--num_programs", ["min_programs", "max_programs", "min_program_gain"]))
        if self.max_train_minutes is None:
            idle.append(("no --max_train_minutes", ["codec_time_fraction"]))
        if self.split is not None:
            idle.append(("--split", ["test_fraction"]))
        if not self.use_ema:
            idle.append(("--no-use_ema", ["ema_decay"]))
        if not self.push_to_hub:
            idle.append(("no --push_to_hub", ["hub_model_id"]))
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for reason, names in idle:
            for name in names:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"--{name} has no effect with {reason}: leave it out.")

    def _check_labels(self):
        for number, key in enumerate(self.label_keys):
            if key in self.label_keys[:number]:
                raise ValueError(f"--label_keys names {key!r} twice.")
            if key in RESERVED_LABELS or "/" in key:
                raise ValueError(
                    f"--label_keys {key}: generated cells could not have a column of that name in obs; rename it in"
                    " your data."
                )

    def _check_network(self):
        """Before anything is built from these sizes."""
        assert self.num_layers is not None and self.num_attention_heads is not None
        assert self.attention_head_dim is not None
        width = self.num_attention_heads * self.attention_head_dim
        shape = f"--num_attention_heads {self.num_attention_heads} --attention_head_dim {self.attention_head_dim}"
        if width % 4:
            raise ValueError(f"{shape}: their product {width} must be a multiple of 4.")
        if 8 * width**2 * self.num_layers > MAX_PARAMETERS:
            raise ValueError(
                f"--num_layers {self.num_layers} {shape}: a network of more than {MAX_PARAMETERS / 1e9:g} billion"
                " parameters; make it smaller."
            )


# ==================== YAML files and flags ====================

# Fields that name places on one machine
PLACES = {"dataset", "split", "output_dir", "resume_from_checkpoint", "overwrite_output_dir"}


def config_without_places(config: TrainingConfig) -> dict[str, Any]:
    """All fields that name no path."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACES}


def command_of(config: TrainingConfig) -> str:
    """The command that repeats a training elsewhere: with the flags that differ from the defaults, and no paths."""
    dataset = "cells.h5ad" if config.dataset is None else Path(config.dataset).name
    words = ["wbdit", "train", "--dataset", dataset, "--output_dir", config.output_dir.resolve().name]
    if config.split is not None:
        words += ["--split", config.split.name]
    defaults = config_without_places(TrainingConfig(output_dir=config.output_dir, codec=config.codec))
    defaults["codec"] = "program"
    for name, value in config_without_places(config).items():
        if value == defaults[name] or name in ("push_to_hub", "hub_model_id", "report_to"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def read_config(path: str | Path) -> dict[str, Any]:
    """
    Reads a YAML file of fields, or a config in this package: `"paper"`, or the name of a public dataset.

    Raises:
        FileNotFoundError: If there is no such file and no such name.
        ValueError: If the file does not hold fields and values.
    """
    from ..data.public import RECIPES

    shipped = {Path(str(file)).stem: file for file in SHIPPED_CONFIGS.iterdir()}
    file = Path(path) if Path(path).is_file() else shipped.get(str(path))
    if file is None and str(path) in RECIPES:
        return {"dataset": f"{path}.h5ad", **RECIPES[str(path)].config}
    if file is None:
        names = ", ".join([*sorted(shipped), *RECIPES])
        raise FileNotFoundError(f"--config {path}: no such file. Configs in this package: {names}.")
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} does not hold fields and values. Write lines such as 'seed: 1'.")
    fields = [field.name for field in dataclasses.fields(TrainingConfig)]
    for name in values:
        if name not in fields:
            raise ValueError(f"--config {path}: {name} is unknown{did_you_mean(str(name), fields)}")
    return values
