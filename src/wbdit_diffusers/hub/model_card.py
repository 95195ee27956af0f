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
    processor, name = pipeline.processor.config, repo_id.split("/")[-1]
    quality = _quality(facts.report, facts.data_name or NOT_STATED) if facts.report else {}
    data = {"name": facts.data_name, "license": facts.data_license, "accession or source": facts.data_source}
    data["training cells"] = None if facts.num_cells is None else f"{facts.num_cells:,}"
    results, model_name = quality.pop("eval_results", None), name if quality else None
    return ModelCard.from_template(
        ModelCardData(library_name=LIBRARY, tags=TAGS, model_name=model_name, eval_results=results),
        template_path=TEMPLATE_PATH,
        title=as_text(name),
        repo_id=as_code(repo_id),
        version=__version__,
        cell_types=f", cell_types={as_code(processor.categories[0][0])}" if processor.categories else "",
        variant=facts.variant,
        figure=facts.figure,
        data=[(key, NOT_STATED if value is None else as_text(value)) for key, value in data.items()],
        num_genes=len(processor.var_names),
        genes=", ".join(as_text(gene) for gene in processor.var_names[:3]) + ", …",
        values=processor.values,
        is_counts=pipeline.processor.is_counts,
        labels=_labels(pipeline.processor, facts.num_cells),
        network=_network(pipeline),
        training=[(as_text(name), as_text(value)) for name, value in (facts.training or {}).items()],
        command=None if facts.command is None else " ".join(facts.command.splitlines()),
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


def _quality(report: dict[str, Any], data_name: str) -> dict[str, Any]:
    """What the card says of a report: in words, as a table, and as metadata for the Hub (`model-index`)."""
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
