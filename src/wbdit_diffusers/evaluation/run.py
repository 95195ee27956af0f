# ==================== TEMPORARY: theirs win at the merge ====================
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass

from ..flags import Seed, pydantic_config


@dataclass(config=pydantic_config, kw_only=True)
class EvaluateConfig:
    generators: list[str]
    """Models or .h5ad files of generated cells, each as PATH or NAME=PATH."""
    dataset: str | None = None
    """File or prepared folder that the models were trained on."""
    train: str | None = None
    """File of the training cells."""
    test: str | None = None
    """File of the held-out cells."""
    label_key: str | None = None
    """Column of obs that holds the cell type."""
    values: Literal["counts", "log"] | None = None
    """Kind of values."""
    donor_key: str | None = None
    """Column of obs that holds the donor."""
    output_dir: Path = Path("report")
    """Folder to write."""
    num_samples: PositiveInt = 3
    """Number of samples to draw from a model."""
    baselines: bool = True
    """Also judge baselines."""
    parity: bool = False
    """Add the metrics of the paper."""
    guidance_scale: NonNegativeFloat = 1.0
    """Strength of classifier-free guidance."""
    num_inference_steps: PositiveInt | None = None
    """Number of denoising steps. Default: that of the pipeline."""
    seed: Seed = 0
    """Seed of the cells."""
    device: str | None = None
    """Device to compute on."""


def run(config):
    from ..data import CellSplit, read_cells
    from ..pipelines import ScRNAGenerationPipeline
    from . import draw_samples, evaluate_cells, to_json, to_markdown

    path = config.generators[0].rpartition("=")[2]
    if config.dataset is not None:
        train, test = CellSplit.load(path).read(config.dataset)
        pipe = ScRNAGenerationPipeline.from_pretrained(path)
        steps = {"num_inference_steps": config.num_inference_steps}
        samples, test = draw_samples(pipe, test, config.num_samples, config.seed, **steps)
        label_key = list(pipe.processor.config.label_keys)
    else:
        if config.train is None or config.test is None:
            raise ValueError("Give --dataset, or both --train and --test.")
        train, test = read_cells(config.train), read_cells(config.test)
        samples, label_key = [read_cells(one.rpartition("=")[2]) for one in config.generators], config.label_key
    report = evaluate_cells(samples, train, test, label_key=label_key, donor_key=config.donor_key)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "report.json").write_text(to_json(report))
    return report, to_markdown(report)
