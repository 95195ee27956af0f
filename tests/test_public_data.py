"""examples/public_data.py on small files of the published layouts; the files themselves can't be fetched here."""

import gzip
import io
import tarfile

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from public_data import RECIPES, ZHENG_POPULATIONS, fetch, main
from scipy import sparse
from scipy.io import mmwrite


HNSCC = """\
\tHN28_P1\tHN28_P2\tHN25_P3\tHN25_P4\tHN26_P5\tHN26_P6
processed by Maxima enzyme\t1\t1\t0\t0\t0\t1
Lymph node\t0\t0\t1\t0\t0\t0
classified  as cancer cell\t1\t0\t0\t0\t0\t0
classified as non-cancer cells\t0\t1\t1\t1\t1\t0
non-cancer cell type\t0\tFibroblast\t-Fibroblast\tT cell\tEndothelial\t0
'C9orf152'\t0\t1.5\t0\t2.25\t0\t0
'RPS11'\t6.04\t5.5\t0\t0\t1\t1
'KRT14'\t9.0\t0\t0.5\t0\t0\t0
"""


def test_hnscc(tmp_path):
    with gzip.open(tmp_path / "GSE103322_HNSCC_all_data.txt.gz", "wt") as file:
        file.write(HNSCC)
    cells = fetch("hnscc", tmp_path)
    cells.write_h5ad(tmp_path / "hnscc.h5ad")
    # Neither the endothelial cell nor the unclassified one
    assert cells.obs_names.tolist() == ["HN28_P1", "HN28_P2", "HN25_P3", "HN25_P4"]
    assert cells.obs["cell_type"].tolist() == ["malignant", "fibroblast", "fibroblast", "immune"]
    assert cells.var_names.tolist() == ["C9orf152", "RPS11", "KRT14"]
    expected = [[0, 6.04, 9.0], [1.5, 5.5, 0], [0, 0, 0.5], [2.25, 0, 0]]
    np.testing.assert_allclose(cells.X.toarray(), expected, rtol=1e-6)


@pytest.fixture
def kang_folder(tmp_path):
    counts = {"GSM2560248_2.1": np.array([[1, 0], [0, 2], [5, 0]]), "GSM2560249_2.2": np.array([[3], [0], [4]])}
    barcodes = {"GSM2560248": ["AAACATACAATGCC-1", "AAACATACATTTCC-1"], "GSM2560249": ["AAACATACAATGCC-1"]}
    for name, matrix in counts.items():
        buffer = io.BytesIO()
        mmwrite(buffer, sparse.coo_matrix(matrix))
        (tmp_path / f"{name}.mtx.gz").write_bytes(gzip.compress(buffer.getvalue()))
    for name, rows in barcodes.items():
        (tmp_path / f"{name}_barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    genes = "ENSG1\tISG15\nENSG2\tCD3D\nENSG3\tISG15\n"
    (tmp_path / "GSE96583_batch2.genes.tsv.gz").write_bytes(gzip.compress(genes.encode()))
    table = (
        "tsne1\ttsne2\tind\tstim\tcluster\tcell\tmultiplets\n"
        "AAACATACAATGCC-1\t0\t0\t107\tctrl\t5\tCD4 T cells\tsinglet\n"
        "AAACATACATTTCC-1\t0\t0\t1016\tctrl\t9\tCD14+ Monocytes\tdoublet\n"
        "AAACATACAATGCC-11\t0\t0\t107\tstim\t9\tB cells\tsinglet\n"
    )
    (tmp_path / "GSE96583_batch2.total.tsne.df.tsv.gz").write_bytes(gzip.compress(table.encode()))
    return tmp_path


def test_kang(kang_folder):
    cells = RECIPES["kang_ifnb_pbmc"].read(kang_folder)
    assert cells.obs["cell_type"].tolist() == ["CD4 T cells", "B cells"]  # without the doublet
    assert cells.obs["condition"].tolist() == ["CTRL", "STIM"]
    assert cells.obs["donor"].tolist() == ["107", "107"]
    cells.write_h5ad(kang_folder / "kang.h5ad")
    assert cells.obs_names.is_unique and cells.var_names.is_unique
    np.testing.assert_array_equal(cells.X.toarray(), [[1, 0, 5], [3, 0, 4]])


def test_kang_with_cells_in_another_order(kang_folder):
    (kang_folder / "GSM2560249_barcodes.tsv.gz").write_bytes(gzip.compress(b"TTTTTTTTTTTTTT-1"))
    with pytest.raises(ValueError, match="GSM2560249 are not those"):
        RECIPES["kang_ifnb_pbmc"].read(kang_folder)


def write_10x(path, matrix: np.ndarray, barcodes: list[str]):
    """An archive as of Cell Ranger 1: two columns of genes."""
    folder = path.with_suffix(".unpacked")
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", sparse.coo_matrix(matrix.T))
    for name, lines in {"genes.tsv": ["ENSG1\tMS4A1", "ENSG2\tLYZ"], "barcodes.tsv": barcodes}.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "filtered_matrices_mex/hg19")


def test_zheng(tmp_path):
    for i, name in enumerate(ZHENG_POPULATIONS):
        write_10x(
            tmp_path / f"{name}_filtered_gene_bc_matrices.tar.gz", np.array([[i, 1], [2, 3]]), ["AAA-1", "CCC-1"]
        )
    cells = fetch("zheng_facs_pbmc", tmp_path)
    assert cells.shape == (20, 2) and cells.obs_names.is_unique
    assert cells.obs["cell_type"].value_counts().tolist() == [2] * 10
    assert cells[cells.obs["cell_type"] == "CD34+"].X.toarray().tolist() == [[2, 1], [2, 3]]


def test_pbmc3k_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["public_data.py", "pbmc3k"])
    folder = tmp_path / "published" / "pbmc3k"
    folder.mkdir(parents=True)
    write_10x(folder / "pbmc3k_filtered_gene_bc_matrices.tar.gz", np.array([[1, 0], [0, 2]]), ["AAA-1", "CCC-1"])
    processed = ad.AnnData(np.zeros((1, 1)), obs=pd.DataFrame({"louvain": ["B cells"]}, index=["CCC-1"]))
    processed.write_h5ad(folder / "pbmc3k_processed.h5ad")
    main()
    assert "2 cells × 2 genes in pbmc3k.h5ad: 10x Genomics" in capsys.readouterr().out
    cells = ad.read_h5ad(tmp_path / "pbmc3k.h5ad")
    assert cells.obs["cell_type"].tolist() == ["unlabelled", "B cells"]
    assert cells.var_names.tolist() == ["MS4A1", "LYZ"]


def test_pancreas(tmp_path):
    obs = pd.DataFrame({"clusters": ["Ductal", "Beta"]}, index=["a", "b"])
    source = ad.AnnData(np.zeros((2, 2)), obs=obs, layers={"spliced": np.array([[1.0, 0.0], [0.0, 3.0]])})
    source.write_h5ad(tmp_path / "endocrinogenesis_day15.h5ad")
    cells = fetch("pancreas_endocrinogenesis", tmp_path)
    assert cells.obs["cell_type"].tolist() == ["Ductal", "Beta"]
    assert cells.X.toarray().tolist() == [[1, 0], [0, 3]]


def test_paul15(tmp_path):
    """The layout that Scanpy reads."""
    (tmp_path / "paul15").mkdir()
    with h5py.File(tmp_path / "paul15" / "paul15.h5", "w") as file:
        file["data.debatched"] = np.array([[1, 0, 2], [0, 3, 0]])
        file["data.debatched_rownames"] = ["Prss34;Alias", "Irf8"]
        file["data.debatched_colnames"] = ["W1", "W2", "W3"]
        file["cluster.id"] = np.array([[1, 7, 19]])
        file["info.genes_strings"] = ["Irf8", "Prss34", "Corrupted"]
    cells = fetch("paul15", tmp_path)
    assert cells.obs["cell_type"].tolist() == ["1Ery", "7MEP", "19Lymph"]
    assert cells[:, "Prss34"].X.toarray().ravel().tolist() == [1, 0, 2]


def test_the_list_and_a_dataset_without_a_recipe(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["public_data.py", "list"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == list(RECIPES) and "GSE103322" in lines[0]
    monkeypatch.setattr("sys.argv", ["public_data.py", "pbmc4k"])
    with pytest.raises(SystemExit):
        main()
    assert "invalid choice: 'pbmc4k'" in capsys.readouterr().err
