"""Public datasets of the paper's reproduction, from the files that their authors published to an .h5ad file.

    pip install pooch
    python examples/public_data.py list
    python examples/public_data.py pbmc3k --output pbmc3k.h5ad
    wbdit train --dataset pbmc3k.h5ad --label_keys cell_type --output_dir wbdit-pbmc3k

Downloaded files stay in --folder. `hnscc` holds log values (`wbdit train --values log`), and `kang_ifnb_pbmc` has a
second label key, `condition`.
"""

import argparse
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pooch
import scanpy as sc
from anndata.utils import make_index_unique
from scipy import sparse
from scipy.io import mmread

from wbdit_diffusers.data import read_cells


class Recipe(NamedTuple):
    """A public dataset, and how its AnnData is made from the published files."""

    source: str  # publication and accession
    files: list[str]  # addresses
    read: Callable[[Path], ad.AnnData]  # from the folder of these files


def fetch(name: str, folder: Path) -> ad.AnnData:
    """Downloads and reads one of the [`RECIPES`], whose published files stay in the folder."""
    for address in RECIPES[name].files:
        file = address.rsplit("/", 1)[1]
        pooch.retrieve(address, known_hash=SHA256.get(file), fname=file, path=folder, progressbar=True)
    sc.settings.datasetdir = folder  # of the files that Scanpy downloads
    return RECIPES[name].read(folder)


def read_hnscc(folder: Path) -> ad.AnnData:
    """Head and neck cancer: malignant cells, fibroblasts and immune cells, log2(TPM/10 + 1). Others are left out."""
    # One column per cell: first rows of annotation, then one row per gene, with its name in quotes
    path, type_row = folder / "GSE103322_HNSCC_all_data.txt.gz", "non-cancer cell type"
    table = pd.read_csv(path, sep="\t", index_col=0, nrows=20, dtype=str)
    table.index = table.index.astype(str).str.split().str.join(" ").str.lower()
    names = dict.fromkeys(["T cell", "B cell", "Macrophage", "Dendritic", "Mast"], "immune")
    names["Fibroblast"] = "fibroblast"
    cell_type = table.loc[type_row].astype(str).str.strip(" -").map(names)  # "-Fibroblast" occurs
    cell_type = cell_type.mask(table.loc["classified as cancer cell"].astype(float) == 1, "malignant")
    # Numbers are read without the annotation: 140 million values as text would take 10 GB.
    skipped, dtype = range(1, table.index.get_loc(type_row) + 2), dict.fromkeys(table.columns, np.float32)
    genes = pd.read_csv(path, sep="\t", index_col=0, skiprows=skipped, dtype=dtype)
    var = pd.DataFrame(index=make_index_unique(genes.index.astype(str).str.strip("'\"").rename(None)))
    obs = pd.DataFrame({"cell_type": cell_type.astype("category")})
    return ad.AnnData(sparse.csr_matrix(genes.to_numpy().T), obs, var)[cell_type.notna()].copy()


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
    cells = _read_10x(folder / f"pbmc3k{ARCHIVE}")
    labels = sc.datasets.pbmc3k_processed().obs["louvain"].astype(str)
    cells.obs["cell_type"] = labels.reindex(cells.obs_names).fillna("unlabelled").astype("category")
    return cells


def read_zheng(folder: Path) -> ad.AnnData:
    """Ten populations of PBMCs, sorted by FACS: about 94,000 cells."""
    parts = {name: _read_10x(folder / f"{name}{ARCHIVE}") for name in ZHENG_POPULATIONS}
    cells = ad.concat(parts, merge="same", label="population", index_unique="-")
    cells.obs["cell_type"] = cells.obs["population"].map(ZHENG_POPULATIONS).astype("category")
    return cells


def read_pancreas(folder: Path) -> ad.AnnData:
    """Endocrine cells of the mouse pancreas at E15.5: spliced counts."""
    return _with_types(ad.read_h5ad(folder / "endocrinogenesis_day15.h5ad"), "clusters", "spliced")


def read_paul15(folder: Path) -> ad.AnnData:
    """Mouse myeloid progenitors, MARS-seq, in the 19 clusters of the publication, by Scanpy's recipe."""
    return _with_types(sc.datasets.paul15(), "paul15_clusters")


def _with_types(source: ad.AnnData, column: str, layer: str | None = None) -> ad.AnnData:
    """The counts and the types of another AnnData, and nothing else."""
    obs, counts = source.obs[[column]].set_axis(["cell_type"], axis=1), source.layers[layer] if layer else source.X
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=source.var[[]])


def _read_10x(path: Path) -> ad.AnnData:
    """A Cell Ranger archive of matrix.mtx, genes.tsv and barcodes.tsv, in any folder."""
    folder = path.with_name(path.name.removesuffix(".tar.gz"))
    folder.mkdir(exist_ok=True)
    with tarfile.open(path) as archive:  # by name alone: nothing in an archive becomes a path
        for name in ("matrix.mtx", "genes.tsv", "barcodes.tsv"):
            (member,) = (one for one in archive.getmembers() if one.isfile() and Path(one.name).name == name)
            (folder / name).write_bytes(archive.extractfile(member).read())
    return read_cells(folder)


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
GEO = "https://ftp.ncbi.nlm.nih.gov/geo"
TENX, ARCHIVE = "https://cf.10xgenomics.com/samples/cell-exp/1.1.0", "_filtered_gene_bc_matrices.tar.gz"
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
    ),
    "kang_ifnb_pbmc": Recipe(
        "Kang et al. 2018, Nat Biotechnol 36:89; GEO GSE96583",
        [f"{GEO}/series/GSE96nnn/GSE96583/suppl/{file}" for file in SHA256]
        + [f"{GEO}/samples/GSM2560nnn/{file.split('_')[0]}/suppl/{file}.gz" for file in KANG_SAMPLES],
        read_kang,
    ),
    "pancreas_endocrinogenesis": Recipe(
        "Bastidas-Ponce et al. 2019, Development 146:dev173849; GEO GSE132188",
        ["https://github.com/theislab/scvelo_notebooks/raw/master/data/Pancreas/endocrinogenesis_day15.h5ad"],
        read_pancreas,
    ),
    "paul15": Recipe("Paul et al. 2015, Cell 163:1663; GEO GSE72857", [], read_paul15),
    "pbmc3k": Recipe("10x Genomics, 3k PBMCs", [f"{TENX}/pbmc3k/pbmc3k{ARCHIVE}"], read_pbmc3k),
    "zheng_facs_pbmc": Recipe(
        "Zheng et al. 2017, Nat Commun 8:14049; SRA SRP073767",
        [f"{TENX}/{name}/{name}{ARCHIVE}" for name in ZHENG_POPULATIONS],
        read_zheng,
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["list", *RECIPES])
    parser.add_argument("--output", type=Path, help="The .h5ad file to write. Default: NAME.h5ad.")
    parser.add_argument("--folder", type=Path, default=Path("published"), help="Folder of the downloaded files.")
    args = parser.parse_args()
    if args.name == "list":
        return print("\n".join(f"{name}: {recipe.source}" for name, recipe in RECIPES.items()))
    output, cells = args.output or Path(f"{args.name}.h5ad"), fetch(args.name, args.folder / args.name)
    cells.write_h5ad(output)
    print(f"{cells.n_obs} cells × {cells.n_vars} genes in {output}: {RECIPES[args.name].source}.")


if __name__ == "__main__":
    main()
