"""`ScRNAProcessor`: AnnData in, tensors for the denoiser; tensors from the denoiser, AnnData out."""

import difflib
from collections.abc import Iterator
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


logger = logging.get_logger(__name__)

TARGET_SUM = 1e4  # log1p(CP10k), Scanpy's usual scale
CHUNK_SIZE = 4096  # cells read at once, so that a backed file is never whole in memory
STATISTICS = ("mean", "std", "library_size_quantiles", "label_combinations", "label_frequencies")


class ScRNAProcessor(ConfigMixin):
    r"""
    Knows everything about the data that the denoiser does not: genes and their order, normalisation, library sizes and
    label names. Fitted on training cells only, and saved beside the weights.

    `preprocess` turns counts into log1p(CP10k), takes the chosen genes, appends the log library size as one more value
    and standardises each value. `postprocess` undoes it: counts are `expm1(expression) * library_size / 10,000`,
    rounded.

    Args:
        values (`str`, defaults to `"counts"`):
            What the matrix holds: `"counts"` (non-negative integers), or `"log"` (values already on a log scale, taken
            as they are; then no library size is modelled, and what comes out is on the same log scale).
        layer (`str`, *optional*): The layer that holds the matrix; `X` when not given.
        label_keys (`list[str]`, defaults to `()`):
            Columns of `obs` that condition the cells, the cell type first.
        num_genes (`int`, *optional*, defaults to 2000):
            Number of highly variable genes to model; `None` for all.
        min_cells (`int`, defaults to 3): Training cells that must express a gene for it to be modelled.
        standardize (`bool`, defaults to `True`): Whether each value gets mean 0 and variance 1.
        model_library_size (`bool`, defaults to `True`):
            Whether the log library size is generated with the cell. If not, it is drawn from the training cells of the
            same labels.
        var_names (`list[str]`, *optional*): The chosen genes in order; set by [`~ScRNAProcessor.fit`].
        categories (`list[list[str]]`, *optional*): The names in each label key; set by [`~ScRNAProcessor.fit`].
    """

    config_name = CONFIG_NAME

    @register_to_config
    def __init__(
        self,
        values: str = "counts",
        layer: str | None = None,
        label_keys: tuple[str, ...] = (),
        num_genes: int | None = 2000,
        min_cells: int = 3,
        standardize: bool = True,
        model_library_size: bool = True,
        var_names: list[str] | None = None,
        categories: list[list[str]] | None = None,
    ):
        if values not in ("counts", "log"):
            raise ValueError(f"`values` is 'counts' or 'log', not {values!r}.")
        if isinstance(label_keys, str):
            raise ValueError(f"`label_keys` is a list of obs keys: write [{label_keys!r}].")
        self.mean: torch.Tensor | None = None  # (num_features,)
        self.std: torch.Tensor | None = None  # (num_features,)
        # Of log library size, per combination of labels: (num_combinations, 101)
        self.library_size_quantiles: torch.Tensor | None = None
        self.label_combinations: torch.Tensor | None = None  # (num_combinations, num_label_keys)
        self.label_frequencies: torch.Tensor | None = None  # (num_combinations,)

    # ==================== What was fitted ====================

    @property
    def var_names(self) -> pd.Index:
        self._check_fitted()
        return pd.Index(self.config.var_names)

    @property
    def num_features(self) -> int:
        """Values per cell that the denoiser sees."""
        return len(self.var_names) + self._has_library_size

    @property
    def condition_sizes(self) -> tuple[int, ...]:
        """Number of categories per label key: the denoiser's `condition_sizes`."""
        self._check_fitted()
        return tuple(len(names) for names in self.config.categories)

    @property
    def _has_library_size(self) -> bool:
        return self.config.values == "counts" and self.config.model_library_size

    def _check_fitted(self):
        if self.config.var_names is None:
            raise ValueError("This ScRNAProcessor is not fitted: call `processor.fit(adata)` with the training cells.")

    # ==================== AnnData in ====================

    def fit(self, adata: ad.AnnData) -> "ScRNAProcessor":
        """
        Chooses genes and measures everything else on the training cells.

        Args:
            adata (`AnnData`): Training cells; CSR, CSC, dense or backed.

        Returns:
            [`ScRNAProcessor`]: itself.

        Raises:
            ValueError: If the cells can't be modelled: none, empty ones, NaN, negative, not integer though declared as
                counts, or without one of the `label_keys`.
        """
        self._check_names(adata)
        categories, codes = self._fit_labels(adata)

        counts_per_cell, cells_per_gene = [], np.zeros(adata.n_vars, dtype=np.int64)
        for _, matrix in self._chunks(adata):
            counts_per_cell.append(np.asarray(matrix.sum(axis=1)).ravel())
            cells_per_gene += matrix.getnnz(axis=0)
        library_size = np.concatenate(counts_per_cell)
        genes = self._choose_genes(adata, cells_per_gene, library_size)
        self.register_to_config(var_names=adata.var_names[genes].tolist(), categories=categories)

        first = np.zeros(self.num_features)
        second = np.zeros(self.num_features)
        for start, matrix in self._chunks(adata):
            matrix = matrix[:, genes]
            features = self._features(matrix, library_size[start : start + matrix.shape[0]])
            first += np.asarray(features.sum(axis=0), dtype=np.float64).ravel()
            second += np.asarray(features.multiply(features).sum(axis=0), dtype=np.float64).ravel()
        mean = first / adata.n_obs
        std = np.sqrt(np.maximum(second / adata.n_obs - mean**2, 0))
        if not self.config.standardize:
            mean, std = np.zeros_like(mean), np.ones_like(std)
        self.mean = torch.from_numpy(mean).float()
        self.std = torch.from_numpy(np.where(std > 0, std, 1)).float()

        combinations, inverse, numbers = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        self.label_combinations = torch.from_numpy(combinations)
        self.label_frequencies = torch.from_numpy(numbers / numbers.sum()).float()
        quantiles = [
            np.quantile(np.log(library_size[inverse.ravel() == i]), np.linspace(0, 1, 101))
            if self.config.values == "counts"
            else np.zeros(101)
            for i in range(len(combinations))
        ]
        self.library_size_quantiles = torch.from_numpy(np.stack(quantiles)).float()
        return self

    def select(self, adata: ad.AnnData) -> tuple[sparse.csr_matrix, np.ndarray]:
        """
        The modelled genes of a new AnnData, aligned by name.

        Args:
            adata (`AnnData`): Cells; their genes may be more, fewer, and in another order.

        Returns:
            `tuple`: the matrix (cells × modelled genes, CSR, values as in `adata`) and the library sizes (cells), over
            every gene of `adata`. Genes that `adata` lacks are zero, and a warning names them.

        Raises:
            ValueError: If no gene is in common, or a value is not what `values` says.
        """
        self._check_names(adata)
        positions = adata.var_names.get_indexer(self.var_names)
        missing = self.var_names[positions < 0]
        if len(missing) == len(self.var_names):
            raise ValueError(
                f"None of the {len(missing)} genes of this model ({', '.join(missing[:3])}, …) is in `adata.var_names`"
                f" ({', '.join(adata.var_names[:3])}, …): set `adata.var_names` to the same kind of gene name."
            )
        if len(missing):
            logger.warning(
                f"{len(missing)} of the {len(self.var_names)} modelled genes are missing from `adata` and are taken as"
                f" zero: {', '.join(missing[:10])}{', …' if len(missing) > 10 else ''}."
            )
        present = positions >= 0
        # Places the present genes in their columns of the model: (genes of adata, modelled genes)
        placement = sparse.csr_matrix(
            (np.ones(present.sum(), dtype=np.float32), (positions[present], np.flatnonzero(present))),
            shape=(adata.n_vars, len(self.var_names)),
        )
        matrices, library_sizes = [], []
        for _, matrix in self._chunks(adata):
            matrices.append(sparse.csr_matrix(matrix @ placement))
            library_sizes.append(np.asarray(matrix.sum(axis=1)).ravel())
        return sparse.vstack(matrices, format="csr"), np.concatenate(library_sizes)

    def transform(self, matrix: sparse.csr_matrix, library_size: np.ndarray) -> torch.Tensor:
        """
        What [`~ScRNAProcessor.select`] returns, or some rows of it, as the denoiser's input.

        Args:
            matrix (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Counts, or log values.
            library_size (`np.ndarray` of shape `(cells,)`): Total counts of each cell.

        Returns:
            `torch.FloatTensor` of shape `(cells, num_features)`.
        """
        features = torch.from_numpy(self._features(matrix, library_size).toarray())
        return (features - self.mean) / self.std  # (cells, num_features)

    def counts(self, matrix: sparse.csr_matrix, library_size: np.ndarray) -> torch.Tensor:
        """
        What [`~ScRNAProcessor.select`] returns, or some rows of it, as the autoencoder's input.

        Returns:
            `torch.FloatTensor` of shape `(cells, num_genes + 1)`: counts, the last column those of all other genes.
        """
        genes = torch.from_numpy(matrix.toarray().astype(np.float32))
        others = torch.from_numpy(library_size.astype(np.float32)) - genes.sum(1)
        return torch.cat([genes, others[:, None]], dim=1)

    def preprocess(self, adata: ad.AnnData) -> torch.Tensor:
        """
        Cells as the denoiser sees them. See [`~ScRNAProcessor.select`] for how genes are aligned and what is raised.

        Args:
            adata (`AnnData`): Cells.

        Returns:
            `torch.FloatTensor` of shape `(cells, num_features)`.
        """
        return self.transform(*self.select(adata))

    def encode_labels(self, adata: ad.AnnData) -> torch.Tensor:
        """
        Indices of the cells' labels, `torch.LongTensor` of shape `(cells, num_label_keys)`.

        Raises:
            ValueError: If a label key is missing, or a label was not among the training cells.
        """
        columns = [self._labels(adata, key) for key in self.config.label_keys]
        return torch.from_numpy(
            np.stack([self._encode(key, names) for key, names in zip(self.config.label_keys, columns)], axis=1)
            if columns
            else np.zeros((adata.n_obs, 0), dtype=np.int64)
        )

    def _features(self, matrix: sparse.csr_matrix, library_size: np.ndarray) -> sparse.csr_matrix:
        """log1p(CP10k) of counts, log values as they are, and the log library size where it is modelled."""
        features = matrix.astype(np.float32, copy=True)
        if self.config.values == "counts":
            features = sparse.diags_array((TARGET_SUM / library_size).astype(np.float32)) @ features
            features.data = np.log1p(features.data)
        if self._has_library_size:
            log_library_size = np.log(library_size).astype(np.float32)[:, None]
            features = sparse.hstack([features, log_library_size])
        return sparse.csr_matrix(features)

    def _choose_genes(self, adata: ad.AnnData, cells_per_gene: np.ndarray, library_size: np.ndarray) -> np.ndarray:
        """Positions of the genes to model, in the order of `adata`."""
        expressed = np.flatnonzero(cells_per_gene >= min(self.config.min_cells, adata.n_obs))
        if len(expressed) == 0:
            raise ValueError(f"No gene is expressed in {self.config.min_cells} cells: lower `min_cells`.")
        num_genes = self.config.num_genes
        if num_genes is None or len(expressed) <= num_genes:
            return expressed
        import scanpy as sc

        matrices = []
        for start, matrix in self._chunks(adata):
            if self.config.values == "counts":
                scale = TARGET_SUM / library_size[start : start + matrix.shape[0]]
                matrix = sparse.diags_array(scale.astype(np.float32)) @ matrix[:, expressed]
                matrix.data = np.log1p(matrix.data)
            else:
                matrix = matrix[:, expressed]
            matrices.append(sparse.csr_matrix(matrix))
        log_normalised = ad.AnnData(sparse.vstack(matrices, format="csr"))
        variable = sc.pp.highly_variable_genes(log_normalised, n_top_genes=num_genes, flavor="seurat", inplace=False)
        return expressed[variable["highly_variable"].to_numpy()]

    def _chunks(self, adata: ad.AnnData) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """The matrix in checked CSR pieces of at most `CHUNK_SIZE` cells, each with its first cell's number."""
        layer = self.config.layer
        if layer is not None and layer not in adata.layers:
            raise ValueError(f"`adata` has no layer {layer!r}; it has {list(adata.layers)}. Give one, or None for X.")
        name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        for start in range(0, adata.n_obs, CHUNK_SIZE):
            rows = slice(start, start + CHUNK_SIZE)
            # Slicing the AnnData, not the matrix, works alike for dense, CSR, CSC and backed ones.
            chunk = adata[rows]
            matrix = sparse.csr_matrix(chunk.X if layer is None else chunk.layers[layer])
            self._check_values(matrix, name, adata.obs_names[rows])
            matrix.eliminate_zeros()
            yield start, matrix

    def _check_names(self, adata: ad.AnnData):
        if adata.n_obs == 0 or adata.n_vars == 0:
            raise ValueError(f"`adata` is empty: {adata.n_obs} cells × {adata.n_vars} genes.")
        if not adata.var_names.is_unique:
            name = adata.var_names[adata.var_names.duplicated()][0]
            raise ValueError(f"The gene name {name!r} occurs more than once: call `adata.var_names_make_unique()`.")

    def _check_values(self, matrix: sparse.csr_matrix, name: str, obs_names: pd.Index):
        values = matrix.data

        def at(wrong: np.ndarray) -> str:
            row = np.searchsorted(matrix.indptr, np.flatnonzero(wrong)[0], side="right") - 1
            return f"{name} holds {values[wrong][0]:g} (cell {obs_names[row]!r})"

        if not np.isfinite(values).all():
            raise ValueError(f"{at(~np.isfinite(values))}: remove or replace NaN and infinite values.")
        if (values < 0).any():
            mend = "centred or scaled values can't be modelled; give counts, or log1p values with values='log'"
            raise ValueError(f"{at(values < 0)}, but expression is never negative: {mend}.")
        if self.config.values == "counts":
            fractional = values != np.rint(values)
            if fractional.any():
                raise ValueError(
                    f"{at(fractional)}, which is no integer count. If these are log-normalised values, pass"
                    " values='log'; if the counts are in a layer, name it with `layer`."
                )
        empty = np.asarray(matrix.sum(axis=1)).ravel() == 0
        if empty.any():
            raise ValueError(
                f"{empty.sum()} cells of {name} have no counts at all (the first is {obs_names[empty][0]!r}): remove"
                " them with `sc.pp.filter_cells(adata, min_counts=1)`."
            )

    # ==================== Labels ====================

    def _labels(self, adata: ad.AnnData, key: str) -> np.ndarray:
        if key not in adata.obs:
            raise ValueError(f"`adata.obs` has no column {key!r}; it has {list(adata.obs)}. Check `label_keys`.")
        column = adata.obs[key]
        if column.isna().any():
            raise ValueError(f"`adata.obs[{key!r}]` is missing for {column.isna().sum()} cells: name or remove them.")
        return column.astype(str).to_numpy()

    def _fit_labels(self, adata: ad.AnnData) -> tuple[list[list[str]], np.ndarray]:
        columns = [np.unique(self._labels(adata, key), return_inverse=True) for key in self.config.label_keys]
        categories = [names.tolist() for names, _ in columns]
        codes = [code for _, code in columns]
        return categories, np.stack(codes, axis=1) if codes else np.zeros((adata.n_obs, 0), dtype=np.int64)

    def _encode(self, key: str, names: str | list[str] | np.ndarray) -> np.ndarray:
        """Indices of label names in one label key."""
        known = pd.Index(self.config.categories[list(self.config.label_keys).index(key)])
        names = np.atleast_1d(np.asarray(names, dtype=str))
        codes = known.get_indexer(names)
        if (codes < 0).any():
            unknown = str(names[codes < 0][0])
            close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{unknown!r} is not a {key} of this model, which knows {', '.join(known)}.{hint}")
        return codes.astype(np.int64)

    def encode_names(self, names: dict[str, str | list[str]], num_cells: int) -> torch.Tensor:
        """
        The labels that were asked for.

        Args:
            names (`dict`): For some of the label keys, one name for all cells, or one per cell.
            num_cells (`int`): Number of cells.

        Returns:
            `torch.LongTensor` of shape `(num_cells, num_label_keys)`, -1 where no name was given.

        Raises:
            ValueError: If a label key or a name is not of this model.
        """
        label_keys = list(self.config.label_keys)
        labels = torch.full((num_cells, len(label_keys)), -1, dtype=torch.long)
        for key, value in names.items():
            if key not in label_keys:
                known = f"the label keys {label_keys}" if label_keys else "no label keys: it is unconditional"
                raise ValueError(f"{key!r} is not a condition of this model, which has {known}.")
            labels[:, label_keys.index(key)] = torch.from_numpy(self._encode(key, value))
        return labels

    def complete_labels(self, labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """
        Draws the labels that were not given, from the training frequencies among cells with the given ones.

        Args:
            labels (`torch.LongTensor` of shape `(cells, num_label_keys)`): Labels, -1 where not given.
            uniform (`torch.Tensor` of shape `(cells,)`): Random numbers in [0, 1) to draw with.

        Returns:
            `torch.LongTensor` of shape `(cells, num_label_keys)`.
        """
        completed = labels.clone()
        if not self.config.label_keys:
            return completed
        for pattern in labels.unique(dim=0):
            cells = (labels == pattern).all(dim=1)
            free = pattern < 0
            agree = (self.label_combinations[:, ~free] == pattern[~free]).all(dim=1)
            # No training cell has the given labels together: draw the others from all cells.
            weights = self.label_frequencies.double() * (agree if agree.any() else torch.ones_like(agree))
            cumulative = weights.cumsum(0) / weights.sum()
            drawn = torch.searchsorted(cumulative, uniform[cells].double(), right=True).clamp(max=len(weights) - 1)
            completed[cells] = torch.where(free, self.label_combinations[drawn], pattern)
        return completed

    # ==================== AnnData out ====================

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Denoised cells on the scale of expression.

        Args:
            latents (`torch.Tensor` of shape `(cells, num_features)`): Denoised cells.

        Returns:
            `tuple`: expression (cells × genes, clamped at zero) and, where it is modelled, library size (cells,),
            within the range of the training cells'.
        """
        self._check_fitted()
        features = latents.float() * self.std.to(latents.device) + self.mean.to(latents.device)
        if not self._has_library_size:
            return features.clamp(min=0), None
        low, high = self.library_size_quantiles.min(), self.library_size_quantiles.max()
        log_library_size = features[:, -1].clamp(low.item(), high.item())
        return features[:, :-1].clamp(min=0), log_library_size.exp()

    def sample_library_size(self, class_labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """
        Library sizes of training cells with the same labels, by inverting their cumulative distribution.

        Args:
            class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`): Labels of the cells.
            uniform (`torch.Tensor` of shape `(cells,)`): Random numbers in [0, 1).

        Returns:
            `torch.Tensor` of shape `(cells,)`.
        """
        same = (class_labels[:, None].cpu() == self.label_combinations).all(dim=2).float()  # (cells, combinations)
        # Where the combination was never seen, the average over all.
        weights = torch.where(same.any(dim=1, keepdim=True), same, self.label_frequencies)
        quantiles = weights @ self.library_size_quantiles / weights.sum(dim=1, keepdim=True)  # (cells, 101)
        position = uniform.cpu()[:, None] * (quantiles.shape[1] - 1)
        low = position.floor().long().clamp(max=quantiles.shape[1] - 2)
        return torch.lerp(quantiles.gather(1, low), quantiles.gather(1, low + 1), position - low).squeeze(1).exp()

    def to_matrix(self, expression: torch.Tensor, library_size: torch.Tensor | None) -> sparse.csr_matrix:
        """
        Expression as the kind of matrix that was trained on: integer counts at the given library sizes, or the log
        values as they are.

        Args:
            expression (`torch.Tensor` of shape `(cells, genes)`): Log expression.
            library_size (`torch.Tensor` of shape `(cells,)`, *optional*): Total counts; needed for counts.

        Returns:
            `scipy.sparse.csr_matrix` of shape `(cells, genes)`, float32.
        """
        expression = expression.float().cpu()
        if self.config.values == "counts":
            expression = torch.round(torch.expm1(expression) * library_size.float().cpu()[:, None] / TARGET_SUM)
        return sparse.csr_matrix(expression.numpy())

    def to_anndata(
        self,
        matrix: sparse.csr_matrix,
        class_labels: torch.Tensor | None,
        library_size: torch.Tensor | None,
        first_cell: int = 0,
    ) -> ad.AnnData:
        """
        A matrix of [`~ScRNAProcessor.to_matrix`] with its names: `var_names`, one `obs` column per label key (with all
        categories of the model), `obs["library_size"]` for counts, and `cell_0`, `cell_1`, … from `first_cell` on.
        """
        cells = ad.AnnData(
            matrix,
            obs=pd.DataFrame(index=[f"cell_{first_cell + i}" for i in range(matrix.shape[0])]),
            var=pd.DataFrame(index=self.var_names.rename(None)),
        )
        if class_labels is not None:
            for key, names, codes in zip(self.config.label_keys, self.config.categories, class_labels.cpu().unbind(1)):
                cells.obs[key] = pd.Categorical.from_codes(codes.numpy(), categories=names)
        if library_size is not None:
            cells.obs["library_size"] = library_size.cpu().numpy()
        return cells

    def postprocess(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
    ) -> ad.AnnData:
        """
        Denoised cells as an AnnData of the kind that was trained on.

        Args:
            latents (`torch.Tensor` of shape `(cells, num_features)`): Denoised cells.
            class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`, *optional*): Their labels.
            library_size (`torch.Tensor` of shape `(cells,)`, *optional*):
                Total counts, instead of those in `latents`; needed for counts if the library size is not modelled.

        Returns:
            `AnnData`: integer counts in `X` (CSR), or log values; see [`~ScRNAProcessor.to_anndata`].
        """
        expression, generated_library_size = self.decode(latents)
        library_size = generated_library_size if library_size is None else library_size
        return self.to_anndata(self.to_matrix(expression, library_size), class_labels, library_size)

    # ==================== Saving and loading ====================

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """
        Writes `config.json` and the arrays as safetensors.

        The file names are those of a Diffusers model, because `DiffusionPipeline.from_pretrained` downloads no other
        safetensors file from the Hub.
        """
        self._check_fitted()
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        arrays = {name: getattr(self, name).contiguous() for name in STATISTICS}
        save_file(arrays, Path(save_directory) / SAFETENSORS_WEIGHTS_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs
    ) -> "ScRNAProcessor":
        """
        Loads a processor from a folder, or from a pipeline on the Hub with `subfolder="processor"`.

        Raises:
            OSError: If the files are missing or damaged.
        """
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
            for name in STATISTICS:
                setattr(processor, name, arrays[name])
        except (FileNotFoundError, SafetensorError, KeyError) as error:
            raise OSError(
                f"{path} is missing, truncated or not a ScRNAProcessor's ({error}): copy or download it again."
            ) from error
        return processor
