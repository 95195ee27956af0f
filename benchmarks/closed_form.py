"""What the network adds to the closed form of a Gaussian mixture, on held-out cells.

    python benchmarks/closed_form.py --work_dir WORK --output lab/results/closed_form_cpu.json \\
        --dataset ../shared/data/{pbmc3k,kang_ifnb_pbmc,zheng_facs_pbmc,paul15}.h5ad \\
        ../shared/data/{pancreas_endocrinogenesis,pollen_smartseq}.h5ad
    python benchmarks/closed_form.py --table lab/results/closed_form_cpu.json

`--work_dir` is that of `benchmarks/quality.py`, whose pipelines (model `program`) are taken. For each dataset, at the
same noise and timesteps: the loss of the network, of the mixture, of a single Gaussian for each label, and of network
and mixture averaged with one weight for all timesteps, which is chosen on every second cell and judged on the others.
`--seeds` and `--label_keys` are those of the trainings. Where pipelines were trained with `--mixture_share`, the
default, it is no finding that the network is near the mixture, but how far it is ahead. The excess of the mixture's
cells stands in quality.py's JSON, as "Gaussian mixture per label".
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from quality import run_name

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, drop_empty_cells, read_cells
from wbdit_diffusers.interpretation import fit_mixture
from wbdit_diffusers.sampling import training_scheduler


DRAWS = 8  # of noise and timesteps, for each cell
WEIGHTS = np.linspace(0, 1, 21)  # of the network
COLUMNS = {"gaussian": "Gaussian per label", "mixture": "mixture", "network": "network", "average": "both, averaged"}


@torch.no_grad()
def held_out_losses(
    denoisers: dict[str, torch.nn.Module], latents: torch.Tensor, labels: torch.Tensor | None, seed: int = 0
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Squared errors of the velocity for each cell, `(cells,)`, at noise and timesteps that are the same for all; and
    for every draw of these the errors themselves, `(cells, values)`."""
    scheduler, generator = training_scheduler("v_prediction"), torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(DRAWS):
        # Stratified timesteps: every draw has all of them.
        share = torch.randperm(len(latents), generator=generator) + torch.rand(len(latents), generator=generator)
        timesteps = (1 + share / len(latents) * 999).long().clamp(1, 999)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        errors.append(
            {name: one(noisy, timesteps, labels, return_dict=False)[0] - target for name, one in denoisers.items()}
        )
    return {name: torch.stack([e[name].square().mean(1) for e in errors]).mean(0) for name in denoisers}, errors


def measure(folder: Path, dataset: Path, seed: int) -> dict:
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    train_cells, test_cells = CellSplit.load(folder).apply(drop_empty_cells(read_cells(dataset)))
    test_cells = test_cells[pipe.processor.knows_labels(test_cells)]
    latents, labels = pipe.encode_cells(test_cells), pipe.processor.encode_labels(test_cells)
    labels = labels if labels.shape[1] else None
    mixture, gaussian = fit_mixture(pipe, train_cells), fit_mixture(pipe, train_cells, max_components=1)
    denoisers = {"gaussian": gaussian, "mixture": mixture, "network": pipe.denoiser}
    per_cell, errors = held_out_losses(denoisers, latents, labels, seed)
    averages = [
        torch.stack([(w * e["network"] + (1 - w) * e["mixture"]).square().mean(1) for e in errors]).mean(0)
        for w in WEIGHTS
    ]
    averages = torch.stack(averages)  # (weights, cells)
    chosen = [int(averages[:, half::2].mean(1).argmin()) for half in (0, 1)]
    losses = {name: values.mean().item() for name, values in per_cell.items()}
    losses["average"] = float((averages[chosen[0], 1::2].mean() + averages[chosen[1], ::2].mean()) / 2)
    difference = per_cell["network"] - per_cell["mixture"]
    return {
        "label_keys": list(pipe.processor.label_keys),
        "mixture_share": json.loads((folder / "run.json").read_text()).get("mixture_share", 0.0),
        "num_test": len(latents),
        "num_components": mixture.config.num_components,
        "losses": losses,
        "standard_error": float(difference.std() / len(difference) ** 0.5),  # of network less mixture, over cells
        "weights": [float(WEIGHTS[i]) for i in chosen],
        "spread": float((latents.var(0) / pipe.encode_cells(train_cells).var(0)).mean()),
    }


def table(results: dict) -> str:
    lines = [
        "| dataset | labels | mixture's share | components | " + " | ".join(COLUMNS.values()) + " | network − mixture"
        " | weight of the network |",
        "|---" * (6 + len(COLUMNS)) + "|",
    ]
    for name, row in results.items():
        losses = row["losses"]
        cells = [f"{losses[key]:.4f}" for key in COLUMNS]
        cells.append(f"{losses['network'] - losses['mixture']:+.4f} ± {row['standard_error']:.4f}")
        cells.append(", ".join(f"{weight:.2f}" for weight in row["weights"]))
        labels = ", ".join(row["label_keys"]) or "none"
        lines.append(
            f"| {name} | {labels} | {row['mixture_share']:g} | {row['num_components']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, default=[], help=".h5ad files.")
    parser.add_argument("--work_dir", type=Path, help="That of quality.py.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Of the trainings, and of the noise.")
    parser.add_argument("--label_keys", nargs="*", help="Of the trainings, where they are not the config's.")
    parser.add_argument("--output", type=Path, help="JSON file; datasets are added to it.")
    parser.add_argument("--table", type=Path, help="Print the table of a JSON file, and nothing else.")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for dataset, seed in itertools.product(args.dataset, args.seeds):
        name = run_name(dataset, seed, args.label_keys)
        results[name] = measure(args.work_dir / name / "program", dataset, seed)
        args.output.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
