"""Publishing on the Hugging Face Hub: model card, upload and remote code."""

from .facts import CardFacts
from .model_card import render_model_card, write_model_card
from .publish import publish


__all__ = ["CardFacts", "publish", "render_model_card", "write_model_card"]
