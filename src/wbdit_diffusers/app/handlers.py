"""The functions behind the controls of the page."""

import contextlib
import functools
import html
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import gradio as gr
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..data.read import load_pbmc
from ..evaluation.figure import GENERATED, REAL
from ..files import one_line
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from .compare import DPI, make_groups, map_figure, marker_figure, program_figure, quick_test
from .run import TrainingRun
from .uploads import label_columns, read_upload


MAX_TRAINING_CELLS = 5000
BATCH_SIZE = 256
NOTHING, PBMC, FILE = "nothing", "PBMCs", "my file"  # to compare with
NO_TYPES = ("(none)", "")  # a choice and its value

running: dict[str, TrainingRun] = {}  # by browser session
read = functools.lru_cache(maxsize=2)(read_upload)
pbmc = functools.cache(load_pbmc)


@contextlib.contextmanager
def errors_on_page() -> Iterator[None]:
    """Shows an error as a message of one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = html.escape(one_line(error), quote=False)
        raise gr.Error(message, duration=20, title="This did not work", print_exception=False) from None


# ==================== Pipelines and files ====================


@functools.lru_cache(maxsize=4)
def load_pipeline(model: str) -> ScRNAGenerationPipeline:
    """The pipeline of a folder, of a Hub id, or by its name in the package."""
    pipe = ScRNAGenerationPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def describe(model: str) -> tuple[str, list[str], int, str]:
    """A line about a pipeline, its cell types, its number of steps, and the cells to compare with."""
    pipe = load_pipeline(model)
    types = list(pipe.processor.config.categories[0]) if pipe.processor.label_keys else []
    facts = [f"{len(pipe.processor.var_names):,} genes", f"{len(types)} cell types" if types else "no cell types"]
    if num_programs := pipe.codec.config.get("num_programs"):
        facts.append(f"{num_programs} gene programs")
    facts.append(f"{pipe.denoiser.num_parameters():,} parameters")
    is_of_pbmc = types and set(types) <= set(pbmc().obs["cell_type"].cat.categories)
    return " · ".join(facts), types, pipe.config.num_inference_steps, PBMC if is_of_pbmc else NOTHING


@errors_on_page()
def choose_pipeline(model: str | None, source: str):
    """Describes the pipeline, and offers its cell types."""
    line, types, num_steps, fitting = describe((model or "").strip())
    return line, gr.update(choices=types, value=[]), num_steps, FILE if source == FILE else fitting


@errors_on_page()
def choose_file(path: str | None):
    """Describes an uploaded file."""
    if path is None:
        return "No file yet."
    cells = read(path)
    return f"{cells.n_obs:,} cells × {cells.n_vars:,} genes in {html.escape(Path(path).name)}"


@errors_on_page()
def choose_training_file(path: str | None):
    """Describes the training cells, and offers their columns of cell types."""
    columns = [] if path is None else label_columns(_read_training_cells(path))
    return choose_file(path), gr.update(choices=[*columns, NO_TYPES], value=columns[0] if columns else "")


def _read_training_cells(path: str | None) -> ad.AnnData:
    """Raises a `ValueError` if there are no cells, or more than the page trains on."""
    cells = None if path is None else read(path)
    if cells is None or cells.n_obs > MAX_TRAINING_CELLS:
        raise ValueError(f"Upload the counts of at most {MAX_TRAINING_CELLS:,} cells. `wbdit train` takes more.")
    return cells


# ==================== Generation ====================


def generate(
    model: str | None,
    cell_types: list[str],
    num_cells: int | None,
    guidance_scale: float,
    num_inference_steps: int,
    seed: int | None,
    method: str,
    source: str,
    upload: str | None,
    progress=gr.Progress(),  # noqa: B008  Gradio finds it here
):
    """Yields the summary, the file, three figures and the verdict, each as soon as it is ready."""
    with errors_on_page(), tempfile.TemporaryDirectory() as folder:
        model, seed, skip, start_time = (model or "").strip(), seed or 0, gr.skip(), time.monotonic()
        if not model or not num_cells or (source == FILE and not upload):
            raise ValueError("Choose a pipeline and the number of cells, and upload the file to compare with.")
        pipe = load_pipeline(model)
        real = None if source == NOTHING else pipe.processor.source(pbmc() if source == PBMC else read(upload)).read()
        steps, num_batches = itertools.count(1), -(-num_cells // BATCH_SIZE)

        def on_step_end(pipe, step, timestep, tensors) -> dict:
            progress((next(steps), num_batches * pipe.num_timesteps), desc="Denoising", unit="steps")
            return tensors

        call = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        cells = pipe(
            num_cells=num_cells,
            # Equally many cells of each type
            cell_types=[cell_types[i % len(cell_types)] for i in range(num_cells)] if cell_types else None,
            batch_size=BATCH_SIZE,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=on_step_end,
            **call,
        ).cells
        path = Path(folder) / f"wbdit-cells-seed-{seed}.h5ad"
        cells.write_h5ad(path)
        summary = f"### {cells.n_obs:,} cells × {cells.n_vars:,} genes\n{time.monotonic() - start_time:.1f} seconds"
        summary += f" · seed {seed} · {num_inference_steps} steps of {type(pipe.scheduler).__name__}"
        yield summary, gr.update(value=str(path), interactive=True), None, None, None, ""

        progress(0.2, desc="Drawing the map")
        groups, activities, genes = make_groups(pipe, cells, real)
        yield skip, skip, map_figure(groups, method), skip, skip, skip
        progress(0.5, desc="Drawing markers and programs")
        programs = program_figure(groups, activities, cells.uns["programs"]["name"]) if activities else None
        yield skip, skip, skip, marker_figure(groups, genes), programs, skip
        progress(0.7, desc="Comparing with real cells")
        verdict = quick_test(pipe, real, model, seed, **call) if real is not None else "Choose real cells on the left."
        yield skip, skip, skip, skip, skip, verdict


# ==================== Training ====================


def train(path: str | None, label_key: str, minutes: float, request: gr.Request):
    """Yields status, loss curve and archive. At the end, the pipeline and the file are chosen for comparison."""
    with errors_on_page():
        _read_training_cells(path)
        session, skip, num_points = str(request.session_hash), gr.skip(), 0
        run = running[session] = TrainingRun(str(path), label_key, minutes)
        try:
            while run.process.poll() is None:
                log = run.log()
                stage = f"step {log['step'].iloc[-1]:,}" if len(log) else "fitting the gene programs"
                figure = loss_figure(log) if len(log) > num_points else skip
                num_points = len(log)
                yield f"**Training**, {run.seconds:.0f} s: {stage}", figure, skip, skip, skip, skip
                time.sleep(1)
            if session not in running:
                yield f"**Stopped** after {run.seconds:.0f} s.", skip, skip, skip, skip, skip
                return
            archive = run.archive()
        finally:
            stop_training(request)
        yield (
            f"**Done** in {run.seconds:.0f} s. The pipeline is chosen on the first tab, with your cells to compare.",
            loss_figure(run.log()),
            gr.update(value=str(archive), interactive=True),
            gr.update(choices=[("my cells, trained here", str(run.folder))], value=str(run.folder)),
            FILE,
            path,
        )


def stop_training(request: gr.Request):
    """Stops the training of this browser session."""
    run = running.pop(str(request.session_hash), None)
    if run is not None:
        run.stop()


def loss_figure(log: pd.DataFrame) -> Figure:
    """The loss of training cells and of held-out cells by step."""
    figure = Figure(figsize=(8.2, 3.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for column, name, colour in (("loss", "training", REAL), ("validation_loss", "held-out", GENERATED)):
        if column in log:
            axis.plot(log["step"], log[column], color=colour, marker="o", markersize=3, label=f"{name} cells")
    axis.set(xlabel="step", ylabel="loss of the denoiser")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return figure
