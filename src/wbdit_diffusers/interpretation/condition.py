"""How a condition acts: by programs or by the decoder, in which block, and at which noise."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..pipelines import ScRNAGenerationPipeline
from ..sampling import CellNoise, denoise
from .layers import untrained_copy


NUM_CELLS = 128  # generated for each measurement
MIN_CELLS = 10  # of a type under each condition
MAX_TYPES = 8
NUM_RANGES = 4  # of timesteps
SHOWN_PROGRAMS = 3


@torch.no_grad()
def measure_condition(
    pipe: ScRNAGenerationPipeline,
    gaussian_mixture: GaussianMixtureDenoiser,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    seed: int = 0,
) -> dict | None:
    """
    Measures how the two most frequent labels of the second key, such as a stimulus and its control, differ in cells
    `(cells, num_features)` of each type. `None` if no type has ten cells of either.

    The log rates of genes change with the programs, and by the decoder's effect of the label. `"decoder"` is the share
    of the latter. `"programs"` are those that change most, with their shares of the rest. A block, or a range of
    timesteps, has a share of the network's change in latents: what is lost if only it gets the control label. The
    controls are a network with untrained matrices, and the closed form. `"distance"` is that to the nearest type.
    """
    processor, codec = pipe.processor, pipe.codec
    if class_labels is None or class_labels.shape[1] < 2:
        return None
    numbers = torch.bincount(class_labels[:, 1], minlength=processor.condition_sizes[1])
    control, condition = sorted(numbers.argsort(descending=True, stable=True)[:2].tolist())
    rows = {
        t: [(class_labels[:, :2] == torch.tensor([t, c])).all(1).nonzero()[:, 0] for c in (control, condition)]
        for t in range(processor.condition_sizes[0])
    }
    rows = {t: both for t, both in rows.items() if min(map(len, both)) >= MIN_CELLS}
    if not rows:
        return None
    types = sorted(rows, key=lambda t: -len(rows[t][0]))[:MAX_TYPES]
    means = {t: [latents[one].mean(0) for one in rows[t]] for t in types}
    points = torch.stack([means[t][0] for t in types]).double() @ codec.metric
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf).amin(1)
    untrained, keys, result = untrained_copy(pipe.denoiser, seed), processor.label_keys, []
    for t, distance in zip(types, distances.tolist()):
        decoder, programs = split_change(
            codec, means[t][1] - means[t][0], processor.condition_sizes, condition, control
        )
        labels = class_labels[rows[t][0]][:1].repeat(2, 1)  # other keys as in a measured cell
        labels[:, 1] = torch.tensor([condition, control])
        row = {"type": processor.config.categories[0][t], "distance": distance if len(types) > 1 else None}
        row |= {"decoder": decoder, "programs": programs}
        row["blocks"], row["untrained_blocks"] = (
            block_shares(one, pipe, labels, seed) for one in (pipe.denoiser, untrained)
        )
        both = pipe.denoiser, gaussian_mixture
        row["timesteps"], row["closed_form_timesteps"] = (timestep_shares(one, pipe, labels, seed) for one in both)
        result.append(row)
    names = processor.config.categories[1]
    return {"key": keys[1], "control": names[control], "condition": names[condition], "types": result}


def split_change(
    codec: ProgramCodec, change: torch.Tensor, condition_sizes: tuple[int, ...], condition: int, control: int
) -> tuple[float, list[dict]]:
    """The decoder's share of a change of latents `(num_features,)` and label, and the programs that change most."""
    activities = codec.activities(change[None])[0]
    weighted = codec.weighted_loadings  # (genes, num_programs)
    gene_weights = weighted.norm(dim=1) / codec.loadings.norm(dim=1).clamp(min=1e-12)
    by_program = weighted * activities
    of_programs, of_label = by_program.sum(1), torch.zeros(len(by_program))
    for effects in list(codec.label_effects.values())[:1]:  # of the mean
        effect = effects.weight[condition_sizes[0] + condition] - effects.weight[condition_sizes[0] + control]
        of_label = effect.float()[: len(by_program)] * gene_weights
    total = of_programs + of_label
    shares = by_program.T @ of_programs / of_programs.square().sum()
    order = shares.argsort(descending=True)[:SHOWN_PROGRAMS].tolist()
    programs = [{"program": f"program_{i}", "share": shares[i].item(), "change": activities[i].item()} for i in order]
    return (of_label @ total / total.square().sum()).item(), programs


def block_shares(
    denoiser: WhiteBoxDiTModel, pipe: ScRNAGenerationPipeline, labels: torch.Tensor, seed: int
) -> list[float]:
    """The share of each block, and of the output layer at last, in the change from the second labels to the first."""
    modules = [*(block.modulation for block in denoiser.blocks), denoiser.modulation_out]
    number, denoised = pipe.config.num_inference_steps, partial(_denoised, denoiser, pipe, labels, seed)

    def without(module: nn.Linear) -> torch.Tensor:
        # The two rows of the modulation are those of the two labels.
        with module.register_forward_hook(lambda _, args, output: output.flip(0)):
            return denoised([0] * number)

    return _lost(denoised, number, map(without, modules))


def timestep_shares(
    denoiser: nn.Module, pipe: ScRNAGenerationPipeline, labels: torch.Tensor, seed: int
) -> list[float]:
    """The share of each quarter of the steps, from noise to cells, in the same change."""
    number, denoised = pipe.config.num_inference_steps, partial(_denoised, denoiser, pipe, labels, seed)
    ranges = [range(i * number // NUM_RANGES, (i + 1) * number // NUM_RANGES) for i in range(NUM_RANGES)]
    return _lost(denoised, number, (denoised([int(step in own) for step in range(number)]) for own in ranges))


def _lost(denoised: Callable[[list[int]], torch.Tensor], number: int, without: Iterable[torch.Tensor]) -> list[float]:
    """The part of the mean change of latents that is lost in each of some denoised cells."""
    full, none = (denoised([row] * number).mean(0) for row in (0, 1))
    change = full - none
    return [(1 - (one.mean(0) - none) @ change / change.square().sum().clamp(min=1e-12)).item() for one in without]


def _denoised(
    denoiser: nn.Module, pipe: ScRNAGenerationPipeline, labels: torch.Tensor, seed: int, rows: list[int]
) -> torch.Tensor:
    """Latents from the same noise, where `rows` are the rows of the labels at each step."""
    noise = CellNoise(torch.Generator().manual_seed(seed)).batch(0, NUM_CELLS)
    pipe.scheduler.set_timesteps(pipe.config.num_inference_steps)
    steps = iter([*rows, *rows[-1:] * len(pipe.scheduler.timesteps)])  # solvers of second order call twice

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        index = torch.full((len(noisy),), next(steps), dtype=torch.long)
        return denoiser(noisy, timestep, labels, return_dict=False, label_index=index)[0]

    initial = noise.normal(pipe.codec.num_features, torch.device("cpu")) * pipe.scheduler.init_noise_sigma
    return denoise(predict, pipe.scheduler, noise, initial, pipe.scheduler.timesteps)
