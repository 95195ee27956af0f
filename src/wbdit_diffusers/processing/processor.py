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
from ..data.cells import AnnDataSource, CellSource, choose_groups, iter_groups, place_genes
from ..files import one_line
from ..pretrained import locate
from . import labels
from .genes import align_genes, check_names, choose_genes
from .normalize import VALUES, to_expression
from .recover import LogScale, find_log_scale, recover_counts


logger = logging.get_logger(__name__)

QUANTILES = np.linspace(0, 1, 101)  # of the log library size
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
        layer (`str`, *optional*): Layer that holds the matrix; `"raw"` also for `adata.raw`. Default: `X`.
        round_counts (`bool`, defaults to `False`): Whether to round decimal counts to integers.
        label_keys (`list[str]`, defaults to `()`): Columns of `obs` that condition the cells, the cell type first.
        num_genes (`int`, *optional*): Number of highly variable genes to model. Default: all genes.
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
        round_counts: bool = False,
        label_keys: tuple[str, ...] = (),
        num_genes: int | None = None,
        min_cells: int = 3,
        var_names: list[str] | None = None,
        categories: list[list[str]] | None = None,
        log_scale: dict | None = None,
    ):
        if values not in VALUES:
            raise ValueError(f"`values` is 'counts' or 'log', not {values!r}.")
        if round_counts and values != "counts":
            raise ValueError("`round_counts` is for counts: leave it out with values='log'.")
        if isinstance(label_keys, str):
            raise ValueError(f"`label_keys` is a list of obs keys: write [{label_keys!r}].")
        self.label_keys = list(label_keys)
        self.var_names = pd.Index(var_names or [])  # modelled genes, in the order of the codec's columns
        # Whether cells are counts, given or recovered, and so have a library size
        self.is_counts = values == "counts" or log_scale is not None
        # Of the combinations of labels that training cells have, and quantiles of their log library sizes
        self.label_combinations = torch.zeros(0, len(label_keys), dtype=torch.long)  # (combinations, num_label_keys)
        self.label_frequencies = torch.zeros(0)  # (combinations,)
        self.library_size_quantiles = torch.zeros(0, len(QUANTILES))  # (combinations, 101)

    @property
    def condition_sizes(self) -> tuple[int, ...]:
        """Number of categories of each label key: the denoiser's `condition_sizes`."""
        return tuple(len(names) for names in self.config.categories)

    def source(self, cells: ad.AnnData | CellSource) -> CellSource:
        """Cells as this processor reads them. A source stays as it is: it was opened with its layer."""
        if not isinstance(cells, ad.AnnData):
            return cells
        return AnnDataSource(cells, self.config.layer, round_counts=self.config.round_counts)

    def fit(self, cells: ad.AnnData | CellSource) -> "ScRNAProcessor":
        """
        Chooses the genes, and stores the labels and library sizes of the training cells. Cells are read once, in
        groups; at most about 100,000 of them are kept in memory to choose the genes. Raises a `ValueError` if a value
        can't be modelled, a cell is empty, or a label or the name of a gene is missing.
        """
        source, config = self.source(cells), self.config
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
        self.var_names = pd.Index(source.var_names[genes].tolist())
        self.register_to_config(var_names=self.var_names.tolist(), categories=categories)

        codes = self.encode_labels(source).numpy()
        combinations, inverse, numbers = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        self.label_combinations = torch.from_numpy(combinations)
        self.label_frequencies = torch.from_numpy(numbers / numbers.sum()).float()
        if self.is_counts:
            sizes, number = np.log(np.concatenate(totals)), inverse.ravel()
            quantiles = [np.quantile(sizes[number == i], QUANTILES) for i in range(len(combinations))]
            self.library_size_quantiles = torch.from_numpy(np.stack(quantiles)).float()
        return self

    def select(
        self, cells: ad.AnnData | CellSource, groups: Iterable[int] | None = None
    ) -> tuple[sparse.csr_matrix, np.ndarray]:
        """
        Selects the modelled genes of cells by name, in all groups of the source or some. Returns counts, or log values
        if none were recovered, as CSR `(cells, modelled genes)`, and library sizes `(cells,)` over all genes of
        `cells`. Missing genes are zero, with a warning. Raises a `ValueError` as [`~ScRNAProcessor.fit`] does.
        """
        source = self.source(cells)
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
        """Label codes `(cells, num_label_keys)`, int64. Raises a `ValueError` if a label is missing or unknown."""
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
        self.is_counts = scale is not None
        self.register_to_config(log_scale=asdict(scale) if scale else None)
        message = "No counts could be recovered from the log values: the values themselves are modelled."
        if scale:
            message = f"The values are {scale.describe()}: the counts were recovered and are modelled. Generated cells"
            message += " have values on the same scale in `X`, and counts in `layers['counts']`."
        logger.warning(message)

    def encode_conditions(self, conditions: dict[str, str | list[str]], num_cells: int) -> torch.Tensor:
        """
        Codes `(num_cells, num_label_keys)` of the labels that a caller asks for, one for all cells or one for each, by
        label key; -1 where no label is asked for. Raises a `ValueError` if the model does not know a key or a label.
        """
        num_rows = num_cells if any(map(np.ndim, conditions.values())) else 1
        class_labels = torch.full((num_rows, len(self.label_keys)), -1, dtype=torch.long)
        for key, names in conditions.items():
            if key not in self.label_keys:
                known = f"the label keys {self.label_keys}" if self.label_keys else "no label keys"
                raise ValueError(f"{key!r} is not a condition of this model, which has {known}.")
            column = self.label_keys.index(key)
            class_labels[:, column] = torch.from_numpy(labels.encode(names, key, self.config.categories[column]))
        return class_labels.expand(num_cells, -1)

    def is_measured(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Whether a training cell has the labels `(cells, num_label_keys)`, where -1 allows any: `(cells,)`."""
        rows = class_labels[:, None]  # (cells, 1, num_label_keys)
        return ((rows == self.label_combinations) | (rows < 0)).all(dim=2).any(dim=1)

    def complete_labels(self, class_labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """
        Draws the labels that are -1, because they were not asked for, at the frequencies of training cells that have
        the given labels. `uniform` `(cells,)` are random numbers in [0, 1). Returns labels `(cells, num_label_keys)`.
        """
        completed = class_labels.clone()
        for pattern in class_labels.unique(dim=0) if self.label_keys else []:
            cells = (class_labels == pattern).all(dim=1)
            free = pattern < 0
            agree = (self.label_combinations[:, ~free] == pattern[~free]).all(dim=1)
            # If no training cell has the given labels together, all training cells count.
            weights = self.label_frequencies.double() * (agree if agree.any() else torch.ones_like(agree))
            cumulative = weights.cumsum(0) / weights.sum()
            drawn = torch.searchsorted(cumulative, uniform[cells].double(), right=True).clamp(max=len(weights) - 1)
            completed[cells] = torch.where(free, self.label_combinations[drawn], pattern)
        return completed

    def sample_library_size(self, class_labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Draws total counts `(cells,)` of training cells with the same labels, at `uniform` `(cells,)` in [0, 1)."""
        same = (class_labels[:, None].cpu() == self.label_combinations).all(dim=2).float()  # (cells, combinations)
        # A combination without training cells gets the average over all of them.
        weights = torch.where(same.any(dim=1, keepdim=True), same, self.label_frequencies)
        quantiles = weights @ self.library_size_quantiles / weights.sum(dim=1, keepdim=True)  # (cells, 101)
        position = uniform.cpu()[:, None] * (len(QUANTILES) - 1)
        low = position.floor().long().clamp(max=len(QUANTILES) - 2)
        return torch.lerp(quantiles.gather(1, low), quantiles.gather(1, low + 1), position - low).squeeze(1).exp()

    def to_anndata(
        self,
        matrix: sparse.csr_matrix,
        class_labels: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
        obs_names: Iterable[str] | None = None,
    ) -> ad.AnnData:
        """
        Puts names to counts or log values of the modelled genes, `(cells, genes)`. `obs["generated"]` is true.
        Recovered counts become log values in `X`, and stay in `layers["counts"]`.
        """
        layers, index = {}, pd.RangeIndex(matrix.shape[0]) if obs_names is None else pd.Index(obs_names)
        if self.config.log_scale is not None and library_size is not None:
            layers["counts"] = matrix
            matrix = LogScale(**self.config.log_scale).apply(matrix, library_size.cpu().numpy())
        cells = ad.AnnData(
            matrix,
            layers=layers,
            obs=pd.DataFrame(index=index.astype(str)),
            var=pd.DataFrame(index=self.var_names.rename(None)),
        )
        if class_labels is not None:
            for key, names, codes in zip(self.label_keys, self.config.categories, class_labels.cpu().unbind(1)):
                cells.obs[key] = pd.Categorical.from_codes(codes.numpy(), categories=names)
        if library_size is not None:
            cells.obs["library_size"] = library_size.cpu().numpy()
        cells.obs["generated"] = True
        return cells

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """Writes `config.json` and the tables, under the only names that Diffusers downloads from the Hub."""
        if self.config.var_names is None:
            raise ValueError("This ScRNAProcessor is not fitted: call `processor.fit(adata)` with the training cells.")
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        tables = {name: getattr(self, name).contiguous() for name in STATISTICS}
        save_file(tables, Path(save_directory) / SAFETENSORS_WEIGHTS_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs
    ) -> "ScRNAProcessor":
        """Loads a folder, or with `subfolder="processor"` a Hub pipeline. Raises an `OSError` if files are damaged."""
        kwargs.pop("variant", None)  # the tables have one form
        name_or_path = locate(pretrained_model_name_or_path)
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
