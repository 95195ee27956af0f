"""Public datasets, from the files that their authors published to an AnnData: `wbdit fetch`."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata.utils import make_index_unique
from scipy import sparse

from ..files import one_line


@dataclass(frozen=True)
class Recipe:
    """
    How to make the AnnData of a dataset from its published files.

    Args:
        source (`str`): Publication and accession.
        files (`dict[str, tuple[str, str | None]]`): Address and, where known, SHA-256 of each file.
        read (`Callable`): Makes the AnnData from the folder of these files.
        config (`dict[str, Any]`): Flags of a training on it, for `wbdit train --config NAME`.
    """

    source: str
    files: dict[str, tuple[str, str | None]]
    read: Callable[[Path], ad.AnnData]
    config: dict[str, Any] = field(default_factory=lambda: {"label_keys": ["cell_type"]})


def fetch(name: str, folder: str | Path) -> ad.AnnData:
    """
    Downloads and reads one of the [`RECIPES`].

    Args:
        name (`str`): Name of the dataset.
        folder (`str` or `Path`): Folder of the published files. Files in it are not downloaded again.

    Returns:
        `AnnData`: cells with `obs["cell_type"]`. `X` holds counts, or log values for `hnscc`.

    Raises:
        ValueError: If there is no such recipe, or the files are not the published ones.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe for {name!r}; there are {', '.join(RECIPES)}.")
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ValueError('Downloading data needs `pip install "wbdit_diffusers[data]"`.') from error
    folder = Path(folder)
    for file, (address, sha256) in RECIPES[name].files.items():
        pooch.retrieve(address, known_hash=sha256, fname=file, path=folder, progressbar=True)
    try:
        return RECIPES[name].read(folder)
    except (ValueError, KeyError, OSError, tarfile.TarError) as error:
        raise ValueError(f"{folder} does not hold the published files of {name}: {one_line(error)}") from error


def read_hnscc(folder: Path) -> ad.AnnData:
    """
    Head and neck cancer: malignant cells, fibroblasts and immune cells, log2(TPM/10 + 1).

    The published table has one column per cell. Its first rows are the annotation: 0 or 1 for "classified as cancer
    cell", and the type of other cells. One row per gene follows, with the name in quotes. Cells of no type are left
    out.
    """
    path = folder / "GSE103322_HNSCC_all_data.txt.gz"
    table = pd.read_csv(path, sep="\t", index_col=0, nrows=20, dtype=str)
    names = table.index.astype(str).str.split().str.join(" ").str.lower()
    rows = {key: np.flatnonzero(names == key) for key in ("classified as cancer cell", "non-cancer cell type")}
    for key, found in rows.items():
        if len(found) != 1:
            raise ValueError(f"{path} has no row {key!r}: this is not the table of GSE103322.")
    is_cancer = table.iloc[rows["classified as cancer cell"][0]].astype(float).to_numpy() == 1
    types = table.iloc[rows["non-cancer cell type"][0]].astype(str).str.strip(" -").to_numpy()  # "-Fibroblast" occurs
    immune = np.isin(types, ["T cell", "B cell", "Macrophage", "Dendritic", "Mast"])
    cell_type = np.select(
        [is_cancer, types == "Fibroblast", immune], ["malignant", "fibroblast", "immune"], default=""
    )
    num_rows = 1 + int(max(found[0] for found in rows.values()))  # of annotation
    # Numbers are read without the annotation: 140 million values as text would take 10 GB.
    genes = pd.read_csv(
        path, sep="\t", index_col=0, skiprows=range(1, 1 + num_rows), dtype=dict.fromkeys(table.columns, np.float32)
    )
    cells = ad.AnnData(
        sparse.csr_matrix(genes.to_numpy().T),
        obs=pd.DataFrame({"cell_type": pd.Categorical(cell_type)}, index=table.columns),
        var=pd.DataFrame(index=make_index_unique(genes.index.astype(str).str.strip("'\"").rename(None))),
    )
    return cells[cell_type != ""].copy()


def read_kang(folder: Path) -> ad.AnnData:
    """PBMCs with and without interferon β: singlets with a type, and `obs["condition"]`, CTRL or STIM."""
    genes = pd.read_csv(folder / "GSE96583_batch2.genes.tsv.gz", sep="\t", header=None)[1].astype(str)
    genes = make_index_unique(pd.Index(genes.to_numpy()))
    table = pd.read_csv(folder / "GSE96583_batch2.total.tsne.df.tsv.gz", sep="\t", index_col=0)
    parts = []
    for condition, sample, matrix_name in (("ctrl", "GSM2560248", "2.1"), ("stim", "GSM2560249", "2.2")):
        matrix = _read_matrix_market(folder / f"{sample}_{matrix_name}.mtx.gz")
        barcodes = pd.read_csv(folder / f"{sample}_barcodes.tsv.gz", header=None)[0].astype(str)
        rows = table[table["stim"] == condition]
        # A barcode that occurs in both conditions has a further digit in the table; the order is the same.
        if len(rows) != len(barcodes) or any(a[:14] != b[:14] for a, b in zip(rows.index, barcodes)):
            raise ValueError(f"The cells of {sample} are not those of GSE96583_batch2.total.tsne.df.tsv.gz.")
        obs = pd.DataFrame(
            {
                "cell_type": rows["cell"].to_numpy(),
                "condition": condition.upper(),
                "donor": rows["ind"].astype(str).to_numpy(),
            },
            index=[f"{barcode}.{condition}" for barcode in barcodes],
        )
        part = ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes))
        parts.append(part[(rows["multiplets"] == "singlet").to_numpy() & rows["cell"].notna().to_numpy()])
    return ad.concat(parts, merge="same")


def read_pbmc3k(folder: Path) -> ad.AnnData:
    """3k PBMCs with the types of Scanpy's tutorial. Cells that it filters out are "unlabelled"."""
    cells = _read_10x(folder / "pbmc3k_filtered_gene_bc_matrices.tar.gz")
    labels = ad.read_h5ad(folder / "pbmc3k_processed.h5ad").obs["louvain"].astype(str)
    if not cells.obs_names.isin(labels.index).any():
        raise ValueError("None of the cells of the archive is in pbmc3k_processed.h5ad.")
    cells.obs["cell_type"] = labels.reindex(cells.obs_names).fillna("unlabelled").astype("category")
    return cells


ZHENG_POPULATIONS = {
    "b_cells": "CD19+ B",
    "cd14_monocytes": "CD14+ Monocyte",
    "cd34": "CD34+",
    "cd4_t_helper": "CD4+ T Helper2",
    "cd56_nk": "CD56+ NK",
    "cytotoxic_t": "CD8+ Cytotoxic T",
    "memory_t": "CD4+/CD45RO+ Memory",
    "naive_cytotoxic": "CD8+/CD45RA+ Naive Cytotoxic",
    "naive_t": "CD4+/CD45RA+/CD25- Naive T",
    "regulatory_t": "CD4+/CD25 T Reg",
}


def read_zheng(folder: Path) -> ad.AnnData:
    """Ten populations of PBMCs, sorted by FACS: about 94,000 cells."""
    parts = {name: _read_10x(folder / f"{name}_filtered_gene_bc_matrices.tar.gz") for name in ZHENG_POPULATIONS}
    cells = ad.concat(parts, merge="same", label="population", index_unique="-")
    cells.obs["cell_type"] = cells.obs["population"].map(ZHENG_POPULATIONS).astype("category")
    return cells


def read_pancreas(folder: Path) -> ad.AnnData:
    """Endocrine cells of the mouse pancreas at E15.5: spliced counts."""
    source = ad.read_h5ad(folder / "endocrinogenesis_day15.h5ad")
    obs = source.obs[["clusters"]].rename(columns={"clusters": "cell_type"})
    return ad.AnnData(sparse.csr_matrix(source.layers["spliced"]), obs=obs, var=source.var[[]])


def read_paul15(folder: Path) -> ad.AnnData:
    """Mouse myeloid progenitors, MARS-seq, in the 19 clusters of the publication, by Scanpy's reader."""
    import scanpy as sc

    datasetdir, sc.settings.datasetdir = sc.settings.datasetdir, folder
    try:
        source = sc.datasets.paul15()  # in datasetdir/paul15
    finally:
        sc.settings.datasetdir = datasetdir
    obs = source.obs[["paul15_clusters"]].rename(columns={"paul15_clusters": "cell_type"})
    return ad.AnnData(sparse.csr_matrix(source.X), obs=obs, var=source.var[[]])


def _read_matrix_market(path: Path) -> sparse.csr_matrix:
    """Genes × cells in the file, cells × genes here."""
    from scipy.io import mmread

    return sparse.csr_matrix(mmread(path).T.astype(np.float32))


def _read_10x(path: Path) -> ad.AnnData:
    """A Cell Ranger archive of matrix.mtx, genes.tsv and barcodes.tsv, in any folder."""
    import scanpy as sc

    folder = path.with_name(path.name.removesuffix(".tar.gz"))
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    matrices = sorted(folder.rglob("matrix.mtx"))
    if len(matrices) != 1:
        raise ValueError(f"{path} holds {len(matrices)} files matrix.mtx, not one.")
    return sc.read_10x_mtx(matrices[0].parent, var_names="gene_symbols", make_unique=True)


GEO = "https://ftp.ncbi.nlm.nih.gov/geo"
TENX = "https://cf.10xgenomics.com/samples/cell-exp/1.1.0"

RECIPES = {
    "hnscc": Recipe(
        "Puram et al. 2017, Cell 171:1611; GEO GSE103322",
        {
            "GSE103322_HNSCC_all_data.txt.gz": (
                f"{GEO}/series/GSE103nnn/GSE103322/suppl/GSE103322_HNSCC_all_data.txt.gz",
                None,
            )
        },
        read_hnscc,
        {"values": "log", "label_keys": ["cell_type"]},
    ),
    "kang_ifnb_pbmc": Recipe(
        "Kang et al. 2018, Nat Biotechnol 36:89; GEO GSE96583",
        {
            "GSE96583_batch2.genes.tsv.gz": (
                f"{GEO}/series/GSE96nnn/GSE96583/suppl/GSE96583_batch2.genes.tsv.gz",
                "93aa4e9b530ef9d6411ca129b416324c5cc1cc5a01a1fa6ed4f4a845480ed3ca",
            ),
            "GSE96583_batch2.total.tsne.df.tsv.gz": (
                f"{GEO}/series/GSE96nnn/GSE96583/suppl/GSE96583_batch2.total.tsne.df.tsv.gz",
                "1d57e72e92ca8695250e88cc0f1c3fa8c0be1175d974f8b427c58f1274dc6c09",
            ),
            **{
                name: (f"{GEO}/samples/GSM2560nnn/{name.split('_')[0]}/suppl/{name}", None)
                for name in (
                    "GSM2560248_2.1.mtx.gz",
                    "GSM2560248_barcodes.tsv.gz",
                    "GSM2560249_2.2.mtx.gz",
                    "GSM2560249_barcodes.tsv.gz",
                )
            },
        },
        read_kang,
        {"label_keys": ["cell_type", "condition"]},
    ),
    "pancreas_endocrinogenesis": Recipe(
        "Bastidas-Ponce et al. 2019, Development 146:dev173849; GEO GSE132188",
        {
            "endocrinogenesis_day15.h5ad": (
                "https://github.com/theislab/scvelo_notebooks/raw/master/data/Pancreas/endocrinogenesis_day15.h5ad",
                None,
            )
        },
        read_pancreas,
    ),
    "paul15": Recipe(
        "Paul et al. 2015, Cell 163:1663; GEO GSE72857",
        {"paul15/paul15.h5": ("https://falexwolf.de/data/paul15.h5", None)},
        read_paul15,
    ),
    "pbmc3k": Recipe(
        "10x Genomics, 3k PBMCs",
        {
            "pbmc3k_filtered_gene_bc_matrices.tar.gz": (
                f"{TENX}/pbmc3k/pbmc3k_filtered_gene_bc_matrices.tar.gz",
                None,
            ),
            "pbmc3k_processed.h5ad": (
                "https://raw.githubusercontent.com/chanzuckerberg/cellxgene/main/example-dataset/pbmc3k.h5ad",
                None,
            ),
        },
        read_pbmc3k,
    ),
    "zheng_facs_pbmc": Recipe(
        "Zheng et al. 2017, Nat Commun 8:14049; SRA SRP073767",
        {
            f"{name}_filtered_gene_bc_matrices.tar.gz": (
                f"{TENX}/{name}/{name}_filtered_gene_bc_matrices.tar.gz",
                None,
            )
            for name in ZHENG_POPULATIONS
        },
        read_zheng,
    ),
}
