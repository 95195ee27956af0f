"""A training that starts from another pipeline: genes and labels are matched by name, never by position."""

import logging

import numpy as np
import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import AnnDataSource
from wbdit_diffusers.pretrained import PBMC
from wbdit_diffusers.processing import ScRNAProcessor
from wbdit_diffusers.training import CodecConfig, TrainingConfig, fit_codec, train
from wbdit_diffusers.training.init_from import Start


QUICK = {"codec_max_steps": 20, "decoder_steps": 20, "label_keys": ["cell_type"], "init_from": PBMC}


@pytest.fixture(scope="module")
def old() -> ScRNAGenerationPipeline:
    return ScRNAGenerationPipeline.from_pretrained(PBMC)


@pytest.fixture(scope="module")
def few(pbmc):
    """120 cells whose genes are in another order, with a gene that is new and without some that are old."""
    cells = pbmc[np.random.default_rng(0).permutation(700)[:120]].copy()
    cells = cells[:, np.random.default_rng(1).permutation(765)[:700]].copy()
    names = cells.var_names.tolist()
    names[3] = "A new gene"
    cells.var_names = names
    return cells


def start(config: CodecConfig, cells) -> tuple[Start, ScRNAProcessor]:
    processor = ScRNAProcessor(label_keys=config.label_keys).fit(cells)
    return Start.load(config, processor, AnnDataSource(cells).var_names), processor


def test_loadings_are_those_of_the_same_genes(old, few):
    processor, codec = fit_codec(few, CodecConfig(**QUICK, freeze_codec=True))
    genes = processor.var_names.intersection(old.processor.var_names)
    assert "A new gene" in processor.var_names and len(genes) == len(processor.var_names) - 1 > 600
    new_rows, old_rows = processor.var_names.get_indexer(genes), old.processor.var_names.get_indexer(genes)
    new, before = (one.heads["log_rates"].weight.detach() for one in (codec, old.codec))
    torch.testing.assert_close(new[new_rows], before[old_rows])
    torch.testing.assert_close(codec.program_axes, old.codec.program_axes)
    # The new gene has learned something.
    assert new[processor.var_names.get_loc("A new gene")].abs().max() > 0


def test_latents_of_a_frozen_codec_mean_the_same(old, few, pbmc):
    _, codec = fit_codec(few, CodecConfig(**QUICK, freeze_codec=True))
    processor = ScRNAProcessor(label_keys=["cell_type"]).fit(few)
    parts = {**old.components, "processor": processor, "codec": codec}
    parts["denoiser"] = make_pipeline(few, codec="program", label_keys=["cell_type"]).denoiser.from_config(
        old.denoiser.config, condition_sizes=processor.condition_sizes
    )
    pipe = ScRNAGenerationPipeline(**parts | {"gaussian_mixture": None})
    others = pbmc[~pbmc.obs_names.isin(few.obs_names)]
    a, b = pipe.encode_cells(others[:, others.var_names.isin(few.var_names)].copy()), old.encode_cells(others)
    correlations = [np.corrcoef(x, y)[0, 1] for x, y in zip(a[:, :-1].T, b[:, :-1].T)]
    assert np.mean(correlations) > 0.9  # 65 genes are missing


def test_a_start_is_better_than_nothing(few, pbmc):
    """The codec of a few cells describes other cells better if it starts from that of many."""
    others = pbmc[~pbmc.obs_names.isin(few.obs_names)][:200].copy()
    losses = []
    for init_from in (PBMC, None):
        config = CodecConfig(**QUICK | {"init_from": init_from, "codec_max_steps": 200, "decoder_steps": 100})
        processor, codec = fit_codec(few, config)
        cells = others[:, others.var_names.isin(processor.var_names)].copy()
        matrix, sizes = processor.select(cells)
        values, sizes = torch.from_numpy(matrix.toarray()), torch.from_numpy(sizes).float()
        genes = torch.from_numpy(processor.var_names.isin(cells.var_names))
        with torch.no_grad():
            losses.append(-codec.decode(codec.encode(values, sizes)).log_prob(values, genes).mean().item())
    assert losses[0] < losses[1] - 1


def test_labels_are_matched_by_name_or_by_the_flag(old, few, caplog):
    few = few.copy()
    few.obs["cell_type"] = few.obs["cell_type"].astype(str).replace({"CD19+ B": "B cell", "CD34+": "Stem"})
    config = CodecConfig(**QUICK, init_labels={"B cell": "CD19+ B"})
    with caplog.at_level(logging.INFO):
        one, processor = start(config, few)
    assert "new labels of cell_type are Stem" in caplog.text
    names, known = processor.config.categories[0], old.processor.config.categories[0]
    places = {name: place for name, place in zip(names, one.labels["cell_type"])}
    assert places["Stem"] == -1 and known[places["B cell"]] == "CD19+ B"
    assert all(known[place] == name for name, place in places.items() if name in known)
    denoiser = type(old.denoiser).from_config(old.denoiser.config, condition_sizes=processor.condition_sizes)
    before = denoiser.condition_embedders[0].weight.clone()
    one.start_denoiser(denoiser)
    weight, of_old = denoiser.condition_embedders[0].weight, old.denoiser.condition_embedders[0].weight
    torch.testing.assert_close(weight[names.index("B cell")], of_old[known.index("CD19+ B")])
    torch.testing.assert_close(weight[names.index("Stem")], before[names.index("Stem")])
    torch.testing.assert_close(weight[-1], of_old[-1])  # the null label
    torch.testing.assert_close(denoiser.blocks[0].attn.subspaces, old.denoiser.blocks[0].attn.subspaces)


def test_a_training_starts_and_repeats(few, tmp_path):
    settings = QUICK | {"max_train_steps": 4, "train_batch_size": 16}
    pipe = train(few, TrainingConfig(output_dir=tmp_path / "a", **settings))
    cells = pipe(num_cells=3).cells
    assert cells.n_vars == len(pipe.processor.var_names) and np.isfinite(cells.X.data).all()
    assert "--init_from pbmc68k_reduced" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init_labels": {"B cell": "CD19+ B"}}, "--init_labels B cell: no training cell has this label"),
        ({"init_from": "no-such-folder"}, "no-such-folder"),
        ({"codec": "expression"}, "need gene programs"),
    ],
)
def test_mistakes_are_named_before_the_work(change, message, few, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        train(few, TrainingConfig(output_dir=tmp_path, **QUICK | change))


def test_other_names_of_genes_are_refused(few, tmp_path):
    other = few.copy()
    other.var_names = [f"ENSG{i}" for i in range(other.n_vars)]
    with pytest.raises(ValueError, match="no gene has a name of that pipeline"):
        fit_codec(other, CodecConfig(**QUICK))
