"""The model card of a pipeline, rendered from its own configuration."""

import json
import re
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData, create_repo, file_exists

from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..version import __version__


TEMPLATE_PATH = Path(__file__).parent / "model_card_template.md"
BLOCKS = {
    "descent": "White-Box DiT, with steps that descend (contraction, ISTA)",
    "white_box": "White-Box DiT, as published (MSSA, ISTA)",
    "dit": "DiT",
}


def render_model_card(
    pipeline: DiffusionPipeline,
    repo_id: str,
    training: dict[str, Any] | None = None,
    evaluation: str | None = None,
) -> ModelCard:
    """
    Args:
        pipeline ([`ScRNAGenerationPipeline`]): What the card describes.
        repo_id (`str`): The Hub id or folder that the card tells to load.
        training (`dict`, *optional*): Rows of the training table.
        evaluation (`str`, *optional*): Markdown of the evaluation section.

    Returns:
        [`huggingface_hub.ModelCard`]
    """
    processor, denoiser, scheduler = pipeline.processor.config, pipeline.denoiser, pipeline.scheduler
    network = [
        ("codec", _describe_codec(pipeline.codec)),
        *_describe_denoiser(denoiser),
        ("parameters", f"{denoiser.num_parameters():,}"),
        ("scheduler", f"{type(scheduler).__name__}, prediction_type {scheduler.config.get('prediction_type')}"),
        ("default steps", pipeline.config.num_inference_steps),
    ]
    return ModelCard.from_template(
        ModelCardData(
            library_name="diffusers",
            tags=["wbdit_diffusers", "single-cell", "scRNA-seq", "biology", "white-box-transformer"],
        ),
        template_path=TEMPLATE_PATH,
        title=as_text(repo_id.split("/")[-1]),
        repo_id=as_code(repo_id),
        version=__version__,
        contents=_contents(pipeline),
        num_genes=len(processor.var_names),
        genes=[as_text(name) for name in processor.var_names[:3]],
        labels=[
            (as_code_span(f"obs[{as_code(key)}]"), [as_text(name) for name in names])
            for key, names in zip(processor.label_keys, processor.categories)
        ],
        cell_type=as_code(processor.categories[0][0]) if processor.categories else None,
        network=[(name, as_text(value)) for name, value in network],
        training=None if training is None else {as_text(name): as_text(value) for name, value in training.items()},
        evaluation=evaluation,
    )


def as_code(text: str) -> str:
    """A string as Python has it in quotes: whatever is in it, it ends where it ends, on one line."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")  # three of which would end the block of code


def as_code_span(code: str) -> str:
    """Code within a line of Markdown; `as_code` has left no backtick in it."""
    return f"`{code}`"


def as_text(value: Any) -> str:
    """Anything as one line of plain Markdown, in a table or out of one: nothing in it is markup, HTML or a link."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~!$]|__)", r"\\\1", text)
    return re.sub(r"(https?|www)([:.])", r"\1\\\2", text)


def _describe_denoiser(denoiser: ModelMixin) -> list[tuple[str, Any]]:
    config = denoiser.config
    if isinstance(denoiser, GaussianMixtureDenoiser):
        return [("denoiser", f"closed form of a Gaussian mixture with {config.num_components} components")]
    return [
        ("block", BLOCKS[config.block_type]),
        ("layers", config.num_layers),
        ("heads × head dimension", f"{config.num_attention_heads} × {config.attention_head_dim}"),
        ("values per token", config.patch_size),
    ]


def _describe_codec(codec: ModelMixin) -> str:
    config = codec.config
    if "num_programs" in config:
        return f"{type(codec).__name__}: {config.num_programs} gene programs, likelihood {config.likelihood}"
    return f"{type(codec).__name__}: {config.num_genes} genes, standardize={config.standardize}"


def add_evaluation(path: str | Path, evaluation: str):
    """Writes an evaluation, as Markdown, into a rendered card, before its section on limits."""
    path = Path(path)
    path.write_text(path.read_text().replace("## Limits", f"## Evaluation\n\n{evaluation}\n## Limits"))


def push_model_card(pipeline: DiffusionPipeline, repo_id: str, private: bool | None = None, token: str | None = None):
    """Gives a Hub repository that has no card yet the rendered one: Diffusers would write a stub."""
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if not file_exists(repo_id, "README.md", token=token):
        render_model_card(pipeline, repo_id).push_to_hub(repo_id, token=token)


def _contents(pipeline: Any) -> str:
    """What the AnnData of a pipeline holds."""
    processor = pipeline.processor
    if processor.config.values == "counts":
        return 'integer counts in `X` and `obs["library_size"]`'
    if processor.has_library_size:
        return 'log expression in `X`, its integer counts in `layers["counts"]` and `obs["library_size"]`'
    return "log expression in `X`"
