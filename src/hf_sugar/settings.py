"""How a setting is written. Nothing here imports torch."""

from dataclasses import MISSING, field
from typing import Any


def setting(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field of a dataclass of settings, required without a default; `metadata` may have `choices` and `aliases`."""
    return field(default=default, metadata={"help": help, **metadata})
