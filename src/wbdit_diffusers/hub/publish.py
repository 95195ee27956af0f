"""`publish`: a trained pipeline becomes a repository on the Hub, one for each dataset."""

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from . import remote_code
from .facts import FIGURE_NAME, REPORT_NAME, TRAINING_NAME, figure_of, read_facts
from .model_card import render_model_card


VARIANTS = {"bf16": torch.bfloat16}
# What an earlier upload may have left and a later one has not: weights of another training must not stay.
OURS = ["*.safetensors", *remote_code.FILES, TRAINING_NAME, REPORT_NAME, FIGURE_NAME]


def publish(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    variant: str | None = None,
    with_code: bool = False,
    dry_run: str | Path | None = None,
    data_name: str | None = None,
    data_license: str | None = None,
    data_source: str | None = None,
    report: str | Path | None = None,
    token: str | None = None,
) -> str:
    """
    Uploads a pipeline with a model card that says what it was trained on, how, and how good it is. Nothing else of the
    folder is uploaded: no checkpoints, no logs, no names of cells.

    Args:
        pipeline ([`ScRNAGenerationPipeline`]): As it was loaded from the folder, or just trained.
        folder (`str` or `Path`): The folder that a training wrote; see [`read_facts`] for what is read from it.
        repo_id (`str`): The repository, such as `"me/wbdit-pbmc"`. It is created if there is none.
        private (`bool`, *optional*): Whether a repository that is created is private.
        variant (`str`, *optional*): `"bf16"` for the denoiser in bfloat16, beside float32.
        with_code (`bool`, defaults to `False`):
            Whether to add the modules with which Diffusers loads the pipeline by `trust_remote_code=True`.
        dry_run (`str` or `Path`, *optional*): A new folder to write instead of uploading.
        data_name (`str`, *optional*): What the training data are called.
        data_license (`str`, *optional*): Their licence.
        data_source (`str`, *optional*): Their accession, or where they are.
        report (`str` or `Path`, *optional*): A report of `wbdit evaluate`, if it is not in the folder.
        token (`str`, *optional*): For the Hub, if this machine has not logged in.

    Returns:
        `str`: address of the repository, or the folder of a dry run.

    Raises:
        ValueError: If an argument is not as it must be, or a file is of another model.
        OSError: If a file is missing, or the upload failed.
    """
    folder, report = Path(folder), None if report is None else Path(report)
    validate_repo_id(repo_id)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"--variant is one of {', '.join(VARIANTS)}, not {variant!r}.")
    texts = {"data_name": data_name, "data_license": data_license, "data_source": data_source}
    facts = read_facts(folder, len(pipeline.processor.var_names), **texts, report=report)
    facts = replace(facts, variant=variant, with_code=with_code)

    def write(target: Path, repo_id: str):
        pipeline.save_pretrained(target)
        if variant is not None:
            half = copy.deepcopy(pipeline.denoiser).to(VARIANTS[variant])
            half.save_pretrained(target / "denoiser", variant=variant)
        if with_code:
            remote_code.write_remote_code(pipeline, target, repo_id)
        files = {folder / TRAINING_NAME: TRAINING_NAME}
        if facts.report is not None:
            files |= {_report_file(folder, report): REPORT_NAME, figure_of(folder, report): FIGURE_NAME}
        for source, name in files.items():
            if source.is_file():
                shutil.copyfile(source, target / name)
        render_model_card(pipeline, repo_id, facts).save(target / "README.md")

    if dry_run is not None:
        if private is not None or token is not None:
            raise ValueError("--private has no effect on --dry_run, which uploads nothing: leave it out.")
        target = Path(dry_run)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"--dry_run {target} is there already: give a new folder.")
        write(target, repo_id)
        return str(target)
    address = _reach_hub(repo_id, lambda: create_repo(repo_id, private=private, token=token, exist_ok=True))
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "repository"
        write(staged, address.repo_id)
        settings = {"commit_message": "Upload of wbdit_diffusers", "delete_patterns": OURS, "token": token}
        _reach_hub(repo_id, lambda: upload_folder(repo_id=address.repo_id, folder_path=staged, **settings))
    return str(address)


def _reach_hub(repo_id: str, call: Callable[[], Any]) -> Any:
    """What `call` returns. Raises an `OSError` of one line if the Hub refuses, or can't be reached."""
    try:
        return call()
    except LocalTokenNotFoundError as error:
        raise OSError("You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN.") from error
    except Exception as error:  # of the Hub, and of whichever HTTP library huggingface_hub has
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{repo_id} was not uploaded: {reason}") from error


def _report_file(folder: Path, report: Path | None) -> Path:
    if report is None:
        return folder / REPORT_NAME
    return report / REPORT_NAME if report.is_dir() else report
