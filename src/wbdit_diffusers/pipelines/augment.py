"""`augment`: real cells, and generated ones of the types that have too few."""

from collections.abc import Sequence

import anndata as ad
import torch

from ..data.cells import label_column
from ..data.latents import CellDataset
from ..models.codec_programs import ProgramCodec
from .pipeline_scrna_generation import ScRNAGenerationPipeline
from .programs import add_programs


def augment(
    pipe: ScRNAGenerationPipeline,
    cells: ad.AnnData,
    cell_types: str | Sequence[str],
    num_cells: int | None = None,
    generator: torch.Generator | None = None,
) -> ad.AnnData:
    """
    Adds generated cells of some types to real cells, to train a classifier or to find markers with. Leave held-out
    cells out of `cells`, and out of the training of the pipeline.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): A pipeline that was trained on these cells, with labels.
        cells (`AnnData`): Real cells, with values of the kind of the training cells and the pipeline's label columns.
        cell_types (`str` or `Sequence[str]`): Types that get more cells, from the first label key.
        num_cells (`int`, *optional*):
            Number of cells, real and generated, that each of these types has then. Default: the median type's number.
        generator (`torch.Generator`, *optional*): Makes the generated cells reproducible.

    Returns an `AnnData` of the genes that the pipeline models: the real cells, and then the generated ones.
    `obs["generated"]` distinguishes them. Raises a `ValueError` if the pipeline has no labels or lacks a type.
    """
    processor = pipe.processor
    if not processor.label_keys:
        raise ValueError("This pipeline is unconditional: train one with the cell type among its label keys.")
    label_key = processor.label_keys[0]
    counts = label_column(cells.obs, label_key).astype(str).value_counts()
    number = int(counts.median()) if num_cells is None else num_cells
    types = [cell_types] if isinstance(cell_types, str) else list(cell_types)
    missing = [name for name in types for _ in range(number - counts.get(name, 0))]
    if not missing:
        raise ValueError(f"All of these types have {number} cells or more: give a larger `num_cells`.")
    data = CellDataset(cells, processor, with_labels=False)
    real = processor.to_anndata(data.matrix, None, torch.from_numpy(data.library_size), cells.obs_names)
    real.obs = cells.obs.assign(generated=False, library_size=data.library_size)
    if isinstance(pipe.codec, ProgramCodec):
        add_programs(real, pipe.codec, pipe.encode_cells(cells))
    generated = pipe(cell_types=missing, generator=generator).cells
    return ad.concat([real, generated], join="outer", merge="first", uns_merge="first")
