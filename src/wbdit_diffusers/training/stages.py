"""`train`: from cells to a complete pipeline.

The output folder then holds a pipeline for `ScRNAGenerationPipeline.from_pretrained`. It also holds `split.json`
(names of training and held-out cells), `training_log.csv` (losses), `training.json` (facts for the model card), and
for resuming `run.json` (the flags), `stage_one/` and `checkpoint-N/`.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path

import anndata as ad
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import ModelMixin
from huggingface_hub import create_repo

from ..data.cells import CellSource
from ..data.latents import MAX_VALUES_IN_MEMORY, CellDataset, Latents, encode_cells, encode_source, sample_cells
from ..files import remove
from ..hub.facts import write_training
from ..hub.model_card import write_model_card
from ..hub.publish import publish
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from ..pipelines.prompts import load_text_encoder
from ..processing.genes import check_variation
from ..processing.processor import ScRNAProcessor
from ..sampling.schedulers import make_scheduler
from .cells import open_cells
from .checkpoints import LATENTS_NAME, STAGE_ONE_NAME, find_run, start_run
from .codec import TIME_FRACTION, fit_any_codec
from .config import CodecConfig, TrainingConfig, command_of, config_without_places
from .denoiser import Callback, DenoiserTraining
from .gaussian_mixture import prepare_gaussian_mixture
from .init_from import Start
from .processes import fit_once, stop_signal, sync_errors


logger = get_logger(__name__)

ENOUGH_STEPS = 1000  # with fewer, generated cells are easily distinguished from real ones


def fit_codec(
    cells: ad.AnnData | CellSource, config: CodecConfig | None = None
) -> tuple[ScRNAProcessor, ProgramCodec | ExpressionCodec]:
    """
    Fits a processor and a codec to training cells: the first stage of [`train`], for a denoiser of your own.

    `encode_cells(CellDataset(cells, processor), codec)` then gives the latents. Returns both on the CPU. Raises a
    `ValueError` if the cells can't be modelled.
    """
    config, device = config or CodecConfig(), PartialState().device
    processor, dataset = _fit_processor(cells, config)
    start = None if config.init_from is None else Start.load(config, processor, processor.source(cells).var_names)
    return processor, fit_any_codec(config, dataset, device, start=start).cpu()


def _fit_processor(cells: ad.AnnData | CellSource, config: CodecConfig) -> tuple[ScRNAProcessor, CellDataset]:
    """A processor of the training cells, and those of them that stage one sees."""
    processor = ScRNAProcessor(
        values=config.values,
        recover_counts=config.codec != "expression",
        layer=config.layer,
        round_counts=config.round_counts,
        label_keys=config.label_keys,
        num_genes=config.num_genes or None,
    ).fit(cells)
    dataset = sample_cells(cells, processor, config.seed)
    check_variation(dataset.matrix)
    return processor, dataset


def train(
    source: str | Path | ad.AnnData | None,
    config: TrainingConfig,
    denoiser: Callable[..., ModelMixin] | None = None,
    callbacks: Sequence[Callback] = (),
) -> ScRNAGenerationPipeline:
    """
    Trains codec and denoiser on cells, and writes the pipeline to `config.output_dir`. Returns it, on the CPU.

    Args:
        source (`str`, `Path` or `AnnData`, *optional*):
            Cells, their file, or a folder that `wbdit prepare` wrote. Default: `config.dataset`.
        config ([`TrainingConfig`]): All settings.
        denoiser (`Callable`, *optional*):
            Class or function that makes the network: `denoiser(sample_size=..., condition_sizes=...)` returns a
            [`ModelMixin`] with these two in its config. It is called as [`WhiteBoxDiTModel`] with `(sample, timestep,
            class_labels, return_dict)`. Default: a [`WhiteBoxDiTModel`] from `config`.
        callbacks (`Sequence[Callable]`, defaults to `()`):
            Functions that get each row of the log: a dict with `step`, `epoch`, `seconds`, `learning_rate`, `loss` and
            `validation_loss`. They run in the main process.

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
            checkpoint, replaced = find_run(config)
            text_parts = load_text_encoder(config.text_encoder)
            train_cells, test_cells, split = stack.enter_context(open_cells(source, config))
            processor, train_dataset = _fit_processor(train_cells, config)
            test_cells = test_cells[processor.knows_labels(test_cells)]
            if test_cells.n_obs == 0:
                raise ValueError("No held-out cell has labels that a training cell has. Use another --split.")
            test_dataset = CellDataset(test_cells, processor)
            start = Start.load(config, processor, train_cells.var_names) if config.init_from is not None else None
        with sync_errors(accelerator):
            if accelerator.is_main_process:
                repo_id = config.repo_id or folder.resolve().name
                if config.push_to_hub:  # fails before the work if nothing can be uploaded
                    repo_id = create_repo(repo_id, exist_ok=True).repo_id
                stack.enter_context(start_run(config, split, replaced))

        genes = f"{len(processor.var_names):,} of {len(train_cells.var_names):,} genes"
        kind = "the most variable ones" if config.num_genes else "those that at least 3 training cells express"
        logger.info(f"{len(train_cells.obs):,} training cells, {test_cells.n_obs:,} held out, {genes}: {kind}.")
        deadline = start_time + 60 * TIME_FRACTION * (config.max_train_minutes or math.inf)
        codec_class = ExpressionCodec if config.codec == "expression" else ProgramCodec
        fit = partial(fit_any_codec, config, train_dataset, accelerator.device, deadline, start)
        codec = fit_once(accelerator, stage_one / "codec", codec_class, fit)
        with accelerator.main_process_first():
            is_large = len(train_cells.obs) * codec.num_features > MAX_VALUES_IN_MEMORY
            if is_large or len(train_dataset) < len(train_cells.obs):
                values = encode_source(train_cells, processor, codec, folder / LATENTS_NAME)
            else:
                values = encode_cells(train_dataset, codec)
        latents = Latents(values, processor.encode_labels(train_cells), processor.condition_sizes)
        test_latents = Latents(encode_cells(test_dataset, codec), test_dataset.class_labels, processor.condition_sizes)
        gaussian_mixture = prepare_gaussian_mixture(config, accelerator, latents, codec, stage_one)

        set_seed(config.seed)  # the initial weights are the same whether or not stage one ran in this process
        inputs = latents, test_latents, start_time, gaussian_mixture, denoiser, callbacks, start
        training = DenoiserTraining(config, accelerator, *inputs)
        accelerator.init_trackers("wbdit_diffusers", {key: str(value) for key, value in vars(config).items()})
        with sync_errors(accelerator):
            if checkpoint is not None:
                training.resume(checkpoint)
            if accelerator.is_main_process:
                training.start_log()
        training.run()

        with sync_errors(accelerator), stop_signal.deferred():
            pipeline = ScRNAGenerationPipeline(
                denoiser=training.averaged_model(),
                scheduler=make_scheduler(config.scheduler, training.noise_scheduler.config),
                processor=processor,
                codec=codec,
                gaussian_mixture=gaussian_mixture and gaussian_mixture.cpu(),
                num_inference_steps=config.num_inference_steps,
                label_texts=config.label_texts or None,
                **text_parts,
            )
            if accelerator.is_main_process:
                _save(pipeline, config, training, repo_id, len(split.test) or test_cells.n_obs)
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
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"{accelerator.distributed_type.value}: use training/accelerate/multi_gpu.yaml instead.")
    if config.report_to is not None and not accelerator.log_with:
        raise ValueError(f"--report_to {config.report_to}: this tracker is not installed. Install it.")
    return accelerator


def _save(
    pipeline: ScRNAGenerationPipeline, config: TrainingConfig, training: DenoiserTraining, repo_id: str, num_test: int
):
    """Writes the pipeline and its model card, and uploads them if asked to."""
    folder, step = config.output_dir, training.progress.step
    pipeline.save_pretrained(folder)
    share = "none" if training.gaussian_mixture is None else f"1 to {config.mixture_share:g}"
    facts = {
        "training cells": len(training.train_cells),
        "held-out cells": num_test,
        "steps": step,
        "cells per step": training.cells_per_step,
        "learning rate": config.learning_rate,
        "share of the Gaussian mixture in the target": share,
        "EMA decay": config.ema_decay if config.use_ema else "none",
        "mixed precision": training.accelerator.mixed_precision,
        "seed": config.seed,
        "validation loss": round(training.validation_loss(), 6),
    }
    if step < ENOUGH_STEPS:
        facts["warning"] = f"only {step} denoiser steps; with fewer than {ENOUGH_STEPS:,}, generated cells are poor."
        logger.warning(f"WARNING: {facts['warning']} Raise --max_train_steps or --max_train_minutes.")
    command = command_of(config) if training.has_our_denoiser else None  # a command can't name another network
    write_training(folder, config_without_places(config), command, len(training.train_cells), facts)
    write_model_card(pipeline, folder, repo_id)
    remove(folder / LATENTS_NAME)
    logger.info(f"Saved the pipeline to {folder}.")
    if config.push_to_hub:
        logger.info(f"Published: {publish(pipeline, folder, repo_id)}")
