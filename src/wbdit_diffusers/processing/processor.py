"""`ScRNAProcessor`: AnnData in, matrices and labels for the codec and the denoiser; their cells out as an AnnData."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, logging
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import sparse

from ..data.source import CellSource, as_source, iter_groups, place_genes
from . import labels, library_size
from .checks import check_config, check_statistics
from .genes import align_genes, check_names, choose_genes
from .recover import MAX_LOG_VALUE, LogScale, find_log_scale, recover_counts


logger = logging.get_logger(__name__)

STATISTICS = ("library_size_quantiles", "label_combinations", "label_frequencies")


class ScRNAProcessor(ConfigMixin):
    r"""
    Knows what the networks do not: which genes are modelled and in which order, the names of labels, and the library
    sizes of cells by label. Fitted on training cells only, and saved beside the weights.

    Args:
        values (`str`, defaults to `"counts"`):
            What the matrix holds: `"counts"` (non-negative integers), or `"log"` (values that are on a log scale
            already; what comes out is on the same scale).
        recover_counts (`bool`, defaults to `True`):
            Whether to look for the counts behind log values. If they are found, they are modelled; if not, there are
            no library sizes.
        layer (`str`, *optional*): The layer that holds the matrix; `X` when not given.
        label_keys (`list[str]`, defaults to `()`):
            Columns of `obs` that condition the cells, the cell type first.
        num_genes (`int`, *optional*, defaults to 2000): Number of highly variable genes to model; `None` for all.
        min_cells (`int`, defaults to 3): Training cells that must express a gene for it to be modelled.
        var_names (`list[str]`, *optional*): The modelled genes in order; set by [`~ScRNAProcessor.fit`].
        categories (`list[list[str]]`, *optional*): The labels of each label key; set by [`~ScRNAProcessor.fit`].
        log_scale (`dict`, *optional*):
            How log values follow from the counts that were recovered, see [`LogScale`]; set by
            [`~ScRNAProcessor.fit`].
    """

    config_name = CONFIG_NAME

    @register_to_config
    def __init__(
        self,
        values: str = "counts",
        recover_counts: bool = True,
        layer: str | None = None,
        label_keys: tuple[str, ...] = (),
        num_genes: int | None = 2000,
        min_cells: int = 3,
        var_names: list[str] | None = None,
        categories: list[list[str]] | None = None,
        log_scale: dict | None = None,
    ):
        check_config(values, label_keys, num_genes, min_cells, var_names, categories, log_scale)
        # Of the log library size, for each combination of labels: (num_combinations, 101)
        self.library_size_quantiles: torch.Tensor | None = None
        self.label_combinations: torch.Tensor | None = None  # (num_combinations, num_label_keys)
        self.label_frequencies: torch.Tensor | None = None  # (num_combinations,)

    # ==================== What was fitted ====================

    @property
    def var_names(self) -> pd.Index:
        """The modelled genes, in the order of the codec's columns."""
        self._check_fitted()
        return pd.Index(self.config.var_names)

    @property
    def label_keys(self) -> list[str]:
        return list(self.config.label_keys)

    @property
    def condition_sizes(self) -> tuple[int, ...]:
        """Number of categories of each label key: the denoiser's `condition_sizes`."""
        self._check_fitted()
        return tuple(len(names) for names in self.config.categories)

    @property
    def has_library_size(self) -> bool:
        """Whether cells are counts, given or recovered, and so have a library size."""
        return self.config.values == "counts" or self.config.log_scale is not None

    def _check_fitted(self):
        if self.config.var_names is None:
            raise ValueError("This ScRNAProcessor is not fitted: call `processor.fit(adata)` with the training cells.")

    # ==================== AnnData in ====================

    def fit(self, cells: ad.AnnData | CellSource) -> "ScRNAProcessor":
        """
        Chooses genes, and notes labels and library sizes of the training cells. They are read in two passes, group by
        group: of their values no more than one group is in memory.

        Args:
            cells (`AnnData` or [`CellSource`]): Training cells; an AnnData may be CSR, CSC, dense or backed.

        Returns:
            [`ScRNAProcessor`]: itself.

        Raises:
            ValueError: If the cells can't be modelled: none, empty ones, NaN, negative, not integer though declared as
                counts, too large for logarithms, or without one of the `label_keys`.
        """
        source = as_source(cells, self.config.layer)
        check_names(source)
        columns = [labels.read_labels(source.obs, key) for key in self.label_keys]
        categories = [names for names, _ in columns]
        num_cells = int(source.group_sizes.sum())
        codes = np.stack([code for _, code in columns], axis=1) if columns else np.zeros((num_cells, 0), dtype=int)

        if self.config.values == "log" and self.config.recover_counts:
            self._find_log_scale(source)
        counts_per_cell, cells_per_gene = [], np.zeros(len(source.var_names), dtype=np.int64)
        for matrix, library_size_of_cells in self._iter_matrix(source):
            counts_per_cell.append(library_size_of_cells)
            cells_per_gene += matrix.getnnz(axis=0)
        totals = np.concatenate(counts_per_cell)
        config = self.config
        genes = choose_genes(source, config.num_genes, config.min_cells, cells_per_gene, totals, config.values)
        self.register_to_config(var_names=source.var_names[genes].tolist(), categories=categories)

        combinations, inverse, numbers = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        self.label_combinations = torch.from_numpy(combinations.astype(np.int64))
        self.label_frequencies = torch.from_numpy(numbers / numbers.sum()).float()
        quantiles = np.zeros((len(combinations), len(library_size.QUANTILES)))
        if self.has_library_size:
            quantiles = library_size.log_quantiles(totals, inverse.ravel())
        self.library_size_quantiles = torch.from_numpy(quantiles).float()
        return self

    def select(
        self, cells: ad.AnnData | CellSource, groups: Iterable[int] | None = None
    ) -> tuple[sparse.csr_matrix, np.ndarray]:
        """
        The modelled genes of new cells, aligned by name.

        Args:
            cells (`AnnData` or [`CellSource`]): Cells; their genes may be more, fewer, and in another order.
            groups (`Iterable[int]`, *optional*): Which groups of the source; all by default.

        Returns:
            `tuple`: the matrix (cells × modelled genes, CSR, counts, or log values if none were recovered) and the
            library sizes `(cells,)`, over every gene of `cells`. Genes that they lack are zero, with a warning.

        Raises:
            ValueError: If no gene is in common, or a value is not what `values` says.
        """
        source = as_source(cells, self.config.layer)
        check_names(source)
        places = align_genes(source.var_names, self.var_names)  # (genes of the cells,)
        matrices, totals = [], []
        for matrix, library_size_of_cells in self._iter_matrix(source, groups):
            matrices.append(place_genes(matrix, places, len(self.var_names)))
            totals.append(library_size_of_cells)
        selected = sparse.vstack(matrices, format="csr")
        # Squares and sums of integers would overflow; the networks see float32 anyway.
        return selected.astype(np.float32) if selected.dtype.kind in "iub" else selected, np.concatenate(totals)

    def encode_labels(self, cells: ad.AnnData | CellSource) -> torch.Tensor:
        """
        Codes of the cells' labels, `torch.LongTensor` of shape `(cells, num_label_keys)`.

        Raises:
            ValueError: If a label key is missing, or a label was not among the training cells.
        """
        codes = []
        for key, categories in zip(self.label_keys, self.config.categories):
            names, of_cell = labels.read_labels(cells.obs, key)
            codes.append(labels.encode(names, key, categories)[of_cell])
        return torch.from_numpy(np.stack(codes, axis=1) if codes else np.zeros((len(cells.obs), 0), dtype=np.int64))

    def knows_labels(self, cells: ad.AnnData | CellSource) -> np.ndarray:
        """Which cells have only labels that training cells had, so that cells like them can be asked for: a mask."""
        known = np.ones(len(cells.obs), dtype=bool)
        for key, categories in zip(self.label_keys, self.config.categories):
            names, of_cell = labels.read_labels(cells.obs, key)
            known &= np.isin(names, categories)[of_cell]
        return known

    def _iter_matrix(
        self, source: CellSource, groups: Iterable[int] | None = None
    ) -> Iterator[tuple[sparse.csr_matrix, np.ndarray]]:
        """Groups of cells with all genes, as counts where they are known, and their library sizes."""
        obs_names = source.obs.index
        for start, matrix, recorded in iter_groups(source, self.config.values == "counts", groups):
            if self.config.values == "log" and matrix.nnz and matrix.data.max() > MAX_LOG_VALUE:
                cell = obs_names[start + np.flatnonzero(matrix.max(axis=1).toarray().ravel() > MAX_LOG_VALUE)[0]]
                raise ValueError(
                    f"Cell {cell!r} has a value of {matrix.data.max():g}, which is no logarithm of expression: pass"
                    " values='counts' for counts, or take log1p of the values."
                )
            if self.config.log_scale is None:
                yield matrix, np.asarray(matrix.sum(axis=1)).ravel() if recorded is None else recorded
                continue
            scale = LogScale(**self.config.log_scale)
            counts, totals, found = recover_counts(matrix, scale)
            if not found.all():
                cell = obs_names[start + np.flatnonzero(~found)[0]]
                raise ValueError(
                    f"The values of {(~found).sum()} cells (the first is {cell!r}) are no {scale.describe()}, as those"
                    " of the training cells are: remove these cells, or normalise them in the same way."
                )
            yield counts, totals

    def _find_log_scale(self, source: CellSource):
        """From the first group of cells."""
        _, matrix, _ = next(iter_groups(source, integer=False))
        scale = find_log_scale(matrix)
        self.register_to_config(log_scale=None if scale is None else asdict(scale))
        if scale is None:
            logger.warning("No counts could be recovered from the log values: the values themselves are modelled.")
        else:
            logger.warning(
                f"The values are {scale.describe()}: the counts were recovered and are modelled. Generated cells have"
                " values on the same scale in `X`, and counts in `layers['counts']`."
            )

    # ==================== Conditions ====================

    def encode_conditions(self, conditions: dict[str, str | list[str]], num_cells: int) -> torch.Tensor:
        """
        The labels that were asked for.

        Args:
            conditions (`dict`): For some of the label keys, one label for all cells, or one for each cell.
            num_cells (`int`): Number of cells.

        Returns:
            `torch.LongTensor` of shape `(num_cells, num_label_keys)`: codes, -1 where no label was asked for.

        Raises:
            ValueError: If a label key or a label is not of this model.
        """
        class_labels = torch.full((num_cells, len(self.label_keys)), -1, dtype=torch.long)
        for key, names in conditions.items():
            if key not in self.label_keys:
                known = (
                    f"the label keys {self.label_keys}" if self.label_keys else "no label keys: it is unconditional"
                )
                raise ValueError(f"{key!r} is not a condition of this model, which has {known}.")
            column = self.label_keys.index(key)
            class_labels[:, column] = torch.from_numpy(labels.encode(names, key, self.config.categories[column]))
        return class_labels

    def complete_labels(self, class_labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Draws the labels that were not asked for; see [`labels.complete`]."""
        return labels.complete(class_labels, uniform, self.label_combinations, self.label_frequencies)

    def sample_library_size(self, class_labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Library sizes of training cells with the same labels; see [`library_size.draw`]."""
        return library_size.draw(
            class_labels, uniform, self.label_combinations, self.label_frequencies, self.library_size_quantiles
        )

    # ==================== AnnData out ====================

    def to_anndata(
        self,
        matrix: sparse.csr_matrix,
        class_labels: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
        first_cell: int = 0,
    ) -> ad.AnnData:
        """
        A matrix of modelled genes with its names.

        Args:
            matrix (`scipy.sparse.csr_matrix` of shape `(cells, genes)`):
                Counts, or log values if none were recovered. Recovered ones are given back as log values in `X`, with
                the counts in `layers["counts"]`.
            class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`, *optional*): Codes of the labels.
            library_size (`torch.Tensor` of shape `(cells,)`, *optional*): Total counts over all genes.
            first_cell (`int`, defaults to 0): The cells are named `cell_0`, `cell_1`, … from this number on.

        Returns:
            `AnnData`: with `var_names`, one column of `obs` for each label key (with all categories of the model), and
            `obs["library_size"]` where it is given.
        """
        counts = None
        if self.config.log_scale is not None and library_size is not None:
            counts, matrix = matrix, LogScale(**self.config.log_scale).apply(matrix, library_size.cpu().numpy())
        cells = ad.AnnData(
            matrix,
            layers=None if counts is None else {"counts": counts},
            obs=pd.DataFrame(index=[f"cell_{first_cell + i}" for i in range(matrix.shape[0])]),
            var=pd.DataFrame(index=self.var_names.rename(None)),
        )
        if class_labels is not None:
            for key, names, codes in zip(self.label_keys, self.config.categories, class_labels.cpu().unbind(1)):
                cells.obs[key] = pd.Categorical.from_codes(codes.numpy(), categories=names)
        if library_size is not None:
            cells.obs["library_size"] = library_size.cpu().numpy()
        return cells

    # ==================== Saving and loading ====================

    def statistics(self) -> dict[str, torch.Tensor]:
        """What was measured on the training cells, as it is saved: quantiles, combinations and shares of labels."""
        self._check_fitted()
        return {name: getattr(self, name).contiguous() for name in STATISTICS}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """
        Writes `config.json` and the arrays as safetensors.

        The file names are those of a Diffusers model, because `DiffusionPipeline.from_pretrained` downloads no other
        safetensors file from the Hub.
        """
        self._check_fitted()
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        save_file(self.statistics(), Path(save_directory) / SAFETENSORS_WEIGHTS_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs
    ) -> "ScRNAProcessor":
        """
        Loads a processor from a folder, or from a pipeline on the Hub with `subfolder="processor"`.

        Raises:
            OSError: If the files are missing or damaged.
        """
        kwargs.pop("variant", None)  # of the networks' weights: the tables have one form
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        processor = cls.from_config(config)
        if Path(pretrained_model_name_or_path).is_dir():
            path = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        else:
            path = hf_hub_download(
                str(pretrained_model_name_or_path), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **kwargs
            )
        try:
            arrays = load_file(path)
            check_statistics(arrays, processor.config.categories or [])
        except (FileNotFoundError, SafetensorError, KeyError, ValueError) as error:
            raise OSError(
                f"{path} is missing, truncated or not a ScRNAProcessor's ({error}): copy or download it again."
            ) from error
        for name in STATISTICS:
            setattr(processor, name, arrays[name])
        return processor
