"""Trains on datasets and judges the cells: the two spaces and the plain DiT, on one split, by one evaluator.

    python benchmarks/quality.py --dataset ../shared/data/pbmc3k.h5ad --minutes 5 --output results.json

Each model is trained by training/train.py with its defaults (and the flags below), for the same time on the same
machine. Prints a table per dataset, and writes every number as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import read_cells
from wbdit_diffusers.evaluation.report import evaluate, to_markdown


TRAIN_SCRIPT = Path(__file__).parents[1] / "training" / "train.py"
# In expression space the published shape learns too little in minutes on a CPU: a smaller one.
MODELS = {
    "program": [],
    "program-dit": ["--block_type", "dit"],
    "expression": [
        *("--space", "expression", "--num_attention_heads", "4", "--attention_head_dim", "48"),
        *("--learning_rate", "2e-3"),
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, required=True, help=".h5ad files of counts.")
    parser.add_argument("--label_keys", nargs="*", default=["cell_type"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["program"])
    parser.add_argument("--minutes", type=float, default=12.0, help="Training time of each model.")
    parser.add_argument("--num_seeds", type=int, default=3, help="Samples to judge.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; datasets and models are added to it.")
    args = parser.parse_args()

    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for dataset in args.dataset:
        for model in args.models:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, TRAIN_SCRIPT, "--dataset", dataset, "--output_dir", folder]
                command += ["--label_keys", *args.label_keys, "--max_train_steps", 10**9]
                command += ["--max_train_minutes", args.minutes, "--checkpointing_steps", 10**9, *MODELS[model]]
                subprocess.run([str(part) for part in command], check=True)
                pipe = ScRNAGenerationPipeline.from_pretrained(folder)
                split = json.loads(Path(folder, "split.json").read_text())
            pipe.set_progress_bar_config(disable=True)
            adata = read_cells(dataset)
            train, test = adata[split["train"]], adata[split["test"]]
            metrics = evaluate(pipe, train, test, num_seeds=args.num_seeds)
            results.setdefault(dataset.stem, {})[model] = {"minutes": args.minutes, "metrics": metrics}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1))
            print(
                f"\n## {dataset.stem}, {model}, {args.minutes:g} minutes\n\n{to_markdown(metrics, test.n_obs)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
