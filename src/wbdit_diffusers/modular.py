"""The pipeline as Modular Diffusers blocks: labels, denoise, decode. A block can be exchanged, or one put between.

    blocks = ScRNABlocks()
    blocks.sub_blocks.insert("hold", HoldProgram(), 2)  # a block of one's own, between denoise and decode
    pipe = blocks.init_pipeline("me/wbdit-pbmc")
    pipe.load_components()
    cells = pipe(num_cells=1000, generator=torch.Generator().manual_seed(0), output="cells")

The same seed gives the cells of [`ScRNAGenerationPipeline`].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anndata as ad
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)

from .hub.remote_code import REQUIREMENTS
from .models.codec_programs import ProgramCodec
from .models.transformer_white_box_dit import WhiteBoxDiTModel
from .pipelines.inputs import check_cells, check_sampling
from .pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from .pipelines.provenance import provenance_of
from .processing.processor import ScRNAProcessor
from .sampling.noise import CellNoise, NoiseBatch


# What a model has in another class's place is in its modular_model_index.json.
COMPONENTS = {
    "denoiser": WhiteBoxDiTModel,
    "scheduler": DPMSolverMultistepScheduler,
    "processor": ScRNAProcessor,
    "codec": ProgramCodec,
}


@dataclass
class CellBatch:
    """
    Cells that are made at once.

    Args:
        rows (`slice`): Which of all cells.
        noise ([`NoiseBatch`]): Their random numbers, which each block goes on with.
        uniform (`torch.Tensor` of shape `(cells,)`): One more number of each, for its library size.
    """

    rows: slice
    noise: NoiseBatch
    uniform: torch.Tensor


class _Block(ModularPipelineBlocks):
    """What all blocks have."""

    model_name = "wbdit"
    _requirements = REQUIREMENTS

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec(name, type_hint) for name, type_hint in COMPONENTS.items()]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("num_inference_steps", 20)]

    def pipeline(self, components: ModularPipeline) -> ScRNAGenerationPipeline:
        """
        The same components as a [`ScRNAGenerationPipeline`], which has the functions.

        Raises:
            ValueError: If they are not loaded.
        """
        parts = {name: getattr(components, name) for name in COMPONENTS}
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} is not loaded: call `load_components()` first.")
        steps = components.config.num_inference_steps
        pipe = ScRNAGenerationPipeline(**parts, num_inference_steps=steps)
        pipe.register_to_config(_name_or_path=str(components._pretrained_model_name_or_path or ""))
        return pipe


class LabelsStep(_Block):
    """Checks what is asked for, draws the labels that are not, and hands out random numbers."""

    @property
    def description(self) -> str:
        return "Checks what is asked for, draws the labels that are not, and hands out random numbers."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("num_cells", int, default=1, description="Number of cells."),
            InputParam("cell_types", description="One cell type, or a list with one for each cell."),
            InputParam("conditions", dict, description="Labels of other label keys, one or one for each cell."),
            InputParam("library_size", description="Expected total counts, one or one for each cell."),
            InputParam("guidance_scale", float, default=1.0, description="Classifier-free guidance; 1 is none."),
            InputParam("num_inference_steps", int, description="Denoising steps; the model's own by default."),
            InputParam("batch_size", int, description="Cells denoised at once: bounds the memory."),
            InputParam("generator", torch.Generator, description="Makes the cells reproducible."),
            InputParam("latents", torch.Tensor, description="The initial Gaussian noise, cells × features."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("class_labels", torch.Tensor, description="Codes of the labels, cells × label keys."),
            OutputParam("library_sizes", torch.Tensor, description="Those asked for, of each cell, or None."),
            OutputParam("batches", list, description="The CellBatch of all cells, in order."),
            OutputParam("num_inference_steps", int, description="Denoising steps."),
            OutputParam("provenance", dict, description="What makes the same cells again."),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe, processor = self.pipeline(components), components.processor
        if block.num_inference_steps is None:
            block.num_inference_steps = components.config.num_inference_steps
        check_sampling(
            *(processor, components.scheduler, block.guidance_scale, block.num_inference_steps, block.batch_size),
            "anndata",
        )
        asked = check_cells(
            *(processor, components.denoiser.config.sample_size, block.num_cells, block.cell_types, block.conditions),
            *(block.library_size, block.generator, block.latents, "anndata"),
        )
        if block.generator is None:
            block.generator = torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
        block.provenance = provenance_of(pipe, block.num_inference_steps, block.guidance_scale, block.generator)
        noise, batch_size = CellNoise(block.generator), block.batch_size or pipe.default_batch_size
        block.batches, class_labels = [], []
        for start in range(0, asked.num_cells, batch_size):
            stop = min(start + batch_size, asked.num_cells)
            batch_noise = noise.batch(start, stop)
            uniform = batch_noise.uniform(2).cpu()  # (batch, 2)
            block.batches.append(CellBatch(slice(start, stop), batch_noise, uniform[:, 1]))
            labels = asked.class_labels(processor, start, stop)
            class_labels.append(processor.complete_labels(labels, uniform[:, 0]))
        block.class_labels = torch.cat(class_labels)
        block.library_sizes = asked.library_sizes(0, asked.num_cells)
        self.set_block_state(state, block)
        return components, state


class DenoiseStep(_Block):
    """From noise to latents, batch by batch, with the scheduler's steps."""

    def __init__(self):
        super().__init__()
        self._progress_bar_config: dict[str, Any] = {}

    def set_progress_bar_config(self, **kwargs):
        """What tqdm is told, such as `disable=True`."""
        self._progress_bar_config = kwargs

    @property
    def description(self) -> str:
        return "From noise to latents, batch by batch, with the scheduler's steps."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("class_labels", torch.Tensor, required=True, description="Cells × label keys."),
            InputParam("batches", list, required=True, description="The CellBatch of all cells."),
            InputParam("num_inference_steps", int, required=True, description="Denoising steps."),
            InputParam("guidance_scale", float, default=1.0, description="Classifier-free guidance; 1 is none."),
            InputParam("latents", torch.Tensor, description="The initial Gaussian noise, cells × features."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", torch.Tensor, description="Denoised, cells × features.")]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe = self.pipeline(components)
        pipe.set_progress_bar_config(**self._progress_bar_config)
        block.latents = torch.cat(list(self._batches(pipe, block)))
        self.set_block_state(state, block)
        return components, state

    def _batches(self, pipe: ScRNAGenerationPipeline, block: Any) -> Iterator[torch.Tensor]:
        pipe.scheduler.set_timesteps(block.num_inference_steps, device=pipe._execution_device)
        with pipe.progress_bar(total=len(block.batches) * len(pipe.scheduler.timesteps)) as progress_bar:

            def count(i: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                progress_bar.update()
                return latents

            pipe._guidance_scale = block.guidance_scale
            for batch in block.batches:
                start = None if block.latents is None else block.latents[batch.rows]
                labels = block.class_labels[batch.rows]
                yield pipe._denoise(batch.noise, labels, start, block.num_inference_steps, count)


class DecodeStep(_Block):
    """From latents to an AnnData."""

    @property
    def description(self) -> str:
        return "From latents to an AnnData."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", torch.Tensor, required=True, description="Denoised, cells × features."),
            InputParam("class_labels", torch.Tensor, required=True, description="Cells × label keys."),
            InputParam("batches", list, required=True, description="The CellBatch of all cells."),
            InputParam("library_sizes", torch.Tensor, description="Those asked for, of each cell."),
            InputParam("provenance", dict, description="What `uns` says of how the cells were made."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("cells", ad.AnnData, description="The cells.")]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        block = self.get_block_state(state)
        pipe, cells = self.pipeline(components), []
        for batch in block.batches:
            rows, sizes = batch.rows, block.library_sizes
            sizes = None if sizes is None else sizes[rows]
            latents, labels = block.latents[rows], block.class_labels[rows]
            cells.append(pipe._to_cells(latents, labels, sizes, batch.noise, batch.uniform, first_cell=rows.start))
        block.cells = ad.concat(cells, merge="same", uns_merge="same")
        if block.provenance is not None:
            block.cells.uns["wbdit"] = block.provenance
        self.set_block_state(state, block)
        return components, state


class ScRNABlocks(SequentialPipelineBlocks):
    """All blocks, in order: what [`ScRNAGenerationPipeline`] does in one call."""

    model_name = "wbdit"
    block_classes = [LabelsStep, DenoiseStep, DecodeStep]
    block_names = ["labels", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Generates single cells: labels, denoise, decode."
