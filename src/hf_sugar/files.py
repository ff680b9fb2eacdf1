"""Files and directories that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write a file or a directory to, which takes the name `path` when the block ends: what had that name is
    replaced as a whole, or stays as it was. Directories above it are made. An `OSError` names what cannot be written."""
    path = Path(path)
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        if path.is_dir():  # no system call replaces a directory that is not empty
            os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # FAISS raises the latter
        remedy = "What stood there is as it was: make room and run the same again"
        raise OSError(getattr(error, "errno", None), f"{path} cannot be written ({error}). {remedy}") from error
    finally:
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink(missing_ok=True)
