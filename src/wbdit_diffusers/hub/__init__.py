"""Publishing on the Hugging Face Hub: model card, upload and remote code."""

from .facts import CardFacts, read_facts
from .model_card import push_model_card, render_model_card, write_model_card
from .publish import publish


__all__ = ["CardFacts", "publish", "push_model_card", "read_facts", "render_model_card", "write_model_card"]
