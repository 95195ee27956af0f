"""`ScRNAGenerationPipeline`: noise in, an AnnData of cells out."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import anndata as ad
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import replace_example_docstring

from ..sampling.denoise import denoise
from ..sampling.guidance import Conditions, Guide, predict
from ..sampling.noise import CellNoise
from .conditions import encode_request, find_unseen, mark_unseen, take
from .pipeline_output import ScRNAPipelineOutput
from .pipeline_utils import DenoisingPipeline


EXAMPLE_DOC_STRING = """
        Examples:

        ```py
        >>> import torch
        >>> from wbdit_diffusers import ScRNAGenerationPipeline

        >>> pipe = ScRNAGenerationPipeline.from_pretrained("pbmc68k_reduced")
        >>> pipe(num_cells=5000, cell_types="CD19+ B", generator=torch.Generator().manual_seed(0)).cells
        ```"""


class ScRNAGenerationPipeline(DenoisingPipeline):
    r"""
    Generates single cells by denoising.

    Args:
        denoiser ([`WhiteBoxDiTModel`] or [`GaussianMixtureDenoiser`]): Predicts the noise in a batch of latents.
        scheduler ([`SchedulerMixin`]):
            The reverse process: [`DDPMScheduler`], or any other through `from_config`, e.g.
            `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.
        processor ([`ScRNAProcessor`]): Genes, library sizes and names of labels.
        codec ([`ProgramCodec`] or [`ExpressionCodec`]):
            Maps cells to latents and back: gene programs under a likelihood of counts or, as in arXiv 2411.06785,
            expression itself.
        num_inference_steps (`int`, defaults to 12): Number of denoising steps when a call gives none.
        gaussian_mixture ([`GaussianMixtureDenoiser`], *optional*):
            The closed form that taught the denoiser. It knows how dependable combinations of labels are that were not
            measured.
        text_encoder, tokenizer (`transformers` model and tokenizer, *optional*): Encoder of prompts, not trained.
        label_texts (`dict[str, str]`, *optional*): Better texts of labels, for prompts.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        num_cells: int | None = None,
        cell_types: str | list[str] | None = None,
        conditions: dict[str, str | list[str]] | None = None,
        library_size: float | list[float] | None = None,
        guidance_scale: float | dict[str, float] = 1.0,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | CellNoise | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "anndata",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        guides: Sequence[Guide] = (),
        first_cell: int = 0,
        prompt: str | list[str] | torch.Tensor | None = None,
        negative_prompt: str | None = None,
    ) -> ScRNAPipelineOutput | tuple:
        r"""
        Generates cells.

        Args:
            num_cells (`int`, *optional*): Number of cells. Default: the length of the lists given, or 1.
            cell_types (`str` or `list[str]`, *optional*):
                One cell type for all cells or one per cell, from the model's first label key. Drawn from the training
                frequencies by default.
            conditions (`dict`, *optional*):
                For any label key of the model, one label for all cells or one per cell. Others are drawn from the
                training frequencies among cells with the given labels.
            library_size (`float` or `list[float]`, *optional*):
                Expected total counts, instead of generated ones. Drawn counts vary around them.
            guidance_scale (`float` or `dict[str, float]`, defaults to 1.0):
                Strength of classifier-free guidance (arXiv 2207.12598), of all labels or by label key, such as
                `{"condition": 2.0}`. 1.0 means none, and halves the cost.
            num_inference_steps (`int`, *optional*): Number of denoising steps. Default: the pipeline's own.
            batch_size (`int`, *optional*): Number of cells denoised at once. Bounds the memory, and changes no cell.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the cells reproducible: the same seed gives the same cells, regardless of the batch size. A list
                has one generator per cell, and is slow for many cells.
            latents (`torch.Tensor` of shape `(num_cells, num_features)`, *optional*): The initial Gaussian noise.
            output_type (`str`, defaults to `"anndata"`):
                `"anndata"`; `"np"` or `"pt"` for log expression (cells × genes); `"latent"` for denoised latents.
            return_dict (`bool`, defaults to `True`): Return a [`ScRNAPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, callback_kwargs)` after each step of each batch. Returns a
                dict, whose `"latents"` replace those of the step.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Tensors for the callback.
            guides (`Sequence[Guide]`, defaults to `()`):
                Functions `guide(clean, noisy, timestep, conditions)` that return a better estimate of the clean
                latents at each step, such as [`~interpretation.hold_program`].
            first_cell (`int`, defaults to 0):
                Number of the first cell. A cell's random numbers depend on the seed and its number, so
                `num_cells=1, first_cell=k` makes cell `k` alone again.
            prompt (`str`, `list[str]` or `torch.Tensor`, *optional*):
                The labels in words, for all cells or one per cell, instead of `cell_types` and `conditions`. The label
                whose text is nearest is taken. Requires a `text_encoder`. Codes are those of `encode_prompt`.
            negative_prompt (`str`, *optional*):
                Labels to stay away from, in words. With `guidance_scale`, they take the place of no labels.

        Examples:

        Returns:
            [`ScRNAPipelineOutput`], or a tuple whose first element is the cells. Label columns of `obs` have all
            categories of the training cells, so colours and concatenated cells agree. `obs_names` are unique by seed,
            `obs["generated"]` is true, and `uns["wbdit"]` records how the cells were made.

        Raises:
            ValueError: If a label is unknown to the model, or arguments don't fit each other.
        """
        # 1. Check the request, and encode it once
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        self.check_inputs(num_inference_steps, batch_size, latents, output_type, callback_on_step_end_tensor_inputs)
        request = {"cell_types": cell_types, "conditions": conditions, "library_size": library_size}
        lists = {"generator": generator, "latents": latents, "prompt": prompt}
        num_cells, class_labels, library_sizes = encode_request(self.processor, num_cells, **request, **lists)
        unseen, null_labels = {}, None if negative_prompt is None else self.encode_prompt(negative_prompt)
        if prompt is not None:
            if cell_types is not None or conditions:
                raise ValueError("`prompt` names the labels: leave out `cell_types` and `conditions`.")
            class_labels = self.encode_prompt(prompt).expand(num_cells, -1)
        if cell_types is not None or conditions or prompt is not None:
            is_new = not isinstance(generator, CellNoise)  # parts of a stream warn of nothing again
            unseen = find_unseen(self.processor, self.gaussian_mixture, class_labels, warn=is_new)

        # 2. Random numbers belong to cells, batches only bound the memory
        noise = generator if isinstance(generator, CellNoise) else CellNoise(generator)
        words = {"prompt": prompt, "negative_prompt": negative_prompt}
        provenance = self._provenance(request | words, num_inference_steps, guidance_scale, noise, unseen)
        first_number, device = 0 if noise.one_per_cell else first_cell, self._execution_device
        batch_size = batch_size or self.default_batch_size
        starts, outputs = range(0, num_cells, batch_size), []
        self._guidance_scale = guidance_scale

        with self.progress_bar(total=len(starts) * num_inference_steps) as progress_bar:

            def predict_batch(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return predict(self.denoiser, self.scheduler, noisy, t, batch_conditions, self._guidance_scale, guides)

            callback = callback_on_step_end, callback_on_step_end_tensor_inputs
            on_step_end = partial(self._end_step, *callback, progress_bar)
            for start in starts:
                # 3. Labels that were not asked for are drawn
                rows = slice(start, min(start + batch_size, num_cells))
                batch_noise = noise.batch(first_number + rows.start, first_number + rows.stop)
                uniform = batch_noise.uniform(2).cpu()  # (batch, 2): for labels and library sizes
                labels = self.processor.complete_labels(class_labels[rows], uniform[:, 0])
                sizes, keys = self.denoiser.config.condition_sizes, self.processor.label_keys
                batch_conditions = Conditions.from_class_labels(labels, sizes, device, keys, null_labels)

                # 4. Denoise
                self.scheduler.set_timesteps(num_inference_steps, device=device)
                timesteps = self.scheduler.timesteps
                self._num_timesteps, progress_bar.total = len(timesteps), len(starts) * len(timesteps)
                initial = batch_noise.normal(self.codec.num_features, device)  # (batch, num_features)
                initial = initial if latents is None else latents[rows].to(initial)
                initial = initial * self.scheduler.init_noise_sigma
                denoised = denoise(predict_batch, self.scheduler, batch_noise, initial, timesteps, on_step_end)

                # 5. Decode
                totals = None if library_sizes is None else library_sizes[rows]
                outputs.append(self._decode(output_type, denoised, labels, totals, batch_noise, uniform[:, 1]))

        return self._finish(outputs, output_type, return_dict, provenance, unseen, {})

    def stream(
        self,
        num_cells: int | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | CellNoise | None = None,
        first_cell: int = 0,
        **call_kwargs,
    ) -> Iterator[ad.AnnData]:
        """
        Makes the cells of a call batch by batch, so that the memory does not grow with `num_cells`:
        `write_cells("cells.h5ad", pipe.stream(num_cells=1_000_000))`. Takes the arguments of a call. Yields an
        `AnnData` for each batch, all with the same categories. Raises a `ValueError` at once if the request can't be
        met.
        """
        batch_size = batch_size or self.default_batch_size
        names = ("cell_types", "conditions", "library_size", "latents", "prompt")
        per_cell = {name: call_kwargs.pop(name, None) for name in names}
        num_cells, labels, _ = encode_request(self.processor, num_cells, **per_cell, generator=generator)
        if per_cell["prompt"] is not None:  # encoded once, not in each batch
            per_cell["prompt"] = labels = self.encode_prompt(per_cell["prompt"]).expand(num_cells, -1)
        is_new = not isinstance(generator, CellNoise)
        unseen = find_unseen(self.processor, self.gaussian_mixture, labels, warn=is_new)
        noise = generator if isinstance(generator, list | CellNoise) else CellNoise(generator)

        def batches() -> Iterator[ad.AnnData]:
            for start in range(0, num_cells, batch_size):
                rows = slice(start, min(start + batch_size, num_cells))
                own = {"num_cells": rows.stop - rows.start, "generator": take(noise, rows)} | take(per_cell, rows)
                cells = self(**own, first_cell=first_cell + start, **call_kwargs).cells
                if unseen:  # in all batches, or in none
                    mark_unseen(cells, self.processor)
                yield cells

        return batches()
