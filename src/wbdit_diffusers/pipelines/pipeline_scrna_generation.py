"""`ScRNAGenerationPipeline`: noise in, an AnnData of cells out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anndata as ad
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import replace_example_docstring
from scipy import sparse

from ..data.dataset import CellDataset, encode_cells
from ..hub.folder import check_folder, load_or_explain, write_beside
from ..hub.identity import check_format, check_identity, mark
from ..hub.model_card import push_model_card
from ..hub.remote_code import without_remote_code
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..models.loading import check_integer
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..pretrained import locate
from ..processing.processor import ScRNAProcessor
from ..sampling.denoise import denoise
from ..sampling.guidance import LabelBatch, predict_guided
from ..sampling.noise import CELLS_PER_BLOCK, CellNoise, NoiseBatch
from .inputs import MAX_CELLS, AskedCells, check_callback, check_cells, check_decoded, check_returned, check_sampling
from .pipeline_output import ScRNAPipelineOutput
from .programs import add_programs
from .provenance import provenance_of, public_name


HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")  # arguments of a download
PARTS = ("denoiser", "scheduler", "processor", "codec")
TOKENS_PER_BATCH = 32_768  # what the default batch size aims at
MAX_CELLS_PER_BATCH = 2048  # of few tokens: larger batches are no faster, and cells × genes fill the memory
VALUES_AT_ONCE = 2**21  # cells × genes that are dense in memory while counts are drawn

EXAMPLE_DOC_STRING = """
        Examples:

        ```py
        >>> import torch
        >>> from wbdit_diffusers import ScRNAGenerationPipeline

        >>> pipe = ScRNAGenerationPipeline.from_pretrained("pbmc68k_reduced")
        >>> pipe(num_cells=5000, cell_types="CD19+ B", generator=torch.Generator().manual_seed(0)).cells
        ```"""


class ScRNAGenerationPipeline(DiffusionPipeline):
    r"""
    Generates single cells by denoising.

    Args:
        denoiser ([`WhiteBoxDiTModel`] or [`GaussianMixtureDenoiser`]): Predicts the noise in a batch of latents.
        scheduler ([`SchedulerMixin`]):
            The reverse process: [`DDPMScheduler`], or any other through `from_config`, e.g.
            `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.
        processor ([`ScRNAProcessor`]): Genes, library sizes and names of labels.
        codec ([`ProgramCodec`] or [`ExpressionCodec`]):
            Between cells and latents: gene programs under a likelihood of counts, or, as in arXiv 2411.06785,
            expression itself.
        num_inference_steps (`int`, defaults to 20): Steps taken when the call does not say.
    """

    model_cpu_offload_seq = "denoiser"
    _exclude_from_cpu_offload = ["codec"]  # small, and Accelerate's hook can't take one that has buffers only
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        denoiser: WhiteBoxDiTModel | GaussianMixtureDenoiser,
        scheduler: SchedulerMixin,
        processor: ScRNAProcessor,
        codec: ProgramCodec | ExpressionCodec,
        num_inference_steps: int = 20,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, processor=processor, codec=codec)
        self.register_to_config(num_inference_steps=check_integer("num_inference_steps", num_inference_steps))
        if denoiser is None or processor is None or codec is None:  # `from_pretrained` may be told to leave some out
            return
        needed = (codec.num_features, tuple(processor.condition_sizes))
        got = (denoiser.config.sample_size, tuple(denoiser.config.condition_sizes))
        if needed != got:
            raise ValueError(
                f"`denoiser` is not of the same model as `codec` and `processor`: num_features={needed[0]} and"
                f" condition_sizes={needed[1]} need a denoiser of the same sizes, not sample_size={got[0]} and"
                f" condition_sizes={got[1]}."
            )
        if codec.config.get("condition_sizes") and tuple(codec.config.condition_sizes) != processor.condition_sizes:
            raise ValueError(
                "`codec` and `processor` are not of one model: condition_sizes are"
                f" {tuple(codec.config.condition_sizes)} and {processor.condition_sizes}."
            )
        if codec.config.num_genes != len(processor.var_names):
            raise ValueError(
                f"`codec` and `processor` are not of one model: {codec.config.num_genes} genes and"
                f" {len(processor.var_names)} genes."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "ScRNAGenerationPipeline":
        """
        Loads a pipeline from a folder or a Hub id, or one that comes with the package (`"pbmc68k_reduced"`); see
        [`DiffusionPipeline.from_pretrained`] for the arguments.

        Raises:
            OSError: If the folder or repository holds no pipeline of this class, a damaged one, or parts of several.
            ValueError: If `use_safetensors=False` asks for pickle files.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors=False` would load pickle files, which can run any code: leave it out.")
        kwargs["use_safetensors"] = True
        where = locate(pretrained_model_name_or_path)
        given = {name for name in PARTS if name in kwargs}
        if Path(where).exists() or Path(where).is_absolute():
            index = check_folder(Path(where), cls, [name for name in PARTS if name not in given])
        else:
            index = load_or_explain(
                lambda: cls.load_config(where, **{k: kwargs[k] for k in HUB if k in kwargs}), where
            )
            check_format(index, where)
        pipeline = load_or_explain(lambda: super(ScRNAGenerationPipeline, cls).from_pretrained(where, **kwargs), where)
        as_saved = all(kwargs.get(key) is None for key in ("dtype", "torch_dtype", "quantization_config", "variant"))
        check_identity(pipeline, index, where, given, check_weights=as_saved)
        return pipeline

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path, **kwargs) -> dict[str, Any]:
        """A configuration. Where it names modules of the repository, this package takes their place."""
        return without_remote_code(super()._dict_from_json_file(json_file, **kwargs))

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
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
                One cell type for all cells, or one for each: a label of the model's first label key. Drawn from the
                training frequencies when not given.
            conditions (`dict`, *optional*):
                For any label key of the model, one label for all cells or one for each. Those not given are drawn from
                the training frequencies among cells of the given labels.
            library_size (`float` or `list[float]`, *optional*):
                Expected total counts, instead of generated ones. What is drawn varies around them as counts do.
            guidance_scale (`float`, defaults to 1.0):
                Strength of classifier-free guidance (arXiv 2207.12598); 1.0 is none, and costs half.
            num_inference_steps (`int`, *optional*): Denoising steps; the pipeline's configured number when not given.
            batch_size (`int`, *optional*): Cells denoised at once: bounds the memory, does not change the cells.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the cells reproducible: the same seed gives the same cells, whatever the batch size. A list has
                one generator for each cell, which is slow for many cells.
            latents (`torch.Tensor` of shape `(num_cells, num_features)`, *optional*): The initial Gaussian noise.
            output_type (`str`, defaults to `"anndata"`):
                `"anndata"`; `"np"` or `"pt"` for an array or tensor (cells × genes) on the scale of log expression;
                `"latent"` for what the denoiser makes (cells × features).
            return_dict (`bool`, defaults to `True`): Return a [`ScRNAPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, callback_kwargs)` after each step of each batch; returns the
                dict of tensors to go on with.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Tensors for the callback.

        Examples:

        Returns:
            [`ScRNAPipelineOutput`], or a tuple whose first element is the cells. Columns of labels in `obs` have the
            categories of the training cells, those that none of the generated cells has included: colours and
            concatenated cells agree.

        Raises:
            ValueError: If a label is unknown to the model, or arguments don't fit each other.
        """
        outputs = list(
            self._generate(
                *(num_cells, cell_types, conditions, library_size, guidance_scale, num_inference_steps, batch_size),
                *(generator, latents, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs),
            )
        )
        if output_type == "anndata":
            cells = ad.concat(outputs, merge="same", uns_merge="same")
        else:
            cells = torch.cat(outputs)
            cells = cells.cpu().numpy() if output_type == "np" else cells
        return ScRNAPipelineOutput(cells=cells) if return_dict else (cells,)

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
        first_cell: int = 0,
    ) -> Iterator[ad.AnnData]:
        """
        The cells of a call, batch by batch, so that the memory does not grow with `num_cells`:
        `write_cells("cells.h5ad", pipe.stream(num_cells=1_000_000))`. The arguments are those of a call, and
        `first_cell` (`int`, defaults to 0), the number of the first cell: cells have their random numbers by it, so
        `stream(num_cells=1, first_cell=k, generator=...)` makes cell `k` alone again.

        Yields:
            `AnnData`: the next cells; all batches have the same categories.
        """
        return self._generate(
            *(num_cells, cell_types, conditions, library_size, guidance_scale, num_inference_steps, batch_size),
            *(generator, None, "anndata", None, ["latents"], first_cell),
        )

    def _generate(
        self,
        num_cells: int,
        cell_types: str | list[str] | None,
        conditions: dict[str, str | list[str]] | None,
        library_size: float | list[float] | None,
        guidance_scale: float,
        num_inference_steps: int | None,
        batch_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        first_cell: int = 0,
    ) -> Iterator[Any]:
        """Checks the arguments, at once, and returns what makes the cells."""
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        check_sampling(*(self.processor, self.scheduler, guidance_scale, num_inference_steps, batch_size, output_type))
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        asked = check_cells(
            *(self.processor, self.denoiser.config.sample_size, num_cells, cell_types, conditions, library_size),
            *(generator, latents, output_type),
        )
        check_integer("first_cell", first_cell, smallest=0, largest=MAX_CELLS)
        if first_cell and isinstance(generator, list):
            raise ValueError("`first_cell` has no effect on a list of generators, one for each cell: leave it out.")
        return self._batches(
            *(asked, guidance_scale, num_inference_steps, batch_size, generator, latents, output_type),
            *(callback_on_step_end, callback_on_step_end_tensor_inputs, first_cell),
        )

    @torch.no_grad()
    def _batches(
        self,
        asked: AskedCells,
        guidance_scale: float,
        num_inference_steps: int,
        batch_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        first_cell: int,
    ) -> Iterator[Any]:
        # 1. Steps, batches and random numbers
        batch_size = batch_size or self.default_batch_size
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        num_timesteps = len(self.scheduler.timesteps)
        if generator is None:  # drawn from the global generator, so that `uns` can say which seed it was
            generator = torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
        provenance = provenance_of(self, num_inference_steps, guidance_scale, generator)
        noise = CellNoise(generator)

        starts = range(0, asked.num_cells, batch_size)
        with self.progress_bar(total=len(starts) * num_timesteps) as progress_bar, ExitStack() as at_the_end:
            at_the_end.callback(self.maybe_free_model_hooks)  # also of a stream that is given up

            def on_step_end(i: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                progress_bar.update()
                if callback_on_step_end is None:
                    return latents
                tensors = {"latents": latents}
                tensors = {key: tensors[key] for key in callback_on_step_end_tensor_inputs}
                return check_returned(callback_on_step_end(self, i, t, tensors), latents)

            for start in starts:
                # 2. Labels of the batch: those not asked for are drawn
                batch = slice(start, min(start + batch_size, asked.num_cells))
                cell_noise = noise.batch(first_cell + batch.start, first_cell + batch.stop)
                uniform = cell_noise.uniform(2).cpu()  # (batch, 2)
                class_labels = self.processor.complete_labels(
                    asked.class_labels(self.processor, batch.start, batch.stop), uniform[:, 0]
                )

                # 3. Denoise
                # For each batch anew: a callback, or another stream, may have changed them.
                self._guidance_scale, self._num_timesteps = guidance_scale, num_timesteps
                start_latents = None if latents is None else latents[batch]
                denoised = self._denoise(cell_noise, class_labels, start_latents, num_inference_steps, on_step_end)

                # 4. Back to cells
                if output_type == "latent":
                    yield denoised
                elif output_type != "anndata":
                    yield check_decoded(self.codec.decode(denoised, class_labels=class_labels).expression())
                else:
                    sizes = asked.library_sizes(batch.start, batch.stop)
                    cells = self._to_cells(
                        *(denoised, class_labels, sizes, cell_noise, uniform[:, 1]), first_cell=first_cell + start
                    )
                    cells.uns["wbdit"] = provenance
                    yield cells

    @property
    def default_batch_size(self) -> int:
        """Cells denoised at once when a call does not say how many."""
        return min(
            max(CELLS_PER_BLOCK, TOKENS_PER_BATCH // getattr(self.denoiser, "num_tokens", 32)), MAX_CELLS_PER_BATCH
        )

    def _denoise(
        self,
        noise: NoiseBatch,
        class_labels: torch.Tensor,
        latents: torch.Tensor | None,
        num_inference_steps: int,
        on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """One batch from noise to latents `(batch, num_features)`."""
        device, config = self._execution_device, self.denoiser.config
        labels = LabelBatch.from_class_labels(class_labels, config.condition_sizes, device)

        def predict(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return predict_guided(self.denoiser, latents.to(self.denoiser.dtype), t, labels, self.guidance_scale)

        denoised = denoise(
            *(predict, self.scheduler, noise, config.sample_size, num_inference_steps, device),
            latents=latents,
            on_step_end=on_step_end,
        )
        return denoised.to(self.codec.device)  # of several devices, a `device_map` may have given it another one

    def _to_cells(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        library_size: torch.Tensor | None,
        noise: NoiseBatch,
        uniform: torch.Tensor,
        first_cell: int = 0,
    ) -> ad.AnnData:
        """Draws the cells of a batch of latents, a few blocks at a time: dense, they are large."""
        if library_size is None and self.processor.has_library_size and not self.codec.models_library_size:
            codes = self.processor.encode_conditions({}, len(latents)) if class_labels is None else class_labels
            library_size = self.processor.sample_library_size(codes, uniform)
        num_genes = self.codec.config.num_genes
        matrices, sizes = [], []
        for part, rows in noise.parts(max(1, VALUES_AT_ONCE // (num_genes * CELLS_PER_BLOCK))):
            given = (None if values is None else values[rows] for values in (library_size, class_labels))
            distribution = self.codec.decode(latents[rows], *given)
            values = distribution.icdf(part.uniform(distribution.num_values, dtype=torch.float64))
            matrices.append(sparse.csr_matrix(values[:, :num_genes].numpy()))
            # Where the other genes were drawn as well, the library is what was drawn.
            sizes.append(values.sum(1) if values.shape[1] > num_genes else distribution.library_size)
            check_decoded(values, sizes[-1])
        matrix = sparse.vstack(matrices, format="csr")
        all_sizes = torch.cat(sizes) if self.processor.has_library_size else None
        cells = self.processor.to_anndata(matrix, class_labels, all_sizes, first_cell=first_cell)
        if isinstance(self.codec, ProgramCodec):
            add_programs(cells, self.codec, latents)
        return cells

    @torch.no_grad()
    def encode_cells(self, adata: ad.AnnData) -> torch.Tensor:
        """
        Real cells as latents.

        Args:
            adata (`AnnData`): Cells; genes are aligned by name, and labels are not needed.

        Returns:
            `torch.Tensor` of shape `(cells, num_features)`, on the CPU.

        Raises:
            ValueError: If no gene is in common, or the cells are not of the kind that the pipeline was trained on.
        """
        return encode_cells(CellDataset(adata, self.processor, with_labels=False), self.codec)

    @torch.no_grad()
    def decode_latents(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ad.AnnData:
        """
        Draws cells for given latents, as a call does at its end.

        Args:
            latents (`torch.Tensor` of shape `(cells, num_features)`): Denoised, or encoded, cells.
            class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`, *optional*):
                Codes of their labels. Without them nothing is added to what the latents say.
            library_size (`torch.Tensor` of shape `(cells,)`, *optional*): As in a call, instead of those in `latents`.
            generator (`torch.Generator`, *optional*): Makes the draw reproducible.

        Returns:
            `AnnData`: like that of a call, but without `uns["wbdit"]`: nobody knows where the latents come from.

        Raises:
            ValueError: If arguments don't fit each other.
        """
        if library_size is not None and not self.processor.has_library_size:
            raise ValueError("`library_size` was given, but this model was trained on log values, not on counts.")
        expected = {
            "latents": (latents, (len(latents), self.codec.num_features)),
            "class_labels": (class_labels, (len(latents), len(self.processor.label_keys))),
            "library_size": (library_size, (len(latents),)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, expected {shape}.")
        noise = CellNoise(generator or torch.Generator().manual_seed(int(torch.randint(2**31, (1,)))))
        batches = []
        for start in range(0, len(latents), MAX_CELLS_PER_BATCH):
            rows = slice(start, min(start + MAX_CELLS_PER_BATCH, len(latents)))
            batch = noise.batch(rows.start, rows.stop)
            uniform = batch.uniform(1).cpu()[:, 0]
            labels, sizes = (None if values is None else values[rows] for values in (class_labels, library_size))
            device_latents = latents[rows].to(self.codec.device)
            batches.append(self._to_cells(device_latents, labels, sizes, batch, uniform, first_cell=start))
        return ad.concat(batches, merge="same")

    def save_pretrained(self, save_directory: str | Path, **kwargs):
        """
        Writes the pipeline to a folder; see [`DiffusionPipeline.save_pretrained`]. Where it was loaded from is
        recorded as a Hub id or a folder's name, never as a path of this machine.
        """
        if kwargs.get("safe_serialization") is False:
            raise ValueError(
                "`safe_serialization=False` would write pickle files, which are never loaded: leave it out."
            )
        for part in (self, *self.components.values()):
            if "_name_or_path" in part.config:
                part.register_to_config(_name_or_path=public_name(part.config["_name_or_path"]))
        mark(self)
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise OSError(f"{folder} is a file: give a folder to save the pipeline to.")
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        save = super().save_pretrained
        write_beside(folder, self.config_name, lambda beside: save(beside, **kwargs))

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """
        Uploads the pipeline with a model card rendered from its own configuration, unless the repository has a card.

        Args:
            repo_id (`str`): The repository, e.g. `"me/wbdit-pbmc"`.
            kwargs: `private`, `token`, `commit_message`, … of [`DiffusionPipeline.push_to_hub`].
        """
        push_model_card(self, repo_id, private=kwargs.get("private"), token=kwargs.get("token"))
        return super().push_to_hub(repo_id, **kwargs)
