import matplotlib
import numpy as np
import pytest

from wbdit_diffusers.evaluation.figure import joint_tsne, report_figure


matplotlib.use("Agg")


@pytest.mark.parametrize("label_key", ["cell_type", None])
def test_report_figure(pbmc, tmp_path, label_key):
    real, generated = pbmc[:150], pbmc[150:300, :60].copy()
    generated.obs["library_size"] = np.asarray(pbmc[150:300].X.sum(axis=1)).ravel()
    figure = report_figure(real, generated, label_key)
    path = tmp_path / "figure.png"
    figure.savefig(path, dpi=50)
    assert path.stat().st_size > 20_000
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    assert ("markers: log2 fold change" in titles) == (label_key is not None)
    # Both are normalised by the total of all genes: cells of one dataset have like means.
    (means,) = (axis for part in figure.subfigs for axis in part.axes if axis.get_title() == "mean of each gene")
    x, y = means.collections[0].get_offsets().T
    assert np.corrcoef(x, y)[0, 1] > 0.95 and np.polyfit(x, y, 1)[0] == pytest.approx(1, abs=0.15)


def test_unknown_genes_are_refused(pbmc):
    generated = pbmc[:10, :5].copy()
    generated.var_names = [f"x{name}" for name in generated.var_names]
    with pytest.raises(ValueError, match="generated genes are not among the real cells'"):
        report_figure(pbmc[10:20], generated)


def test_joint_tsne_keeps_the_order_of_the_groups():
    rng = np.random.default_rng(0)
    points = joint_tsne([rng.normal(size=(20, 5)), 30 + rng.normal(size=(30, 5))])
    assert points.shape == (50, 2)
    centre = points[:20].mean(axis=0)
    distance = np.linalg.norm(points - centre, axis=1)
    assert distance[:20].mean() < distance[20:].mean()
