"""Stage two: trains the denoiser on the latents of the training cells."""

import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..data.latents import CellOrder, Latents
from ..files import write_whole
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..sampling.schedulers import signal_and_noise, training_scheduler
from .checkpoints import Progress, load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .gaussian_mixture import share_of_mixture
from .processes import TrainingInterrupted, stop_signal, sync_errors


logger = get_logger(__name__)

MAX_TOKENS = 32  # of a cell, if no patch size is given. With more tokens a step takes too long on a CPU.
VALIDATION_CELLS = 512
VALIDATION_DRAWS = 4  # of noise and timesteps, for each of these cells
LOG_COLUMNS = ["step", "epoch", "seconds", "learning_rate", "loss", "validation_loss"]


def diffusion_loss(
    model: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    batch: dict[str, torch.Tensor],
    generator: torch.Generator,
    gaussian_mixture: GaussianMixtureDenoiser | None = None,
    share: float = 0.0,
) -> torch.Tensor:
    """
    Mean squared error of the prediction, at one random timestep for each cell.

    A batch has `latents` `(batch, num_features)` and `class_labels` `(batch, num_label_keys)`. The prediction of the
    Gaussian mixture is a `share` of the target, from 0 to 1 (distillation, arXiv 1907.04829). It is the mean over all
    clean cells that fit a noisy one, so it has less variance than the noise of a single cell.
    """
    latents = batch["latents"]  # (batch, num_features)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    # Timestep 0 is left out, as in the paper.
    end = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(1, end, (len(latents),), generator=generator, device=latents.device)  # (batch,)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    class_labels = batch["class_labels"] if batch["class_labels"].shape[1] else None
    prediction = model(noisy_latents, timesteps, class_labels=class_labels, return_dict=False)[0]
    if gaussian_mixture is not None:
        with torch.no_grad():
            velocity = gaussian_mixture(noisy_latents, timesteps, class_labels, return_dict=False)[0]
        a, s = signal_and_noise(noise_scheduler, timesteps, latents)  # (batch, 1) each
        latents = torch.lerp(latents, a * noisy_latents - s * velocity, share)
        noise = torch.lerp(noise, s * noisy_latents + a * velocity, share)
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: noise_scheduler.get_velocity(latents, noise, timesteps),
        "sample": lambda: latents,
    }[noise_scheduler.config.prediction_type]()
    return F.mse_loss(prediction.float(), target)


def progress_of(config: TrainingConfig, max_train_steps: int, step: int, seconds: float) -> float:
    """The progress of the training from 0 to 1, by steps or by time, whichever is further."""
    progress = step / max_train_steps
    if config.max_train_minutes is not None:
        progress = max(progress, seconds / (config.max_train_minutes * 60))
    return min(progress, 1.0)


def learning_rate(config: TrainingConfig, max_train_steps: int, step: int, seconds: float) -> float:
    """The learning rate: warm-up, plateau, and a linear decay that ends with the training."""
    progress = progress_of(config, max_train_steps, step, seconds)
    warmup = min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
    decay = min(1.0, (1 - progress) / config.lr_decay_fraction) if config.lr_decay_fraction > 0 else 1.0
    return config.learning_rate * warmup * max(decay, 0.01)


def batch_sizes(config: TrainingConfig, num_cells: int, num_processes: int) -> tuple[int, int]:
    """The number of cells in a batch of one process, and in an optimizer step."""
    assert config.train_batch_size is not None  # set by the config
    batch_size = min(config.train_batch_size, max(1, num_cells // num_processes))
    num_batches = num_cells // batch_size // num_processes
    if config.gradient_accumulation_steps > num_batches:
        flag = f"--gradient_accumulation_steps {config.gradient_accumulation_steps}"
        raise ValueError(f"{flag}: an epoch has only {num_batches} batches of {batch_size} cells. Use fewer.")
    return batch_size, batch_size * config.gradient_accumulation_steps * num_processes


class DenoiserTraining:
    """
    The training loop and its state.

    The held-out cells `test_cells` are for the validation loss. The training began at `start_time`, a time of
    `time.monotonic()`, with stage one. The network learns from `gaussian_mixture` first.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        train_cells: Latents,
        test_cells: Latents,
        start_time: float,
        gaussian_mixture: GaussianMixtureDenoiser | None = None,
    ):
        self.config, self.accelerator, self.gaussian_mixture = config, accelerator, gaussian_mixture
        self.start_time, self.progress = start_time, Progress()
        self.train_cells, self.order = train_cells, CellOrder(len(train_cells), config.seed)
        self.noise_scheduler = training_scheduler(config.prediction_type)
        self.log_path = config.output_dir / "training_log.csv"
        sample_size = train_cells.values.shape[1]
        model = WhiteBoxDiTModel(
            sample_size=sample_size,
            patch_size=config.patch_size or math.ceil(sample_size / MAX_TOKENS),
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            block_type=config.block_type,
            condition_sizes=train_cells.condition_sizes,
            condition_dropout=config.condition_dropout,
        )
        decay = config.weight_decay
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=decay, fused=True)
        ema_decay = config.ema_decay if config.use_ema else 0.0  # with decay 0 the average is the model itself
        self.ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=2 / 3, foreach=True)
        self.ema.to(accelerator.device)
        if config.compile:
            model.compile_repeated_blocks(fullgraph=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.batch_size, self.cells_per_step = batch_sizes(config, len(train_cells), accelerator.num_processes)
        # A step may end one epoch and begin the next.
        steps_of_epochs = round(config.max_train_epochs * len(train_cells) / self.cells_per_step)
        self.max_train_steps = min(config.max_train_steps, max(1, steps_of_epochs))

        self.validation_model = WhiteBoxDiTModel.from_config(model.config).to(accelerator.device).eval()
        # A random sample: files are often sorted by population.
        sample = np.random.default_rng(config.seed).permutation(len(test_cells))[:VALIDATION_CELLS]
        self.validation_batch = test_cells.batch(np.sort(sample), accelerator.device)

    @property
    def seconds(self) -> float:
        """The seconds that the training has taken, stage one and interrupted runs included."""
        return time.monotonic() - self.start_time

    def resume(self, checkpoint: Path):
        """Loads a checkpoint, from which [`run`] continues."""
        self.progress = load_checkpoint(self.accelerator, self.ema, checkpoint)
        self.start_time = time.monotonic() - self.progress.seconds
        logger.info(f"Resuming from {checkpoint}.")

    def start_log(self):
        """Writes the header of the log. A resumed run keeps the lines up to its checkpoint."""
        rows = list(csv.DictReader(self.log_path.open())) if self.progress.step and self.log_path.exists() else []

        def write(path: Path):
            with path.open("w", newline="") as file:
                log = csv.DictWriter(file, LOG_COLUMNS)
                log.writeheader()
                log.writerows(row for row in rows if int(row["step"]) <= self.progress.step)

        write_whole(self.log_path, write)

    def run(self):
        """Trains until the last step, until the time is over, or until a signal, for which it saves a checkpoint."""
        config, progress = self.config, self.progress
        if self.max_train_steps < config.max_train_steps and config.max_train_minutes is None:
            end = f"end after {self.max_train_steps:,} steps, before --max_train_steps {config.max_train_steps}"
            logger.info(f"{config.max_train_epochs:,} passes over the training cells {end}. Raise --max_train_epochs.")
        self.progress_bar = tqdm(
            # A time limit leaves the number of steps unknown.
            total=self.max_train_steps if config.max_train_minutes is None else None,
            initial=progress.step,
            desc="Denoiser",
            unit=" steps",
            mininterval=1,
            disable=not self.accelerator.is_local_main_process,
        )
        self.model.train()
        # Losses since the last line of the log
        self.losses = list(torch.tensor(progress.losses, device=self.accelerator.device))
        with stop_signal.deferred(), self.progress_bar:
            while progress.step < self.max_train_steps and not self._step():
                pass
        self.accelerator.wait_for_everyone()

    def _step(self) -> bool:
        """Takes an optimizer step, writes what is due, and returns whether the training is over."""
        config, progress, accelerator = self.config, self.progress, self.accelerator
        for number in range(config.gradient_accumulation_steps):
            self._backward(number)
        self.ema.step(accelerator.unwrap_model(self.model).parameters())
        progress.step += 1
        self.progress_bar.update()
        is_over, signal_number = self._asked_to_stop()
        is_over |= progress.step >= self.max_train_steps
        log_is_due = is_over or progress.step % config.validation_steps == 0
        save_is_due = bool(signal_number) or progress.step % config.checkpointing_steps == 0
        if log_is_due or save_is_due:
            self._reduce_losses()
        if log_is_due:
            with sync_errors(accelerator):
                if accelerator.is_main_process:
                    self._write_log()
            self.losses = []
        if save_is_due:
            progress.losses = torch.stack(self.losses).tolist() if self.losses else []
            progress.seconds = self.seconds
            save_checkpoint(accelerator, self.ema, progress, config.output_dir, config.checkpoints_total_limit)
        if signal_number:
            raise TrainingInterrupted(signal_number)
        return is_over

    def _backward(self, number: int):
        """Adds the gradient of the step's next batch. With the last one the optimizer changes the weights."""
        config, progress, accelerator = self.config, self.progress, self.accelerator
        start = progress.num_seen + accelerator.process_index * self.batch_size
        batch = self.train_cells.batch(self.order[start : start + self.batch_size], accelerator.device)
        progress.num_seen += self.batch_size * accelerator.num_processes
        now = config, self.max_train_steps, progress.step, self.seconds
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(*now)
        share = share_of_mixture(config, progress_of(*now))
        generator = self.seed_batch(number)
        with accelerator.accumulate(self.model):
            loss = diffusion_loss(self.model, self.noise_scheduler, batch, generator, self.gaussian_mixture, share)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def seed_batch(self, number: int) -> torch.Generator:
        """
        Seeds PyTorch's global generator, which draws the label dropout, and returns one for noise and timesteps.
        The seed follows from the step, batch and process indices, so that a resumed run is exact.
        """
        accelerator, config = self.accelerator, self.config
        index = (self.progress.step * config.gradient_accumulation_steps + number) * accelerator.num_processes
        seed = config.seed * 1_000_003 + index + accelerator.process_index
        torch.manual_seed(seed)
        return torch.Generator(accelerator.device).manual_seed(seed)

    def _asked_to_stop(self) -> tuple[bool, int]:
        """Whether the time is over, and the number of a signal, in any process: all must stop at the same step."""
        minutes = self.config.max_train_minutes
        asked = [int(minutes is not None and self.seconds > minutes * 60), stop_signal.number]
        if self.accelerator.num_processes > 1:
            if self.accelerator.device.type != "cpu" and self.progress.step % 10:  # it waits for the GPUs
                return False, 0
            mine = torch.tensor([asked], device=self.accelerator.device)
            asked = self.accelerator.gather(mine).amax(0).tolist()
        return bool(asked[0]), asked[1]

    def _reduce_losses(self):
        """Averages the losses over processes, and raises a `ValueError` if one, or a weight, is not finite."""
        losses = self.accelerator.reduce(torch.stack(self.losses), "mean")
        if not all(value.isfinite().all() for value in (losses, *self.ema.shadow_params)):
            loss = f"The denoiser's loss is {losses[-1].item():.3g} at step {self.progress.step}"
            raise ValueError(f"{loss}, or its weights are not finite. Lower --learning_rate.")
        self.losses = list(losses)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The loss of the averaged weights on held-out cells, always at the same noise and timesteps."""
        self.ema.copy_to(self.validation_model.parameters())
        generator = torch.Generator(self.accelerator.device).manual_seed(0)
        inputs = self.validation_model, self.noise_scheduler, self.validation_batch, generator
        return torch.stack([diffusion_loss(*inputs) for _ in range(VALIDATION_DRAWS)]).mean().item()

    def _write_log(self):
        row = {
            "step": self.progress.step,
            "epoch": self.progress.num_seen // len(self.train_cells),
            "seconds": round(self.seconds, 1),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": round(torch.stack(self.losses).mean().item(), 6),
            "validation_loss": round(self.validation_loss(), 6),
        }
        with self.log_path.open("a", newline="") as file:
            csv.DictWriter(file, LOG_COLUMNS).writerow(row)
        self.progress_bar.set_postfix(loss=row["loss"], validation_loss=row["validation_loss"])
        self.accelerator.log({key: row[key] for key in ("loss", "validation_loss")}, step=self.progress.step)

    def averaged_model(self) -> WhiteBoxDiTModel:
        """The denoiser with its averaged weights, on the CPU."""
        denoiser = self.accelerator.unwrap_model(self.model)
        self.ema.copy_to(denoiser.parameters())
        return denoiser.eval().cpu()
