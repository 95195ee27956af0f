import numpy as np
import pandas as pd
import pytest
import torch

from wbdit_diffusers import ScRNAProcessor


LABEL_KEYS = ["cell_type", "phase"]


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(label_keys=LABEL_KEYS, num_genes=50).fit(pbmc)


def uniform(num_cells: int) -> torch.Tensor:
    return torch.rand(num_cells, generator=torch.Generator().manual_seed(0))


def test_fit_sees_labels(processor, pbmc):
    assert processor.condition_sizes == (10, 3)
    assert processor.config.categories[0] == list(pbmc.obs["cell_type"].cat.categories)  # in their order
    frequencies = pbmc.obs.groupby(LABEL_KEYS, observed=True).size()
    assert len(processor.label_combinations) == len(frequencies)
    assert processor.label_frequencies.sum() == pytest.approx(1)


def test_labels_are_encoded_by_name(processor, pbmc):
    codes = processor.encode_labels(pbmc)
    assert codes.shape == (700, 2) and codes.dtype == torch.long
    for column, key in enumerate(LABEL_KEYS):
        assert list(np.array(processor.config.categories[column])[codes[:, column]]) == list(pbmc.obs[key])
    few = pbmc[[3, 1]].copy()  # whose own categories are fewer
    assert torch.equal(processor.encode_labels(few), codes[[3, 1]])
    unconditional = ScRNAProcessor(num_genes=50).fit(pbmc)
    assert unconditional.condition_sizes == () and unconditional.encode_labels(pbmc).shape == (700, 0)


def test_labels_may_be_numbers(pbmc):
    adata = pbmc.copy()
    adata.obs["batch"] = np.arange(700) % 12
    processor = ScRNAProcessor(label_keys=["batch"], num_genes=50).fit(adata)
    assert processor.config.categories[0][:3] == ["0", "1", "2"]
    asked = processor.encode_conditions({"batch": ["10", "2"]}, 2)
    assert torch.equal(asked, processor.encode_labels(adata[[10, 2]]))


def test_cells_with_labels_that_training_lacked_are_known(pbmc):
    train = pbmc[(pbmc.obs["cell_type"] != "CD34+") & (pbmc.obs["phase"] != "S")].copy()
    processor = ScRNAProcessor(label_keys=LABEL_KEYS, num_genes=50).fit(train)
    known = processor.knows_labels(pbmc)
    np.testing.assert_array_equal(known, (pbmc.obs["cell_type"] != "CD34+") & (pbmc.obs["phase"] != "S"))
    assert processor.encode_labels(pbmc[known]).shape == (len(train), 2)
    with pytest.raises(ValueError, match=r"is not a (cell_type|phase) of this model"):
        processor.encode_labels(pbmc)
    assert ScRNAProcessor(num_genes=50).fit(train).knows_labels(pbmc).all()


# ==================== Labels to generate ====================


def test_conditions_are_encoded_for_all_cells_or_each(processor):
    one = processor.encode_conditions({"phase": "S"}, 3)
    assert one.tolist() == [[-1, processor.config.categories[1].index("S")]] * 3
    names = ["CD34+", "Dendritic", "CD34+"]
    codes = processor.encode_conditions({"cell_type": names}, 3)
    assert [processor.config.categories[0][code] for code in codes[:, 0]] == names
    assert (codes[:, 1] == -1).all() and (processor.encode_conditions({}, 2) == -1).all()


def test_free_labels_are_drawn_from_the_training_frequencies(processor, pbmc):
    labels = processor.complete_labels(processor.encode_conditions({}, 20_000), uniform(20_000))
    names = np.array(processor.config.categories[0])[labels[:, 0]]
    drawn = pd.Series(names).value_counts(normalize=True)
    real = pbmc.obs["cell_type"].value_counts(normalize=True)
    assert (drawn - real).abs().max() < 0.01


def test_free_labels_agree_with_given_ones(processor, pbmc):
    given = processor.encode_conditions({"cell_type": "CD19+ B"}, 20_000)
    labels = processor.complete_labels(given, uniform(20_000))
    assert (labels[:, 0] == given[:, 0]).all()
    drawn = pd.Series(np.array(processor.config.categories[1])[labels[:, 1]]).value_counts(normalize=True)
    real = pbmc.obs["phase"][pbmc.obs["cell_type"] == "CD19+ B"].value_counts(normalize=True)
    assert (drawn - real).abs().max() < 0.02


def test_a_cell_s_labels_depend_on_its_own_random_number_alone(processor):
    """Cells asked for in different ways, drawn together."""
    given = torch.cat([processor.encode_conditions(asked, 50) for asked in ({}, {"phase": "S"}, {"phase": "G1"})])
    together = processor.complete_labels(given, uniform(150))
    alone = [processor.complete_labels(given[i : i + 1], uniform(150)[i : i + 1]) for i in range(0, 150, 10)]
    assert torch.equal(torch.cat(alone), together[::10])


def test_unseen_combinations_of_seen_labels_are_allowed(pbmc):
    adata = pbmc[~((pbmc.obs["cell_type"] == "CD34+") & (pbmc.obs["phase"] == "G1"))].copy()
    processor = ScRNAProcessor(label_keys=LABEL_KEYS).fit(adata)
    given = processor.encode_conditions({"cell_type": "CD34+", "phase": "G1"}, 3)
    numbers = torch.tensor([0.0, 0.5, 0.999])
    assert (processor.complete_labels(given, numbers) == given).all()
    assert torch.isfinite(processor.sample_library_size(given, numbers)).all()


# ==================== Bad input ====================


def test_bad_labels_are_named(pbmc, processor):
    with pytest.raises(ValueError, match=r"no column 'celltype'; it has \['cell_type', 'phase'\]"):
        ScRNAProcessor(label_keys=["celltype"]).fit(pbmc)
    with pytest.raises(ValueError, match=r"list of obs keys: write \['cell_type'\]"):
        ScRNAProcessor(label_keys="cell_type")
    with pytest.raises(ValueError, match=r"'CD19 B' is not a cell_type.*Did you mean 'CD19\+ B'"):
        processor.encode_conditions({"cell_type": "CD19 B"}, 1)
    with pytest.raises(ValueError, match=r"'batch' is not a condition.*\['cell_type', 'phase'\]"):
        processor.encode_conditions({"batch": "1"}, 1)
    unconditional = ScRNAProcessor(num_genes=50).fit(pbmc)
    with pytest.raises(ValueError, match=r"'batch' is not a condition.*no label keys"):
        unconditional.encode_conditions({"batch": "1"}, 1)
    missing = pbmc.copy()
    missing.obs["cell_type"] = missing.obs["cell_type"].where(missing.obs["cell_type"] != "CD34+")
    for read in (ScRNAProcessor(label_keys=["cell_type"]).fit, processor.encode_labels):
        with pytest.raises(ValueError, match="missing for 13 cells"):
            read(missing)


def test_numbers_are_labels(pbmc):
    adata = pbmc.copy()
    adata.obs["cluster"] = np.arange(700) % 3
    processor = ScRNAProcessor(label_keys=["cluster", "cell_type"], num_genes=50).fit(adata)
    codes = [processor.encode_conditions({"cluster": given}, 2)[:, 0].tolist() for given in ([1, 2.0], 0)]
    assert codes == [[1, 2], [0, 0]]
    with pytest.raises(ValueError, match="'5' is not a cell_type of this model"):
        processor.encode_conditions({"cell_type": 5}, 1)
