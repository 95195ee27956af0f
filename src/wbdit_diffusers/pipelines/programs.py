"""Gene programs where a Scanpy user looks for them: loadings in `varm`, activities in `obsm`, names in `uns`."""

import anndata as ad
import numpy as np
import pandas as pd
import torch

from ..models.codec_programs import ProgramCodec


NUM_NAMING_GENES = 3


def program_table(codec: ProgramCodec, var_names: pd.Index, num_genes: int = 10) -> pd.DataFrame:
    """
    What each program does, in one row.

    Genes are ranked by [`~ProgramCodec.weighted_loadings`]: a large loading of a gene that hardly any cell expresses
    says little.

    Args:
        codec ([`ProgramCodec`]): The fitted codec.
        var_names (`pd.Index`): The modelled genes in the order of its columns, as in `pipe.processor.var_names`.
        num_genes (`int`, defaults to 10): How many genes to list.

    Returns:
        `pd.DataFrame`: `name` (the genes that it raises most), `explained` (its share of what all programs explain of
        the log rates, genes weighted as above), `up` and `down` (the genes that it raises and lowers most).
    """
    weighted = codec.weighted_loadings.cpu().numpy()  # (genes, programs)
    order = np.argsort(-weighted, axis=0, kind="stable")
    up, down = var_names.to_numpy()[order[:num_genes]].T, var_names.to_numpy()[order[::-1][:num_genes]].T
    explained = np.square(weighted).sum(axis=0)
    return pd.DataFrame(
        {
            "name": [", ".join(genes[:NUM_NAMING_GENES]) for genes in up],
            "explained": explained / explained.sum(),
            "up": [", ".join(genes) for genes in up],
            "down": [", ".join(genes) for genes in down],
        },
        index=pd.Index([f"program_{i}" for i in range(weighted.shape[1])], name="program"),
    )


def add_programs(cells: ad.AnnData, codec: ProgramCodec, latents: torch.Tensor):
    """
    Writes the programs into an AnnData.

    Args:
        cells (`AnnData`): Cells with the codec's genes in its order. Gets `varm["programs"]` (see
            [`~ProgramCodec.loadings`]), `obsm["X_programs"]` (see [`~ProgramCodec.activities`]) and `uns["programs"]`
            (`name` and `explained` of each, see [`program_table`]).
        codec ([`ProgramCodec`]): The codec.
        latents (`torch.Tensor` of shape `(cells, num_features)`): The cells' latents.
    """
    table = program_table(codec, cells.var_names)
    cells.varm["programs"] = codec.loadings.cpu().numpy()
    cells.obsm["X_programs"] = codec.activities(latents).cpu().numpy()
    cells.uns["programs"] = {key: table[key].to_numpy() for key in ("name", "explained")}
