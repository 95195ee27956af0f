import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from wbdit_diffusers.evaluation.figure import embedding, plot_types, report_figure


matplotlib.use("Agg")


@pytest.mark.parametrize("label_key", ["cell_type", None])
def test_report_figure(pbmc, label_key):
    real, generated = pbmc[:150], pbmc[150:300, :60].copy()
    generated.obs["library_size"] = np.asarray(pbmc[150:300].X.sum(axis=1)).ravel()
    figure = report_figure(real, generated, label_key)
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    assert ("markers: log2 fold change" in titles) == (label_key is not None)
    # Both are normalised by the total of all genes: cells of one dataset have similar means.
    (means,) = (axis for part in figure.subfigs for axis in part.axes if axis.get_title() == "mean of each gene")
    x, y = means.collections[0].get_offsets().T
    assert np.corrcoef(x, y)[0, 1] > 0.95 and np.polyfit(x, y, 1)[0] == pytest.approx(1, abs=0.15)
    plt.close(figure)


def test_figure_of_several_generators(pbmc):
    samples = {"a": pbmc[150:300, :60], "b": pbmc[300:450, 10:80]}
    figure = report_figure(pbmc[:150], samples, "cell_type")
    assert [axis.get_title() for axis in figure.subfigs[0].axes] == ["a", "b"] and len(figure.subfigs) == 2
    plt.close(figure)


@pytest.mark.parametrize("method", ["tsne", "pca", "umap"])  # the first UMAP compiles, which takes 10 s
def test_embeddings_keep_the_order_of_the_groups(method):
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(20, 5)), 30 + rng.normal(size=(30, 5))]
    points = embedding(matrices, method)
    assert points.shape == (50, 2)
    distance = np.linalg.norm(points - points[:20].mean(axis=0), axis=1)
    assert distance[:20].mean() < distance[20:].mean()


def test_types_have_the_same_colours_in_both_panels():
    figure, axes = plt.subplots(1, 2)
    points = np.random.default_rng(0).normal(size=(2, 10, 2))
    types = [np.repeat(["a", "b"], [6, 4]), np.repeat(["b", "c"], 5)]
    plot_types(axes, points, types, ["real", "generated"])
    colours = [
        {c.get_label(): tuple(c.get_facecolor()[0]) for c in axis.collections if len(c.get_offsets())} for axis in axes
    ]
    assert colours[0]["b"] == colours[1]["b"] != colours[1]["c"]
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["a", "b", "c"]
    plt.close(figure)
