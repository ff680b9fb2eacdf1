"""What every index has: the interface of a backend, and what its search returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..inference import SugarEmbedder
from ..models.fingerprint_sugar import same_fingerprint
from .documents import PARTS, checked


@dataclass(frozen=True)
class Hit:
    """
    One found document, or one place in it.

    Args:
        index (`int`): Number of the document in the index, for `index.documents`.
        score (`float`): Cosine with the query.
        metadata (`dict[str, Any]`): What was stored with the document.
        slice (`int`, *optional*): The slice after which it was found, from 0, in an index of every slice.
    """

    index: int
    score: float
    metadata: dict[str, Any]
    slice: int | None = None


class Index(ABC):
    """Embedded documents that can be searched. A new vector store is a subclass, beside [`SugarIndex`]."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def add(self, items: Iterable[Any], metadata: Sequence[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        """Embed documents and put them into the index."""

    @abstractmethod
    def delete(self, documents: Sequence[int]) -> None:
        """Take documents out, by their numbers; an `IndexError` if one is not there."""

    @abstractmethod
    def search(self, queries: Sequence[Any] | np.ndarray, k: int = 5) -> list[list[Hit]]:
        """The k most similar items of each query, best first."""

    @abstractmethod
    def document(self, number: int) -> dict[str, Any]:
        """An indexed row in the conversational vision format: `messages`, `images` (bytes or paths) and `id`."""

    @property
    def documents(self) -> "Index":
        """The indexed rows by number, `index.documents[hit.index]`."""
        return self

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.document(number)


def check_embedder(embed: Any, fingerprint: str | None, by: str) -> str:
    """The fingerprint of the model behind `embed`, after a look at `by`."""
    if by not in PARTS:
        raise ValueError(f"`by` is {by!r}; use one of {', '.join(PARTS)}.")
    if fingerprint is None:
        fingerprint = embed.fingerprint if isinstance(embed, SugarEmbedder) else ""
    return fingerprint


def check_fingerprint(where: Any, stored: str, asked: str) -> None:
    """An error unless an index is of the model that will embed the queries."""
    (first, _, how), (second, _, how_asked) = stored.partition("#"), asked.partition("#")
    if how != how_asked or not same_fingerprint(first, second):
        raise ValueError(f"{where} was built with another model or pooling. Load that model, or build the index anew.")


def embedded_queries(
    queries: Sequence[Any] | np.ndarray, k: int, embed: Callable[[Sequence[Any]], np.ndarray] | None, dim: int
) -> np.ndarray:
    """Queries as L2-normalised embeddings, or the error that says what is wrong with them."""
    if k < 1:
        raise ValueError(f"`k` is {k}; ask for at least 1 hit.")
    if not isinstance(queries, np.ndarray):
        if not isinstance(queries, Sequence) or isinstance(queries, str):
            raise TypeError(f"`queries` is a single {type(queries).__name__}. Put it in a list.")
        if embed is None:
            raise ValueError("The index has no `embed` function. Pass one to `SugarIndex.load`, or embed the queries.")
        queries = embed(queries) if len(queries) > 0 else np.empty((0, dim), np.float32)
    queries = checked(queries, "queries")
    if queries.shape[1] != dim:
        raise ValueError(
            f"`queries` have dimension {queries.shape[1]} but the index has {dim}. Embed them with its model."
        )
    return queries
