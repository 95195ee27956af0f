"""What a user of `wbdit generate`, `evaluate`, `programs` and `explain` may get wrong: one line each, exit code 2."""

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
    split = CellSplit.draw(pbmc, label_key="cell_type")
    train, test = split.apply(pbmc)
    make_pipeline(train, codec="program", label_keys=["cell_type", "phase"], num_genes=30).save_pretrained(
        folder / "model"
    )
    split.save(folder / "model")
    make_pipeline(train, num_genes=30).save_pretrained(folder / "expression")  # unconditional, without a split
    shutil.copytree(folder / "model", folder / "cut split")
    (folder / "cut split" / "split.json").write_text('{"train": ["a"')
    shutil.copytree(folder / "model", folder / "odd split")
    (folder / "odd split" / "split.json").write_text('{"train": [1], "test": {"a": 1}}')
    pbmc.write_h5ad(folder / "pbmc.h5ad")
    train[:100].copy().write_h5ad(folder / "train.h5ad")
    test[:50].copy().write_h5ad(folder / "test.h5ad")
    (folder / "text.h5ad").write_text("no cells")
    (folder / "empty.h5ad").write_bytes(b"")
    content = (folder / "pbmc.h5ad").read_bytes()
    (folder / "cut.h5ad").write_bytes(content[: len(content) // 2])
    other = pbmc[:50].copy()
    other.var_names = [f"other{i}" for i in range(other.n_vars)]
    other.write_h5ad(folder / "other genes.h5ad")
    pbmc[:40].copy().write_h5ad(folder / "few.h5ad")
    bare = ad.AnnData(pbmc.X, obs=pbmc.obs[["phase"]], var=pbmc.var)
    bare.write_h5ad(folder / "without types.h5ad")
    half = pbmc.copy()
    half.X = half.X * 0.5
    half.write_h5ad(folder / "halves.h5ad")
    damaged = pbmc[:50].copy()
    damaged.X.data[0] = np.nan
    damaged.write_h5ad(folder / "nan.h5ad")
    ad.AnnData(np.zeros((0, 5), np.float32)).write_h5ad(folder / "no cells.h5ad")
    ad.AnnData(obs=pbmc.obs, var=pbmc.var).write_h5ad(folder / "no matrix.h5ad")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("")
    return folder


GENERATE = "generate MODEL --num_inference_steps 2 --device cpu --output OUT/a.h5ad".split()
EVALUATE = "evaluate MODEL --num_samples 1 --no-baselines --device cpu --output_dir OUT/report --dataset".split()
FILES = "evaluate --output_dir OUT/report --generated FILES/test.h5ad --train FILES/train.h5ad".split()
EXPLAIN = "explain MODEL --output_dir OUT/inside --dataset".split()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "required: model, --output"),
        (["generate", "MODEL"], "required: --output"),
        ([*GENERATE, "--num_cells", "ten"], "invalid whole_number value: 'ten'"),
        ([*GENERATE, "--num_cells", "1.5"], "invalid whole_number value"),
        ([*GENERATE, "--num_cells", "nan"], "invalid whole_number value"),
        ([*GENERATE, "--num_cells", "inf"], "invalid whole_number value"),
        ([*GENERATE, "--num_cells", "0"], "`num_cells` is a whole number from 1"),
        ([*GENERATE, "--num_cells=-5"], "`num_cells` is a whole number from 1"),
        ([*GENERATE, "--num_cells", "1e30"], "`num_cells` is a whole number from 1"),
        ([*GENERATE, "--batch_size", "0"], "`batch_size` is a whole number from 1"),
        ([*GENERATE, "--num_processes", "0"], "`num_processes` is a whole number from 1"),
        ([*GENERATE, "--num_processes", "100000"], "`num_processes` is a whole number from 1"),
        ([*GENERATE, "--seed=-1"], "argument --seed: a whole number from 0 to"),
        ([*GENERATE, "--seed", str(2**70)], "argument --seed: a whole number from 0 to"),
        ([*GENERATE, "--seed", "a"], "invalid seed value: 'a'"),
        ([*GENERATE, "--guidance_scale", "nan"], "`guidance_scale` is a number from 0 to 100"),
        ([*GENERATE, "--guidance_scale", "inf"], "`guidance_scale` is a number from 0 to 100"),
        ([*GENERATE, "--guidance_scale=-2"], "`guidance_scale` is a number from 0 to 100"),
        ([*GENERATE, "--num_inference_steps", "0"], "`num_inference_steps` is a whole number"),
        ([*GENERATE, "--scheduler", "dpmsolver++", "--num_inference_steps", "1001"], "at most as many steps"),
        ([*GENERATE, "--scheduler", "euler"], "--scheduler is one of ddpm, ddim, dpmsolver.., unipc"),
        ([*GENERATE, "--device", "abacus"], "--device abacus: there is no such device"),
        ([*GENERATE, "--device", "cuda:77"], "--device cuda:77: there is no such device"),
        ([*GENERATE, "--device", "meta"], "--device meta: there is no such device"),
        ([*GENERATE, "--cell_types", "Dendritik"], "Did you mean 'Dendritic'"),
        ([*GENERATE, "--cell_types", ""], "is not a cell_type of this model"),
        ([*GENERATE, "--conditions", "phase"], "not of the form KEY=NAME"),
        ([*GENERATE, "--conditions", "=S"], "not of the form KEY=NAME"),
        ([*GENERATE, "--conditions", "phase=S", "phase=G1"], "names 'phase' twice"),
        ([*GENERATE, "--conditions", "donor=1"], "'donor' is not a condition of this model"),
        ([*GENERATE, "--conditions", "phase="], "'' is not a phase of this model"),
        ([*GENERATE, "--conditions", "cell_type=CD34+", "--cell_types", "CD34+"], "say the same thing"),
        (["generate", "FILES/expression", "--output", "OUT/a.h5ad", "--cell_types", "CD34+"], "is unconditional"),
        (["generate", "FILES/expression", "--output", "OUT/a.h5ad", "--guidance_scale", "2"], "is unconditional"),
        (["generate", "FILES/absent", "--output", "OUT/a.h5ad"], "absent is no pipeline"),
        (["generate", "FILES/full", "--output", "OUT/a.h5ad"], "full is no pipeline"),
        (["generate", "FILES/pbmc.h5ad", "--output", "OUT/a.h5ad"], "pbmc.h5ad is a file, not the folder"),
        (["generate", "", "--output", "OUT/a.h5ad"], "no pipeline"),
        ([*GENERATE, "--output", "OUT"], "holds other files|has the suffix|is a folder"),
        ([*GENERATE, "--output", ""], "is no path"),
        ([*GENERATE, "--output", "OUT/a.csv"], "has the suffix '.csv': give an .h5ad file"),
        ([*GENERATE, "--output", "FILES/full"], "full holds other files"),
        ([*GENERATE, "--output", "FILES/full/"], "full holds other files"),
        ([*GENERATE, "--output", "/dev/null"], "/dev/null is a device or a pipe, which is never replaced"),
        ([*GENERATE, "--output", "OUT/link.h5ad"], "is a device or a pipe, which is never replaced"),
        ([*GENERATE, "--output", "OUT/folder.h5ad"], "folder.h5ad is a folder: give the path of a file in it"),
        ([*GENERATE, "--output", "FILES/text.h5ad/a.h5ad"], "cannot be written: Not a directory|File exists"),
        ([*GENERATE, "--output", "FILES/text.h5ad/b/a.h5ad"], "cannot be written: Not a directory"),
        ([*GENERATE, "--output", "OUT/" + "x" * 300 + ".h5ad"], "name too long"),
        ([*GENERATE, "--output", "/proc/a.h5ad"], "cannot be written"),
        ([*GENERATE, "--output", "OUT/file.zarr"], "is a file, and cells of this format are a folder"),
        (["evaluate", "MODEL"], "give --dataset"),
        (["evaluate", "FILES/expression", "--dataset", "FILES/pbmc.h5ad"], "split.json is missing"),
        (["evaluate", "FILES/cut split", "--dataset", "FILES/pbmc.h5ad"], "is no split.json of a training"),
        (["evaluate", "FILES/odd split", "--dataset", "FILES/pbmc.h5ad"], "is no split.json of a training"),
        ([*EVALUATE, "FILES/absent.h5ad"], "no file .*absent.h5ad"),
        ([*EVALUATE, "FILES/full"], "full is no folder that `wbdit prepare` wrote"),
        ([*EVALUATE, "FILES/text.h5ad"], "text.h5ad cannot be read"),
        ([*EVALUATE, "FILES/empty.h5ad"], "empty.h5ad cannot be read"),
        ([*EVALUATE, "FILES/cut.h5ad"], "cut.h5ad cannot be read"),
        ([*EVALUATE, "FILES/few.h5ad"], "The data have no cell .* of the split"),
        ([*EVALUATE, "FILES/no cells.h5ad"], "The data have no cell"),
        ([*EVALUATE, "FILES/without types.h5ad"], "no column 'cell_type'"),
        ([*EVALUATE, "FILES/halves.h5ad"], "no integer count|not integer|integer"),
        ([*EVALUATE, "FILES/no matrix.h5ad"], "no matrix"),
        ([*EVALUATE, "FILES/pbmc.h5ad", "--num_samples", "0"], "--num_samples is at least 1"),
        ([*EVALUATE, "FILES/pbmc.h5ad", "--seed=-1"], "argument --seed: a whole number from 0 to"),
        ([*EVALUATE, "FILES/pbmc.h5ad", "--guidance_scale", "nan"], "`guidance_scale` is a number"),
        ([*EVALUATE, "FILES/pbmc.h5ad", "--num_inference_steps", "0"], "`num_inference_steps` is a whole number"),
        ([*EVALUATE, "FILES/pbmc.h5ad", "--device", "abacus"], "no such device"),
        ([*EVALUATE, "FILES/pbmc.h5ad", "--donor_key", "donor"], "no column 'donor'"),
        ([*EVALUATE, "FILES/pbmc.h5ad", "--output_dir", "FILES/text.h5ad"], "text.h5ad"),
        ([*FILES], "all of --generated, --train and --test"),
        ([*FILES, "--test", "FILES/absent.h5ad"], "no file .*absent.h5ad"),
        ([*FILES, "--test", "FILES/few.h5ad"], "--train and --test both have the cell"),
        ([*FILES, "--test", "FILES/test.h5ad", "--label_key", "absent"], "no column 'absent'"),
        ([*FILES, "--test", "FILES/other genes.h5ad"], "gene"),
        ([*FILES, "--test", "FILES/nan.h5ad"], "NaN"),
        ([*FILES, "--test", "FILES/no cells.h5ad"], "cells"),
        ([*FILES, "--test", "FILES/no matrix.h5ad"], "not as many as the 700|no matrix"),
        (["programs", "FILES/absent"], "absent is no pipeline"),
        (["programs", "FILES/expression"], "has no gene programs"),
        (["programs", "MODEL", "--num_genes", "0"], "--num_genes is at least 1"),
        (["programs", "MODEL", "--output", "OUT/folder.h5ad"], "folder.h5ad is no file, and is not replaced"),
        (["programs", "MODEL", "--output", "/dev/null"], "/dev/null is no file, and is not replaced"),
        (["programs", "MODEL", "--output", "/dev/null/a.csv"], "/dev/null is no folder"),
        ([*EXPLAIN, "FILES/absent.h5ad"], "no file .*absent.h5ad"),
        ([*EXPLAIN, "FILES/text.h5ad"], "text.h5ad cannot be read"),
        ([*EXPLAIN, "FILES/few.h5ad"], "The data have no cell"),
        ([*EXPLAIN, "FILES/without types.h5ad"], "no column 'cell_type'"),
        ([*EXPLAIN, "FILES/pbmc.h5ad", "--max_cells", "3"], "--max_cells is at least 20"),
        ([*EXPLAIN, "FILES/pbmc.h5ad", "--output_dir", "FILES/text.h5ad"], "text.h5ad"),
        (["explain", "FILES/cut split", "--dataset", "FILES/pbmc.h5ad"], "is no split.json of a training"),
    ],
)
def test_one_line_and_exit_code_2(arguments, message, files, tmp_path, capsys):
    names = {"MODEL": str(files / "model"), "FILES": str(files), "OUT": str(tmp_path)}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    (tmp_path / "link.h5ad").symlink_to("/dev/null")
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "file.zarr").write_text("")
    before = sorted(path.name for path in [*tmp_path.iterdir(), *files.iterdir()])
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, lines[-1]), lines[-1]
    assert lines[-1].startswith(f"wbdit {arguments[0]}: ") and len(lines[-1]) < 1000
    assert not any("Traceback" in line for line in lines)
    assert sorted(path.name for path in [*tmp_path.iterdir(), *files.iterdir()]) == before  # nothing is left
