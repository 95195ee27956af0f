"""The flags of `wbdit generate`, `evaluate` and `prepare`. They are apart from the commands, which import PyTorch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from .flags import Seed, pydantic_config
from .pretrained import locate


MODEL_HELP = "Folder that `wbdit train` wrote, Hub id, or the pipeline in this package: pbmc68k_reduced."
# A mistyped folder fails before PyTorch is imported.
Model = Annotated[str, Field(description=MODEL_HELP), AfterValidator(lambda name: name if locate(name) else name)]


@dataclass(config=pydantic_config, kw_only=True)
class GenerateConfig:
    """Flags of `wbdit generate`."""

    model: Model
    output: Path
    """The .h5ad file, .zarr folder, or folder for parquet files to write. An interrupted command continues."""
    num_cells: PositiveInt = 1000
    """Number of cells."""
    cell_types: list[str] = Field(default_factory=list)
    """Types of the cells, in turn: equally many of each. Default: the frequencies of the training cells."""
    conditions: dict[str, str] = Field(default_factory=dict)
    """Labels of other obs keys, such as condition=stim."""
    prompt: str | None = None
    """Labels in words, such as "CD14+ monocytes". The model needs a text encoder."""
    library_size: PositiveFloat | None = None
    """Expected total counts of each cell. Default: generated."""
    guidance_scale: NonNegativeFloat = 1.0
    """Strength of classifier-free guidance. 1 is none."""
    num_inference_steps: PositiveInt | None = None
    """Number of denoising steps. Default: that of the pipeline."""
    scheduler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"] | None = None
    """Solver. Default: that of the pipeline."""
    batch_size: PositiveInt | None = None
    """Number of cells denoised together. It bounds the memory."""
    seed: NonNegativeInt = 0
    """Seed of the cells."""
    device: str | None = None
    """Device to compute on, such as cuda or cpu. Default: a GPU for each process if there is one."""


@dataclass(config=pydantic_config, kw_only=True)
class EvaluateConfig:
    """Judges generated cells on held-out cells: report.json, report.md and report.png."""

    generators: list[str]
    """Model folders or files of cells to judge; NAME=PATH gives one a name. Several files with one name are several
    samples. All generators are judged on the same number of samples. A file has one cell, with its labels, for each
    held-out cell."""
    dataset: str | None = None
    """File or prepared folder that the models were trained on. Their split.json names its held-out cells."""
    train: str | None = None
    """File of the training cells, with --test, instead of --dataset."""
    test: str | None = None
    """File of the held-out cells, with --train, instead of --dataset."""
    label_keys: list[str] = Field(default_factory=list)
    """Columns of obs with the labels of cells, the cell type first. A model knows its own."""
    values: Literal["counts", "log"] = "counts"
    """Content of files: counts or log values. A model knows its own."""
    donor_key: str | None = None
    """Column of obs with the donor, for membership inference of donors."""
    output_dir: Path = Path("report")
    """Folder for report.json, report.md and report.png."""
    num_samples: Annotated[int, Field(ge=1)] = 3
    """Number of samples of a model. Next to files, a model draws the number of samples in the files."""
    baselines: bool = True
    """Whether to judge baselines from the model's codec without its denoiser, if there is one model."""
    guidance_scale: float = 1.0
    """Strength of classifier-free guidance; 1 is none."""
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    """Number of denoising steps. The model has a default."""
    seed: Seed = 0
    """Seed of the cells and of the judging."""
    device: str | None = None
    """Device, such as cuda or cpu. By default, a GPU if there is one."""


@dataclass(config=pydantic_config, kw_only=True)
class PrepareConfig:
    """Files to prepare, and how."""

    files: list[Path]
    """.h5ad or .zarr files."""
    output_dir: Path
    """New folder to write."""
    layer: str | None = None
    """Layer that holds the matrix. raw is also adata.raw, with its own genes. Default: X."""
    values: Literal["counts", "log"] = "counts"
    """Content of the matrix: integer counts, which are kept bit by bit, or log values, kept in float32."""
    round_counts: bool = False
    """Round decimal counts to integers, such as those of SoupX or alevin."""
    label_keys: list[str] = Field(default_factory=list)
    """Columns of obs to treat as labels, the cell type first. The split is stratified by the first one. Categories
    and strings are labels anyway."""
    genes: Literal["intersection", "union"] = "intersection"
    """Genes of several files: those in all files, or those in any file."""
    file_key: str | None = None
    """Name of a new column of obs that holds the file of each cell."""
    min_counts: PositiveInt = 1
    """Minimum number of counts of a cell. Others are left out."""
    min_genes: PositiveInt = 1
    """Minimum number of expressed genes of a cell. Others are left out."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of cells that is held out, within each label. 0 for none."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split and of the order."""
