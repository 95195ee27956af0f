"""Gene programs where a Scanpy user looks for them: loadings in `varm`, activities in `obsm`, names in `uns`."""

import anndata as ad
import numpy as np
import pandas as pd
import torch

from ..models.codec_programs import ProgramCodec


NUM_NAMING_GENES = 3


def program_table(codec: ProgramCodec, var_names: pd.Index, num_genes: int = 10) -> pd.DataFrame:
    """
    Describes each program of a codec in a row: `name` (the genes that it raises most), `explained` (its share of what
    all programs explain of the log rates), `up` and `down` (the `num_genes` that it raises and lowers most). Genes are
    ranked by [`~ProgramCodec.weighted_loadings`]. `var_names` are `pipe.processor.var_names`.
    """
    if not isinstance(codec, ProgramCodec):
        raise ValueError(f"This model has no gene programs: it was trained with {type(codec).__name__}.")
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
    Writes the programs of cells with latents `(cells, num_features)` into their AnnData: `varm["programs"]`
    ([`~ProgramCodec.loadings`]), `obsm["X_programs"]` ([`~ProgramCodec.activities`]) and `uns["programs"]` (`name` and
    `explained` of each, see [`program_table`]).
    """
    table = program_table(codec, cells.var_names)
    cells.varm["programs"] = codec.loadings.cpu().numpy()
    cells.obsm["X_programs"] = codec.activities(latents).cpu().numpy()
    cells.uns["programs"] = {key: table[key].to_numpy() for key in ("name", "explained")}
