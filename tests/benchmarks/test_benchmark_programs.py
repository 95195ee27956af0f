"""The parts of benchmarks/programs.py that need no fitted codec. The command itself takes minutes."""

import numpy as np
import programs as benchmark
import pytest

from wbdit_diffusers.data import CellDataset


def test_programs_are_paired_regardless_of_order_and_sign():
    loadings = np.random.default_rng(0).normal(size=(500, 4))
    assert benchmark.paired_correlation(loadings, -loadings[:, [2, 0, 3, 1]]) == pytest.approx(1)
    others = np.random.default_rng(1).normal(size=(500, 4))
    assert benchmark.paired_correlation(loadings, others) < 0.2
    others[:, 0] = 0  # a constant program correlates with none
    assert 0 <= benchmark.paired_correlation(loadings, others) < 0.2


def test_a_program_separates_cells_regardless_of_its_sign():
    is_one = np.arange(10) < 5
    activities = np.stack([is_one * 1.0, is_one * -1.0, np.tile([0.0, 1.0], 5)], axis=1)
    np.testing.assert_allclose(benchmark.aucs_of(activities, is_one), [1, 1, 0.6], atol=0.01)


def test_markers_are_those_of_their_type(pbmc, program_pipe):
    genes = program_pipe.processor.var_names.to_numpy()
    markers = benchmark.markers_of(pbmc, genes, "cell_type")
    assert all(len(names) == min(benchmark.NUM_MARKERS, len(genes)) for names in markers.values())
    assert set(markers) <= set(pbmc.obs["cell_type"].astype(str))
    assert all(set(names) <= set(genes) for names in markers.values())
    is_type = (pbmc.obs["cell_type"].astype(str) == "CD14+ Monocyte").to_numpy()
    first = pbmc[:, markers["CD14+ Monocyte"][0]].X.toarray().ravel()
    assert first[is_type].mean() > 2 * first[~is_type].mean()


def test_nmf_gives_loadings_and_activities_of_other_cells(pbmc, program_pipe):
    dataset = CellDataset(pbmc[:80], program_pipe.processor, with_labels=False)
    loadings, encode = benchmark.nmf(dataset, num_programs=3, seed=0)
    assert loadings.shape == (dataset.matrix.shape[1], 3)
    assert encode(CellDataset(pbmc[80:100], program_pipe.processor, with_labels=False)).shape == (20, 3)
