"""The `wbdit` command. Each command is a function of a dataclass, whose fields are its flags."""

import argparse
import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from .configs import EvaluateConfig, GenerateConfig, Model, PrepareConfig
from .files import one_line, write_whole
from .flags import FlagParser, Seed, add_flags, did_you_mean, make_config, pydantic_config
from .training.config import TrainingConfig, read_config
from .version import __version__


Result = tuple[dict[str, Any], str]  # for --json, and for people


def generate(config: GenerateConfig) -> Result:
    """Generate cells and write them to a file.

    If the command is interrupted, run it again: it continues where it stopped.

        wbdit generate pbmc68k_reduced --num_cells 5000 --output cells.h5ad
        wbdit generate wbdit-cells --cell_types "B cell" NK --conditions condition=STIM --output b.h5ad
    """
    from .pipelines.generate import generate

    num_cells, num_genes = generate(config)
    result = {"output": str(config.output), "num_cells": num_cells, "num_genes": num_genes}
    return result, f"{num_cells} cells × {num_genes} genes in {config.output}."


def train(config: TrainingConfig) -> Result:
    """Train on cells and write a pipeline.

    `accelerate launch training/train.py` takes the same flags and trains on several devices.

        wbdit train --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells
        wbdit train --dataset cells.h5ad --config paper --output_dir wbdit-paper
    """
    import logging

    from .training import train

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for name in ("httpx", "accelerate"):  # they log each request, and each file of a checkpoint
        logging.getLogger(name).setLevel(logging.WARNING)
    train(None, config)
    folder = str(config.output_dir)
    steps = [f"wbdit generate {folder} --output new-cells.h5ad", f"wbdit evaluate {folder} --dataset {config.dataset}"]
    return {"output_dir": folder}, "\n    ".join([f"The pipeline is in {folder}. Next:", *steps])


def evaluate(config: EvaluateConfig) -> Result:
    """Compare generated cells with held-out cells, for one generator or several.

    The folder of a model records which cells of --dataset were held out.

        wbdit evaluate wbdit-cells --dataset cells.h5ad --output_dir report
        wbdit evaluate ours=wbdit-cells scvi=scvi-1.h5ad scvi=scvi-2.h5ad --dataset cells.h5ad
        wbdit evaluate a.h5ad b.h5ad --train train.h5ad --test test.h5ad --label_keys cell_type
    """
    from .evaluation.run import run

    return run(config)


@dataclass(config=pydantic_config, kw_only=True)
class AugmentConfig:
    model: Model
    dataset: str
    """File of the real cells."""
    cell_types: list[str]
    """Types that get generated cells."""
    output: Path
    """The .h5ad file, .zarr folder, or folder for parquet files to write."""
    num_cells: PositiveInt | None = None
    """Number of cells that each of these types has then. Default: that of the median type."""
    seed: Seed = 0
    """Seed of the generated cells."""


def augment(config: AugmentConfig) -> Result:
    """Add generated cells of rare types to real cells.

    obs["generated"] distinguishes them.

        wbdit augment wbdit-cells --dataset train.h5ad --cell_types pDC Mk --output augmented.h5ad
    """
    import torch

    from .data import read_cells
    from .data.write import check_output, write_cells
    from .pipelines import ScRNAGenerationPipeline, augment

    output, generator = check_output(config.output), torch.Generator().manual_seed(config.seed)
    pipe = ScRNAGenerationPipeline.from_pretrained(config.model)
    cells = augment(pipe, read_cells(config.dataset), config.cell_types, config.num_cells, generator)
    write_cells(output, [cells])
    number = int(cells.obs["generated"].sum())
    result = {"output": str(output), "num_cells": cells.n_obs, "num_generated": number}
    return result, f"{cells.n_obs - number} real and {number} generated cells in {output}."


@dataclass(config=pydantic_config, kw_only=True)
class ProgramsConfig:
    model: Model
    output: Path | None = None
    """The .csv file for the loadings of all genes and programs. Default: none."""
    num_genes: PositiveInt = 10
    """Number of genes to list for each program."""


def programs(config: ProgramsConfig) -> Result:
    """List the gene programs of a model, with the genes that each one raises and lowers.

    With --output, the command also writes the loadings of all genes.

        wbdit programs pbmc68k_reduced
        wbdit programs wbdit-cells --num_genes 20 --output loadings.csv
    """
    import pandas as pd

    from .pipelines import ScRNAGenerationPipeline
    from .pipelines.programs import program_table

    if config.output is not None and config.output.exists():
        raise FileExistsError(f"{config.output} exists: give another --output.")
    pipe = ScRNAGenerationPipeline.from_pretrained(config.model)
    var_names = pipe.processor.var_names
    table = program_table(pipe.codec, var_names, config.num_genes)
    lines = [f"{name} ({row.explained:.1%})\n  up:   {row.up}\n  down: {row.down}" for name, row in table.iterrows()]
    if config.output is not None:
        loadings = pd.DataFrame(pipe.codec.loadings.numpy(), var_names.rename("gene"), table.index)
        write_whole(config.output, loadings.to_csv)
        lines.append(f"The loadings of {len(var_names)} genes are in {config.output}.")
    return table[["explained", "up", "down"]].to_dict("index"), "\n".join(lines)


@dataclass(config=pydantic_config, kw_only=True)
class ExplainConfig:
    model: Model
    dataset: str
    """File or prepared folder that the model was trained on."""
    output_dir: Path = Path("explain")
    """Folder to write."""
    max_cells: Annotated[int, Field(ge=20)] = 3000
    """Maximum number of held-out cells to use."""
    seed: Seed = 0
    """Seed of all random numbers."""


def explain(config: ExplainConfig) -> Result:
    """Look inside a model: its programs, layers, decisions and interventions.

    Everything is measured on held-out cells, next to a control. The command writes a page with
    figures (explain.html), the numbers (explain.json) and the cells (explain.h5ad).

        wbdit explain wbdit-cells --dataset cells.h5ad --output_dir inside
    """
    from .data import CellSplit
    from .interpretation import explain
    from .interpretation.page import write_report
    from .pipelines import ScRNAGenerationPipeline

    train, test = CellSplit.load(config.model).read(config.dataset)
    pipe = ScRNAGenerationPipeline.from_pretrained(config.model)
    config.output_dir.mkdir(parents=True, exist_ok=True)  # so that it fails before the long part
    report, cells = explain(pipe, train, test, config.max_cells, config.seed)
    write_report(config.output_dir, report, cells, Path(config.model).resolve().name)
    return report, f"Open {config.output_dir}/explain.html; explain.json and explain.h5ad hold its numbers and cells."


@dataclass(config=pydantic_config, kw_only=True)
class PushConfig:
    model: Model
    repo_id: str
    """Repository on the Hub, such as me/wbdit-pbmc."""
    private: bool = False
    """Make a private repository."""
    dry_run: Path | None = None
    """New folder to write instead of uploading."""
    data_name: str | None = None
    """Name of the training data on the model card."""
    data_license: str | None = None
    """License of the training data."""
    data_source: str | None = None
    """Accession or address of the training data."""
    report: Path | None = None
    """Report of `wbdit evaluate`. Default: the one in the model's folder, if there is one."""


def push(config: PushConfig) -> Result:
    """Publish a model on the Hugging Face Hub, with a model card.

    Cell names, checkpoints and logs are not uploaded.

        wbdit push wbdit-pbmc --repo_id me/wbdit-pbmc --report report --data_name "PBMC 3k" --data_license "CC BY 4.0"
        wbdit push wbdit-pbmc --repo_id me/wbdit-pbmc --dry_run repository
    """
    from .hub import publish
    from .pipelines import ScRNAGenerationPipeline
    from .pretrained import locate

    settings = vars(config).copy()
    folder = locate(settings.pop("model"))
    where = publish(ScRNAGenerationPipeline.from_pretrained(folder), folder, **settings)
    text = f"Written to {where}; nothing was uploaded." if config.dry_run else f"Published: {where}"
    return {"address": where}, text


def prepare(config: PrepareConfig) -> Result:
    """Turn AnnData files of any size into one shuffled dataset of parquet files.

    `wbdit train --dataset FOLDER` trains on it, and `datasets.load_dataset` reads it.

        wbdit prepare atlas/*.h5ad --label_keys cell_type --file_key sample --output_dir atlas-prepared
    """
    from .data.prepare import prepare

    metadata, folder = prepare(config), config.output_dir
    sizes = {split: sum(map(sum, files.values())) for split, files in metadata["splits"].items()}
    result = {"output_dir": str(folder), "num_genes": metadata["num_genes"], "num_cells": sizes}
    text = ", ".join(f"{number} {split}" for split, number in sizes.items())
    text = f"{sum(sizes.values())} cells ({text}) × {metadata['num_genes']} genes in {folder}."
    return result, text


@dataclass(config=pydantic_config, kw_only=True)
class AppConfig:
    model: Model | None = None
    """Pipeline to start with: a folder, a Hub id, or the pipeline in this package (the default)."""
    host: str = "127.0.0.1"
    """Address to listen on. The default address is reachable from this machine only."""
    port: Annotated[int, Field(gt=0, lt=2**16)] | None = None
    """Port to listen on. Default: the first free one from 7860."""


def app(config: AppConfig) -> Result:
    """Serve a page in the browser: generate, compare, train on small files.

    The page runs on this machine and sends nothing elsewhere.

        wbdit app
        wbdit app --model wbdit-cells --port 7860
    """
    try:
        from .app import launch
    except ModuleNotFoundError as error:
        raise ValueError('The page needs Gradio: pip install "wbdit_diffusers[app]".') from error
    launch(config.model, config.host, config.port)
    return {}, "The page is closed."


POSITIONAL = ("model", "generators", "files")  # required fields that are given without a flag
CONFIG_HELP = (
    "YAML files of flags, or names of configs in this package: paper. Flags override files, and later files override"
    " earlier ones."
)
COMMON = ("dataset", "label_keys", "output_dir", "max_train_steps", "max_train_minutes")  # first in the help
COMMANDS: dict[str, tuple[Callable[..., Result], Any]] = {
    "generate": (generate, GenerateConfig),
    "augment": (augment, AugmentConfig),
    "train": (train, TrainingConfig),
    "evaluate": (evaluate, EvaluateConfig),
    "compare": (evaluate, EvaluateConfig),
    "programs": (programs, ProgramsConfig),
    "explain": (explain, ExplainConfig),
    "push": (push, PushConfig),
    "prepare": (prepare, PrepareConfig),
    "app": (app, AppConfig),
}


def parse(name: str, argv: Sequence[str]) -> tuple[Any, bool]:
    """The configuration of a command, and whether its result is printed as JSON. Raises a `ValueError`."""
    run, config_class = COMMANDS[name]
    formatter = argparse.RawDescriptionHelpFormatter
    usage, text = "%(prog)s [flags]", inspect.getdoc(run)
    parser = FlagParser(f"wbdit {name}", usage, text, formatter_class=formatter, allow_abbrev=False)
    add_flags(parser, config_class, POSITIONAL, COMMON)
    if name == "train":
        parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help=CONFIG_HELP)
    if name != "app":
        parser.add_argument("--json", action="store_true", help="Print the result as JSON, and nothing else.")
    values = parser.parse(argv)
    as_json = values.pop("json", False)
    for path in reversed(values.pop("config", [])):  # a later file overrides an earlier one
        values = read_config(path) | values
    return make_config(config_class, values, POSITIONAL), as_json


def main(argv: Sequence[str] | None = None):
    """Runs a command. A mistake of the user ends in one line and exit code 2, Ctrl-C in exit code 130."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # no windows
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "--version"):
        return print(f"wbdit {__version__}" if name == "--version" else _overview())
    try:
        if name not in COMMANDS:
            raise ValueError(f"there is no such command{did_you_mean(name, COMMANDS)}")
        config, as_json = parse(name, rest)
        from diffusers.utils import logging

        logging.disable_progress_bar()  # of Diffusers, while it loads models
        logging.set_verbosity_error()
        result, text = COMMANDS[name][0](config)
        if as_json:
            from .evaluation import to_json

            text = to_json(result, indent=None)
        _print(text, sys.stdout)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "signal_number", signal.SIGINT)  # a training also ends by SIGTERM
        how = "Run the same command with --resume_from_checkpoint latest to continue."
        _print(f"wbdit {name}: interrupted. {how if name == 'train' else interrupt}".rstrip(), sys.stderr)
        sys.exit(128 + number)
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # that of PyTorch
            reason = f"out of memory: use a smaller batch size or fewer genes ({reason})."
        elif not isinstance(error, ValueError | OSError) and type(error).__module__ != "httpx":  # no connection
            raise
        _print(f"wbdit {name}: {reason}", sys.stderr)
        sys.exit(2)


def _overview() -> str:
    """The help of `wbdit`."""
    head = ["usage: wbdit COMMAND [flags]", "", "Realistic single cells from a white-box diffusion model.", ""]
    lines = [f"  {name:10}{(inspect.getdoc(run) or '').splitlines()[0]}" for name, (run, _) in COMMANDS.items()]
    tail = ["", "`wbdit COMMAND --help` describes the flags of a command. `wbdit --version` prints the version."]
    return "\n".join([*head, "commands:", *lines, *tail])


def _print(text: str, file: Any):
    """Prints, in the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file)


if __name__ == "__main__":
    main()
