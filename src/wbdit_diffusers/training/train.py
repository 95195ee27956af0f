"""`train`: from cells to a complete pipeline.

    wbdit train --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells
    accelerate launch training/train.py --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells

The output folder then holds what `ScRNAGenerationPipeline.from_pretrained` needs, and besides it: `split.json` (the
names of the training and of the held-out cells), `training_log.csv` (the losses), `checkpoint-N/` (to resume from).
"""

import csv
import time
from pathlib import Path

import anndata as ad
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from huggingface_hub import create_repo, upload_folder

from ..data.dataset import CellDataset
from ..data.io import drop_empty_cells, read_cells
from ..data.split import CellSplit
from ..hub.model_card import render_model_card
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from ..processing.processor import ScRNAProcessor
from ..sampling.schedulers import SCHEDULERS, training_scheduler
from .checkpoints import resolve_checkpoint
from .codec import prepare_codec
from .config import TrainingConfig
from .denoiser import DenoiserTraining, batch_sizes


logger = get_logger(__name__)


def train(source: str | Path | ad.AnnData | None, config: TrainingConfig) -> ScRNAGenerationPipeline:
    """
    Trains codec and denoiser on cells, and writes the pipeline to `config.output_dir`.

    Args:
        source (`str`, `Path` or `AnnData`, *optional*): The cells, or their .h5ad file; `config.dataset` if `None`.
        config ([`TrainingConfig`]): Everything else.

    Returns:
        [`ScRNAGenerationPipeline`]: the trained pipeline, on the CPU.

    Raises:
        ValueError: If the cells can't be modelled (see [`ScRNAProcessor.fit`]), or flags don't fit them.
        OSError: If a file can't be read or written.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_config=ProjectConfiguration(str(config.output_dir), logging_dir=str(config.output_dir / "logs")),
        # The order of the cells depends on the seed and the epoch alone, so that a resumed run goes on with it.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed, non_blocking=True),
    )
    set_seed(config.seed)
    checkpoint = resolve_checkpoint(config.resume_from_checkpoint, config.output_dir)

    # 1. Cells: split once, everything is fitted on the training cells
    adata = _read_source(source, config)
    split = _split(adata, config)
    train_cells, test_cells = split.apply(adata)
    processor = ScRNAProcessor(
        values=config.values,
        recover_counts=config.codec != "expression",
        layer=config.layer,
        label_keys=config.label_keys,
        num_genes=config.num_genes or None,
    ).fit(train_cells)
    train_dataset = CellDataset(train_cells, processor)
    batch_sizes(config, len(train_dataset), accelerator.num_processes)  # raises before work is lost
    # Labels that only held-out cells have are unknown to the model.
    test_dataset = CellDataset(test_cells[processor.knows_labels(test_cells)], processor)
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        split.save(config.output_dir)

    # 2. The codec: what the denoiser sees
    start_time = time.monotonic()
    codec = prepare_codec(config, accelerator, train_dataset, checkpoint)
    train_dataset.encode(codec)
    test_dataset.encode(codec)

    # 3. The denoiser
    noise_scheduler = training_scheduler(config.prediction_type)
    training = DenoiserTraining(
        *(config, accelerator, noise_scheduler, train_dataset, test_dataset),
        sample_size=codec.num_features,
        condition_sizes=processor.condition_sizes,
        start_time=start_time,
    )
    if config.report_to is not None:
        accelerator.init_trackers("wbdit_diffusers", config={key: str(value) for key, value in vars(config).items()})
    if checkpoint is not None:
        training.resume(checkpoint)
    if accelerator.is_main_process:
        training.start_log(resumed=checkpoint is not None)
    logger.info(
        f"{len(train_dataset)} training cells, {test_cells.n_obs} held out; {codec.num_features} values per cell,"
        f" {training.validation_model.num_parameters():,} parameters; {training.steps_per_epoch} steps of"
        f" {training.cells_per_step} cells per epoch."
    )
    training.run()

    # 4. The pipeline, complete
    pipeline = ScRNAGenerationPipeline(
        denoiser=training.averaged_model(),
        scheduler=SCHEDULERS[config.scheduler].from_config(noise_scheduler.config),
        processor=processor,
        codec=codec,
        num_inference_steps=config.num_inference_steps,
    )
    if accelerator.is_main_process:
        _save(pipeline, config, training, split)
    accelerator.end_training()
    return pipeline


def _read_source(source: str | Path | ad.AnnData | None, config: TrainingConfig) -> ad.AnnData:
    if source is not None and config.dataset is not None:
        raise ValueError("Give the cells once: as `source`, or as --dataset.")
    source = source if source is not None else config.dataset
    if source is None:
        raise ValueError("--dataset is required.")
    adata = source if isinstance(source, ad.AnnData) else read_cells(source)
    if config.layer is None or config.layer in adata.layers:  # else the processor says which layers there are
        adata = drop_empty_cells(adata, config.layer)
    return adata


def _split(adata: ad.AnnData, config: TrainingConfig) -> CellSplit:
    if config.split is not None:
        return CellSplit.load(config.split)
    label_key = config.label_keys[0] if config.label_keys else None
    return CellSplit.draw(adata, config.test_fraction, label_key=label_key, seed=config.seed)


def _save(pipeline: ScRNAGenerationPipeline, config: TrainingConfig, training: DenoiserTraining, split: CellSplit):
    """Writes the pipeline and its model card, and uploads them if asked to."""
    pipeline.save_pretrained(config.output_dir)
    repo_id = config.hub_model_id or config.output_dir.name
    if config.push_to_hub:
        repo_id = create_repo(repo_id, exist_ok=True).repo_id
    rows = list(csv.DictReader(training.log_path.open()))
    facts = {
        "training cells": len(split.train),
        "held-out cells": len(split.test),
        "steps": training.global_step,
        "cells per step": training.cells_per_step,
        "learning rate": config.learning_rate,
        "EMA decay": config.ema_decay if config.use_ema else "none",
        "mixed precision": training.accelerator.mixed_precision,
        "seed": config.seed,
        "validation loss": rows[-1]["validation_loss"] if rows else "not measured",
    }
    render_model_card(pipeline, repo_id, training=facts).save(config.output_dir / "README.md")
    logger.info(f"Saved the pipeline to {config.output_dir}.")
    if config.push_to_hub:
        upload_folder(
            repo_id=repo_id,
            folder_path=config.output_dir,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*", "logs*"],
        )
