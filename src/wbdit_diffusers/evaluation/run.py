"""`wbdit evaluate`: models and files of cells judged on held-out cells, as a report, a table and a figure."""

import os
from pathlib import Path

import anndata as ad
import numpy as np
from diffusers.utils import logging

from ..configs import EvaluateConfig
from ..data import AnnDataSource, CellSplit, read_cells
from ..data.cells import check_unique, find_matrix, hash_rows, sorted_csr
from ..files import write_whole
from ..pipelines import ScRNAGenerationPipeline
from ..pipelines.generate import choose_device
from ..pretrained import locate
from ..progress import bar_options
from .cells import combined_labels
from .report import common_genes, evaluate_cells
from .samples import cells_to_judge, draw_baselines, draw_samples
from .table import GENERATED, by_excess, excess_and_sd, summary, to_json, to_markdown


logger = logging.get_logger(__name__)

MIN_GENES = 20  # expressed: cells with fewer may be equal by chance


def run(config: EvaluateConfig) -> tuple[dict, str]:
    """Judges generators and writes report.json, report.md and report.png. Returns the report and a text to print."""
    from .figure import report_figure

    folder = config.output_dir
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"{existing} is not a folder that can be written to: give another --output_dir.")
    paths = _paths_by_name(config.generators)
    models = {name: given[0] for name, given in paths.items() if (Path(given[0]) / "model_index.json").is_file()}
    train, test = _read_split(config, models)
    device = choose_device(config.device)
    pipes = {name: ScRNAGenerationPipeline.from_pretrained(path).to(device) for name, path in models.items()}
    configs = (pipe.processor.config for pipe in pipes.values())
    kinds = [(list(own.label_keys), own.values, own.layer, own.round_counts) for own in configs]
    label_keys, values, layer, round_counts = kinds[0] if kinds else (config.label_keys, config.values, None, False)
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{', '.join(pipes)} have different labels or values: judge them one by one.")
    sources = [AnnDataSource(cells, layer, "The data of real cells", round_counts) for cells in (train, test)]
    train, test = (source.read() for source in sources)
    for name, adata in (("The training data", train), ("The held-out data", test)):
        combined_labels(adata, [*label_keys, *filter(None, [config.donor_key])], name)
    is_copy = _copies(train, test, layer)
    known, fresh = np.ones(test.n_obs, dtype=bool), np.flatnonzero(~is_copy)
    for pipe in pipes.values():
        known &= pipe.processor.knows_labels(test)
    judged = fresh[cells_to_judge(known[fresh])]
    samples = {}
    for name in [name for name in paths if name not in pipes]:
        drawn = [read_cells(path) for path in paths[name]]
        for sample in drawn:
            combined_labels(sample, label_keys, repr(name))
        # Files have a cell for each held-out cell, including those that are not judged.
        samples[name] = [sample[judged] if sample.n_obs == test.n_obs else sample for sample in drawn]
    test = test[judged]
    if samples:
        common_genes(samples, train, test)
    call = {"guidance_scale": config.guidance_scale, "num_inference_steps": config.num_inference_steps}
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(**bar_options(desc=f"Generating {name}", unit=" steps"))
        samples[name], _ = draw_samples(pipe, test, config.num_samples, config.seed, **call)
    samples = {name: samples[name] for name in paths}
    if len(samples) == 1:
        samples = {GENERATED: samples.popitem()[1]}
    baselines = None
    if config.baselines and len(pipes) == 1:
        (pipe,) = pipes.values()
        baselines = draw_baselines(pipe, train, test, config.num_samples, config.seed)
    report = evaluate_cells(samples, train, test, label_keys, layer, values, baselines, config.donor_key, config.seed)
    report["num_copies"] = int(is_copy.sum())
    first = {f"{name}: excess {excess_and_sd(report, name)}": samples[name][0] for name in by_excess(report)}
    figure = report_figure(test, first, report["label_key"], values, layer)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", lambda path: path.write_text(to_json(report)))
    write_whole(folder / "report.md", lambda path: path.write_text(to_markdown(report)))
    write_whole(folder / "report.png", lambda path: figure.savefig(path, dpi=110, format="png"))
    return report, f"{summary(report)}\n\nAll metrics are in {folder}: report.json, report.md, report.png."


def _paths_by_name(generators: list[str]) -> dict[str, list[str]]:
    """The paths of each generator."""
    paths: dict[str, list[str]] = {}
    for text in generators:
        name, equals, path = text.partition("=")
        if Path(text).exists() or not equals:
            name, path = Path(text).name if Path(text).is_dir() else Path(text).stem, text
            if name in paths:
                raise ValueError(f"Two generators are called {name!r}: name them, as in NAME=PATH.")
        if not Path(locate(path)).exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
        paths.setdefault(name, []).append(locate(path))
    return paths


def _read_split(config: EvaluateConfig, models: dict[str, str]) -> tuple[ad.AnnData, ad.AnnData]:
    """Training and held-out cells."""
    splits = {name: CellSplit.load(model) for name, model in models.items()}
    first = next(iter(splits), "")
    if config.dataset is not None and splits:
        train, test = splits[first].read(config.dataset)
    elif config.train is None or config.test is None:
        raise ValueError("Give --dataset for a model, or --train and --test for files.")
    else:
        train, test = read_cells(config.train), read_cells(config.test)
    for name, split in splits.items():
        if split != splits[first] or (config.dataset is None and set(split.train) != set(train.obs_names)):
            other = "--train" if config.dataset is None else repr(first)
            raise ValueError(f"{name!r} was trained on other cells than {other}: give --dataset, and use one --split.")
    return train, test


def _copies(train: ad.AnnData, test: ad.AnnData, layer: str | None) -> np.ndarray:
    """Mask `(cells,)` of the held-out cells with the values of a training cell, with a warning."""
    genes, matrices = train.var_names.intersection(test.var_names), []
    for name, adata in (("training", train), ("held-out", test)):
        check_unique(adata.var_names, "gene", f" in the {name} cells")
        part = adata[:, genes]
        matrices.append(sorted_csr(find_matrix(part.X, part.layers, layer, f"The data of {name} cells")))
    known, found = map(hash_rows, matrices)
    is_copy = np.isin(found, known) & (np.diff(matrices[1].indptr) >= MIN_GENES)
    which = f"{is_copy.sum()} of {test.n_obs} held-out cells have the values of a training cell"
    if is_copy.all():
        raise ValueError(f"{which}: give held-out cells that training has not seen.")
    if is_copy.any():
        logger.warning(f"{which} ({test.obs_names[is_copy][0]!r} first): they are left out.")
    return is_copy
