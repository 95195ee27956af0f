"""Compares the network with the closed form of a Gaussian mixture, on held-out cells.

    python benchmarks/closed_form.py --work_dir WORK --output lab/results/closed_form_cpu.json \\
        --dataset ../shared/data/{pbmc3k,kang_ifnb_pbmc,zheng_facs_pbmc,paul15}.h5ad \\
        ../shared/data/{pancreas_endocrinogenesis,pollen_smartseq}.h5ad
    python benchmarks/closed_form.py --table lab/results/closed_form_cpu.json

The pipelines are those of quality.py (model `program`). `--seeds` and `--label_keys` choose the trainings. Reported
are losses at the same noise and timesteps: of the network, of the Gaussian mixture, of one Gaussian per label, and of
the weighted average of network and mixture. The weight is chosen on every second cell and judged on the others.

A pipeline trained with `--mixture_share` above 0 (the default) learns from the mixture. The question is then how far
the network is ahead of it. quality.py reports the excess of the mixture's cells as "Gaussian mixture per label".
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from common import load_run, make_parser, markdown, parse, read_results, write_results
from quality import run_name

from wbdit_diffusers.interpretation import fit_gaussian_mixture
from wbdit_diffusers.sampling import training_scheduler


DRAWS = 8  # of noise and timesteps, for each cell
WEIGHTS = np.linspace(0, 1, 21)  # of the network
COLUMNS = {"gaussian": "Gaussian per label", "mixture": "mixture", "network": "network", "average": "weighted average"}


@torch.no_grad()
def held_out_losses(
    denoisers: dict[str, torch.nn.Module], latents: torch.Tensor, labels: torch.Tensor | None, seed: int = 0
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """
    Squared errors of the velocity by denoiser, `(cells,)`, at the same noise and timesteps; and the errors of each
    draw of noise and timesteps, `(cells, features)`.
    """
    scheduler, generator = training_scheduler("v_prediction"), torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(DRAWS):
        # Timesteps are stratified: each draw covers all of them.
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
    pipe, train_cells, test_cells = load_run(folder, dataset)
    latents, labels = pipe.encode_cells(test_cells), pipe.processor.encode_labels(test_cells)
    labels = labels if labels.shape[1] else None
    mixture, gaussian = (
        fit_gaussian_mixture(pipe, train_cells),
        fit_gaussian_mixture(pipe, train_cells, max_components=1),
    )
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
        "standard_error": float(difference.std() / len(difference) ** 0.5),  # of network - mixture, over cells
        "weights": [float(WEIGHTS[i]) for i in chosen],
        "spread": float((latents.var(0) / pipe.encode_cells(train_cells).var(0)).mean()),
    }


def table(results: dict) -> str:
    header = ["dataset", "labels", "mixture_share", "components", *COLUMNS.values()]
    rows = []
    for name, row in results.items():
        losses = row["losses"]
        cells = [name, ", ".join(row["label_keys"]) or "none", f"{row['mixture_share']:g}", str(row["num_components"])]
        cells += [f"{losses[key]:.4f}" for key in COLUMNS]
        cells.append(f"{losses['network'] - losses['mixture']:+.4f} ± {row['standard_error']:.4f}")
        rows.append([*cells, ", ".join(f"{weight:.2f}" for weight in row["weights"])])
    return markdown([*header, "network - mixture", "weight of the network"], rows)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of the trainings and of the noise.")
    parser.add_argument("--label_keys", nargs="*", help="Label keys of the trainings. Default: those of the config.")
    args = parse(parser, table)
    results = read_results(args.output, {})
    for dataset, seed in itertools.product(args.dataset, args.seeds):
        name = run_name(dataset, seed, args.label_keys)
        results[name] = measure(args.work_dir / name / "program", dataset, seed)
        write_results(args.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
