"""What an index holds: anything that can be embedded, brought into rows of one `datasets` schema with its embeddings."""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..data.images import load_image, stored_image, undecoded
from ..inference import TEXT_SUFFIXES, ItemError, SugarEmbedder, as_row, refuse
from ..models.rows_sugar import IMAGE_SUFFIXES, check_row, fill_images, row_name


logger = logging.getLogger(__name__)

PARTS = ("auto", "question", "document", "images", "texts")


def find_files(patterns: Sequence[str | os.PathLike]) -> list[Path]:
    """
    Image and text files to index.

    Args:
        patterns (`Sequence[str | os.PathLike]`):
            Files, folders (searched with all folders in them) and patterns such as `"photos/*.jpg"`.

    Returns:
        `list[Path]`: in alphabetical order, each once.

    Raises:
        `FileNotFoundError`: if nothing fits one of the patterns.
    """
    found = set()
    for pattern in patterns:
        matches = [Path(path) for path in glob.glob(str(pattern), recursive=True)]
        files = [file for path in matches for file in (path.rglob("*") if path.is_dir() else [path])]
        files = [file for file in files if file.suffix.lower() in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES) and file.is_file()]
        if not files:
            raise FileNotFoundError(
                f"{str(pattern)!r} names no image or text file ({', '.join((*IMAGE_SUFFIXES, *TEXT_SUFFIXES))})."
            )
        found |= set(files)
    return sorted(found)


def blocks(items: Iterable[Any], size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, list[Any]]]:
    """Every `ranks`-th block of `size` items with its number, beginning with block `rank`. Of a sequence only the wanted
    blocks are read, and images of a dataset are not decoded."""
    if isinstance(items, datasets.Dataset | datasets.IterableDataset):
        items = undecoded(items)
    if isinstance(items, Sequence | datasets.Dataset):
        for number in range(rank, -(-len(items) // size), ranks):
            yield number, [items[i] for i in range(number * size, min((number + 1) * size, len(items)))]
        return
    iterator, number = iter(items), 0
    while block := list(islice(iterator, size)):
        if number % ranks == rank:
            yield number, block
        number += 1


@dataclass
class Document:
    """One item on its way into an index: what messages call it, what of it is embedded (as [`~inference.as_row`] takes
    it), whether that is slices cut out of it, and the columns that are stored."""

    name: str
    embedded: Any
    sliced: bool
    metadata: str
    row: str | None
    images: list[dict[str, Any]]

    @classmethod
    def of(cls, item: Any, name: str, by: str, metadata: dict[str, Any] | None) -> "Document":
        row, embedded = as_row(item, name), item
        if isinstance(item, dict) or by in ("images", "texts"):
            check_row(row, len(row["images"]), name, loss=False)
            embedded = _embedded(row, by, name)
        return cls(
            name,
            embedded,
            embedded is not item and isinstance(embedded, list),
            json.dumps(_default_metadata(item) if metadata is None else metadata, ensure_ascii=False),
            json.dumps({key: row[key] for key in ("messages", "loss_on", "id")}, ensure_ascii=False),
            [_stored(image, f"{name}, images[{n}]") for n, image in enumerate(row["images"])],
        )

    def digest(self) -> bytes:
        """Of the content: the bytes of its files, not their names."""
        digest = hashlib.blake2b(f"{len(self.metadata)} {self.metadata}{self.row}".encode(), digest_size=16)
        for image in self.images:
            content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
            digest.update(hashlib.blake2b(content).digest())
        return digest.digest()


def read_documents(
    items: Sequence[Any], metadata: Sequence[dict[str, Any]] | None, start: int, by: str, on_bad_row: str
) -> list[Document]:
    """Documents of some items, of which the first has the number `start`. With `on_bad_row="skip"` what cannot be read is
    left out, with a warning."""
    documents = []
    for n, item in enumerate(items):
        name = row_name(item, start + n) if isinstance(item, dict) else f"item {start + n}"
        try:
            documents.append(Document.of(item, name, by, None if metadata is None else metadata[n]))
        except ValueError as error:
            if on_bad_row == "error":
                raise
            logger.warning("Left out: %s", error)
    return documents


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
    errors: dict[int, ItemError] = {}
    try:
        if isinstance(embed, SugarEmbedder):
            items = [document.embedded for document in documents]
            found = embed.every_slice(items, errors) if on_bad_row == "skip" else embed.every_slice(items)
            embeddings = [e if every_slice else e[-1:] for e in found if e is not None]
        else:
            items = _decoded(documents, errors if on_bad_row == "skip" else None)
            embeddings = list(np.asarray(embed(items), dtype=np.float32)[:, None]) if items else []
            if len(embeddings) != len(items):
                raise ValueError(f"`embed` gave {len(embeddings)} embeddings for {len(items)} items.")
    except ItemError as error:
        raise ValueError(_named(error, documents)) from error
    for error in errors.values():
        logger.warning("Left out: %s", _named(error, documents))
    if embeddings:
        width = checked(np.concatenate(embeddings), "embeddings").shape[1]
        if dim is not None and width != dim:
            raise ValueError(f"The new embeddings have dimension {width}, the index {dim}.")
    return [document for n, document in enumerate(documents) if n not in errors], embeddings


def to_table(documents: Sequence[Document], embeddings: Sequence[np.ndarray]) -> pa.Table:
    """Documents and their embeddings, of shape `(slices, dim)` each, as a table of `datasets`."""
    vector = datasets.List(datasets.Value("float32"), length=embeddings[0].shape[1])
    text, images = datasets.Value("string"), datasets.List(datasets.Image(decode=False))
    columns = {"embeddings": datasets.List(vector), "metadata": text, "row": text, "images": images}
    schema = datasets.Features(columns).arrow_schema
    tables, start, size = [], 0, 0
    for n, document in enumerate(documents):
        size += sum(len(image["bytes"] or b"") for image in document.images)
        if size > 1 << 30 or n == len(documents) - 1:  # an array of `datasets` holds at most 2 GB
            some = documents[start : n + 1]
            values = np.concatenate(embeddings[start : n + 1])
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
            offsets = np.cumsum([0, *map(len, embeddings[start : n + 1])], dtype=np.int32)
            columns = [
                pa.ListArray.from_arrays(pa.array(offsets), vectors),
                [document.metadata for document in some],
                [document.row for document in some],
                pa.array([document.images for document in some], schema.field("images").type),
            ]
            tables.append(pa.table(columns, schema=schema))
            start, size = n + 1, 0
    return pa.concat_tables(tables)


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


def _embedded(row: dict[str, Any], by: str, where: str) -> Any:
    """What of a row is embedded: parts in reading order, their images as they are stored; the row itself for a whole
    conversation, whose roles count."""
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
    return [part["text"] if part["type"] == "text" else part for part in parts]


def _decoded(documents: list[Document], errors: dict[int, ItemError] | None) -> list[Any]:
    """What a function of the user's takes: items as they were given; of rows their slices, with images decoded."""
    items = []
    for n, document in enumerate(documents):
        try:
            item = document.embedded
            if document.sliced:
                item = [s if isinstance(s, str) else load_image(s["image"], f"item {n}") for s in item]
            items.append(item)
        except ValueError as error:
            refuse(ItemError(str(error), n), errors)
    return items


def _named(error: ItemError, documents: list[Document]) -> str:
    return str(error).replace(f"item {error.item}", documents[error.item].name, 1)


def _default_metadata(item: Any) -> dict[str, Any]:
    if isinstance(item, dict):
        return {} if item.get("id") is None else {"id": item["id"]}
    if isinstance(item, Path):
        return {"path": str(item)}
    return {"text": item} if isinstance(item, str) else {}


def _stored(image: Any, where: str) -> dict[str, Any]:
    stored = stored_image(image, where)
    if stored["bytes"] is None and not os.path.isfile(stored["path"]):
        load_image(image, where)  # says what is wrong
    return stored
