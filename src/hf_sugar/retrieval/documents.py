"""What an index holds: anything that can be embedded, brought into rows of one `datasets` schema with its embeddings."""

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..data.images import load_image, stored_image
from ..models.rows_sugar import IMAGE_SUFFIXES, TEXT_SUFFIXES, as_row, check_row, fill_images


PARTS = ("auto", "question", "document", "images", "texts")


def find_files(patterns: Sequence[str | os.PathLike]) -> list[Path]:
    """
    Image and text files to index, in alphabetical order, each once.

    Args:
        patterns (`Sequence[str | os.PathLike]`):
            Files, folders (searched with all folders in them) and patterns such as `"photos/*.jpg"`. A
            `FileNotFoundError` if nothing fits one of them.
    """
    found = set()
    for pattern in patterns:
        matches = [Path(path) for path in glob.glob(str(pattern), recursive=True)]
        files = [file for path in matches for file in (path.rglob("*") if path.is_dir() else [path])]
        files = [file for file in files if file.suffix.lower() in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES) and file.is_file()]
        if not files:
            suffixes = ", ".join((*IMAGE_SUFFIXES, *TEXT_SUFFIXES))
            raise FileNotFoundError(f"{str(pattern)!r} names no image or text file ({suffixes}).")
        found |= set(files)
    return sorted(found)


@dataclass
class Document:
    """One item on its way into an index: what messages call it, what of it is embedded, and the columns that are stored."""

    name: str
    embedded: Any
    metadata: str
    row: str | None
    images: list[dict[str, Any]]

    @classmethod
    def of(cls, item: Any, name: str, by: str, metadata: dict[str, Any] | None, decode: bool) -> "Document":
        row, embedded = as_row(item, name), item
        if isinstance(item, dict) or by in ("images", "texts"):
            check_row(row, len(row["images"]), name, loss=False)
            embedded = embedded_part(row, by, name, decode)
        images = [stored_image(image, f"{name}, images[{n}]") for n, image in enumerate(row["images"])]
        for n, image in enumerate(images):
            if image["bytes"] is None and not os.path.isfile(image["path"]):
                load_image(image, f"{name}, images[{n}]")  # says what is wrong
        if metadata is None and isinstance(item, Path | str):
            metadata = {"path" if isinstance(item, Path) else "text": str(item)}
        elif metadata is None:
            metadata = {} if row["id"] is None else {"id": row["id"]}
        stored = json.dumps({key: row[key] for key in ("messages", "loss_on", "id")}, ensure_ascii=False)
        return cls(name, embedded, json.dumps(metadata, ensure_ascii=False), stored, images)

    def digest(self) -> bytes:
        """Of the content: the bytes of its files, not their names."""
        digest = hashlib.blake2b(f"{len(self.metadata)} {self.metadata}{self.row}".encode(), digest_size=16)
        for image in self.images:
            content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
            digest.update(hashlib.blake2b(content).digest())
        return digest.digest()


def item_features(dim: int) -> datasets.Features:
    """Columns of an index: a row for each embedding. The first of a document holds the document."""
    vector, text = datasets.List(datasets.Value("float32"), length=dim), datasets.Value("string")
    images = datasets.List(datasets.Image(decode=False))
    number = datasets.Value("int32")
    return datasets.Features(embeddings=vector, slice=number, metadata=text, row=text, images=images)


def to_table(documents: Sequence[Document], embeddings: Sequence[np.ndarray]) -> pa.Table:
    """Documents and their embeddings, of shape `(slices, dim)` each, as a table of [`item_features`]."""
    if len(documents) > 1 and sum(len(i["bytes"] or b"") for d in documents for i in d.images) > 1 << 30:
        half = len(documents) // 2  # an array of `datasets` holds at most 2 GB
        return pa.concat_tables(
            [to_table(documents[:half], embeddings[:half]), to_table(documents[half:], embeddings[half:])]
        )
    values = np.concatenate(embeddings)
    schema = item_features(values.shape[1]).arrow_schema
    counts = [len(vectors) for vectors in embeddings]
    slices = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    every = [document for document, count in zip(documents, counts) for _ in range(count)]
    first = [None if n else document for document, n in zip(every, slices.tolist())]
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]),
        slices,
        [document.metadata for document in every],
        [document and document.row for document in first],
        pa.array([document and document.images for document in first], schema.field("images").type),
    ]
    return pa.table(columns, schema=schema)


def stored_row(row: str | None, images: list[dict[str, Any]]) -> dict[str, Any]:
    """A row as it was put into the index."""
    if row is None:
        raise ValueError("The index was made of embeddings alone and holds no documents. Build it with `build`.")
    return {**json.loads(row), "images": images}


def checked(embeddings: np.ndarray, name: str) -> np.ndarray:
    """Embeddings as a contiguous float32 array, or an error if they are not L2-normalised."""
    if embeddings.ndim != 2:
        raise ValueError(f"`{name}` has shape {embeddings.shape}; expected (items, dim).")
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    norms = np.linalg.norm(embeddings, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-2))  # bfloat16 normalises to about 4e-3; NaN is bad as well
    if len(bad) > 0:
        raise ValueError(
            f"`{name}[{bad[0]}]` has norm {norms[bad[0]]:.4g}, and so {len(bad)} of {len(norms)} are not L2-normalised."
        )
    return embeddings


def embedded_part(row: dict[str, Any], by: str, where: str, decode: bool) -> Any:
    """What of a row is embedded: parts in reading order, their images as they are stored, or decoded for a function of the
    user's; the row itself for a whole conversation, whose roles count."""
    messages = fill_images(row["messages"], row["images"])
    roles = {message["role"] for message in messages}
    if by == "auto":
        by = "question" if "assistant" in roles else "document"
    if by == "document" and roles != {"user"}:
        return row
    kinds = {"images": ("image",), "texts": ("text",)}.get(by, ("image", "text"))
    asked = ("user",) if by == "question" else ("user", "assistant")
    parts = [part for m in messages if m["role"] in asked for part in m["content"] if part["type"] in kinds]
    if not parts:
        raise ValueError(f"{where} has nothing to index by {by!r}. Index it by another part, or leave it out.")
    if decode:
        parts = [load_image(part["image"], where) if part["type"] == "image" else part for part in parts]
    return [part["text"] if isinstance(part, dict) and part["type"] == "text" else part for part in parts]
