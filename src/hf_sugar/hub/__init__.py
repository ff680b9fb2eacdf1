"""Publishing: the model card of a checkpoint, and what of its directory goes to the Hub."""

from .card import model_card, run_facts, write_card
from .push import complete_directory, push_checkpoint


__all__ = ["complete_directory", "model_card", "push_checkpoint", "run_facts", "write_card"]
