import json

import anndata as ad
import numpy as np
import pytest

from wbdit_diffusers.data import CellSplit


def test_split_is_stratified_and_reproducible(pbmc):
    split = CellSplit.draw(pbmc, 0.2, label_key="cell_type", seed=0)
    assert sorted([*split.train, *split.test]) == sorted(pbmc.obs_names)
    real = pbmc.obs["cell_type"].value_counts()
    held_out = pbmc.obs["cell_type"][split.test].value_counts()
    assert ((held_out - 0.2 * real).abs() <= 1).all()
    assert CellSplit.draw(pbmc, 0.2, label_key="cell_type", seed=0) == split
    other = CellSplit.draw(pbmc, 0.2, label_key="cell_type", seed=1)
    assert set(other.test) != set(split.test) and (split.seed, other.seed) == (0, 1)
    assert len(CellSplit.draw(pbmc, 0.5).test) == 350
    rare = pbmc[:50].copy()
    rare.obs["label"] = ["rare"] + ["common"] * 49  # the only cell of a label is trained on
    assert rare.obs_names[0] in CellSplit.draw(rare, 0.2, label_key="label").train


def test_save_and_load(pbmc, tmp_path):
    split = CellSplit.draw(pbmc, 0.2, label_key="cell_type", seed=3)
    split.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]
    assert CellSplit.load(tmp_path) == CellSplit.load(tmp_path / "split.json") == split
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a", "b"], "test": ["c"]}))  # of the data's authors
    assert CellSplit.load(tmp_path) == CellSplit(["a", "b"], ["c"], seed=None)


def test_apply_finds_cells_by_name(pbmc):
    split = CellSplit.draw(pbmc, 0.2, label_key="cell_type")
    shuffled = pbmc[np.random.default_rng(0).permutation(700)].copy()
    train, test = split.apply(shuffled)
    assert list(train.obs_names) == split.train and list(test.obs_names) == split.test
    for cells in (train, test):
        assert (cells.X != pbmc[cells.obs_names].X).nnz == 0
        assert list(cells.obs["cell_type"]) == list(pbmc.obs["cell_type"][cells.obs_names])
    more = ad.concat([pbmc, pbmc[:3].copy()], index_unique="-")  # cells of neither side are left out
    more.obs_names = [*pbmc.obs_names, "new-1", "new-2", "new-3"]
    assert [side.n_obs for side in split.apply(more)] == [len(split.train), len(split.test)]


def with_names_twice(pbmc):
    twice = pbmc.copy()
    twice.obs_names = ["A", *twice.obs_names[1:-1], "A"]
    return twice


DRAWS = [
    (lambda pbmc: pbmc, {"label_key": "louvain"}, r"no column 'louvain'; it has \['cell_type', 'phase'\]"),
    (lambda pbmc: pbmc[:1], {}, "1 cells are too few to hold out a fraction of 0.2: the largest label has 1"),
    (lambda pbmc: pbmc, {"test_fraction": 0.0}, "too few to hold out a fraction of 0.0"),
    (with_names_twice, {}, "'A' occurs more than once.*obs_names_make_unique"),
]


@pytest.mark.parametrize("change, kwargs, message", DRAWS)
def test_a_split_that_cannot_be_drawn(change, kwargs, message, pbmc):
    with pytest.raises(ValueError, match=message):
        CellSplit.draw(change(pbmc), **kwargs)


def test_cells_of_another_file_are_named(pbmc):
    split = CellSplit.draw(pbmc)
    gone = split.train[:2]
    with pytest.raises(ValueError, match=f"no cell '{gone[0]}', nor 1 others of the split"):
        split.apply(pbmc[~pbmc.obs_names.isin(gone)])
    with pytest.raises(ValueError, match="'A' occurs more than once"):
        split.apply(with_names_twice(pbmc))
    with pytest.raises(ValueError, match="names no cells"):
        CellSplit([], [], 0, "0" * 64).apply(pbmc)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="split.json is missing.*--output_dir"):
        CellSplit.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder or file .*split.json"):
        CellSplit.load(tmp_path / "split.json")


@pytest.mark.parametrize("text", ['{"train": ["a"], "test": []}', '{"train": ["a", "b"], "test": ["b"]}'])
def test_a_file_that_is_no_split_is_named(text, tmp_path):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match="split.json is no split.json of a training"):
        CellSplit.load(tmp_path)
