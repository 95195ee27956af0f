"""What the page's buttons do. One handler for each figure: what is ready is shown while the rest is computed."""

import contextlib
import functools
import html
import inspect
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import gradio as gr
import numpy as np
import pandas as pd
import torch
from diffusers.utils import logging
from huggingface_hub import hf_hub_download

from ..data.read import load_pbmc
from ..models.codec_programs import ProgramCodec
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from ..pretrained import locate
from .compare import Group, judge_quickly, shown_groups, type_key
from .figures import joint_map, judgement_figure, loss_figure, map_figure, marker_figure, program_figure
from .run import MAX_CELLS as MAX_TRAINING_CELLS
from .run import MAX_MINUTES, TrainingRun, workspace
from .uploads import label_columns, read_upload


logger = logging.get_logger(__name__)

MAX_CELLS = 5000
CELLS_PER_BATCH = 256  # small, so that the progress moves
NOTHING, PBMC, FILE = "nothing", "PBMCs", "my file"
NO_LABELS = "(none: train without types)"

running: dict[str, TrainingRun] = {}  # by browser session, so that a button, or leaving, can stop it


def with_messages(handler: Callable) -> Callable:
    """What goes wrong in a handler is a message on the page, in one line and without a traceback."""

    @contextlib.contextmanager
    def messages():
        try:
            yield
        except gr.Error:
            raise
        except (ValueError, OSError) as error:
            message = html.escape(" ".join(str(error).split()), quote=False)
            raise gr.Error(message, duration=20, title="This did not work", print_exception=False) from None
        except Exception as error:
            logger.exception("The page failed.")
            message = f"{type(error).__name__}: this is a mistake of the page, which the terminal tells more about."
            raise gr.Error(message, duration=20, title="This did not work", print_exception=False) from None

    # Gradio looks at a handler's kind and signature.
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def wrapped(*args, **kwargs):
            with messages():
                yield from handler(*args, **kwargs)
    else:

        @functools.wraps(handler)
        def wrapped(*args, **kwargs):
            with messages():
                return handler(*args, **kwargs)

    return wrapped


# ==================== Pipeline and real cells ====================


@functools.lru_cache(maxsize=4)
def load_pipeline(name: str) -> ScRNAGenerationPipeline:
    """
    A pipeline from a folder or a Hub id, or one that comes with the package, on the CPU.

    Raises:
        ValueError: If there is none.
    """
    if not name:
        raise ValueError("Choose a pipeline first: a folder that `wbdit train` wrote, or a Hub id.")
    try:
        if not Path(locate(name)).is_dir():
            _check_hub_id(name)
        pipe = ScRNAGenerationPipeline.from_pretrained(name)
    except Exception as error:  # Diffusers and the Hub raise of every kind
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} cannot be loaded as a pipeline: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_hub_id(name: str):
    """Before gigabytes of another model are downloaded."""
    index = json.loads(Path(hf_hub_download(name, ScRNAGenerationPipeline.config_name)).read_text())
    if index.get("_class_name") != ScRNAGenerationPipeline.__name__:
        raise ValueError(f"it is a {index.get('_class_name')}, not a {ScRNAGenerationPipeline.__name__}.")


@functools.lru_cache(maxsize=2)
def _read(path: str) -> ad.AnnData:
    return read_upload(path)


@functools.lru_cache(maxsize=1)
def _pbmc() -> ad.AnnData:
    return load_pbmc()


def _real_cells(source: str, upload: str | None) -> ad.AnnData | None:
    if source == FILE and not upload:
        raise ValueError(f"Upload a file to compare with, or choose another than {FILE!r}.")
    return None if source == NOTHING else _pbmc() if source == PBMC else _read(str(upload))


def describe(name: str | None) -> tuple[str, list[str], int, str]:
    """What the page says of a pipeline: a line, its cell types, its number of steps, and what to compare it with."""
    if not name:  # it was cleared
        return "Choose a pipeline, or train one on your own cells.", [], 20, NOTHING
    pipe = load_pipeline(name)
    key = type_key(pipe)
    types = list(pipe.processor.config.categories[0]) if key is not None else []
    facts = [f"{len(pipe.processor.var_names):,} genes", f"{len(types)} types" if types else "no types"]
    if isinstance(pipe.codec, ProgramCodec):
        facts.append(f"{pipe.codec.config.num_programs} gene programs")
    facts.append(f"{pipe.denoiser.num_parameters():,} parameters")
    is_of_pbmc = key == "cell_type" and set(types) <= set(_pbmc().obs["cell_type"].cat.categories)
    return " · ".join(facts), types, pipe.config.num_inference_steps, PBMC if is_of_pbmc else NOTHING


@with_messages
def choose_pipeline(name: str | None, source: str):
    line, types, num_steps, fitting = describe((name or "").strip())
    return line, gr.update(choices=types, value=[]), num_steps, FILE if source == FILE else fitting


@with_messages
def choose_file(path: str | None):
    """Looks at an uploaded file at once, and says what it is."""
    return "No file yet." if path is None else _file_line(path, _read(path))


def choose_source(source: str):
    """The file and its line are shown where they matter."""
    return gr.update(visible=source == FILE), gr.update(visible=source == FILE)


def _file_line(path: str, cells: ad.AnnData) -> str:
    return f"{cells.n_obs:,} cells × {cells.n_vars:,} genes in {html.escape(Path(path).name)}"


# ==================== Generating ====================


def _asked_types(types: list[str], num_cells: float | None) -> tuple[int, str | list[str] | None]:
    """The number of cells, and a type for each: as many of one as of the other."""
    if num_cells is None or num_cells != int(num_cells) or not 1 <= num_cells <= MAX_CELLS:
        got = "no number" if num_cells is None else f"{num_cells:,.12g}"
        raise ValueError(f"The number of cells is from 1 to {MAX_CELLS:,} on this page, not {got}.")
    num_cells = int(num_cells)
    if not types:
        return num_cells, None
    return num_cells, [types[i * len(types) // num_cells] for i in range(num_cells)]


@dataclass
class Drawn:
    """
    Generated cells, and what the figures after them need.

    Args:
        name (`str`): Folder or id of the pipeline.
        cells (`AnnData`): The cells.
        real (`AnnData`, *optional*): What they are compared with.
        seed (`int`): Their seed.
        call (`dict`): How they were called for: guidance and steps.
        folder (`TemporaryDirectory`): With their file; removed when these cells are forgotten.
    """

    name: str
    cells: ad.AnnData
    real: ad.AnnData | None
    seed: int
    call: dict[str, Any]
    folder: tempfile.TemporaryDirectory

    @functools.cached_property
    def groups(self) -> tuple[list[Group], pd.Index]:
        return shown_groups(load_pipeline(self.name), self.cells, self.real)


@with_messages
def generate(
    name: str | None,
    types: list[str],
    num_cells: float | None,
    guidance_scale: float,
    num_inference_steps: int,
    seed: float | None,
    source: str,
    upload: str | None,
    progress=gr.Progress(),  # noqa: B008  Gradio finds it here
):
    """Cells, what to say of them, their file, and figures that are empty again."""
    num_cells, asked_types = _asked_types(types, num_cells)
    if seed is None or not 0 <= seed < 2**32:
        raise ValueError("The seed is a number from 0 to 4,294,967,295.")
    name, seed = (name or "").strip(), int(seed)
    call = {"guidance_scale": float(guidance_scale), "num_inference_steps": int(num_inference_steps)}
    pipe, real = load_pipeline(name), _real_cells(source, upload)

    start_time, steps_done = time.monotonic(), 0
    num_steps = -(-num_cells // CELLS_PER_BATCH) * call["num_inference_steps"]

    def on_step_end(pipe, step, timestep, tensors):
        nonlocal steps_done
        steps_done += 1
        # Some solvers take more calls than steps.
        progress((min(steps_done, num_steps), num_steps), desc="Denoising", unit="steps")
        return tensors

    progress(0, desc="Denoising")
    cells = pipe(
        *(num_cells, asked_types),
        **call,
        batch_size=CELLS_PER_BATCH,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=on_step_end,
    ).cells
    summary = f"### {cells.n_obs:,} cells × {cells.n_vars:,} genes\nin {time.monotonic() - start_time:.1f} seconds"
    summary += f" · seed {seed} · {call['num_inference_steps']} steps of {type(pipe.scheduler).__name__}"
    folder = tempfile.TemporaryDirectory(dir=workspace().name)
    path = Path(folder.name) / f"wbdit-cells-seed-{seed}.h5ad"
    cells.write_h5ad(path)
    download = gr.update(value=str(path), interactive=True)
    return Drawn(name, cells, real, seed, call, folder), summary, download, None, None, None, None, ""


@with_messages
def draw_map(drawn: Drawn, method: str, progress=gr.Progress()):  # noqa: B008
    progress(0.2, desc=f"Drawing the {method} map")
    groups, _ = drawn.groups
    return map_figure(groups, joint_map(groups, method), method)


@with_messages
def draw_markers(drawn: Drawn, progress=gr.Progress()):  # noqa: B008
    """Markers and programs, each empty where the cells have none."""
    progress(0.5, desc="Drawing markers and programs")
    groups, genes = drawn.groups
    names = drawn.cells.uns["programs"]["name"] if "programs" in drawn.cells.uns else np.array([])
    return marker_figure(groups, genes), program_figure(groups, names)


@with_messages
def judge(drawn: Drawn, progress=gr.Progress()):  # noqa: B008
    if drawn.real is None:
        return None, "Choose real cells to compare with, and a classifier will try to tell them apart."
    progress(0.7, desc="A random forest tells cells apart")
    judgement = judge_quickly(load_pipeline(drawn.name), drawn.real, drawn.name, drawn.seed, **drawn.call)
    return judgement_figure(judgement), _verdict(judgement)


def _verdict(judgement) -> str:
    held_out = (
        "Compared with are cells that training held out."
        if judgement.is_held_out
        else "Training may have seen the cells compared with: the pipeline does not say which ones it held out."
    )
    return (
        f"**Quick look.** A random forest tells {judgement.num_cells} generated cells from {judgement.num_cells} real"
        f" ones with an AUC of **{judgement.generated:.2f}**, and other real cells with"
        f" **{judgement.reference:.2f}**. The nearer the two, the better; 0.5 is guessing. {held_out} One draw and one"
        " classifier: `wbdit evaluate` takes three of each, and gives the spread."
    )


# ==================== Training ====================


@with_messages
def choose_training_file(path: str | None):
    if path is None:
        return "No file yet.", gr.update(choices=[NO_LABELS], value=NO_LABELS)
    cells = _read(path)
    _check_training_cells(cells)
    columns = label_columns(cells)
    return (
        _file_line(path, cells),
        gr.update(choices=[*columns, NO_LABELS], value=columns[0] if columns else NO_LABELS),
    )


def _check_training_cells(cells: ad.AnnData):
    if cells.n_obs > MAX_TRAINING_CELLS:
        raise ValueError(
            f"The file has {cells.n_obs:,} cells, and this page trains on {MAX_TRAINING_CELLS:,} at most: take a part"
            " of them, or `wbdit train` on the command line."
        )


@with_messages
def train(path: str | None, label_key: str, minutes: float, request: gr.Request):
    """Trains in a process of its own; yields status, curves, archive, pipeline, what to compare with, and its file."""
    if path is None:
        raise ValueError("Upload the cells to train on first: an .h5ad file with integer counts.")
    if not 0 < minutes <= MAX_MINUTES:
        raise ValueError(f"The minutes are at most {MAX_MINUTES}.")
    _check_training_cells(_read(path))
    run = TrainingRun(Path(path), None if label_key == NO_LABELS else label_key, minutes)
    stop_training(request)
    running[str(request.session_hash)] = run
    try:
        yield "**Training**", None, *[gr.skip()] * 4
        num_points = 0
        while run.is_running():
            losses = run.losses()
            doing = f"step {losses.step.max():,}" if len(losses) else "fitting the gene programs"
            figure = loss_figure(losses) if len(losses) > num_points else gr.skip()
            num_points = len(losses)
            yield f"**Training**, {run.seconds:.0f} s: {doing}", figure, *[gr.skip()] * 4
            time.sleep(1)
        if run.is_stopped:
            yield f"**Stopped** after {run.seconds:.0f} s.", *[gr.skip()] * 5
            return
        run.check()
    finally:
        run.stop()
        running.pop(str(request.session_hash), None)
    yield (
        f"**Done** in {run.seconds:.0f} s. The pipeline is chosen on the first tab, beside your cells.",
        loss_figure(run.losses()),
        gr.update(value=str(run.archive()), interactive=True),
        gr.update(choices=[("my cells, trained here", str(run.folder))], value=str(run.folder)),
        FILE,
        path,
    )


def stop_training(request: gr.Request):
    """Of this browser session."""
    run = running.pop(str(request.session_hash), None)
    if run is not None:
        run.stop()
