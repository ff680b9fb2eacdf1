"""The FAISS indexes of approximate search: which settings they take, and how they are built."""

import re
from math import lcm

import faiss
import numpy as np


def check_factory(factory: str, search_options: str | None, dim: int | None = None, count: int | None = None) -> None:
    """An error unless FAISS takes these settings of [`SugarIndex`], as far as that can be known before anything is
    embedded: with `dim`, if it is known, for `count` embeddings."""
    # of an unknown dimension, one that the subquantizers divide
    width = dim or 64 * lcm(*(int(m) or 1 for m in re.findall(r"PQ(\d+)", factory)))
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        faiss.ParameterSpace().set_index_parameters(index, search_options or "")
    except RuntimeError as error:
        raise ValueError(
            f"FAISS does not take `factory={factory!r}` with `search_options={search_options!r}` for embeddings of dimension "
            f"{dim or 'any'} ({_reason(error)}). Take one such as 'Flat', 'HNSW32' or 'IVF1024,PQ32'."
        ) from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or factory.startswith("IDMap"):
        raise ValueError(
            f"`factory={factory!r}` cannot be used: items are searched by inner product, and numbered by the index itself."
        )
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and count is not None and count < ivf.nlist:
        raise ValueError(
            f"FAISS cannot train the {ivf.nlist} clusters of {factory!r} on {count} embeddings. Take fewer."
        )
    for option in [] if search_options is None else search_options.split(","):
        name, _, value = option.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", value) or (float(value) == 0 and name.endswith(("nprobe", "efSearch"))):
            raise ValueError(f"`search_options` has {option!r}; give parameters as 'nprobe=16', above zero.")


def build_faiss(embeddings: np.ndarray, factory: str) -> faiss.Index:
    """An index of embeddings of shape `(items, dim)`, trained on them."""
    index = faiss.index_factory(embeddings.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    try:
        index.train(embeddings)
        index.add(embeddings)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS cannot train {factory!r} on {len(embeddings)} embeddings of dimension {embeddings.shape[1]}: {_reason(error)}"
        ) from error
    return index


def _reason(error: Exception) -> str:
    return str(error).splitlines()[-1].rpartition(": ")[2]  # without the line of FAISS's source
