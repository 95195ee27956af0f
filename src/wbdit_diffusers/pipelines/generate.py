"""Cells of any number into a file: part by part, over processes, and on from where a killed run stopped.

Each part is a file of its own in a folder beside the output, made by whichever process comes to it: its cells follow
from the seed and their numbers. The parts are joined when all are there.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import torch
from diffusers.utils import logging
from filelock import FileLock, Timeout

from ..data.writer import check_cells_file, check_output, write_cells
from ..models.loading import check_integer
from ..sampling.schedulers import SCHEDULERS, make_scheduler
from ..version import __version__
from .pipeline_scrna_generation import ScRNAGenerationPipeline


CELLS_PER_PART = 4096  # at least, in whole batches: what a killed run loses
MAX_PROCESSES = 1024
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class GenerationRequest:
    """
    What `wbdit generate` was asked for.

    Args:
        model (`str`): A folder or a Hub id.
        num_cells (`int`, defaults to 1000): Number of cells.
        cell_types (`str`, *optional*): As in a call of the pipeline, for all cells.
        conditions (`dict[str, str]`): As in a call.
        guidance_scale (`float`, defaults to 1.0): As in a call.
        num_inference_steps (`int`, *optional*): As in a call.
        batch_size (`int`, *optional*): As in a call.
        seed (`int`, defaults to 0): Of the cells.
        scheduler (`str`, *optional*): A key of `SCHEDULERS`, instead of the pipeline's own.
        device (`str`, *optional*): Where to compute; a GPU if there is one. Each process has one of its own.
    """

    model: str
    num_cells: int = 1000
    cell_types: str | None = None
    conditions: dict[str, str] = field(default_factory=dict)
    guidance_scale: float = 1.0
    num_inference_steps: int | None = None
    batch_size: int | None = None
    seed: int = 0
    scheduler: str | None = None
    device: str | None = None

    def load(self, rank: int = 0) -> ScRNAGenerationPipeline:
        """The pipeline, on the device of a process. Raises a `ValueError` or an `OSError` if there is no such one."""
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ValueError(f"--scheduler is one of {', '.join(SCHEDULERS)}, not {self.scheduler!r}.")
        device = choose_device(self.device, rank)
        quiet()
        pipe = ScRNAGenerationPipeline.from_pretrained(self.model).to(device)
        pipe.set_progress_bar_config(disable=True)
        if self.scheduler is not None:
            pipe.scheduler = make_scheduler(self.scheduler, pipe.scheduler.config)
        return pipe

    def stream(self, pipe: ScRNAGenerationPipeline, first_cell: int, num_cells: int) -> Iterator[ad.AnnData]:
        """Some of the cells, batch by batch."""
        return pipe.stream(
            num_cells=num_cells,
            cell_types=self.cell_types,
            conditions=dict(self.conditions),
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size,
            generator=torch.Generator().manual_seed(self.seed),
            first_cell=first_cell,
        )


def choose_device(name: str | None, rank: int = 0) -> torch.device:
    """A device by name, a GPU by default if there is one. Raises a `ValueError` on one that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.device_count():
            device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {name}: there is no such device on this machine; leave it out, or give cpu."
        ) from error
    return device


def quiet():
    """No bars and warnings of Diffusers while a command loads a model: what is wrong with it, we say."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def generate_cells(request: GenerationRequest, output: str | Path, num_processes: int = 1) -> tuple[int, int]:
    """
    Makes cells and writes them to a file; see [`write_cells`] for its formats.

    The cells are those of `pipe(num_cells, generator=torch.Generator().manual_seed(seed))`, whatever the number of
    processes. If the process is killed, the same call goes on with the parts that are missing.

    Args:
        request ([`GenerationRequest`]): Which cells.
        output (`str` or `Path`): The .h5ad file, .zarr folder or folder of parquet files.
        num_processes (`int`, defaults to 1): Processes to share the work.

    Returns:
        `tuple[int, int]`: number of cells and of genes.

    Raises:
        ValueError: If something was asked for that the model can't make.
        OSError: If the model can't be loaded, or the output not written.
        KeyboardInterrupt: On Ctrl-C; the message says what is kept.
    """
    path = check_output(output)
    check_integer("num_processes", num_processes, largest=MAX_PROCESSES)
    check_integer("seed", request.seed, smallest=0, largest=2**63 - 1)
    pipe = request.load()
    request.stream(pipe, 0, request.num_cells)  # checks the request
    batch_size = request.batch_size or pipe.default_batch_size
    cells_per_part = batch_size * max(1, CELLS_PER_PART // batch_size)
    num_parts = math.ceil(request.num_cells / cells_per_part)
    folder = path.with_name(f"{path.name}.parts")
    if num_parts == 1 and not folder.exists():
        with _progress(request.num_cells) as bar:
            return write_cells(path, _counted(request.stream(pipe, 0, request.num_cells), bar))

    parts = Parts(folder, request.num_cells, cells_per_part, len(pipe.processor.var_names))
    facts = asdict(request) | {"batch_size": batch_size, "model": request.model, "version": __version__}
    with parts.claim(facts | {"device": pipe.device.type}):
        try:
            if num_processes == 1:
                with _progress(request.num_cells) as bar:
                    bar.update(parts.num_done())
                    parts.write(request, pipe, progress_bar=bar)
            else:
                del pipe
                _run_processes(request, parts, num_processes)
            shape = write_cells(path, parts.read())
        except (KeyboardInterrupt, OSError) as error:
            raise type(error)(f"{error}{parts.leave()}".strip()) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)
    return shape


@dataclass(frozen=True)
class Parts:
    """
    The parts of an unfinished output.

    Args:
        folder (`Path`): Where they are.
        num_cells (`int`): Of all parts together.
        cells_per_part (`int`): Of each part but the last.
        num_genes (`int`): Of each cell.
    """

    folder: Path
    num_cells: int
    cells_per_part: int
    num_genes: int

    def __len__(self) -> int:
        return math.ceil(self.num_cells / self.cells_per_part)

    def path(self, part: int) -> Path:
        return self.folder / f"{part:08d}.h5ad"

    def size(self, part: int) -> int:
        return min(self.cells_per_part, self.num_cells - part * self.cells_per_part)

    def num_done(self) -> int:
        """Cells in the parts that are there."""
        return sum(self.size(int(path.stem)) for path in self.folder.glob("*.h5ad"))

    def claim(self, facts: dict[str, Any]) -> FileLock:
        """
        Makes the folder, or takes over that of a killed run of the same command.

        Returns:
            `FileLock`: held; it ends with this process, however that ends.

        Raises:
            OSError: If another process is at work there, or the parts are those of another command.
        """
        self.folder.mkdir(exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OSError(
                f"Another process is writing to {self.folder}: wait for it, or give another --output."
            ) from error
        record = self.folder / "request.json"
        if record.is_file():
            before = json.loads(record.read_text())
            other = sorted(key for key in before.keys() | facts.keys() if before.get(key) != facts.get(key))
            if other:
                lock.release()
                raise OSError(
                    f"{self.folder} holds cells of an unfinished command with another {', '.join(other)}: run that one"
                    " again to finish it, or remove the folder."
                )
        else:
            beside = record.with_suffix(".partial")
            beside.write_text(json.dumps(facts))
            beside.replace(record)
        for stale in self.folder.glob("*.h5ad.partial"):
            stale.unlink()
        for part in self.folder.glob("*.h5ad"):  # one that did not survive is made again
            try:
                check_cells_file(part, "h5ad", self.size(int(part.stem)), self.num_genes)
            except OSError:
                part.unlink()
        return lock

    def write(
        self,
        request: GenerationRequest,
        pipe: ScRNAGenerationPipeline,
        rank: int = 0,
        step: int = 1,
        progress_bar=None,
    ):
        """Makes those parts that are missing, of every `step`-th from `rank` on."""
        for part in range(rank, len(self), step):
            if not self.path(part).exists():
                batches = request.stream(pipe, part * self.cells_per_part, self.size(part))
                write_cells(self.path(part), _counted(batches, progress_bar))

    def read(self) -> Iterator[ad.AnnData]:
        """The parts in order."""
        for part in range(len(self)):
            yield ad.read_h5ad(self.path(part))

    def leave(self) -> str:
        """Keeps whole parts, and nothing else. Returns what to say about it."""
        for stale in self.folder.glob("*.h5ad.partial"):
            stale.unlink(missing_ok=True)
        done = self.num_done()
        if not done:
            shutil.rmtree(self.folder, ignore_errors=True)
            return ""
        return (
            f" {done:,} of {self.num_cells:,} cells are kept in {self.folder}: the same command goes on from there;"
            " remove the folder if you don't want them."
        )


def _run_processes(request: GenerationRequest, parts: Parts, num_processes: int):
    """Makes the missing parts with processes of their own. Raises what the first of them that fails raised."""
    context = multiprocessing.get_context("forkserver")  # everything is imported once, and no GPU is touched before
    context.set_forkserver_preload([__name__])
    failures = context.SimpleQueue()
    workers = [
        context.Process(target=_work, args=(request, parts, rank, num_processes, failures), daemon=True)
        for rank in range(num_processes)
    ]
    try:
        for worker in workers:
            worker.start()
        with _progress(request.num_cells) as bar:
            while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
                time.sleep(SECONDS_BETWEEN_LOOKS)
                bar.update(parts.num_done() - bar.n)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if not failures.empty():
        raise failures.get()
    if failed:
        raise OSError(f"A process ended with code {failed[0]} (-9: killed, often for want of memory).")


def _work(request: GenerationRequest, parts: Parts, rank: int, num_processes: int, failures):
    """What each process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    try:
        pipe = request.load(rank)
        parts.write(request, pipe, rank, num_processes)
    except (ValueError, OSError) as error:
        failures.put(type(error)(str(error)))
        os._exit(1)


def _counted(batches: Iterator[ad.AnnData], progress_bar) -> Iterator[ad.AnnData]:
    """The batches, counted; in a process whose parent died, which nobody waits for, none."""
    parent = multiprocessing.parent_process()
    for batch in batches:
        if parent is not None and not parent.is_alive():
            os._exit(1)
        yield batch
        if progress_bar is not None:
            progress_bar.update(batch.n_obs)


def _progress(num_cells: int):
    from tqdm.auto import tqdm

    return tqdm(
        total=num_cells, desc="Generating", unit=" cells", disable=None
    )  # where nobody looks at a terminal, none


# ==================== TEMPORARY: theirs win at the merge ====================
import dataclasses  # noqa: E402
from typing import Literal  # noqa: E402

from pydantic import Field, NonNegativeFloat, PositiveInt  # noqa: E402
from pydantic.dataclasses import dataclass as pydantic_dataclass  # noqa: E402

from ..flags import Seed, pydantic_config  # noqa: E402


@pydantic_dataclass(config=pydantic_config, kw_only=True)
class GenerateConfig:
    model: str
    """Folder that `wbdit train` wrote, Hub id, or the pipeline in this package: pbmc68k_reduced."""
    output: Path
    """The .h5ad file, .zarr folder, or folder for parquet files to write."""
    num_cells: PositiveInt = 1000
    """Number of cells."""
    num_processes: PositiveInt = 1
    """Number of processes."""
    cell_types: str | None = None
    """Type of all cells. Default: the label frequencies of the training cells."""
    conditions: dict[str, str] = Field(default_factory=dict)
    """Labels of other obs keys, such as condition=stim."""
    scheduler: Literal["ddpm", "ddim", "dpmsolver++", "unipc"] | None = None
    """Solver. Default: that of the pipeline."""
    batch_size: PositiveInt | None = None
    """Number of cells denoised together."""
    guidance_scale: NonNegativeFloat = 1.0
    """Strength of classifier-free guidance. 1 is none."""
    num_inference_steps: PositiveInt | None = None
    """Number of denoising steps. Default: that of the pipeline."""
    seed: Seed = 0
    """Seed of the cells."""
    device: str | None = None
    """Device to compute on, such as cuda or cpu. Default: a GPU, if there is one."""


def generate(config):
    values = dataclasses.asdict(config)
    output, num_processes = values.pop("output"), values.pop("num_processes")
    return generate_cells(GenerationRequest(**values), output, num_processes)
