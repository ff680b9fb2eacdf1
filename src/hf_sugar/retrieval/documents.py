"""What an index holds: anything that can be embedded, brought into rows of one `datasets` schema with its embeddings."""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..data.images import load_image, stored_image, undecoded
from ..inference import TEXT_SUFFIXES, SugarEmbedder, as_row
from ..models.rows_sugar import IMAGE_SUFFIXES, check_row, fill_images, row_name


logger = logging.getLogger(__name__)

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
            embedded = _embedded(row, by, name, decode)
        images = [stored_image(image, f"{name}, images[{n}]") for n, image in enumerate(row["images"])]
        for n, image in enumerate(images):
            if image["bytes"] is None and not os.path.isfile(image["path"]):
                load_image(image, f"{name}, images[{n}]")  # says what is wrong
        if metadata is None and isinstance(item, Path | str):
            metadata = {"path" if isinstance(item, Path) else "text": str(item)}
        elif metadata is None:
            metadata = {} if row["id"] is None else {"id": row["id"]}
        stored = {key: row[key] for key in ("messages", "loss_on", "id")}
        return cls(name, embedded, *(json.dumps(entry, ensure_ascii=False) for entry in (metadata, stored)), images)

    def digest(self) -> bytes:
        """Of the content: the bytes of its files, not their names."""
        digest = hashlib.blake2b(f"{len(self.metadata)} {self.metadata}{self.row}".encode(), digest_size=16)
        for image in self.images:
            content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
            digest.update(hashlib.blake2b(content).digest())
        return digest.digest()


def read_documents(
    items: Iterable[Any],
    metadata: Sequence[dict[str, Any]] | None,
    embed: Callable[[Sequence[Any]], np.ndarray],
    by: str,
    shard_size: int,
    on_bad_row: str,
    progress: bool,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[int, list[Document]]]:
    """Documents of every `ranks`-th block of `shard_size` items, with the number of the block, beginning with block `rank`.
    With `on_bad_row="skip"` what cannot be read is left out, with a warning."""
    total = len(items) if hasattr(items, "__len__") else None
    if shard_size < 1 or on_bad_row not in ("error", "skip"):
        raise ValueError(f"`shard_size={shard_size}`, `on_bad_row={on_bad_row!r}`: use 1 or more, error or skip.")
    if metadata is not None and total not in (None, len(metadata)):
        raise ValueError(f"{len(metadata)} `metadata` for {total} items. Give one for each item.")
    if isinstance(items, datasets.Dataset | datasets.IterableDataset):
        items = undecoded(items)
    pairs = zip(items, repeat(None) if metadata is None else metadata, strict=metadata is not None)
    decode = not isinstance(embed, SugarEmbedder)
    with tqdm(total=total, desc="Indexing", unit="document", disable=not progress or rank > 0) as bar:
        for number, block in enumerate(iter(lambda: list(islice(pairs, shard_size)), [])):
            bar.update(len(block))
            documents = []
            for n, (item, entry) in enumerate(block if number % ranks == rank else [], number * shard_size):
                name = row_name(item, n) if isinstance(item, dict) else f"item {n}"
                try:
                    documents.append(Document.of(item, name, by, entry, decode))
                except ValueError as error:
                    if on_bad_row == "error":
                        raise
                    logger.warning("Left out: %s", error)
            if documents:
                yield number, documents


def embed_documents(
    documents: list[Document],
    embed: Callable[[Sequence[Any]], np.ndarray],
    every_slice: bool,
    on_bad_row: str,
    dim: int | None,
) -> tuple[list[Document], list[np.ndarray]]:
    """
    Embeddings of documents, of shape `(slices, dim)` each, or `(1, dim)` without `every_slice`, and the documents that
    have some: all of them, unless bad ones are skipped. `dim` is the dimension that they have to have.
    """
    if every_slice and not isinstance(embed, SugarEmbedder):
        raise ValueError("`every_slice` needs a `SugarEmbedder` for `embed`: another function gives one embedding.")
    if not documents:
        return [], []
    errors: dict[int, ValueError] = {}
    items = [document.embedded for document in documents]
    if isinstance(embed, SugarEmbedder):
        names = [document.name for document in documents]
        found = embed.every_slice(items, errors if on_bad_row == "skip" else None, names)
        embeddings = [e if every_slice else e[-1:] for e in found if e is not None]
    else:
        embeddings = list(np.asarray(embed(items), dtype=np.float32)[:, None])
        if len(embeddings) != len(items):
            raise ValueError(f"`embed` gave {len(embeddings)} embeddings for {len(items)} items.")
    for error in errors.values():
        logger.warning("Left out: %s", error)
    if embeddings:
        width = checked(np.concatenate(embeddings), "embeddings").shape[1]
        if dim is not None and width != dim:
            raise ValueError(f"The new embeddings have dimension {width}, the index {dim}.")
    return [document for n, document in enumerate(documents) if n not in errors], embeddings


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
    first = [d for document, vectors in zip(documents, embeddings) for d in (document, *[None] * (len(vectors) - 1))]
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]),
        np.concatenate([np.arange(len(vectors), dtype=np.int32) for vectors in embeddings]),
        [document.metadata for document, vectors in zip(documents, embeddings) for _ in vectors],
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
            f"`{name}[{bad[0]}]` has norm {norms[bad[0]]:.4g}, and so {len(bad)} of {len(norms)} are not L2-normalised. "
            "Divide each by its norm."
        )
    return embeddings


def _embedded(row: dict[str, Any], by: str, where: str, decode: bool) -> Any:
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
