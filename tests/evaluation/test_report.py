import json
import subprocess
import sys
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import make_pipeline
from scipy import sparse

from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.evaluation import classifiers, draw_baselines, draw_samples, evaluate, evaluate_cells, to_markdown
from wbdit_diffusers.evaluation.cells import generated_cells, needs_common_genes, real_cells
from wbdit_diffusers.evaluation.classifiers import JUDGES
from wbdit_diffusers.evaluation.references import draw_matching
from wbdit_diffusers.evaluation.samples import BASELINES
from wbdit_diffusers.evaluation.table import TITLES, mean_and_sd, to_json
from wbdit_diffusers.processing.normalize import log_normalize, to_expression


PARITY = {"paper_kl", "paper_wasserstein", "paper_mmd"}
MEMORY = {"nearest_training_cell", "membership_auc", "membership_auc_donor"}
NUM_GENES = 60


class FakePipeline:
    """Latents are principal components of the log expression; cells are Poisson counts of what they decode to."""

    def __init__(self, train: ad.AnnData):
        self.genes = train.var_names[np.sort(np.argsort(-train.X.toarray().sum(0))[:NUM_GENES])]
        self.names = sorted(train.obs["cell_type"].astype(str).unique())
        self.processor = SimpleNamespace(
            config=SimpleNamespace(label_keys=["cell_type"], categories=[self.names], layer=None, values="counts"),
            label_keys=["cell_type"],
            knows_labels=lambda adata: adata.obs["cell_type"].astype(str).isin(self.names).to_numpy(),
            encode_labels=self.encode_labels,
        )
        x = real_cells(train, self.genes).expression
        self.mean, self.basis = x.mean(axis=0), np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:6]
        self.library_size = float(np.median(train.X.toarray().sum(axis=1)))

    def encode_labels(self, adata: ad.AnnData) -> torch.Tensor:
        return torch.tensor([[self.names.index(name)] for name in adata.obs["cell_type"].astype(str)])

    def encode_cells(self, adata: ad.AnnData) -> torch.Tensor:
        return torch.from_numpy((real_cells(adata, self.genes).expression - self.mean) @ self.basis.T).float()

    def decode_latents(self, latents, class_labels=None, generator=None) -> ad.AnnData:
        share = np.expm1(np.maximum(latents.numpy() @ self.basis + self.mean, 0)) / 1e4
        counts = torch.poisson(torch.from_numpy(share * self.library_size), generator=generator)
        cells = ad.AnnData(sparse.csr_matrix(counts.float().numpy()))
        cells.var_names = self.genes
        cells.obs["cell_type"] = [self.names[label] for label in class_labels[:, 0]]
        cells.obs["library_size"] = self.library_size
        return cells

    def __call__(self, num_cells, conditions, generator, scale=1.0) -> SimpleNamespace:
        labels = torch.tensor([[self.names.index(name)] for name in conditions["cell_type"]])
        latents = scale * torch.randn(num_cells, 6, generator=generator)
        return SimpleNamespace(cells=self.decode_latents(latents, labels, generator))


@pytest.fixture(scope="module", autouse=True)
def few_trees():
    """The forest's 500 trees take most of a report's time; what a report does with its AUC needs no more than 40."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(classifiers, "NUM_TREES", 40)
        yield


@pytest.fixture(scope="module")
def split(pbmc):
    train, test = (cells.copy() for cells in CellSplit.draw(pbmc, 0.2, label_key="cell_type").apply(pbmc))
    for side in (train, test):
        side.obs["donor"] = np.arange(side.n_obs) % 5
    return train, test


@pytest.fixture(scope="module")
def report(split):
    """A denoiser that knows nothing of types, on a codec that does."""
    return evaluate(FakePipeline(split[0]), *split, num_samples=2, donor_key="donor", parity=True)


def real_sample(split, seed=0) -> ad.AnnData:
    train, test = split
    return train[draw_matching(*(side.obs["cell_type"].to_numpy() for side in split), np.random.default_rng(seed))]


def test_every_column_has_its_metrics(report, split):
    columns = report["metrics"]
    assert list(columns) == ["generated", "real reference", *BASELINES]
    for name, column in columns.items():
        assert set(column) == set(TITLES) - (MEMORY if name == "real reference" else set())
        assert all(len(values) == 2 and np.isfinite(values).all() for values in column.values())
    assert (report["num_test"], report["num_genes"], report["num_samples"]) == (split[1].n_obs, NUM_GENES, 2)
    assert report["label_key"] == "cell_type" and report["donor_key"] == "donor" and not report["within_genes"]
    assert all(entry["num_train"] >= 30 for entry in report["per_type"].values())
    assert json.loads(json.dumps(report))["metrics"] == columns


def test_the_excess_is_that_of_the_worst_judge(report):
    assert list(report["excess"]) == ["generated", *BASELINES]
    for name, entry in report["excess"].items():
        for judge in JUDGES:
            ours, real = (report["metrics"][column][f"auc_{judge}"] for column in (name, "real reference"))
            assert entry["by_judge"][judge] == pytest.approx(np.mean(ours) - np.mean(real))
        assert entry["mean"] == max(entry["by_judge"].values()) == entry["by_judge"][entry["judge"]]
    assert report["excess"]["generated"]["mean"] > 0.2  # noise for latents is told at once


def test_real_cells_reach_the_reference(report, split):
    real = report["metrics"]["real reference"]
    assert all(0.35 < np.mean(real[f"auc_{name}"]) < 0.65 for name in JUDGES)
    assert np.mean(real["lfc_slope"]) == pytest.approx(1, abs=0.2)
    assert np.mean(report["metrics"]["generated"]["f1"]) < np.mean(real["f1"])
    genes = split[0].var_names[:200]
    sample = real_sample(split)[:, genes].copy()
    sample.obs["library_size"] = np.asarray(real_sample(split).X.sum(axis=1)).ravel()
    copies = evaluate_cells([sample], *split, label_key="cell_type")
    # They are training cells: as real as the reference, and found out as copies.
    assert abs(copies["excess"]["generated"]["mean"]) < 0.15
    assert copies["metrics"]["generated"]["nearest_training_cell"] == pytest.approx([0], abs=1e-5)
    assert copies["metrics"]["generated"]["membership_auc"][0] > 0.55
    assert not copies["within_genes"]
    assert copies["metrics"]["generated"]["other_genes_w1"][0] < 0.05


def test_markdown(report):
    table = to_markdown(report)
    best = report["excess"]["generated"]
    assert table.startswith(f"The best of three classifiers ({best['judge']}) tells generated cells from ")
    assert f"an excess of **{best['mean']:.3f} ± {best['sd']:.3f}**" in table
    assert "| metric | generated | real reference | difference | " + " | ".join(BASELINES) + " |" in table
    assert all(f"| {title} | " in table for title in TITLES.values())
    assert all(f"| {label} |" in table for label in report["per_type"])
    assert "classifiers overlook what they would see with more" in table
    widths = {line.count("|") for line in table.split("By `cell_type`")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1
    values = report["metrics"]["generated"]["w2"]
    assert f"| {np.mean(values):.3f} ± {np.std(values):.3f} |" in table


def test_library_sizes_count_all_genes(split):
    train, _ = split
    total = np.asarray(train.X.sum(axis=1)).ravel()
    genes = train.var_names[:50]
    lying = train.copy()
    lying.obs["library_size"] = 1.0
    real = real_cells(lying, genes)
    np.testing.assert_array_equal(real.library_size, total)
    np.testing.assert_allclose(
        real.expression, np.log1p(train[:, genes].X.toarray() / total[:, None] * 1e4), rtol=1e-5
    )
    generated = train[:, genes].copy()
    np.testing.assert_allclose(generated_cells(generated).library_size, np.asarray(generated.X.sum(1)).ravel())
    generated.obs["library_size"] = total
    np.testing.assert_array_equal(generated_cells(generated).expression, real.expression)
    np.testing.assert_allclose(real.other_genes_share(), 1 - generated.X.toarray().sum(1) / total, rtol=1e-5)


def test_without_library_sizes_only_common_genes_count(split):
    sample = real_sample(split)[:, :40].copy()
    report = evaluate_cells([sample], *split)
    assert report["within_genes"] and report["label_key"] is None and report["per_type"] == {}
    assert report["metrics"]["generated"]["other_genes_w1"][0] == pytest.approx(0, abs=1e-6)
    assert "judged as if these 40 genes were all" in to_markdown(report)
    assert "purity" not in report["metrics"]["generated"]


def test_with_all_genes_a_library_is_the_sum_of_the_row(split):
    """Whatever a generator's `obs["library_size"]` says, there is nothing outside the genes that it has made."""
    train, test = split
    sample = test.copy()
    sample.obs["library_size"] = 1.0
    assert needs_common_genes(sample, train) and not needs_common_genes(sample[:, :40], train)
    cells = generated_cells(sample, within_genes=True)
    np.testing.assert_array_equal(cells.expression, real_cells(test, test.var_names).expression)


def test_log_values_of_a_layer(split):
    train, test = (side[:, :30].copy() for side in split)
    for side in (train, test):
        side.layers["log"] = log_normalize(side.X, np.asarray(side.X.sum(axis=1)).ravel() + 1)
        side.X = None
    sample = ad.AnnData(train.layers["log"][: test.n_obs], var=train.var)
    report = evaluate_cells([sample], train, test, values="log", layer="log")
    assert report["metrics"]["generated"]["variance_ratio"][0] == pytest.approx(1, abs=0.3)
    assert "library_size_w1" not in report["metrics"]["generated"]
    assert "–" in to_markdown(report)


def test_bad_input_is_refused(split):
    train, test = split
    with pytest.raises(ValueError, match="558 cells, not as many as the 142 held-out ones"):
        evaluate_cells([train], train, test)
    renamed = test.copy()
    renamed.var_names = [f"x{name}" for name in test.var_names]
    with pytest.raises(ValueError, match="generated genes are not among the real cells'"):
        evaluate_cells([renamed], train, test)
    with pytest.raises(ValueError, match="no samples to judge"):
        evaluate_cells([], train, test)
    with pytest.raises(ValueError, match="'other' has 2 samples"):
        evaluate_cells([test], train, test, baselines={"other": [test, test]})
    with pytest.raises(ValueError, match="other genes than the first"):
        evaluate_cells([test, test[:, :9]], train, test)
    with pytest.raises(ValueError, match="no column 'kind'"):
        evaluate_cells([test], train, test, label_key="kind")
    with pytest.raises(ValueError, match="`values` is 'counts' or 'log', not 'tpm'"):
        evaluate_cells([test], train, test, values="tpm")
    with pytest.raises(ValueError, match="too few for a reference"):
        evaluate_cells([test], train[:20], test)


def test_baselines_have_the_labels_of_the_held_out_cells(split):
    train, test = split
    pipe = FakePipeline(train)
    baselines = draw_baselines(pipe, train, test, num_samples=2)
    assert list(baselines) == list(BASELINES)
    for samples in baselines.values():
        assert [cells.n_obs for cells in samples] == [test.n_obs] * 2
        assert all(cells.obs["cell_type"].tolist() == test.obs["cell_type"].tolist() for cells in samples)
        assert (samples[0].X != samples[1].X).nnz > 0
    again = draw_baselines(pipe, train, test, num_samples=2)
    assert all((baselines[name][1].X != again[name][1].X).nnz == 0 for name in BASELINES)


def test_a_pipeline_draws_the_cells_that_it_knows(split):
    train, test = split
    rare = train.obs["cell_type"].value_counts().index[-1]
    train = train[train.obs["cell_type"] != rare]
    pipe = make_pipeline(train, codec="program", label_keys=["cell_type"], num_genes=50)
    samples, known = draw_samples(pipe, test, num_samples=2, num_inference_steps=1)
    assert rare not in set(known.obs["cell_type"]) and known.n_obs < test.n_obs
    assert samples[0].obs["cell_type"].astype(str).tolist() == known.obs["cell_type"].astype(str).tolist()
    assert (samples[0].X != samples[1].X).nnz > 0


def test_normalisation_is_alike_for_every_kind_of_matrix(pbmc):
    counts, before = pbmc.X, pbmc.X.copy()
    total = np.asarray(counts.sum(axis=1)).ravel()
    from_sparse = log_normalize(counts, total)
    assert sparse.issparse(from_sparse) and from_sparse.dtype == np.float32 and (counts != before).nnz == 0
    dense, tensor = log_normalize(counts.toarray(), total), log_normalize(torch.tensor(counts.toarray()), total)
    np.testing.assert_allclose(np.expm1(dense).sum(1), 1e4, rtol=1e-4)
    np.testing.assert_allclose(from_sparse.toarray(), dense, rtol=1e-5)
    np.testing.assert_allclose(tensor.numpy(), dense, rtol=1e-5)
    assert not np.isnan(log_normalize(np.zeros((1, 3)), np.zeros(1))).any()
    assert to_expression(dense, None, "log") is dense
    with pytest.raises(ValueError, match="one per cell"):
        log_normalize(counts, total[:-1])
    with pytest.raises(ValueError, match="give `library_size`"):
        to_expression(dense, None, "counts")


def test_the_import_is_light():
    """Nothing that judging does not need: neither plots nor the pipeline's own modules come from `evaluation`."""
    code = (
        "import sys, wbdit_diffusers; before = set(sys.modules); import wbdit_diffusers.evaluation;"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('scanpy', 'matplotlib')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_json_has_no_nan():
    """Which is no JSON; and what is read again can be shown."""
    report = {"metrics": {"generated": {"w2": [float("nan"), 1.5], "purity": [float("nan")]}}, "num_test": 3}
    text = to_json(report)
    assert "NaN" not in text
    again = json.loads(text)
    assert again["metrics"]["generated"] == {"w2": [None, 1.5], "purity": [None]} and again["num_test"] == 3
    assert mean_and_sd(again["metrics"]["generated"]["w2"]) == "1.500 ± 0.000"
    assert mean_and_sd(again["metrics"]["generated"]["purity"]) == "–"
