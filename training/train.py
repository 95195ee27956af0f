"""Trains a White-Box DiT on single cells and writes a complete pipeline.

    accelerate launch training/train.py --dataset cells.h5ad --label_keys cell_type --output_dir wbdit-cells

Every flag can stand in a YAML file instead (`--config training/configs/paper.yaml`; of several the later wins, and a
flag on the command line over all).
`--output_dir` then holds what `ScRNAGenerationPipeline.from_pretrained` needs, and besides it: `split.json` (the names
of the training and of the held-out cells), `training_log.csv` (the losses), `checkpoint-N/` (to resume from).
"""

import argparse
import csv
import json
import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import psutil
import torch
import torch.distributed.run
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_folder
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from wbdit_diffusers import CountAutoencoder, ScRNAGenerationPipeline, ScRNAProcessor, WhiteBoxDiTModel
from wbdit_diffusers.data import CellDataset, drop_empty_cells, read_cells, split_cells
from wbdit_diffusers.model_card import render_model_card


logger = get_logger(__name__)

MIN_PROGRAMS, MAX_PROGRAMS = 16, 64

# Flags whose default depends on --space. Expression space has the published shape.
SPACE_DEFAULTS = {
    "program": {
        "num_genes": 2000,
        "patch_size": 8,
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 48,
        "train_batch_size": 256,
    },
    "expression": {
        "num_genes": 2000,
        "patch_size": 10,
        "num_layers": 3,
        "num_attention_heads": 8,
        "attention_head_dim": 96,
        "train_batch_size": 64,
    },
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[],
        help="YAML files of flags: a later one wins, the command line over all.",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="An .h5ad file.")
    data.add_argument("--layer", help="Layer that holds the matrix; X by default.")
    data.add_argument("--values", choices=["counts", "log"], default="counts", help="What the matrix holds.")
    data.add_argument("--label_keys", nargs="*", default=[], help="obs keys to condition on, the cell type first.")
    data.add_argument("--num_genes", type=int, help="Highly variable genes to model; 0 for all.")
    data.add_argument(
        "--standardize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Give each modelled value mean 0 and variance 1.",
    )
    data.add_argument(
        "--model_library_size",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Generate the log library size together with the expression.",
    )
    data.add_argument(
        "--space",
        choices=["program", "expression"],
        help="What is denoised: gene programs with a count likelihood (the default for counts), or log expression as"
        " in the paper (the default for log values).",
    )
    data.add_argument("--test_fraction", type=float, default=0.2, help="Share of the cells to hold out.")
    data.add_argument("--split", type=Path, help="Hold out the same cells as another run: its split.json.")

    autoencoder = parser.add_argument_group("count autoencoder, of program space")
    autoencoder.add_argument("--num_programs", type=int, help="Chosen by held-out likelihood by default.")
    autoencoder.add_argument("--autoencoder_hidden_size", type=int, default=256)
    autoencoder.add_argument("--autoencoder_learning_rate", type=float, default=1e-3)
    autoencoder.add_argument("--dispersion_learning_rate", type=float, default=1e-2)
    autoencoder.add_argument("--autoencoder_weight_decay", type=float, default=0.01)
    autoencoder.add_argument("--autoencoder_batch_size", type=int, default=128)
    autoencoder.add_argument("--autoencoder_max_steps", type=int, default=20_000, help="It stops earlier by itself.")
    autoencoder.add_argument(
        "--kl_weight", type=float, default=0.3, help="Of the programs' divergence from a normal distribution."
    )
    autoencoder.add_argument(
        "--decoder_steps", type=int, default=400, help="Steps of the decoder alone, on the encoder's final programs."
    )

    model = parser.add_argument_group("model")
    model.add_argument("--block_type", choices=["white_box", "dit"], default="white_box")
    model.add_argument("--patch_size", type=int, help="Genes, or programs, per token.")
    model.add_argument("--num_layers", type=int)
    model.add_argument("--num_attention_heads", type=int)
    model.add_argument("--attention_head_dim", type=int)
    model.add_argument("--condition_dropout", type=float, default=0.1, help="Share of cells trained without labels.")
    model.add_argument("--prediction_type", choices=["epsilon", "v_prediction", "sample"], default="v_prediction")
    model.add_argument("--num_inference_steps", type=int, default=20, help="The pipeline's default; not for training.")

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", type=Path)
    training.add_argument("--train_batch_size", type=int, help="Per process.")
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Batches per step of the optimizer."
    )
    training.add_argument("--max_train_steps", type=int, default=10_000)
    training.add_argument("--max_train_minutes", type=float, help="Stop after this time, if it comes first.")
    training.add_argument("--learning_rate", type=float, default=2e-3)
    training.add_argument("--lr_warmup_steps", type=int, default=100)
    training.add_argument(
        "--lr_decay_fraction",
        type=float,
        default=0.3,
        help="Last part of the training, in steps or minutes, in which the learning rate falls to 0.",
    )
    training.add_argument("--weight_decay", type=float, default=0.01)
    training.add_argument("--max_grad_norm", type=float, default=1.0)
    training.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="accelerate's setting by default.")
    training.add_argument(
        "--compile", action="store_true", help="Compile the blocks with torch.compile: slower to start, faster steps."
    )
    training.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=True)
    training.add_argument("--ema_decay", type=float, default=0.999)
    training.add_argument("--validation_steps", type=int, default=200, help="Steps between two lines of the log.")
    training.add_argument("--checkpointing_steps", type=int, default=1000)
    training.add_argument("--checkpoints_total_limit", type=int, help="Keep only the newest checkpoints.")
    training.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or 'latest'.")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--report_to", help="A tracker of accelerate, e.g. 'tensorboard' or 'wandb'.")

    hub = parser.add_argument_group("hub")
    hub.add_argument("--push_to_hub", action="store_true")
    hub.add_argument("--hub_model_id", help="Repository; the name of --output_dir in your namespace by default.")

    for config_path in parser.parse_known_args(argv)[0].config:
        config = yaml.safe_load(config_path.read_text()) or {}
        unknown = sorted(set(config) - {action.dest for action in parser._actions})
        if unknown:
            parser.error(f"{config_path} sets {', '.join(unknown)}, which is no flag of train.py (see --help).")
        parser.set_defaults(**config)
    args = parser.parse_args(argv)
    if args.space is None:
        args.space = "program" if args.values == "counts" else "expression"
    if args.space == "program" and args.values != "counts":
        parser.error("--space program is a likelihood of counts: log values need --space expression.")
    for name, value in SPACE_DEFAULTS[args.space].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for required in ("dataset", "output_dir"):
        if getattr(args, required) is None:
            parser.error(f"--{required} is required.")
    args.output_dir = Path(args.output_dir)
    return args


def read_split(path: Path, adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Positions of the training and of the held-out cells that a split.json names, and its seed."""
    split = json.loads(path.read_text())
    if not split.get("train") or not split.get("test"):
        raise ValueError(f"--split {path} is no split.json of train.py: it does not name train and test cells.")
    names = split["train"] + split["test"]
    if len(set(names)) < len(names):
        raise ValueError(f"--split {path} names a cell twice, so that it would be trained on and held out.")
    positions = adata.obs_names.get_indexer(names)
    if (positions < 0).any():
        name = names[int(np.argmin(positions))]
        raise ValueError(f"--split {path} names the cell {name!r}, which the dataset does not have.")
    return positions[: len(split["train"])], positions[len(split["train"]) :], split.get("seed")


def diffusion_loss(
    model: torch.nn.Module, noise_scheduler: DDPMScheduler, batch: dict[str, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the prediction at one random timestep per cell."""
    latents = batch["latents"]  # (batch, num_features)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    # Timestep 0 is left out, as in the paper.
    timesteps = torch.randint(
        1, noise_scheduler.config.num_train_timesteps, (len(latents),), generator=generator, device=latents.device
    )
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    class_labels = batch["class_labels"] if batch["class_labels"].shape[1] else None
    prediction = model(noisy_latents, timesteps, class_labels=class_labels, return_dict=False)[0]

    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    elif noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = latents
    return F.mse_loss(prediction.float(), target)


def learning_rate(args: argparse.Namespace, step: int, seconds: float) -> float:
    """Warm-up, a plateau, and a linear decay that ends with the training, be that by steps or by time."""
    progress = step / args.max_train_steps
    if args.max_train_minutes is not None:
        progress = max(progress, seconds / (args.max_train_minutes * 60))
    warmup = min(1.0, (step + 1) / max(args.lr_warmup_steps, 1))
    decay = min(1.0, (1 - progress) / args.lr_decay_fraction) if args.lr_decay_fraction > 0 else 1.0
    return args.learning_rate * warmup * max(decay, 0.01)


def train_autoencoder(
    args: argparse.Namespace, dataset: CellDataset, num_programs: int, device: torch.device, deadline: float
) -> tuple[CountAutoencoder, float]:
    """
    Fits the count likelihood, and stops where cells set aside for it say so, or when the clock reaches the deadline.

    One in ten of the *training* cells, 2,000 at most, is set aside; held-out cells are never seen. Also returns the
    best loss on those set aside. The weights are the last ones, not those of that best loss: programs that follow
    their cells a little more closely, with a decoder calibrated for them afterwards, give better cells
    (docs/experiments.md).
    """
    generator = torch.Generator().manual_seed(args.seed)
    shuffled = torch.randperm(len(dataset), generator=generator).numpy()
    num_validation = min(max(1, len(dataset) // 10), 2000)
    validation_cells, train_cells = shuffled[:num_validation], shuffled[num_validation:]
    torch.manual_seed(args.seed)
    autoencoder = CountAutoencoder(
        num_genes=dataset.matrix.shape[1], num_programs=num_programs, hidden_size=args.autoencoder_hidden_size
    ).to(device)
    autoencoder.fit_statistics(dataset.matrix, dataset.library_size)
    # The noise of genes spans orders of magnitude, and must get there before the programs overfit.
    noise = [autoencoder.dispersion.bias, autoencoder.zero_inflation.bias]
    others = [parameter for parameter in autoencoder.parameters() if all(parameter is not bias for bias in noise)]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": noise, "lr": args.dispersion_learning_rate, "weight_decay": 0.0}],
        lr=args.autoencoder_learning_rate,
        weight_decay=args.autoencoder_weight_decay,
    )

    def loss_of(counts: torch.Tensor) -> torch.Tensor:
        negative_log_likelihood, divergence = autoencoder(counts.to(device))
        return negative_log_likelihood + args.kl_weight * divergence

    @torch.no_grad()
    def validation_loss() -> float:
        """On the cells set aside, always with the same draws from the posterior."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = [
                loss_of(dataset.counts(validation_cells[start : start + 512]))
                for start in range(0, num_validation, 512)
            ]
        return torch.cat(losses).mean().item()

    # Evaluated once per 100 steps; given up when the loss is 1.5% above the best, or has not improved for 1,000 steps.
    best_loss, best_step, step, stop = float("inf"), 0, 0, False
    progress_bar = tqdm(desc=f"Count autoencoder, {num_programs} programs", unit=" steps", mininterval=1)
    while not stop:
        cells = torch.randint(len(train_cells), (args.autoencoder_batch_size,), generator=generator).numpy()
        loss = loss_of(dataset.counts(train_cells[cells])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        progress_bar.update()
        stop = step == args.autoencoder_max_steps or time.monotonic() > deadline
        if step % 100 == 0 or stop:
            held_out_loss = validation_loss()
            if held_out_loss < best_loss:
                best_loss, best_step = held_out_loss, step
            stop = stop or held_out_loss > 1.015 * best_loss or step - best_step >= 1000
            progress_bar.set_postfix(loss=round(loss.item(), 2), held_out_loss=round(held_out_loss, 2))
    progress_bar.close()
    logger.info(f"{num_programs} programs: held-out loss {best_loss:.2f} nats per cell after {best_step} steps.")
    return autoencoder, best_loss


def refit_decoder(
    args: argparse.Namespace, dataset: CellDataset, autoencoder: CountAutoencoder, programs: torch.Tensor
):
    """
    Fits the decoder once more, to all training cells and the encoder's final programs of them.

    The denoiser will imitate these programs, without the noise under which the decoder was trained: what varies in the
    cells and is not in the programs must be in the decoder's noise, no more and no less.
    """
    generator = torch.Generator().manual_seed(args.seed)
    parameters = [
        parameter
        for layer in (autoencoder.decoder, autoencoder.dispersion, autoencoder.zero_inflation)
        for parameter in layer.parameters()
    ]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=args.autoencoder_weight_decay)
    lr_scheduler = get_scheduler("cosine", optimizer, num_training_steps=args.decoder_steps, num_warmup_steps=0)
    for _ in tqdm(range(args.decoder_steps), desc="Decoder", unit=" steps", mininterval=1):
        cells = torch.randint(len(dataset), (2 * args.autoencoder_batch_size,), generator=generator)
        counts = dataset.counts(cells.numpy()).to(autoencoder.device)
        loss = autoencoder.negative_log_likelihood(counts, programs[cells].to(autoencoder.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()


def choose_autoencoder(args: argparse.Namespace, dataset: CellDataset, device: torch.device) -> CountAutoencoder:
    """
    First stage of program space. Unless their number is given, twice as many programs as long as they make the loss of
    the cells set aside at least 1% lower: each one is a dimension more for the denoiser to learn, and smaller gains
    cost more there than they bring here.

    It takes no more than a third of the time. The latents come out standardised.
    """
    minutes = math.inf if args.max_train_minutes is None else args.max_train_minutes / 3
    deadline = time.monotonic() + 60 * minutes
    autoencoder, best_loss = train_autoencoder(args, dataset, args.num_programs or MIN_PROGRAMS, device, deadline)
    while args.num_programs is None and 2 * autoencoder.config.num_programs <= MAX_PROGRAMS:
        larger, loss = train_autoencoder(args, dataset, 2 * autoencoder.config.num_programs, device, deadline)
        if loss > 0.99 * best_loss:
            break
        autoencoder, best_loss = larger, loss
    dataset.encode(autoencoder)  # not yet standardised: the programs, and the log library size
    refit_decoder(args, dataset, autoencoder, dataset.latents[:, :-1])
    autoencoder.standardize_latents(dataset.latents)
    return autoencoder.eval()


def prepare_autoencoder(
    args: argparse.Namespace, accelerator: Accelerator, dataset: CellDataset, checkpoint: Path | None
) -> CountAutoencoder:
    """Trains the autoencoder on the main process, or takes it from the run to resume; all processes get the same."""
    if checkpoint is not None:
        return CountAutoencoder.from_pretrained(checkpoint.parent / "autoencoder")
    folder = args.output_dir / "autoencoder"
    if accelerator.is_main_process:
        choose_autoencoder(args, dataset, accelerator.device).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return CountAutoencoder.from_pretrained(folder)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def resolve_checkpoint(resume_from_checkpoint: str, output_dir: Path) -> Path | None:
    """The folder to resume from; `None` when there is nothing yet to resume."""
    if resume_from_checkpoint == "latest":
        checkpoints = find_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    path = Path(resume_from_checkpoint)
    if not (path / "model.safetensors").is_file():
        raise ValueError(f"{path} is no checkpoint of train.py: give a checkpoint-N folder, or 'latest'.")
    return path


def main(args: argparse.Namespace):
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs")
        ),
        # The order of the cells depends on the seed and the epoch alone, so that a resumed run goes on with it.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed, non_blocking=True),
    )
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    set_seed(args.seed)
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        torch.set_num_threads(psutil.cpu_count(logical=False))  # accelerate launch allows one, unless given --cpu

    checkpoint = (
        resolve_checkpoint(args.resume_from_checkpoint, args.output_dir) if args.resume_from_checkpoint else None
    )

    # 1. Cells: split once, fit everything on the training cells
    label_keys = list(args.label_keys)
    adata = read_cells(args.dataset)
    if args.layer is None or args.layer in adata.layers:  # else the processor says which layers there are
        adata = drop_empty_cells(adata, args.layer)
    if not adata.obs_names.is_unique:
        name = adata.obs_names[adata.obs_names.duplicated()][0]
        raise ValueError(
            f"The cell name {name!r} occurs more than once in {args.dataset}, so that split.json could not say which"
            " cell was held out: call `adata.obs_names_make_unique()` and write the file again."
        )
    processor = ScRNAProcessor(
        values=args.values,
        layer=args.layer,
        label_keys=label_keys,
        num_genes=args.num_genes or None,
        standardize=args.standardize,
        model_library_size=args.model_library_size,
    )
    if args.split is not None:
        train_cells, test_cells, split_seed = read_split(args.split, adata)
    else:
        split_seed = args.seed
        train_cells, test_cells = split_cells(
            adata, args.test_fraction, label_key=label_keys[0] if label_keys else None, seed=split_seed
        )
    processor.fit(adata[train_cells])
    train_dataset = CellDataset(adata[train_cells], processor)
    # Labels that only held-out cells have are unknown to the model.
    known = torch.ones(len(test_cells), dtype=torch.bool)
    for key, names in zip(label_keys, processor.config.categories):
        known &= torch.from_numpy(adata.obs[key].iloc[test_cells].astype(str).isin(names).to_numpy())
    test_dataset = CellDataset(adata[test_cells[known.numpy()]], processor)

    train_batch_size = min(args.train_batch_size, max(1, len(train_dataset) // accelerator.num_processes))
    batches_per_epoch = len(train_dataset) // train_batch_size // accelerator.num_processes
    if args.gradient_accumulation_steps > max(1, batches_per_epoch):
        raise ValueError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: an epoch has only {batches_per_epoch}"
            f" batches of {train_batch_size} cells, and a step can't take more: lower it."
        )

    # 2. Program space: the count autoencoder first; the denoiser then sees its latents
    start_time = time.monotonic()
    autoencoder = None
    if args.space == "program":
        autoencoder = prepare_autoencoder(args, accelerator, train_dataset, checkpoint)
        train_dataset.encode(autoencoder)
        test_dataset.encode(autoencoder)
    train_dataloader = DataLoader(
        train_dataset,
        batch_size=train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=CellDataset.collate,
        # Accelerate sends a batch while the GPU works on the one before; from pinned memory, without waiting for it.
        pin_memory=accelerator.device.type == "cuda",
    )

    # 3. Model, noise and optimizer
    num_features = processor.num_features if autoencoder is None else autoencoder.num_features
    model = WhiteBoxDiTModel(
        num_genes=num_features,
        patch_size=args.patch_size,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        block_type=args.block_type,
        condition_sizes=processor.condition_sizes,
        condition_dropout=args.condition_dropout,
    )
    # The paper's schedule: 1,000 steps, β linear from 1e-4 to 0.02. Expression is no image in [-1, 1]: never clip.
    # "trailing": from any number of steps, and with any solver made `from_config`, the first is at pure noise.
    noise_scheduler = DDPMScheduler(
        prediction_type=args.prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    # Without EMA the average has decay 0: it is the model itself.
    ema_kwargs = {
        "decay": args.ema_decay if args.use_ema else 0.0,
        "use_ema_warmup": True,
        "power": 2 / 3,
        "foreach": True,
    }
    ema = EMAModel(model.parameters(), **ema_kwargs, model_cls=WhiteBoxDiTModel, model_config=model.config)
    ema.to(accelerator.device)
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    if args.report_to is not None:
        accelerator.init_trackers("wbdit_diffusers", config={key: str(value) for key, value in vars(args).items()})

    # 4. Resume
    global_step = 0
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        ema = EMAModel.from_pretrained(checkpoint / "ema", WhiteBoxDiTModel, foreach=True)
        ema.to(accelerator.device)
        global_step = int(checkpoint.name.split("-")[1])
        logger.info(f"Resuming from {checkpoint}.")
    steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    log_path = args.output_dir / "training_log.csv"
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        split = {
            "seed": split_seed,
            "train": adata.obs_names[train_cells].tolist(),
            "test": adata.obs_names[test_cells].tolist(),
        }
        (args.output_dir / "split.json").write_text(json.dumps(split))
        # A resumed log forgets what came after the checkpoint.
        rows = list(csv.DictReader(log_path.open())) if checkpoint is not None and log_path.exists() else []
        with log_path.open("w", newline="") as file:
            log = csv.DictWriter(file, ["step", "epoch", "seconds", "learning_rate", "loss", "validation_loss"])
            log.writeheader()
            log.writerows(row for row in rows if int(row["step"]) <= global_step)

    def batch_generator(step: int, batch: int) -> torch.Generator:
        """All randomness comes from the numbers of step, batch and process, so that resuming is exact."""
        number = (step * args.gradient_accumulation_steps + batch) * accelerator.num_processes
        seed = args.seed * 1_000_003 + number + accelerator.process_index
        torch.manual_seed(seed)  # the label dropout inside the model
        return torch.Generator(accelerator.device).manual_seed(seed)

    validation_model = (
        WhiteBoxDiTModel.from_config(accelerator.unwrap_model(model).config).to(accelerator.device).eval()
    )
    validation_batch = test_dataset.__getitems__(list(range(min(len(test_dataset), 512))))
    validation_batch = {key: value.to(accelerator.device) for key, value in validation_batch.items()}

    @torch.no_grad()
    def validation_loss() -> float:
        """Loss of the averaged weights on held-out cells, always at the same noise and timesteps."""
        ema.copy_to(validation_model.parameters())
        generator = torch.Generator(accelerator.device).manual_seed(0)
        losses = [diffusion_loss(validation_model, noise_scheduler, validation_batch, generator) for _ in range(4)]
        return torch.stack(losses).mean().item()

    logger.info(
        f"{len(train_dataset)} training cells, {len(test_cells)} held out; {num_features} values per cell,"
        f" {validation_model.num_parameters():,} parameters; {steps_per_epoch} steps of"
        f" {train_batch_size * args.gradient_accumulation_steps} × {accelerator.num_processes} cells per epoch."
    )

    # 5. Train
    progress_bar = tqdm(
        # With a time limit nobody knows the number of steps.
        total=args.max_train_steps if args.max_train_minutes is None else None,
        initial=global_step,
        desc="Training",
        unit=" steps",
        mininterval=1,
        disable=not accelerator.is_local_main_process,
    )
    logged_losses = []  # since the last line of the log
    batches_of_step = 0
    stop = global_step >= args.max_train_steps
    model.train()
    while not stop:
        epoch, steps_done = divmod(global_step, steps_per_epoch)
        batches_done = steps_done * args.gradient_accumulation_steps
        train_dataloader.set_epoch(epoch)
        remaining = (
            accelerator.skip_first_batches(train_dataloader, batches_done) if batches_done else train_dataloader
        )
        for batch in remaining:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, global_step, time.monotonic() - start_time)
            with accelerator.accumulate(model):
                loss = diffusion_loss(model, noise_scheduler, batch, batch_generator(global_step, batches_of_step))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            logged_losses.append(loss.detach())
            batches_of_step += 1
            if not accelerator.sync_gradients:
                continue
            ema.step(accelerator.unwrap_model(model).parameters())
            global_step += 1
            batches_of_step = 0
            progress_bar.update()

            seconds = time.monotonic() - start_time
            stop = global_step >= args.max_train_steps
            if args.max_train_minutes is not None and global_step % 10 == 0:  # asking waits for the device
                if seconds > args.max_train_minutes * 60:
                    accelerator.set_trigger()  # one process's clock stops all of them
                stop = stop or accelerator.check_trigger()

            if global_step % args.validation_steps == 0 or stop:
                # Every process joins the reduction; the main one writes.
                mean_loss = accelerator.reduce(torch.stack(logged_losses).mean(), "mean").item()
                logged_losses.clear()
                if accelerator.is_main_process:
                    row = {
                        "step": global_step,
                        "epoch": global_step // steps_per_epoch,
                        "seconds": round(seconds, 1),
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "loss": round(mean_loss, 6),
                        "validation_loss": round(validation_loss(), 6),
                    }
                    with log_path.open("a", newline="") as file:
                        csv.DictWriter(file, list(row)).writerow(row)
                    progress_bar.set_postfix(loss=row["loss"], validation_loss=row["validation_loss"])
                    accelerator.log({key: row[key] for key in ("loss", "validation_loss")}, step=global_step)

            if global_step % args.checkpointing_steps == 0:
                checkpoint = args.output_dir / f"checkpoint-{global_step}"
                accelerator.save_state(checkpoint)
                if accelerator.is_main_process:
                    ema.save_pretrained(checkpoint / "ema")
                    if args.checkpoints_total_limit is not None:
                        for old in find_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                            shutil.rmtree(old)
            if stop:
                break
    progress_bar.close()
    accelerator.wait_for_everyone()

    # 6. The pipeline, complete
    if accelerator.is_main_process:
        denoiser = accelerator.unwrap_model(model)
        ema.copy_to(denoiser.parameters())
        pipeline = ScRNAGenerationPipeline(
            denoiser=denoiser.eval().cpu(),
            scheduler=noise_scheduler,
            processor=processor,
            autoencoder=autoencoder,
            num_inference_steps=args.num_inference_steps,
        )
        pipeline.save_pretrained(args.output_dir)
        repo_id = args.hub_model_id or args.output_dir.name
        if args.push_to_hub:
            repo_id = create_repo(repo_id, exist_ok=True).repo_id
        rows = list(csv.DictReader(log_path.open()))
        training = {
            "training cells": len(train_dataset),
            "held-out cells": len(test_cells),
            "steps": global_step,
            "cells per step": train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            "learning rate": args.learning_rate,
            "EMA decay": args.ema_decay if args.use_ema else "none",
            "mixed precision": accelerator.mixed_precision,
            "seed": args.seed,
            "validation loss": rows[-1]["validation_loss"] if rows else "not measured",
        }
        render_model_card(pipeline, repo_id, training=training).save(args.output_dir / "README.md")
        logger.info(f"Saved the pipeline to {args.output_dir}.")
        if args.push_to_hub:
            upload_folder(
                repo_id=repo_id,
                folder_path=args.output_dir,
                commit_message="End of training",
                ignore_patterns=["checkpoint-*", "logs*"],
            )
    accelerator.end_training()


def processes_that_accelerate_left_out() -> int:
    """
    Number of CPU processes that `accelerate launch --cpu --num_processes N` was asked for, if it started only one.

    accelerate starts several processes on CPUs only through MPI. Without it, it sets the address where they should
    meet, starts a single one, and says nothing; N stands nowhere but in its command line.
    """
    environment = os.environ
    if environment.get("ACCELERATE_USE_CPU") != "True" or "MASTER_ADDR" not in environment:
        return 1
    if {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & set(environment):
        return 1
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    return parser.parse_known_args(psutil.Process().parent().cmdline())[0].num_processes


if __name__ == "__main__":
    args = parse_args()
    num_cpu_processes = processes_that_accelerate_left_out()
    if num_cpu_processes > 1:
        torchrun = ["--nproc_per_node", str(num_cpu_processes), "--master_addr", os.environ["MASTER_ADDR"]]
        torch.distributed.run.main([*torchrun, "--master_port", os.environ["MASTER_PORT"], __file__, *sys.argv[1:]])
    else:
        main(args)
