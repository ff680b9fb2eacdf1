"""What every index has: how documents are added and queries embedded, and what a search returns."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from ..data.images import undecoded
from ..distributed import distributed_state
from ..inference import SugarEmbedder, in_role, require_several, require_sizes
from ..models.fingerprint_sugar import same_fingerprint
from ..models.rows_sugar import row_name, row_parts
from .documents import PARTS, Document, checked, embedded_part


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """
    One found document, or one place in it.

    Args:
        index (`int`): Number of the document in the index, for `index.documents`.
        score (`float`):
            Cosine with the query; summed over its slices in late interaction; once reranked, what [`SugarReranker`] says.
        metadata (`dict[str, Any]`): What was stored with the document.
        slice (`int`, *optional*): The slice after which it was found, from 0, in an index of every slice.
    """

    index: int
    score: float
    metadata: dict[str, Any]
    slice: int | None = None

    @property
    def name(self) -> str:
        """`str`: what it is called: the id or the file name of its document, else its number."""
        return str(self.metadata.get("id") or Path(self.metadata.get("path", "")).name or f"#{self.index}")


class Index(ABC):
    """Embedded documents that can be searched. A new vector store is a subclass, beside [`SugarIndex`]: its constructor
    calls `_set_model`, its `_add` embeds blocks of documents with `_embed` and stores them."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """`int`: dimension of the embeddings."""

    @abstractmethod
    def __getitem__(self, number: int) -> dict[str, Any]:
        """An indexed row in the conversational vision format: `messages`, `images` (bytes or paths) and `id`."""

    @abstractmethod
    def delete(self, documents: Sequence[int]) -> None:
        """Take documents out, by their numbers; an `IndexError` if one is not there."""

    @abstractmethod
    def _add(self, blocks: Iterator[tuple[int, list[Document]]], on_bad_row: str) -> None: ...

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> list[list[Hit]]: ...

    @property
    def documents(self) -> "Index":
        """The indexed rows by number, `index.documents[hit.index]`."""
        return self

    def add(
        self,
        items: Iterable[Any],
        metadata: Sequence[dict[str, Any]] | None = None,
        *,
        shard_size: int = 1024,
        on_bad_row: str = "error",
        progress: bool = False,
    ) -> None:
        """
        Embed documents and put them into the index. Outside of memory what is embedded is kept at once, so the same call
        after an interruption goes on, and under `accelerate launch` the processes share the work; a [`SugarIndex`] in a
        directory changes only by [`~SugarIndex.save`].

        Args:
            items (`Iterable`):
                Rows of [`hf_sugar.data.load_data`] or any dataset of that format, or whatever else [`~models.rows_sugar.as_row`]
                takes. A `str` is always a text.
            metadata (`Sequence[dict[str, Any]]`, *optional*):
                One JSON-serialisable `dict` for each item. By default a row's `id`, a file's `path`, a text's `text`.
            shard_size (`int`, *optional*, defaults to `1024`): Documents embedded and written at a time.
            on_bad_row (`str`, *optional*, defaults to `"error"`):
                `"error"` stops at the first item that cannot be embedded, `"skip"` leaves it out with a warning.
            progress (`bool`, *optional*, defaults to `False`): Whether to show a bar.

        Raises:
            `TypeError`, `ValueError`: if there are no items, one is malformed, or another process writes to the index.
            `OSError`: if the disk is full or read-only.
        """
        if self.embed is None:
            raise ValueError("The index has no `embed` function. Pass one to `SugarIndex.load`.")
        self._add(self._blocks(items, metadata, shard_size, on_bad_row, progress), on_bad_row)

    def search(
        self, queries: Sequence[Any] | np.ndarray, k: int = 5, *, late: bool = False, rerank: int | None = None
    ) -> list[list[Hit]]:
        """
        The k most similar items of each query, best first.

        Args:
            queries (`Sequence` or `np.ndarray` of shape `(queries, dim)`):
                Queries, each as [`~models.rows_sugar.as_row`] takes it, or whatever else `embed` takes; or their L2-normalised
                embeddings.
            k (`int`, *optional*, defaults to `5`): Hits for each query; fewer where the index has or finds fewer.
            late (`bool`, *optional*, defaults to `False`):
                Late interaction, for an index of every slice: each slice of the query meets the slice of a document that is
                most similar to it, and the cosines are added up (MaxSim, [ColBERT](https://huggingface.co/papers/2004.12832)).
                A hit is a whole document then.
            rerank (`int`, *optional*):
                How many of the first hits are looked at again by a [`SugarReranker`] of the same model, at least `k`.

        Raises:
            `TypeError`, `ValueError`: if the index is empty, `queries` is a single query, `k` is below 1, the dimensions
                differ, there is no embedding function for queries that are not embedded, or the index is not one that
                `late` or `rerank` can use.
        """
        if len(self) == 0:
            raise ValueError("The index is empty. Add documents before you search.")
        require_sizes(k=k)
        if rerank is not None and rerank < k:
            raise ValueError(f"`rerank` is {rerank} and `k` {k}: look again at no fewer hits than you ask for.")
        items, embed = queries, in_role(self.embed, "query")
        if (late or rerank) and (isinstance(items, np.ndarray) or not isinstance(self.embed, SugarEmbedder)):
            raise ValueError("`late` and `rerank` need queries that are not embedded, and a `SugarEmbedder`.")
        if late and not self.every_slice:
            raise ValueError("`late` needs an index of every slice: build it with `every_slice=True`.")
        if not isinstance(queries, np.ndarray):
            require_several("queries", queries)
            if not isinstance(queries, Sequence):
                raise TypeError(f"`queries` is a {type(queries).__name__}. Give a list, or an array of embeddings.")
            if embed is None:
                raise ValueError("The index has no `embed` function. Pass one to `SugarIndex.load`.")
            if len(queries) == 0:
                return []
            queries = self.embed.every_slice(queries, role="query") if late else embed(queries)
        if late:
            sizes, queries = list(map(len, queries)), np.concatenate(queries)
        queries = checked(queries, "queries")
        if queries.shape[1] != self.dim:
            raise ValueError(f"`queries` have dimension {queries.shape[1]} but the index has {self.dim}.")
        if late:
            hits = [self._search_late(each, rerank or k) for each in np.split(queries, np.cumsum(sizes)[:-1])]
        else:
            hits = self._search(queries, rerank or k)
        return self._reranked(items, hits, k) if rerank else hits

    def _search_late(self, query: np.ndarray, k: int) -> list[Hit]:
        """The k documents of greatest MaxSim with the slices of one query, of shape `(slices, dim)`."""
        raise ValueError(f"A {type(self).__name__} has no late interaction.")

    def _reranked(self, queries: Sequence[Any], hits: list[list[Hit]], k: int) -> list[list[Hit]]:
        from .rerank import SugarReranker  # which imports this module

        reranker = SugarReranker(self.embed.model, self.embed.processor, self.embed.batch_size)
        pairs, names = [], []
        for query, found in zip(queries, hits, strict=True):
            for hit in found:
                names.append(f"document {hit.index} of the index")
                part = embedded_part(self.documents[hit.index], self.by, names[-1], False)
                if hit.slice is not None:
                    if isinstance(part, dict):  # a whole conversation, of which a reranker reads the slices
                        part = row_parts(part)
                    part = part[: hit.slice + 1]
                pairs.append((query, part))
        try:
            scores = iter(reranker.score(pairs, names).tolist())
        except ValueError as error:
            raise ValueError(f"{error} Or lower `rerank`, leave it out, or index smaller documents.") from error
        hits = [[replace(hit, score=next(scores)) for hit in found] for found in hits]
        return [sorted(found, key=lambda hit: -hit.score)[:k] for found in hits]

    def _set_model(
        self, embed: Callable[[Sequence[Any]], np.ndarray] | None, fingerprint: str | None, by: str, every_slice: bool
    ) -> None:
        if by not in PARTS:
            raise ValueError(f"`by` is {by!r}; use one of {', '.join(PARTS)}.")
        if fingerprint is None:
            fingerprint = embed.fingerprint if isinstance(embed, SugarEmbedder) else ""
        self.embed, self.fingerprint, self.by, self.every_slice = embed, fingerprint, by, every_slice

    def _check_model(self, where: Any, stored: str) -> None:
        """An error unless the stored fingerprint is that of the model which will embed the queries."""
        (first, _, how), (second, _, asked) = stored.partition("#"), self.fingerprint.partition("#")
        if not same_fingerprint(first, second):
            raise ValueError(f"{where} was built with another model. Load that one, or build the index anew.")
        if how != asked:
            how, asked = (f"`{each.replace('#', '`, `')}`" if each else "the defaults" for each in (how, asked))
            raise ValueError(f"{where} was built with {how}, not {asked}. Set it as it was, or build the index anew.")

    def _ranks(self) -> tuple[int, int]:
        """The rank of this process, and how many share the work."""
        return distributed_state().process_index, distributed_state().num_processes

    def _blocks(
        self, items: Iterable[Any], metadata: Sequence[dict] | None, shard_size: int, on_bad_row: str, progress: bool
    ) -> Iterator[tuple[int, list[Document]]]:
        """The documents of this process's blocks of `shard_size` items, with the number of the block."""
        require_several("items", items)
        total = len(items) if hasattr(items, "__len__") else None
        if shard_size < 1 or on_bad_row not in ("error", "skip"):
            raise ValueError(f"`shard_size={shard_size}`, `on_bad_row={on_bad_row!r}`: use 1 or more, error or skip.")
        if metadata is not None and total not in (None, len(metadata)):
            raise ValueError(f"{len(metadata)} `metadata` for {total} items. Give one for each item.")
        if isinstance(items, datasets.Dataset | datasets.IterableDataset):
            items = undecoded(items)
        pairs = zip(items, repeat(None) if metadata is None else metadata, strict=metadata is not None)
        (rank, ranks), decode = self._ranks(), not isinstance(self.embed, SugarEmbedder)
        with tqdm(total=total, desc="Indexing", unit="document", disable=not progress or rank > 0) as bar:
            for number, block in enumerate(iter(lambda: list(islice(pairs, shard_size)), [])):
                bar.update(len(block))
                documents = []
                for n, (item, entry) in enumerate(block if number % ranks == rank else [], number * shard_size):
                    name = row_name(item, n) if isinstance(item, dict) else f"item {n}"
                    try:
                        documents.append(Document.of(item, name, self.by, entry, decode))
                    except ValueError as error:
                        if on_bad_row == "error":
                            raise
                        logger.warning("Left out: %s", error)
                if documents:
                    yield number, documents

    def _embed(
        self, documents: list[Document], on_bad_row: str, dim: int | None
    ) -> tuple[list[Document], list[np.ndarray]]:
        """The documents that can be embedded, and their embeddings, of shape `(slices, dim)` each, or `(1, dim)` without
        `every_slice`. `dim` is the dimension that they have to have."""
        if self.every_slice and not isinstance(self.embed, SugarEmbedder):
            raise ValueError("`every_slice` needs a `SugarEmbedder` for `embed`.")
        errors: dict[int, ValueError] = {}
        items = [document.embedded for document in documents]
        if isinstance(self.embed, SugarEmbedder):
            names = [document.name for document in documents]
            found = self.embed.every_slice(items, errors if on_bad_row == "skip" else None, names, role="document")
            embeddings = [e if self.every_slice else e[-1:] for e in found if e is not None]
        else:
            embeddings = list(np.asarray(self.embed(items), dtype=np.float32)[:, None])
            if len(embeddings) != len(items):
                raise ValueError(f"`embed` gave {len(embeddings)} embeddings for {len(items)} items.")
        for error in errors.values():
            logger.warning("Left out: %s", error)
        if embeddings:
            width = checked(np.concatenate(embeddings), "embeddings").shape[1]
            if dim is not None and width != dim:
                raise ValueError(f"The new embeddings have dimension {width}, the index {dim}.")
        return [document for n, document in enumerate(documents) if n not in errors], embeddings
