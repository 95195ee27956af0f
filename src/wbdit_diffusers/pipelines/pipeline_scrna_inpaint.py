"""`ScRNAInpaintPipeline`: cells with some genes in, the same cells with all genes out."""

import math
from collections.abc import Callable
from functools import partial

import anndata as ad
import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging, replace_example_docstring

from ..data.latents import CellDataset
from ..models.codec_programs import ProgramCodec
from ..sampling.denoise import denoise
from ..sampling.guidance import Conditions, predict
from ..sampling.noise import CellNoise
from .conditions import encode_request
from .observed_genes import ObservedGenes
from .pipeline_output import ScRNAPipelineOutput
from .pipeline_utils import DenoisingPipeline


logger = logging.get_logger(__name__)

CELLS_TO_COMPARE, NUM_ROUNDS, PSEUDO_COUNTS = 512, 5, 10  # for the detection of the measured genes
MAX_MISMATCH = math.log(2)  # median of a gene's log factor, beyond which a warning names it

EXAMPLE_DOC_STRING = """
        Examples:

        ```py
        >>> from wbdit_diffusers import ScRNAInpaintPipeline

        >>> pipe = ScRNAInpaintPipeline.from_pretrained("me/wbdit-pbmc")
        >>> full = pipe(panel, num_samples=10).cells
        ```"""


class ScRNAInpaintPipeline(DenoisingPipeline):
    r"""
    Draws the genes that were not measured, as those outside a spatial panel, given those that were. The components are
    those of [`ScRNAGenerationPipeline`], with a Gaussian mixture.

    Each sample is a draw from the posterior, not its mean: its spread is what the measured genes leave open.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        cells: ad.AnnData,
        num_samples: int = 1,
        library_size: float | list[float] | None = None,
        match_detection: bool = False,
        guidance_scale: float | dict[str, float] = 1.0,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "anndata",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ScRNAPipelineOutput | tuple:
        r"""
        Completes cells.

        Args:
            cells (`AnnData`):
                Measured cells, with values of the kind of the training cells. Genes are matched by name. Labels in
                `obs` that the model knows are used. Others are drawn from their posterior given the genes.
            num_samples (`int`, defaults to 1): Number of draws for each cell. They follow each other in the result.
            library_size (`float` or `list[float]`, *optional*):
                Total counts over all genes, if they are known. By default they are drawn with the genes.
            match_detection (`bool`, defaults to `False`):
                Whether to estimate a factor for each measured gene, for a panel of another technology. The result then
                has draws of all genes, as the training cells' technology would see them.
            guidance_scale, num_inference_steps, batch_size, generator, output_type, return_dict, callback_on_step_end:
                As in [`ScRNAGenerationPipeline.__call__`].

        Examples:

        Returns:
            [`ScRNAPipelineOutput`], or a tuple whose first element is the cells, with all modelled genes. Measured
            genes keep their values, unless `match_detection` is set. `obs["input_cell"]` names the measured cell,
            `obs["sample"]` numbers its draws, and `obs["input_<key>"]` has its labels.

        Raises:
            ValueError: If the model has no Gaussian mixture, or hardly a gene is in common.
        """
        # 1. Check the request, and read the measured genes
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        self.check_inputs(num_inference_steps, batch_size, None, output_type, callback_on_step_end_tensor_inputs)
        if self.gaussian_mixture is None or not isinstance(self.codec, ProgramCodec):
            raise ValueError("This pipeline has no Gaussian mixture of gene programs: train it with `wbdit train`.")
        if num_samples < 1:
            raise ValueError(f"`num_samples` is {num_samples}: ask for at least one.")
        dataset, codec = CellDataset(cells, self.processor, with_labels=False), self.codec
        is_measured = self.processor.var_names.isin(self.processor.source(cells).var_names)
        gene_mask = torch.from_numpy(is_measured).to(codec.device)  # (genes,)
        known_labels = self._known_labels(cells)  # (cells, num_label_keys), -1 is unknown
        sizes = encode_request(self.processor, cells.n_obs, None, None, library_size)[2]  # (cells,), if given
        log_factors = self._detection(dataset, gene_mask, known_labels, match_detection)
        noise, device = CellNoise(generator), self._execution_device
        request = {"num_samples": num_samples, "library_size": library_size, "match_detection": match_detection}
        provenance = self._provenance(request | {"conditions": None}, num_inference_steps, guidance_scale, noise, {})
        self._guidance_scale = guidance_scale
        all_rows = np.arange(cells.n_obs).repeat(num_samples)  # the measured cell of each row
        batch_size = batch_size or self.default_batch_size
        starts, outputs = range(0, len(all_rows), batch_size), []

        with self.progress_bar(total=len(starts) * num_inference_steps) as progress_bar:

            def predict_batch(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return predict(self.denoiser, self.scheduler, noisy, t, conditions, self._guidance_scale, [guide])

            callback = callback_on_step_end, callback_on_step_end_tensor_inputs
            on_step_end = partial(self._end_step, *callback, progress_bar)
            for start in starts:
                rows = all_rows[start : start + batch_size]
                batch_noise = noise.batch(start, start + len(rows))
                uniform = batch_noise.uniform(2).cpu()  # (batch, 2): for labels and library sizes
                values, totals = (
                    dataset.cells(rows)[0].to(codec.device),
                    None if sizes is None else sizes[rows].to(codec.device),
                )

                # 2. The likelihood of the measured genes, and labels from their posterior
                observe = partial(ObservedGenes, codec, values, gene_mask, totals, log_factors=log_factors)
                observe = partial(observe, gaussian_mixture=self.gaussian_mixture)
                labels = self._draw_labels(observe, known_labels[rows], uniform[:, 0])
                guide = observe(class_labels=labels)
                condition_sizes, keys = self.denoiser.config.condition_sizes, self.processor.label_keys
                conditions = Conditions.from_class_labels(labels, condition_sizes, device, keys)

                # 3. Denoise
                self.scheduler.set_timesteps(num_inference_steps, device=device)
                timesteps = self.scheduler.timesteps
                self._num_timesteps, progress_bar.total = len(timesteps), len(starts) * len(timesteps)
                initial = batch_noise.normal(codec.num_features, device) * self.scheduler.init_noise_sigma
                denoised = denoise(predict_batch, self.scheduler, batch_noise, initial, timesteps, on_step_end)

                # 4. Decode
                measured = None if match_detection else (values.cpu(), gene_mask.cpu())
                drawn = labels, totals, batch_noise, uniform[:, 1], measured
                outputs.append(self._decode(output_type, denoised, *drawn))

        obs = self._origins(cells, all_rows) | {"sample": np.tile(np.arange(num_samples), cells.n_obs)}
        return self._finish(outputs, output_type, return_dict, provenance, {}, obs)

    def _draw_labels(
        self, observe: Callable[..., ObservedGenes], known: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Draws the labels `(cells, num_label_keys)` that are -1 from their posterior, at `uniform` `(cells,)`."""
        labels, mixture = known.clone(), self.gaussian_mixture
        if not (known < 0).any():
            return labels
        observed = observe(class_labels=known)
        for pattern in known[(known < 0).any(1)].unique(dim=0):
            rows = (known == pattern).all(1)
            of_pattern = torch.where(pattern < 0, mixture.null_label.cpu(), pattern)
            chosen, log_weights = mixture.given(observed.precision[rows], observed.shift[rows], of_pattern)[1:]
            cumulative = log_weights.exp().cumsum(1).cpu()
            drawn = torch.searchsorted(cumulative, uniform[rows, None].to(cumulative), right=True)[:, 0]
            labels[rows] = chosen[drawn.clamp(max=len(chosen) - 1)].cpu()
        return labels

    def _detection(
        self, dataset: CellDataset, gene_mask: torch.Tensor, labels: torch.Tensor, estimate: bool
    ) -> torch.Tensor | None:
        """Log factors `(genes,)` of the measured genes, from 512 cells, or `None` and a warning if they are large."""
        codec = self.codec
        if not dataset.is_counts:
            return None
        rows = np.random.default_rng(0).permutation(len(dataset))[:CELLS_TO_COMPARE]
        values, labels = dataset.cells(rows)[0].to(codec.device), labels[rows]
        counts, log_factors = values.sum(0), torch.zeros(len(gene_mask), device=codec.device)
        for _ in range(NUM_ROUNDS if estimate else 1):
            mixture = self.gaussian_mixture
            guide = ObservedGenes(
                codec, values, gene_mask, gaussian_mixture=mixture, class_labels=labels, log_factors=log_factors
            )
            expected = codec.decode(guide.latents, None, labels).mean().sum(0)
            log_factors = ((counts + PSEUDO_COUNTS) / (expected + PSEUDO_COUNTS)).log().where(gene_mask, 0.0)
        mismatch = log_factors[gene_mask].abs().median().item()
        if not estimate and mismatch > MAX_MISMATCH:
            logger.warning(
                f"The measured genes have other counts than the model expects, by a factor of {math.exp(mismatch):.1f}"
                " in the median gene: give `match_detection=True` for a panel of another technology."
            )
        return log_factors if estimate else None
