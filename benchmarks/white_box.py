"""Measures the effect of holding a gene program, next to real cells and to simpler edits, over three trainings.

    python benchmarks/white_box.py --dataset ../shared/data/kang_ifnb_pbmc.h5ad --work_dir WORK \
        --output lab/results/interventions_cpu.json
    python benchmarks/white_box.py --dataset ../shared/data/pancreas_endocrinogenesis.h5ad --work_dir WORK \
        --label_key cell_type_coarse --condition_key cell_type --control Alpha --stimulated Beta \
        --output lab/results/interventions_cpu.json
    python benchmarks/white_box.py --dataset ../shared/data/zheng_facs_pbmc.h5ad --work_dir WORK \
        --label_key cell_type_coarse --condition_key cell_type --control "CD8+/CD45RA+ Naive Cytotoxic" \
        --stimulated "CD8+ Cytotoxic T" --output lab/results/interventions_cpu.json
    python benchmarks/white_box.py --table lab/results/interventions_cpu.json

Networks are trained on cell types alone. They do not know which cells were stimulated. The program that best separates
stimulated from other training cells is held at the mean of the control cells of a type, at the mean of the stimulated
ones, and at two doses between. The change is judged by type, over 100 genes, against two changes of held-out cells:

- "slope", "correlation": from control to stimulated cells, over the genes that respond most in training cells. Other
  programs change as well.
- "given": between cells that have the held values themselves, stimulated or not, over the genes for which this is
  largest in training cells. It is a local linear regression of each gene on the program.

Training cells show the best possible result, and so do cells decoded from their latents, without the part of a
program's activity that is counting noise. The network is compared with:

    closed form        a Gaussian mixture for each label, conditioned exactly
    random direction   another direction in the space of programs, held with the same shift
    shift of the mean  cells generated as controls, with the program alone moved
    regression         those cells, moved along the regression of the other programs on it
    arithmetic         those cells, moved by the mean difference of the *other* types' latents (scGen), which needs
                       the condition

Ablations show which part writes the response: the held network without attention, without ISTA, or decoded with the
program of controls while the other programs have followed it.

If no cell was stimulated, a finer label replaces the condition. The network knows coarse types only, and the program
that separates two finer types (`--control` and `--stimulated`) is held.
"""

import argparse
import copy
import itertools

import anndata as ad
import numpy as np
import torch
from common import drop_empty_cells, make_parser, markdown, mean_sd, parse, read_results, write_results
from quality import run_name, train_ours
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, read_cells
from wbdit_diffusers.evaluation.cells import generated_cells, real_cells
from wbdit_diffusers.interpretation import fit_gaussian_mixture, hold_direction, hold_program, program_direction
from wbdit_diffusers.interpretation.interventions import with_denoiser


NUM_GENES = 100
NUM_CELLS = 300  # for each type and dose
MIN_CELLS = 10  # held out, of a type and condition
DOSES = np.array([0, 1 / 3, 2 / 3, 1])
MODELS = {"descent": "program", "white_box": "program-white-box", "dit": "program-dit"}  # of quality.py
NAMES = {"descent": "network", "white_box": "network, published block", "dit": "network, DiT block"}
METRICS = ("slope", "correlation", "given_slope", "given_correlation", "dose", "identity")
BANDWIDTH = 0.3  # of the local regression, in standard deviations of the program among cells of the type
WAYS = ["network", "closed form", "random direction", "shift of the mean", "regression", "arithmetic"]
ABLATIONS = {"without attention": "attn", "without ISTA": "ff", "without reading the program": None}


def without(pipe: ScRNAGenerationPipeline, part: str) -> ScRNAGenerationPipeline:
    """The pipeline with a network in which `"attn"` or `"ff"` of each block does nothing."""
    denoiser = copy.deepcopy(pipe.denoiser)
    for block in denoiser.blocks:
        # Attention is added to the tokens. ISTA's code replaces them.
        nothing = (lambda module, args, out: out * 0) if part == "attn" else (lambda module, args, out: args[0])
        getattr(block, part).register_forward_hook(nothing)
    return with_denoiser(pipe, denoiser)


class Edits:
    """Generates cells of one type at a dose, in each of the ways."""

    def __init__(self, pipe: ScRNAGenerationPipeline, train_cells: ad.AnnData, condition: np.ndarray, label_key: str):
        self.pipe, self.label_key = pipe, label_key
        self.gaussian_mixture = fit_gaussian_mixture(pipe, train_cells)
        self.latents = pipe.encode_cells(train_cells)
        self.types = train_cells.obs[label_key].astype(str).to_numpy()
        self.condition = condition  # 0 and 1; -1 is neither
        activities = pipe.codec.activities(self.latents).numpy()
        either = condition >= 0
        aucs = np.array([roc_auc_score(condition[either], values[either]) for values in activities.T])
        self.program = int(np.argmax(np.abs(aucs - 0.5)))
        self.auc = float(max(aucs[self.program], 1 - aucs[self.program]))
        self.activities = activities[:, self.program]
        self.direction = program_direction(pipe.codec, self.program)
        noise = torch.randn(len(self.direction), generator=torch.Generator().manual_seed(0))
        noise[-1] = 0
        noise -= self.direction * (noise @ self.direction) / self.direction.square().sum()
        self.random = noise / (self.latents @ noise).std()
        self.closed = with_denoiser(pipe, self.gaussian_mixture)

    def doses(self, cell_type: str) -> np.ndarray:
        own = self.types == cell_type
        low, high = (self.activities[own & (self.condition == value)].mean() for value in (0, 1))
        return low + DOSES * (high - low)

    def draw(self, way: str, cell_type: str, dose: float, seed: int) -> ad.AnnData:
        doses = self.doses(cell_type)
        activity = float(np.interp(dose, DOSES, doses))
        labels = self.pipe.processor.encode_conditions({self.label_key: cell_type}, NUM_CELLS)
        pipe = self.closed if way == "closed form" else self.pipe
        if ABLATIONS.get(way) is not None:
            pipe = without(pipe, ABLATIONS[way])
        if way == "random direction":
            start = float((self.latents[(self.types == cell_type) & (self.condition == 0)] @ self.random).mean())
            guide = hold_direction(self.gaussian_mixture, self.random, start + activity - doses[0])
        else:
            is_held = way in ("network", "closed form", *ABLATIONS)  # the other ways move the cells afterwards
            guide = hold_program(pipe, self.gaussian_mixture, self.program, activity if is_held else float(doses[0]))
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(
            num_cells=NUM_CELLS,
            conditions={self.label_key: cell_type},
            generator=torch.Generator().manual_seed(seed),
            guides=[guide],
            output_type="latent",
        ).cells
        step = torch.zeros(len(self.direction))
        step[: self.pipe.codec.config.num_programs] = torch.linalg.inv(self.pipe.codec.program_axes)[:, self.program]
        if way == "shift of the mean":
            latents = latents + (activity - doses[0]) * step
        elif way == "without reading the program":
            latents = latents - (activity - doses[0]) * step
        elif way == "regression":
            own = self.latents[self.types == cell_type]
            along = torch.cov(own.T) @ self.direction
            latents = latents + (activity - doses[0]) * along / (along @ self.direction)
        elif way == "arithmetic":
            others = self.types != cell_type
            means = [self.latents[others & (self.condition == value)].mean(0) for value in (0, 1)]
            latents = latents + dose * (means[1] - means[0])
        return self.pipe.decode_latents(latents, labels, generator=torch.Generator().manual_seed(seed))


def judge(edits: Edits, train_cells: ad.AnnData, test_cells: ad.AnnData, test_condition: np.ndarray, ways: list[str]):
    genes = edits.pipe.processor.var_names
    x, y = (real_cells(cells, genes).expression for cells in (train_cells, test_cells))
    test_types = test_cells.obs[edits.label_key].astype(str).to_numpy()
    activities = edits.pipe.codec.activities(edits.pipe.encode_cells(test_cells)).numpy()[:, edits.program]
    labels, generator = edits.pipe.processor.encode_labels(train_cells), torch.Generator().manual_seed(0)
    z = generated_cells(edits.pipe.decode_latents(edits.latents, labels, generator=generator)).expression
    classifier = LogisticRegression(max_iter=500, C=0.1).fit(x, edits.types)
    rows = []
    for cell_type in np.unique(test_types):
        of_type = test_types == cell_type
        if min((of_type & (test_condition == value)).sum() for value in (0, 1)) < MIN_CELLS:
            continue
        own = edits.types == cell_type
        others = [(~own & (edits.condition == value)).any() for value in (0, 1)]
        ends = edits.doses(cell_type)[[0, -1]]
        in_training, decoded = (
            changes(cells[own], edits.condition[own], edits.activities[own], ends) for cells in (x, z)
        )
        held_out = changes(y[of_type], test_condition[of_type], activities[of_type], ends)
        for way, change in (("training cells", in_training), ("training latents, decoded", decoded)):
            rows.append({"type": cell_type, "way": way, **agreement(change, in_training, held_out)})
        chosen = most_changed(in_training[""])
        for way in ways:
            if way == "arithmetic" and not all(others):
                continue
            means, identity = [], []
            for dose in DOSES:
                drawn = generated_cells(edits.draw(way, cell_type, dose, seed=0)).expression
                means.append(drawn.mean(0))
                identity.append((classifier.predict(drawn) == cell_type).mean())
            response = means[-1] - means[0]
            signs = np.sign(in_training[""])
            doses = [spearmanr(DOSES, np.array(means)[:, gene] * signs[gene])[0] for gene in chosen]
            rows.append(
                {
                    "type": cell_type,
                    "way": way,
                    **agreement(dict.fromkeys(in_training, response), in_training, held_out),
                    "dose": float(np.nanmean(doses)),
                    "identity": float(identity[-1] / max(identity[0], 1e-9)),
                }
            )
    return rows


def expected_at(cells: np.ndarray, activities: np.ndarray, activity: float, width: float) -> np.ndarray:
    """Expected expression of each gene at an activity, by a local linear regression."""
    weights = np.exp(-0.25 * ((activities - activity) / width) ** 2)[:, None]  # square roots of a Gaussian's
    design = np.stack([np.ones_like(activities), activities - activity], axis=1)
    return np.linalg.lstsq(design * weights, cells * weights, rcond=None)[0][0]


def changes(cells: np.ndarray, condition: np.ndarray, activities: np.ndarray, ends: np.ndarray) -> dict:
    """
    Change of each gene in cells of one type: `""` from control to stimulated cells, and `"given_"` from the first
    activity of `ends` to the second, regardless of the condition.
    """
    width = BANDWIDTH * activities.std()
    first, last = (expected_at(cells, activities, activity, width) for activity in ends)
    return {"": cells[condition == 1].mean(0) - cells[condition == 0].mean(0), "given_": last - first}


def most_changed(change: np.ndarray) -> np.ndarray:
    return np.argsort(-np.abs(change))[:NUM_GENES]


def agreement(responses: dict, in_training: dict, held_out: dict) -> dict[str, float]:
    """Slope and correlation with both changes of held-out cells, over the genes that change most in training cells."""
    result = {}
    for name, change in in_training.items():
        chosen = most_changed(change)
        response, real = responses[name][chosen], held_out[name][chosen]
        result[f"{name}slope"] = float(response @ real / (real @ real))
        result[f"{name}correlation"] = float(np.corrcoef(response, real)[0, 1])
    return result


def table(results: dict) -> str:
    """Means over types and trainings, with the standard deviation over trainings."""
    rows = []
    for dataset, entries in results.items():
        for way in dict.fromkeys(row["way"] for entry in entries.values() for row in entry["rows"]):
            trainings = [[row for row in entry["rows"] if row["way"] == way] for entry in entries.values()]
            trainings = [own for own in trainings if own]
            cells = []
            for metric in METRICS:
                values = [[row[metric] for row in own if metric in row] for own in trainings]
                cells.append(mean_sd([float(np.mean(one)) for one in values if one], 2))
            rows.append([f"{dataset}, {len(trainings)}", way, *cells])
    return markdown(["dataset, trainings", "way", *(metric.replace("_", ", ") for metric in METRICS)], rows)


def condition_of(cells: ad.AnnData, args: argparse.Namespace) -> np.ndarray:
    """1 for stimulated cells, 0 for controls, -1 for others."""
    values = cells.obs[args.condition_key].astype(str).to_numpy()
    controls = values != args.stimulated if args.control is None else values == args.control
    return np.where(values == args.stimulated, 1, np.where(controls, 0, -1))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--label_key", default="cell_type", help="obs key of the cell type.")
    parser.add_argument("--condition_key", default="condition", help="obs key of the stimulation.")
    parser.add_argument("--stimulated", default="STIM", help="Its value in stimulated cells.")
    parser.add_argument("--control", help="Its value in control cells. Default: all others.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--blocks", nargs="+", choices=sorted(MODELS), default=["descent"])
    args = parse(parser, table)
    results = read_results(args.output, {})
    for path, block, seed in itertools.product(args.dataset, args.blocks, args.seeds):
        adata = drop_empty_cells(read_cells(path))
        name = path.stem if args.control is None else f"{path.stem}, {args.control} to {args.stimulated}"
        folder = args.work_dir / run_name(path, seed, [args.label_key]) / MODELS[block]
        pipe = train_ours(adata, folder, MODELS[block], "counts", [args.label_key], seed, {})
        train_cells, test_cells = CellSplit.load(folder).apply(adata)
        condition, test_condition = (condition_of(cells, args) for cells in (train_cells, test_cells))
        edits = Edits(pipe, train_cells, condition, args.label_key)
        ways = [*WAYS, *ABLATIONS] if block == "descent" else WAYS[:1]
        rows = judge(edits, train_cells, test_cells, test_condition, ways)
        for row in rows:
            row["way"] = NAMES[block] if row["way"] == "network" else row["way"]
        rows = [row for row in rows if block == "descent" or not row["way"].startswith("training")]
        entry = {"program": edits.program, "auc": edits.auc, "rows": rows}
        results.setdefault(name, {})[f"{block}, seed {seed}"] = entry
        write_results(args.output, results)
        print(f"{block}, seed {seed}: program_{edits.program}, AUC {edits.auc:.3f}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
