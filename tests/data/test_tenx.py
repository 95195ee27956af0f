"""Cells in the layouts of 10x Genomics are accepted wherever an .h5ad file is."""

import gzip

import h5py
import numpy as np
import pytest
from scipy import io, sparse

from wbdit_diffusers.data import read_cells


BARCODES = ["AAAC-1", "AAAG-1", "AACC-1", "AACG-1"]
GENES = [("ENSG1", "CD3E"), ("ENSG2", "TBCE"), ("ENSG3", "TBCE"), ("ENSG4", "NKG7")]
ANTIBODY = ("CD4_TotalSeq", "CD4")
COUNTS = np.random.default_rng(0).poisson(1.0, (len(BARCODES), len(GENES) + 1))  # the antibody is the last column


@pytest.fixture
def write(tmp_path):
    """Functions that write the cells in each layout and return the path."""

    def folder(compressed: bool):
        name, features = ("features.tsv", [*GENES, ANTIBODY]) if compressed else ("genes.tsv", GENES)
        kinds = ["Gene Expression"] * len(GENES) + ["Antibody Capture"]
        rows = ["\t".join([*ids, kind] if compressed else ids) for ids, kind in zip(features, kinds)]
        path = tmp_path / "filtered_feature_bc_matrix"
        path.mkdir()
        io.mmwrite(path / "matrix.mtx", sparse.coo_matrix(COUNTS[:, : len(features)].T))
        for file, lines in ((name, rows), ("barcodes.tsv", BARCODES)):
            (path / file).write_text("\n".join(lines) + "\n")
        if compressed:
            for file in list(path.iterdir()):
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
                file.unlink()
        return path

    def h5():
        path = tmp_path / "filtered_feature_bc_matrix.h5"
        matrix = sparse.csr_matrix(COUNTS)  # cells × features in CSR is 10x's features × cells in CSC
        ids, names = zip(*GENES, ANTIBODY)
        with h5py.File(path, "w") as file:
            group = file.create_group("matrix")
            group["barcodes"] = np.array(BARCODES, dtype="S")
            group["shape"] = np.array(COUNTS.T.shape, dtype=np.int32)
            for key in ("data", "indices", "indptr"):
                group[key] = getattr(matrix, key)
            features = group.create_group("features")
            features["id"], features["name"] = np.array(ids, dtype="S"), np.array(names, dtype="S")
            kinds = ["Gene Expression"] * len(GENES) + ["Antibody Capture"]
            features["feature_type"] = np.array(kinds, dtype="S")
            features["genome"] = np.array(["GRCh38"] * len(ids), dtype="S")
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


@pytest.mark.parametrize(
    "layout, remove, write_instead, message",
    [
        ("mtx.gz", "features.tsv.gz", None, "has no features.tsv.gz, which belongs to"),
        ("mtx.gz", "barcodes.tsv.gz", "barcodes.tsv", "has barcodes.tsv and no barcodes.tsv.gz: compress it"),
        ("mtx", "matrix.mtx", "matrix.mtx.gz", "has genes.tsv and matrix.mtx.gz: uncompress it"),
        ("mtx", "barcodes.tsv", "barcodes.tsv", "cannot be read as cells of 10x Genomics"),
    ],
)
def test_incomplete_folders_are_named(layout, remove, write_instead, message, write):
    path = write[layout]()
    (path / remove).unlink()
    if write_instead is not None:
        (path / write_instead).touch()
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        read_cells(path)
    assert "\n" not in str(error.value)


def test_other_folders_and_damaged_files_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder that `wbdit prepare` wrote, nor has it the matrix.mtx"):
        read_cells(tmp_path)
    path = write["h5"]()
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"\.h5 cannot be read"):
        read_cells(path)
