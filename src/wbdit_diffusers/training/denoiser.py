"""Stage two: trains the denoiser on the latents of the training cells."""

import csv
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.dataset import CellDataset, StreamedCellDataset, prefetch
from ..data.order import BatchSampler
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from .checkpoints import check_finite, load_checkpoint, read_state, save_checkpoint, write_whole
from .config import TrainingConfig
from .mixture import share_of_mixture
from .processes import TrainingInterrupted, interruption, together


logger = get_logger(__name__)

MAX_TOKENS = 32  # of a cell, where no patch size is given: steps of more take minutes too many on a CPU
VALIDATION_CELLS = 512
VALIDATION_DRAWS = 4  # of noise and timesteps, for each of these cells
LOG_COLUMNS = ["step", "epoch", "seconds", "learning_rate", "loss", "validation_loss"]


def diffusion_loss(
    model: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    batch: dict[str, torch.Tensor],
    generator: torch.Generator,
    mixture: GaussianMixtureDenoiser | None = None,
    share: float = 0.0,
) -> torch.Tensor:
    """
    Mean squared error of the prediction at one random timestep for each cell.

    Args:
        model (`torch.nn.Module`): Predicts what the scheduler takes.
        noise_scheduler ([`DDPMScheduler`]): The forward process.
        batch (`dict`): `latents` (batch, num_features) and `class_labels` (batch, num_label_keys).
        generator (`torch.Generator`): Of noise and timesteps.
        mixture ([`GaussianMixtureDenoiser`], *optional*):
            Its prediction is this `share` of the target (distillation with an annealed teacher, arXiv 1907.04829). It
            is the mean of what a cell may be without its noise, and has none of the chance that a single cell's own
            noise has.
        share (`float`, defaults to 0.0): From 0 to 1.
    """
    latents = batch["latents"]  # (batch, num_features)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    # Timestep 0 is left out, as in the paper.
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(
        1, num_train_timesteps, (len(latents),), generator=generator, device=latents.device
    )  # (batch,)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    class_labels = batch["class_labels"] if batch["class_labels"].shape[1] else None
    prediction = model(noisy_latents, timesteps, class_labels=class_labels, return_dict=False)[0]
    if mixture is not None:
        with torch.no_grad():
            velocity = mixture(noisy_latents, timesteps, class_labels, return_dict=False)[0]
        a, s = mixture.signal_and_noise(timesteps, len(latents))  # (batch, 1) each
        latents = torch.lerp(latents, a * noisy_latents - s * velocity, share)
        noise = torch.lerp(noise, s * noisy_latents + a * velocity, share)
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: noise_scheduler.get_velocity(latents, noise, timesteps),
        "sample": lambda: latents,
    }[noise_scheduler.config.prediction_type]()
    return F.mse_loss(prediction.float(), target)


def progress_of(config: TrainingConfig, max_train_steps: int, step: int, seconds: float) -> float:
    """From 0 to 1 at the end of the training, be that by steps or by time."""
    progress = step / max_train_steps
    if config.max_train_minutes is not None:
        progress = max(progress, seconds / (config.max_train_minutes * 60))
    return min(progress, 1.0)


def learning_rate(config: TrainingConfig, max_train_steps: int, step: int, seconds: float) -> float:
    """Warm-up, a plateau, and a linear decay that ends with the training."""
    progress = progress_of(config, max_train_steps, step, seconds)
    warmup = min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
    decay = min(1.0, (1 - progress) / config.lr_decay_fraction) if config.lr_decay_fraction > 0 else 1.0
    return config.learning_rate * warmup * max(decay, 0.01)


def batch_sizes(config: TrainingConfig, num_cells: int, num_processes: int) -> tuple[int, int]:
    """
    Cells per batch of one process, and cells per step of the optimizer.

    Raises:
        ValueError: If an epoch has fewer batches than a step of the optimizer takes, or there are more processes than
            cells.
    """
    assert config.train_batch_size is not None  # the configuration has filled it in
    batch_size = min(config.train_batch_size, max(1, num_cells // num_processes))
    num_batches = num_cells // batch_size // num_processes
    if num_batches == 0:
        raise ValueError(f"{num_cells} training cells are too few for {num_processes} processes: start fewer.")
    if config.gradient_accumulation_steps > num_batches:
        raise ValueError(
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps}: an epoch has only {num_batches}"
            f" batches of {batch_size} cells, and a step can't take more: lower it."
        )
    return batch_size, batch_size * config.gradient_accumulation_steps * num_processes


class DenoiserTraining:
    """
    The training loop, with what it needs between two steps.

    Args:
        config ([`TrainingConfig`]): What to train, and how.
        accelerator (`Accelerator`): Devices and processes.
        noise_scheduler ([`DDPMScheduler`]): The forward process.
        train_dataset ([`CellDataset`]): Training cells, encoded.
        test_dataset ([`CellDataset`]): Held-out cells, encoded, for the validation loss.
        sample_size (`int`): Values per cell, the codec's `num_features`.
        condition_sizes (`tuple[int]`): Number of categories of each label key.
        start_time (`float`): Time of `time.monotonic()` at which the training began, stage one included.
        mixture ([`GaussianMixtureDenoiser`], *optional*): What the network learns from at first.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        noise_scheduler: DDPMScheduler,
        train_dataset: CellDataset,
        test_dataset: CellDataset,
        sample_size: int,
        condition_sizes: tuple[int, ...],
        start_time: float,
        mixture: GaussianMixtureDenoiser | None = None,
    ):
        self.config, self.accelerator, self.noise_scheduler = config, accelerator, noise_scheduler
        self.start_time, self.global_step = start_time, 0
        self.train_dataset, self.num_seen = train_dataset, 0  # cells that all processes together have seen
        self.mixture = mixture
        self._losses_before: list[float] = []  # of the run that is gone on with, since its last line of the log
        self.log_path = config.output_dir / "training_log.csv"
        model = WhiteBoxDiTModel(
            sample_size=sample_size,
            patch_size=config.patch_size or math.ceil(sample_size / MAX_TOKENS),
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            block_type=config.block_type,
            condition_sizes=condition_sizes,
            condition_dropout=config.condition_dropout,
        )
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.ema = EMAModel(
            model.parameters(),
            decay=config.ema_decay if config.use_ema else 0.0,  # with decay 0 the average is the model itself
            use_ema_warmup=True,
            power=2 / 3,
            foreach=True,
            model_cls=WhiteBoxDiTModel,
            model_config=model.config,
        )
        self.ema.to(accelerator.device)
        if config.compile:
            model.compile_repeated_blocks(fullgraph=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.batch_size, self.cells_per_step = batch_sizes(config, len(train_dataset), accelerator.num_processes)
        # A step may end one epoch and begin the next.
        steps_of_epochs = round(config.max_train_epochs * len(train_dataset) / self.cells_per_step)
        self.max_train_steps = min(config.max_train_steps, max(1, steps_of_epochs))

        self.validation_model = WhiteBoxDiTModel.from_config(model.config).to(accelerator.device).eval()
        # A random sample: files are often sorted by population.
        sample = np.random.default_rng(config.seed).permutation(len(test_dataset))[:VALIDATION_CELLS]
        batch = test_dataset.__getitems__(np.sort(sample).tolist())
        self.validation_batch = {key: value.to(accelerator.device) for key, value in batch.items()}

    def _batches(self) -> Generator[dict[str, torch.Tensor], None, None]:
        """This process's part of every batch from here on, endlessly."""
        accelerator, order = self.accelerator, self.train_dataset.order(self.config.seed)
        place = accelerator.process_index, accelerator.num_processes
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=BatchSampler(order, self.batch_size, *place, self.num_seen),
            collate_fn=CellDataset.collate,
            pin_memory=accelerator.device.type == "cuda",  # so that it is sent without waiting
        )
        is_streamed = isinstance(self.train_dataset, StreamedCellDataset)
        with closing(prefetch(loader)) if is_streamed else nullcontext(loader) as batches:
            for batch in batches:
                yield send_to_device(batch, accelerator.device, non_blocking=True)

    def resume(self, checkpoint: Path):
        """Goes on from a checkpoint: weights, optimizer, averaged weights, losses, and the place in the order."""
        self.ema, self._losses_before = load_checkpoint(self.accelerator, checkpoint, WhiteBoxDiTModel)
        self.ema.to(self.accelerator.device)
        state = read_state(checkpoint)
        self.global_step, self.num_seen = int(state["step"]), int(state["num_seen"])
        logger.info(f"Resuming from {checkpoint}.")

    def start_log(self, resumed: bool):
        """Writes the head of the log. A resumed one forgets what came after the checkpoint."""
        rows = list(csv.DictReader(self.log_path.open())) if resumed and self.log_path.exists() else []
        kept = [row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) <= self.global_step]

        def write(path: Path):
            with path.open("w", newline="") as file:
                log = csv.DictWriter(file, LOG_COLUMNS, extrasaction="ignore")
                log.writeheader()
                log.writerows(kept)

        write_whole(self.log_path, write)

    def batch_generator(self, batch: int) -> torch.Generator:
        """All randomness comes from the numbers of step, batch and process, so that resuming is exact."""
        accelerator, config = self.accelerator, self.config
        number = (self.global_step * config.gradient_accumulation_steps + batch) * accelerator.num_processes
        seed = config.seed * 1_000_003 + number + accelerator.process_index
        torch.manual_seed(seed)  # the label dropout inside the model
        return torch.Generator(accelerator.device).manual_seed(seed)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Loss of the averaged weights on held-out cells, always at the same noise and timesteps."""
        self.ema.copy_to(self.validation_model.parameters())
        generator = torch.Generator(self.accelerator.device).manual_seed(0)
        losses = [
            diffusion_loss(self.validation_model, self.noise_scheduler, self.validation_batch, generator)
            for _ in range(VALIDATION_DRAWS)
        ]
        return torch.stack(losses).mean().item()

    def run(self):
        """Trains to the last step, or until the time is over."""
        config = self.config
        if self.max_train_steps < config.max_train_steps and config.max_train_minutes is None:
            logger.info(
                f"{config.max_train_epochs:,} passes over the training cells are over after {self.max_train_steps:,}"
                f" steps, before --max_train_steps {config.max_train_steps}. --max_train_epochs makes them more."
            )
        self.progress_bar = tqdm(
            # With a time limit nobody knows the number of steps.
            total=self.max_train_steps if config.max_train_minutes is None else None,
            initial=self.global_step,
            desc="Denoiser",
            unit=" steps",
            mininterval=1,
            disable=not self.accelerator.is_local_main_process,
        )
        device = self.accelerator.device
        self.logged_losses = [torch.tensor(loss, device=device) for loss in self._losses_before]  # since the last line
        stop = self.global_step >= self.max_train_steps
        self.model.train()
        if not stop:
            with interruption.deferred(), closing(self._batches()) as batches:
                self._run(batches)
        self.progress_bar.close()
        self.accelerator.wait_for_everyone()

    def _run(self, batches: Iterator[dict[str, torch.Tensor]]):
        """Takes steps until training is over."""
        config, accelerator = self.config, self.accelerator
        batch_of_step = 0
        for batch in batches:
            self.num_seen += self.batch_size * accelerator.num_processes
            now = config, self.max_train_steps, self.global_step, self.seconds
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(*now)
            generator, share = self.batch_generator(batch_of_step), share_of_mixture(config, progress_of(*now))
            with accelerator.accumulate(self.model):
                loss = diffusion_loss(self.model, self.noise_scheduler, batch, generator, self.mixture, share)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.logged_losses.append(loss.detach())
            batch_of_step += 1
            if not accelerator.sync_gradients:
                continue
            self.ema.step(accelerator.unwrap_model(self.model).parameters())
            self.global_step += 1
            batch_of_step = 0
            self.progress_bar.update()
            time_is_over, signal_number = self._asked_to_stop()
            stop = self.global_step >= self.max_train_steps or time_is_over
            if self.global_step % config.validation_steps == 0 or stop:
                self._write_log()
            if self.global_step % config.checkpointing_steps == 0 or signal_number:
                self._save(loss.detach())
            if signal_number:
                self.progress_bar.close()
                raise TrainingInterrupted(signal_number)
            if stop:
                return

    @property
    def seconds(self) -> float:
        """What the training has taken, stage one and interrupted runs included."""
        return time.monotonic() - self.start_time

    def _asked_to_stop(self) -> tuple[bool, int]:
        """Whether the time is over, and the signal that ends the training, if any, in any of the processes."""
        minutes = self.config.max_train_minutes
        asked = [int(minutes is not None and self.seconds > minutes * 60), interruption.signal_number or 0]
        if self.accelerator.num_processes > 1:
            # All stop at the same step. Asking the others waits for a GPU, whose steps are short.
            if self.accelerator.device.type != "cpu" and self.global_step % 10:
                return False, 0
            mine = torch.tensor([asked], device=self.accelerator.device)
            asked = self.accelerator.gather(mine).amax(0).tolist()
        return bool(asked[0]), asked[1]

    def _save(self, loss: torch.Tensor):
        """A checkpoint, unless the loss or a weight is not finite."""
        self._check_loss(loss)
        with together(self.accelerator):
            self._check_weights()
        losses = [value.item() for value in self.logged_losses]
        limit = self.config.checkpoints_total_limit
        done = self.global_step, self.num_seen, self.seconds
        save_checkpoint(self.accelerator, self.ema, self.config.output_dir, *done, losses, limit)

    def _check_weights(self):
        named = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        averaged = dict(zip(named, self.ema.shadow_params))
        mend = "Train again with a lower --learning_rate."
        for tensors in (named, averaged):
            check_finite(f"At step {self.global_step} the denoiser", tensors, mend)

    def _check_loss(self, loss: torch.Tensor) -> float:
        """The mean over processes, all of which stop if it is not finite: what follows would be saved for nothing."""
        mean_loss = self.accelerator.reduce(loss, "mean").item()
        if not math.isfinite(mean_loss):
            raise ValueError(
                f"The denoiser's loss is {mean_loss} at step {self.global_step}. Train again with a lower"
                " --learning_rate. Checkpoints from before are kept."
            )
        return mean_loss

    def _write_log(self):
        """Every process joins the mean of the losses; the main one writes."""
        mean_loss = self._check_loss(torch.stack(self.logged_losses).mean())
        self.logged_losses.clear()
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                self._write_row(mean_loss)

    def _write_row(self, mean_loss: float):
        validation_loss = self.validation_loss()
        if not math.isfinite(validation_loss):
            raise ValueError(
                f"The loss of held-out cells is {validation_loss} at step {self.global_step}. Train again with a lower"
                " --learning_rate. Checkpoints from before are kept."
            )
        row = {
            "step": self.global_step,
            "epoch": self.num_seen // len(self.train_dataset),
            "seconds": round(self.seconds, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": round(mean_loss, 6),
            "validation_loss": round(validation_loss, 6),
        }
        with self.log_path.open("a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow(row)
        self.progress_bar.set_postfix(loss=row["loss"], validation_loss=row["validation_loss"])
        self.accelerator.log({key: row[key] for key in ("loss", "validation_loss")}, step=self.global_step)

    def averaged_model(self) -> WhiteBoxDiTModel:
        """The denoiser with its averaged weights, on the CPU."""
        self._check_weights()
        denoiser = self.accelerator.unwrap_model(self.model)
        self.ema.copy_to(denoiser.parameters())
        return denoiser.eval().cpu()
