"""Training and held-out cells: drawn once, and written next to the model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from diffusers.utils import logging

from ..files import write_whole
from ..pretrained import locate
from .cells import CellSource, check_unique, label_column
from .prepared import is_prepared, read_metadata
from .read import read_cells


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CellSplit:
    """Training and held-out cells by name (`obs_names`), or the fingerprint of a prepared folder that has them."""

    FILE_NAME = "split.json"

    train: list[str]
    test: list[str]
    seed: int | None = None  # of the draw
    prepared: str | None = None  # then no cell is named

    @classmethod
    def draw(
        cls,
        cells: ad.AnnData | CellSource,
        test_fraction: float = 0.2,
        label_key: str | None = None,
        seed: int = 0,
        copies: np.ndarray | None = None,
    ) -> "CellSplit":
        """Splits cells by label. The only cell of a label, and copies of training cells, are not held out."""
        names = cells.obs.index
        check_unique(names)
        labels = np.zeros(len(names)) if label_key is None else label_column(cells.obs, label_key).astype(str)
        is_test = held_out(np.unique(np.asarray(labels), return_inverse=True)[1], test_fraction, seed, copies)
        return cls(names[~is_test].tolist(), names[is_test].tolist(), seed)

    @classmethod
    def load(cls, path: str | Path) -> "CellSplit":
        """Reads a split.json, or that of a model's folder or of a pipeline that comes with the package."""
        path = Path(locate(path))
        path = path / cls.FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: give the --output_dir of a training.")
        split = cls(**json.loads(path.read_text()))
        if set(split.train) & set(split.test) or not (split.prepared or (split.train and split.test)):
            raise ValueError(f"{path} is no split.json of a training: a cell is on both sides, or a side is empty.")
        return split

    def save(self, folder: str | Path):
        """Writes split.json into a folder."""
        write_whole(Path(folder, self.FILE_NAME), lambda path: path.write_text(json.dumps(asdict(self))))

    def read(self, path: str | Path) -> tuple[ad.AnnData, ad.AnnData]:
        """The training and the held-out cells of a file or a prepared folder, in memory."""
        if self.prepared is None:
            return self.apply(read_cells(path))
        if not is_prepared(path) or read_metadata(path)["fingerprint"] != self.prepared:
            raise ValueError(f"{path} is not the prepared folder that the model was trained on: give that one.")
        return read_cells(path, "train"), read_cells(path, "test")

    def apply(self, adata: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData]:
        """The training and the held-out cells, as views. Raises a `ValueError` if one is missing."""
        train, test = self.rows(adata.obs_names)
        return adata[train], adata[test]

    def rows(self, obs_names: pd.Index) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the training and of the held-out cells. Raises a `ValueError` if one is missing."""
        if self.prepared is not None:
            raise ValueError("This is the split of a prepared folder, which names no cells: `split.read(folder)`.")
        check_unique(obs_names)
        names = self.train + self.test
        rows = obs_names.get_indexer(names)
        if (rows < 0).any():
            lost = f"{names[int(np.argmin(rows))]!r}, nor {(rows < 0).sum() - 1} others of the split"
            raise ValueError(f"The data have no cell {lost}: give the file that it was made for.")
        return rows[: len(self.train)], rows[len(self.train) :]


def held_out(labels: np.ndarray, test_fraction: float, seed: int, copies: np.ndarray | None = None) -> np.ndarray:
    """Draws held-out cells, stratified by label, without copies of other cells: a mask `(cells,)`."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels)
    # Each label's cells are spread evenly over [0, 1) in random order: the last ones are held out.
    rank = np.empty(len(labels))
    number = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank[by_label] = (number + 0.5) / np.repeat(sizes, sizes)
    is_test = rank > 1 - test_fraction
    if is_test.all() or not is_test.any():
        largest = f"the largest label has {sizes.max(initial=0)}"
        raise ValueError(f"{len(labels)} cells are too few to hold out a fraction of {test_fraction}: {largest}.")
    if copies is not None and (number := len(copies) - len(np.unique(copies))):
        logger.warning(f"{number} cells are copies of others. They stay on one side of the split.")
        is_test &= ~np.isin(copies, copies[~is_test])
    return is_test
