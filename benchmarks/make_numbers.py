"""Makes every number of README and docs again, at the present state of the code: `make numbers`.

    python benchmarks/make_numbers.py --work_dir WORK
    python benchmarks/make_numbers.py --list

Each file of lab/results that README or docs quote has its command here. Two are made by hand: explain_kang_cpu.json
by the command of docs/white_box.md, and speed_narrow_cpu.json by that of docs/speed.md, which needs another
checkout. A command writes to a folder of WORK that is named after the state of src/, so nothing of another state is
used again, and an interrupted command continues. When it has ended well, its file replaces the one in lab/results,
and lab/results/made.json notes the state. Files of the present state are not made again. `--list` says of which
state each file is. After all commands, `--table` of each benchmark prints what the pages show. All of it takes many
hours; `--only` chooses files.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from wbdit_diffusers.files import write_whole


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "lab" / "results"
BRAIN, KANG, PBMC = "brain_e18_10k_unlabelled", "kang_ifnb_pbmc", "pbmc3k"
PANCREAS, ZHENG = "pancreas_endocrinogenesis", "zheng_facs_pbmc"
SIX = [PBMC, KANG, ZHENG, "paul15", PANCREAS, "pollen_smartseq"]


def files(*names: str) -> str:
    return " ".join(f"{{data}}/{name}.h5ad" for name in names)


WORK = "--work_dir {work}"
NARROW = f"{WORK}/narrow --train_flags num_genes=2000"
SOURCES = f"--sources {files(KANG, ZHENG)}"
SHORT = """--settings '{{"max_train_steps": 1500}}'"""
THREE = f"--dataset {files(KANG, PBMC, PANCREAS)}"
HALVES = "--train_batch_size 128 --blocks descent 'descent, without ISTA' 'descent, without attention'"
HALVES += " 'white_box, as few parameters' 'dit, as few parameters'"
# {data} and {work} are filled in. Commands that reuse pipelines come after quality.py, which trains them. A file may
# have several commands, a line each.
NUMBERS = {
    "quality_all_genes_cpu.json": f"quality.py {WORK} --dataset {files(*SIX)}",
    "quality_narrow_cpu.json": f"quality.py {NARROW} --dataset {files(*SIX)}\n"
    f"quality.py {NARROW} --label_keys --dataset {files(BRAIN, KANG)}",
    "race_cpu.json": f"race.py {WORK} --seeds 0 1 2 --dataset {files(*SIX)}",
    "judges_cpu.json": f"judges.py {WORK} --dataset {files(*SIX)}",
    "panel_cpu.json": f"panel.py {WORK} --dataset {files(*SIX)} --scvi {{work}}/envs/scvi-tools/bin/python",
    "augment_cpu.json": f"augment.py {WORK} --dataset {files(*SIX)} --scvi {{work}}/envs/scvi-tools --closed_form",
    "few_cells_cpu.json": f"few_cells.py {WORK} --dataset {files(PBMC)} {SOURCES} {SHORT}",
    "words_cpu.json": f"words.py {WORK} --dataset {files(ZHENG, PBMC, KANG)} --encoder {{work}}/encoder",
    "ground_truth_cpu.json": f"ground_truth.py {WORK} --model {{work}}/{KANG}/program --cell_type 'CD14 Mono'",
    "unseen_cpu.json": f"unseen.py {WORK} --dataset {files(KANG)} " + """--settings '{{"num_genes": 2000}}'""",
    "unseen_all_genes_cpu.json": f"unseen.py {WORK}/all_genes --hold_out B:STIM --dataset {files(KANG)}",
    "batches_cpu.json": f"batches.py {WORK} --dataset {files(KANG)}",
    "interventions_cpu.json": f"white_box.py {WORK} --dataset {files(KANG)}",
    "closed_form_cpu.json": f"closed_form.py {WORK} --dataset {files(KANG, PANCREAS, 'paul15')}",
    "condition_cpu.json": f"condition.py {WORK} --dataset {files(KANG)}",
    "blocks_cpu.json": f"blocks.py {WORK} --blocks descent white_box dit {THREE}",
    "blocks_narrow_cpu.json": f"blocks.py {WORK} --labels none --seeds 0 --max_train_steps 3000 --blocks descent "
    f"'descent, twice the work' {THREE}",
    # unseen.py has made the pipeline of `--labels unseen`
    "halves_cpu.json": f"blocks.py {WORK} --seconds 20 {HALVES} --labels none {THREE}\n"
    f"blocks.py {WORK} --seconds 10 {HALVES} --labels unseen --dataset {files(KANG)}",
    "aot_cpu.json": f"aot.py {WORK} --seeds 0 1 {THREE}",
    "gene_sets_cpu.json": f"gene_sets.py {WORK} {THREE}",
    "reproduction_cpu.json": f"reproduce.py {WORK} --dataset all --budget_minutes 65 --device cpu",
    "reproduction_long_cpu.json": f"reproduce.py {WORK}/long --dataset {KANG} --models White-Box DiT --num_seeds 1 "
    "--train_minutes 25 --device cpu",
}


def state() -> str:
    """The hash of src/ in the commit. Raises `SystemExit` if src/ or benchmarks/ have changes since."""
    git = ["git", "-C", ROOT]
    if subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src", "benchmarks"]).returncode:
        raise SystemExit("src/ or benchmarks/ have uncommitted changes: commit them, so that numbers have a state.")
    return subprocess.run([*git, "rev-parse", "--short", "HEAD:src"], capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, help="Folder for pipelines, environments and files in the making.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="Folder of the datasets.")
    parser.add_argument("--only", nargs="+", choices=list(NUMBERS), default=list(NUMBERS), help="Files to make.")
    parser.add_argument("--list", action="store_true", help="Say of which state each file is. Nothing is made.")
    args = parser.parse_args()
    made_path, now = RESULTS / "made.json", state()
    made = json.loads(made_path.read_text()) if made_path.exists() else {}
    if args.list or args.work_dir is None:
        for name in NUMBERS:
            of = made.get(name, "an unknown state" if (RESULTS / name).exists() else "nothing: it was never made")
            print(f"{name}: {'this state' if of == now else of}")
        return
    work = (args.work_dir / now).absolute()
    for name in args.only:
        if made.get(name) == now:
            continue
        output = work / "results" / name
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            for command in NUMBERS[name].format(data=args.data.absolute(), work=work).splitlines():
                words = [sys.executable, *shlex.split(f"benchmarks/{command}"), "--output", str(output)]
                print(shlex.join(words), flush=True)
                subprocess.run(words, cwd=ROOT, check=True)
        except subprocess.CalledProcessError:
            print(f"{name} was not made: its command failed.", flush=True)
            continue
        os.replace(output, RESULTS / name)
        made[name] = now
        write_whole(made_path, lambda path: path.write_text(json.dumps(made, indent=1) + "\n"))


if __name__ == "__main__":
    main()
