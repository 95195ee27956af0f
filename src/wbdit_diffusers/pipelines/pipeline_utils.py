"""`ScRNAPipeline`: what all pipelines share. Components, saving and loading, cells to latents and back."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from scipy import sparse

from .._registration import add_components
from ..data.latents import CellDataset, encode_cells
from ..files import one_line, partial_path, remove, write_whole
from ..hub.model_card import push_model_card
from ..models.codec_expression import ExpressionCodec
from ..models.codec_programs import ProgramCodec
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..pretrained import locate
from ..processing.processor import ScRNAProcessor
from ..sampling.noise import CELLS_PER_BLOCK, CellNoise, NoiseBatch
from ..version import __version__
from .conditions import mark_unseen
from .pipeline_output import ScRNAPipelineOutput
from .programs import add_programs
from .prompts import nearest_labels


OUTPUT_TYPES = ("anndata", "np", "pt", "latent")
TOKENS_PER_BATCH = 4608  # of the default batch size: their activations fit in the cache of a CPU
MAX_CELLS_PER_BATCH = 2048  # larger batches are no faster, and cells × genes fill the memory
NUM_FILLS, ROWS_TO_FILL = 8, 256  # of genes that cells lack
MIN_MEASURED = 0.01  # of a cell's counts
VALUES_AT_ONCE = 2**21  # cells × genes that are dense in memory while counts are drawn


class ScRNAPipeline(DiffusionPipeline):
    r"""
    Base of the pipelines that generate, complete or translate single cells.

    The pipelines of the family share their components. Each loads a folder that another one saved, and
    `OtherPipeline.from_pipe(pipe)` shares the components in memory. A component named in `_optional_components` may be
    `None`.
    """

    model_cpu_offload_seq = "text_encoder->denoiser"
    _exclude_from_cpu_offload = ["codec", "gaussian_mixture"]  # small, and Accelerate's hook needs parameters
    _optional_components = ["gaussian_mixture", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        setattr(diffusers, cls.__name__, cls)  # where `DiffusionPipeline.from_pretrained` looks for it

    # ==================== Saving and loading ====================

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Any:
        """
        Loads a pipeline from a folder, a Hub id, or by the name of the one in the package (`"pbmc68k_reduced"`). Only
        safetensors files are read. See [`DiffusionPipeline.from_pretrained`] for the arguments. Raises an `OSError` if
        there is no complete pipeline, and a `ValueError` if it has no such `variant`.
        """
        where = locate(pretrained_model_name_or_path)
        is_local = Path(where).exists()
        if is_local and not Path(where, cls.config_name).is_file():
            raise OSError(
                f"{where} is not a complete pipeline: it has no {cls.config_name}. Give the --output_dir of a finished"
                " training, a folder written by `save_pretrained`, or a Hub id."
            )
        try:
            return super().from_pretrained(where, **(kwargs | {"use_safetensors": True}))
        except Exception as error:  # Diffusers raises many kinds on damaged files
            absent = "" if is_local else f"There is no folder {where}, and as a Hub id "
            kind = ValueError if "variant" in kwargs and isinstance(error, ValueError) else OSError
            reason = one_line(error if is_local else error.__cause__ or error)  # such as no connection
            raise kind(f"{absent}{where} cannot be loaded as a pipeline: {reason}") from error

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path, **kwargs) -> dict[str, Any]:
        """A configuration, whose classes Diffusers then knows."""
        index = super()._dict_from_json_file(json_file, **kwargs)
        add_components(index)
        return index

    def save_pretrained(self, save_directory: str | Path, **kwargs):
        """
        Writes the pipeline to a folder as safetensors; see [`DiffusionPipeline.save_pretrained`]. Other files in the
        folder stay. `model_index.json` is written last: a folder without it is incomplete, and is refused.
        """
        folder, save = Path(save_directory), super().save_pretrained
        if folder.is_file():
            raise OSError(f"{folder} is a file: give a folder to save the pipeline to.")
        kwargs.pop("safe_serialization", None)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        for part in (self, *self.components.values()):
            if "_name_or_path" in (getattr(part, "config", None) or {}) and hasattr(part, "register_to_config"):
                part.register_to_config(_name_or_path=public_name(part.config["_name_or_path"]))
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            write_whole(folder, lambda partial: save(partial, **kwargs))
            return
        staged = partial_path(folder / "pipeline")
        remove(staged)  # of a save that was killed
        write_whole(staged, lambda partial: save(partial, **kwargs))
        try:
            (folder / self.config_name).unlink(missing_ok=True)
            files = [path for path in staged.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == self.config_name):
                target = folder / path.relative_to(staged)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        finally:
            remove(staged)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Uploads the pipeline as [`DiffusionPipeline.push_to_hub`], with a card unless the repository has one."""
        push_model_card(self, repo_id, private=kwargs.get("private"), token=kwargs.get("token"))
        return super().push_to_hub(repo_id, **kwargs)

    def _check_components(self):
        """Raises a `ValueError` if `denoiser`, `codec` and `processor` come from different models."""
        denoiser, codec, processor = self.denoiser, self.codec, self.processor
        if denoiser is None or codec is None or processor is None:
            return
        sizes = {
            "values per cell": (codec.num_features, denoiser.config.sample_size),
            "labels": (tuple(processor.condition_sizes), tuple(denoiser.config.condition_sizes)),
            "genes": (len(processor.var_names), codec.config.num_genes),
        }
        if codec.config.get("condition_sizes"):
            sizes["labels of the codec"] = (tuple(processor.condition_sizes), tuple(codec.config.condition_sizes))
        for what, (expected, got) in sizes.items():
            if expected != got:
                raise ValueError(
                    f"`denoiser`, `codec` and `processor` come from different models: {expected} and {got} {what}."
                )

    @property
    def components(self) -> dict[str, Any]:
        """The components in the signature of `__init__` by name, without optional ones that are `None`."""
        names = sorted(self._get_signature_keys(type(self))[0])
        return {name: part for name in names if (part := getattr(self, name, None)) is not None}

    # ==================== Cells to latents, and back ====================

    @property
    def default_batch_size(self) -> int:
        """Number of cells denoised at once when a call gives no `batch_size`."""
        num_tokens = getattr(self.denoiser, "num_tokens", 32)
        num_blocks = min(TOKENS_PER_BATCH // num_tokens, MAX_CELLS_PER_BATCH) // CELLS_PER_BLOCK
        return max(1, num_blocks) * CELLS_PER_BLOCK

    @torch.no_grad()
    def encode_cells(self, adata: ad.AnnData) -> torch.Tensor:
        """
        Encodes real cells to latents `(cells, num_features)` on the CPU. Genes are aligned by name, and labels are not
        needed. A program codec draws genes that the cells lack given the others; in expression space they are zero.
        Raises a `ValueError` if hardly a gene is in common, or the values are not of the kind of the training cells.
        """
        dataset = CellDataset(adata, self.processor, with_labels=False)
        latents = encode_cells(dataset, self.codec)
        missing = torch.from_numpy(~self.processor.var_names.isin(self.processor.source(adata).var_names))
        is_partial = bool(missing.any()) and isinstance(self.codec, ProgramCodec)
        return self._fill_missing(dataset, latents, missing) if is_partial else latents

    def _fill_missing(self, dataset: CellDataset, latents: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """Draws genes that were not measured and encodes all genes, in turn. Returns the mean of the last latents."""
        codec, generator, filled = self.codec, torch.Generator().manual_seed(0), []
        for rows in torch.arange(len(dataset)).split(ROWS_TO_FILL):
            values, library_size = (part.to(codec.device) for part in dataset.cells(rows.numpy()))
            current, kept, size = latents[rows].to(codec.device), [], None
            for _ in range(NUM_FILLS):
                if dataset.is_counts:  # genes that were not measured have a share of the counts
                    means = codec.decode(current).bin_means()  # (cells, genes + 1)
                    share = means[:, :-1][:, missing].sum(1) / means.sum(1)
                    size = library_size / (1 - share).clamp(min=MIN_MEASURED)
                distribution = codec.decode(current, size)
                shape = len(rows), distribution.num_values
                drawn = distribution.icdf(torch.rand(shape, generator=generator, dtype=torch.float64))
                values[:, missing] = drawn[:, : len(missing)][:, missing].to(values)
                total = library_size + values[:, missing].sum(1) if dataset.is_counts else library_size
                current = codec.encode(values, total)
                kept.append(current)
            filled.append(torch.stack(kept[NUM_FILLS // 2 :]).mean(0).cpu())
        return torch.cat(filled)

    @torch.no_grad()
    def decode_latents(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        obs_names: Sequence[str] | None = None,
    ) -> ad.AnnData:
        """
        Draws cells for given latents, as a call does at its end. The result has no `uns["wbdit"]`. Cells that were
        encoded keep their names with `obs_names=adata.obs_names`.

        Latents `(cells, num_features)` are denoised or encoded cells. Effects of class labels `(cells,
        num_label_keys)` on genes are added. Library sizes `(cells,)` replace those in the latents. Raises a
        `ValueError` if shapes don't fit, or library sizes are given to a model of log values.
        """
        if library_size is not None and not self.processor.is_counts:
            raise ValueError("`library_size` was given, but this model was trained on log values, not on counts.")
        shapes = {
            "latents": (latents, (len(latents), self.codec.num_features)),
            "class_labels": (class_labels, (len(latents), len(self.processor.label_keys))),
            "library_size": (library_size, (len(latents),)),
        }
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, expected {shape}.")
        noise = CellNoise(generator).batch(0, len(latents))
        uniform = noise.uniform(1).cpu()[:, 0]
        cells = self._decode("anndata", latents, class_labels, library_size, noise, uniform)
        if obs_names is not None:
            cells.obs_names = obs_names
        return cells

    def _provenance(
        self, request: dict[str, Any], num_inference_steps: int, guidance_scale: Any, noise: CellNoise, unseen: dict
    ) -> dict[str, Any]:
        """The contents of `uns["wbdit"]`: what makes the cells again, but for what differs between them (`obs`)."""
        asked = request | {"conditions": None} | (request["conditions"] or {})
        asked = {key: value for key, value in asked.items() if value is not None and not np.ndim(value)}
        provenance: dict[str, Any] = {
            "model_id": public_name(self.config.get("_name_or_path")),
            "scheduler": type(self.scheduler).__name__,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "version": __version__,
            "X": "counts" if self.processor.config.values == "counts" else "log expression",
        }
        if noise.initial_seeds:
            seeds = np.array(noise.initial_seeds, dtype=np.uint64)
            provenance["seed"] = seeds if noise.one_per_cell else noise.initial_seeds[0]
        optional = {"request": asked, "unseen_combinations": unseen}
        return provenance | {key: value for key, value in optional.items() if value}

    def _decode(
        self,
        output_type: str,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        library_size: torch.Tensor | None,
        noise: NoiseBatch,
        uniform: torch.Tensor,
        measured: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> ad.AnnData | torch.Tensor:
        """
        A batch of latents as the `output_type`. Cells are drawn a few blocks at a time: dense cells are large. Genes
        that were `measured`, given as values `(cells, genes)` and a mask `(genes,)`, keep their values.
        """
        if output_type == "latent":
            return latents
        latents = latents.to(self.codec.device)  # a `device_map` may have placed the codec elsewhere
        if output_type != "anndata":
            return self.codec.decode(latents, None, class_labels).expression()
        processor, num_genes = self.processor, self.codec.config.num_genes
        if library_size is None and processor.is_counts and not self.codec.models_library_size:
            codes = processor.encode_conditions({}, len(latents)) if class_labels is None else class_labels
            library_size = processor.sample_library_size(codes, uniform)
        matrices, sizes = [], []
        for part, rows in noise.parts(max(1, VALUES_AT_ONCE // (num_genes * CELLS_PER_BLOCK))):
            given = (None if values is None else values[rows] for values in (library_size, class_labels))
            distribution = self.codec.decode(latents[rows], *given)
            values = distribution.icdf(part.uniform(distribution.num_values, dtype=torch.float64))
            if measured is not None:
                values[:, :num_genes] = torch.where(measured[1], measured[0][rows].to(values), values[:, :num_genes])
            matrices.append(sparse.csr_matrix(values[:, :num_genes].numpy()))
            # Where the bin of other genes is drawn, the library size is the sum of the drawn counts.
            sizes.append(values.sum(1) if values.shape[1] > num_genes else distribution.library_size)
        matrix = sparse.vstack(matrices, format="csr")
        all_sizes = torch.cat(sizes) if processor.is_counts else None
        cells = processor.to_anndata(matrix, class_labels, all_sizes, noise.names)
        if isinstance(self.codec, ProgramCodec):
            add_programs(cells, self.codec, latents)
        return cells


class DenoisingPipeline(ScRNAPipeline):
    """What pipelines share whose call denoises with labels: the components, and the checks of a call."""

    def __init__(
        self,
        denoiser: WhiteBoxDiTModel | GaussianMixtureDenoiser,
        scheduler: SchedulerMixin,
        processor: ScRNAProcessor,
        codec: ProgramCodec | ExpressionCodec,
        num_inference_steps: int = 12,
        gaussian_mixture: GaussianMixtureDenoiser | None = None,
        text_encoder: Any | None = None,
        tokenizer: Any | None = None,
        label_texts: dict[str, str] | None = None,
    ):
        super().__init__()
        modules = {"denoiser": denoiser, "scheduler": scheduler, "processor": processor, "codec": codec}
        optional = {"gaussian_mixture": gaussian_mixture, "text_encoder": text_encoder, "tokenizer": tokenizer}
        self.register_modules(**modules, **optional)
        self.register_to_config(num_inference_steps=num_inference_steps, label_texts=label_texts)
        self._check_components()

    @property
    def guidance_scale(self) -> float | dict[str, float]:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def check_inputs(
        self,
        num_inference_steps: int,
        batch_size: int | None,
        latents: torch.Tensor | None,
        output_type: str,
        tensor_inputs: Sequence[str],
    ):
        """Raises a `ValueError` if an argument of a call has no meaning for this pipeline."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, not {batch_size}.")
        if not hasattr(self.scheduler, "alphas_cumprod"):  # as for flow matching: the cells would be wrong
            lacks = f"{type(self.scheduler).__name__} does not have the noise schedule of DDPM (`alphas_cumprod`)"
            raise ValueError(f"{lacks}: take DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or the like.")
        most = self.scheduler.config.get("num_train_timesteps") or num_inference_steps
        if not 1 <= num_inference_steps <= most:
            allowed = f"between 1 and the {most} timesteps of training"
            raise ValueError(f"`num_inference_steps` must be {allowed}, not {num_inference_steps}.")
        num_features = self.denoiser.config.sample_size
        if latents is not None and tuple(latents.shape[1:]) != (num_features,):
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, expected (num_cells, {num_features}).")
        if unknown := sorted(set(tensor_inputs) - set(self._callback_tensor_inputs)):
            known = f"choose from {self._callback_tensor_inputs}"
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}: {known}.")

    def encode_prompt(self, prompt: str | Sequence[str] | torch.Tensor) -> torch.Tensor:
        """
        Codes `(prompts, num_label_keys)` of the labels whose text is nearest to each prompt, -1 where a label key is
        left open. Codes stay as they are. Raises a `ValueError` if the pipeline has no text encoder, or no labels.
        """
        if isinstance(prompt, torch.Tensor):
            return prompt
        if self.text_encoder is None or self.tokenizer is None:
            how = "train with --text_encoder ID, or load with `text_encoder=` and `tokenizer=`"
            raise ValueError(f"`prompt` was given, but this pipeline has no text encoder: {how}.")
        if not self.processor.label_keys:
            raise ValueError("`prompt` was given, but this model is unconditional (it has no label keys).")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return nearest_labels(prompts, self.processor, self.tokenizer, self.text_encoder, self.config.label_texts)

    def _end_step(
        self,
        callback: Callable[[DiffusionPipeline, int, int, dict], dict] | None,
        tensor_inputs: Sequence[str],
        progress_bar: Any,
        i: int,
        t: torch.Tensor,
        latents: torch.Tensor,
    ) -> torch.Tensor:
        """Ends a step of the reverse process: the callback may change the latents."""
        progress_bar.update()
        tensors = {"latents": latents} if tensor_inputs else {}
        changed = {} if callback is None else callback(self, i, t, tensors)
        return changed.get("latents", latents)

    def _finish(
        self, batches: list, output_type: str, return_dict: bool, provenance: dict, unseen: dict, obs: dict
    ) -> ScRNAPipelineOutput | tuple:
        """Puts the batches of a call together. `obs` are further columns."""
        self.maybe_free_model_hooks()
        result: Any
        if output_type == "anndata":
            result = ad.concat(batches, merge="same", uns_merge="same")
            result.uns["wbdit"] = provenance
            if unseen:
                mark_unseen(result, self.processor)
            for name, values in obs.items():
                result.obs[name] = values
        else:
            result = torch.cat(batches)
            result = result.cpu().numpy() if output_type == "np" else result
        return ScRNAPipelineOutput(cells=result) if return_dict else (result,)

    def _known_labels(self, cells: ad.AnnData) -> torch.Tensor:
        """Labels of measured cells `(cells, num_label_keys)`, -1 where `obs` has none that the model knows."""
        labels = torch.full((cells.n_obs, len(self.processor.label_keys)), -1, dtype=torch.long)
        for column, (key, names) in enumerate(zip(self.processor.label_keys, self.processor.config.categories)):
            if key in cells.obs:
                labels[:, column] = torch.from_numpy(pd.Index(names).get_indexer(cells.obs[key].astype(str)))
        return labels

    def _origins(self, cells: ad.AnnData, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of `obs` that name the measured cell in each row, and its labels."""
        keys = [key for key in self.processor.label_keys if key in cells.obs]
        origins = {f"input_{key}": cells.obs[key].astype(str).to_numpy()[rows] for key in keys}
        return {"input_cell": cells.obs_names.to_numpy()[rows], **origins}


def public_name(name_or_path: str | Path | None) -> str:
    """A Hub id as it is, and the last part of a local path: the rest of a path stays private."""
    name = str(name_or_path or "")
    return Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name
