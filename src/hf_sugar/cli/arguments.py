"""What several commands share: how they read their settings, and which data they take."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser


@dataclass
class DataArguments:
    """
    Data to train on.

    Parameters:
        train_data (source or `list`, *optional*):
            What to train on: paths or Hub ids, or in YAML mappings as [`hf_sugar.data.load_data`] takes them.
        eval_data (source or `list`, *optional*):
            What to evaluate the losses on during training.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at the first malformed row, `"skip"` leaves malformed rows out and counts them.
    """

    train_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to train on: paths or Hub ids, or in YAML mappings with path, format, image_root, weight."
        },
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "What to evaluate the losses on during training."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={"help": "What to do with a malformed row: 'error' or 'skip'.", "choices": ["error", "skip"]},
    )


def parse(command: str, types: Sequence[type], argv: list[str], description: str) -> tuple[Any, ...]:
    """Settings of a command from its arguments and, with `--config FILE`, from YAML."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("hf_sugar").setLevel(logging.INFO)
    parser = TrlParser(
        types,
        prog=f"hf-sugar {command}",
        description=description,
        epilog="--config FILE reads any of these from YAML; arguments override it.",
    )
    return parser.parse_args_and_config(argv)
