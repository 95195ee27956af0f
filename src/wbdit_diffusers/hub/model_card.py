"""The model card of a pipeline, rendered from its configuration and the files in its folder."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, file_exists

from ..markdown import as_code, as_text
from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..models.transformer_white_box_dit import WhiteBoxDiTModel
from ..version import __version__
from .facts import CardFacts, read_facts


TEMPLATE_PATH = Path(__file__).parent / "model_card_template.md"
LIBRARY = "wbdit-diffusers"  # name on the Hub, see docs/hub.md
TAGS = ["diffusers", "single-cell", "scRNA-seq", "biology", "anndata", "white-box-transformer"]
NOT_STATED = "not stated"
METRICS = "auc_forest auc_boosting auc_regression membership_auc membership_auc_donor nearest_training_cell".split()
BLOCKS = {
    "descent": "White-Box DiT with descent steps (contraction, ISTA)",
    "white_box": "White-Box DiT, as published (MSSA, ISTA)",
    "dit": "DiT",
}


def render_model_card(pipeline: DiffusionPipeline, repo_id: str, facts: CardFacts | None = None) -> ModelCard:
    """The model card of a pipeline, with an example that loads `repo_id`: a Hub id or a folder."""
    facts = facts or CardFacts()
    processor, report, name = pipeline.processor.config, facts.report, repo_id.split("/")[-1]
    return ModelCard.from_template(
        ModelCardData(
            library_name=LIBRARY,
            tags=TAGS,
            model_name=name if report else None,
            eval_results=eval_results(report, facts.data_name or NOT_STATED) if report else None,
        ),
        template_path=TEMPLATE_PATH,
        title=as_text(name),
        repo_id=as_code(repo_id),
        version=__version__,
        cell_types=f", cell_types={as_code(processor.categories[0][0])}" if processor.categories else "",
        variant=facts.variant,
        figure=facts.figure,
        data=_data(facts),
        num_genes=len(processor.var_names),
        genes=", ".join(as_text(gene) for gene in processor.var_names[:3]) + ", …",
        contents=_contents(pipeline.processor),
        labels=_labels(pipeline.processor, facts.num_cells),
        network=_network(pipeline),
        training=[(as_text(name), as_text(value)) for name, value in (facts.training or {}).items()],
        command=None if facts.command is None else " ".join(facts.command.splitlines()),
        quality=quality_table(report) if report else None,
        memory=memory(report),
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


def _data(facts: CardFacts) -> list[tuple[str, str]]:
    """Rows of the table of the training data."""
    rows = {"name": facts.data_name, "license": facts.data_license, "accession or source": facts.data_source}
    rows["training cells"] = None if facts.num_cells is None else f"{facts.num_cells:,}"
    return [(name, NOT_STATED if value is None else as_text(value)) for name, value in rows.items()]


def _labels(processor: Any, num_cells: int | None) -> list[dict[str, Any]]:
    """Name of each label key, and rows of its labels: name, number of training cells, fraction."""
    keys = []
    for column, (key, names) in enumerate(zip(processor.label_keys, processor.config.categories)):
        codes = processor.label_combinations[:, column]
        shares = torch.zeros(len(names)).index_add(0, codes, processor.label_frequencies.float()).tolist()
        rows = [
            (as_text(name), NOT_STATED if num_cells is None else f"{round(share * num_cells):,}", f"{share:.1%}")
            for name, share in zip(names, shares)
        ]
        keys.append({"name": f"`obs[{as_code(key)}]`", "title": as_text(key), "rows": rows})
    return keys


def _network(pipeline: DiffusionPipeline) -> list[tuple[str, Any]]:
    """Rows of the table of the network."""
    denoiser, scheduler, codec = pipeline.denoiser, pipeline.scheduler, pipeline.codec
    config = denoiser.config
    if "num_programs" in codec.config:
        about_codec = f"{codec.config.num_programs} gene programs, likelihood {codec.config.likelihood}"
    else:
        about_codec = f"{codec.config.num_genes} genes, standardize={codec.config.standardize}"
    if isinstance(denoiser, GaussianMixtureDenoiser):
        network = [("denoiser", f"closed form of a Gaussian mixture with {config.num_components} components")]
    elif not isinstance(denoiser, WhiteBoxDiTModel):
        network = [("denoiser", as_text(type(denoiser).__name__))]
    else:
        network = [
            ("block", BLOCKS[config.block_type]),
            ("layers", config.num_layers),
            ("heads × head dimension", f"{config.num_attention_heads} × {config.attention_head_dim}"),
            ("values per token", config.patch_size),
        ]
    return [
        ("codec", f"{type(codec).__name__}: {about_codec}"),
        *network,
        ("parameters", f"{denoiser.num_parameters():,}"),
        ("scheduler", f"{type(scheduler).__name__}, prediction_type {scheduler.config.get('prediction_type')}"),
        ("default steps", pipeline.config.num_inference_steps),
    ]


def _contents(processor: Any) -> str:
    """Contents of the AnnData that a pipeline makes."""
    if processor.config.values == "counts":
        return 'integer counts in `X` and `obs["library_size"]`'
    if processor.is_counts:
        return 'log expression in `X`, its integer counts in `layers["counts"]` and `obs["library_size"]`'
    return "log expression in `X`"


def quality_table(report: dict[str, Any]) -> str:
    """The verdict and the card's metrics as Markdown."""
    from ..evaluation.table import describe_samples, metric_table, verdict

    described = f"{verdict(report)} {describe_samples(report)} All metrics are in `report.json`."
    return f"{described}\n\n{metric_table(report, METRICS)}"


def eval_results(report: dict[str, Any], data_name: str) -> list[EvalResult]:
    """The card's metrics as metadata, from which the Hub makes its `model-index`."""
    from ..evaluation.table import EXCESS, GENERATED, REFERENCE, TITLES

    ours, reference = report["metrics"][GENERATED], report["metrics"][REFERENCE]
    values = {"excess": (report["excess"][GENERATED]["mean"], EXCESS)}
    values |= {metric: (_mean(ours[metric]), TITLES[metric]) for metric in METRICS if metric in ours}
    return [
        EvalResult(
            task_type="single-cell-generation",
            task_name="Generation of single-cell RNA-seq data",
            dataset_type="scRNA-seq",
            dataset_name=data_name,
            dataset_split="held-out cells",
            metric_type=metric,
            metric_name=title,
            metric_value=round(value, 4),
            metric_args={"real_reference": round(_mean(reference[metric]), 4)} if metric in reference else None,
        )
        for metric, (value, title) in values.items()
        if not np.isnan(value)
    ]


def memory(report: dict[str, Any] | None) -> str:
    """The measured memorisation in a sentence."""
    metrics = report["metrics"]["generated"] if report else {}
    ours = {name: _mean(metrics[name]) for name in METRICS if name in metrics}
    if "membership_auc" not in ours:
        return "not measured."
    donor = "membership_auc_donor"
    donors = f" Donors of training cells are separated from others with {ours[donor]:.3f}." if donor in ours else ""
    return (
        "the distance to the nearest generated cell separates training cells from held-out cells with an AUC of"
        f" {ours['membership_auc']:.3f} (0.5 = not at all).{donors} Generated cells are"
        f" {ours['nearest_training_cell']:.2f} times as far from the nearest training cell as held-out cells are."
        " Stronger attacks were not tried."
    )


def _mean(values: list[float | None]) -> float:
    """The mean without NaN, which is `None` in JSON."""
    return float(np.nanmean(np.array(values, dtype=float)))
