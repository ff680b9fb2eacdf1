"""What several commands share: how they read their settings, and which data they take."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import TrlParser


def _source(source: Any) -> Any:
    if not isinstance(source, str) or not source.startswith("{"):
        return source
    try:
        return yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{source!r} is no mapping in YAML or JSON. Write it as {{path: data.json, weight: 1}}."
        ) from error


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
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to, instead of that of each file."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={"help": "What to do with a malformed row: 'error' or 'skip'.", "choices": ["error", "skip"]},
    )

    def __post_init__(self):
        for name in ("train_data", "eval_data"):  # a mapping may be given on the command line too
            sources = getattr(self, name)
            if isinstance(sources, list):
                setattr(self, name, [_source(source) for source in sources])


@dataclass
class StreamedDataArguments(DataArguments):
    """
    [`DataArguments`], of which the training data may be streamed.

    Parameters:
        streaming (`bool`, *optional*, defaults to `False`):
            Read the training data while they are used instead of loading them first.
    """

    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training data while they are used instead of loading them first."},
    )


def parse(command: str, types: Sequence[type], argv: list[str], description: str) -> tuple[Any, ...]:
    """
    Settings of a command from its arguments and, with `--config FILE`, from YAML. A mapping can be an argument too, as
    YAML or JSON.

    Raises:
        `ValueError`: if the text given for a mapping is not one.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("hf_sugar").setLevel(logging.INFO)
    parser = TrlParser(
        types,
        prog=f"hf-sugar {command}",
        description=description,
        epilog="--config FILE reads any of these from YAML; arguments override it.",
    )
    parsed = parser.parse_args_and_config(argv)
    for settings in parsed:
        if isinstance(settings, TrainingArguments):  # reads its own; some of them may be the path of a file instead
            continue
        for name, hint in get_type_hints(type(settings)).items():
            value = getattr(settings, name)
            if isinstance(value, str) and dict in get_args(hint):
                try:
                    mapping = yaml.safe_load(value)
                except yaml.YAMLError:
                    mapping = None
                if not isinstance(mapping, dict):
                    raise ValueError(f"`{name}` is {value!r}. Give a mapping in YAML or JSON, as {{name: value}}.")
                setattr(settings, name, mapping)
    return parsed
