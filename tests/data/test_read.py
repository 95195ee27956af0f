"""Cells from .h5ad files and from the layouts of 10x Genomics."""

import gzip

import h5py
import numpy as np
import pytest
from forms import write_mtx
from scipy import sparse

from wbdit_diffusers.data import load_pbmc, read_cells


def test_read_cells_names_the_file(pbmc_path, tmp_path):
    assert read_cells(pbmc_path).shape == (700, 765)
    with pytest.raises(FileNotFoundError, match="no file .*absent.h5ad"):
        read_cells(tmp_path / "absent.h5ad")
    (tmp_path / "text.h5ad").write_text("no cells")
    with pytest.raises(ValueError, match="text.h5ad cannot be read as an .h5ad, .zarr or 10x file"):
        read_cells(tmp_path / "text.h5ad")


def test_pbmc_are_integer_counts_with_labels():
    pbmc = load_pbmc()
    assert pbmc.shape == (700, 765) and list(pbmc.obs) == ["cell_type", "phase"]
    assert sparse.isspmatrix_csr(pbmc.X) and (pbmc.X.data == np.rint(pbmc.X.data)).all() and pbmc.X.min() == 0


# ==================== 10x Genomics ====================

BARCODES = ["AAAC-1", "AAAG-1", "AACC-1", "AACG-1"]
GENES = [("ENSG1", "CD3E"), ("ENSG2", "TBCE"), ("ENSG3", "TBCE"), ("ENSG4", "NKG7")]
ANTIBODY = ("CD4_TotalSeq", "CD4")
COUNTS = np.random.default_rng(0).poisson(1.0, (len(BARCODES), len(GENES) + 1))  # the antibody is the last column


@pytest.fixture
def write(tmp_path):
    """Functions that write the cells in each layout and return the path."""
    kinds = ["Gene Expression"] * len(GENES) + ["Antibody Capture"]

    def folder(compressed: bool):
        name, features = ("features.tsv", [*GENES, ANTIBODY]) if compressed else ("genes.tsv", GENES)
        rows = ["\t".join([*ids, kind] if compressed else ids) for ids, kind in zip(features, kinds)]
        path = tmp_path / "filtered_feature_bc_matrix"
        write_mtx(path, COUNTS[:, : len(features)], {name: rows, "barcodes.tsv": BARCODES})
        if compressed:
            for file in list(path.iterdir()):
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
                file.unlink()
        return path

    def h5():
        path = tmp_path / "filtered_feature_bc_matrix.h5"
        matrix = sparse.csr_matrix(COUNTS)  # cells × features in CSR is 10x's features × cells in CSC
        ids, names = zip(*GENES, ANTIBODY)
        texts = {"id": ids, "name": names, "feature_type": kinds, "genome": ["GRCh38"] * len(ids)}
        with h5py.File(path, "w") as file:
            file["matrix/barcodes"] = np.array(BARCODES, dtype="S")
            file["matrix/shape"] = np.array(COUNTS.T.shape, dtype=np.int32)
            for key in ("data", "indices", "indptr"):
                file[f"matrix/{key}"] = getattr(matrix, key)
            for key, values in texts.items():
                file[f"matrix/features/{key}"] = np.array(values, dtype="S")
        return path

    return {"h5": h5, "mtx": lambda: folder(False), "mtx.gz": lambda: folder(True)}


@pytest.mark.parametrize("layout", ["h5", "mtx", "mtx.gz"])
@pytest.mark.filterwarnings("error:Variable names are not unique")
def test_gene_expression_by_unique_symbols(layout, write):
    cells = read_cells(write[layout]())
    assert cells.obs_names.tolist() == BARCODES
    assert cells.var_names.tolist() == ["CD3E", "TBCE", "TBCE-1", "NKG7"]
    assert cells.var["gene_ids"].tolist() == [gene_id for gene_id, _ in GENES]
    assert sparse.isspmatrix_csr(cells.X) and np.array_equal(cells.X.toarray(), COUNTS[:, :-1])


@pytest.mark.parametrize("layout, name", [("mtx.gz", "features.tsv.gz"), ("mtx", "barcodes.tsv"), ("h5", None)])
def test_damaged_files_are_named(layout, name, write):
    path = write[layout]()
    if name is None:
        path.write_bytes(path.read_bytes()[:2000])
    else:
        (path / name).unlink()
    with pytest.raises(ValueError, match=f"{path.name} cannot be read") as error:
        read_cells(path)
    assert "\n" not in str(error.value)


def test_an_unknown_entry_of_uns_does_not_stop_the_reading(pbmc, tmp_path, caplog):
    with_raw = pbmc[:, :50].copy()
    with_raw.raw = pbmc
    with_raw.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        file["uns"].create_group("odd").attrs.update({"encoding-type": "other", "encoding-version": "9"})
    cells = read_cells(tmp_path / "cells.h5ad")
    assert (cells.X != with_raw.X).nnz == 0 and (cells.raw.X != pbmc.X).nnz == 0 and cells.obs.equals(pbmc.obs)
