"""The page in the browser, through what its controls do."""

import zipfile
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.cli import main
from wbdit_diffusers.data import CellSplit


gr = pytest.importorskip("gradio")

from wbdit_diffusers.app import handlers, launch  # noqa: E402


REQUEST = SimpleNamespace(session_hash="session")


@pytest.fixture(scope="module")
def folder(pbmc, tmp_path_factory):
    """A pipeline of random weights with the split.json of its training."""
    folder = tmp_path_factory.mktemp("models") / "tiny-pbmc"
    split = CellSplit.draw(pbmc, label_key="cell_type")
    pipe = make_pipeline(split.apply(pbmc)[0], codec="program", label_keys=["cell_type"], num_genes=60)
    pipe.save_pretrained(folder)
    split.save(folder)
    return folder


# ==================== Files ====================


def link(file):
    file["uns/secret"] = h5py.ExternalLink("/etc/other.h5", "/")


def external(file):
    file.create_dataset("uns/secret", (16,), dtype="u1", external=[("/etc/passwd", 0, 16)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "X", (4,))
    file.create_virtual_dataset("uns/secret", layout)


def large(file):
    file.create_dataset("uns/zeros", (2**20, 2**12), dtype="u1", chunks=(1, 2**12))


def second_name(file):
    file["uns/secret"] = file["X"]


def nested_names(file):
    """2²⁰ paths of 20 groups."""
    group = file["uns"]
    for _ in range(20):
        group["b"] = inner = group.create_group("a")
        group = inner


def link_to_root(file):
    file["uns/root"] = file["/"]


def tall(file):
    """30 million cells without values."""
    names = file["obs"].attrs["_index"]
    del file["X"], file["obs"][names]
    shape, encoding = (3 * 10**7, 30), {"encoding-type": "csc_matrix", "encoding-version": "0.1.0"}
    file.create_group("X").attrs.update({**encoding, "shape": shape})
    file["X"].update({"data": np.ones(1, "f4"), "indices": np.zeros(1, "i4"), "indptr": np.array([0] + [1] * 30)})
    column = file["obs"].create_dataset(names, shape[:1], dtype="S8", chunks=(10**6,), compression="gzip")
    column.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def one_string_often(file):
    """4,096 references to one string of a megabyte."""
    text = file.create_dataset("uns/text", data=["x" * 2**20] + [""] * 4095, dtype=h5py.string_dtype())
    file.flush()
    offset, path = text.id.get_offset(), file.filename
    file.close()
    with open(path, "r+b") as content:
        content.seek(offset)
        first = content.read(16)
        content.seek(offset)
        content.write(first * 4096)


def sequences(file):
    file.create_dataset("uns/odd", (3,), dtype=h5py.vlen_dtype("i4"))


def references(file):
    file.create_dataset("uns/odd", (3,), dtype=[("names", h5py.string_dtype()), ("of", h5py.ref_dtype)])


def damaged(file):
    file["X/indptr"][3] = 10**6


LINK = "uns/secret is a link"


@pytest.mark.parametrize(
    "add, message",
    [
        (link, LINK),
        (external, LINK),
        (virtual, LINK),
        (second_name, "is a link"),
        (nested_names, "is a link"),
        (link_to_root, "uns/root is a link"),
        (large, "holds more than 2 GB"),
        (tall, "holds more than 2 GB"),
        (one_string_often, "holds more than 2 GB"),
        (sequences, "uns/odd holds neither numbers nor a list of names"),
        (references, "uns/odd holds neither numbers nor a list of names"),
        (damaged, "cells.h5ad can't be read"),
    ],
)
def test_unsafe_files_are_refused(add, message, pbmc, tmp_path):
    pbmc[:20, :30].write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        add(file)
    with pytest.raises(gr.Error, match=message):
        handlers.choose_file(str(tmp_path / "cells.h5ad"))


def test_tables_of_scanpy_are_read(pbmc, tmp_path):
    """They have names of genes in several columns."""
    cells = pbmc[:60, :30].copy()
    cells.uns["rank_genes_groups"] = {"names": np.array([("CD3E", "NKG7")] * 5, dtype=[("B", "O"), ("T", "O")])}
    cells.uns["title"] = "PBMCs"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert handlers.choose_file(str(tmp_path / "cells.h5ad")) == "60 cells × 30 genes in cells.h5ad"


@pytest.mark.parametrize("size", [0, 3000])
def test_damaged_files_are_refused_without_their_folder(size, pbmc, tmp_path):
    path = tmp_path / "cells.h5ad"
    pbmc[:20, :30].write_h5ad(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(gr.Error, match="cells.h5ad can't be read") as error:
        handlers.choose_file(str(path))
    assert str(tmp_path) not in error.value.message and "\n" not in error.value.message


def test_training_file_offers_its_label_columns(pbmc, tmp_path, monkeypatch):
    cells = pbmc[:, :100].copy()
    cells.obs["barcode"], cells.obs["depth"], cells.obs["one"] = cells.obs_names, 1.0, "same"
    path = str(tmp_path / "mine.h5ad")
    cells.write_h5ad(path)
    line, columns = handlers.choose_training_file(path)
    assert line == "700 cells × 100 genes in mine.h5ad"
    assert columns["value"] == "cell_type" and columns["choices"] == ["cell_type", "phase", handlers.NO_TYPES]
    monkeypatch.setattr(handlers, "MAX_TRAINING_CELLS", 100)
    with pytest.raises(gr.Error, match="at most 100 cells"):
        handlers.choose_training_file(path)


# ==================== Generation ====================


def generate(model, **changes):
    """Everything that the button shows, and the file as it was when it appeared."""
    arguments = {"cell_types": [], "num_cells": 30, "guidance_scale": 1.0, "num_inference_steps": 2, "seed": 0}
    arguments |= {"method": "pca", "source": handlers.NOTHING, "upload": None} | changes
    outputs = handlers.generate(str(model), **arguments)
    summary, download, *_ = next(outputs)
    cells, (maps, markers, last) = ad.read_h5ad(download["value"]), outputs
    return summary, cells, maps[2], markers[3], markers[4], last[5]


def test_choosing_a_pipeline_describes_it(folder):
    line, types, num_steps, source = handlers.choose_pipeline(f" {folder} ", handlers.NOTHING)
    assert line.startswith("60 genes · 10 cell types · 6 gene programs")
    assert len(types["choices"]) == 10 and num_steps == 4 and source == handlers.PBMC


def test_generated_cells_are_compared_with_real_cells(folder, pbmc):
    types = ["Dendritic", "CD34+"]
    summary, cells, maps, markers, programs, verdict = generate(
        folder, cell_types=types, num_cells=41, source=handlers.PBMC
    )
    assert "41 cells × 60 genes" in summary
    assert cells.obs["cell_type"].value_counts()[types].tolist() == [21, 20]
    assert [axis.get_title() for axis in maps.axes] == ["700 real cells", "41 generated cells"]
    assert markers is not None and len(programs.axes[0].get_yticks()) == 6
    assert f"from {len(CellSplit.load(folder).test)} held-out real cells" in verdict and "did not see" in verdict
    generated_auc, reference_auc = (float(part[:4]) for part in verdict.split("**")[1::2])
    assert generated_auc > 0.75 > reference_auc  # random weights
    again = ScRNAGenerationPipeline.from_pretrained(folder)(
        num_cells=41,
        cell_types=cells.obs["cell_type"].tolist(),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).cells
    assert (cells.X != again.X).nnz == 0


def test_pipelines_without_types_and_programs(pbmc, tmp_path):
    make_pipeline(pbmc, num_genes=200).save_pretrained(tmp_path / "plain")
    pbmc[:100].write_h5ad(tmp_path / "cells.h5ad")
    upload = str(tmp_path / "cells.h5ad")
    *_, maps, markers, programs, verdict = generate(tmp_path / "plain", source=handlers.FILE, upload=upload)
    assert len(maps.axes) == 2 and markers is None and programs is None
    assert "from 50 held-out real cells" in verdict and "Training may have seen" in verdict


def test_few_cells_without_comparison(folder):
    _, cells, maps, *_, verdict = generate(folder, num_cells=2, method="umap")
    assert cells.n_obs == 2 and len(maps.axes) == 1 and verdict.startswith("Choose real cells")


def test_wrong_input_is_a_message_of_one_line(folder, pbmc, tmp_path):
    foreign, scaled, unlabelled = pbmc[:30].copy(), pbmc[:30].copy(), ad.AnnData(pbmc.X, var=pbmc.var)
    foreign.var_names = foreign.var_names + "x"
    scaled.X = scaled.X * 0.5
    wrong = [
        ({"num_cells": None}, "the number of cells"),
        ({"model": ""}, "Choose a pipeline"),
        ({"model": "/nowhere/<b>model</b>"}, "/nowhere/&lt;b&gt;model&lt;/b&gt; cannot be loaded"),
        ({"source": handlers.FILE}, "upload the file"),
        ({"cell_types": ["Neuron"]}, "'Neuron'"),
    ]
    messages = ["genes of this model", "integer", "no column 'cell_type'"]
    for i, (cells, message) in enumerate(zip((foreign, scaled, unlabelled), messages)):
        cells.write_h5ad(tmp_path / f"{i}.h5ad")
        wrong.append(({"source": handlers.FILE, "upload": str(tmp_path / f"{i}.h5ad")}, message))
    for changes, message in wrong:
        with pytest.raises(gr.Error, match=message) as error:
            generate(**{"model": folder, **changes})
        assert "\n" not in error.value.message


# ==================== Training ====================


@pytest.mark.slow
def test_training_on_a_small_file(pbmc, tmp_path):
    """From a file with an awkward name to a chosen pipeline and an archive without the names of cells."""
    path = str(tmp_path / "--seed 7 'my' cells.h5ad")
    pbmc[:200, :100].write_h5ad(path)
    *_, (status, losses, archive, pipeline, source, upload) = handlers.train(path, "cell_type", 0.05, REQUEST)
    assert status.startswith("**Done**") and source == handlers.FILE and upload == path
    assert [line.get_label() for line in losses.axes[0].lines] == ["training cells", "held-out cells"]
    assert all(len(line.get_ydata()) for line in losses.axes[0].lines)
    names = zipfile.ZipFile(archive["value"]).namelist()
    assert "my-cells/model_index.json" in names and not any("split.json" in name for name in names)
    zipfile.ZipFile(archive["value"]).extractall(tmp_path)
    assert "10 cell types" in handlers.choose_pipeline(str(tmp_path / "my-cells"), source)[0]
    *_, verdict = generate(pipeline["value"], source=source, upload=upload)
    assert "did not see" in verdict and not handlers.running


@pytest.mark.slow
def test_a_training_can_be_stopped(pbmc_path):
    training = handlers.train(str(pbmc_path), "cell_type", 1, REQUEST)
    assert next(training)[0].endswith("fitting the gene programs")
    run = handlers.running["session"]
    handlers.stop_training(REQUEST)
    (status, *_), *rest = training
    assert status.startswith("**Stopped**") and not rest
    assert run.process.poll() is not None and not handlers.running


@pytest.mark.slow
def test_a_training_that_fails_says_why(pbmc, tmp_path):
    cells = pbmc[:50, :30].copy()
    cells.X = cells.X * 0.5
    cells.write_h5ad(tmp_path / "scaled.h5ad")
    with pytest.raises(gr.Error, match="Upload the counts of at most 5,000 cells"):
        next(handlers.train(None, "", 1, REQUEST))
    with pytest.raises(gr.Error, match="integer") as error:
        list(handlers.train(str(tmp_path / "scaled.h5ad"), "", 0.05, REQUEST))
    assert "\n" not in error.value.message and not error.value.message.startswith("wbdit train")


# ==================== The page ====================


def test_a_folder_without_a_pipeline_ends_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["app", "--model", str(tmp_path)])
    assert error.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("wbdit app: ")


@pytest.mark.slow
def test_the_served_page_generates_cells(folder, tmp_path):
    """Through HTTP on loopback, with the limits of the page."""
    from gradio_client import Client

    page = launch(folder, wait=False)
    try:
        client = Client(page.local_url, download_files=str(tmp_path), verbose=False)
        arguments = [str(folder), [], 40, 1.0, 4, 0, "pca", handlers.NOTHING, None]
        job = client.submit(*arguments, api_name="/generate")
        job.result(timeout=120)
        (file,) = {
            output[1]["value"] for output in job.outputs() if isinstance(output[1], dict) and output[1].get("value")
        }
        assert ad.read_h5ad(file).shape == (40, 60)
        with pytest.raises(Exception, match="greater than maximum value 5000"):
            client.predict(*arguments[:2], 10**7, *arguments[3:], api_name="/generate")
    finally:
        page.close()
