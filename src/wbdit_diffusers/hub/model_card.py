"""The model card of a pipeline, rendered from its configuration and the files in its folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, file_exists

from ..markdown import as_code, as_text
from ..version import __version__
from .facts import CardFacts, read_facts


TEMPLATE_PATH = Path(__file__).parent / "model_card_template.md"
LIBRARY = "wbdit-diffusers"  # name on the Hub, see docs/hub.md
TAGS = ["diffusers", "single-cell", "scRNA-seq", "biology", "anndata", "white-box-transformer"]
METRICS = "auc_forest auc_boosting auc_regression membership_auc membership_auc_donor nearest_training_cell".split()


def render_model_card(pipeline: DiffusionPipeline, repo_id: str, facts: CardFacts | None = None) -> ModelCard:
    """The model card of a pipeline, with an example that loads `repo_id`: a Hub id or a folder."""
    facts, name = facts or CardFacts(), repo_id.split("/")[-1]
    quality = _quality(facts.report, facts.data_name or "not stated") if facts.report else {}
    results, model_name = quality.pop("eval_results", None), name if quality else None
    return ModelCard.from_template(
        ModelCardData(library_name=LIBRARY, tags=TAGS, model_name=model_name, eval_results=results),
        template_path=TEMPLATE_PATH,
        name=name,
        repo_id=as_code(repo_id),
        version=__version__,
        facts=facts,
        pipeline=pipeline,
        labels=_labels(pipeline.processor),
        text=as_text,
        code=as_code,
        **quality,
    )


def write_model_card(pipeline: DiffusionPipeline, folder: str | Path, repo_id: str | None = None):
    """Writes a pipeline's card into its folder. The example on it loads `repo_id`, by default the folder's name."""
    folder = Path(folder)
    facts = read_facts(folder, len(pipeline.processor.var_names))
    render_model_card(pipeline, repo_id or folder.resolve().name, facts).save(folder / "README.md")


def push_model_card(pipeline: DiffusionPipeline, repo_id: str, private: bool | None = None, token: str | None = None):
    """Uploads the model card to a Hub repository that has none, where Diffusers would write a stub."""
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if not file_exists(repo_id, "README.md", token=token):
        render_model_card(pipeline, repo_id).push_to_hub(repo_id, token=token)


def _labels(processor: Any) -> list[tuple[str, list[tuple[str, float]]]]:
    """The label keys, and the share of each of their labels."""
    keys = []
    for column, (key, names) in enumerate(zip(processor.label_keys, processor.config.categories)):
        codes = processor.label_combinations[:, column]
        shares = torch.zeros(len(names)).index_add(0, codes, processor.label_frequencies.float())
        keys.append((key, list(zip(names, shares.tolist()))))
    return keys


def _quality(report: dict[str, Any], data_name: str) -> dict[str, Any]:
    """A report as words, a table and metadata for the Hub (`model-index`)."""
    from ..evaluation import table  # slow to import

    columns = [report["metrics"][name] for name in (table.GENERATED, table.REFERENCE)]
    ours, reference = (
        {metric: float(np.nanmean(np.array(column[metric], dtype=float))) for metric in METRICS if metric in column}
        for column in columns
    )
    titles = {"excess": table.EXCESS, **table.TITLES}
    results = [
        EvalResult(
            task_type="single-cell-generation",
            task_name="Generation of single-cell RNA-seq data",
            dataset_type="scRNA-seq",
            dataset_name=data_name,
            dataset_split="held-out cells",
            metric_type=metric,
            metric_name=titles[metric],
            metric_value=round(value, 4),
            metric_args={"real_reference": round(reference[metric], 4)} if metric in reference else None,
        )
        for metric, value in ({"excess": report["excess"][table.GENERATED]["mean"]} | ours).items()
        if not np.isnan(value)
    ]
    words = {"verdict": table.verdict(report), "samples": table.describe_samples(report), "means": ours}
    return {"eval_results": results, "metrics": table.metric_table(report, METRICS), **words}
