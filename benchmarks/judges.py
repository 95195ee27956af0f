"""Other people's judges, unchanged, on the cells of race.py.

    python benchmarks/judges.py --dataset ../shared/data/{pbmc3k,kang_ifnb_pbmc}.h5ad --work_dir WORK \\
        --output lab/results/judges_cpu.json
    python benchmarks/judges.py --table lab/results/judges_cpu.json

The work folder is that of race.py. The judges have an environment of their own in it, which the first call makes. All
compare log1p(CP10k) of the same 2,000 genes with held-out cells. "training cells" has as many real cells with the same
labels: the ceiling.

- cell-eval: the lines of differential expression of each label against the most frequent one, means over labels with
  ten held-out cells.
- gge-eval: W1, MMD and energy distance in its space of 50 components, and R² of gene means, means over labels.
- scib-metrics: iLISI of held-out and generated cells as two batches, 1 is well mixed.
- prdc: density and coverage, next to ours on the same principal components.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np


PACKAGES = ["cell-eval==0.8.2", "gge-eval==1.0.1", "scib-metrics==0.5.10", "prdc==0.2", "torch==2.13.0"]
DE_LINES = ["overlap_at_N", "overlap_at_50", "precision_at_N", "de_spearman_lfc_sig", "de_direction_match"]
DE_LINES += ["de_sig_genes_recall", "pr_auc", "roc_auc", "pearson_delta"]
DISTANCES = ["wasserstein_1", "mmd", "energy", "r_squared"]
LABEL, MIN_CELLS, NEIGHBORS = "label", 10, 90
CEILING = "training cells"


def cell_eval(real: ad.AnnData, generated: ad.AnnData) -> dict[str, float]:
    from cell_eval import MetricsEvaluator

    control = real.obs[LABEL].value_counts().index[0]
    with tempfile.TemporaryDirectory() as folder:
        evaluator = MetricsEvaluator(
            generated, real, control_pert=control, pert_col=LABEL, num_threads=1, outdir=folder
        )
        skipped = ["clustering_agreement", "pearson_edistance", "mse", "mae", "mse_delta", "mae_delta"]
        results, _ = evaluator.compute(skip_metrics=skipped, write_csv=False)
    frame = results.to_pandas()
    return {name: float(frame[name].astype(float).mean()) for name in DE_LINES if name in frame}


def gge(real: ad.AnnData, generated: ad.AnnData) -> dict[str, float]:
    from gge import evaluate
    from gge.metrics import EnergyDistance, MMDDistance, RSquared, Wasserstein1Distance

    metrics = [kind(space="pca") for kind in (Wasserstein1Distance, MMDDistance, EnergyDistance)] + [RSquared()]
    results = evaluate(real.copy(), generated.copy(), condition_columns=[LABEL], metrics=metrics, verbose=False)
    conditions = next(iter(results.splits.values())).conditions.values()
    return {
        name: float(np.mean([one.get_metric_value(metric.name) for one in conditions]))
        for name, metric in zip(DISTANCES, metrics)
    }


def neighbourhoods(real: ad.AnnData, generated: ad.AnnData) -> dict[str, float]:
    """iLISI, and density and coverage on components of one half of the held-out cells, judged on the other half."""
    from prdc import compute_prdc
    from scib_metrics import ilisi_knn
    from scib_metrics.nearest_neighbors import pynndescent
    from sklearn.decomposition import PCA

    half = np.random.default_rng(0).permutation(real.n_obs)
    basis, judged = half[::2], half[1::2]
    pca = PCA(30, random_state=0).fit(real.X[basis])
    x, y = pca.transform(real.X[judged]), pca.transform(generated.X[judged])  # of the same labels
    both = np.concatenate([x, y]).astype(np.float32)
    nearest = pynndescent(both, n_neighbors=min(NEIGHBORS, len(both) // 3), random_state=0)
    row = {"ilisi": float(ilisi_knn(nearest, np.repeat([0, 1], [len(x), len(y)])))}
    prdc = compute_prdc(x, y, nearest_k=5)
    return (
        row
        | {f"prdc_{name}": float(prdc[name]) for name in ("precision", "recall", "density", "coverage")}
        | {"points": [x.tolist(), y.tolist()]}
    )


def judge(folder: Path, names: list[str]):
    """Judges files of a folder, in the environment of the judges: a line of JSON for each."""
    import scanpy as sc

    test, train = ad.read_h5ad(folder / "test.h5ad"), ad.read_h5ad(folder / "train.h5ad")
    frequent = test.obs[LABEL].value_counts().loc[lambda numbers: numbers >= MIN_CELLS].index
    if len(frequent) < 3:
        raise SystemExit(f"{folder}: fewer than three labels have {MIN_CELLS} held-out cells.")
    test = test[test.obs[LABEL].isin(frequent)]
    rng, rows = np.random.default_rng(0), np.empty(test.n_obs, dtype=int)
    for label in frequent:
        own, wanted = np.flatnonzero(train.obs[LABEL] == label), np.flatnonzero(test.obs[LABEL] == label)
        rows[wanted] = rng.choice(own, len(wanted), replace=len(wanted) > len(own))
    for name in names:
        cells = train[rows] if name == CEILING else ad.read_h5ad(folder / f"{name}.h5ad")
        cells = cells if name == CEILING else cells[ad.read_h5ad(folder / "test.h5ad").obs[LABEL].isin(frequent)]
        pair = []
        for part in (test, cells):
            X = np.asarray(part.X.toarray(), dtype=np.float32)
            obs = part.obs[[LABEL]].astype(str).astype("category")
            pair.append(ad.AnnData(X, obs=obs.set_index(np.arange(len(obs)).astype(str)), var=test.var[[]]))
            sc.pp.normalize_total(pair[-1], target_sum=1e4)
            sc.pp.log1p(pair[-1])
        with contextlib.redirect_stdout(io.StringIO()):
            row = {"name": name} | cell_eval(*pair) | gge(*pair) | neighbourhoods(*pair)
        print(json.dumps(row), flush=True)


def measure(dataset: Path, args, done: set):
    """The rows of a dataset that are not there yet."""
    from common import environment
    from race import NAMES

    from wbdit_diffusers.evaluation.metrics import manifold_metrics

    folder = (args.work_dir / dataset.stem / f"seed-{args.seed}").absolute()
    names = [CEILING, *(name for name in NAMES if (folder / f"{name}.h5ad").exists())]
    names = [name for name in names if (dataset.stem, NAMES.get(name, name), args.seed) not in done]
    python = environment(PACKAGES, args.work_dir / "envs" / "judges")
    command = [python, "-W", "ignore", Path(__file__).resolve(), "--run", folder, *names]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings) as run:
        for line in filter(lambda line: line.startswith("{"), run.stdout):
            row = json.loads(line)
            points = map(np.array, row.pop("points"))
            row |= {f"our_{name}": value for name, value in manifold_metrics(*points).items()}
            yield row | {"dataset": dataset.stem, "seed": args.seed, "name": NAMES.get(row["name"], row["name"])}
    if run.returncode:
        raise SystemExit(f"The judges of {dataset.stem} ended with {run.returncode}.")


def table(rows: list[dict]) -> str:
    """All judges of each dataset, and on how many lines a generator reaches 95% of real cells."""
    from common import markdown

    shown = [*DE_LINES, *DISTANCES, "ilisi", "prdc_density", "our_density", "prdc_coverage", "our_coverage"]
    parts = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset]
        real = next(row for row in own if row["name"] == CEILING)
        lines = []
        for row in own:
            reached = sum(row[line] >= 0.95 * real[line] for line in DE_LINES if line in row)
            values = [f"{row[name]:.3f}" if name in row else "–" for name in shown]
            lines.append([row["name"], f"{reached} of {sum(line in row for line in DE_LINES)}", *values])
        parts.append(f"{dataset}\n\n{markdown(['cells', '95% of real', *shown], lines)}")
    return "\n\n".join(parts)


def main():
    if "--run" in sys.argv:  # in the environment of the judges
        return judge(Path(sys.argv[2]), sys.argv[3:])
    from common import add_rows, make_parser, parse, read_results

    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parse(parser, table)
    done = {(row["dataset"], row["name"], row["seed"]) for row in read_results(args.output, [])}
    for dataset in args.dataset:
        add_rows(args.output, measure(dataset, args, done))
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
