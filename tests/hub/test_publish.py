"""Files that `publish` writes and uploads."""

import json

import pytest
from conftest import make_pipeline
from huggingface_hub import ModelCard
from reports import small_report

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.cli import main
from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.hub import publish
from wbdit_diffusers.hub.facts import write_training


PIPELINE = {
    "README.md",
    *("codec/config.json", "codec/diffusion_pytorch_model.safetensors"),
    *("denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors"),
    *("processor/config.json", "processor/diffusion_pytorch_model.safetensors"),
    *("model_index.json", "scheduler/scheduler_config.json"),
}


def files_in(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(pbmc, tmp_path_factory):
    """A pipeline, and the other files of a training, an evaluation and a crash."""
    folder = tmp_path_factory.mktemp("trained") / "wbdit-pbmc"
    split = CellSplit.draw(pbmc, label_key="cell_type")
    make_pipeline(split.apply(pbmc)[0], codec="program", label_keys=["cell_type"]).save_pretrained(folder)
    split.save(folder)
    config = {"seed": 3, "data_name": "PBMC 68k", "data_license": None, "data_source": None}
    write_training(folder, config, "wbdit train --seed 3", len(split.train), {"steps": 8})
    (folder / "report.json").write_text(json.dumps(small_report(765)))
    (folder / "report.png").write_bytes(b"a figure")
    others = ["checkpoint-100/model.safetensors", "checkpoint-100/denoiser/x.safetensors", "logs/events", ".lock"]
    others += ["run.json", "training_log.csv", "stage_one/seconds.json", "cells.h5ad", "denoiser/optimizer.pt"]
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    return folder


def test_dry_run_writes_the_pipeline_its_card_and_report_only(folder, pbmc, tmp_path, capsys):
    target = tmp_path / "repository"
    arguments = ["push", str(folder), "--repo_id", "me/wbdit-pbmc", "--dry_run", str(target)]
    main([*arguments, "--data_license", "CC BY 4.0", "--data_source", "GSE0"])
    assert "nothing was uploaded" in capsys.readouterr().out
    assert files_in(target) == PIPELINE | {"training.json", "report.json", "report.png"}
    card = ModelCard.load(target / "README.md")
    assert "| name | PBMC 68k |\n| license | CC BY 4.0 |\n| accession or source | GSE0 |" in card.text
    assert "wbdit train --seed 3" in card.text and "| steps | 8 |" in card.text
    split = CellSplit.load(folder)
    dendritic = (pbmc.obs.loc[split.train, "cell_type"] == "Dendritic").sum()
    assert f"| training cells | {len(split.train)} |" in card.text and f"| Dendritic | {dendritic} |" in card.text
    assert card.data.library_name == "wbdit-diffusers" and card.data.model_name == "wbdit-pbmc"
    assert {result.dataset_name for result in card.data.eval_results} == {"PBMC 68k"}
    everything = b"".join(path.read_bytes() for path in target.rglob("*") if path.is_file())
    assert str(folder.parent).encode() not in everything and split.test[0].encode() not in everything
    ScRNAGenerationPipeline.from_pretrained(target)


def test_a_report_elsewhere_is_taken(folder, tmp_path):
    report = small_report(765)
    report["excess"]["generated"]["mean"] = 0.123
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(report))
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    for number, path in enumerate([tmp_path / "report", tmp_path / "report" / "report.json"]):
        target = tmp_path / str(number)
        publish(pipe, folder, "me/x", report=path, dry_run=target)
        assert "**0.123 ± 0.010**" in (target / "README.md").read_text()
        assert json.loads((target / "report.json").read_text())["excess"]["generated"]["mean"] == 0.123
        assert not (target / "report.png").exists()  # the folder's figure belongs to its own report


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["MODEL", "--repo_id", "me/x/y"], "me/x/y"),
        (["MODEL", "--repo_id", "me/x", "--dry_run", "MODEL"], "exists: give a new folder"),
        (["MODEL", "--repo_id", "me/x", "--dry_run", "NEW", "--report", "EMPTY"], "empty/report.json: No such file"),
        (["MODEL", "--repo_id", "me/x", "--dry_run", "NEW", "--report", "BROKEN"], "is no report of `wbdit evaluate`"),
        (["MODEL", "--repo_id", "me/x", "--dry_run", "NEW", "--report", "OTHER"], "judged 7 genes"),
    ],
)
def test_bad_arguments_end_with_one_line_and_nothing_is_written(arguments, message, folder, tmp_path, capsys):
    (tmp_path / "broken.json").write_text('{"metrics": {}}')
    (tmp_path / "other.json").write_text(json.dumps(small_report(7)))
    (tmp_path / "empty").mkdir()
    names = {"MODEL": folder, "NEW": tmp_path / "new", "EMPTY": tmp_path / "empty"}
    names |= {"BROKEN": tmp_path / "broken.json", "OTHER": tmp_path / "other.json"}
    with pytest.raises(SystemExit) as error:
        main(["push", *(str(names.get(argument, argument)) for argument in arguments)])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and not any("Traceback" in line for line in lines)
    assert not (tmp_path / "new").exists()


def test_an_unreachable_hub_gives_one_line(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    with pytest.raises(OSError, match="me/x was not uploaded: "):
        publish(pipe, folder, "me/x", token="hf_test")


def test_an_upload_replaces_files_of_an_earlier_one(folder, hub, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    address = publish(pipe, folder, "twice", token="hf_test")
    assert address.endswith("/me/twice")
    files = PIPELINE | {"training.json", "report.json", "report.png"}
    assert set(hub.repos["me/twice"]) == files
    assert b'from_pretrained("me/twice")' in hub.repos["me/twice"]["README.md"]
    hub.repos["me/twice"]["notes.md"] = b"someone's own"
    hub.repos["me/twice"]["gaussian_mixture/diffusion_pytorch_model.safetensors"] = b"of another training"
    publish(pipe, folder, "twice", token="hf_test")
    assert set(hub.repos["me/twice"]) == files | {"notes.md"}  # no weights of the first upload
    ModelCard(hub.repos["me/twice"]["README.md"].decode()).validate()
