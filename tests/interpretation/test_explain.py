"""`wbdit explain`: what it measures has the answer that is known, and the page holds it."""

import json
import re

import anndata as ad
import numpy as np
import pytest
from conftest import make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.cli import main
from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.interpretation import explain, fit_gaussian_mixture
from wbdit_diffusers.interpretation.denoising import (
    measure_explained_variance,
    measure_type_stability,
)
from wbdit_diffusers.interpretation.interventions import with_denoiser
from wbdit_diffusers.interpretation.page import find_warnings
from wbdit_diffusers.sampling import make_scheduler, training_scheduler


@pytest.fixture(scope="module")
def explained(pbmc, tmp_path_factory) -> dict:
    """The command's files, for a pipeline with random weights and the solver of a trained one."""
    folder = tmp_path_factory.mktemp("explained")
    pipe = make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"])
    pipe.scheduler = make_scheduler("dpmsolver++", training_scheduler("v_prediction").config)
    pipe.save_pretrained(folder / "pipe <b>")
    CellSplit.draw(pbmc, 0.2, label_key="cell_type", seed=0).save(folder / "pipe <b>")
    pbmc.write_h5ad(folder / "cells.h5ad")
    main(["explain", str(folder / "pipe <b>"), "--dataset", str(folder / "cells.h5ad"), "--output_dir", str(folder)])
    return {
        "report": json.loads((folder / "explain.json").read_text()),
        "page": (folder / "explain.html").read_text(),
        "cells": ad.read_h5ad(folder / "explain.h5ad"),
    }


def test_the_report_has_every_part_with_its_control(explained):
    report = explained["report"]
    assert report["num_cells"] == 142 and len(report["programs"]) == 6
    assert {row["network"] for row in report["layers"]} == {"trained", "untrained"}
    assert {row["denoiser"] for row in report["type_stability"]} == {"network", "closed_form"}
    sources = ("network", "closed_form", "training cells")
    assert {(row["program"], row["source"]) for row in report["interventions"]} == {
        (program, name) for program in ("program_0", "program_1") for name in sources
    }
    # The closed form knows nearly all where there is little noise, nothing at the end, and more than random weights.
    first, last = report["explained_variance"][0], report["explained_variance"][-1]
    assert first["closed_form_mean"] > 0.8 and abs(last["closed_form_mean"]) < 0.05
    assert all(row["closed_form_mean"] > row["network_mean"] for row in report["explained_variance"][:5])
    of_training = {row["program"]: row["responses"] for row in report["interventions"] if "held" not in row}
    for row in report["interventions"]:
        if row["source"] == "training cells":
            assert row["responses"][int(row["program"][-1])] == pytest.approx(1)  # on itself
            continue
        assert row["held"] < 0.2
        # Programs follow as they do in the cells that the closed form was fitted to.
        assert np.corrcoef(row["responses"], of_training[row["program"]])[0, 1] > 0.9


def test_programs_separate_types(explained):
    by_type = {row["type"]: row for row in explained["report"]["types"]}
    assert set(by_type) <= set(explained["cells"].obs["cell_type"]) and len(by_type) > 4
    assert all(row["auc"] >= row["second_auc"] >= 0.5 and 0 <= row["markers"] <= 50 for row in by_type.values())


def test_the_cells_are_for_scanpy(explained):
    cells = explained["cells"]
    assert cells.obsm["X_programs"].shape == (142, 6) and cells.obsm["X_umap"].shape == (142, 2)
    assert cells.varm["programs"].shape == (cells.n_vars, 6) and list(cells.uns["programs"]) == ["explained", "name"]


def test_the_page_holds_all_figures_and_escapes_names(explained):
    page = explained["page"]
    assert len(re.findall(r"data:image/png;base64,iVBOR", page)) == 7
    assert "<b>" not in page and "pipe &lt;b&gt;" in page
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page).replace("nance", "")


def test_every_figure_has_a_caption_and_nothing_is_claimed_of_an_unfit_model(explained):
    page, captions = explained["page"], re.findall("<figcaption>(.*?)</figcaption>", explained["page"], re.DOTALL)
    assert len(captions) == 7 and all("Look for" in caption for caption in captions)
    # Random weights explain less than the closed form.
    assert "Do not draw conclusions" in page and "variance than the closed form." in page
    assert page.count('class="finding"') == page.count("Not a finding, because of the warning above.") > 3
    assert "follows the descent that it is derived" not in page
    fit = {"gain_of_network": 0.01, "explained_trained": 0.5, "explained_untrained": 0.4}
    assert find_warnings({"warning": ""}, fit) == []
    assert find_warnings({"warning": "This pipeline is not fit."}, fit) == ["This pipeline is not fit."]
    assert len(find_warnings({"warning": ""}, fit | {"gain_of_network": -0.1, "explained_untrained": 0.6})) == 2


def test_the_report_has_the_warning_of_the_folder(pbmc, tmp_path):
    make_pipeline(pbmc, codec="program").save_pretrained(tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({"training": {"warning": "only 300 denoiser steps."}}))
    report, _ = explain(ScRNAGenerationPipeline.from_pretrained(tmp_path), pbmc[:500], pbmc[500:530])
    assert report["warning"].endswith("only 300 denoiser steps.")


def test_a_model_without_labels_is_explained(pbmc):
    pipe = make_pipeline(pbmc, codec="program")
    report, cells = explain(pipe, pbmc[:500], pbmc[500:560])
    assert report["types"] == [] and "changed" not in report["type_stability"][0] and cells.n_obs == 60


def test_the_closed_form_agrees_with_itself_and_much_noise_changes_all_cells(pbmc):
    pipe = make_pipeline(pbmc, codec="program")
    gaussian_mixture, latents = fit_gaussian_mixture(pipe, pbmc), pipe.encode_cells(pbmc)
    denoisers = {"network": gaussian_mixture, "closed_form": gaussian_mixture}
    rows = measure_explained_variance(denoisers, pipe, latents, None)
    assert all(row["agreement"] == 1 and row["network"] == row["closed_form"] for row in rows)
    types = pbmc.obs["cell_type"].astype(str).to_numpy()
    first, *_, last = measure_type_stability(denoisers, pipe, latents[:200], latents, types)
    assert first["changed"] < 0.5 * first["chance"] and last["changed"] > 0.7 * last["chance"]
    assert first["correlation_mean"] > 0.8 and abs(last["correlation_mean"]) < 0.3


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("codec", "no gene programs: it was trained with ExpressionCodec"),
        ("mixture", "no network to explain: its denoiser is a GaussianMixtureDenoiser"),
        ("cells", "5 held-out cells have labels that the model knows: at least 20 are needed"),
    ],
)
def test_what_cannot_be_explained_is_refused(spoil, message, program_pipe, pipe, pbmc):
    chosen = pipe if spoil == "codec" else program_pipe
    if spoil == "mixture":
        chosen = with_denoiser(program_pipe, fit_gaussian_mixture(program_pipe, pbmc))
    with pytest.raises(ValueError, match=message):
        explain(chosen, pbmc[:500], pbmc[500:505] if spoil == "cells" else pbmc[500:])


def test_too_few_cells_are_refused_by_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["explain", str(tmp_path), "--dataset", "cells.h5ad", "--max_cells", "3"])
    assert error.value.code == 2 and "--max_cells 3: Input should be greater" in capsys.readouterr().err
    assert np.size(list(tmp_path.iterdir())) == 0
