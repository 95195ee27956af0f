"""The functions behind the controls of the page."""

import contextlib
import functools
import html
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import gradio as gr
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

from ..data.read import load_pbmc
from ..evaluation.figure import GENERATED
from ..files import one_line
from ..hub.facts import read_warning
from ..hub.publish import publish
from ..pipelines.conditions import describe_unseen
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from ..pretrained import locate
from .compare import DPI, compare_quality, make_groups, map_figure, marker_figure, program_figure
from .uploads import label_columns, read_upload


MAX_TRAINING_CELLS = 5000
BATCH_SIZE = 256
NOTHING, PBMC, FILE = "nothing", "PBMCs", "my file"  # to compare with
MAX_LABEL_KEYS = 4  # dropdowns; labels of further keys are drawn
WORKSPACE = tempfile.TemporaryDirectory(prefix="wbdit-app-")  # of trainings; is removed when the page ends

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


def describe(model: str) -> tuple[str, list[dict], int, str, bool]:
    """A line about a pipeline, its dropdowns, number of steps, cells to compare with, and if it has counts."""
    pipe = load_pipeline(model)
    named = dict(zip(pipe.processor.label_keys, pipe.processor.config.categories))
    types = list(next(iter(named.values()), []))
    facts = [f"{len(pipe.processor.var_names):,} genes", f"{len(types)} cell types" if types else "no cell types"]
    facts += [f"{len(categories)} × {key}" for key, categories in list(named.items())[1:]]
    if num_programs := pipe.codec.config.get("num_programs"):
        facts.append(f"{num_programs} gene programs")
    facts.append(f"{pipe.denoiser.num_parameters():,} parameters")
    is_of_pbmc = types and set(types) <= set(pbmc().obs["cell_type"].cat.categories)
    source, line = PBMC if is_of_pbmc else NOTHING, " · ".join(facts) + as_quote(read_warning(locate(model)))
    dropdowns = [{"label": key, "choices": list(names), "visible": True} for key, names in named.items()]
    dropdowns += [{"label": "", "choices": [], "visible": False}] * MAX_LABEL_KEYS
    return line, dropdowns[:MAX_LABEL_KEYS], pipe.config.num_inference_steps, source, pipe.processor.is_counts


def as_quote(warning: str) -> str:
    """A warning in Markdown, which the page shows in a coloured box."""
    return f"\n\n> ⚠ {html.escape(warning, quote=False)}" if warning else ""


@errors_on_page()
def choose_pipeline(model: str | None, source: str):
    """Describes the pipeline, and offers its labels."""
    line, dropdowns, num_steps, fitting, has_counts = describe((model or "").strip())
    library_size, labels = gr.update(value=None, visible=has_counts), [gr.update(value=[], **one) for one in dropdowns]
    return line, num_steps, FILE if source == FILE else fitting, library_size, *labels


@errors_on_page()
def choose_file(path: str | None):
    """Describes an uploaded file."""
    if path is None:
        return "No file yet."
    cells = read(path)
    return f"{cells.n_obs:,} cells × {cells.n_vars:,} genes in {html.escape(Path(path).name)}"


@errors_on_page()
def choose_training_file(path: str | None):
    """Describes the training cells, and offers their columns of labels."""
    columns = [] if path is None else label_columns(_read_training_cells(path))
    return choose_file(path), gr.update(choices=columns, value=columns[:1])


def _read_training_cells(path: str | None) -> ad.AnnData:
    """Raises a `ValueError` if there are no cells, or more than the page trains on."""
    cells = None if path is None else read(path)
    if cells is None or cells.n_obs > MAX_TRAINING_CELLS:
        raise ValueError(f"Upload the counts of at most {MAX_TRAINING_CELLS:,} cells. `wbdit train` takes more.")
    return cells


# ==================== Generation ====================


def generate(
    model: str | None,
    labels_1: list[str],
    labels_2: list[str],
    labels_3: list[str],
    labels_4: list[str],
    num_cells: int | None,
    library_size: float | None,
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
        model, seed, start_time = (model or "").strip(), seed or 0, time.monotonic()
        if not model or not num_cells or (source == FILE and not upload):
            raise ValueError("Choose a pipeline and the number of cells, and upload the file to compare with.")
        pipe = load_pipeline(model)
        real = None if source == NOTHING else pipe.processor.source(pbmc() if source == PBMC else read(upload)).read()
        steps, num_batches = itertools.count(1), -(-num_cells // BATCH_SIZE)

        def on_step_end(pipe, step, timestep, tensors) -> dict:
            progress((next(steps), num_batches * pipe.num_timesteps), desc="Denoising", unit="steps")
            return tensors

        call = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        chosen = zip(pipe.processor.label_keys, (labels_1, labels_2, labels_3, labels_4))
        cells = pipe(
            num_cells=num_cells,
            conditions=balance({key: labels for key, labels in chosen if labels}, num_cells),
            library_size=library_size or None,
            batch_size=BATCH_SIZE,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=on_step_end,
            **call,
        ).cells
        warning, unseen = read_warning(locate(model)), cells.uns["wbdit"].get("unseen_combinations")
        if unseen:
            warning = f"{warning} {describe_unseen(unseen)}".strip()
        if warning:
            cells.uns["wbdit"]["warning"] = warning
        path = Path(folder) / f"wbdit-cells-seed-{seed}.h5ad"
        cells.write_h5ad(path)
        summary = f"### {cells.n_obs:,} cells × {cells.n_vars:,} genes\n{time.monotonic() - start_time:.1f} seconds"
        summary += f" · seed {seed} · {num_inference_steps} steps of {type(pipe.scheduler).__name__}"
        # Everything is yielded each time: a tab that was not opened yet loses what `gr.skip` follows.
        cells_file, figures = gr.update(value=str(path), interactive=True), [None, None, None]
        yield summary + as_quote(warning), cells_file, *figures, ""

        progress(0.2, desc="Drawing the map")
        groups, activities, genes = make_groups(pipe, cells, real)
        figures[0] = map_figure(groups, method)
        yield summary + as_quote(warning), cells_file, *figures, ""
        progress(0.5, desc="Drawing markers and programs")
        figures[1] = marker_figure(groups, genes)
        figures[2] = program_figure(groups, activities, cells.uns["programs"]["name"]) if activities else None
        yield summary + as_quote(warning), cells_file, *figures, ""
        progress(0.7, desc="Three classifiers compare with real cells")
        verdict = "Choose real cells to compare with, then generate again."
        if real is not None:
            verdict, poor = compare_quality(pipe, real, model, seed, **call)
            warning = f"{warning} {poor}".strip()
        yield summary + as_quote(warning), cells_file, *figures, verdict


def balance(labels: dict[str, list[str]], num_cells: int) -> dict[str, list[str]]:
    """A label of each key for each cell: equally many cells of each combination."""
    rows = itertools.islice(itertools.cycle(itertools.product(*labels.values())), num_cells)
    return dict(zip(labels, map(list, zip(*rows))))


# ==================== Training ====================


class TrainingRun:
    """`wbdit train` on a file, in a process of its own."""

    def __init__(self, dataset: str, label_keys: list[str], minutes: float):
        self.folder, self.start_time = Path(tempfile.mkdtemp(dir=WORKSPACE.name), "my-cells"), time.monotonic()
        self.messages, config = self.folder.with_suffix(".txt"), self.folder.with_suffix(".yaml")
        fields = {
            "dataset": dataset,
            "label_keys": label_keys,
            "max_train_minutes": minutes,
            "output_dir": str(self.folder),
            "validation_steps": 25,  # a point of the curve every few seconds
            "checkpointing_steps": 1_000_000,  # nobody resumes these runs
        }
        config.write_text(yaml.safe_dump(fields))
        command = [sys.executable, "-m", "wbdit_diffusers.cli", "train", "--config", str(config)]
        with self.messages.open("w") as file:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)

    def seconds(self) -> str:
        return f"{time.monotonic() - self.start_time:.0f} s"

    def log(self) -> pd.DataFrame:
        """The training log so far."""
        path = self.folder / "training_log.csv"
        return pd.read_csv(path) if path.is_file() else pd.DataFrame()

    def archive(self) -> str:
        """The files that `wbdit push` would upload, as a .zip file. Raises a `ValueError` if the training failed."""
        if self.process.returncode != 0:
            *_, message = ["The training failed.", *self.messages.read_text().splitlines()]
            raise ValueError(message.removeprefix("wbdit train: "))
        public, name = self.folder.parent / "public", self.folder.name
        publish(ScRNAGenerationPipeline.from_pretrained(self.folder), self.folder, name, dry_run=public / name)
        return shutil.make_archive(str(self.folder), "zip", public)


running: dict[str, TrainingRun] = {}  # by browser session


def train(path: str | None, label_keys: list[str], minutes: float, request: gr.Request):
    """Yields status, loss curve and archive. At the end, the pipeline and the file are chosen for comparison."""
    with errors_on_page():
        _read_training_cells(path)
        session, skip, num_points = str(request.session_hash), gr.skip(), 0
        run = running[session] = TrainingRun(str(path), label_keys, minutes)
        try:
            while run.process.poll() is None:
                log = run.log()
                stage = f"step {log['step'].iloc[-1]:,}" if len(log) else "fitting the gene programs"
                figure = loss_figure(log) if len(log) > num_points else skip
                num_points = len(log)
                yield f"**Training**, {run.seconds()}: {stage}", figure, skip, skip, skip, skip
                time.sleep(1)
            if session not in running:
                yield f"**Stopped** after {run.seconds()}.", skip, skip, skip, skip, skip
                return
            archive = run.archive()
        finally:
            stop_training(request)
        status = f"**Done** in {run.seconds()}. The pipeline is chosen on the first tab, with your cells to compare."
        status, folder = status + as_quote(read_warning(run.folder)), str(run.folder)
        pipeline = gr.update(choices=[("my cells, trained here", folder)], value=folder)
        yield status, loss_figure(run.log()), gr.update(value=archive, interactive=True), pipeline, FILE, path


def stop_training(request: gr.Request):
    """Stops the training of this browser session."""
    run = running.pop(str(request.session_hash), None)
    if run is not None:
        run.process.kill()  # SIGTERM would save a checkpoint first
        run.process.wait()


def loss_figure(log: pd.DataFrame) -> Figure:
    """The validation loss. The training loss would rise, as its target changes from averages to single cells."""
    figure = Figure(figsize=(7, 3.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    measured = log.reindex(columns=["step", "validation_loss"]).dropna()
    axis.plot(measured["step"], measured["validation_loss"], color=GENERATED, marker="o", markersize=4)
    axis.set(xlabel="step", ylabel="validation loss of the denoiser")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
