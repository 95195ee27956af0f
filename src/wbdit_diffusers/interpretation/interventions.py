"""Cells in which a program has a given activity: a conditional sample, not an overwritten value."""

import anndata as ad
import torch

from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import MAX_COMPONENTS, GaussianMixtureDenoiser
from ..pipelines import ScRNAGenerationPipeline
from ..sampling import GaussianGuide


HELD = 1e6  # precision of a value that is held


def fit_gaussian_mixture(
    pipe: ScRNAGenerationPipeline, cells: ad.AnnData, max_components: int = MAX_COMPONENTS
) -> GaussianMixtureDenoiser:
    """
    Fits the closed form that a denoiser is compared with to the training cells, with at most `max_components` for each
    combination of labels. Combinations that were not measured are composed.
    """
    labels, sizes = pipe.processor.encode_labels(cells), pipe.processor.condition_sizes
    metric = pipe.codec.metric if isinstance(pipe.codec, ProgramCodec) else None
    latents = pipe.encode_cells(cells)
    return GaussianMixtureDenoiser.fit(latents, labels, sizes, pipe.scheduler, max_components, metric=metric)


def program_direction(codec: ProgramCodec, program: int | str) -> torch.Tensor:
    """The direction in latent space `(num_features,)` along which a program, such as 3 or `"program_3"`, is read."""
    names = [f"program_{i}" for i in range(codec.config.num_programs)]
    name = f"program_{program}" if isinstance(program, int) else program
    if name not in names:
        raise ValueError(f"There is no {name!r}: the model has {names[0]} to {names[-1]}.")
    direction = torch.zeros(codec.num_features)
    direction[: codec.config.num_programs] = codec.program_axes[names.index(name)].detach().float()
    return direction


def hold_direction(gaussian_mixture: GaussianMixtureDenoiser, direction: torch.Tensor, value: float) -> GaussianGuide:
    """A guide to cells for which `direction · latents` equals `value`; `direction` is `(num_features,)`."""
    direction = direction.double()
    return GaussianGuide(
        gaussian_mixture, HELD * torch.outer(direction, direction)[None], HELD * value * direction[None]
    )


def hold_program(
    pipe: ScRNAGenerationPipeline, gaussian_mixture: GaussianMixtureDenoiser, program: int | str, activity: float
) -> GaussianGuide:
    """
    A guide to cells in which a program has a given activity and everything else is as in such cells:
    `pipe(num_cells=500, guides=[hold_program(pipe, gaussian_mixture, "program_3", 2.0)])`.

    The closed form is that of [`fit_gaussian_mixture`]. Activities are in standard deviations of the training cells,
    and 0 is their mean. Raises a `ValueError` if the pipeline has no such program.
    """
    if not isinstance(pipe.codec, ProgramCodec):
        raise ValueError(f"The pipeline has no gene programs: it was trained with {type(pipe.codec).__name__}.")
    device = pipe.denoiser.device
    return hold_direction(gaussian_mixture.to(device), program_direction(pipe.codec, program).to(device), activity)


def with_denoiser(pipe: ScRNAGenerationPipeline, denoiser: torch.nn.Module) -> ScRNAGenerationPipeline:
    """The pipeline with another denoiser, such as the closed form."""
    components = {**pipe.components, "denoiser": denoiser}
    other = ScRNAGenerationPipeline(**components, num_inference_steps=pipe.config.num_inference_steps)
    other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return other
