"""Requests in words: the labels whose name is nearest to a prompt."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import logging

from ..files import one_line
from ..processing.processor import ScRNAProcessor


logger = logging.get_logger(__name__)

MIN_SIMILARITY = 0.5  # cosine, below which a prompt names no label of the model


def load_text_encoder(name_or_path: str | None) -> dict[str, Any]:
    """The components `text_encoder` and `tokenizer` from a folder or Hub id, safetensors only; none for `None`."""
    if name_or_path is None:
        return {}
    from transformers import AutoModel, AutoTokenizer  # slow to import

    try:
        text_encoder = AutoModel.from_pretrained(name_or_path, use_safetensors=True)
        return {"text_encoder": text_encoder.eval(), "tokenizer": AutoTokenizer.from_pretrained(name_or_path)}
    except (OSError, ValueError) as error:
        raise OSError(f"--text_encoder {name_or_path} cannot be loaded: {one_line(error)}") from error


@torch.no_grad()
def embed_texts(texts: Sequence[str], tokenizer: Any, text_encoder: Any) -> torch.Tensor:
    """Unit embeddings `(texts, hidden_size)`: averages over the tokens of a `transformers` encoder."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(text_encoder.device)
    hidden_states = text_encoder(**tokens).last_hidden_state.float()  # (texts, tokens, hidden_size)
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden_states * mask).sum(1) / mask.sum(1), dim=1)


def nearest_labels(
    prompts: Sequence[str],
    processor: ScRNAProcessor,
    tokenizer: Any,
    text_encoder: Any,
    label_texts: Mapping[str, str] | None = None,
) -> torch.Tensor:
    """
    Codes `(prompts, num_label_keys)` of the labels that each prompt asks for, -1 where it leaves a label key open.

    The candidates are all combinations of labels, complete or not, as texts such as "CD14 Mono, STIM". The nearest one
    by cosine is chosen. `label_texts` are better texts of labels, such as `{"NK": "NK cells|natural killer cells"}`,
    with a bar between synonyms. Warns of a prompt that is far from all candidates, and names the nearest.
    """
    named = label_texts or {}
    options = [
        [(-1, "")] + [(i, text) for i, name in enumerate(names) for text in named.get(name, name).split("|")]
        for names in processor.config.categories
    ]
    rows = list(itertools.product(*options))[1:]  # the first one leaves all label keys open
    candidates = [", ".join(text for _, text in row if text) for row in rows]
    different = list(dict.fromkeys(prompts))
    known, asked = (embed_texts(some, tokenizer, text_encoder) for some in (candidates, different))
    similarity, places = (asked @ known.T).max(dim=1)
    for prompt, cosine, place in zip(different, similarity.tolist(), places.tolist()):
        if cosine < MIN_SIMILARITY:
            logger.warning(
                f"{prompt!r} is far from all labels: {candidates[place]!r} is nearest (cosine {cosine:.2f})."
            )
    chosen = torch.tensor([[i for i, _ in row] for row in rows])[places.cpu()]
    return chosen[[different.index(prompt) for prompt in prompts]]
