import ast
import re

import anndata as ad
import numpy as np
import pytest
import yaml
from conftest import make_pipeline
from scipy import sparse

from wbdit_diffusers import __version__
from wbdit_diffusers.hub import render_model_card


def test_card_says_how_to_load_the_model_and_what_it_makes(program_pipe, pbmc):
    card = render_model_card(program_pipe, "me/wbdit-pbmc")
    metadata = yaml.safe_load(str(card).split("---")[1])
    assert metadata["library_name"] == "diffusers" and "single-cell" in metadata["tags"]
    text = card.text
    assert text.lstrip().startswith("# wbdit-pbmc\n") and f"wbdit_diffusers {__version__}" in text
    assert 'ScRNAGenerationPipeline.from_pretrained("me/wbdit-pbmc")' in text
    first = sorted(pbmc.obs["cell_type"].unique())[0]
    assert f'pipe(num_cells=1000, cell_types="{first}")' in text
    assert f"765 genes ({', '.join(pbmc.var_names[:3])}, …) with integer counts in `X`" in text
    for key in ("cell_type", "phase"):
        assert f'`obs["{key}"]` is one of: {", ".join(sorted(pbmc.obs[key].unique()))}.' in text
    assert "{{" not in text and "{%" not in text and "None" not in text


@pytest.mark.parametrize(
    "codec, row, block",
    [
        (
            "program",
            "ProgramCodec: 6 gene programs, likelihood nb_mixture",
            "with steps that descend (contraction, ISTA)",
        ),
        ("expression", "ExpressionCodec: 765 genes, standardize=True", "as published (MSSA, ISTA)"),
    ],
)
def test_table_of_the_network(pbmc, codec, row, block):
    pipe = make_pipeline(pbmc, codec=codec)
    lines = render_model_card(pipe, "me/wbdit-pbmc").text.splitlines()
    assert f"| codec | {row} |" in lines and f"| block | White-Box DiT, {block} |" in lines
    assert "| heads × head dimension | 2 × 8 |" in lines
    assert f"| parameters | {sum(parameter.numel() for parameter in pipe.denoiser.parameters()):,} |" in lines
    assert "| scheduler | DDPMScheduler, prediction_type v_prediction |" in lines
    assert "| default steps | 4 |" in lines


def test_an_unconditional_model_of_log_values(pbmc):
    log_values = ad.AnnData(
        sparse.csr_matrix(np.log2(pbmc.X.toarray() / np.linspace(0.5, 5, pbmc.n_vars) + 1)), obs=pbmc.obs, var=pbmc.var
    )
    text = render_model_card(make_pipeline(log_values, values="log"), "me/log").text
    assert "with log expression in `X`" in text
    assert "cell_types" not in text and 'obs["' not in text and "integer counts" not in text


def test_training_and_evaluation_are_there_when_they_are_given(pipe):
    bare = render_model_card(pipe, "me/wbdit-pbmc").text
    assert "## Training" not in bare and "## Evaluation" not in bare
    training = {"cells": 560, "steps": 3000}
    text = render_model_card(pipe, "me/wbdit-pbmc", training=training, evaluation="| excess | 0.05 |").text
    assert "## Training\n\n| | |\n|---|---|\n| cells | 560 |\n| steps | 3000 |\n" in text
    assert "## Evaluation\n\n| excess | 0.05 |\n" in text
    assert text.index("## The network") < text.index("## Training") < text.index("## Limits")


def test_names_can_stand_as_nothing_but_names(pbmc):
    """A label, a gene or a repository id is text of someone else: no code, markup, table or metadata."""
    label = 'B"); import os; os.system("x") #\n```\n# Hacked\n<script>x</script> | [a](https://x.y) `b` {{ 7 * 7 }}'
    adata = pbmc.copy()
    adata.obs["type`\n## key"] = [label if i % 2 else "c **bold**" for i in range(adata.n_obs)]
    adata.var_names = ["<b>gene</b>|", *adata.var_names[1:]]
    pipe = make_pipeline(adata, codec="program", label_keys=["type`\n## key"])
    repo_id = 'me/"]\n---\nlicense: evil'
    card = render_model_card(pipe, repo_id, training={"row | <i>": "a\n\n# b"})
    text = card.text
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.unparse(call.func) for call in calls].count("pipe") == 2 and len(calls) == 3
    strings = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {repo_id, pipe.processor.config.categories[0][0]} <= strings
    assert (
        yaml.safe_load(str(card).split("---")[1])["library_name"] == "diffusers"
        and "license" not in card.data.to_dict()
    )
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## What it makes", "## The network", "## Training", "## Limits"]
    assert text.count("```") == 2 and r"{{ 7 \* 7 }}" in text
    for markup in ("<script", "<b>", "<i>", "](https://x.y", " **bold"):
        assert markup not in text.replace(code, "")  # where it is in a string of the code
    assert r"| row \| &lt;i&gt; | a \# b |" in text
