"""What goes to the Hugging Face Hub beside the weights, and what a folder that comes back must hold."""

from .model_card import add_evaluation, push_model_card, render_model_card


__all__ = ["add_evaluation", "push_model_card", "render_model_card"]
