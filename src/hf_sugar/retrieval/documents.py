"""What an index holds: anything that can be embedded, brought into rows, and rows brought into Arrow tables."""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ..data.images import load_image, undecoded
from ..inference import TEXT_SUFFIXES, SugarEmbedder, as_row
from ..models.processing_sugar import IMAGE_SUFFIXES
from ..models.rows_sugar import fill_images


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


def embedded_part(row: dict[str, Any], by: str, where: str) -> list[str | Image.Image] | dict[str, Any]:
    """
    What of a row is embedded.

    Args:
        row (`dict`):
            Row in the conversational vision format.
        by (`str`):
            `"question"`: the images and texts of the user, without the answers. `"document"`: all of it. `"images"` or
            `"texts"`: only these. `"auto"`: the question where there are answers, else the document.
        where (`str`):
            What error messages call the row.

    Returns:
        `list[str | PIL.Image.Image]` or `dict`: slices in reading order; the row itself for a whole conversation, whose
        roles count.

    Raises:
        `ValueError`: if the row has no such part or is malformed.
    """
    messages = fill_images(row["messages"], row["images"], where)
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
    return [part["text"] if part["type"] == "text" else load_image(part["image"], where) for part in parts]


def blocks(items: Iterable[Any], size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, list[Any]]]:
    """
    Every `ranks`-th block of `size` items with its number, beginning with block `rank`.

    Args:
        items (`Iterable`):
            Items. Of a dataset or another sequence only the wanted blocks are read, and images are not decoded.
        size (`int`):
            Items in a block; the last one may be smaller.
        rank (`int`, *optional*, defaults to `0`):
            Number of this process.
        ranks (`int`, *optional*, defaults to `1`):
            Processes that share the work.
    """
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


class Block:
    """
    Some documents on their way into an index.

    Args:
        items (`list`):
            What [`as_row`] takes.
        metadata (`Sequence[dict]` or `None`):
            One for each; by default a row's `id`, a file's `path`, a `text`.
        start (`int`):
            Position of the first one, for error messages.
    """

    def __init__(self, items: list[Any], metadata: Sequence[dict[str, Any]] | None, start: int):
        self.items = items
        self.names = [f"item {start + n}" for n in range(len(items))]
        self.rows = [as_row(item, name) for item, name in zip(items, self.names, strict=True)]
        if metadata is None:
            metadata = [_default_metadata(item) for item in items]
        self.columns = {
            "metadata": [json.dumps(entry, ensure_ascii=False) for entry in metadata],
            "row": [
                json.dumps({name: row[name] for name in ("messages", "loss_on", "id")}, ensure_ascii=False)
                for row in self.rows
            ],
            "images": [[_stored(image) for image in row["images"]] for row in self.rows],
        }

    def key(self, *settings: Any) -> str:
        """Name of the content and of all that decides its embeddings."""
        digest = hashlib.blake2b(json.dumps([settings, self.columns["metadata"], self.columns["row"]]).encode())
        for image in (image for images in self.columns["images"] for image in images):
            if image["bytes"] is None:
                state = os.stat(image["path"])
                digest.update(f"{image['path']} {state.st_size} {state.st_mtime_ns}".encode())
            else:
                digest.update(hashlib.blake2b(image["bytes"]).digest())
        return digest.hexdigest()[:32]

    def embed(self, embed: Callable[[Sequence[Any]], np.ndarray], by: str, every_slice: bool) -> list[np.ndarray]:
        """Embeddings of each document: of shape `(slices, dim)`, or `(1, dim)` without `every_slice`."""
        parts = [
            embedded_part(row, by, name) if isinstance(item, dict) else item
            for item, row, name in zip(self.items, self.rows, self.names, strict=True)
        ]
        if every_slice:
            return embed.every_slice(parts)
        return list(np.asarray(embed(parts), dtype=np.float32)[:, None])


IMAGE_TYPE = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])


def to_table(columns: dict[str, list[Any]], embeddings: list[np.ndarray]) -> pa.Table:
    """
    Documents and their embeddings as one chunk.

    Args:
        columns (`dict[str, list]`):
            `metadata` and `row` (JSON) and `images` of each document.
        embeddings (`list[np.ndarray]`):
            Of shape `(slices, dim)` for each document.
    """
    values = np.concatenate(embeddings)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    offsets = np.cumsum([0, *map(len, embeddings)])
    return pa.table(
        {
            "embeddings": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), vectors),
            "metadata": pa.array(columns["metadata"], pa.string()),
            "row": pa.array(columns["row"], pa.string()),
            "images": pa.array(columns["images"], pa.list_(IMAGE_TYPE)),
        }
    )


def checked_embedder(embed: Any, fingerprint: str | None, by: str, every_slice: bool) -> str:
    """The fingerprint of the model behind `embed`, after a look at whether the settings are possible with it."""
    if by not in PARTS:
        raise ValueError(f"`by` is {by!r}; use one of {', '.join(PARTS)}.")
    if every_slice and not isinstance(embed, SugarEmbedder):
        raise ValueError("`every_slice` needs a `SugarEmbedder` for `embed`: another function gives one embedding.")
    if fingerprint is None:
        fingerprint = embed.fingerprint if isinstance(embed, SugarEmbedder) else ""
    return fingerprint


def _default_metadata(item: Any) -> dict[str, Any]:
    if isinstance(item, dict):
        return {} if item.get("id") is None else {"id": item["id"]}
    if isinstance(item, Path):
        return {"path": str(item)}
    return {"text": item} if isinstance(item, str) else {}


def _stored(image: Any) -> dict[str, Any]:
    """A file stays a file, named by its full path; anything else becomes bytes."""
    image = datasets.Image().encode_example(str(image) if isinstance(image, Path) else image)
    if image.get("bytes") is None:
        return {"bytes": None, "path": os.path.abspath(image["path"])}
    return {"bytes": image["bytes"], "path": image.get("path")}
