import numpy as np
import pytest
import torch

from wbdit_diffusers import ScRNAProcessor


def totals(adata) -> np.ndarray:
    return np.asarray(adata.X.sum(1)).ravel()


def test_drawn_library_sizes_are_those_of_the_training_cells(pbmc):
    processor = ScRNAProcessor(num_genes=50).fit(pbmc)
    uniform = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    drawn = processor.sample_library_size(torch.zeros(5000, 0, dtype=torch.long), uniform)
    real = totals(pbmc)  # over all genes, not the 50 modelled
    np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.5, 0.9]), np.quantile(real, [0.1, 0.5, 0.9]), rtol=0.06)
    assert real.min() * 0.99 <= drawn.min() and drawn.max() <= real.max() * 1.01
    ends = processor.sample_library_size(torch.zeros(2, 0, dtype=torch.long), torch.tensor([0.0, 1 - 2**-24]))
    np.testing.assert_allclose(ends, [real.min(), real.max()], rtol=1e-4)


@pytest.fixture(scope="module")
def labelled(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(label_keys=["cell_type"], num_genes=50).fit(pbmc)


def test_drawn_library_sizes_are_those_of_the_cell_type(labelled, pbmc):
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    for name in ("Dendritic", "CD19+ B"):
        labels = labelled.encode_conditions({"cell_type": name}, 2000)
        real = totals(pbmc[pbmc.obs["cell_type"] == name])
        assert np.median(labelled.sample_library_size(labels, uniform)) == pytest.approx(np.median(real), rel=0.05)


def test_a_cell_s_library_size_depends_on_its_own_label_and_random_number_alone(labelled, pbmc):
    labels = labelled.encode_labels(pbmc)
    uniform = torch.rand(700, generator=torch.Generator().manual_seed(0))
    together = labelled.sample_library_size(labels, uniform)
    for cell in (0, 350, 699):
        alone = labelled.sample_library_size(labels[cell : cell + 1], uniform[cell : cell + 1])
        torch.testing.assert_close(alone[0], together[cell])
    more = labelled.sample_library_size(labels, (uniform + 0.01).clamp(max=1))
    assert (more >= together).all() and (more > together).any()


def logarithms(adata):
    adata = adata.copy()
    adata.X = adata.X.log1p()
    return adata


def test_log_values_have_no_library_size(pbmc):
    processor = ScRNAProcessor(values="log", recover_counts=False).fit(logarithms(pbmc))
    assert not processor.is_counts and ScRNAProcessor().is_counts
