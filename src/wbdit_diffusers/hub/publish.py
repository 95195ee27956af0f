"""`publish`: uploads a trained pipeline to the Hub, one repository per dataset."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.utils import validate_repo_id

from ..files import one_line
from .facts import FIGURE_NAME, REPORT_NAME, TRAINING_NAME, CardFacts, read_facts, report_path
from .model_card import render_model_card


# Removed from the repository if an earlier upload left them there: weights of another training must not stay.
OURS = ["*.safetensors", TRAINING_NAME, REPORT_NAME, FIGURE_NAME]


def publish(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    dry_run: str | Path | None = None,
    report: str | Path | None = None,
    token: str | None = None,
    **facts: Any,
) -> str:
    """
    Uploads a pipeline with a model card that describes its data, training and quality. Checkpoints, logs and names of
    cells are not uploaded.

    Args:
        folder (`str` or `Path`): Output folder of the training. Its training.json and report.json go on the card.
        repo_id (`str`): Hub id such as `"me/wbdit-pbmc"`. The repository is created if it does not exist.
        private (`bool`, defaults to `False`): Whether a new repository is private. Otherwise your Hub settings decide.
        dry_run (`str` or `Path`, *optional*): New folder to write instead of uploading.
        report (`str` or `Path`, *optional*): Report of `wbdit evaluate`, if it is not in `folder`.
        facts: `data_name`, `data_license` and `data_source` of the training data.

    Returns the address of the repository, or the folder of a dry run. Raises a `ValueError` or an `OSError` if an
    argument or a file is invalid, or the upload fails.
    """
    folder, report = Path(folder), None if report is None else Path(report)
    validate_repo_id(repo_id)
    card = read_facts(folder, len(pipeline.processor.var_names), report, **facts)
    path = report_path(folder, report)
    files = {folder / TRAINING_NAME: TRAINING_NAME, path: REPORT_NAME, path.with_name(FIGURE_NAME): FIGURE_NAME}
    if dry_run is not None:
        target = Path(dry_run)
        if target.exists():
            raise ValueError(f"--dry_run {target} exists: give a new folder.")
        _write(pipeline, target, repo_id, card, files)
        return str(target)
    try:
        address = create_repo(repo_id, private=private or None, token=token, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            staged = Path(temporary) / "repository"
            _write(pipeline, staged, address.repo_id, card, files)
            settings = {"commit_message": "Upload of wbdit_diffusers", "delete_patterns": OURS, "token": token}
            upload_folder(repo_id=address.repo_id, folder_path=staged, **settings)
    except Exception as error:  # of the Hub, or of the HTTP library that huggingface_hub uses
        raise OSError(f"{repo_id} was not uploaded: {one_line(error)}") from error
    return str(address)


def _write(pipeline: DiffusionPipeline, target: Path, repo_id: str, facts: CardFacts, files: dict[Path, str]):
    """Writes the files of the repository into a new folder."""
    pipeline.save_pretrained(target)
    for source, name in files.items():
        if source.is_file():
            shutil.copyfile(source, target / name)
    render_model_card(pipeline, repo_id, facts).save(target / "README.md")
