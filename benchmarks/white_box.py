"""What holding a program does, beside real cells and beside simpler edits; three training seeds.

    python benchmarks/white_box.py --dataset ../shared/data/kang_ifnb_pbmc.h5ad --work_dir WORK \\
        --output lab/results/interventions_cpu.json
    python benchmarks/white_box.py --dataset ../shared/data/pancreas_endocrinogenesis.h5ad --work_dir WORK \\
        --label_key cell_type_coarse --condition_key cell_type --control Alpha --stimulated Beta \\
        --output lab/results/interventions_cpu.json
    python benchmarks/white_box.py --dataset ../shared/data/zheng_facs_pbmc.h5ad --work_dir WORK \\
        --label_key cell_type_coarse --condition_key cell_type --control "CD8+/CD45RA+ Naive Cytotoxic" \\
        --stimulated "CD8+ Cytotoxic T" --output lab/results/interventions_cpu.json
    python benchmarks/white_box.py --table lab/results/interventions_cpu.json

Networks (White-Box and DiT) are trained on cell types alone; which cells were stimulated is hidden from them. The
program that tells stimulated training cells best is then held at what control cells of a type have, at what stimulated
ones have, and at two doses between. The change of the 100 genes that respond most in training cells is compared with
that of held-out cells, by type: with that of the stimulated ones ("slope"), which differ in other programs too, and,
for the 100 genes of which that is most, with that of cells which have the held value themselves, whatever was done to
them ("given": a local linear regression of each gene on the program). What can be reached is shown by training cells,
and by cells decoded from their latents: in these, what a program's activity owes to the chance of the same counts is
gone. Beside the network:

    closed form        a Gaussian mixture for each label, conditioned exactly, without any network
    random direction   another direction in the space of programs, held with the same shift
    shift of the mean  the program alone is moved in cells that were generated as controls
    regression         those cells are moved along what other programs regress on it
    arithmetic         those cells are moved by the mean difference of the *other* types' latents, for which the
                       condition must be known (scGen's)

and, to see what writes the response, with parts taken out: of the held network all attention, or all ISTA; or the
program itself, which the decoder then reads as in controls, while the other programs have followed it.

Where nothing was stimulated, a finer label takes the place of the condition: the network knows coarse types alone, and
the program that tells two finer types (`--control` and `--stimulated`) is held at what each of them has.
"""

import argparse
import copy
import json
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from quality import run_name, train_ours
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, drop_empty_cells, read_cells
from wbdit_diffusers.evaluation.cells import generated_cells, real_cells
from wbdit_diffusers.interpretation import fit_mixture, hold_program, program_direction
from wbdit_diffusers.interpretation.interventions import HeldDenoiser, with_denoiser


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
    """The pipeline, in whose network `"attn"` or `"ff"` of every block does nothing."""
    denoiser = copy.deepcopy(pipe.denoiser)
    for block in denoiser.blocks:
        # Attention is added to the tokens, ISTA's code takes their place.
        nothing = (lambda module, args, out: out * 0) if part == "attn" else (lambda module, args, out: args[0])
        getattr(block, part).register_forward_hook(nothing)
    return with_denoiser(pipe, denoiser)


class Edits:
    """Cells of one type at each dose, by the name of the way in which they are made."""

    def __init__(self, pipe: ScRNAGenerationPipeline, train_cells: ad.AnnData, condition: np.ndarray, label_key: str):
        self.pipe, self.mixture, self.label_key = pipe, fit_mixture(pipe, train_cells), label_key
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
        self.closed = with_denoiser(pipe, self.mixture)

    def doses(self, cell_type: str) -> np.ndarray:
        own = self.types == cell_type
        low, high = (self.activities[own & (self.condition == value)].mean() for value in (0, 1))
        return low + DOSES * (high - low)

    def draw(self, way: str, cell_type: str, dose: float, seed: int) -> ad.AnnData:
        doses = self.doses(cell_type)
        activity = float(np.interp(dose, DOSES, doses))
        labels = self.pipe.processor.encode_conditions({self.label_key: cell_type}, NUM_CELLS)
        if way in ("network", "closed form", *ABLATIONS):
            pipe = self.closed if way == "closed form" else self.pipe
            if ABLATIONS.get(way) is not None:
                pipe = without(pipe, ABLATIONS[way])
            held = hold_program(pipe, self.mixture, self.program, activity)
        elif way == "random direction":
            start = float((self.latents[(self.types == cell_type) & (self.condition == 0)] @ self.random).mean())
            denoiser = HeldDenoiser(self.pipe.denoiser, self.mixture, self.random, start + activity - doses[0])
            held = with_denoiser(self.pipe, denoiser)
        else:
            held = hold_program(self.pipe, self.mixture, self.program, float(doses[0]))
        held.set_progress_bar_config(disable=True)
        latents = held(
            num_cells=NUM_CELLS,
            conditions={self.label_key: cell_type},
            generator=torch.Generator().manual_seed(seed),
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
    """What cells with that activity have on average of each gene, by a local linear regression."""
    weights = np.exp(-0.25 * ((activities - activity) / width) ** 2)[:, None]  # square roots of a Gaussian's
    design = np.stack([np.ones_like(activities), activities - activity], axis=1)
    return np.linalg.lstsq(design * weights, cells * weights, rcond=None)[0][0]


def changes(cells: np.ndarray, condition: np.ndarray, activities: np.ndarray, ends: np.ndarray) -> dict:
    """Of each gene, in cells of one type: from controls to stimulated cells, and, `"given_"`, from cells that have the
    first activity of `ends` to those that have the second, by the condition or not."""
    width = BANDWIDTH * activities.std()
    first, last = (expected_at(cells, activities, activity, width) for activity in ends)
    return {"": cells[condition == 1].mean(0) - cells[condition == 0].mean(0), "given_": last - first}


def most_changed(change: np.ndarray) -> np.ndarray:
    return np.argsort(-np.abs(change))[:NUM_GENES]


def agreement(responses: dict, in_training: dict, held_out: dict) -> dict[str, float]:
    """Slope and correlation against both changes of held-out cells, over the genes that change most in training."""
    result = {}
    for name, change in in_training.items():
        chosen = most_changed(change)
        response, real = responses[name][chosen], held_out[name][chosen]
        result[f"{name}slope"] = float(response @ real / (real @ real))
        result[f"{name}correlation"] = float(np.corrcoef(response, real)[0, 1])
    return result


def table(results: dict) -> str:
    """By dataset, and way of editing."""
    lines = ["| dataset, trainings | way | " + " | ".join(METRICS).replace("_", ", ") + " |", "|---" * 8 + "|"]
    return "\n".join(lines + [line for dataset, entries in results.items() for line in lines_of(dataset, entries)])


def lines_of(dataset: str, results: dict) -> list[str]:
    lines = []
    rows = [row for entry in results.values() for row in entry["rows"]]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for metric in METRICS:
            # Of each training, the mean over types; ± over trainings.
            values = [
                np.mean([row[metric] for row in entry["rows"] if row["way"] == way and metric in row])
                for entry in results.values()
                if any(row["way"] == way and metric in row for row in entry["rows"])
            ]
            cells.append(f"{np.mean(values):.2f}" if values else "–")
            cells[-1] += f" ± {np.std(values):.2f}" if len(values) > 1 else ""
        trainings = sum(any(row["way"] == way for row in entry["rows"]) for entry in results.values())
        lines.append(f"| {dataset}, {trainings} | {way} | " + " | ".join(cells) + " |")
    return lines


def condition_of(cells: ad.AnnData, args: argparse.Namespace) -> np.ndarray:
    """1 where cells were stimulated, 0 where they are controls, else -1."""
    values = cells.obs[args.condition_key].astype(str).to_numpy()
    controls = values != args.stimulated if args.control is None else values == args.control
    return np.where(values == args.stimulated, 1, np.where(controls, 0, -1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="An .h5ad file of counts.")
    parser.add_argument("--label_key", default="cell_type", help="obs key of the cell type.")
    parser.add_argument("--condition_key", default="condition", help="obs key of the stimulation.")
    parser.add_argument("--stimulated", default="STIM", help="Its value in stimulated cells.")
    parser.add_argument("--control", help="Its value in the cells these are compared with: all others by default.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--blocks", nargs="+", choices=sorted(MODELS), default=["descent"])
    parser.add_argument(
        "--work_dir", type=Path, help="Keeps trained pipelines, as quality.py does; those already there are taken."
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="Print the table of a JSON file, and nothing else.")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    adata = drop_empty_cells(read_cells(args.dataset))
    for value in (args.stimulated, args.control):
        if value is not None and value not in set(adata.obs[args.condition_key].astype(str)):
            parser.error(f"No cell has {value!r} as its {args.condition_key}.")
    name = args.dataset.stem
    if args.control is not None:
        name += f", {args.control} to {args.stimulated}"
    for block in args.blocks:
        for seed in args.seeds:
            folder = args.work_dir / run_name(args.dataset, seed, [args.label_key]) / MODELS[block]
            pipe = train_ours(adata, folder, MODELS[block], "counts", [args.label_key], seed, {})
            train_cells, test_cells = CellSplit.load(folder).apply(adata)
            condition, test_condition = (condition_of(cells, args) for cells in (train_cells, test_cells))
            edits = Edits(pipe, train_cells, condition, args.label_key)
            ways = [*WAYS, *ABLATIONS] if block == "descent" else WAYS[:1]
            rows = judge(edits, train_cells, test_cells, test_condition, ways)
            for row in rows:
                if row["way"] == "network":
                    row["way"] = NAMES[block]
            rows = [row for row in rows if block == "descent" or not row["way"].startswith("training")]
            entry = {"program": edits.program, "auc": edits.auc, "rows": rows}
            results.setdefault(name, {})[f"{block}, seed {seed}"] = entry
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1))
            print(f"{block}, seed {seed}: program_{edits.program}, AUC {edits.auc:.3f}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
