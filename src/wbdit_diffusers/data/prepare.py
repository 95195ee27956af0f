# ==================== TEMPORARY: theirs win at the merge ====================
import dataclasses
from typing import Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from ..flags import Seed, pydantic_config
from . import preparation


@dataclass(config=pydantic_config, kw_only=True)
class PrepareConfig:
    layer: str | None = None
    """Layer that holds the matrix. Default: X."""
    values: Literal["counts", "log"] = "counts"
    """Kind of values."""
    label_keys: list[str] = Field(default_factory=list)
    """Columns of obs that hold labels."""
    genes: Literal["intersection", "union"] = "intersection"
    """Which genes of several files to keep."""
    file_key: str | None = None
    """Column of obs to add, with the name of each cell's file."""
    min_counts: PositiveInt | None = None
    """Minimum number of counts of a cell."""
    min_genes: PositiveInt = 1
    """Minimum number of genes of a cell."""
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Fraction of held-out cells."""
    seed: Seed = 0
    """Seed of split and order."""


def prepare(files, output, config):
    return preparation.prepare(files, output, preparation.PrepareConfig(**dataclasses.asdict(config)))
