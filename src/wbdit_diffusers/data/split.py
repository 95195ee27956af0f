"""Which cells are trained on, and which are held out: decided once, and written beside the model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata as ad
import numpy as np

from ..pretrained import locate
from .io import read_cells
from .prepared import is_prepared, read_metadata


@dataclass(frozen=True)
class CellSplit:
    """
    Training and held-out cells by name.

    Args:
        train (`list[str]`): Names of the training cells (`obs_names`).
        test (`list[str]`): Names of the held-out cells.
        seed (`int`, *optional*): Seed with which they were drawn.
        prepared (`str`, *optional*):
            Fingerprint of a prepared folder, whose own split it is. The cells are not named then: they may be many.
    """

    FILE_NAME = "split.json"

    train: list[str]
    test: list[str]
    seed: int | None = None
    prepared: str | None = None

    @classmethod
    def draw(
        cls, adata: ad.AnnData, test_fraction: float = 0.2, label_key: str | None = None, seed: int = 0
    ) -> "CellSplit":
        """
        Splits cells at random, stratified by label. A label's single cell is trained on.

        Args:
            adata (`AnnData`): Cells.
            test_fraction (`float`, defaults to 0.2): Share of the held-out cells.
            label_key (`str`, *optional*): The `obs` column to stratify by.
            seed (`int`, defaults to 0): Seed of the shuffle.

        Raises:
            ValueError: If cell names are not unique, the column is missing, or there are too few cells.
        """
        _check_names(adata)
        if not 0 < test_fraction < 1:
            raise ValueError(f"`test_fraction` is between 0 and 1, not {test_fraction}.")
        if label_key is not None and label_key not in adata.obs:
            raise ValueError(f"`adata.obs` has no column {label_key!r}; it has {list(adata.obs)}.")
        labels = np.zeros(adata.n_obs) if label_key is None else adata.obs[label_key].astype(str).to_numpy()
        is_test = held_out(np.unique(labels, return_inverse=True)[1], test_fraction, seed)
        return cls(adata.obs_names[~is_test].tolist(), adata.obs_names[is_test].tolist(), seed)

    @classmethod
    def load(cls, path: str | Path) -> "CellSplit":
        """
        Reads a split.json, or that of a model's folder or of a pipeline that comes with the package.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file does not name training and held-out cells, each once.
        """
        path = Path(locate(path))
        path = path / cls.FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: it says which cells were held out. Give the --output_dir of a training."
            )
        try:
            split = json.loads(path.read_text())
        except ValueError:  # cut off, or no JSON at all
            split = None
        split = split if isinstance(split, dict) else {}
        if isinstance(split.get("prepared"), str):
            return cls([], [], split.get("seed"), split["prepared"])
        if not all(split.get(side) and _is_list_of_names(split[side]) for side in ("train", "test")):
            raise ValueError(f"{path} is no split.json of a training: it does not name train and test cells.")
        names = split["train"] + split["test"]
        if len(set(names)) < len(names):
            raise ValueError(f"{path} names a cell twice, so that it would be trained on and held out.")
        return cls(split["train"], split["test"], split.get("seed"))

    def save(self, folder: str | Path):
        """Writes split.json into a folder."""
        Path(folder, self.FILE_NAME).write_text(json.dumps(asdict(self)))

    def read(self, path: str | Path) -> tuple[ad.AnnData, ad.AnnData]:
        """
        The training and the held-out cells of a file, or of a prepared folder, in memory.

        Raises:
            OSError: If there is no such file.
            ValueError: If it can't be read, or is not what the split was made for.
        """
        if self.prepared is None:
            return self.apply(read_cells(path))
        if not is_prepared(path) or read_metadata(path)["fingerprint"] != self.prepared:
            raise ValueError(f"{path} is not the prepared folder that the model was trained on: give that one.")
        return read_cells(path, "train"), read_cells(path, "test")

    def apply(self, adata: ad.AnnData) -> tuple[ad.AnnData, ad.AnnData]:
        """
        The training and the held-out cells, as views.

        Raises:
            ValueError: If a cell of the split is not in `adata`, names there are not unique, or it is the split of a
                prepared folder.
        """
        if self.prepared is not None:
            raise ValueError("This is the split of a prepared folder, which names no cells: `split.read(folder)`.")
        _check_names(adata)
        missing = np.setdiff1d(self.train + self.test, adata.obs_names)
        if len(missing):
            raise ValueError(
                f"The data have no cell {str(missing[0])!r}, nor {len(missing) - 1} others of the split: give the file"
                " that it was made for."
            )
        return adata[self.train], adata[self.test]


def _is_list_of_names(names) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def held_out(labels: np.ndarray, test_fraction: float, seed: int) -> np.ndarray:
    """
    Which cells are held out, stratified by label: a mask. `labels` are numbers, one for each cell. Raises a
    `ValueError` if there are too few cells.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels)
    # Each label's cells are spread evenly over [0, 1) in random order: the last ones are held out.
    rank = np.empty(len(labels))
    number = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank[by_label] = (number + 0.5) / np.repeat(sizes, sizes)
    is_test = rank > 1 - test_fraction
    if is_test.all() or not is_test.any():
        raise ValueError(f"{len(labels)} cells are too few to hold out a share of {test_fraction}.")
    return is_test


def _check_names(adata: ad.AnnData):
    if not adata.obs_names.is_unique:
        name = adata.obs_names[adata.obs_names.duplicated()][0]
        raise ValueError(
            f"The cell name {name!r} occurs more than once, so that {CellSplit.FILE_NAME} could not say which cell is"
            " held out: call `adata.obs_names_make_unique()`."
        )
