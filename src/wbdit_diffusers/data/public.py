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
from scipy.io import mmread

from .read import read_cells


@dataclass(frozen=True)
class Recipe:
    """A public dataset, and how its AnnData is made from the published files."""

    source: str  # publication and accession
    files: list[str]  # addresses
    read: Callable[[Path], ad.AnnData]  # from the folder of these files
    config: dict[str, Any] = field(default_factory=lambda: {"label_keys": ["cell_type"]})  # for `wbdit train`


def fetch(name: str, folder: str | Path) -> ad.AnnData:
    """Downloads and reads one of the [`RECIPES`], whose published files stay in the folder."""
    if name not in RECIPES:
        raise ValueError(f"There is no recipe for {name!r}; there are {', '.join(RECIPES)}.")
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ValueError('Downloading data needs `pip install "wbdit_diffusers[data]"`.') from error
    import scanpy as sc

    folder = Path(folder)
    for address in RECIPES[name].files:
        file = address.rsplit("/", 1)[1]
        pooch.retrieve(address, known_hash=SHA256.get(file), fname=file, path=folder, progressbar=True)
    datasetdir, sc.settings.datasetdir = sc.settings.datasetdir, folder  # of the files that Scanpy downloads
    try:
        return RECIPES[name].read(folder)
    finally:
        sc.settings.datasetdir = datasetdir


def read_hnscc(folder: Path) -> ad.AnnData:
    """Head and neck cancer: malignant cells, fibroblasts and immune cells, log2(TPM/10 + 1). Others are left out."""
    # One column per cell: first rows of annotation, then one row per gene, with its name in quotes
    path, type_row = folder / "GSE103322_HNSCC_all_data.txt.gz", "non-cancer cell type"
    table = pd.read_csv(path, sep="\t", index_col=0, nrows=20, dtype=str)
    table.index = table.index.astype(str).str.split().str.join(" ").str.lower()
    names = {"Fibroblast": "fibroblast"}
    names |= dict.fromkeys(["T cell", "B cell", "Macrophage", "Dendritic", "Mast"], "immune")
    cell_type = table.loc[type_row].astype(str).str.strip(" -").map(names)  # "-Fibroblast" occurs
    cell_type = cell_type.mask(table.loc["classified as cancer cell"].astype(float) == 1, "malignant")
    # Numbers are read without the annotation: 140 million values as text would take 10 GB.
    annotation = range(1, table.index.get_loc(type_row) + 2)
    types = dict.fromkeys(table.columns, np.float32)
    genes = pd.read_csv(path, sep="\t", index_col=0, skiprows=annotation, dtype=types)
    cells = ad.AnnData(
        sparse.csr_matrix(genes.to_numpy().T),
        obs=pd.DataFrame({"cell_type": cell_type.astype("category")}),
        var=pd.DataFrame(index=make_index_unique(genes.index.astype(str).str.strip("'\"").rename(None))),
    )
    return cells[cell_type.notna()].copy()


def read_kang(folder: Path) -> ad.AnnData:
    """PBMCs with and without interferon β: singlets with a type, and `obs["condition"]`, CTRL or STIM."""
    genes = pd.read_csv(folder / "GSE96583_batch2.genes.tsv.gz", sep="\t", header=None)[1].astype(str)
    var = pd.DataFrame(index=make_index_unique(pd.Index(genes.to_numpy())))
    table = pd.read_csv(folder / "GSE96583_batch2.total.tsne.df.tsv.gz", sep="\t", index_col=0)
    parts = []
    for condition, sample, matrix_name in (("ctrl", "GSM2560248", "2.1"), ("stim", "GSM2560249", "2.2")):
        matrix = mmread(folder / f"{sample}_{matrix_name}.mtx.gz")  # genes × cells
        barcodes = pd.read_csv(folder / f"{sample}_barcodes.tsv.gz", header=None)[0].astype(str)
        rows = table[table["stim"] == condition]
        # A barcode that occurs in both conditions has a further digit in the table; the order is the same.
        if [name[:14] for name in rows.index] != barcodes.str[:14].tolist():
            raise ValueError(f"The cells of {sample} are not those of GSE96583_batch2.total.tsne.df.tsv.gz.")
        obs = rows[["cell", "ind"]].set_axis(["cell_type", "donor"], axis=1).astype({"donor": str})
        obs = obs.assign(condition=condition.upper()).set_axis(barcodes + f".{condition}")
        part = ad.AnnData(sparse.csr_matrix(matrix.T.astype(np.float32)), obs=obs.rename_axis(None), var=var)
        parts.append(part[(rows["multiplets"] == "singlet").to_numpy() & rows["cell"].notna().to_numpy()])
    return ad.concat(parts, merge="same")


def read_pbmc3k(folder: Path) -> ad.AnnData:
    """3k PBMCs with the types of Scanpy's tutorial. Cells that it filters out are "unlabelled"."""
    import scanpy as sc

    cells = _read_10x(folder / "pbmc3k_filtered_gene_bc_matrices.tar.gz")
    labels = sc.datasets.pbmc3k_processed().obs["louvain"].astype(str)
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
    """Mouse myeloid progenitors, MARS-seq, in the 19 clusters of the publication, by Scanpy's recipe."""
    import scanpy as sc

    source = sc.datasets.paul15()
    obs = source.obs[["paul15_clusters"]].rename(columns={"paul15_clusters": "cell_type"})
    return ad.AnnData(sparse.csr_matrix(source.X), obs=obs, var=source.var[[]])


def _read_10x(path: Path) -> ad.AnnData:
    """A Cell Ranger archive of matrix.mtx, genes.tsv and barcodes.tsv, in any folder."""
    folder = path.with_name(path.name.removesuffix(".tar.gz"))
    folder.mkdir(exist_ok=True)
    with tarfile.open(path) as archive:  # by name alone: nothing in an archive becomes a path
        for name in ("matrix.mtx", "genes.tsv", "barcodes.tsv"):
            (member,) = (one for one in archive.getmembers() if one.isfile() and Path(one.name).name == name)
            content = archive.extractfile(member)
            assert content is not None  # it is a file
            (folder / name).write_bytes(content.read())
    return read_cells(folder)


GEO = "https://ftp.ncbi.nlm.nih.gov/geo"
TENX = "https://cf.10xgenomics.com/samples/cell-exp/1.1.0"
KANG_SAMPLES = ["GSM2560248_2.1.mtx", "GSM2560248_barcodes.tsv", "GSM2560249_2.2.mtx", "GSM2560249_barcodes.tsv"]

SHA256 = {
    "GSE96583_batch2.genes.tsv.gz": "93aa4e9b530ef9d6411ca129b416324c5cc1cc5a01a1fa6ed4f4a845480ed3ca",
    "GSE96583_batch2.total.tsne.df.tsv.gz": "1d57e72e92ca8695250e88cc0f1c3fa8c0be1175d974f8b427c58f1274dc6c09",
}

RECIPES = {
    "hnscc": Recipe(
        "Puram et al. 2017, Cell 171:1611; GEO GSE103322",
        [f"{GEO}/series/GSE103nnn/GSE103322/suppl/GSE103322_HNSCC_all_data.txt.gz"],
        read_hnscc,
        {"values": "log", "label_keys": ["cell_type"]},
    ),
    "kang_ifnb_pbmc": Recipe(
        "Kang et al. 2018, Nat Biotechnol 36:89; GEO GSE96583",
        [f"{GEO}/series/GSE96nnn/GSE96583/suppl/{file}" for file in SHA256]
        + [f"{GEO}/samples/GSM2560nnn/{file.split('_')[0]}/suppl/{file}.gz" for file in KANG_SAMPLES],
        read_kang,
        {"label_keys": ["cell_type", "condition"]},
    ),
    "pancreas_endocrinogenesis": Recipe(
        "Bastidas-Ponce et al. 2019, Development 146:dev173849; GEO GSE132188",
        ["https://github.com/theislab/scvelo_notebooks/raw/master/data/Pancreas/endocrinogenesis_day15.h5ad"],
        read_pancreas,
    ),
    "paul15": Recipe("Paul et al. 2015, Cell 163:1663; GEO GSE72857", [], read_paul15),
    "pbmc3k": Recipe(
        "10x Genomics, 3k PBMCs", [f"{TENX}/pbmc3k/pbmc3k_filtered_gene_bc_matrices.tar.gz"], read_pbmc3k
    ),
    "zheng_facs_pbmc": Recipe(
        "Zheng et al. 2017, Nat Commun 8:14049; SRA SRP073767",
        [f"{TENX}/{name}/{name}_filtered_gene_bc_matrices.tar.gz" for name in ZHENG_POPULATIONS],
        read_zheng,
    ),
}
