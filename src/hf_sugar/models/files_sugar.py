"""Checkpoint directories that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME


ADAPTER_SUBFOLDER = "adapter"


@contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """A place to write a checkpoint to. When the block ends, the files from there are moved into `directory`, new or not,
    and what is left of another checkpoint goes; other files stay. Where the block is broken off, `directory` stays as it
    was."""
    directory = Path(directory)
    new = directory / ".incomplete"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        files = [file.relative_to(new) for file in new.rglob("*") if file.is_file()]
        files.sort(key=lambda file: file == Path(CONFIG_NAME))
        if Path(CONFIG_NAME) in files:
            # first out and last in: nothing can be loaded in between
            (directory / CONFIG_NAME).unlink(missing_ok=True)
            for pattern in ("model*.safetensors*", f"{ADAPTER_SUBFOLDER}/adapter_*"):
                for file in directory.glob(pattern):
                    file.unlink()
        for file in files:
            (directory / file).parent.mkdir(exist_ok=True)
            os.replace(new / file, directory / file)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def damage(directory: Path) -> str:
    """Names the damaged file of a checkpoint."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return f"{file} is damaged ({error}). Copy or download it again."
    return f"A file in {directory} is damaged. Copy or download it again."
