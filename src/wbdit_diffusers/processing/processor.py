"""`ScRNAProcessor`: from an AnnData to matrices and class labels, and back."""

from collections.abc import Iterable
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

from ..data import cells as data_cells
from ..data.cells import CellSource, as_source, choose_groups, iter_groups, place_genes
from ..files import one_line
from . import labels, library_size
from .genes import align_genes, check_names, choose_genes
from .normalize import check_values_name, to_expression
from .recover import LogScale, find_log_scale, recover_counts


logger = logging.get_logger(__name__)

STATISTICS = ("library_size_quantiles", "label_combinations", "label_frequencies")


class ScRNAProcessor(ConfigMixin):
    r"""
    Holds what the networks do not: the modelled genes in order, the names of labels, and the library sizes of cells by
    label. It is fitted on training cells only, and saved next to the weights.

    Args:
        values (`str`, defaults to `"counts"`):
            Kind of values: `"counts"` (non-negative integers) or `"log"`. Generated cells are on the same scale.
        recover_counts (`bool`, defaults to `True`):
            Whether to recover the counts behind log values. Counts that are found are modelled; otherwise there are no
            library sizes.
        layer (`str`, *optional*): Layer that holds the matrix. Default: `X`.
        label_keys (`list[str]`, defaults to `()`): Columns of `obs` that condition the cells, the cell type first.
        num_genes (`int`, *optional*, defaults to 2000): Number of highly variable genes to model; `None` for all.
        min_cells (`int`, defaults to 3): Minimum number of training cells that express a modelled gene.
        var_names (`list[str]`, *optional*): Modelled genes in order; set by [`~ScRNAProcessor.fit`].
        categories (`list[list[str]]`, *optional*): Labels of each label key; set by [`~ScRNAProcessor.fit`].
        log_scale (`dict`, *optional*):
            Fields of the [`LogScale`] that turns recovered counts into log values; set by [`~ScRNAProcessor.fit`].
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
        check_values_name(values)
        if isinstance(label_keys, str):
            raise ValueError(f"`label_keys` is a list of obs keys: write [{label_keys!r}].")
        # Quantiles of the log library size for each combination of labels: (num_combinations, 101)
        self.library_size_quantiles: torch.Tensor | None = None
        self.label_combinations: torch.Tensor | None = None  # (num_combinations, num_label_keys)
        self.label_frequencies: torch.Tensor | None = None  # (num_combinations,)

    @property
    def var_names(self) -> pd.Index:
        """Modelled genes, in the order of the codec's columns."""
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
    def is_counts(self) -> bool:
        """Whether cells are counts, given or recovered, and so have a library size."""
        return self.config.values == "counts" or self.config.log_scale is not None

    def _check_fitted(self):
        if self.config.var_names is None:
            raise ValueError("This ScRNAProcessor is not fitted: call `processor.fit(adata)` with the training cells.")

    def fit(self, cells: ad.AnnData | CellSource) -> "ScRNAProcessor":
        """
        Chooses the genes, and stores the labels and library sizes of the training cells. Cells are read once, in
        groups; at most about 100,000 of them are kept in memory to choose the genes.

        Args:
            cells (`AnnData` or [`CellSource`]): Training cells; an AnnData may be CSR, CSC, dense or backed.

        Raises:
            ValueError: If a value can't be modelled, a cell is empty, or a label or the name of a gene is missing.
        """
        source, config = as_source(cells, self.config.layer), self.config
        check_names(source)
        num_cells, num_genes = len(source.obs), len(source.var_names)
        categories = [labels.read_labels(source.obs, key)[0] for key in self.label_keys]
        is_choice = config.num_genes is not None and config.num_genes < num_genes
        sample = choose_groups(source.group_sizes, data_cells.MAX_CELLS_IN_MEMORY, seed=0) if is_choice else []
        totals, cells_per_gene, expression = [], np.zeros(num_genes, dtype=np.int64), []
        for group, (start, matrix, recorded) in enumerate(iter_groups(source, config.values == "counts")):
            if group == 0 and config.values == "log" and config.recover_counts:
                self._find_log_scale(matrix)
            counts, group_totals = self._to_counts(matrix, recorded, source.obs.index[start:])
            totals.append(group_totals)
            cells_per_gene += counts.getnnz(axis=0)
            if group in sample:
                expression.append(to_expression(matrix, group_totals, config.values))
        genes = choose_genes(expression, config.num_genes, min(config.min_cells, num_cells), cells_per_gene)
        self.register_to_config(var_names=source.var_names[genes].tolist(), categories=categories)

        codes = self.encode_labels(source).numpy()
        combinations, inverse, numbers = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        self.label_combinations = torch.from_numpy(combinations)
        self.label_frequencies = torch.from_numpy(numbers / numbers.sum()).float()
        quantiles = np.zeros((len(combinations), len(library_size.QUANTILES)))
        if self.is_counts:
            quantiles = library_size.log_quantiles(np.concatenate(totals), inverse.ravel())
        self.library_size_quantiles = torch.from_numpy(quantiles).float()
        return self

    def select(
        self, cells: ad.AnnData | CellSource, groups: Iterable[int] | None = None
    ) -> tuple[sparse.csr_matrix, np.ndarray]:
        """
        Selects the modelled genes of cells by name. Raises a `ValueError` as [`~ScRNAProcessor.fit`] does.

        Args:
            cells (`AnnData` or [`CellSource`]): Cells; their genes may be more, fewer, and in another order.
            groups (`Iterable[int]`, *optional*): Groups of the source to read. Default: all.

        Returns:
            `tuple`: counts, or log values if none were recovered, as CSR of shape `(cells, modelled genes)`; and
            library sizes `(cells,)` over all genes of `cells`. Missing genes are zero, with a warning.
        """
        source = as_source(cells, self.config.layer)
        check_names(source)
        places = align_genes(source.var_names, self.var_names)  # (genes of the cells,)
        matrices, totals = [], []
        for start, matrix, recorded in iter_groups(source, self.config.values == "counts", groups):
            counts, group_totals = self._to_counts(matrix, recorded, source.obs.index[start:])
            matrices.append(place_genes(counts, places, len(self.var_names)))
            totals.append(group_totals)
        selected = sparse.vstack(matrices, format="csr")
        # Squares and sums of integers would overflow, and the networks need float32.
        return selected.astype(np.float32) if selected.dtype.kind in "iu" else selected, np.concatenate(totals)

    def encode_labels(self, cells: ad.AnnData | CellSource) -> torch.Tensor:
        """
        Codes of the cells' labels, `torch.LongTensor` of shape `(cells, num_label_keys)`. Raises a `ValueError` if a
        label is missing, or no training cell has it.
        """
        codes = np.zeros((len(cells.obs), len(self.label_keys)), dtype=np.int64)
        for column, (key, categories) in enumerate(zip(self.label_keys, self.config.categories)):
            names, of_cell = labels.read_labels(cells.obs, key)
            codes[:, column] = labels.encode(names, key, categories)[of_cell]
        return torch.from_numpy(codes)

    def knows_labels(self, cells: ad.AnnData | CellSource) -> np.ndarray:
        """Mask `(cells,)` of the cells whose labels all occur in the training cells."""
        known = np.ones(len(cells.obs), dtype=bool)
        for key, categories in zip(self.label_keys, self.config.categories):
            names, of_cell = labels.read_labels(cells.obs, key)
            known &= np.isin(names, categories)[of_cell]
        return known

    def _to_counts(
        self, matrix: sparse.csr_matrix, recorded: np.ndarray | None, obs_names: pd.Index
    ) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Counts where they are known, otherwise log values, and the totals of the cells."""
        if self.config.log_scale is None:
            return matrix, np.asarray(matrix.sum(axis=1)).ravel() if recorded is None else recorded
        scale = LogScale(**self.config.log_scale)
        counts, totals, found = recover_counts(matrix, scale)
        if not found.all():
            which = f"{(~found).sum()} cells (the first is {obs_names[np.argmin(found)]!r})"
            fix = "remove these cells, or normalise all cells in the same way"
            raise ValueError(f"The values of {which} are not {scale.describe()}, as those of other cells are: {fix}.")
        return counts, totals

    def _find_log_scale(self, matrix: sparse.csr_matrix):
        """Finds the scale of log values from the first group of cells."""
        scale = find_log_scale(matrix)
        self.register_to_config(log_scale=asdict(scale) if scale else None)
        message = "No counts could be recovered from the log values: the values themselves are modelled."
        if scale:
            message = f"The values are {scale.describe()}: the counts were recovered and are modelled. Generated cells"
            message += " have values on the same scale in `X`, and counts in `layers['counts']`."
        logger.warning(message)

    def encode_conditions(self, conditions: dict[str, str | list[str]], num_cells: int) -> torch.Tensor:
        """
        Encodes the labels that a caller asks for. Raises a `ValueError` if the model does not know a key or a label.

        Args:
            conditions (`dict`): One label for all cells, or one for each cell, by label key.
            num_cells (`int`): Number of cells.

        Returns:
            `torch.LongTensor` of shape `(num_cells, num_label_keys)`: codes, -1 where no label was asked for.
        """
        class_labels = torch.full((num_cells, len(self.label_keys)), -1, dtype=torch.long)
        for key, names in conditions.items():
            if key not in self.label_keys:
                known = f"the label keys {self.label_keys}" if self.label_keys else "no label keys"
                raise ValueError(f"{key!r} is not a condition of this model, which has {known}.")
            column = self.label_keys.index(key)
            class_labels[:, column] = torch.from_numpy(labels.encode(names, key, self.config.categories[column]))
        return class_labels

    def complete_labels(self, class_labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Draws the labels that are -1; see [`labels.complete`]."""
        return labels.complete(class_labels, uniform, self.label_combinations, self.label_frequencies)

    def sample_library_size(self, class_labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Draws library sizes from training cells with the same labels; see [`library_size.draw`]."""
        return library_size.draw(
            class_labels, uniform, self.label_combinations, self.label_frequencies, self.library_size_quantiles
        )

    def to_anndata(
        self,
        matrix: sparse.csr_matrix,
        class_labels: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
        first_cell: int = 0,
    ) -> ad.AnnData:
        """
        Puts names to a matrix of modelled genes.

        Args:
            matrix (`scipy.sparse.csr_matrix` of shape `(cells, genes)`):
                Counts, or log values if no counts were recovered. Recovered counts become log values in `X`, and stay
                in `layers["counts"]`.
            class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`, *optional*): Codes of the labels.
            library_size (`torch.Tensor` of shape `(cells,)`, *optional*): Total counts over all genes.
            first_cell (`int`, defaults to 0): Number of the first cell: cells are named `cell_0`, `cell_1`, ….

        Returns:
            `AnnData`: with a column of `obs` for each label key, and `obs["library_size"]` if it is given.
        """
        layers = {}
        if self.config.log_scale is not None and library_size is not None:
            layers["counts"] = matrix
            matrix = LogScale(**self.config.log_scale).apply(matrix, library_size.cpu().numpy())
        cells = ad.AnnData(
            matrix,
            layers=layers,
            obs=pd.DataFrame(index=[f"cell_{first_cell + i}" for i in range(matrix.shape[0])]),
            var=pd.DataFrame(index=self.var_names.rename(None)),
        )
        if class_labels is not None:
            for key, names, codes in zip(self.label_keys, self.config.categories, class_labels.cpu().unbind(1)):
                cells.obs[key] = pd.Categorical.from_codes(codes.numpy(), categories=names)
        if library_size is not None:
            cells.obs["library_size"] = library_size.cpu().numpy()
        return cells

    def statistics(self) -> dict[str, torch.Tensor]:
        """The fitted tables, as they are saved: library-size quantiles, combinations of labels and their fractions."""
        self._check_fitted()
        return {name: getattr(self, name).contiguous() for name in STATISTICS}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """Writes `config.json` and the tables, under the only names that Diffusers downloads from the Hub."""
        self._check_fitted()
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        save_file(self.statistics(), Path(save_directory) / SAFETENSORS_WEIGHTS_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs
    ) -> "ScRNAProcessor":
        """
        Loads a processor from a folder, or from a pipeline on the Hub with `subfolder="processor"`. Raises an
        `OSError` if the files are missing or damaged.
        """
        kwargs.pop("variant", None)  # the tables have one form
        name_or_path = pretrained_model_name_or_path
        processor = cls.from_config(cls.load_config(name_or_path, subfolder=subfolder, **kwargs))
        path = str(Path(name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME))
        if not Path(name_or_path).is_dir():
            path = hf_hub_download(str(name_or_path), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **kwargs)
        try:
            arrays = load_file(path)
            for name in STATISTICS:
                setattr(processor, name, arrays[name])
                if not arrays[name].isfinite().all():
                    raise ValueError(f"{name} holds NaN")
        except (FileNotFoundError, SafetensorError, KeyError, ValueError) as error:
            raise OSError(
                f"{path} is missing, truncated or not a ScRNAProcessor's ({one_line(error)}): download it again."
            ) from error
        return processor
