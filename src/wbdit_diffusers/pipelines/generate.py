"""`wbdit generate`: any number of cells into a file, over processes and machines, continued after an interruption.

The cells are made in parts, which are files in `<output>.parts/`. They are joined when all of them are there.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import anndata as ad
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..configs import GenerateConfig
from ..data.write import check_output, write_cells
from ..files import one_line, remove, write_whole
from ..progress import bar_options
from ..sampling.noise import CellNoise
from ..sampling.schedulers import make_scheduler
from ..version import __version__
from .pipeline_scrna_generation import ScRNAGenerationPipeline


CELLS_PER_PART = 4096  # at least, in whole batches: a killed process loses at most one part


def generate(config: GenerateConfig) -> tuple[int, int]:
    """
    Generates cells and writes them to a file; see [`write_cells`] for its formats. Returns the numbers of cells and
    genes.

    The cells are those of `pipe(num_cells, generator=torch.Generator().manual_seed(seed))`, for any number of
    processes. The same call continues a run that was interrupted or killed. Every process of an `accelerate launch`
    makes its share of the parts, and the first one joins them.
    """
    path = check_output(config.output)
    pipe = ScRNAGenerationPipeline.from_pretrained(config.model)
    pipe.set_progress_bar_config(**bar_options(desc="Steps", leave=False))
    if config.scheduler is not None:
        pipe.scheduler = make_scheduler(config.scheduler, pipe.scheduler.config)
    # Checks the arguments before anything is written. The parts have checked noise, and warn of nothing again.
    _stream(config, pipe, range(config.num_cells), None)
    noise = CellNoise(torch.Generator().manual_seed(config.seed))
    folder, batch_size = path.with_name(f"{path.name}.parts"), config.batch_size or pipe.default_batch_size
    size = batch_size * max(1, CELLS_PER_PART // batch_size)
    cells = range(config.num_cells)
    parts = {folder / f"{start:012d}.h5ad": cells[start : start + size] for start in cells[::size]}
    state = PartialState(cpu=True, timeout=timedelta(days=30))  # the processes only wait for each other
    pipe.to(choose_device(config.device, state.local_process_index))
    with state.main_process_first():
        _claim(folder, config, pipe)
    try:
        options = bar_options(total=config.num_cells, initial=_count(parts), desc="Generating", unit=" cells")
        failure = None
        with state.split_between_processes(list(parts)) as own, tqdm(**options) as bar:
            try:
                for part in own:
                    if not part.exists():
                        write_cells(part, _stream(config, pipe, parts[part], noise))
                        bar.update(_count(parts) - bar.n)
            except Exception as error:
                failure = error
        # The others make their share, and the first process, which alone prints its error, has that of any of them.
        reasons = [reason for reason in gather_object([failure and one_line(failure)]) if reason]
        if reasons:
            raise failure or OSError(reasons[0])
        if state.is_main_process:
            write_cells(path, map(ad.read_h5ad, parts))
            remove(folder)
    except BaseException as error:
        done = f"{_count(parts):,} of {config.num_cells:,} cells"
        kept = f"{done} are kept in {folder}: the same command continues from there."
        if not _count(parts):
            remove(folder)
            kept = ""
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from error
        if isinstance(error, OSError):
            raise OSError(f"{one_line(error)} {kept}".strip()) from error
        raise
    return config.num_cells, len(pipe.processor.var_names)


def _stream(
    config: GenerateConfig, pipe: ScRNAGenerationPipeline, cells: range, noise: CellNoise | None
) -> Iterator[ad.AnnData]:
    """The cells of a range, batch by batch."""
    names = ("conditions", "prompt", "library_size", "guidance_scale", "num_inference_steps", "batch_size")
    arguments = {name: getattr(config, name) for name in names}
    if types := config.cell_types:  # one for all cells, or the types in turn
        arguments["cell_types"] = types[0] if len(types) == 1 else [types[cell % len(types)] for cell in cells]
    return pipe.stream(num_cells=len(cells), first_cell=cells.start, generator=noise, **arguments)


def _claim(folder: Path, config: GenerateConfig, pipe: ScRNAGenerationPipeline):
    """Makes the folder of the parts. Raises an `OSError` if it holds parts of another request."""
    record, facts = folder / "request.json", asdict(config) | {"version": __version__}
    for name, part in pipe.components.items():
        weights = part.state_dict().values() if isinstance(part, torch.nn.Module) else []
        total = sum(tensor.double().nan_to_num(posinf=0).abs().sum().item() for tensor in weights)
        settings = {key: value for key, value in part.config.items() if not key.startswith("_")}
        facts[name] = f"{type(part).__name__} {settings} {total:.9g}"
    facts = json.loads(json.dumps(facts, default=str))
    before = json.loads(record.read_text()) if record.exists() else {}
    other = ", ".join(key for key in facts if before.get(key) != facts[key])
    if folder.exists() and other:
        raise OSError(
            f"{folder} holds cells of an unfinished command with another {other}: run that command again to finish it,"
            " or remove the folder."
        )
    folder.mkdir(exist_ok=True)
    write_whole(record, lambda partial: partial.write_text(json.dumps(facts)))


def _count(parts: dict[Path, range]) -> int:
    """Number of cells in the parts that are there."""
    return sum(len(cells) for part, cells in parts.items() if part.exists())


def choose_device(name: str | None = None, rank: int = 0) -> torch.device:
    """A device by name, or a GPU if there is one. Raises a `ValueError` if the machine has no such device."""
    if torch.cuda.is_available() and name in (None, "cuda"):
        name = f"cuda:{rank % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: this machine has no such device. Leave it out, or give cpu.") from error
