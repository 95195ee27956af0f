"""Measures how a condition acts: decoder and programs, blocks and timesteps, of pipelines that unseen.py trained.

    python benchmarks/condition.py --dataset ../shared/data/kang_ifnb_pbmc.h5ad --work_dir WORK \\
        --runs B_STIM_0 B_STIM_1 B_STIM_2 --output lab/results/condition_cpu.json
    python benchmarks/condition.py --table lab/results/condition_cpu.json

Each run is a training without one combination of type and condition. Types are those with ten cells of either
condition. Shares are explained in `wbdit_diffusers.interpretation.condition`.
"""

import anndata as ad
import numpy as np
from common import make_parser, markdown, mean_sd, parse, read_results, write_results

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.interpretation.condition import measure_condition


def measure(args, run: str, seed: int) -> dict:
    pipe = ScRNAGenerationPipeline.from_pretrained(args.work_dir / run)
    cells = ad.read_h5ad(args.dataset[0])
    is_held = np.ones(cells.n_obs, dtype=bool)
    for key, name in zip(pipe.processor.label_keys, run.rsplit("_", 2)):
        is_held &= (cells.obs[key].astype(str).str.replace(" ", "_") == name).to_numpy()
    cells = cells[~is_held].copy()
    latents, labels = pipe.encode_cells(cells), pipe.processor.encode_labels(cells)
    return measure_condition(pipe, pipe.gaussian_mixture, latents, labels, seed)


def table(results: dict) -> str:
    runs = list(results.values())
    rows = [(one["type"], one) for run in runs for one in run["types"]]
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        own = [row for other, row in rows if other == name]
        program = own[0]["programs"][0]["program"] if len(runs) == 1 else "first program"
        cells = [name, mean_sd([row["distance"] for row in own], 1), mean_sd([row["decoder"] for row in own], 2)]
        cells.append(f"{program}: {mean_sd([row['programs'][0]['share'] for row in own], 2)}")
        for key in ("blocks", "untrained_blocks", "timesteps", "closed_form_timesteps"):
            cells.append(" / ".join(f"{share:.2f}" for share in np.mean([row[key] for row in own], axis=0)))
        lines.append(cells)
    header = ["type", "nearest type", "decoder", "program", "blocks, output", "with untrained matrices"]
    return markdown([*header, "quarters of the steps", "closed form"], lines)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", nargs="+", default=["B_STIM_0"], help="Folders in the work folder.")
    args = parse(parser, table)
    results = read_results(args.output, {})
    for seed, run in enumerate(args.runs):
        results[run] = measure(args, run, seed)
        write_results(args.output, results)
    print(table(results))


if __name__ == "__main__":
    main()
