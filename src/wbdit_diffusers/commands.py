"""What the commands of `wbdit` do. Each returns its result for machines (`--json`), and what it says to people."""

import argparse
import os
from pathlib import Path
from typing import Any


Result = tuple[Any, str]

NUM_SAMPLES = 3  # of a model, if the command does not say how many
NUM_LOOKED_AT = 20  # cells with a name that training and held-out cells have in common


def check_folder(path: Path):
    """Raises an `OSError` if a folder can't be written to, before the work whose results it is for; makes none."""
    existing = next(one for one in [path, *path.absolute().parents] if one.exists())
    if not existing.is_dir():
        raise OSError(f"{existing} is no folder: give another path.")
    if not os.access(existing, os.W_OK):
        raise OSError(f"{existing} cannot be written to: give another path.")


def _quiet():
    """Turns off the bars and warnings of Diffusers while models load."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_pipeline(model: str, device: str | None = "cpu"):
    """The pipeline that a command names, on a device."""
    from .pipelines import ScRNAGenerationPipeline
    from .pipelines.generate import choose_device

    _quiet()
    return ScRNAGenerationPipeline.from_pretrained(model).to(choose_device(device))


def generate(args: argparse.Namespace) -> Result:
    from .flags import make_config
    from .pipelines.generate import GenerateConfig
    from .pipelines.generate import generate as generate_cells

    conditions = dict(condition.split("=", 1) for condition in args.conditions)
    names = ("model", "output", "num_cells", "num_processes", "cell_types", "guidance_scale", "num_inference_steps")
    names += ("batch_size", "seed", "scheduler", "device")
    values = {name: getattr(args, name) for name in names}
    num_cells, num_genes = generate_cells(make_config(GenerateConfig, values | {"conditions": conditions}))
    result = {"output": args.output, "num_cells": num_cells, "num_genes": num_genes}
    return result, f"{num_cells} cells × {num_genes} genes in {args.output}."


def evaluate(args: argparse.Namespace) -> Result:
    import matplotlib

    matplotlib.use("Agg")
    check_folder(args.output_dir)
    if args.num_samples is not None and args.num_samples < 1:
        raise ValueError(f"--num_samples is at least 1, not {args.num_samples}.")
    from .evaluation import evaluate_cells, to_json, to_markdown
    from .evaluation.figure import report_figure

    samples, train, test, settings = _cells_of_model(args) if args.model is not None else _cells_of_files(args)
    report = evaluate_cells(
        *(samples, train, test), donor_key=args.donor_key, parity=args.parity, seed=args.seed, **settings
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(to_json(report))
    table = to_markdown(report)
    (args.output_dir / "report.md").write_text(table)
    figure = report_figure(test, samples[0], report["label_key"], settings["values"], settings.get("layer"))
    figure.savefig(args.output_dir / "report.png", dpi=110)
    return report, f"{table}\nWritten to {args.output_dir}: report.json, report.md, report.png."


def _cells_of_model(args: argparse.Namespace) -> tuple[list, Any, Any, dict[str, Any]]:
    """Samples of a trained model, its training and held-out cells, and how they are to be judged."""
    from .data import CellSplit
    from .evaluation import draw_baselines, draw_samples

    if args.dataset is None:
        raise ValueError("A model is judged on the file that it was trained on: give --dataset.")
    for name in ("generated", "train", "test", "label_key", "values"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} has no effect on a model, which knows its own cells and labels: leave it out.")
    train, test = CellSplit.load(args.model).read(args.dataset)
    pipe = load_pipeline(args.model, args.device)
    pipe.set_progress_bar_config(desc="Generating", unit=" steps", disable=None)  # only at a terminal
    call = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    num_samples = args.num_samples or NUM_SAMPLES
    samples, test = draw_samples(pipe, test, num_samples, args.seed, **call)
    config = pipe.processor.config
    baselines = None if args.baselines is False else draw_baselines(pipe, train, test, num_samples, args.seed)
    settings = {"label_key": list(config.label_keys), "values": config.values, "layer": config.layer}
    return samples, train, test, settings | {"baselines": baselines}


def _cells_of_files(args: argparse.Namespace) -> tuple[list, Any, Any, dict[str, Any]]:
    """The same for cells of any generator."""
    from .data import read_cells

    if None in (args.generated, args.train, args.test):
        raise ValueError("Give a model and --dataset, or all of --generated, --train and --test.")
    given = {"dataset": args.dataset, "num_samples": args.num_samples, "baselines": args.baselines}
    given |= {"num_inference_steps": args.num_inference_steps, "device": args.device}
    given["guidance_scale"] = None if args.guidance_scale == 1.0 else args.guidance_scale
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} has no effect on --generated files: leave it out.")
    samples = [read_cells(path) for path in args.generated]
    settings = {"label_key": args.label_key, "values": args.values or "counts"}
    train, test = read_cells(args.train), read_cells(args.test)
    check_apart(train, test)
    return samples, train, test, settings


def check_apart(train: Any, test: Any):
    """Raises a `ValueError` if the held-out cells are among the training cells: their names are, and their values."""
    names = test.obs_names[test.obs_names.isin(train.obs_names)][:NUM_LOOKED_AT]
    is_unique = train.obs_names.is_unique and test.obs_names.is_unique
    if not len(names) or not is_unique or not train.var_names.equals(test.var_names):
        return
    if train.X is None or test.X is None:
        return
    if all(abs(train[name].X - test[name].X).sum() == 0 for name in names):
        raise ValueError(
            f"--train and --test both have the cell {names[0]!r}: give held-out cells that were not trained on."
        )


def compare(args: argparse.Namespace) -> Result:
    import matplotlib

    matplotlib.use("Agg")
    check_folder(args.output_dir)
    from .evaluation import compare_cells, comparison_to_markdown, to_json
    from .evaluation.figure import comparison_figure

    generators, train, test, settings = _generators(args)
    report = compare_cells(generators, train, test, seed=args.seed, **settings)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "comparison.json").write_text(to_json(report))
    table = comparison_to_markdown(report)
    (args.output_dir / "comparison.md").write_text(table)
    figure = comparison_figure(report, generators, test, settings["values"], settings["layer"])
    figure.savefig(args.output_dir / "comparison.png", dpi=110)
    return report, f"{table}\nWritten to {args.output_dir}: comparison.json, comparison.md, comparison.png."


def _generators(args: argparse.Namespace) -> tuple[dict[str, list], Any, Any, dict[str, Any]]:
    """Samples of each generator by name, the training and held-out cells, and how they are to be judged."""
    from .data import CellSplit, read_cells
    from .evaluation import draw_samples
    from .evaluation.samples import cells_to_judge
    from .pretrained import locate

    paths: dict[str, list[str]] = {}
    for text in args.generators:
        name, equals, path = text.partition("=")
        if Path(text).exists() or not equals:
            name, path = Path(text).name if Path(text).is_dir() else Path(text).stem, text
            if name in paths:
                raise ValueError(f"Two generators are called {name!r}: give them names, as NAME=PATH.")
        if not name or not path:
            raise ValueError(f"{text!r} is not of the form NAME=PATH, nor the path of a file or a folder.")
        paths.setdefault(name, []).append(locate(path))
    models = {name: given[0] for name, given in paths.items() if (Path(given[0]) / "model_index.json").is_file()}
    for name in models:
        if len(paths[name]) > 1:
            raise ValueError(f"{name!r} is a model and is named twice: --num_samples says how many samples it draws.")
    if not models and (args.guidance_scale, args.num_inference_steps, args.device) != (1.0, None, None):
        raise ValueError(
            "--guidance_scale, --num_inference_steps and --device have no effect on files: leave them out."
        )
    splits = {name: CellSplit.load(model) for name, model in models.items()}
    if args.dataset is not None:
        if not splits or args.train is not None or args.test is not None:
            raise ValueError("--dataset is split as a model among the generators says: else give --train and --test.")
        for name, split in splits.items():
            if split != next(iter(splits.values())):
                raise ValueError(
                    f"{name!r} was trained on other cells than {next(iter(splits))!r}: train both with one --split."
                )
        train, test = next(iter(splits.values())).read(args.dataset)
    elif args.train is not None and args.test is not None:
        train, test = read_cells(args.train), read_cells(args.test)
        check_apart(train, test)
        if splits and not test.obs_names.is_unique:
            raise ValueError("Cells of --test have one name: call `adata.obs_names_make_unique()`.")
        for name, split in splits.items():
            if split.prepared is not None or set(split.train) != set(train.obs_names):
                raise ValueError(
                    f"{name!r} was trained on other cells than --train, or on a prepared folder: give --dataset."
                )
    else:
        raise ValueError("Give --train and --test; or --dataset, with a model among the generators.")

    held_out, num_held_out = test.obs_names, test.n_obs
    pipes = {name: load_pipeline(model, args.device) for name, model in models.items()}
    settings: dict[str, Any] = {"label_key": args.label_key, "values": args.values or "counts", "layer": None}
    for name, pipe in pipes.items():
        if args.label_key is not None or args.values is not None:
            raise ValueError(
                "--label_key and --values have no effect beside a model, which knows its own: leave them out."
            )
        config = pipe.processor.config
        own = {"label_key": list(config.label_keys), "values": config.values, "layer": config.layer}
        if name != next(iter(pipes)) and own != settings:
            raise ValueError(
                f"{name!r} was trained on other labels or values than {next(iter(pipes))!r}: compare them one by one."
            )
        settings = own
        test = cells_to_judge(test, pipe.processor.knows_labels(test))
    if args.num_samples is not None and args.num_samples < 1:
        raise ValueError(f"--num_samples is at least 1, not {args.num_samples}.")
    num_files = [len(given) for name, given in paths.items() if name not in pipes]
    if args.num_samples is not None and num_files:
        raise ValueError("--num_samples has no effect beside files, of which a model draws as many: leave it out.")
    num_samples = max(num_files, default=args.num_samples or NUM_SAMPLES)
    call = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    generators, rows = {}, slice(None) if test.n_obs == num_held_out else held_out.get_indexer(test.obs_names)
    for name, given in paths.items():
        if name in pipes:
            pipes[name].set_progress_bar_config(desc=f"Generating {name}", unit=" steps", disable=None)
            generators[name], _ = draw_samples(pipes[name], test, num_samples, args.seed, **call)
        else:
            samples = [read_cells(path) for path in given]
            # Of cells for all held-out ones, those for the ones that models are judged on.
            generators[name] = [sample[rows] if sample.n_obs == num_held_out else sample for sample in samples]
    return generators, train, test, settings


def programs(args: argparse.Namespace) -> Result:
    import pandas as pd

    from .models import ProgramCodec
    from .pipelines.programs import program_table

    if args.output is not None:
        check_folder(args.output.parent)
        if args.output.exists() and not args.output.is_file():
            raise OSError(f"{args.output} is no file, and is not replaced: give another path.")
    pipe = load_pipeline(args.model)
    if not isinstance(pipe.codec, ProgramCodec):
        raise ValueError(f"{args.model} has no gene programs: it was trained with {type(pipe.codec).__name__}.")
    if args.num_genes < 1:
        raise ValueError(f"--num_genes is at least 1, not {args.num_genes}.")
    var_names = pipe.processor.var_names
    table = program_table(pipe.codec, var_names, args.num_genes)
    lines = [f"{name} ({row.explained:.1%})\n  up:   {row.up}\n  down: {row.down}" for name, row in table.iterrows()]
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(pipe.codec.loadings.numpy(), var_names.rename("gene"), table.index).to_csv(args.output)
        lines.append(f"The loadings of {len(var_names)} genes are in {args.output}.")
    result = {str(name): {key: row[key] for key in ("explained", "up", "down")} for name, row in table.iterrows()}
    return result, "\n".join(lines)


def explain(args: argparse.Namespace) -> Result:
    import matplotlib

    matplotlib.use("Agg")
    from .data import CellSplit
    from .interpretation import explain as measure
    from .interpretation.page import write_report

    check_folder(args.output_dir)
    if args.max_cells < 20:
        raise ValueError(f"--max_cells is at least 20, not {args.max_cells}.")
    train, test = CellSplit.load(args.model).read(args.dataset)
    pipe = load_pipeline(args.model)
    report, cells = measure(pipe, train, test, args.max_cells, args.seed)
    write_report(args.output_dir, report, cells, Path(args.model).resolve().name)
    page = args.output_dir / "explain.html"
    return report, f"Look at {page}; the numbers are in explain.json, the cells in explain.h5ad."


def push(args: argparse.Namespace) -> Result:
    from .hub import publish
    from .pretrained import locate

    folder = locate(args.model)
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {args.model}: give the --output_dir of a training.")
    settings = {
        name: value for name, value in vars(args).items() if name not in ("command", "json", "model", "repo_id")
    }
    where = publish(load_pipeline(folder), folder, args.repo_id, **settings)
    said = f"Written to {where}; nothing was uploaded." if args.dry_run else f"Published: {where}"
    return {"folder" if args.dry_run else "address": where}, said


def prepare(args: argparse.Namespace) -> Result:
    from .data import PrepareConfig
    from .data import prepare as prepare_cells

    if args.hub_dataset_id is not None and not args.push_to_hub:
        raise ValueError("--hub_dataset_id has no effect without --push_to_hub.")
    names = ("layer", "values", "label_keys", "genes", "file_key", "min_counts", "min_genes", "test_fraction", "seed")
    config = PrepareConfig(**{name: getattr(args, name) for name in names})
    metadata = prepare_cells(args.files, args.output, config)
    sizes = {split: sum(files.values()) for split, files in metadata["splits"].items()}
    described = ", ".join(f"{number} {split}" for split, number in sizes.items())
    result = {"output": str(args.output), "num_genes": metadata["num_genes"], "num_cells": sizes}
    said = f"{sum(sizes.values())} cells ({described}) × {metadata['num_genes']} genes in {args.output}."
    if args.push_to_hub:
        from huggingface_hub import create_repo, upload_folder

        repo_id = create_repo(args.hub_dataset_id or args.output.name, repo_type="dataset", exist_ok=True).repo_id
        upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=args.output, commit_message="wbdit prepare")
        result["address"] = f"hf://datasets/{repo_id}"
        said += f"\nUploaded: hf://datasets/{repo_id}"
    return result, said


def fetch(args: argparse.Namespace) -> Result:
    from .data.public import RECIPES
    from .data.public import fetch as fetch_cells
    from .data.writer import check_output

    if args.dataset == "list":
        sources = {name: recipe.source for name, recipe in RECIPES.items()}
        return sources, "\n".join(f"{name}: {source}" for name, source in sources.items())
    output = args.output or Path(f"{args.dataset}.h5ad")
    if args.dataset in RECIPES:
        check_output(output)
    cells = fetch_cells(args.dataset, args.folder / args.dataset)
    cells.write_h5ad(output)
    result = {"output": str(output), "num_cells": cells.n_obs, "num_genes": cells.n_vars}
    return result, f"{cells.n_obs} cells × {cells.n_vars} genes in {output}: {RECIPES[args.dataset].source}."


def app(args: argparse.Namespace) -> Result:
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The page needs Gradio: pip install "wbdit_diffusers[app]".')
    from .app import launch

    _quiet()
    launch(args.model, args.host, args.port)
    return None, "The page is closed."
