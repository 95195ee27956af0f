"""The configuration of a training, and its only defaults: the same from Python, YAML files and flags."""

import dataclasses
import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from ..files import one_line
from ..flags import Seed, did_you_mean, pydantic_config


SHIPPED_CONFIGS = resources.files(__package__) / "configs"

# Defaults that depend on the codec. With an expression codec they are those of the published network.
CODEC_DEFAULTS: dict[str, dict[str, Any]] = {
    "num_genes": {"program": 0, "expression": 2000},
    "block_type": {"program": "descent", "expression": "white_box"},
    "patch_size": {"program": 2, "expression": 10},
    "num_layers": {"program": 4, "expression": 3},
    "num_attention_heads": {"program": 4, "expression": 8},
    "attention_head_dim": {"program": 16, "expression": 96},
    "learning_rate": {"program": 3e-3, "expression": 2e-3},
    "train_batch_size": {"program": 256, "expression": 64},
}

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
# A Path would remove one of the slashes of hf://datasets/me/cells.
Address = Annotated[str | Path, AfterValidator(lambda value: value if "://" in str(value) else Path(value))]
Labels = Annotated[list[Name], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


@dataclass(config=pydantic_config, kw_only=True)
class DataConfig:
    """The cells."""

    dataset: Address | None = None
    """Training data: an .h5ad or .zarr file, or a prepared folder, here or on the Hub (hf://datasets/me/cells)."""
    layer: Name | None = None
    """Layer that holds the matrix. raw is also adata.raw, with its own genes. Default: X."""
    values: Literal["counts", "log"] = "counts"
    """Content of the matrix: integer counts, or values on a log scale."""
    round_counts: bool = False
    """Round decimal counts to integers, such as those of SoupX or alevin."""
    label_keys: Labels = Field(default_factory=list)
    """Columns of obs that condition the cells, the cell type first."""
    num_genes: Annotated[int, Field(ge=0)] | None = None
    """Number of most variable genes to model. Default: all genes (0) for gene programs, 2,000 for expression."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the cells that is held out from training, within each label of the first label key."""
    split: Path | None = None
    """The split.json of another run, with the cells to hold out."""


@dataclass(config=pydantic_config, kw_only=True)
class ProgramCodecConfig:
    """Stage one with gene programs: a linear decoder under a likelihood of counts, or of log values."""

    num_programs: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Number of gene programs. Default: doubled from 16 while the validation loss improves enough."""
    max_programs: Annotated[int, Field(gt=0, le=1024)] = 64
    """Maximum number of gene programs, if num_programs is not given."""
    codec_hidden_size: Annotated[int, Field(gt=0, le=16_384)] = 256
    """Width of the encoder's hidden layer."""
    codec_learning_rate: LearningRate = 1e-3
    """Learning rate of encoder and decoder."""
    program_prior_precision: NonNegativeFloat = 30.0
    """Precision of the Gaussian prior on the decoder's weights. It shrinks genes with few counts to zero."""
    label_prior_precision: NonNegativeFloat = 4.0
    """Precision of the Gaussian prior on the label effects of a gene."""
    codec_batch_size: PositiveInt = 128
    """Number of cells in a step of stage one."""
    codec_max_steps: PositiveInt = 20_000
    """Maximum number of steps of a fit in stage one. The loss of validation cells mostly ends it much earlier."""
    kl_weight: NonNegativeFloat = 0.3
    """Weight of the divergence of a cell's posterior. It keeps the encoder from fitting the noise of single counts."""
    decoder_steps: Annotated[int, Field(ge=0)] = 600
    """Number of steps of the decoder's second fit, to the final programs of all training cells."""
    decoder_learning_rate: LearningRate = 3e-3
    """Initial learning rate of the decoder's second fit. It falls to zero along a cosine."""


@dataclass(config=pydantic_config, kw_only=True)
class ExpressionCodecConfig:
    """Latents that are the expression itself, as in the paper."""

    standardize: bool = True
    """Whether the expression of each gene is scaled to mean 0 and variance 1."""
    model_library_size: bool = True
    """Whether the log library size is one of the latents. If not, it is drawn from training cells."""


@dataclass(config=pydantic_config, kw_only=True)
class StartConfig:
    """A pipeline to start from, for a dataset with few cells."""

    init_from: Address | None = None
    """Folder or Hub id of a pipeline to start from. Genes and labels are matched by name."""
    init_labels: dict[str, str] = Field(default_factory=dict)
    """Labels that init_from knows by another name, as NEW=OLD."""
    freeze_codec: bool = False
    """Whether the gene programs of init_from stay as they are, so that latents of both pipelines mean the same."""


@dataclass(config=pydantic_config, kw_only=True)
class CodecConfig(ExpressionCodecConfig, ProgramCodecConfig, StartConfig, DataConfig):
    """Cells, and the latents in which they are denoised."""

    codec: Literal["program", "expression"] = "program"
    """Space in which cells are denoised. "program": gene programs under a likelihood of counts, or of log values if no
    counts can be recovered from them. "expression": expression itself, as in the paper."""
    seed: Seed = 0
    """Seed of the split, the weights and all random numbers of the training."""


@dataclass(config=pydantic_config, kw_only=True)
class DenoiserConfig:
    """The network that denoises latents."""

    block_type: Literal["descent", "white_box", "dit"] | None = None
    """Block of the network: "descent", whose steps descend on their objective; "white_box", the published block (MSSA
    and ISTA); or "dit", the plain DiT block as a baseline."""
    patch_size: PositiveInt | None = None
    """Number of values of a cell in a token. Default: 2 for gene programs, 10 for expression."""
    num_layers: Annotated[int, Field(gt=0, le=256)] | None = None
    """Number of blocks."""
    num_attention_heads: Annotated[int, Field(gt=0, le=256)] | None = None
    """Number of attention heads. In a White-Box block, the number of subspaces."""
    attention_head_dim: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Dimension of a head. The width of the network is the number of heads times this."""
    mixture_share: Fraction = 0.3
    """Share of the Gaussian mixture in the training target at the end. The network first learns its closed-form
    prediction, then more and more from the cells. 0 for the cells alone. Only for gene programs."""
    condition_dropout: Share = 0.1
    """Fraction of the cells that are trained without labels, as guidance requires."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    """Output of the network: the noise, the velocity or the clean cell."""
    scheduler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"] = "unipc"
    """Solver of the finished pipeline."""
    num_inference_steps: Annotated[int, Field(gt=0, le=1000)] = 12
    """Default number of denoising steps of the finished pipeline."""
    text_encoder: Name | None = None
    """Folder or Hub id of a transformers encoder, for requests in words. It is saved, not trained."""
    label_texts: dict[str, str] = Field(default_factory=dict)
    """Texts of labels for requests in words, such as NK="NK cells|natural killer cells". A bar separates synonyms."""


@dataclass(config=pydantic_config, kw_only=True)
class OptimizationConfig:
    """How the denoiser is trained."""

    max_train_steps: PositiveInt = 3000
    """Maximum number of optimizer steps."""
    max_train_epochs: PositiveInt = 1000
    """Maximum number of passes over the training cells. With more, the network memorizes small datasets."""
    max_train_minutes: PositiveFloat | None = None
    """Maximum number of minutes, stage one included."""
    train_batch_size: PositiveInt | None = None
    """Number of cells in a batch of each process."""
    gradient_accumulation_steps: PositiveInt = 1
    """Number of batches in an optimizer step."""
    learning_rate: LearningRate | None = None
    """Highest learning rate of AdamW. Default: 0.003 for gene programs, 0.002 for expression."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Number of steps in which the learning rate rises from zero."""
    lr_decay_fraction: Fraction = 0.3
    """Last fraction of the training in which the learning rate falls to zero."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum norm of the gradients, which are scaled down to it."""
    use_ema: bool = True
    """Whether the pipeline gets a moving average of the weights instead of the last weights."""
    ema_decay: Share = 0.999
    """Decay of the moving average. It warms up to this value."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward pass. Default: the setting of `accelerate config`."""
    compile: bool = False
    """Whether to compile the blocks with torch.compile. The start is slower, the steps are faster."""


@dataclass(config=pydantic_config, kw_only=True)
class OutputConfig:
    """The files that a training writes."""

    output_dir: Path
    """Folder for the pipeline, split.json, training_log.csv and checkpoints."""
    validation_steps: PositiveInt = 200
    """Number of steps between two lines of the log, each with the loss of held-out cells."""
    checkpointing_steps: PositiveInt = 1000
    """Number of steps between two checkpoints."""
    checkpoints_total_limit: PositiveInt | None = None
    """Number of most recent checkpoints to keep. Default: all."""
    resume_from_checkpoint: Name | None = None
    """Checkpoint folder in output_dir to continue from, or "latest". Without a checkpoint the run starts at the
    beginning. Only flags of outputs and duration may change."""
    overwrite_output_dir: bool = False
    """Whether to remove what another training wrote to output_dir."""
    report_to: Name | None = None
    """Tracker that Accelerate supports, such as tensorboard or wandb."""
    push_to_hub: bool = False
    """Whether to upload the finished pipeline to the Hugging Face Hub."""
    repo_id: str | None = None
    """Repository to upload to. Default: the name of output_dir in your namespace."""
    data_name: str | None = None
    """Name of the training data on the model card."""
    data_license: str | None = None
    """Licence of the training data on the model card."""
    data_source: str | None = None
    """Accession or address of the training data on the model card."""


@dataclass(config=pydantic_config, kw_only=True)
class TrainingConfig(OutputConfig, OptimizationConfig, DenoiserConfig, CodecConfig):
    """All settings of a training. Only `output_dir` has no default. A wrong field raises a `ValueError`."""

    def __post_init__(self):
        """Sets the defaults that depend on the codec, and checks fields against each other."""
        for name, defaults in CODEC_DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults[self.codec])
        if self.num_attention_heads * self.attention_head_dim % 4:
            raise ValueError("--num_attention_heads times --attention_head_dim must be a multiple of 4.")


PLACES = {
    "dataset",
    "split",
    "init_from",
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
}  # on one machine


def config_without_places(config: TrainingConfig) -> dict[str, Any]:
    """All fields that name no path."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACES}


def command_of(config: TrainingConfig) -> str:
    """The command that repeats a training elsewhere: with the flags that differ from the defaults, and no paths."""
    dataset = "cells.h5ad" if config.dataset is None else Path(config.dataset).name
    words = ["wbdit", "train", "--dataset", dataset, "--output_dir", config.output_dir.resolve().name]
    if config.split is not None:
        words += ["--split", config.split.name]
    if config.init_from is not None:
        words += ["--init_from", Path(config.init_from).name]
    defaults = vars(TrainingConfig(output_dir=config.output_dir, codec=config.codec)) | {"codec": "program"}
    for name, value in config_without_places(config).items():
        if value == defaults[name] or name in ("push_to_hub", "repo_id", "report_to"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            pairs = [f"{key}={one}" for key, one in value.items()] if isinstance(value, dict) else [value]
            words += [f"--{name}", *map(str, value if isinstance(value, list) else pairs)]
    return shlex.join(words)


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of fields, or a config in this package: `"paper"`."""
    shipped = {Path(str(file)).stem: file for file in SHIPPED_CONFIGS.iterdir()}
    file = shipped.get(str(path), Path(path))
    if not file.is_file():
        names = ", ".join(sorted(shipped))
        raise FileNotFoundError(f"--config {path}: no such file. Configs in this package: {names}.")
    try:
        values = dict(yaml.safe_load(file.read_text()) or {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"--config {path} does not hold lines such as 'seed: 1': {one_line(error)}") from error
    fields = [field.name for field in dataclasses.fields(TrainingConfig)]
    if unknown := [str(name) for name in values if name not in fields]:
        raise ValueError(f"--config {path}: {unknown[0]} is unknown{did_you_mean(unknown[0], fields)}")
    return values
