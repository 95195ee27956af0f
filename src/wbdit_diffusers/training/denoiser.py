"""Stage two: trains the denoiser on the latents of the training cells."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDPMScheduler, ModelMixin
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..data.latents import CellOrder, Latents
from ..files import write_whole
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..progress import bar_options, duration
from ..sampling.schedulers import signal_and_noise, training_scheduler
from .checkpoints import Progress, load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .init_from import Start
from .processes import TrainingInterrupted, stop_signal, sync_errors


logger = get_logger(__name__)

VALIDATION_CELLS, VALIDATION_DRAWS = 512, 4  # each cell with so many draws of noise and timestep
STEPS_OF_ESTIMATE = 50  # of the time that is left
MAX_COMPOSED_SHARE = 0.2  # of a batch: cells whose combination of labels was not measured
LOG_COLUMNS = ["step", "epoch", "seconds", "learning_rate", "loss", "validation_loss"]
Callback = Callable[[dict[str, float]], Any]


def diffusion_loss(
    model: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    batch: dict[str, torch.Tensor],
    generator: torch.Generator,
    gaussian_mixture: GaussianMixtureDenoiser | None = None,
    share: float = 0.0,
) -> torch.Tensor:
    """
    Mean squared error of the prediction, at one random timestep for each cell. The Gaussian mixture's prediction is a
    `share` of the target (distillation, arXiv 1907.04829): it varies less than the noise of a single cell.
    """
    latents = batch["latents"]  # (batch, num_features)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    # Timestep 0 is left out, as in the paper.
    end = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(1, end, (len(latents),), generator=generator, device=latents.device)  # (batch,)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    class_labels = batch["class_labels"] if batch["class_labels"].shape[1] else None  # (batch, num_label_keys)
    prediction = model(noisy_latents, timesteps, class_labels=class_labels, return_dict=False)[0]
    if gaussian_mixture is not None:
        with torch.no_grad():
            velocity = gaussian_mixture(noisy_latents, timesteps, class_labels, return_dict=False)[0]
        a, s = signal_and_noise(noise_scheduler, timesteps, latents)  # (batch, 1) each
        latents = torch.lerp(latents, a * noisy_latents - s * velocity, share)
        noise = torch.lerp(noise, s * noisy_latents + a * velocity, share)
    velocity = noise_scheduler.get_velocity(latents, noise, timesteps)
    targets = {"epsilon": noise, "v_prediction": velocity, "sample": latents}
    return F.mse_loss(prediction.float(), targets[noise_scheduler.config.prediction_type])


def progress_of(config: TrainingConfig, max_train_steps: int, step: int, seconds: float) -> float:
    """The progress of the training from 0 to 1, by steps or by time, whichever is further."""
    time_share = seconds / ((config.max_train_minutes or math.inf) * 60)
    return min(max(step / max_train_steps, time_share), 1.0)


def learning_rate(config: TrainingConfig, step: int, progress: float) -> float:
    """The learning rate: warm-up, plateau, and a linear decay that ends with the training."""
    warmup = min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
    decay = min(1.0, (1 - progress) / config.lr_decay_fraction) if config.lr_decay_fraction > 0 else 1.0
    assert config.learning_rate is not None  # set by the config
    return config.learning_rate * warmup * max(decay, 0.01)


class DenoiserTraining:
    """The training loop and its state. It began with stage one at `start_time`, a time of `time.monotonic()`."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        train_cells: Latents,
        test_cells: Latents,
        start_time: float,
        gaussian_mixture: GaussianMixtureDenoiser | None = None,
        denoiser: Callable[..., ModelMixin] | None = None,
        callbacks: Sequence[Callback] = (),
        start: Start | None = None,
    ):
        self.config, self.accelerator, self.gaussian_mixture = config, accelerator, gaussian_mixture
        self.start_time, self.progress, self.callbacks = start_time, Progress(), callbacks
        self.train_cells, self.order = train_cells, CellOrder(len(train_cells), config.seed)
        # Combinations that were not measured have as many cells as measured ones have on average.
        num_composed = 0 if gaussian_mixture is None else gaussian_mixture.config.num_composed
        num_measured = len(train_cells.class_labels.unique(dim=0)) if num_composed else 1
        self.composed_share = min(num_composed / (num_composed + num_measured), MAX_COMPOSED_SHARE)
        self.noise_scheduler = training_scheduler(config.prediction_type)
        self.log_path = config.output_dir / "training_log.csv"
        self.has_our_denoiser = denoiser is None
        names = "block_type patch_size num_layers num_attention_heads attention_head_dim condition_dropout".split()
        denoiser = denoiser or partial(WhiteBoxDiTModel, **{name: getattr(config, name) for name in names})
        model = denoiser(sample_size=train_cells.values.shape[1], condition_sizes=train_cells.condition_sizes)
        if start is not None:
            start.start_denoiser(model)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)
        ema_decay = config.ema_decay if config.use_ema else 0.0  # with decay 0 the average is the model itself
        self.ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=2 / 3, foreach=True)
        self.ema.to(accelerator.device)
        if config.compile:
            model.compile_repeated_blocks(fullgraph=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        assert config.train_batch_size is not None  # set by the config
        self.batch_size = min(config.train_batch_size, max(1, len(train_cells) // accelerator.num_processes))
        self.cells_per_step = self.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        steps = round(config.max_train_epochs * len(train_cells) / self.cells_per_step)  # one may span two epochs
        self.max_train_steps = min(config.max_train_steps, max(1, steps))

        self.validation_model = type(model).from_config(model.config).to(accelerator.device).eval()
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
        rows = self.log_path.read_text().splitlines()[1:] if self.log_path.exists() else []
        lines = [",".join(LOG_COLUMNS), *(row for row in rows if int(row.split(",")[0]) <= self.progress.step)]
        write_whole(self.log_path, lambda path: path.write_text("\n".join([*lines, ""])))

    def run(self):
        """Trains until the last step, until the time is over, or until a signal, for which it saves a checkpoint."""
        config, progress = self.config, self.progress
        if self.max_train_steps < config.max_train_steps and config.max_train_minutes is None:
            end = f"end after {self.max_train_steps:,} steps, before --max_train_steps {config.max_train_steps}"
            logger.info(f"{config.max_train_epochs:,} passes over the training cells {end}. Raise --max_train_epochs.")
        total = self.max_train_steps if config.max_train_minutes is None else None  # unknown with a time limit
        hidden = not self.accelerator.is_local_main_process
        options = bar_options(desc="Denoiser", total=total, initial=progress.step, unit=" steps", mininterval=1)
        self.progress_bar = tqdm(**options, disable=hidden)
        name, start, first_step = "Step 3 of 3, denoiser", time.monotonic(), progress.step
        logger.info(f"{name}: up to {self.max_train_steps:,} steps of {self.cells_per_step} cells.")
        self.model.train()
        self.losses = list(torch.tensor(progress.losses, device=self.accelerator.device))  # since the last log line
        with stop_signal.deferred(), self.progress_bar:
            while progress.step < self.max_train_steps and not self._step():
                if progress.step - first_step == STEPS_OF_ESTIMATE:
                    left = (time.monotonic() - start) / STEPS_OF_ESTIMATE * (self.max_train_steps - progress.step)
                    left = min(left, 60 * (config.max_train_minutes or math.inf) - self.seconds)
                    logger.info(f"{name}: about {duration(left)} left.")
        logger.info(f"{name}: {progress.step:,} steps, {duration(time.monotonic() - start)}.")

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
        fraction = progress_of(config, self.max_train_steps, progress.step, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, progress.step, fraction)
        share = 1 - (1 - config.mixture_share) * fraction  # falls from 1
        # A resumed run draws the same label dropout (from PyTorch's global generator), noise and timesteps.
        index = (progress.step * config.gradient_accumulation_steps + number) * accelerator.num_processes
        seed = config.seed * 1_000_003 + index + accelerator.process_index
        torch.manual_seed(seed)
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        if self.composed_share:
            batch = self._with_composed_cells(batch, generator)
        with accelerator.accumulate(self.model):
            loss = diffusion_loss(self.model, self.noise_scheduler, batch, generator, self.gaussian_mixture, share)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def _with_composed_cells(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """A batch in which some cells make room for cells of combinations that were not measured."""
        mixture = self.gaussian_mixture
        assert mixture is not None  # it composes them
        # On the CPU, as a number from a GPU would wait for it. On average it is the share, also of small batches.
        number = int(self.composed_share * len(batch["latents"]) + torch.rand(1).item())
        rows = torch.randint(mixture.config.num_composed, (number,), generator=generator, device=mixture.device)
        labels = mixture.composed_labels[rows]
        composed = {"latents": mixture.sample(labels, generator), "class_labels": labels}
        return {name: torch.cat([values[number:], composed[name]]) for name, values in batch.items()}

    def _asked_to_stop(self) -> tuple[bool, int]:
        """Whether the time is over, and the number of a signal, in any process: all must stop at the same step."""
        asked = [int(self.seconds > 60 * (self.config.max_train_minutes or math.inf)), stop_signal.number]
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
        step, epoch = self.progress.step, self.progress.num_seen // len(self.train_cells)
        losses = {"loss": torch.stack(self.losses).mean().item(), "validation_loss": self.validation_loss()}
        losses = {name: round(loss, 6) for name, loss in losses.items()}
        values = step, epoch, round(self.seconds, 1), self.optimizer.param_groups[0]["lr"], *losses.values()
        with self.log_path.open("a") as file:
            print(*values, sep=",", file=file)
        self.progress_bar.set_postfix(losses)
        self.accelerator.log(losses, step=step)
        for callback in self.callbacks:
            callback(dict(zip(LOG_COLUMNS, values)))

    def averaged_model(self) -> ModelMixin:
        """The denoiser with its averaged weights, on the CPU."""
        denoiser = self.accelerator.unwrap_model(self.model)
        self.ema.copy_to(denoiser.parameters())
        return denoiser.eval().cpu()
