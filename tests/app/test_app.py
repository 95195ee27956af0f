"""The page in the browser, through what its controls do."""

import json
import shutil
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
from wbdit_diffusers.evaluation import evaluate
from wbdit_diffusers.evaluation.table import NOT_FIT, excess_and_sd


gr = pytest.importorskip("gradio")

from wbdit_diffusers.app import handlers, launch  # noqa: E402


REQUEST = SimpleNamespace(session_hash="session")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Visible text with a contrast under 4.5, by the formula of WCAG
FAINT_TEXT = """() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
  const rgba = colour => { context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data]; };
  const light = colour => rgba(colour).slice(0, 3).map(v => v / 255).map(v =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) =>
    sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => { for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (rgba(colour)[3] > 200) return colour; } return "white"; };
  return [...document.querySelectorAll("body *")].filter(node => node.checkVisibility({visibilityProperty: true})
      && !node.disabled && !node.closest(".sr-only") && node.getBoundingClientRect().width > 2
      && [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim())).map(node => {
    const [low, high] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => a - b);
    return [(high + 0.05) / (low + 0.05), node.textContent.trim().slice(0, 40), getComputedStyle(node).color,
            behind(node)];
  }).filter(([contrast]) => contrast < 4.5);
}"""


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
    assert columns["value"] == ["cell_type"] and columns["choices"] == ["cell_type", "phase"]
    monkeypatch.setattr(handlers, "MAX_TRAINING_CELLS", 100)
    with pytest.raises(gr.Error, match="at most 100 cells"):
        handlers.choose_training_file(path)


# ==================== Generation ====================


def generate(model, **changes):
    """Everything that the button shows, and the file as it was when it appeared."""
    arguments = {f"labels_{i}": [] for i in range(1, 5)} | {"num_cells": 30, "library_size": None, "seed": 0}
    arguments |= {"guidance_scale": 1.0, "num_inference_steps": 2, "method": "pca"}
    arguments |= {"source": handlers.NOTHING, "upload": None} | changes
    outputs = handlers.generate(str(model), **arguments)
    _, download, *_ = next(outputs)
    cells, (*_, (summary, _, *last)) = ad.read_h5ad(download["value"]), outputs
    return summary, cells, *last


def test_choosing_a_pipeline_describes_it(folder):
    line, num_steps, source, _, *dropdowns = handlers.choose_pipeline(f" {folder} ", handlers.NOTHING)
    assert line.startswith("60 genes · 10 cell types · 6 gene programs") and "not fit for use" not in line
    assert len(dropdowns[0]["choices"]) == 10 and num_steps == 4 and source == handlers.PBMC
    assert [dropdown["visible"] for dropdown in dropdowns] == [True, False, False, False]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("training.json", {"training": {"warning": "only 300 denoiser steps."}}, "only 300 denoiser steps."),
        ("report.json", {"excess": {"generated": {"mean": 0.31}}}, "more easily than real cells, by 0.31"),
    ],
)
def test_an_unfit_pipeline_has_a_warning_everywhere(name, content, reason, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "unfit")
    (tmp_path / "unfit" / name).write_text(json.dumps(content))
    line, *_ = handlers.choose_pipeline(str(tmp_path / "unfit"), handlers.NOTHING)
    summary, cells, *_ = generate(tmp_path / "unfit", num_cells=3)
    for text in (line, summary):
        assert "\n\n> ⚠ This pipeline is not fit for use" in text and reason in text
    assert reason in cells.uns["wbdit"]["warning"]
    assert "excess" not in content or not handlers.read_warning(folder)


def test_cells_by_type_and_condition_with_a_library_size(pbmc, tmp_path):
    """Equally many of each combination; a combination that no training cell has is named."""
    keys = ["cell_type", "phase"]
    make_pipeline(pbmc, codec="program", label_keys=keys, num_genes=60).save_pretrained(tmp_path / "two")
    line, _, _, _, *dropdowns = handlers.choose_pipeline(str(tmp_path / "two"), handlers.NOTHING)
    assert [dropdown["label"] for dropdown in dropdowns] == [*keys, "", ""] and "3 × phase" in line
    types, phases = ["CD34+", "Dendritic"], ["G1", "S"]
    asked = {"labels_1": types, "labels_2": phases, "num_cells": 40}
    summary, cells, *_ = generate(tmp_path / "two", **asked, library_size=5000)
    numbers = cells.obs.groupby(keys, observed=True).size()
    assert len(numbers) == 4 and (numbers == 10).all()
    other = generate(tmp_path / "two", **asked, library_size=500)[1]
    assert cells.obs["library_size"].mean() > 5 * other.obs["library_size"].mean()
    unseen = cells.uns["wbdit"].get("unseen_combinations", [])
    assert ("No training cell has" in summary) == bool(len(unseen))


def test_generated_cells_are_compared_with_real_cells(folder, pbmc):
    types = ["Dendritic", "CD34+"]
    summary, cells, maps, markers, programs, verdict = generate(
        folder, labels_1=types, num_cells=41, source=handlers.PBMC
    )
    assert "41 cells × 60 genes" in summary
    assert cells.obs["cell_type"].value_counts()[types].tolist() == [21, 20]
    assert [axis.get_title() for axis in maps.axes] == ["700 real cells", "41 generated cells"]
    assert markers is not None and len(programs.axes[0].get_yticks()) == 6
    assert f"{len(CellSplit.load(folder).test)} held-out cells" in verdict and "did not see" in verdict
    assert verdict.startswith(f"**{NOT_FIT}**") and NOT_FIT in summary  # random weights
    train, test = CellSplit.load(folder).apply(pbmc)
    report = evaluate(
        ScRNAGenerationPipeline.from_pretrained(folder), train, test, 1, num_inference_steps=2, baselines=False
    )
    assert f"the excess, **{excess_and_sd(report, 'generated')}**" in verdict  # as in `wbdit evaluate`
    by_type = {c.get_label(): tuple(c.get_facecolor()[0]) for c in maps.axes[1].collections if len(c.get_offsets())}
    squares = [c for c in markers.axes[0].collections if c.get_offsets()[0][0] == -1]
    shown = [text.get_text() for text in markers.axes[0].get_yticklabels()]
    assert shown and [tuple(c.get_facecolor()[0]) for c in squares] == [by_type[name] for name in shown]
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
    assert "50 held-out cells" in verdict and "Training may have seen" in verdict


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
        ({"model": "/nowhere/<b>model</b>"}, "There is no folder or file /nowhere/&lt;b&gt;model&lt;/b&gt;"),
        ({"source": handlers.FILE}, "upload the file"),
        ({"labels_1": ["Neuron"]}, "'Neuron'"),
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
    """From a file with an awkward name to a chosen pipeline and an archive that names no cell."""
    path = str(tmp_path / "--seed 7 'my' cells.h5ad")
    pbmc[:200, :100].write_h5ad(path)
    *_, (status, losses, archive, pipeline, source, upload) = handlers.train(path, ["cell_type"], 0.05, REQUEST)
    assert status.startswith("**Done**") and source == handlers.FILE and upload == path
    assert "not fit for use" in status and "not fit for use" in handlers.choose_pipeline(pipeline["value"], source)[0]
    (line,) = losses.axes[0].lines
    assert len(line.get_ydata()) and losses.axes[0].get_ylabel() == "validation loss of the denoiser"
    with zipfile.ZipFile(archive["value"]) as files:
        contents = {name: files.read(name) for name in files.namelist()}
        files.extractall(tmp_path)
    assert "my-cells/model_index.json" in contents and "my-cells/training.json" in contents
    barcodes = [name.encode() for name in pbmc.obs_names[:200]]
    assert not [name for name, content in contents.items() if any(barcode in content for barcode in barcodes)]
    line = handlers.choose_pipeline(str(tmp_path / "my-cells"), source)[0]
    assert "10 cell types" in line and "not fit for use" in line
    *_, verdict = generate(pipeline["value"], source=source, upload=upload)
    assert "did not see" in verdict and not handlers.running


@pytest.mark.slow
def test_a_training_can_be_stopped(pbmc_path):
    training = handlers.train(str(pbmc_path), ["cell_type"], 1, REQUEST)
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
        next(handlers.train(None, [], 1, REQUEST))
    with pytest.raises(gr.Error, match="integer") as error:
        list(handlers.train(str(tmp_path / "scaled.h5ad"), [], 0.05, REQUEST))
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
        arguments = [str(folder), [], [], [], [], 40, None, 1.0, 4, 0, "pca", handlers.NOTHING, None]
        job = client.submit(*arguments, api_name="/generate")
        job.result(timeout=120)
        (file,) = {
            output[1]["value"] for output in job.outputs() if isinstance(output[1], dict) and output[1].get("value")
        }
        assert ad.read_h5ad(file).shape == (40, 60)
        with pytest.raises(Exception, match="greater than maximum value 5000"):
            client.predict(*arguments[:5], 10**7, *arguments[6:], api_name="/generate")
    finally:
        page.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read(scheme, folder):
    """Text has a contrast of 4.5, nothing overflows a phone, and a figure scrolls instead of shrinking."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("Chromium is not on this machine")
    page = launch(folder, wait=False)
    try:
        with sync_api.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            view = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            view.goto(f"{page.local_url}?__theme={scheme}")
            view.get_by_label("nothing").check()
            view.get_by_role("button", name="Generate", exact=True).click()
            view.wait_for_selector(".figure img", timeout=120_000)
            assert view.evaluate("document.querySelector('.figure img').getBoundingClientRect().height") > 300
            for tab in ("Markers", "Programs"):  # were not open when their figures were made
                view.get_by_role("tab", name=tab).click()
                view.locator(".figure:visible img").wait_for(timeout=60_000)
            view.set_viewport_size({"width": 390, "height": 844})
            for tab in ("Generate", "Train on my cells", "About"):
                view.get_by_role("tab", name=tab).click()
                assert not view.evaluate(FAINT_TEXT)
                assert view.evaluate("document.documentElement.scrollWidth") <= 390
            browser.close()
    finally:
        page.close()
