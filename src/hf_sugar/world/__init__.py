"""The embedded default: rendered scenes with captions, questions and stories, and tiny checkpoints that know them."""

from .checkpoints import checkpoint
from .dataset import DESCRIBE, load_world, write_world


__all__ = ["DESCRIBE", "checkpoint", "load_world", "write_world"]
