"""Mistakes with cells and splits: one line that names the thing and the fix, and nothing written."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from tiny import tiny_config

from wbdit_diffusers.training import train


def refusal(source: ad.AnnData | str, tmp_path: Path, **changes) -> str:
    """The message with which a training ends before anything is written."""
    config = tiny_config(tmp_path / "out", codec="expression", max_train_steps=1, **changes)
    with pytest.raises((ValueError, OSError)) as error:
        train(source, config)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    return str(error.value)


# ==================== Cells ====================


def spoiled(cells: ad.AnnData, what: str) -> ad.AnnData:
    cells = cells[:200].copy()
    dense = cells.X.toarray()
    if what in ("nan", "-1", "0.5"):
        dense[7, 3] = float(what)
    elif what == "log values":
        dense = np.log1p(dense)
    elif what == "empty":
        dense[:] = 0
    elif what.endswith(" cells"):
        return cells[: int(what.removesuffix(" cells"))].copy()
    elif what == "no genes":
        return cells[:, :0].copy()
    elif what == "cells twice":
        cells.obs_names = ["cell", "cell", *cells.obs_names[2:]]
    elif what == "genes twice":
        cells.var_names = ["gene", "gene", *cells.var_names[2:]]
    elif what == "a label each":
        cells.obs["cell_type"] = [f"type {number}" for number in range(cells.n_obs)]
    elif what == "labels missing":
        cells.obs["cell_type"] = [None, *cells.obs["cell_type"].astype(str)[1:]]
    elif what == "only layers":
        return ad.AnnData(obs=cells.obs, var=cells.var, layers={"raw": cells.X})
    cells.X = sparse.csr_matrix(dense)
    return cells


CELLS = [
    ("nan", "holds nan (cell "),
    ("-1", "expression is never negative"),
    ("0.5", "which is not an integer count"),
    ("log values", "which is not an integer count: name the layer of counts, round them"),
    ("empty", "no counts at all"),
    ("9 cells", "training cells are too few to learn from: 10 are the minimum"),
    ("no genes", "× 0 genes"),
    ("cells twice", "The cell name 'cell' occurs more than once"),
    ("genes twice", "The gene name 'gene' occurs more than once"),
    ("a label each", "too few to hold out a fraction of 0.2: the largest label has 1"),
    ("labels missing", "is missing for 1 cells: name or remove them"),
    ("only layers", "has no matrix in X; its layers are ['raw']"),
]


@pytest.mark.parametrize("what, message", CELLS, ids=[what for what, _ in CELLS])
def test_cells_are_refused(what, message, pbmc, tmp_path):
    spoiled(pbmc, what).write_h5ad(tmp_path / "cells.h5ad")
    assert message in refusal(str(tmp_path / "cells.h5ad"), tmp_path, label_keys=["cell_type"])


CONFIGS = [
    ({"label_keys": ["celltype"]}, "`adata.obs` has no column 'celltype'; it has ['cell_type', 'phase']"),
    ({"layer": "raw"}, "has no layer 'raw'"),
    ({"values": "log"}, "not a logarithm of expression: use values='counts'"),
    ({"test_fraction": 0.0001}, "too few to hold out a fraction of 0.0001"),
]


@pytest.mark.parametrize("changes, message", CONFIGS)
def test_flags_that_do_not_fit_the_cells(changes, message, pbmc, tmp_path):
    assert message in refusal(pbmc, tmp_path, **changes)


def test_cells_are_given(tmp_path):
    assert "--dataset is required" in refusal(None, tmp_path)


# ==================== Splits ====================

SPLITS = [
    ({"train": ["a"], "test": ["b"]}, "The data have no cell 'a', nor 1 others"),
    ({"train": ["a"], "test": ["a"]}, "a cell is on both sides"),
    ({"train": [], "test": [], "prepared": "0" * 64}, "the split of a prepared folder"),
]


@pytest.mark.parametrize("split, message", SPLITS)
def test_a_split_is_refused(split, message, pbmc, tmp_path):
    (tmp_path / "split.json").write_text(split if isinstance(split, str) else json.dumps(split))
    assert message in refusal(pbmc, tmp_path, split=tmp_path / "split.json")


def test_a_split_that_holds_out_whole_labels_only(pbmc, tmp_path):
    rare = (pbmc.obs["cell_type"] == "Dendritic").to_numpy()
    parts = {"train": pbmc.obs_names[~rare].tolist(), "test": pbmc.obs_names[rare].tolist()}
    (tmp_path / "split.json").write_text(json.dumps(parts))
    line = refusal(pbmc, tmp_path, label_keys=["cell_type"], split=tmp_path / "split.json")
    assert "No held-out cell has labels that a training cell has" in line
