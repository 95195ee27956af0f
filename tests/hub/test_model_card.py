import ast
import json
import re

import anndata as ad
import numpy as np
import pytest
import yaml
from conftest import make_pipeline
from reports import small_report
from scipy import sparse

from wbdit_diffusers import __version__
from wbdit_diffusers.hub import CardFacts, render_model_card, write_model_card


SECTIONS = ["Data", "Output", "Network", "Training", "Quality", "Limits and misuse", "Citation"]


def headings(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_card_of_a_pipeline_of_which_nothing_else_is_known(program_pipe, pbmc):
    card = render_model_card(program_pipe, "me/wbdit-pbmc")
    metadata = yaml.safe_load(str(card).split("---")[1])
    assert metadata["library_name"] == "wbdit-diffusers" and {"diffusers", "single-cell"} < set(metadata["tags"])
    assert "model-index" not in metadata
    text = card.text
    assert text.lstrip().startswith("# wbdit-pbmc\n") and f"wbdit_diffusers {__version__}" in text
    assert f"765 genes ({', '.join(pbmc.var_names[:3])}, …) and integer counts in `X`" in text
    assert "{{" not in text and "{%" not in text and "None" not in text
    assert headings(text) == SECTIONS
    assert "not patients" in text and "clinical use" in text and "Memory of the training cells: not measured" in text
    assert "| Dendritic | not stated | 34.3% |" in text
    assert "## Training\n\nNot stated.\n" in text and "## Quality\n\nNot measured." in text


def test_the_example_runs(program_pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program_pipe.save_pretrained("pipeline")
    text = render_model_card(program_pipe, "pipeline").text
    code = text.split("```python\n")[1].split("```")[0].replace("num_cells=1000", "num_cells=3")
    exec(code, {})
    assert ad.read_h5ad("cells.h5ad").shape == (3, 765)


def test_cells_of_each_type(program_pipe, pbmc):
    text = render_model_card(program_pipe, "me/wbdit-pbmc", CardFacts(num_cells=700)).text
    for key in ("cell_type", "phase"):
        for name, number in pbmc.obs[key].value_counts().items():
            assert f"| {name} | {number} | {number / 700:.1%} |" in text


@pytest.mark.parametrize(
    "codec, row, block",
    [
        ("program", "ProgramCodec: 6 gene programs, likelihood nb_mixture", "with descent steps (contraction, ISTA)"),
        ("expression", "ExpressionCodec: 765 genes, standardize=True", "as published (MSSA, ISTA)"),
    ],
)
def test_table_of_the_network(pbmc, codec, row, block):
    pipe = make_pipeline(pbmc, codec=codec)
    text = render_model_card(pipe, "me/wbdit-pbmc").text
    assert f"| codec | {row} |\n" in text and f"{block} |\n" in text and "| heads × head dimension | 2 × 8 |\n" in text
    assert f"| parameters | {pipe.denoiser.num_parameters():,} |\n" in text and "| default steps | 4 |\n" in text
    assert "| scheduler | DDPMScheduler, prediction_type v_prediction |\n" in text


def test_an_unconditional_model_of_log_values(pbmc):
    log_values = sparse.csr_matrix(np.log2(pbmc.X.toarray() / np.linspace(0.5, 5, pbmc.n_vars) + 1))
    pipe = make_pipeline(ad.AnnData(log_values, obs=pbmc.obs, var=pbmc.var), values="log")
    text = render_model_card(pipe, "me/log").text
    assert "and log expression in `X`" in text
    assert "cell_types" not in text and 'obs["' not in text and "integer counts" not in text


def test_names_are_nothing_but_names(pbmc):
    """Labels, genes and repository ids can't add code, markup, table cells or metadata."""
    label = 'B"); import os; os.system("x") #\n```\n# Hacked\n<script>x</script> | [a](https://x.y) `b` {{ 7 * 7 }}'
    adata = pbmc.copy()
    adata.obs["type`\n## key"] = [label if i % 2 else "c **bold**" for i in range(adata.n_obs)]
    adata.var_names = ["<b>gene</b>|", *adata.var_names[1:]]
    pipe = make_pipeline(adata, codec="program", label_keys=["type`\n## key"])
    repo_id = 'me/"]\n---\nlicense: evil'
    facts = CardFacts(data_name="<script>", data_license="`x`\n# title", training={"row | <i>": "a\n\n# b"})
    card = render_model_card(pipe, repo_id, facts)
    code = re.search(r"```python\n(.*?)\n```", card.text, re.DOTALL)[1]
    assert not [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) and node.names[0].name == "os"
    ]
    strings = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {repo_id, pipe.processor.config.categories[0][0]} <= strings
    metadata = yaml.safe_load(str(card).split("\n---\n")[0].removeprefix("---\n"))
    assert metadata["library_name"] == "wbdit-diffusers" and "license" not in metadata
    text = card.text.replace(code, "")
    assert headings(text) == SECTIONS and "\n# title" not in text
    for markup in ("<script", "<b>", "<i>", "](https://x", " **bold"):
        assert markup not in text
    assert r"| row \| &lt;i&gt; | a \# b |" in text and r"| license | \`x\` \# title |" in text


def test_data_training_and_quality(pipe):
    facts = CardFacts(
        data_name="PBMC 3k",
        data_license="CC BY 4.0",
        data_source="10x Genomics",
        num_cells=560,
        command="wbdit train --dataset cells.h5ad",
        training={"steps": 3000},
        report=small_report(765),
        figure="report.png",
    )
    card = render_model_card(pipe, "me/wbdit-pbmc", facts)
    text = card.text
    assert "| name | PBMC 3k |\n| license | CC BY 4.0 |\n| accession or source | 10x Genomics |" in text
    assert "| steps | 3000 |" in text and "```bash\nwbdit train --dataset cells.h5ad\n```" in text
    assert "**0.060 ± 0.010**" in text and "![Generated and held-out cells](report.png)" in text
    assert "| 0.600 ± 0.010 | 0.540 ± 0.000 | 0.620 ± 0.000 |" in text  # generated, real reference, a baseline
    results = card.data.eval_results
    assert {result.dataset_name for result in results} == {"PBMC 3k"}
    values = {result.metric_type: result.metric_value for result in results}
    assert values["excess"] == 0.06 and values["auc_forest"] == 0.6 and values["membership_auc"] == 0.51


def test_a_card_is_written_from_the_folder(program_pipe, tmp_path):
    folder = tmp_path / "wbdit-pbmc"
    program_pipe.save_pretrained(folder)
    (folder / "report.json").write_text(json.dumps(small_report(765)))
    write_model_card(program_pipe, folder)
    text = (folder / "README.md").read_text()
    assert 'from_pretrained("wbdit-pbmc")' in text and "**0.060 ± 0.010**" in text and "report.png" not in text
