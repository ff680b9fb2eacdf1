"""How an index stands on the disk: files written whole, tied together by sizes and checksums, by one writer at a time."""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import filelock
import numpy as np
import pyarrow as pa


FORMAT_VERSION = 4
REBUILD = "Build the index again with the same data and model: only what is missing or damaged is embedded anew."


class Shard:
    """
    Some documents as a table of `datasets`.

    Args:
        table (`pyarrow.Table`):
            What [`~retrieval.documents.to_table`] makes.
        file (`Path`, *optional*):
            Where it stands on the disk. The name ends with the digest.
    """

    def __init__(self, table: pa.Table, file: Path | None = None):
        self.table, self.file = table, file
        chunks = [chunk for chunk in table["embeddings"].chunks if len(chunk) > 0]
        self.dim = chunks[0].type.value_type.list_size
        self.vectors = [chunk.flatten().flatten().to_numpy().reshape(-1, self.dim) for chunk in chunks]
        self.counts = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])

    @cached_property
    def digest(self) -> str:
        """Of all but the images, which are read when they are asked for."""
        digest = hashlib.sha256(self.counts.tobytes())
        for vectors in self.vectors:
            digest.update(np.ascontiguousarray(vectors))
        digest.update(json.dumps(self.table.select(["metadata", "row"]).to_pydict()).encode())
        return digest.hexdigest()[:32]

    @classmethod
    def read(cls, file: Path, verify: bool = True) -> "Shard":
        try:
            shard = cls(datasets.Dataset.from_file(str(file)).data.table, file)
            if verify and shard.digest != file.stem.rpartition("-")[2]:
                raise OSError("its content is not what was written")
            return shard
        except FileNotFoundError:
            raise ValueError(f"{file} is missing. {REBUILD}") from None
        except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error}). {REBUILD}") from error

    def write(self, directory: Path, key: str) -> None:
        def write(path: Path) -> None:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, self.table.schema) as writer:
                writer.write_table(self.table)

        file = directory / f"shard-{key}-{self.digest}.arrow"
        write_atomically(file, write)
        self.file = file


class Writer:
    """
    The right to write to a directory, held until it is released or the process ends.

    Raises:
        `ValueError`: if another holds it; names the process.
        `OSError`: if the directory cannot be written.
    """

    def __init__(self, directory: Path):
        self._name = directory / ".writer"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(directory / ".lock", timeout=0, thread_local=False)
            self._lock.acquire()
            self._name.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except filelock.Timeout:
            name = self._name.read_text(encoding="utf-8") if self._name.exists() else "another process"
            raise ValueError(f"{directory} is being written by {name}. Wait for it, or write elsewhere.") from None
        except OSError as error:
            raise OSError(error.errno, f"{directory} cannot be written ({error.strerror})") from error

    def release(self) -> None:
        self._name.unlink(missing_ok=True)
        self._lock.release()


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place and move it there."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # FAISS raises the latter
        temporary.unlink(missing_ok=True)
        raise OSError(
            *([error.errno] if isinstance(error, OSError) else []),
            f"{file} cannot be written ({error}). What stood in the directory is as it was, and the shards that were "
            "finished are kept: make room and run the same again",
        ) from error


def write_json(file: Path, content: dict[str, Any]) -> str:
    """Write what names the files of an index, with its own checksum. Returns the text."""
    content = {"format_version": FORMAT_VERSION, **content}
    text = json.dumps({**content, "sha256": _checksum(content)}, indent=1)
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
    return text


def read_json(file: Path) -> tuple[str, dict[str, Any]]:
    """What [`write_json`] wrote, as text and content; an error that names the file if it is anything else."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist. Write an index there with `SugarIndex.save`, or with `hf-sugar index`."
        )
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        version, checksum = content["format_version"], content.pop("sha256", None)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}). {REBUILD}") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}, this version of hf_sugar reads {FORMAT_VERSION}. Build the index anew."
        )
    if checksum != _checksum(content):
        raise ValueError(f"{file} is damaged (its content is not what was written). {REBUILD}")
    return text, content


def describe(file: Path) -> list[Any]:
    """Name, size and checksum of a file."""
    with file.open("rb") as stream:
        return [file.name, file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
