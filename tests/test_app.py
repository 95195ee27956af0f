"""The page in the browser: its handlers, what they refuse, and the page itself in Chromium."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pytest
import scanpy as sc
import torch
from conftest import make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.cli import main
from wbdit_diffusers.data import CellSplit


gr = pytest.importorskip("gradio")

from wbdit_diffusers.app import compare, figures, handlers, launch, uploads  # noqa: E402


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(compare, "NUM_TREES", 20)


@pytest.fixture(scope="module")
def folder(pbmc, tmp_path_factory):
    """A pipeline of random weights, with the split.json that a training leaves beside it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-pbmc"
    split = CellSplit.draw(pbmc, label_key="cell_type")
    pipe = make_pipeline(split.apply(pbmc)[0], codec="program", label_keys=["cell_type"], num_genes=60)
    pipe.save_pretrained(folder)
    split.save(folder)
    return folder


# ==================== Uploads ====================


def foreign(path):
    path.write_bytes(b"PK\x03\x04 a spreadsheet")


def pickled(path):
    path.write_bytes(b"\x80\x04\x95cos\nsystem\n")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:3000])


def elsewhere(path):
    with h5py.File(path, "a") as file:
        file["uns/secret"] = h5py.ExternalLink("/etc/other.h5", "/")


def raw_bytes_of_another_file(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/secret", (16,), dtype="u1", external=[("/etc/passwd", 0, 16)])


def virtual(path):
    with h5py.File(path, "a") as file:
        layout = h5py.VirtualLayout((4,), dtype="f4")
        layout[:] = h5py.VirtualSource("/etc/other.h5", "X", (4,))
        file.create_virtual_dataset("uns/secret", layout)


def unpacks(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("uns/zeros", (2**20, 2**12), dtype="u1", chunks=(1, 2**12))


def no_cells(path):
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(3)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (foreign, "is no .h5ad file"),
        (pickled, "is no .h5ad file"),
        (cut_off, "is damaged"),
        (elsewhere, "keeps uns/secret in another file"),
        (raw_bytes_of_another_file, "keeps uns/secret in another file"),
        (virtual, "keeps uns/secret in another file"),
        (unpacks, "holds 4.0 GB once unpacked"),
        (no_cells, "(cannot be read|is empty)"),
    ],
)
def test_files_that_are_refused(spoil, message, pbmc, tmp_path):
    path = tmp_path / "cells.h5ad"
    pbmc[:20, :30].write_h5ad(path)
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        uploads.read_upload(path)
    assert str(tmp_path) not in str(error.value) and "cells.h5ad" in str(error.value)
    handlers._read.cache_clear()
    with pytest.raises(gr.Error, match=message):
        handlers.choose_file(str(path))


def test_large_files_are_refused(pbmc_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_MEGABYTES", 0)
    with pytest.raises(ValueError, match="and this page takes 0"):
        uploads.read_upload(pbmc_path)


def test_a_file_is_described_and_its_labels_offered(pbmc, tmp_path):
    cells = pbmc[:, :100].copy()
    cells.obs["barcode"], cells.obs["depth"], cells.obs["one"] = cells.obs_names, 1.0, "same"
    cells.write_h5ad(tmp_path / "mine.h5ad")
    line, columns = handlers.choose_training_file(str(tmp_path / "mine.h5ad"))
    assert line == "700 cells × 100 genes in mine.h5ad"
    assert columns["value"] == "cell_type"
    assert columns["choices"] == ["cell_type", "phase", handlers.NO_LABELS]


# ==================== Comparing ====================


def test_a_pipeline_is_described(folder):
    line, types, num_steps, compare_with = handlers.describe(str(folder))
    assert "60 genes · 10 types · 6 gene programs" in line
    assert len(types) == 10 and num_steps == 4 and compare_with == handlers.PBMC
    assert handlers.describe(None)[1:] == ([], 20, handlers.NOTHING)


@pytest.mark.parametrize("with_real", [True, False])
def test_every_figure_is_drawn(with_real, folder, pbmc):
    pipe = handlers.load_pipeline(str(folder))
    cells = pipe(num_cells=200, generator=torch.Generator().manual_seed(0)).cells
    groups, genes = compare.shown_groups(pipe, cells, pbmc if with_real else None)
    assert [len(group.types) for group in groups] == [700, 200][not with_real :]
    assert all(group.activities.shape == (len(group.types), 6) for group in groups)
    points = figures.joint_map(groups, "PCA")
    assert points.shape == (sum(len(group.types) for group in groups), 2)
    figure = figures.map_figure(groups, points, "PCA")
    assert figure.axes[-1].get_title().startswith("200 generated cells")
    assert figures.marker_figure(groups, genes) is not None
    assert figures.program_figure(groups, cells.uns["programs"]["name"]) is not None


def test_cells_without_types_or_programs_have_fewer_figures(pbmc):
    pipe = make_pipeline(pbmc, num_genes=200)  # unconditional, without programs
    cells = pipe(num_cells=30, generator=torch.Generator().manual_seed(0)).cells
    groups, genes = compare.shown_groups(pipe, cells, pbmc[:100])
    figures.map_figure(groups, figures.joint_map(groups, "PCA"), "PCA")
    assert figures.marker_figure(groups, genes) is None and figures.program_figure(groups, np.array([])) is None
    judgement = compare.judge_quickly(pipe, pbmc[:100], "absent")
    assert judgement.num_cells == 50 and not judgement.is_held_out


def test_the_quick_judgement_has_its_reference(folder, pbmc):
    judgement = compare.judge_quickly(handlers.load_pipeline(str(folder)), pbmc, folder)
    assert judgement.is_held_out and judgement.num_cells == len(CellSplit.load(folder).test)
    assert judgement.generated > 0.75 > judgement.reference  # random weights
    figure = figures.judgement_figure(judgement)
    assert f"{judgement.generated:.2f}" in "".join(text.get_text() for text in figure.axes[0].texts)


def test_real_cells_of_another_kind_are_refused(folder, pbmc):
    pipe = handlers.load_pipeline(str(folder))
    cells = pipe(num_cells=10, generator=torch.Generator().manual_seed(0)).cells
    mouse = pbmc[:30].copy()
    mouse.var_names = mouse.var_names.str.title() + "x"
    with pytest.raises(ValueError, match="0 of the pipeline's 60 genes"):
        compare.shown_groups(pipe, cells, mouse)
    scaled = pbmc[:30].copy()
    scaled.X = scaled.X * 0.5
    with pytest.raises(ValueError, match="integer"):
        compare.shown_groups(pipe, cells, scaled)
    with pytest.raises(ValueError, match="no column 'cell_type'"):
        compare.judge_quickly(pipe, ad.AnnData(pbmc.X, var=pbmc.var), folder)


# ==================== Handlers ====================


def call(folder, **changes):
    arguments = {"name": str(folder), "types": [], "num_cells": 30, "guidance_scale": 1.0, "num_inference_steps": 2}
    return arguments | {"seed": 0, "source": handlers.NOTHING, "upload": None} | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_cells": -5}, "from 1 to 5,000 on this page, not -5"),
        ({"num_cells": 10**7}, "not 10,000,000"),
        ({"num_cells": None}, "not no number"),
        ({"seed": -1}, "seed is a number from 0"),
        ({"name": ""}, "Choose a pipeline first"),
        ({"name": "/nowhere/<b>model</b>"}, "/nowhere/&lt;b&gt;model&lt;/b&gt; cannot be loaded"),
        ({"source": handlers.FILE}, "Upload a file to compare with"),
        ({"types": ["Neuron"]}, "'Neuron' is not a cell_type"),
    ],
)
def test_wrong_input_is_a_message(changes, message, folder):
    with pytest.raises(gr.Error, match=message) as error:
        handlers.generate(**call(folder, **changes))
    assert "\n" not in error.value.message and not error.value.print_exception


def test_a_mistake_of_ours_is_a_message_too(folder, monkeypatch):
    monkeypatch.setattr(handlers, "load_pipeline", lambda name: 1 / 0)
    with pytest.raises(gr.Error, match="ZeroDivisionError: this is a mistake of the page"):
        handlers.generate(**call(folder))


def test_several_types_get_as_many_cells_each(folder):
    drawn, summary, download, *_ = handlers.generate(**call(folder, types=["CD34+", "Dendritic"], num_cells=31))
    assert drawn.cells.obs["cell_type"].value_counts()[["CD34+", "Dendritic"]].tolist() == [16, 15]
    assert "31 cells × 60 genes" in summary and ad.read_h5ad(download["value"]).n_obs == 31


@pytest.mark.slow
def test_training_on_a_small_file(pbmc, tmp_path):
    """From a file to a pipeline that is chosen, and to one to take home; and how it says what is wrong."""
    cells = pbmc[:200, :100].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    request = SimpleNamespace(session_hash="session")
    *_, last = handlers.train(str(tmp_path / "cells.h5ad"), "cell_type", 0.05, request)
    status, curves, archive, pipeline, source, upload = last
    assert status.startswith("**Done**") and source == handlers.FILE and upload == str(tmp_path / "cells.h5ad")
    assert [len(line.get_ydata()) > 0 for line in curves.axes[0].lines] == [True, True]  # training, held out
    assert "my-cells/model_index.json" in zipfile.ZipFile(archive["value"]).namelist()
    # How many programs are searched for hangs on the time that stage one has: the folder says how many were found.
    num_programs = json.loads((Path(pipeline["value"]) / "codec" / "config.json").read_text())["num_programs"]
    assert f"10 types · {num_programs} gene programs" in handlers.describe(pipeline["value"])[0]
    assert not handlers.running


@pytest.mark.slow
def test_a_training_can_be_stopped(pbmc_path):
    training = handlers.train(str(pbmc_path), "cell_type", 1, SimpleNamespace(session_hash="session"))
    assert next(training)[0] == "**Training**" and next(training)[0].endswith("fitting the gene programs")
    run = handlers.running["session"]
    handlers.stop_training(SimpleNamespace(session_hash="session"))
    assert next(training)[0].startswith("**Stopped**")
    assert list(training) == [] and run.process.returncode != 0 and not run.parent.exists() and not handlers.running


def test_a_training_that_fails_says_why(pbmc_path, tmp_path, monkeypatch):
    """In the last line that it wrote."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'UserWarning: a foreign one'\necho 'train: These are no counts.' >&2\nexit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(gr.Error, match="^'These are no counts.'$"):
        list(handlers.train(str(pbmc_path), handlers.NO_LABELS, 0.05, SimpleNamespace(session_hash="a")))


def test_trainings_that_are_refused(pbmc, pbmc_path, monkeypatch):
    request = SimpleNamespace(session_hash="session")
    with pytest.raises(gr.Error, match="Upload the cells to train on first"):
        next(handlers.train(None, "cell_type", 1, request))
    with pytest.raises(gr.Error, match="minutes are at most 10"):
        next(handlers.train(str(pbmc_path), "cell_type", 1000, request))
    monkeypatch.setattr(handlers, "MAX_TRAINING_CELLS", 100)
    with pytest.raises(gr.Error, match="has 700 cells, and this page trains on 100 at most"):
        handlers.choose_training_file(str(pbmc_path))


def test_a_model_that_is_none_ends_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["app", "--model", str(tmp_path)])
    assert error.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("wbdit app: ")


# ==================== The page itself ====================

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def browser(tmp_path):
    """A page in Chromium with an empty profile."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    if subprocess.run([executable, "--version"], capture_output=True).returncode:
        pytest.skip(f"{executable} does not start")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=executable, args=FLAGS, viewport={"width": 1440, "height": 900}
        )
        context.set_default_timeout(60_000)
        yield context.pages[0]
        context.close()


@pytest.mark.slow
def test_a_click_makes_cells(folder, browser, tmp_path):
    """The picture appears, the file downloads and opens in Scanpy, wrong input shows a message; nothing leaves."""
    (tmp_path / "notes.h5ad").write_text("no cells")
    page = launch(folder, wait=False)
    try:
        hosts, failures = set(), []
        browser.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        browser.on("pageerror", lambda error: failures.append(error))
        browser.goto(page.local_url)
        browser.wait_for_selector("text=60 genes · 10 types")

        browser.click("text=Guidance, steps, seed")
        browser.get_by_label("PCA").check()
        browser.fill("#num_cells input", "40")
        browser.click("#generate")
        picture = browser.wait_for_selector("#map img")
        assert picture.evaluate("image => image.naturalWidth") > 500
        with browser.expect_download() as download:
            browser.click("text=Download .h5ad")
        download.value.save_as(tmp_path / "cells.h5ad")
        for tab, selector in (("Markers", "#markers"), ("Programs", "#programs img"), ("Quality", "#judgement img")):
            browser.click(f"role=tab[name='{tab}']")
            browser.wait_for_selector(selector)
        browser.wait_for_selector("text=A random forest tells 142 generated cells")

        browser.fill("#num_cells input", "-5")
        browser.click("#generate")
        browser.wait_for_selector("text=The number of cells is from 1 to 5,000 on this page, not -5.")
        browser.click("#source >> text=my file")
        browser.set_input_files("#upload input[type=file]", tmp_path / "notes.h5ad")
        browser.wait_for_selector("text=notes.h5ad is no .h5ad file")
        assert "Traceback" not in browser.content()
        assert hosts == {page.local_url.split("/")[2]} and hosts.pop().startswith("127.0.0.1:") and not failures
    finally:
        page.close()

    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.shape == (40, 60) and cells.uns["wbdit"]["model_id"] == "tiny-pbmc"
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=5)
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    again = pipe(num_cells=40, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).cells
    assert (ad.read_h5ad(tmp_path / "cells.h5ad").X != again.X).nnz == 0
