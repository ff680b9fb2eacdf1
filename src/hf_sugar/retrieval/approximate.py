"""The FAISS indexes of approximate search: which settings they take, and their files."""

import re
from math import lcm
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from .storage import REBUILD, describe, write_atomically


def check_factory(factory: str, search_options: str | None, dim: int | None = None, count: int | None = None) -> None:
    """
    Whether FAISS takes these settings, as far as it can be known before anything is embedded.

    Args:
        factory (`str`), search_options (`str`, *optional*):
            As in [`SugarIndex`].
        dim (`int`, *optional*):
            Dimension of the embeddings.
        count (`int`, *optional*):
            How many there will be.

    Raises:
        `ValueError`: if not.
    """
    of_dim, width = f" for embeddings of dimension {dim}", dim
    if dim is None:  # any that the subquantizers divide
        subquantizers = lcm(*(int(m) or 1 for m in re.findall(r"PQ(\d+)", factory)))
        of_dim, width = "", subquantizers * -(-1024 // subquantizers)
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS does not take `factory={factory!r}`{of_dim} ({_reason(error)}).") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or factory.startswith("IDMap"):
        raise ValueError(
            f"`factory={factory!r}` cannot be used: documents are searched by inner product and numbered by the index "
            "itself. Take one such as 'Flat', 'HNSW32' or 'IVF1024,PQ32', without IDMap."
        )
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and count is not None and count < ivf.nlist:
        raise ValueError(
            f"FAISS cannot train {factory!r} on {count} embeddings: it has {ivf.nlist} clusters. Take fewer, or 'Flat'."
        )
    if search_options is None:
        return
    for option in search_options.split(","):
        name, _, value = option.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", value) or (float(value) == 0 and name.endswith(("nprobe", "efSearch"))):
            raise ValueError(f"`search_options` has {option!r}; give parameters as 'nprobe=16', above zero.")
    try:
        faiss.ParameterSpace().set_index_parameters(index, search_options)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS does not take `search_options={search_options!r}` for {factory!r} ({_reason(error)})."
        ) from error


def build_faiss(embeddings: np.ndarray, factory: str) -> faiss.Index:
    """An index of embeddings of shape `(items, dim)`, trained on them."""
    index = faiss.index_factory(embeddings.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    try:
        index.train(embeddings)
        index.add(embeddings)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS cannot train {factory!r} on {len(embeddings)} embeddings of dimension {embeddings.shape[1]} "
            f"({_reason(error)}). Take fewer clusters, other subquantizers, or 'Flat'."
        ) from error
    return index


def write_faiss(file: Path, index: faiss.Index) -> None:
    """Write an index to a file."""
    write_atomically(file, lambda path: faiss.write_index(index, str(path)))


def read_faiss(directory: Path, described: list[Any], items: int, dim: int, memory_map: bool) -> faiss.Index:
    """
    The index that a file holds.

    Args:
        directory (`Path`), described (`list`):
            Where it is, and what [`~retrieval.storage.describe`] said of it when it was written.
        items (`int`), dim (`int`):
            What it has to hold.
        memory_map (`bool`):
            Whether to leave it on the disk; its checksum is not compared then.

    Raises:
        `ValueError`: if it is anything else; names the file.
    """
    file = directory / described[0]
    try:
        if (file.stat().st_size != described[1]) if memory_map else (describe(file) != described):
            raise OSError("its content is not what was written")
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if memory_map else 0)
        if (index.ntotal, index.d, index.metric_type) != (items, dim, faiss.METRIC_INNER_PRODUCT):
            raise OSError("it holds other items, of another dimension or metric")
        return index
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {REBUILD}") from error


def _reason(error: Exception) -> str:
    return str(error).splitlines()[-1].rpartition(": ")[2]  # without the line of FAISS's source
