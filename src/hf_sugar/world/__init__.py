"""The embedded default: rendered scenes with captions, questions and stories, and tiny checkpoints that know them
(trained by `examples/tiny_checkpoints`)."""

from pathlib import Path

from .dataset import DESCRIBE, load_world, write_world


__all__ = ["CHECKPOINTS", "DESCRIBE", "checkpoint", "load_world", "world_teachers", "write_world"]

CHECKPOINTS = ("llava", "clip", "dinov2", "bert")


def checkpoint(name: str) -> Path:
    """The folder of a shipped checkpoint, for `from_pretrained`: `"llava"`, `"clip"`, `"dinov2"` or `"bert"`."""
    if name not in CHECKPOINTS:
        raise ValueError(f"There is no checkpoint named {name!r}: choose from {', '.join(CHECKPOINTS)}.")
    return Path(__file__).parent / "weights" / name


def world_teachers() -> dict[str, str]:
    """The `teachers` setting for the tiny encoders of the world."""
    return {role: str(checkpoint(name)) for role, name in (("image", "dinov2"), ("text", "bert"), ("cross", "clip"))}
