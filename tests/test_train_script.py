"""The program of `training/train.py` and `wbdit train`: flags in, exit codes and files out."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.cli import main, parse
from wbdit_diffusers.training import train


TRAIN_SCRIPT = ROOT / "training" / "train.py"
SHAPE = "--num_genes 100 --patch_size 20 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
SPEED = "--train_batch_size 64 --lr_warmup_steps 2 --num_inference_steps 3 --mixed_precision no"
CODEC = "--codec_max_steps 100 --num_programs 8 --codec_hidden_size 16 --decoder_steps 20"
TINY = f"{SHAPE} {SPEED} {CODEC}".split()
FILES = ["README.md", "model_index.json", "run.json", "split.json", "training.json", "training_log.csv"]
FOLDERS = ["codec", "denoiser", "processor", "scheduler", "stage_one"]


@pytest.fixture
def threads():
    """As many as the program takes; afterwards those of before."""
    before = torch.get_num_threads()
    torch.set_num_threads(psutil.cpu_count(logical=False))
    yield
    torch.set_num_threads(before)


def launch(*command: str | Path, **environment: str):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]


def assert_complete(folder: Path, closed_form: tuple[str, ...] = ("gaussian_mixture",)):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, *FOLDERS, *closed_form])
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_cells=3).cells.shape == (3, 100)


@pytest.mark.slow
def test_a_launched_training_gives_the_weights_of_one_in_python(pbmc_path, tmp_path, threads):
    flags = ["--dataset", str(pbmc_path), "--label_keys", "cell_type", "phase", *TINY, "--max_train_steps", "8"]
    launch(
        *("accelerate.commands.launch", "--num_processes", "1", "--cpu", TRAIN_SCRIPT),
        *(*flags, "--output_dir", tmp_path / "launched"),
    )
    assert_complete(tmp_path / "launched")
    train(None, parse("train", [*flags, "--output_dir", str(tmp_path / "python")])[0])
    for component in ("codec", "denoiser", "processor"):
        name = f"{component}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "launched" / name).read_bytes() == (tmp_path / "python" / name).read_bytes(), component
    splits = [(tmp_path / name / "split.json").read_bytes() for name in ("launched", "python")]
    assert splits[0] == splits[1]


NOTING = """
    import os
    import sys
    from pathlib import Path

    from wbdit_diffusers.data.latents import Latents
    from wbdit_diffusers.cli import main

    get_batch = Latents.batch


    def note_and_get_batch(self, indices, device):
        with Path(__file__).with_name("cells-of-" + os.environ["RANK"]).open("a") as file:
            file.write(f"{len(self)}: {' '.join(map(str, indices))}\\n")
        return get_batch(self, indices, device)


    Latents.batch = note_and_get_batch
    main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_two_processes_train_together_on_different_cells(pbmc_path, tmp_path):
    script = tmp_path / "noting.py"
    script.write_text(textwrap.dedent(NOTING))
    launch(
        *("torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, "--dataset", pbmc_path, *TINY),
        *("--output_dir", tmp_path / "out", "--max_train_steps", "4"),
    )
    assert_complete(tmp_path / "out")
    # 4 × 2 × 64 of the 560 training cells, all of one epoch. The batch of the smaller dataset is for validation, and
    # the first process reads all cells once for the mixture.
    batches = []
    for rank in "01":
        lines = [line.split(": ") for line in (tmp_path / f"cells-of-{rank}").read_text().splitlines()]
        sizes = [int(size) for size, _ in lines]
        of_training = [set(cells.split()) for size, cells in lines if int(size) == max(sizes)]
        assert sum(len(cells) == max(sizes) for cells in of_training) == (rank == "0")
        batches.append([cells for cells in of_training if len(cells) < max(sizes)])
    assert [len(of_one) for of_one in batches] == [4, 4]
    cells = [set.union(*of_one) for of_one in batches]
    assert all(len(of_one) == 4 * 64 for of_one in cells)
    assert not cells[0] & cells[1]
    assert (tmp_path / "out" / "training_log.csv").read_text().splitlines()[-1].startswith("4,0,")


BAD = [
    (["--dataset", "absent.h5ad"], "no file absent.h5ad"),
    (["--test_fraction", "0"], "--test_fraction 0: Input should be greater than 0"),
    (["--resume_from_checkpoint", "absent"], "absent is no checkpoint of out"),
    (["--split", "absent.json"], "There is no folder or file absent.json"),
    (["--steps", "3"], "--steps is unknown"),
]


@pytest.mark.parametrize("flags, message", BAD)
def test_mistakes_end_in_one_line_and_exit_code_2(flags, message, pbmc_path, tmp_path, threads, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--dataset", str(pbmc_path), "--output_dir", "out", *TINY, *flags])
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("wbdit train: ") and message in last
    assert not (tmp_path / "out").exists()


def test_the_program_writes_a_pipeline(pbmc_path, tmp_path, threads):
    flags = [*SHAPE.split(), *SPEED.split(), "--codec", "expression", "--max_train_steps", "2"]
    main(["train", "--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "out"), *flags])
    assert_complete(tmp_path / "out", closed_form=())
