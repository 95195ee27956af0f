"""`train`: from cells to a complete pipeline.

    wbdit train --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells
    accelerate launch training/train.py --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells

The output folder then holds a pipeline for `ScRNAGenerationPipeline.from_pretrained`. It also holds `split.json`
(names of training and held-out cells), `training_log.csv` (losses), `training.json` (facts for the model card), and
for resuming `run.json` (the flags), `stage_one/` and `checkpoint-N/`.
"""

import math
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import anndata as ad
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from huggingface_hub import create_repo

from ..data.cells import CellSource
from ..data.latents import (
    MAX_VALUES_IN_MEMORY,
    CellDataset,
    Latents,
    encode_cells,
    encode_source,
    max_cells_in_memory,
    sample_cells,
)
from ..files import one_line, remove
from ..hub.facts import write_training
from ..hub.model_card import write_model_card
from ..hub.publish import publish
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from ..processing.processor import ScRNAProcessor
from ..sampling.schedulers import make_scheduler
from .cells import open_cells
from .checkpoints import LATENTS_NAME, STAGE_ONE_NAME, find_run, start_run
from .codec import TIME_FRACTION, prepare_codec
from .config import TrainingConfig, command_of, config_without_places
from .denoiser import DenoiserTraining, batch_sizes
from .gaussian_mixture import prepare_gaussian_mixture
from .processes import stop_signal, sync_errors


logger = get_logger(__name__)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
ENOUGH_STEPS = 1000  # with fewer, generated cells are easily distinguished from real ones


def train(source: str | Path | ad.AnnData | None, config: TrainingConfig) -> ScRNAGenerationPipeline:
    """
    Trains codec and denoiser on cells, and writes the pipeline to `config.output_dir`.

    Args:
        source (`str`, `Path` or `AnnData`, *optional*):
            Cells, their file, or a folder that `wbdit prepare` wrote. Default: `config.dataset`.
        config ([`TrainingConfig`]): Configuration.

    Returns:
        [`ScRNAGenerationPipeline`]: the trained pipeline, on the CPU.

    Raises:
        ValueError: If the cells can't be modelled, flags do not fit them, or `output_dir` holds another run.
        OSError: If a file can't be read or written.
        TrainingInterrupted: (a `KeyboardInterrupt`) On SIGTERM and Ctrl-C. Stage two saves a checkpoint first.
    """
    start_time = time.monotonic()
    accelerator = _make_accelerator(config)
    set_seed(config.seed)
    folder, stage_one = config.output_dir, config.output_dir / STAGE_ONE_NAME
    with stop_signal.handled(), ExitStack() as stack:
        with sync_errors(accelerator):
            is_resumed, checkpoint = find_run(config)
            train_cells, test_cells, split = stack.enter_context(open_cells(source, config))
            processor = _fit_processor(config, train_cells)
            test_cells = test_cells[processor.knows_labels(test_cells)]
            _check_sizes(config, processor, len(train_cells.obs), test_cells.n_obs, accelerator.num_processes)
            train_dataset = sample_cells(train_cells, processor, config.seed)
            test_dataset = CellDataset(test_cells, processor)
        with sync_errors(accelerator):
            if accelerator.is_main_process:
                repo_id = _create_repo(config)  # fails before the work if nothing can be uploaded
                stack.enter_context(start_run(config, split, is_resumed, checkpoint))

        minutes = config.max_train_minutes
        deadline = math.inf if minutes is None else start_time + 60 * minutes * TIME_FRACTION
        codec = prepare_codec(config, accelerator, train_dataset, stage_one, deadline)
        with accelerator.main_process_first():
            latents = _encode(train_cells, train_dataset, processor, codec, folder / LATENTS_NAME)
        test_latents = _encode(test_cells, test_dataset, processor, codec)
        gaussian_mixture = prepare_gaussian_mixture(config, accelerator, latents, stage_one)

        set_seed(config.seed)  # the initial weights are the same whether or not stage one ran in this process
        training = DenoiserTraining(config, accelerator, latents, test_latents, start_time, gaussian_mixture)
        if config.report_to is not None:
            accelerator.init_trackers("wbdit_diffusers", {key: str(value) for key, value in vars(config).items()})
        with sync_errors(accelerator):
            if checkpoint is not None:
                training.resume(checkpoint)
            if accelerator.is_main_process:
                training.start_log()
        num_parameters = f"{training.validation_model.num_parameters():,}"
        logger.info(
            f"{len(latents)} training cells, {test_cells.n_obs} held-out cells; {codec.num_features} features per"
            f" cell, {num_parameters} parameters; {training.cells_per_step} cells per step."
        )
        training.run()

        with sync_errors(accelerator), stop_signal.deferred():
            pipeline = ScRNAGenerationPipeline(
                denoiser=training.averaged_model(),
                scheduler=make_scheduler(config.scheduler, training.noise_scheduler.config),
                processor=processor,
                codec=codec,
                num_inference_steps=config.num_inference_steps,
            )
            if accelerator.is_main_process:
                _save(pipeline, config, training, repo_id, num_test_cells=len(split.test) or test_cells.n_obs)
    # If DDP frees the process group, its destructor holds the GIL and can wait forever for a thread that needs it.
    del training
    accelerator.free_memory()
    accelerator.end_training()
    return pipeline


def _make_accelerator(config: TrainingConfig) -> Accelerator:
    """Sets up devices and processes."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_config=ProjectConfiguration(str(config.output_dir), logging_dir=str(config.output_dir / "logs")),
        # The other processes wait while the main process fits stage one.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    if accelerator.distributed_type in SHARDED:
        name = accelerator.distributed_type.value
        raise ValueError(f"{name} would shard a small network: launch with training/accelerate/multi_gpu.yaml.")
    if config.report_to is not None and not accelerator.log_with:
        raise ValueError(f"--report_to {config.report_to}: this tracker is not installed. Install it.")
    return accelerator


def _fit_processor(config: TrainingConfig, cells: ad.AnnData | CellSource) -> ScRNAProcessor:
    """Chooses genes and learns labels and library sizes."""
    num_genes = min(config.num_genes or math.inf, len(cells.var_names))
    if config.codec == "expression" and len(cells.obs) > max_cells_in_memory(int(max(num_genes, 1))):
        size = f"{len(cells.obs):,} training cells do not fit in memory"
        raise ValueError(f"--codec expression: {size}. Prepare a sample of them, or use --codec program.")
    return ScRNAProcessor(
        values=config.values,
        recover_counts=config.codec != "expression",
        layer=config.layer,
        label_keys=config.label_keys,
        num_genes=config.num_genes or None,
    ).fit(cells)


def _check_sizes(config: TrainingConfig, processor: ScRNAProcessor, num_train: int, num_test: int, num_processes: int):
    """Raises a `ValueError` before the work if numbers of cells, genes, batches and programs do not fit."""
    if num_test == 0:
        raise ValueError("No held-out cell has labels that a training cell has. Use another --split.")
    batch_sizes(config, num_train, num_processes)
    num_genes = len(processor.var_names)
    if config.num_programs is not None and config.num_programs > num_genes:
        raise ValueError(f"--num_programs {config.num_programs}: there are only {num_genes} genes. Use fewer.")


def _encode(
    cells: ad.AnnData | CellSource,
    dataset: CellDataset,
    processor: ScRNAProcessor,
    codec: ProgramCodec | ExpressionCodec,
    path: Path | None = None,
) -> Latents:
    """Encodes all cells, into a file if the dataset holds only a sample of them, or if the latents are large."""
    is_large = path is not None and len(cells.obs) * codec.num_features > MAX_VALUES_IN_MEMORY
    if len(dataset) < len(cells.obs) or is_large:
        values = encode_source(cells, processor, codec, path)
    else:
        values = encode_cells(dataset, codec)
    return Latents(values, processor.encode_labels(cells), processor.condition_sizes)


def _create_repo(config: TrainingConfig) -> str:
    """Creates the repository to upload to, and returns its id. Without an upload, that is the name of the folder."""
    repo_id = config.hub_model_id or config.output_dir.resolve().name
    if not config.push_to_hub:
        return repo_id
    try:
        return create_repo(repo_id, exist_ok=True).repo_id
    except Exception as error:  # of the Hub and of the network
        raise OSError(f"--push_to_hub: {repo_id} can't be written ({one_line(error)}).") from error


def _save(
    pipeline: ScRNAGenerationPipeline,
    config: TrainingConfig,
    training: DenoiserTraining,
    repo_id: str,
    num_test_cells: int,
):
    """Writes the pipeline and its model card, and uploads them if asked to."""
    folder = config.output_dir
    pipeline.save_pretrained(folder)
    share = "none" if training.gaussian_mixture is None else f"1 to {config.mixture_share:g}"
    facts: dict[str, Any] = {
        "training cells": len(training.train_cells),
        "held-out cells": num_test_cells,
        "steps": training.progress.step,
        "cells per step": training.cells_per_step,
        "learning rate": config.learning_rate,
        "share of the Gaussian mixture in the target": share,
        "EMA decay": config.ema_decay if config.use_ema else "none",
        "mixed precision": training.accelerator.mixed_precision,
        "seed": config.seed,
        "validation loss": round(training.validation_loss(), 6),
    }
    if training.progress.step < ENOUGH_STEPS:
        shortage = f"only {training.progress.step} denoiser steps; use at least {ENOUGH_STEPS:,}"
        facts["warning"] = f"{shortage}. These cells are not fit for use."
        flag = "--max_train_minutes" if config.max_train_minutes is not None else "--max_train_steps"
        logger.warning(f"WARNING: {shortage} ({flag}). Generated cells will be poor.")
    record = config_without_places(config)
    write_training(folder, record, command_of(config), facts["training cells"], facts)
    write_model_card(pipeline, folder, repo_id)
    remove(folder / LATENTS_NAME)
    logger.info(f"Saved the pipeline to {folder}.")
    if config.push_to_hub:
        try:
            address = publish(pipeline, folder, repo_id)
        except OSError as error:
            raise OSError(f"The pipeline is in {folder}, but {one_line(error)}") from error
        logger.info(f"Published: {address}")
