"""How an index stands on the disk: files written whole, tied together by sizes and checksums, by one writer at a time."""

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import faiss
import filelock
import pyarrow as pa

from ..files import replacing


FORMAT_VERSION = 5
REBUILD = "Build the index again with the same data and model: only what is missing or damaged is embedded anew."


class Shard:
    """Some documents as a table of [`~retrieval.documents.to_table`], and the file that holds it."""

    def __init__(self, table: pa.Table, file: Path | None = None):
        self.table, self.file = table, file
        self.slices = table["slice"].to_numpy()
        chunks = [chunk for chunk in table["embeddings"].chunks if len(chunk) > 0]
        self.vectors = [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in chunks]
        self.dim = self.vectors[0].shape[1]

    @cached_property
    def digest(self) -> str:
        """Of all but the images, which are read when they are asked for."""
        digest = hashlib.sha256(json.dumps(self.table.select(["metadata", "row"]).to_pydict()).encode())
        for values in (self.slices, *self.vectors):
            digest.update(values)
        return digest.hexdigest()[:32]

    @classmethod
    def read(cls, file: Path, size: int | None = None, verify: bool = True) -> "Shard":
        """The shard in a file, whose name ends with the digest."""
        try:
            shard = cls(datasets.Dataset.from_file(str(file)).data.table, file)
            if size not in (None, file.stat().st_size) or (verify and shard.digest != file.stem.rpartition("-")[2]):
                raise OSError("its content is not what was written")
            return shard
        except Exception as error:  # Arrow and `datasets` may raise anything
            raise ValueError(f"{file} cannot be read ({error}). {REBUILD}") from error

    def write(self, directory: Path, key: str) -> None:
        file = directory / f"shard-{key}-{self.digest}.arrow"
        with replacing(file) as path, pa.OSFile(str(path), "wb") as sink:
            with pa.ipc.new_stream(sink, self.table.schema) as writer:
                writer.write_table(self.table)
        self.file = file


def read_faiss(file: Path, described: list[Any]) -> faiss.Index:
    """The FAISS index in a file that [`describe`] described."""
    try:
        if describe(file) != described:
            raise OSError("its content is not what was written")
        return faiss.read_index(str(file))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {REBUILD}") from error


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Be the one who writes to a directory. A `ValueError` if another process does, an `OSError` if it cannot be written."""
    name = directory / ".writer"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory / ".lock", timeout=0)
        lock.acquire()
        name.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except filelock.Timeout:
        writer = name.read_text(encoding="utf-8") if name.exists() else "another process"
        raise ValueError(f"{directory} is being written by {writer}. Wait for it, or write elsewhere.") from None
    except OSError as error:
        raise OSError(error.errno, f"{directory} cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        lock.release()


def write_json(file: Path, content: dict[str, Any]) -> str:
    """Write what names the files of an index, with its own checksum. Returns the text."""
    text = json.dumps({**content, "format_version": FORMAT_VERSION, "sha256": _checksum(content)}, indent=1)
    with replacing(file) as path:
        path.write_text(text, encoding="utf-8")
    return text


def read_json(file: Path) -> tuple[str, dict[str, Any]]:
    """What [`write_json`] wrote, as text and content."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. Write an index there with `hf-sugar index`.")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        version, checksum = content.pop("format_version"), content.pop("sha256")
        if version != FORMAT_VERSION:
            raise ValueError(f"it has format version {version}, this version of hf_sugar reads {FORMAT_VERSION}")
        if checksum != _checksum(content):
            raise ValueError("its content is not what was written")
        return text, content
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}). {REBUILD}") from error


def stored_truncate_dim(directory: str | os.PathLike) -> int | None:
    """The `truncate_dim` of the embedder by which the index in a directory was built, as its fingerprint has it."""
    found = re.search(r"#truncate_dim=(\d+)", read_json(Path(directory, "index.json"))[1]["fingerprint"])
    return found and int(found[1])


def describe(file: Path) -> list[Any]:
    """Name, size and checksum of a file."""
    with file.open("rb") as stream:
        return [file.name, file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
