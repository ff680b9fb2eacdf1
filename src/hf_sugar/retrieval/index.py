"""Search by cosine among embedded documents, exact or approximate, on one machine."""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from accelerate.utils import gather_object

from ..distributed import distributed_state
from ..files import replacing
from ..inference import SugarEmbedder
from .approximate import build_faiss, check_factory
from .base import Hit, Index
from .documents import Document, checked, stored_row, to_table
from .storage import REBUILD, Shard, describe, read_faiss, read_json, write_json, writing


logger = logging.getLogger(__name__)

SETTINGS = ("by", "every_slice", "factory", "search_options", "rescore_multiplier")


class SugarIndex(Index):
    """
    Embedded documents with their metadata, searched with FAISS.

    On disk an index is a directory: Arrow files of `datasets` with some documents and their embeddings each, the FAISS
    file of an approximate index, and `index.json`, which ties them together. Replacing `index.json` is the one step by
    which an index changes, so whatever interrupts a write leaves the old index whole. A second process that writes at the
    same time is refused, but for those of one `accelerate launch`. The threads of a process may share an index.

    Args:
        embeddings (`np.ndarray` of shape `(items, dim)`): L2-normalised embeddings.
        metadata (`Sequence[dict[str, Any]]`, *optional*): One JSON-serialisable `dict` for each item.
        fingerprint (`str`, *optional*):
            Identifies the model of the embeddings, with which alone the index loads again; that of a [`SugarEmbedder`].
        embed (`Callable`, *optional*):
            [`SugarEmbedder`], or a function from a list of items to L2-normalised float32 embeddings. Not needed to
            search with queries that are embedded already.
        factory (`str`, *optional*, defaults to `"Flat"`):
            A FAISS factory string: `"Flat"` is exact, `"HNSW32"` and `"IVF1024,PQ32"` are approximate; `"SQ8"` keeps a byte of
            a dimension in memory, `"RaBitQ"` a bit.
        search_options (`str`, *optional*): FAISS search parameters: `"nprobe=16"`, `"efSearch=64"`.
        rescore_multiplier (`int`, *optional*, defaults to `4`):
            How many candidates of an approximate index are looked up for each hit, and compared by the embeddings themselves,
            which lie on the disk. With 0 its hits and scores are those of FAISS.

    Example:

    ```python
    >>> embed = SugarEmbedder(model, processor)
    >>> index = SugarIndex.build(load_data("llava.json"), embed, directory="index")
    >>> index.search(["a red circle to the left of a blue square", [image, "What is this?"]], k=5)[0][0].metadata
    >>> index = SugarIndex.load("index", embed, memory_map=True)
    ```
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        metadata: Sequence[dict[str, Any]] | None = None,
        fingerprint: str | None = None,
        embed: Callable[[Sequence[Any]], np.ndarray] | None = None,
        factory: str = "Flat",
        search_options: str | None = None,
        rescore_multiplier: int = 4,
    ):
        if len(embeddings) == 0:
            raise ValueError("`embeddings` is empty. An index needs at least one item.")
        embeddings = checked(embeddings, "embeddings")
        if metadata is not None and len(metadata) != len(embeddings):
            raise ValueError(f"{len(metadata)} `metadata` for {len(embeddings)} items. Give one for each item.")
        check_factory(factory, search_options, embeddings.shape[1], len(embeddings))
        self._set(embed, fingerprint, "auto", False, factory, search_options, rescore_multiplier)
        entries = [json.dumps(entry, ensure_ascii=False) for entry in metadata or [{}] * len(embeddings)]
        self._arrange([Shard(to_table([Document("", None, e, None, []) for e in entries], embeddings[:, None]))])

    def _set(self, embed, fingerprint, by, every_slice, factory, search_options, rescore_multiplier):
        if not isinstance(rescore_multiplier, int) or rescore_multiplier < 0:
            raise ValueError(f"`rescore_multiplier` is {rescore_multiplier}; it must be an integer, 0 or more.")
        self._set_model(embed, fingerprint, by, every_slice)
        self.factory, self.search_options, self.rescore_multiplier = factory, search_options, rescore_multiplier
        self.directory: Path | None = None
        self._stored: str | None = None  # `index.json` of the directory, as it was read or written
        self._memory_map = False
        self._lock = threading.RLock()
        self._arrange([])

    def _arrange(self, shards: list[Shard], index: faiss.Index | None = None) -> None:
        """Take other shards."""
        self._shards, self._faiss, self._faiss_file = shards, index, None
        self._table = pa.concat_tables([shard.table for shard in shards]) if shards else None
        self._mapped = [vectors for shard in shards for vectors in shard.vectors]
        self._offsets = np.cumsum([0, *map(len, self._mapped)])
        slices = np.concatenate([np.empty(0, np.int32), *(shard.slices for shard in shards)])
        self._starts = np.flatnonzero(slices == 0)
        self.origins = np.cumsum(slices == 0) - 1, slices
        self.__dict__.pop("_matrices", None)

    @cached_property
    def _matrices(self) -> list[np.ndarray]:
        """One matrix, so that a search is one call of FAISS; of an approximate index the files stay where they are."""
        on_disk = self._memory_map or self.factory != "Flat"
        return self._mapped if on_disk or len(self._mapped) == 1 else [self.embeddings]

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def dim(self) -> int:
        return self._shards[0].dim

    @property
    def embeddings(self) -> np.ndarray:
        """`np.ndarray` of shape `(items, dim)`; an item is a document, or a slice of one."""
        return np.concatenate(self._mapped)

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """`list[dict]`: that of all documents."""
        return [json.loads(entry) for entry in self._table["metadata"].take(self._starts).to_pylist()]

    @classmethod
    def build(
        cls,
        items: Iterable[Any],
        embed: Callable[[Sequence[Any]], np.ndarray],
        metadata: Sequence[dict[str, Any]] | None = None,
        fingerprint: str | None = None,
        *,
        by: str = "auto",
        every_slice: bool = False,
        factory: str = "Flat",
        search_options: str | None = None,
        rescore_multiplier: int = 4,
        directory: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> "SugarIndex":
        """
        Embed documents and index them.

        With a `directory` the index is written there, shard by shard: the same call after an interruption goes on. An index
        that stands there is replaced when the new one is whole; what it holds of the same content and model is taken over.

        Args:
            items, metadata, kwargs: As in [`~SugarIndex.add`], which raises the same.
            embed, fingerprint, factory, search_options, rescore_multiplier:
                As in the constructor; impossible settings are refused before anything is embedded.
            by (`str`, *optional*, defaults to `"auto"`):
                What of a row is embedded: `"question"` (all that the user says and shows, without the answers),
                `"document"` (everything), `"images"` or `"texts"`. `"auto"` is the question where there are answers.
            every_slice (`bool`, *optional*, defaults to `False`):
                Whether to index a document at the end of every slice, from one forward pass. A hit then says which.
            directory (`str` or `os.PathLike`, *optional*): Where to write the index.
        """
        index = cls.__new__(cls)
        index._set(embed, fingerprint, by, every_slice, factory, search_options, rescore_multiplier)
        count = len(items) if hasattr(items, "__len__") and not every_slice else None
        check_factory(factory, search_options, embed.dim if isinstance(embed, SugarEmbedder) else None, count)
        index.directory = None if directory is None else Path(directory)
        index.add(items, metadata, **kwargs)
        if directory is not None:
            index.save(directory)
        return index

    @classmethod
    def merge(
        cls,
        parts: Sequence[str | os.PathLike],
        directory: str | os.PathLike,
        factory: str | None = None,
        search_options: str | None = None,
        rescore_multiplier: int | None = None,
    ) -> "SugarIndex":
        """
        Write an index of the documents of several, which machines that share no disk have built: those of the first, then
        those of the second. Nothing is embedded. Settings that are not given are those of the first; its `search_options`
        belong to its `factory`.

        Raises:
            `FileNotFoundError`, `ValueError`: as [`~SugarIndex.load`]; and if they are of different models or settings.
        """
        if not parts or Path(directory).resolve() in [Path(part).resolve() for part in parts]:
            raise ValueError("Give indexes to put together, and a directory that is none of them.")
        fingerprint = read_json(Path(parts[0], "index.json"))[1]["fingerprint"]
        indexes = [cls.load(part, fingerprint=fingerprint) for part in parts]
        first = indexes[0]
        for part, index in zip(parts, indexes):
            if (index.by, index.every_slice, index.dim) != (first.by, first.every_slice, first.dim):
                raise ValueError(f"{part} was built with other settings than {parts[0]}. Build one of them anew.")
        if factory in (None, first.factory):
            factory, search_options = first.factory, search_options or first.search_options
        multiplier = first.rescore_multiplier if rescore_multiplier is None else rescore_multiplier
        check_factory(factory, search_options, first.dim, sum(len(index.origins[0]) for index in indexes))
        merged = cls.__new__(cls)
        merged._set(None, first.fingerprint, first.by, first.every_slice, factory, search_options, multiplier)
        merged._arrange([shard for index in indexes for shard in index._shards])
        merged.save(directory)
        return merged

    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.directory is None else super()._ranks()

    def _add(self, blocks: Iterator[tuple[int, list[Document]]], on_bad_row: str) -> None:
        before = set() if self.directory is None else set(self.directory.glob("shard-*.arrow"))
        dim = self.dim if len(self) > 0 else None
        found: list[tuple[int, Shard]] = []
        try:
            with self._writing(self.directory):
                for number, documents in blocks:
                    if (shard := self._shard(documents, on_bad_row, dim)) is not None:
                        found.append((number, shard))
                        dim = shard.dim
        except Exception:
            # What an unknown function gave before it failed may be wrong as well; weights have a fingerprint.
            if not isinstance(self.embed, SugarEmbedder):
                for file in {shard.file for _, shard in found if shard.file} - before:
                    file.unlink()
            raise
        shards = [shard for _, shard in found]
        if self._ranks()[1] > 1:
            files = sorted(gather_object([(number, shard.file.name) for number, shard in found]))
            shards = [Shard.read(self.directory / name) for _, name in files]
        if not shards:
            raise ValueError("`items` is empty, or none can be embedded. An index needs at least one item.")
        with self._lock:
            index = self._faiss
            if index is not None:
                try:
                    index.add(np.concatenate([vectors for shard in shards for vectors in shard.vectors]))
                except RuntimeError:  # some kinds (NSG) cannot be added to: built anew by the next search
                    index = None
            self._arrange([*self._shards, *shards], index)

    def _shard(self, documents: list[Document], on_bad_row: str, dim: int | None) -> Shard | None:
        """A shard of documents: from the disk, if it is there."""
        key = os.urandom(16).hex()
        if self.directory is not None and self.fingerprint:
            digest = hashlib.sha256(json.dumps([self.fingerprint, self.by, self.every_slice]).encode())
            for document in documents:
                digest.update(document.digest())
            key = digest.hexdigest()[:32]
            for file in self.directory.glob(f"shard-{key}-*.arrow"):
                try:
                    shard = Shard.read(file)
                    if on_bad_row == "skip" or (shard.slices == 0).sum() == len(documents):
                        return shard
                except ValueError as error:
                    logger.warning("%s Its documents are embedded anew.", str(error).removesuffix(REBUILD))
        documents, embeddings = self._embed(documents, on_bad_row, dim)
        if not documents:
            return None
        shard = Shard(to_table(documents, embeddings))
        if dim is None:
            check_factory(self.factory, self.search_options, shard.dim)
        if self.directory is not None:
            shard.write(self.directory, key)
        return shard

    def delete(self, documents: Sequence[int]) -> None:
        """Take documents out, by their numbers; those behind them move up."""
        with self._lock:
            for number in documents:
                self._check(number)
            kept, start, shards = ~np.isin(self.origins[0], list(documents)), 0, []
            for shard in self._shards:
                mask = kept[start : start + len(shard.slices)]
                start += len(mask)
                if mask.any():
                    shards.append(shard if mask.all() else Shard(shard.table.filter(pa.array(mask))))
            self._arrange(shards)

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self._lock:
            self._check(number)
            [stored] = self._table.select(["row", "images"]).slice(self._starts[number], 1).to_pylist()
        return stored_row(**stored)

    def _check(self, number: int) -> None:
        if not 0 <= number < len(self):
            raise IndexError(f"There is no document {number}; the index has {len(self)}.")

    def _search(self, queries: np.ndarray, k: int) -> list[list[Hit]]:
        with self._lock:
            scores, positions = self._nearest(queries, min(k, len(self.origins[0])))
            numbers, slices = (column[positions].tolist() for column in self.origins)
            metadata = self._table["metadata"]

            def hit(position: int, score: float, number: int, n: int) -> Hit:
                return Hit(number, score, json.loads(metadata[position].as_py()), n if self.every_slice else None)

            return [
                [hit(*found) for found in zip(*row, strict=True) if found[0] >= 0]
                for row in zip(positions.tolist(), scores.tolist(), numbers, slices, strict=True)
            ]

    def _search_late(self, query: np.ndarray, k: int) -> list[Hit]:
        with self._lock:
            best, start = np.full((len(query), len(self)), -np.inf, np.float32), 0
            for matrix in self._matrices:
                for block in np.split(matrix, range(1 << 16, len(matrix), 1 << 16)):
                    numbers = self.origins[0][start : start + len(block)]
                    first = np.flatnonzero(np.diff(numbers, prepend=-1))
                    found = np.maximum.reduceat(query @ block.T, first, axis=1)
                    best[:, numbers[first]] = np.maximum(best[:, numbers[first]], found)
                    start += len(block)
            scores, metadata = best.sum(axis=0), self._table["metadata"]
            numbers = np.argsort(-scores, kind="stable")[:k].tolist()
            return [Hit(n, float(scores[n]), json.loads(metadata[self._starts[n]].as_py())) for n in numbers]

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.factory != "Flat":
            count = min(k * max(1, self.rescore_multiplier), len(self.origins[0]))
            scores, positions = self._approximate().search(queries, count)
            if self.rescore_multiplier:
                scores = self._cosines(queries, positions)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            return np.take_along_axis(scores, best, 1), np.take_along_axis(positions, best, 1)
        return self._exact(queries, k)

    def _cosines(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Of each query with items of its own; minus infinity for an item -1, which stands for none."""
        scores = np.full(positions.shape, -np.inf, np.float32)
        for query, row, wanted in zip(queries, scores, positions, strict=True):
            if (wanted >= 0).any():
                row[wanted >= 0] = self._take(wanted[wanted >= 0]) @ query
        return scores

    def _take(self, positions: np.ndarray) -> np.ndarray:
        """Some embeddings, without reading the others."""
        shards = np.searchsorted(self._offsets, positions, side="right") - 1
        pairs = zip(shards, positions - self._offsets[shards], strict=True)
        return np.stack([self._mapped[shard][number] for shard, number in pairs])

    def measure(self, k: int = 10, sample: int = 256) -> dict[str, float]:
        """What a search costs and loses: `bytes` that are searched, `exact_bytes` of the embeddings, and `recall@k` in percent:
        how many of the k items nearest to another one are found, for a `sample` of them. Those as near as the last count."""
        with self._lock:
            items = len(self.origins[0])
            exact_bytes, k = 4 * items * self.dim, min(k, items - 1)
            if self.factory == "Flat" or k == 0:
                return {"bytes": exact_bytes, "exact_bytes": exact_bytes, f"recall@{k}": 100.0}
            chosen = np.random.default_rng(0).permutation(items)[:sample]
            queries = self._take(chosen)
            nearest, _ = self._exact(queries, k + 1)  # with the item itself
            _, positions = self._nearest(queries, k + 1)
            found = self._cosines(queries, np.where(positions == chosen[:, None], -1, positions))
            hits = (found >= nearest[:, -1:] - 1e-6).sum(axis=1).clip(max=k)
            size = faiss.serialize_index(self._approximate()).nbytes
        return {"bytes": size, "exact_bytes": exact_bytes, f"recall@{k}": 100 * float(hits.mean()) / k}

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found, start = [], 0
        for matrix in self._matrices:
            scores, positions = faiss.knn(queries, matrix, min(k, len(matrix)), metric=faiss.METRIC_INNER_PRODUCT)
            found.append((scores, positions + start))
            start += len(matrix)
        if len(found) == 1:
            return found[0]
        scores, positions = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(positions, best, 1)

    def _approximate(self) -> faiss.Index:
        if self._faiss is None:
            self._faiss = build_faiss(self.embeddings, self.factory)
        if self.search_options is not None:
            faiss.ParameterSpace().set_index_parameters(self._faiss, self.search_options)
        return self._faiss

    def save(self, directory: str | os.PathLike) -> None:
        """Write the index to a directory; one that stands there is replaced in one step. A `ValueError` if the index is
        empty, another process writes there, or has done so since it was loaded; an `OSError` if the disk is full or
        read-only: the old index is intact."""
        if len(self) == 0:
            raise ValueError("The index is empty. Add documents before you save it.")
        directory = Path(directory)
        if distributed_state().is_main_process:
            with self._lock, self._writing(directory):
                self._write(directory)
        distributed_state().wait_for_everyone()
        self.directory = directory

    def _write(self, directory: Path) -> None:
        def is_there(file: Path | None) -> bool:
            return file is not None and file.exists() and file.parent.samefile(directory)

        for shard in self._shards:
            if not is_there(shard.file):
                shard.write(directory, os.urandom(16).hex())
        if self.factory != "Flat" and not is_there(self._faiss_file):
            index, file = self._approximate(), directory / f"faiss-{os.urandom(16).hex()}.index"
            with replacing(file) as path:
                faiss.write_index(index, str(path))
            self._faiss_file = file
        shards = [[shard.file.name, shard.file.stat().st_size] for shard in self._shards]
        approximate = None if self._faiss_file is None else describe(self._faiss_file)
        settings = {name: getattr(self, name) for name in SETTINGS}
        content = {"fingerprint": self.fingerprint, **settings, "faiss": approximate, "shards": shards}
        self._stored = write_json(directory / "index.json", content)
        named = {name for name, *_ in [*shards, approximate or [None]]}
        for file in directory.iterdir():
            if re.fullmatch(r"shard-.*\.arrow|faiss-.*\.index|\..*\.new", file.name) and file.name not in named:
                file.unlink()

    @contextmanager
    def _writing(self, directory: Path | None) -> Iterator[None]:
        """Be the one who writes to a directory, in which the index is still the one that was read."""
        if directory is None or not distributed_state().is_main_process:
            yield
            return
        with writing(directory):
            file = directory / "index.json"
            if self._stored is not None and directory == self.directory:
                if not file.exists() or file.read_text(encoding="utf-8") != self._stored:
                    raise ValueError(f"{directory} was written by another process since it was loaded. Load it again.")
            yield

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        embed: Callable[[Sequence[Any]], np.ndarray] | None = None,
        *,
        fingerprint: str | None = None,
        memory_map: bool = False,
    ) -> "SugarIndex":
        """
        Load a saved index, for queries of the model that `embed` or `fingerprint` stand for.

        Args:
            memory_map (`bool`, *optional*, defaults to `False`):
                Whether to leave the embeddings of an exact index on the disk; their checksums are then not compared.

        Raises:
            `FileNotFoundError`: if the directory holds no index.
            `ValueError`: if the index is of another format version, of another model, or a file of it is damaged.
        """
        directory, file = Path(directory), Path(directory, "index.json")
        text, content = read_json(file)
        index = cls.__new__(cls)
        content.setdefault("rescore_multiplier", 0)  # of an index that is older than this setting
        index._set(embed, fingerprint, *(content[name] for name in SETTINGS))
        index._check_model(file, content["fingerprint"])
        index.directory, index._memory_map, index._stored = directory, memory_map, text
        index._arrange([Shard.read(directory / name, size, not memory_map) for name, size in content["shards"]])
        if content["faiss"] is not None:
            index._faiss_file = directory / content["faiss"][0]
            index._faiss = read_faiss(index._faiss_file, content["faiss"])
        return index
