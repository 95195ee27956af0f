"""A training that starts from another pipeline, whose genes and labels are matched by name."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from accelerate.logging import get_logger
from diffusers import ModelMixin

from ..data.latents import CellDataset
from ..models.codec_programs import ProgramCodec
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from ..processing.processor import ScRNAProcessor
from .config import CodecConfig


logger = get_logger(__name__)

# Mean and precision of a Gaussian prior on parameters, by name
Prior = dict[str, tuple[torch.Tensor | float, torch.Tensor | float]]

GENE_PRECISION = 1.0  # of a gene's baseline and noise: another technology sees it more or less often


@dataclass
class Start:
    """The old pipeline, and the places of the new genes and labels there, -1 for new ones."""

    pipe: ScRNAGenerationPipeline
    genes: np.ndarray  # (genes,)
    labels: dict[str, np.ndarray]  # by label key, (labels,)
    is_missing: np.ndarray  # (old genes,), whether the new cells lack a gene

    @classmethod
    def load(cls, config: CodecConfig, processor: ScRNAProcessor, var_names: pd.Index) -> "Start":
        """Loads the pipeline. Its genes are matched by name, its labels by name or by `config.init_labels`."""
        pipe = ScRNAGenerationPipeline.from_pretrained(str(config.init_from))
        flag = f"--init_from {config.init_from}"
        old, renamed = pipe.processor, dict(config.init_labels)
        is_program = config.codec == "program" and isinstance(pipe.codec, ProgramCodec)
        if not (is_program and old.is_counts and processor.is_counts):
            raise ValueError(f"{flag}: both pipelines need gene programs (--codec program) and counts.")
        genes, labels = old.var_names.get_indexer(processor.var_names), {}
        if not (genes >= 0).any():
            raise ValueError(f"{flag}: no gene has a name of that pipeline ({', '.join(old.var_names[:3])}, …).")
        logger.info(f"{flag} knows {(genes >= 0).sum():,} of {len(genes):,} genes.")
        known = dict(zip(old.label_keys, old.config.categories))
        for key, names in zip(processor.label_keys, processor.config.categories):
            labels[key] = pd.Index(known.get(key, [])).get_indexer([renamed.pop(name, name) for name in names])
            new = ", ".join(name for name, place in zip(names, labels[key]) if place < 0)
            logger.info(f"{flag}: {f'new labels of {key} are {new}' if new else f'all labels of {key} are known'}.")
        if renamed:
            raise ValueError(f"--init_labels {next(iter(renamed))}: no training cell has this label.")
        return cls(pipe, genes, labels, ~old.var_names.isin(var_names))

    @torch.no_grad()
    def start_codec(self, config: CodecConfig, cells: CellDataset) -> tuple[ProgramCodec, Prior]:
        """A codec of the new genes that starts at the old one, and the prior that keeps it near."""
        old, size, shared = self.pipe.codec, len(self.genes), np.flatnonzero(self.genes >= 0)
        new_bins, old_bins = np.append(shared, size), np.append(self.genes[shared], old.config.num_genes)
        read = np.arange(old.config.num_genes) if old.config.num_encoder_genes is None else old.encoder_genes.numpy()
        places = np.full(old.config.num_genes, -1)
        places[self.genes[shared]] = shared
        places = places[read]  # of the encoder's genes among the new ones
        sizes = {"num_genes": size, "num_encoder_genes": int((places >= 0).sum())}
        codec = ProgramCodec(**old.config | sizes | {"condition_sizes": cells.condition_sizes})
        codec.fit_statistics(cells.matrix, cells.library_size)
        codec.encoder_genes.copy_(torch.from_numpy(places[places >= 0]))
        before, prior = old.state_dict(), {}
        for name, values in codec.state_dict().items():
            if name.startswith(("to_", "latents_", "program_axes")):
                values.copy_(before[name])
        weight, linear = old.encoder[0].weight, codec.encoder[0]
        linear.weight.copy_(weight[:, np.append(places >= 0, True)])
        # Genes that the new file lacks have their average in the old cells, not zero.
        average = old.decode(torch.zeros(1, old.num_features)).expression()[0, read]
        linear.bias.copy_(old.encoder[0].bias + weight[:, :-1] @ (average * torch.from_numpy(self.is_missing[read])))
        for name, values in codec.named_parameters():
            if name.startswith(("heads.", "gene_parameters.")):
                mean, precision = values.clone(), torch.zeros_like(values)
                mean[new_bins] = before[name][old_bins]
                if name == "heads.log_rates.bias":  # of the genes that both know
                    mean[new_bins] += values[new_bins].logsumexp(0) - mean[new_bins].logsumexp(0)
                precision[new_bins] = GENE_PRECISION
                prior[name] = mean, config.program_prior_precision if values.ndim == 2 else precision
            elif name.startswith("label_effects."):
                mean, first = torch.zeros_like(values), 0
                for key, known in self.labels.items():
                    if old.label_effects and (known >= 0).any():
                        start = sum(old.config.condition_sizes[: self.pipe.processor.label_keys.index(key)])
                        new_rows = first + np.flatnonzero(known >= 0)
                        mean[new_rows[:, None], new_bins] = before[name][start + known[known >= 0]][:, old_bins]
                    first += len(known)
                prior[name] = mean, config.label_prior_precision
        for name, (mean, _) in prior.items():
            if name != "heads.log_rates.bias":  # the new cells know it best
                codec.get_parameter(name).copy_(mean)
        return codec, prior

    @torch.no_grad()
    def start_denoiser(self, denoiser: ModelMixin):
        """Copies weights that have the same shape, and the embeddings of labels that both know."""
        before, after = self.pipe.denoiser.state_dict(), denoiser.state_dict()
        for name, values in after.items():
            if not name.startswith("condition_embedders") and name in before and before[name].shape == values.shape:
                values.copy_(before[name])
        for position, (key, known) in enumerate(self.labels.items()):
            new = after.get(f"condition_embedders.{position}.weight")
            if new is not None and (known >= 0).any():
                old = before[f"condition_embedders.{self.pipe.processor.label_keys.index(key)}.weight"]
                if old.shape[1] == new.shape[1]:
                    new[np.flatnonzero(known >= 0)], new[-1] = old[known[known >= 0]], old[-1]  # and the null label
