"""What users of `wbdit` get wrong: one line each, exit code 2, and nothing is written."""

import re
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import make_pipeline

from wbdit_diffusers.cli import main
from wbdit_diffusers.data import CellSplit


@pytest.fixture(scope="module")
def files(pbmc, tmp_path_factory) -> Path:
    """Models and cells, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    pbmc = pbmc[:, :100].copy()
    split = CellSplit.draw(pbmc, label_key="cell_type")
    train, test = split.apply(pbmc)
    pipe = make_pipeline(train, codec="program", label_keys=["cell_type", "phase"], num_genes=30)
    pipe.save_pretrained(folder / "model")
    split.save(folder / "model")
    make_pipeline(train, num_genes=30).save_pretrained(folder / "expression")  # unconditional, without a split
    for name in ("truncated", "other split"):
        shutil.copytree(folder / "model", folder / name)
    weights = folder / "truncated" / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    CellSplit(["absent-1"], ["absent-2"]).save(folder / "other split")
    pbmc.write_h5ad(folder / "pbmc.h5ad")
    train[:100].copy().write_h5ad(folder / "train.h5ad")
    test[:50].copy().write_h5ad(folder / "test.h5ad")
    other = pbmc[:50].copy()
    other.var_names = [f"other{i}" for i in range(other.n_vars)]
    other.write_h5ad(folder / "other genes.h5ad")
    ad.AnnData(pbmc.X, obs=pbmc.obs[["phase"]], var=pbmc.var).write_h5ad(folder / "without types.h5ad")
    damaged = pbmc.copy()
    damaged.X.data[0] = np.nan
    damaged.write_h5ad(folder / "nan.h5ad")
    halves = pbmc.copy()
    halves.X = halves.X * 0.5
    halves.write_h5ad(folder / "halves.h5ad")
    content = (folder / "pbmc.h5ad").read_bytes()
    (folder / "cut.h5ad").write_bytes(content[: len(content) // 2])
    (folder / "text.h5ad").write_text("no cells")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("")
    return folder


GENERATE = "generate MODEL --output OUT/a.h5ad"
EVALUATE = "evaluate MODEL --output_dir OUT/report --num_samples 1 --dataset"
FILES = "evaluate FILES/test.h5ad --output_dir OUT/report --train FILES/train.h5ad"
EXPLAIN = "explain MODEL --output_dir OUT/inside --dataset"
TRAIN = "train --output_dir OUT/model --num_programs 4 --dataset"

MISTAKES = [
    # Flags
    ("generat MODEL", "there is no such command: did you mean generate"),
    ("generate", "required: model"),
    ("generate MODEL", "--output is required"),
    (f"{GENERATE} --num-cells 5", "--num-cells is unknown: did you mean --num_cells"),
    (f"{GENERATE} --num_cells 0", "--num_cells 0: Input should be greater than"),
    (f"{GENERATE} --seed -1", "--seed -1: Input should be greater than or equal to 0"),
    (f"{GENERATE} --guidance_scale nan", "--guidance_scale nan: Input should be a finite number"),
    (f"{GENERATE} --scheduler euler", "--scheduler euler: Input should be 'ddpm', 'ddim'"),
    (f"{GENERATE} --scheduler ddpmm", "--scheduler ddpmm: .* Did you mean ddpm\\?"),
    (f"{GENERATE} --conditions phase", "--conditions phase: .*KEY=NAME"),
    (f"{EXPLAIN} FILES/pbmc.h5ad --max_cells 3", "--max_cells 3: Input should be greater than or equal to 20"),
    (f"{TRAIN} FILES/pbmc.h5ad --max_train_steps 0", "--max_train_steps 0: Input should be greater than 0"),
    (f"{TRAIN} FILES/pbmc.h5ad --config absent.yaml", "--config absent.yaml: no such file"),
    # Labels and columns
    (f"{GENERATE} --cell_types Dendritik", "Did you mean 'Dendritic'"),
    (f"{GENERATE} --conditions donor=1", "'donor' is not a condition of this model"),
    ("generate FILES/expression --output OUT/a.h5ad --cell_types CD34+", "unconditional"),
    (f"{EVALUATE} FILES/without_types.h5ad", "no column 'cell_type'"),
    (f"{EVALUATE} FILES/pbmc.h5ad --donor_key donor", "no column 'donor'"),
    (f"{TRAIN} FILES/pbmc.h5ad --label_keys celltype", "no column 'celltype'"),
    # Cells
    (f"{EVALUATE} FILES/absent.h5ad", "no file .*absent.h5ad"),
    (f"{EVALUATE} FILES/cut.h5ad", "cut.h5ad cannot be read"),
    (f"{FILES} --test FILES/other_genes.h5ad", "gene"),
    (f"{EVALUATE} FILES/nan.h5ad", "NaN"),
    (FILES, "--train and --test"),
    (f"{EXPLAIN} FILES/text.h5ad", "text.h5ad cannot be read"),
    (f"{TRAIN} FILES/absent.h5ad", "no file .*absent.h5ad"),
    (f"{TRAIN} FILES/halves.h5ad", "integer"),
    (f"{TRAIN} FILES/nan.h5ad", "NaN"),
    ("prepare FILES/absent.h5ad --output_dir OUT/prepared", "absent.h5ad"),
    # Models
    ("generate FILES/modle --output OUT/a.h5ad", "no folder or file .*modle. Did you mean .*model"),
    ("generate wbdit-pbmc --output OUT/a.h5ad", "no folder or file wbdit-pbmc. A Hub id has the form user/name"),
    ("generate pbmc68k_reducd --output OUT/a.h5ad", "Did you mean pbmc68k_reduced"),
    ("generate FILES/full --output OUT/a.h5ad", "full"),
    ("generate FILES/truncated --output OUT/a.h5ad", "truncated"),
    ("programs FILES/expression", "has no gene programs"),
    ("evaluate FILES/expression --dataset FILES/pbmc.h5ad", "split.json is missing"),
    ("evaluate FILES/other_split --dataset FILES/pbmc.h5ad", "no cell 'absent-1'"),
    # Outputs
    (f"{GENERATE} --output OUT/a.csv", "a.csv"),
    (f"{GENERATE} --output FILES/full", "full"),
    (f"{GENERATE} --output FILES/text.h5ad/a.h5ad", "text.h5ad"),
    ("prepare FILES/pbmc.h5ad --output_dir FILES/full", "full"),
    (f"{TRAIN} FILES/pbmc.h5ad --output_dir FILES/model", "model"),
]


@pytest.mark.parametrize("line, message", MISTAKES)
def test_one_line_exit_code_2_and_nothing_written(line, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(files / "model"), "FILES": str(files), "OUT": str(tmp_path)}
    words = [re.sub("MODEL|FILES|OUT", lambda found: names[found[0]], word) for word in line.split()]
    words = [re.sub("(without|other|cut)_", r"\1 ", word) for word in words]  # names with spaces
    before = sorted((path, path.stat().st_size) for folder in (tmp_path, files) for path in folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    lines = [one for one in capsys.readouterr().err.splitlines() if one.startswith("wbdit ") or "Traceback" in one]
    assert len(lines) == 1 and lines[0].startswith(f"wbdit {words[0]}: ") and len(lines[0]) < 1000
    assert re.search(message, lines[0].replace(str(files.parent), "")), lines[0]
    after = sorted((path, path.stat().st_size) for folder in (tmp_path, files) for path in folder.rglob("*"))
    assert after == before
