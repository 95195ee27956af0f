"""Cells in which a program has a given activity: a conditional sample, not a value written over another."""

import torch
from torch import nn

from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import MAX_COMPONENTS, GaussianMixtureDenoiser, labels_of_cells
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline


class HeldDenoiser(nn.Module):
    """
    A denoiser of those cells for which `direction · latents` is `value`.

    What it expects of a noisy cell is moved by as much as a Gaussian mixture's expectation moves when `direction ·
    latents` is known, which is exact in closed form: other programs follow as they do in such cells, and cells are of
    the components that have that value. What the network still misses of the value is made good by the regression
    among all cells that the noisy cell may be, `x₀ + C d (value - d·x₀) / (dᵀ C d)`. The covariance C is the mixture's
    too: the network's own, its derivative by Tweedie's second formula, is lost in its errors where there is much noise
    (lab/white_box.md).

    Args:
        denoiser ([`WhiteBoxDiTModel`]): Whose prediction is corrected; it predicts the velocity.
        mixture ([`GaussianMixtureDenoiser`]): Of the same latents.
        direction (`torch.Tensor` of shape `(sample_size,)`): In latent space.
        value (`float`): Of `direction · latents`.
    """

    def __init__(
        self, denoiser: WhiteBoxDiTModel, mixture: GaussianMixtureDenoiser, direction: torch.Tensor, value: float
    ):
        super().__init__()
        self.denoiser, self.mixture, self.value = denoiser, mixture, value
        self.conditioned = mixture.conditioned(direction, value)
        self.register_buffer("direction", direction)

    config = property(lambda self: self.denoiser.config)
    dtype = property(lambda self: self.denoiser.dtype)
    device = property(lambda self: self.denoiser.device)
    num_tokens = property(lambda self: self.denoiser.num_tokens)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = False,
        label_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        """The arguments are those of [`WhiteBoxDiTModel`]; always a tuple."""
        velocity = self.denoiser(hidden_states, timestep, class_labels, return_dict=False, label_index=label_index)[0]
        class_labels = labels_of_cells(class_labels, label_index)
        a, s = self.mixture.signal_and_noise(timestep, len(hidden_states))
        clean = a * hidden_states - s * velocity  # (batch, sample_size)
        of_all, of_these = (
            closed(hidden_states.float(), timestep, class_labels, return_dict=False)[0]
            for closed in (self.mixture, self.conditioned)
        )
        clean = clean - s * (of_these - of_all)
        along = self.mixture.covariance_times(self.direction, hidden_states, timestep, class_labels)
        missing = self.value - clean @ self.direction  # (batch,)
        clean = clean + along * (missing / (along @ self.direction))[:, None]
        return ((a * hidden_states - clean) / s,)


def fit_mixture(pipe: ScRNAGenerationPipeline, cells, max_components: int = MAX_COMPONENTS) -> GaussianMixtureDenoiser:
    """
    The closed form that a pipeline's denoiser is compared with, and held by.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): Whose codec and labels are used; its scheduler takes a velocity.
        cells (`AnnData`): The cells that it was trained on.
        max_components (`int`, defaults to 32): Of one combination of labels.
    """
    return GaussianMixtureDenoiser.fit(
        pipe.encode_cells(cells),
        pipe.processor.encode_labels(cells),
        pipe.processor.condition_sizes,
        pipe.scheduler,
        max_components,
    )


def program_direction(codec: ProgramCodec, program: int | str) -> torch.Tensor:
    """
    The direction in latent space along which a program is read, `(num_features,)`; see [`~ProgramCodec.activities`].

    Args:
        codec ([`ProgramCodec`]): The codec.
        program (`int` or `str`): Its number, or `"program_3"` as in [`program_table`].

    Raises:
        ValueError: If the codec has no such program.
    """
    names = [f"program_{i}" for i in range(codec.config.num_programs)]
    name = f"program_{program}" if isinstance(program, int) else program
    if name not in names:
        raise ValueError(f"There is no {name!r}: the model has {names[0]} to {names[-1]}.")
    direction = torch.zeros(codec.num_features)
    direction[: codec.config.num_programs] = codec.program_axes[names.index(name)].detach().float()
    return direction


def hold_program(
    pipe: ScRNAGenerationPipeline, mixture: GaussianMixtureDenoiser, program: int | str, activity: float
) -> ScRNAGenerationPipeline:
    """
    A pipeline of the cells in which a program has a given activity, everything else being as it is in such cells.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): With a [`ProgramCodec`]. It is left as it is.
        mixture ([`GaussianMixtureDenoiser`]): See [`fit_mixture`].
        program (`int` or `str`): Which program, such as `"program_3"`.
        activity (`float`): In standard deviations of the training cells', 0 is their mean.

    Returns:
        [`ScRNAGenerationPipeline`]: with the same components but the denoiser. It is called as ever, and not saved.

    Raises:
        ValueError: If the pipeline has no such program, or its scheduler takes no velocity.
    """
    if not isinstance(pipe.codec, ProgramCodec):
        raise ValueError(f"The pipeline has no gene programs: it was trained with {type(pipe.codec).__name__}.")
    if pipe.scheduler.config.prediction_type != "v_prediction":
        raise ValueError("Only a pipeline whose denoiser predicts the velocity can be held.")
    direction = program_direction(pipe.codec, program).to(pipe.denoiser.device)
    if isinstance(pipe.denoiser, GaussianMixtureDenoiser):
        denoiser = pipe.denoiser.conditioned(direction, activity)
    else:
        denoiser = HeldDenoiser(pipe.denoiser, mixture.to(pipe.denoiser.device), direction, activity)
    return with_denoiser(pipe, denoiser)


def with_denoiser(pipe: ScRNAGenerationPipeline, denoiser: nn.Module) -> ScRNAGenerationPipeline:
    """The pipeline with another denoiser, such as the closed form, and all else as it is."""
    other = ScRNAGenerationPipeline(
        **{**pipe.components, "denoiser": denoiser}, num_inference_steps=pipe.config.num_inference_steps
    )
    other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return other
