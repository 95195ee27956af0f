"""`train`: from cells to a complete pipeline.

    wbdit train --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells
    accelerate launch training/train.py --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells

The output folder then holds what `ScRNAGenerationPipeline.from_pretrained` needs, and besides it: `split.json` (the
names of the training and of the held-out cells), `training_log.csv` (the losses), `run.json` (flags and a fingerprint
of the cells, with which a resumed run is compared), `training.json` (what the model card says of the training),
`stage_one/` and `checkpoint-N/` (to resume from).
"""

import csv
import shutil
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

from ..data.dataset import CellDataset, make_dataset
from ..hub.facts import write_training
from ..hub.model_card import write_model_card
from ..hub.publish import publish
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from ..processing.processor import ScRNAProcessor
from ..sampling.schedulers import make_scheduler, training_scheduler
from .cells import open_cells
from .codec import prepare_codec
from .config import TrainingConfig, command_of, config_without_places
from .denoiser import DenoiserTraining, batch_sizes
from .mixture import prepare_mixture
from .processes import interruption, together
from .run import Run, check_cells, make_record, open_run, read_record


logger = get_logger(__name__)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
ENOUGH_STEPS = 1000  # below which a denoiser's cells are told from real ones at once


def train(source: str | Path | ad.AnnData | None, config: TrainingConfig) -> ScRNAGenerationPipeline:
    """
    Trains codec and denoiser on cells, and writes the pipeline to `config.output_dir`.

    Args:
        source (`str`, `Path` or `AnnData`, *optional*):
            The cells, their .h5ad file, or a folder that `wbdit prepare` wrote; `config.dataset` if `None`.
        config ([`TrainingConfig`]): Everything else.

    Returns:
        [`ScRNAGenerationPipeline`]: the trained pipeline, on the CPU.

    Raises:
        ValueError: If the cells can't be modelled (see [`ScRNAProcessor.fit`]), flags don't fit them or the run to go
            on with, or `output_dir` holds another run.
        OSError: If a file can't be read or written.
        TrainingInterrupted: (a `KeyboardInterrupt`) On SIGTERM and Ctrl-C, after what can be gone on from was saved.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_config=ProjectConfiguration(str(config.output_dir), logging_dir=str(config.output_dir / "logs")),
        # One process fits stage one, and the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"The launcher asks for {accelerator.distributed_type.value}, which divides a network among devices; this"
            " one is small enough for each: launch with training/accelerate/multi_gpu.yaml."
        )
    if config.report_to is not None and not accelerator.log_with:
        raise ValueError(f"--report_to {config.report_to}: install that tracker, or leave it out.")
    set_seed(config.seed)
    with interruption.handled(), open_run(config, accelerator) as run, ExitStack() as files:
        pipeline = _train(source, config, accelerator, run, files)
    accelerator.end_training()
    return pipeline


def _train(
    source: str | Path | ad.AnnData | None,
    config: TrainingConfig,
    accelerator: Accelerator,
    run: Run,
    files: ExitStack,
) -> ScRNAGenerationPipeline:
    """The training, in a folder that is its own."""
    # 1. Cells: split once, everything is fitted on the training cells
    with together(accelerator):
        train_cells, test_cells, split = files.enter_context(open_cells(source, config))
        processor = ScRNAProcessor(
            values=config.values,
            recover_counts=config.codec != "expression",
            layer=config.layer,
            label_keys=config.label_keys,
            num_genes=config.num_genes or None,
        ).fit(train_cells)
        train_dataset = make_dataset(train_cells, processor, config.output_dir / "latents")
        # Labels that only held-out cells have are unknown to the model.
        test_cells = test_cells[processor.knows_labels(test_cells)]
        if test_cells.n_obs == 0:
            raise ValueError("No held-out cell has labels that a training cell has: give another --split.")
        test_dataset = CellDataset(test_cells, processor)
        # What would else be found out when the work is done
        batch_sizes(config, len(train_dataset), accelerator.num_processes)
        if config.num_programs is not None and config.num_programs > len(processor.var_names):
            raise ValueError(f"--num_programs {config.num_programs}: there are only {len(processor.var_names)} genes.")
        names = list(processor.var_names), list(processor.config.categories or [])
        record = make_record(config, {"number of cells": len(train_cells.obs)}, split, *names)
        if run.origin is not None:
            check_cells(read_record(run.origin), record)
    with together(accelerator), interruption.deferred():
        if accelerator.is_main_process:
            _create_repo(config)  # what can't be uploaded must be known before the work
            run.start(record, split)

    # 2. The codec: what the denoiser sees
    start_time = time.monotonic() - run.seconds()
    codec = prepare_codec(config, accelerator, train_dataset, run.stage_one, start_time)
    with accelerator.main_process_first():  # which may write them to a file
        train_dataset.encode(codec)
    test_dataset.encode(codec)

    # 3. The denoiser, and the closed form that it learns from at first
    mixture = prepare_mixture(config, accelerator, train_dataset, run.stage_one)
    set_seed(config.seed)  # the first weights must not depend on whether stage one was fitted just now
    noise_scheduler = training_scheduler(config.prediction_type)
    training = DenoiserTraining(
        *(config, accelerator, noise_scheduler, train_dataset, test_dataset),
        sample_size=codec.num_features,
        condition_sizes=processor.condition_sizes,
        start_time=start_time,
        mixture=mixture,
    )
    if config.report_to is not None:
        accelerator.init_trackers("wbdit_diffusers", config={key: str(value) for key, value in vars(config).items()})
    with together(accelerator):
        if run.checkpoint is not None:
            training.resume(run.checkpoint)
        if accelerator.is_main_process:
            training.start_log(resumed=run.checkpoint is not None)
    logger.info(
        f"{len(train_dataset)} training cells, {test_cells.n_obs} held out; {codec.num_features} values per cell,"
        f" {training.validation_model.num_parameters():,} parameters; {training.cells_per_step} cells per step."
    )
    training.run()

    # 4. The pipeline, complete
    with together(accelerator), interruption.deferred():
        pipeline = ScRNAGenerationPipeline(
            denoiser=training.averaged_model(),
            scheduler=make_scheduler(config.scheduler, noise_scheduler.config),
            processor=processor,
            codec=codec,
            num_inference_steps=config.num_inference_steps,
        )
        if accelerator.is_main_process:
            facts = {"training cells": len(train_dataset), "held-out cells": len(split.test) or test_cells.n_obs}
            _save(pipeline, config, training, facts)
            shutil.rmtree(config.output_dir / "latents", ignore_errors=True)
    return pipeline


def _create_repo(config: TrainingConfig) -> str:
    """The repository to upload to, or the folder's name if there is none."""
    repo_id = config.hub_model_id or config.output_dir.resolve().name
    if not config.push_to_hub:
        return repo_id
    try:
        return create_repo(repo_id, exist_ok=True).repo_id
    except Exception as error:  # of the Hub and of the network
        raise OSError(f"--push_to_hub: there is no writing to {repo_id}: {error}") from error


def _save(
    pipeline: ScRNAGenerationPipeline, config: TrainingConfig, training: DenoiserTraining, facts: dict[str, Any]
):
    """Writes the pipeline and its model card with these and other facts, and uploads them if asked to."""
    pipeline.save_pretrained(config.output_dir)
    repo_id = _create_repo(config)
    with training.log_path.open() as file:
        rows = list(csv.DictReader(file))
    facts |= {
        "steps": training.global_step,
        "cells per step": training.cells_per_step,
        "learning rate": config.learning_rate,
        "share of the mixture in the target": "none" if training.mixture is None else f"1 to {config.mixture_share:g}",
        "EMA decay": config.ema_decay if config.use_ema else "none",
        "mixed precision": training.accelerator.mixed_precision,
        "seed": config.seed,
        "validation loss": rows[-1]["validation_loss"] if rows else "not measured",
    }
    if training.global_step < ENOUGH_STEPS:
        shortage = f"only {training.global_step} steps of the denoiser, which needs {ENOUGH_STEPS:,} at least"
        facts["warning"] = f"{shortage}: these cells are not fit for use"
        mend = "--max_train_minutes" if config.max_train_minutes is not None else "--max_train_steps"
        logger.warning(f"WARNING: {shortage}. The cells will be poor: give more {mend}.")
    record = config_without_places(config)
    write_training(config.output_dir, record, command_of(config), facts["training cells"], facts)
    write_model_card(pipeline, config.output_dir, repo_id)
    logger.info(f"Saved the pipeline to {config.output_dir}.")
    if config.push_to_hub:
        try:
            address = publish(pipeline, config.output_dir, repo_id)
        except OSError as error:
            raise OSError(f"The pipeline is in {config.output_dir}, but {error}") from error
        logger.info(f"Published: {address}")
