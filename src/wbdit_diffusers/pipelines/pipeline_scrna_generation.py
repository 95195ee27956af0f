"""`ScRNAGenerationPipeline`: noise in, an AnnData of cells out."""

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from scipy import sparse

from ..model_card import push_model_card
from ..models.autoencoder_counts import CountAutoencoder
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..processing_scrna import TARGET_SUM, ScRNAProcessor
from ..version import __version__


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("anndata", "np", "pt", "latent")
TOKENS_PER_BATCH = 32_768  # what the default batch size aims at
MAX_CELLS_PER_BATCH = 2048  # of few tokens: larger ones are no faster, and counts × genes fill the memory
VALUES_AT_ONCE = 2**21  # cells × genes that are dense in memory while counts are drawn


@dataclass
class ScRNAPipelineOutput(BaseOutput):
    """
    Output of [`ScRNAGenerationPipeline`].

    Args:
        cells (`AnnData`, `np.ndarray` or `torch.Tensor`):
            The generated cells. With `output_type="anndata"`: integer counts (CSR) when the training data were counts,
            else expression, with gene names, conditions and `library_size`.
    """

    cells: ad.AnnData | np.ndarray | torch.Tensor


class CellNoise:
    """
    Random numbers that depend on the seed and on the cell's number alone, so that the batch size never changes a cell.

    Cells are drawn in fixed blocks, each with a generator of its own. A batch works on every block that it touches:
    its latents have the shape `(blocks, CELLS_PER_BLOCK, features)`, for which `randn_tensor`, and so the `step` of
    every scheduler, takes one generator per block. `rows` are the batch's own cells in it. With a list of generators,
    one per cell, each cell is the first of its block.
    """

    CELLS_PER_BLOCK = 64

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, device: torch.device):
        self.one_per_cell = isinstance(generator, list)
        generators = generator if self.one_per_cell else [generator]
        self.device = device if generators[0] is None else generators[0].device
        self.seeds = [
            torch.randint(2**62, (1,), generator=generator, device=self.device).item() for generator in generators
        ]

    def batch(self, start: int, stop: int) -> tuple[list[torch.Generator], torch.Tensor]:
        """Generators of the blocks that hold the cells from `start` to `stop`, and the places of those cells."""
        if self.one_per_cell:
            seeds = self.seeds[start:stop]
            rows = torch.arange(stop - start) * self.CELLS_PER_BLOCK
        else:
            first_block = start // self.CELLS_PER_BLOCK
            seeds = [self.seeds[0] + block for block in range(first_block, math.ceil(stop / self.CELLS_PER_BLOCK))]
            rows = torch.arange(start, stop) - first_block * self.CELLS_PER_BLOCK
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds], rows

    def uniform(
        self,
        generators: list[torch.Generator],
        rows: torch.Tensor,
        num_values: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Numbers in [0, 1): `(cells, num_values)`."""
        size = (self.CELLS_PER_BLOCK, num_values)
        draws = [torch.rand(size, generator=generator, device=self.device, dtype=dtype) for generator in generators]
        return torch.cat(draws)[rows.to(self.device)]


class ScRNAGenerationPipeline(DiffusionPipeline):
    r"""
    Generates single cells by denoising.

    Args:
        denoiser ([`WhiteBoxDiTModel`]): Predicts the noise in a batch of cells.
        scheduler ([`SchedulerMixin`]):
            The reverse process: [`DDPMScheduler`], or any other through `from_config`, e.g.
            `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.
        processor ([`ScRNAProcessor`]): Genes, normalisation, library sizes and label names.
        autoencoder ([`CountAutoencoder`], *optional*):
            Turns what the denoiser makes, gene programs and a library size, into counts. Without one the denoiser
            works on expression itself, as in arXiv 2411.06785.
        num_inference_steps (`int`, defaults to 20): Steps taken when the call does not say.
    """

    model_cpu_offload_seq = "denoiser->autoencoder"
    _optional_components = ["autoencoder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        denoiser: WhiteBoxDiTModel,
        scheduler: SchedulerMixin,
        processor: ScRNAProcessor,
        autoencoder: CountAutoencoder | None = None,
        num_inference_steps: int = 20,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, processor=processor, autoencoder=autoencoder)
        self.register_to_config(num_inference_steps=num_inference_steps)
        if denoiser is None or processor is None:  # components may be left out of `from_pretrained`
            return
        maker, name = (processor, "processor") if autoencoder is None else (autoencoder, "autoencoder")
        needed = (maker.num_features, tuple(processor.condition_sizes))
        got = (denoiser.config.num_genes, tuple(denoiser.config.condition_sizes))
        if needed != got:
            raise ValueError(
                f"`denoiser` and `{name}` are not of one model: num_features={needed[0]} and"
                f" condition_sizes={needed[1]} need a denoiser of the same sizes, not num_genes={got[0]} and"
                f" condition_sizes={got[1]}."
            )
        if autoencoder is not None and autoencoder.config.num_genes != len(processor.var_names):
            raise ValueError(
                f"`autoencoder` and `processor` are not of one model: {autoencoder.config.num_genes} genes and"
                f" {len(processor.var_names)} genes."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "ScRNAGenerationPipeline":
        """
        Loads a pipeline from a folder or a Hub id; see [`DiffusionPipeline.from_pretrained`] for the arguments.

        Raises:
            OSError: If the folder holds no pipeline of this class, or a damaged one.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            _check_folder(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1.0 and len(self.denoiser.config.condition_sizes) > 0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def check_inputs(
        self,
        num_cells: int,
        names: dict[str, str | list[str]],
        library_size: float | list[float] | None,
        batch_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> int:
        """Raises on arguments that don't fit each other. Returns the number of cells."""
        if not isinstance(num_cells, (int, np.integer)) or num_cells < 1:
            raise ValueError(f"`num_cells` is a positive integer, not {num_cells!r}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` is a positive integer, not {batch_size!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` knows {self._callback_tensor_inputs}, not {sorted(unknown)}."
            )
        lengths = {key: len(value) for key, value in names.items() if not isinstance(value, str)}
        if isinstance(generator, list):
            lengths["generator"] = len(generator)
        if library_size is not None:
            if self.processor.config.values != "counts":
                raise ValueError("`library_size` was given, but this model was trained on log values, not on counts.")
            if not np.all(np.isfinite(library_size)) or np.min(library_size) <= 0:
                raise ValueError("`library_size` is a positive number of counts, or one per cell.")
            if np.ndim(library_size):
                lengths["library_size"] = len(library_size)
        if latents is not None:
            if latents.ndim != 2 or latents.shape[1] != self.denoiser.config.num_genes:
                expected = (num_cells, self.denoiser.config.num_genes)
                raise ValueError(f"`latents` has shape {tuple(latents.shape)}, expected {expected}.")
            lengths["latents"] = len(latents)
        if num_cells == 1 and lengths:  # a list makes as many cells as it is long
            num_cells = max(lengths.values())
        if num_cells == 0:
            raise ValueError("An empty list was given: give one entry per cell.")
        for argument, length in lengths.items():
            if length != num_cells:
                raise ValueError(f"{argument} has {length} entries for {num_cells} cells: give one per cell.")
        return num_cells

    @torch.no_grad()
    def __call__(
        self,
        num_cells: int = 1,
        cell_types: str | list[str] | None = None,
        conditions: dict[str, str | list[str]] | None = None,
        library_size: float | list[float] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "anndata",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ScRNAPipelineOutput | tuple:
        r"""
        Generates cells.

        Args:
            num_cells (`int`, defaults to 1): Number of cells. A list in another argument may say it instead.
            cell_types (`str` or `list[str]`, *optional*):
                One cell type for all cells, or one per cell: the first label key of the model. Drawn from the training
                frequencies when not given.
            conditions (`dict`, *optional*):
                For any label key of the model, one name for all cells or one per cell. Those not given are drawn from
                the training frequencies among cells of the given labels.
            library_size (`float` or `list[float]`, *optional*):
                Total counts of the cells, instead of the generated ones.
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance (arXiv 2207.12598): `unconditional + guidance_scale * (conditional -
                unconditional)`. 1.0 is none, and costs half.
            num_inference_steps (`int`, *optional*): Denoising steps; the pipeline's configured number when not given.
            batch_size (`int`, *optional*):
                Cells denoised at once. It bounds the memory and does not change the cells.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the cells reproducible: the same seed gives the same cells, whatever the batch size. A list has
                one generator per cell, which is slow for many cells.
            latents (`torch.Tensor` of shape `(num_cells, num_features)`, *optional*): The initial Gaussian noise.
            output_type (`str`, defaults to `"anndata"`):
                `"anndata"`; `"np"` or `"pt"` for an array or tensor (cells × genes) on the scale of log expression;
                `"latent"` for what the denoiser makes (cells × features).
            return_dict (`bool`, defaults to `True`): Return a [`ScRNAPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, callback_kwargs)` after each denoising step of each batch;
                returns the dict of tensors to go on with.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Tensors to pass to the callback.

        Examples:

        ```py
        >>> import torch
        >>> from wbdit_diffusers import ScRNAGenerationPipeline

        >>> pipe = ScRNAGenerationPipeline.from_pretrained("me/wbdit-pbmc")
        >>> pipe(num_cells=5000, cell_types="B cell", generator=torch.Generator().manual_seed(0)).cells
        ```

        Returns:
            [`ScRNAPipelineOutput`], or a tuple whose first element is the cells.

        Raises:
            ValueError: If a name is unknown to the model, or arguments don't fit each other.
        """
        batches = self._batches(
            num_cells,
            cell_types,
            conditions,
            library_size,
            guidance_scale,
            num_inference_steps,
            batch_size,
            generator,
            latents,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        outputs = list(batches)
        if output_type == "anndata":
            cells = ad.concat(outputs, merge="same", uns_merge="same")
            for key in self.processor.config.label_keys:
                cells.obs[key] = cells.obs[key].cat.remove_unused_categories()
        else:
            cells = torch.cat(outputs)
            cells = cells.cpu().numpy() if output_type == "np" else cells

        if not return_dict:
            return (cells,)
        return ScRNAPipelineOutput(cells=cells)

    def stream(
        self,
        num_cells: int = 1,
        cell_types: str | list[str] | None = None,
        conditions: dict[str, str | list[str]] | None = None,
        library_size: float | list[float] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Iterator[ad.AnnData]:
        """
        The cells of a call, batch by batch: the memory does not grow with `num_cells`. The arguments are those of a
        call.

        Example:

        ```py
        >>> from wbdit_diffusers.data import write_cells

        >>> write_cells("cells.h5ad", pipe.stream(num_cells=1_000_000))
        ```

        Yields:
            `AnnData`: the next cells; all batches have the same categories.
        """
        return self._batches(
            num_cells,
            cell_types,
            conditions,
            library_size,
            guidance_scale,
            num_inference_steps,
            batch_size,
            generator,
        )

    @torch.no_grad()
    def _batches(
        self,
        num_cells: int,
        cell_types: str | list[str] | None,
        conditions: dict[str, str | list[str]] | None,
        library_size: float | list[float] | None,
        guidance_scale: float,
        num_inference_steps: int | None,
        batch_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
        output_type: str = "anndata",
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> Iterator[ad.AnnData | torch.Tensor]:
        # 1. Check the arguments
        label_keys = list(self.processor.config.label_keys)
        names = dict(conditions or {})
        if cell_types is not None:
            if not label_keys:
                raise ValueError("`cell_types` was given, but this model is unconditional (it has no label keys).")
            if label_keys[0] in names:
                raise ValueError(
                    f"`cell_types` and conditions[{label_keys[0]!r}] say the same thing: give one of them."
                )
            names[label_keys[0]] = cell_types
        num_cells = self.check_inputs(
            num_cells,
            names,
            library_size,
            batch_size,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        given_labels = self.processor.encode_names(names, num_cells)  # (num_cells, num_label_keys), -1 where free
        if library_size is not None:
            library_size = torch.as_tensor(np.broadcast_to(library_size, num_cells).copy(), dtype=torch.float32)
        if guidance_scale != 1.0 and not label_keys:
            logger.warning("`guidance_scale` has no effect on an unconditional model.")

        # 2. Batches, timesteps and noise
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        if batch_size is None:
            tokens_per_cell = self.denoiser.pos_embed.shape[1]
            batch_size = min(max(64, TOKENS_PER_BATCH // tokens_per_cell), MAX_CELLS_PER_BATCH)
        num_batches = math.ceil(num_cells / batch_size)
        device, dtype = self._execution_device, self.denoiser.dtype
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        num_timesteps = len(self.scheduler.timesteps)
        noise = CellNoise(generator, device)

        # 3. Denoise batch by batch
        with self.progress_bar(total=num_batches * num_timesteps) as progress_bar, ExitStack() as at_the_end:
            at_the_end.callback(self.maybe_free_model_hooks)  # also of a stream that is given up
            for start in range(0, num_cells, batch_size):
                stop = min(start + batch_size, num_cells)
                block_generators, rows = noise.batch(start, stop)
                uniform = noise.uniform(block_generators, rows, num_values=2).cpu()  # (batch, 2)
                class_labels = self.processor.complete_labels(given_labels[start:stop], uniform[:, 0])
                # For each batch anew: a callback, or another stream, may have changed them.
                self._guidance_scale, self._num_timesteps = guidance_scale, num_timesteps
                batch_latents = self.denoise(
                    block_generators,
                    rows.to(device),
                    class_labels,
                    None if latents is None else latents[start:stop].to(device=device, dtype=dtype),
                    num_inference_steps,
                    progress_bar,
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                )  # (batch, num_features)
                if output_type == "latent":
                    yield batch_latents
                    continue

                # 4. Back to expression or counts
                given_library_size = None if library_size is None else library_size[start:stop]
                if output_type != "anndata":
                    yield self._decode_expression(batch_latents)
                    continue
                if self.autoencoder is None:
                    matrix, batch_library_size = self._decode_matrix(
                        batch_latents, class_labels, given_library_size, uniform[:, 1]
                    )
                else:
                    matrix, batch_library_size = self._decode_counts(
                        batch_latents, given_library_size, noise, block_generators, rows
                    )
                cells = self.processor.to_anndata(matrix, class_labels, batch_library_size, first_cell=start)
                cells.uns["wbdit"] = self._provenance(num_inference_steps, guidance_scale, generator)
                yield cells

    def _decode_expression(self, latents: torch.Tensor) -> torch.Tensor:
        """Denoised cells as expected log expression, `(batch, genes)`."""
        if self.autoencoder is None:
            return self.processor.decode(latents)[0]
        proportions, _, detection, _ = self.autoencoder.decode(latents)
        return torch.log1p(proportions * detection * TARGET_SUM)

    def _decode_matrix(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        library_size: torch.Tensor | None,
        library_size_draw: torch.Tensor,
    ) -> tuple[sparse.csr_matrix, torch.Tensor | None]:
        """Denoised cells of expression space as the training data were, and their library sizes, if these have any."""
        expression, generated_library_size = self.processor.decode(latents)  # (batch, genes), (batch,)
        if library_size is None:
            library_size = generated_library_size
        if library_size is None and self.processor.config.values == "counts":
            library_size = self.processor.sample_library_size(class_labels, library_size_draw)
        return self.processor.to_matrix(expression, library_size), library_size

    def _decode_counts(
        self,
        latents: torch.Tensor,
        library_size: torch.Tensor | None,
        noise: CellNoise,
        block_generators: list[torch.Generator],
        rows: torch.Tensor,
    ) -> tuple[sparse.csr_matrix, torch.Tensor]:
        """Denoised cells of program space as counts, and their library sizes, a few blocks at a time."""
        matrices, library_sizes = [], []
        num_genes = self.autoencoder.config.num_genes
        blocks_at_once = max(1, VALUES_AT_ONCE // (num_genes * CellNoise.CELLS_PER_BLOCK))
        first_cell = 0
        for first_block in range(0, len(block_generators), blocks_at_once):
            generators = block_generators[first_block : first_block + blocks_at_once]
            first_row = first_block * CellNoise.CELLS_PER_BLOCK
            last_row = first_row + len(generators) * CellNoise.CELLS_PER_BLOCK
            cells = slice(first_cell, first_cell + int(((rows >= first_row) & (rows < last_row)).sum()))
            first_cell = cells.stop
            uniform = noise.uniform(generators, rows[cells] - first_row, num_genes, dtype=torch.float64)
            proportions, theta, detection, sizes = self.autoencoder.decode(latents[cells])
            if library_size is not None:
                sizes = library_size[cells]
            uniform = uniform.to(proportions.device)
            matrices.append(self.autoencoder.sample(proportions, theta, detection, sizes, uniform))
            library_sizes.append(sizes)
        return sparse.vstack(matrices, format="csr"), torch.cat(library_sizes)

    def denoise(
        self,
        block_generators: list[torch.Generator],
        rows: torch.Tensor,
        class_labels: torch.Tensor,
        latents: torch.Tensor | None,
        num_inference_steps: int,
        progress_bar: Any,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> torch.Tensor:
        """One batch through the reverse process, from noise to `(batch, num_features)`. See [`CellNoise`]."""
        device, dtype = self._execution_device, self.denoiser.dtype
        num_features = self.denoiser.config.num_genes
        self.scheduler.set_timesteps(num_inference_steps, device=device)  # multistep solvers remember the last batch
        step_accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra_step_kwargs = {"generator": block_generators} if step_accepts_generator else {}

        # The scheduler works on whole blocks, the denoiser on the batch's own cells.
        block_shape = (len(block_generators), CellNoise.CELLS_PER_BLOCK, num_features)
        blocks = randn_tensor(block_shape, generator=block_generators, device=device, dtype=dtype)
        if latents is not None:
            blocks = blocks.flatten(0, 1).index_copy(0, rows, latents).view(block_shape)
        blocks = blocks * self.scheduler.init_noise_sigma

        if not self.denoiser.config.condition_sizes:
            class_labels = label_index = None
        else:
            # Few combinations of labels, many cells: the denoiser embeds each combination once.
            class_labels, label_index = class_labels.to(device).unique(dim=0, return_inverse=True)
            null_labels = torch.tensor([self.denoiser.config.condition_sizes], device=device)
            guided_labels = torch.cat([class_labels, null_labels])
            guided_index = torch.cat([torch.full_like(label_index, len(class_labels)), label_index])

        for i, t in enumerate(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(blocks, t).flatten(0, 1)[rows]  # (batch, num_features)
            if self.do_classifier_free_guidance:
                both = self.denoiser(
                    torch.cat([model_input] * 2), t, guided_labels, return_dict=False, label_index=guided_index
                )[0]
                unconditional, conditional = both.chunk(2)
                model_output = unconditional + self.guidance_scale * (conditional - unconditional)
            else:
                model_output = self.denoiser(model_input, t, class_labels, return_dict=False, label_index=label_index)[
                    0
                ]

            model_output = torch.zeros_like(blocks).flatten(0, 1).index_copy(0, rows, model_output).view(block_shape)
            blocks = self.scheduler.step(model_output, t, blocks, **extra_step_kwargs, return_dict=False)[0].to(dtype)

            if callback_on_step_end is not None:
                callback_kwargs = {"latents": blocks.flatten(0, 1)[rows]}
                callback_kwargs = {key: callback_kwargs[key] for key in callback_on_step_end_tensor_inputs}
                callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                if "latents" in callback_outputs:
                    new_latents = callback_outputs["latents"].to(dtype)
                    blocks = blocks.flatten(0, 1).index_copy(0, rows, new_latents).view(block_shape)
            progress_bar.update()
        return blocks.flatten(0, 1)[rows]

    def _provenance(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> dict[str, Any]:
        """How the cells were made, for `uns["wbdit"]`: plain values that an .h5ad can hold."""
        provenance = {
            "model_id": str(self.config.get("_name_or_path") or ""),
            "scheduler": type(self.scheduler).__name__,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "version": __version__,
            "X": "counts" if self.processor.config.values == "counts" else "log expression",
        }
        if isinstance(generator, list):
            provenance["seed"] = np.array([one.initial_seed() for one in generator], dtype=np.uint64)
        elif generator is not None:
            provenance["seed"] = generator.initial_seed()
        return provenance

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """
        Uploads the pipeline with a model card rendered from its own configuration, unless the repository has a card.

        Args:
            repo_id (`str`): The repository, e.g. `"me/wbdit-pbmc"`.
            kwargs: `private`, `token`, `commit_message`, … of [`DiffusionPipeline.push_to_hub`].
        """
        push_model_card(self, repo_id, private=kwargs.get("private"), token=kwargs.get("token"))
        return super().push_to_hub(repo_id, **kwargs)


def _check_folder(folder: Path):
    """Raises, before anything is loaded, if the folder is no pipeline of ours or a weight file is cut off."""
    index = folder / ScRNAGenerationPipeline.config_name
    if not index.is_file():
        raise OSError(
            f"{folder} is no pipeline: it has no {index.name}. Give the --output_dir of training/train.py, a folder"
            " written by `save_pretrained`, or a Hub id."
        )
    class_name = json.loads(index.read_text()).get("_class_name")
    if class_name != ScRNAGenerationPipeline.__name__:
        raise OSError(f"{folder} holds a {class_name}: load it with that class.")
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{path} is truncated or damaged ({error}): copy or download it again.") from error
