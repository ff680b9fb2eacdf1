"""What every index has: the interface of a backend, and what its search returns."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Hit:
    """
    One found document, or one place in it.

    Args:
        index (`int`):
            Number of the document in the index, for `index.documents`.
        score (`float`):
            Cosine with the query.
        metadata (`dict[str, Any]`):
            What was stored with the document.
        slice (`int`, *optional*):
            The slice after which the document was found, from 0, in an index of every slice.
    """

    index: int
    score: float
    metadata: dict[str, Any]
    slice: int | None = None


class Index(ABC):
    """
    Embedded documents that can be searched. A new vector store is a subclass beside [`SugarIndex`].

    Attributes:
        documents (`Mapping` or `Sequence`): `documents[hit.index]` is the row that was indexed, in the conversational
            vision format: `messages`, `images` (bytes or paths) and `id`.
    """

    documents: Any

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def add(self, items: Iterable[Any], metadata: Sequence[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        """Embed documents and put them at the end."""

    @abstractmethod
    def delete(self, documents: Sequence[int]) -> None:
        """Take documents out."""

    @abstractmethod
    def search(self, queries: Sequence[Any] | np.ndarray, k: int = 5) -> list[list[Hit]]:
        """The k most similar items of each query, best first."""
