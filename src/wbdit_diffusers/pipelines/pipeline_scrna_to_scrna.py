"""`ScRNAToScRNAPipeline`: measured cells in, the same cells under other labels out."""

from collections.abc import Callable
from functools import partial

import anndata as ad
import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging, replace_example_docstring

from ..sampling.denoise import denoise
from ..sampling.guidance import Conditions, predict
from ..sampling.noise import CellNoise
from .conditions import encode_request, find_unseen
from .pipeline_output import ScRNAPipelineOutput
from .pipeline_utils import DenoisingPipeline


logger = logging.get_logger(__name__)

NUM_INFERENCE_STEPS = 50  # of DDIM, there and back

EXAMPLE_DOC_STRING = """
        Examples:

        ```py
        >>> from wbdit_diffusers import ScRNAToScRNAPipeline

        >>> pipe = ScRNAToScRNAPipeline.from_pretrained("me/wbdit-kang")
        >>> stimulated = pipe(control_cells, conditions={"condition": "STIM"}).cells
        ```"""


class ScRNAToScRNAPipeline(DenoisingPipeline):
    r"""
    Translates measured cells to other labels: another condition, batch or donor. The components are those of
    [`ScRNAGenerationPipeline`].

    The deterministic solver DDIM (arXiv 2010.02502) takes a cell to noise under its own labels, and back under the new
    ones. What the labels do not explain is in the noise, and stays with the cell.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        cells: ad.AnnData,
        cell_types: str | list[str] | None = None,
        conditions: dict[str, str | list[str]] | None = None,
        strength: float = 1.0,
        guidance_scale: float | dict[str, float] = 1.0,
        num_inference_steps: int = NUM_INFERENCE_STEPS,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "anndata",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ScRNAPipelineOutput | tuple:
        r"""
        Translates cells.

        Args:
            cells (`AnnData`):
                Measured cells, with genes by name in any order. Genes that they lack are drawn given the others
                ([`~ScRNAPipeline.encode_cells`]). Labels are read from `obs`. A label that the model does not know, or
                a missing column, is replaced by the nearest known one.
            cell_types (`str` or `list[str]`, *optional*): New cell types, one for all cells or one per cell.
            conditions (`dict`, *optional*):
                New labels by label key, one for all cells or one per cell. Others stay as they are.
            strength (`float`, defaults to 1.0):
                Fraction of the way to pure noise, between 0 and 1. With less, cells change less.
            guidance_scale (`float` or `dict[str, float]`, defaults to 1.0):
                Strength of classifier-free guidance on the way back; see [`ScRNAGenerationPipeline`].
            num_inference_steps (`int`, defaults to 50): Number of steps of the whole way, in each direction.
            batch_size (`int`, *optional*): Number of cells at once. Bounds the memory, and changes no cell.
            generator (`torch.Generator`, *optional*): Makes the drawn counts reproducible.
            output_type (`str`, defaults to `"anndata"`):
                `"anndata"`; `"np"` or `"pt"` for log expression (cells × genes); `"latent"` for latents.
            return_dict (`bool`, defaults to `True`): Return a [`ScRNAPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, callback_kwargs)` after each step back of each batch.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Tensors for the callback.

        Examples:

        Returns:
            [`ScRNAPipelineOutput`], or a tuple whose first element is the cells, one for each input cell in their
            order. They are new cells: `obs["input_cell"]` names the input cell, `obs["input_<label key>"]` holds its
            label, and the label columns hold the new labels. `cells` stays as it is.

        Raises:
            ValueError: If a label is unknown to the model, or no label changes.
        """
        # 1. Check the request, and encode labels and cells
        self.check_inputs(num_inference_steps, batch_size, None, output_type, callback_on_step_end_tensor_inputs)
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` is between 0 and 1, not {strength}.")
        request = {"cell_types": cell_types, "conditions": conditions}
        num_cells, asked, _ = encode_request(self.processor, cells.n_obs, **request, library_size=None)
        if (asked < 0).all():
            raise ValueError("No label changes: give `cell_types` or `conditions`.")
        latents = self.encode_cells(cells)  # (cells, num_features)
        labels = self._own_labels(cells, latents)  # (cells, num_label_keys)
        new_labels = torch.where(asked < 0, labels, asked)
        unseen = find_unseen(self.processor, self.gaussian_mixture, new_labels)
        noise, device = CellNoise(generator), self._execution_device
        provenance = self._provenance(
            request | {"strength": strength}, num_inference_steps, guidance_scale, noise, unseen
        )
        provenance["scheduler"] = "DDIMScheduler"
        self._guidance_scale = guidance_scale
        config = {**self.scheduler.config, "timestep_spacing": "leading", "set_alpha_to_one": False}
        to_noise, to_cells = DDIMInverseScheduler.from_config(config), DDIMScheduler.from_config(config)
        self._num_timesteps = num_steps = max(1, round(strength * num_inference_steps))
        batch_size = batch_size or self.default_batch_size
        starts, outputs = range(0, num_cells, batch_size), []

        with self.progress_bar(total=num_steps * len(starts)) as progress_bar:
            callback = callback_on_step_end, callback_on_step_end_tensor_inputs
            on_step_end = partial(self._end_step, *callback, progress_bar)
            for start in starts:
                rows = slice(start, min(start + batch_size, num_cells))
                batch_noise = noise.batch(rows.start, rows.stop)
                sizes = self.denoiser.config.condition_sizes
                keys, both = self.processor.label_keys, (labels[rows], new_labels[rows])
                own, new = (Conditions.from_class_labels(one, sizes, device, keys) for one in both)

                def predict_new(noisy: torch.Tensor, t: torch.Tensor, conditions: Conditions = new) -> torch.Tensor:
                    return predict(self.denoiser, to_cells, noisy, t, conditions, self._guidance_scale)

                # 2. To noise under their own labels, and back under the new ones
                to_noise.set_timesteps(num_inference_steps, device=device)
                to_cells.set_timesteps(num_inference_steps, device=device)
                own_latents, up, down = latents[rows].to(device), to_noise.timesteps[:num_steps], to_cells.timesteps
                predict_own = partial(predict, self.denoiser, to_noise, conditions=own)
                noisy = denoise(predict_own, to_noise, batch_noise, own_latents, up)
                moved = denoise(predict_new, to_cells, batch_noise, noisy, down[-num_steps:], on_step_end)

                # 3. Decode
                uniform = batch_noise.uniform(1)[:, 0]
                outputs.append(self._decode(output_type, moved, new_labels[rows], None, batch_noise, uniform))

        origins = self._origins(cells, np.arange(num_cells))
        return self._finish(outputs, output_type, return_dict, provenance, unseen, origins)

    def _own_labels(self, cells: ad.AnnData, latents: torch.Tensor) -> torch.Tensor:
        """Labels of measured cells `(cells, num_label_keys)`. The nearest known ones replace unknown ones."""
        labels = self._known_labels(cells)
        if not (labels < 0).any():
            return labels
        if self.gaussian_mixture is None:
            raise ValueError("Some labels are unknown, and this pipeline has no Gaussian mixture to find the nearest.")
        nearest = self.gaussian_mixture.nearest_labels(latents, labels)
        for column, (key, names) in enumerate(zip(self.processor.label_keys, self.processor.config.categories)):
            is_unknown = labels[:, column].numpy() < 0
            given = cells.obs[key].astype(str).to_numpy() if key in cells.obs else np.full(cells.n_obs, "")
            for name in np.unique(given[is_unknown]) if is_unknown.any() else []:
                rows = torch.from_numpy(is_unknown & (given == name))
                if name:  # a type has one nearest type
                    nearest[rows, column] = nearest[rows, column].mode().values
                    logger.warning(
                        f"{key} {name!r} is new: taken as the nearest, {names[int(nearest[rows, column][0])]!r}."
                    )
                else:
                    logger.warning(f"`cells.obs` has no {key!r}: each cell is taken as the nearest one.")
        return torch.where(labels < 0, nearest, labels)
