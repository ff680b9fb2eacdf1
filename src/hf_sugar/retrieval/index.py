"""Search by cosine among embedded documents, exact or approximate, on one machine."""

import hashlib
import json
import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..distributed import distributed_state
from .base import Hit, Index
from .documents import Block, blocks, checked_embedder, to_table


FORMAT_VERSION = 3
REBUILD = "Delete this file and build the index again with the same data: only this shard is embedded anew."


class _Shard:
    """Some documents: a table of one chunk, and views of what is in it. `file` is where it stands on the disk."""

    def __init__(self, table: pa.Table, file: Path | None = None):
        self.table, self.file = table, file
        column = table["embeddings"].chunk(0)
        vectors = column.values
        dim = vectors.type.list_size
        self.embeddings = vectors.values.to_numpy().reshape(-1, dim)
        counts = np.diff(column.offsets.to_numpy())
        self.documents = np.repeat(np.arange(len(counts)), counts)
        self.slices = np.concatenate([np.arange(count) for count in counts])
        self.metadata = table["metadata"].chunk(0)

    @classmethod
    def read(cls, file: Path, verify: bool = True) -> "_Shard":
        try:
            shard = cls(pa.ipc.open_file(pa.memory_map(str(file))).read_all(), file)
            if verify and (shard.table.schema.metadata or {}).get(b"sha256") != _digest(shard.table):
                raise OSError("its content is not what was written")
            return shard
        except FileNotFoundError:
            raise ValueError(f"{file} is missing. Build the index again with the same data.") from None
        except (pa.ArrowException, OSError, KeyError, IndexError) as error:
            raise ValueError(f"{file} cannot be read ({error}). {REBUILD}") from error

    def write(self, file: Path) -> None:
        table = self.table.replace_schema_metadata(
            {**(self.table.schema.metadata or {}), b"sha256": _digest(self.table)}
        )

        def write(path: Path) -> None:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

        _write_atomically(file, write)
        self.file = file


def _digest(table: pa.Table) -> bytes:
    """Of what is searched. The documents, which may be large, are read when they are asked for."""
    sink = pa.BufferOutputStream()
    table = table.select(["embeddings", "metadata"]).replace_schema_metadata(None)
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return hashlib.sha256(sink.getvalue()).hexdigest().encode()


class SugarIndex(Index):
    """
    Embedded documents with their metadata, searched with FAISS.

    On disk an index is a directory: Arrow files with some documents and their embeddings each, the FAISS file of an
    approximate index, and `index.json`, which names them. Replacing `index.json` is the one step by which an index
    changes, so whatever interrupts a write leaves the old index whole. One process, or the processes of one
    `accelerate launch`, may write at a time.

    Args:
        embeddings (`np.ndarray` of shape `(items, dim)`):
            L2-normalised embeddings.
        metadata (`Sequence[dict[str, Any]]`, *optional*):
            One JSON-serialisable `dict` for each item, such as its path. Empty ones by default.
        fingerprint (`str`, *optional*):
            Identifies the model the embeddings come from. Taken from `embed` where that is a [`SugarEmbedder`]. An
            index loads only with the fingerprint it was saved with, for embeddings of two models cannot be compared.
        embed (`Callable`, *optional*):
            Turns a list of items into L2-normalised float32 embeddings, see [`SugarEmbedder`]. Not needed to search
            with queries that are embedded already.
        factory (`str`, *optional*, defaults to `"Flat"`):
            A FAISS factory string: `"Flat"` is exact, `"HNSW32"` and `"IVF1024,PQ32"` are approximate.
        search_options (`str`, *optional*):
            FAISS search parameters of an approximate index: `"nprobe=16"`, `"efSearch=64"`.

    Raises:
        `ValueError`: if there are no embeddings, they are not L2-normalised, or the number of metadata differs.

    Example:

    ```python
    >>> embed = SugarEmbedder(model, processor)
    >>> index = SugarIndex.build(load_data("llava.json"), embed, directory="index")
    >>> index.search(["a red circle to the left of a blue square", [image, "What is this?"]], k=5)[0][0].metadata
    >>> index = SugarIndex.load("index", embed=embed, memory_map=True)
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
    ):
        if len(embeddings) == 0:
            raise ValueError("`embeddings` is empty. An index needs at least one item.")
        embeddings = checked(embeddings, "embeddings")
        if metadata is not None and len(metadata) != len(embeddings):
            raise ValueError(f"{len(metadata)} `metadata` for {len(embeddings)} items. Give one for each item.")
        columns = {
            "metadata": [json.dumps(entry, ensure_ascii=False) for entry in metadata or [{}] * len(embeddings)],
            "row": [None] * len(embeddings),
            "images": [[]] * len(embeddings),
        }
        self.fingerprint = checked_embedder(embed, fingerprint, "auto", False)
        self._set(embed, "auto", False, factory, search_options)
        self._shards = [_Shard(to_table(columns, list(embeddings[:, None])))]
        self._arrange()

    def _set(self, embed, by, every_slice, factory, search_options):
        self.embed, self.by, self.every_slice = embed, by, every_slice
        self.factory, self.search_options = factory, search_options
        self.directory: Path | None = None
        self._shards: list[_Shard] = []
        self._memory_map = False
        self._arrange()

    def _arrange(self) -> None:
        """After a change of the shards: where each begins, and no FAISS index until it is needed."""
        self._starts = np.cumsum([0, *(len(shard.metadata) for shard in self._shards)]).tolist()
        # one matrix, so that a search is one call of FAISS; mapped files stay where they are
        self._matrices = [shard.embeddings for shard in self._shards]
        if not self._memory_map and len(self._matrices) > 1:
            self._matrices = [np.concatenate(self._matrices)]
        pairs = list(zip(self._shards, self._starts))
        self._documents = np.concatenate([shard.documents + start for shard, start in pairs] or [np.empty(0, int)])
        self._slices = np.concatenate([shard.slices for shard in self._shards] or [np.empty(0, int)])
        self._faiss: faiss.Index | None = None
        self._faiss_file: Path | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def dim(self) -> int:
        """`int`: dimension of the embeddings."""
        return self._matrices[0].shape[1]

    @property
    def embeddings(self) -> np.ndarray:
        """`np.ndarray` of shape `(items, dim)`: all embeddings; an item is a document, or a slice of one."""
        return np.concatenate(self._matrices)

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """`tuple[np.ndarray, np.ndarray]`: document and slice of each of the `embeddings`."""
        return self._documents, self._slices

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """`list[dict]`: the metadata of all documents."""
        return [json.loads(entry.as_py()) for shard in self._shards for entry in shard.metadata]

    @property
    def documents(self) -> "Documents":
        """[`~retrieval.index.Documents`]: the indexed rows, read when they are looked at."""
        return Documents(self)

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
        directory: str | os.PathLike | None = None,
        shard_size: int = 1024,
        progress: bool = False,
    ) -> "SugarIndex":
        """
        Embed documents and index them.

        With a `directory` the index is written there, shard by shard: the same call after an interruption goes on where
        the first one stopped, and under `accelerate launch` the processes share the work. An index that stands in the
        directory is replaced when the new one is whole; shards with the same content are taken over from it.

        Args:
            items (`Iterable`):
                Rows of [`hf_sugar.data.load_data`] or any dataset of that format, or texts, PIL images, `Path`s of
                image or text files, lists of those (interleaved).
            embed (`Callable`):
                [`SugarEmbedder`], or a function from a list of items to L2-normalised float32 embeddings. The index
                keeps it for queries.
            metadata (`Sequence[dict[str, Any]]`, *optional*):
                One JSON-serialisable `dict` for each item. By default a row's `id`, a file's `path`, a text's `text`.
            fingerprint (`str`, *optional*):
                Identifies the model, where `embed` does not.
            by (`str`, *optional*, defaults to `"auto"`):
                What of a row is embedded: `"question"` (all that the user says and shows, without the answers),
                `"document"` (everything), `"images"` or `"texts"`. `"auto"` is the question where there are answers.
            every_slice (`bool`, *optional*, defaults to `False`):
                Whether to index a document at the end of every slice, from one forward pass. A hit then says which.
            factory (`str`, *optional*, defaults to `"Flat"`), search_options (`str`, *optional*):
                As in the constructor.
            directory (`str` or `os.PathLike`, *optional*):
                Where to write the index.
            shard_size (`int`, *optional*, defaults to `1024`):
                Documents embedded and written at a time.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            [`SugarIndex`]

        Raises:
            `TypeError`: for an item of another type.
            `ValueError`: if there are no items, one is malformed, or a setting is impossible.
            `OSError`: if the disk is full; an index that stood in the directory is intact.
        """
        index = cls.__new__(cls)
        index.fingerprint = checked_embedder(embed, fingerprint, by, every_slice)
        index._set(embed, by, every_slice, factory, search_options)
        index.directory = None if directory is None else Path(directory)
        index.add(items, metadata, shard_size=shard_size, progress=progress)
        if directory is not None:
            index.save(directory)
        return index

    def add(
        self,
        items: Iterable[Any],
        metadata: Sequence[dict[str, Any]] | None = None,
        *,
        shard_size: int = 1024,
        progress: bool = False,
    ) -> None:
        """
        Embed documents and put them at the end. An index in a directory keeps what is embedded there at once, for a
        second call after an interruption, but changes only by [`~SugarIndex.save`].

        Args:
            items, metadata, shard_size, progress:
                As in [`~SugarIndex.build`].

        Raises:
            `ValueError`: as in [`~SugarIndex.build`], or if the index has no embedding function.
        """
        if self.embed is None:
            raise ValueError("The index has no `embed` function. Pass one to `SugarIndex.load`.")
        if metadata is not None and len(metadata) != len(items):
            raise ValueError(f"{len(metadata)} `metadata` for {len(items)} items. Give one for each item.")
        state = distributed_state() if self.directory is not None else None
        rank, ranks = (0, 1) if state is None else (state.process_index, state.num_processes)
        total = len(items) if hasattr(items, "__len__") else None
        done: list[tuple[int, Any]] = []
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
        with tqdm(total=total, desc="Indexing", unit="document", disable=not progress or rank > 0) as bar:
            for number, block_items in blocks(items, shard_size, rank, ranks):
                start = number * shard_size
                entries = None if metadata is None else metadata[start : start + len(block_items)]
                block = Block(block_items, entries, start)
                done.append((number, self._embedded(block)))
                bar.update(len(block_items) * ranks)
        if self.directory is not None:
            files = sorted(gather_object([(number, shard.file.name) for number, shard in done]))
            shards = [_Shard.read(self.directory / name) for _, name in files]
        else:
            shards = [shard for _, shard in done]
        if not shards:
            raise ValueError("`items` is empty. An index needs at least one item.")
        if len(self) > 0 and shards[0].embeddings.shape[1] != self.dim:
            raise ValueError(
                f"The new embeddings have dimension {shards[0].embeddings.shape[1]}, the index {self.dim}."
            )
        before = self._faiss
        self._shards = [*self._shards, *shards]
        self._arrange()
        if before is not None and not self._memory_map:
            self._faiss = before
            self._faiss.add(np.concatenate([shard.embeddings for shard in shards]))

    def _embedded(self, block: Block) -> _Shard:
        file = None
        if self.directory is not None:
            file = self.directory / f"shard-{block.key(self.fingerprint, self.by, self.every_slice)}.arrow"
            if file.exists():
                return _Shard.read(file)
        embeddings = block.embed(self.embed, self.by, self.every_slice)
        checked(np.concatenate(embeddings), "embeddings")
        shard = _Shard(to_table(block.columns, embeddings))
        if file is not None:
            shard.write(file)
        return shard

    def delete(self, documents: Sequence[int]) -> None:
        """
        Take documents out; those behind them move up. An approximate index is built anew by the next search.

        Args:
            documents (`Sequence[int]`):
                Positions, as [`Hit.index`] has them.

        Raises:
            `IndexError`: if there is no such document.
        """
        for document in documents:
            if not 0 <= document < len(self):
                raise IndexError(f"There is no document {document}; the index has {len(self)}.")
        kept = np.ones(len(self), dtype=bool)
        kept[list(documents)] = False
        shards = []
        for shard, start in zip(self._shards, self._starts):
            mask = kept[start : start + len(shard.metadata)]
            if mask.all():
                shards.append(shard)
            elif mask.any():
                shards.append(_Shard(shard.table.filter(pa.array(mask)).combine_chunks()))
        self._shards = shards
        self._arrange()

    def search(self, queries: Sequence[Any] | np.ndarray, k: int = 5) -> list[list[Hit]]:
        """
        The k most similar items of each query, best first.

        Args:
            queries (`Sequence` or `np.ndarray` of shape `(queries, dim)`):
                Queries, each a text, an image, an interleaved list of both, or whatever else `embed` takes; or their
                L2-normalised embeddings.
            k (`int`, *optional*, defaults to `5`):
                Hits for each query. An index of fewer items gives all of them, and an approximate one may find fewer.

        Returns:
            `list[list[Hit]]`: a list for each query.

        Raises:
            `TypeError`: if `queries` is a single query, or holds something that is not one.
            `ValueError`: if the index is empty, `k` is below 1, the dimensions differ, embeddings are not
                L2-normalised, or queries are not embedded and the index has no embedding function.
        """
        if len(self) == 0:
            raise ValueError("The index is empty. Add documents before you search.")
        queries = embedded_queries(queries, k, self.embed, self.dim)
        scores, positions = self._nearest(queries, min(k, len(self._documents)))
        return [
            [self._hit(position, score) for position, score in zip(*row, strict=True) if position >= 0]
            for row in zip(positions.tolist(), scores.tolist(), strict=True)
        ]

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.factory != "Flat":
            return self._approximate().search(queries, k)
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
            index = faiss.index_factory(self.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
            embeddings = self.embeddings
            try:
                index.train(embeddings)
            except RuntimeError as error:
                raise ValueError(
                    f"FAISS cannot train {self.factory!r} on {len(embeddings)} embeddings of dimension {self.dim} "
                    f"({str(error).splitlines()[-1]}). Take fewer clusters, other subquantizers, or 'Flat'."
                ) from error
            index.add(embeddings)
            self._faiss = index
        if self.search_options is not None:
            faiss.ParameterSpace().set_index_parameters(self._faiss, self.search_options)
        return self._faiss

    def _hit(self, position: int, score: float) -> Hit:
        document = int(self._documents[position])
        shard = bisect_right(self._starts, document) - 1
        metadata = json.loads(self._shards[shard].metadata[document - self._starts[shard]].as_py())
        return Hit(document, score, metadata, int(self._slices[position]) if self.every_slice else None)

    def save(self, directory: str | os.PathLike) -> None:
        """
        Write the index to a directory. Shards that stand there already are not written again.

        An index that stands in the directory already is replaced in one step: whenever the write is interrupted, either
        the old or the new one is there, whole.

        Args:
            directory (`str` or `os.PathLike`):
                Directory, created if it does not exist.

        Raises:
            `ValueError`: if the index is empty.
            `OSError`: if the disk is full; the old index is intact.
        """
        if len(self) == 0:
            raise ValueError("The index is empty. Add documents before you save it.")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if distributed_state().is_main_process:
            self._save(directory)
        distributed_state().wait_for_everyone()
        self.directory = directory

    def _save(self, directory: Path) -> None:
        for shard in self._shards:
            if shard.file is None or shard.file.parent.resolve() != directory.resolve():
                shard.write(directory / f"shard-{uuid.uuid4().hex}.arrow")
        if self.factory != "Flat" and (self._faiss_file is None or self._faiss_file.parent != directory):
            self._faiss_file = directory / f"faiss-{uuid.uuid4().hex}.index"
            _write_atomically(self._faiss_file, lambda path: faiss.write_index(self._approximate(), str(path)))
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "dim": self.dim,
            "documents": len(self),
            "by": self.by,
            "every_slice": self.every_slice,
            "factory": self.factory,
            "search_options": self.search_options,
            "faiss": None if self._faiss_file is None else self._faiss_file.name,
            "shards": [[shard.file.name, len(shard.metadata), len(shard.embeddings)] for shard in self._shards],
        }
        text = json.dumps(content, indent=1)
        _write_atomically(directory / "index.json", lambda path: path.write_text(text, encoding="utf-8"))
        named = {content["faiss"], *(name for name, _, _ in content["shards"])}
        for pattern in ("shard-*.arrow", "faiss-*.index", ".*.tmp"):
            for left_over in directory.glob(pattern):
                if left_over.name not in named:
                    left_over.unlink()

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        fingerprint: str | None = None,
        embed: Callable[[Sequence[Any]], np.ndarray] | None = None,
        memory_map: bool = False,
    ) -> "SugarIndex":
        """
        Load a saved index.

        Args:
            directory (`str` or `os.PathLike`):
                Directory [`~SugarIndex.save`] wrote to.
            fingerprint (`str`, *optional*):
                Fingerprint of the model that will embed the queries. Taken from `embed` where that is a
                [`SugarEmbedder`].
            embed (`Callable`, *optional*):
                Embedding function of that model.
            memory_map (`bool`, *optional*, defaults to `False`):
                Whether to leave the embeddings on the disk. Rows and metadata stay there in any case. What is left there
                is not compared with its checksum.

        Returns:
            [`SugarIndex`]

        Raises:
            `FileNotFoundError`: if the directory holds no index.
            `ValueError`: if the index is of another format version, of another model, or a file of it is damaged.
        """
        directory = Path(directory)
        file = directory / "index.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist. Write an index there with `SugarIndex.save`, or with `hf-sugar index`."
            )
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format version {content['format_version']}, this version of hf_sugar reads {FORMAT_VERSION}. "
                "Build the index anew."
            )
        index = cls.__new__(cls)
        index.fingerprint = checked_embedder(embed, fingerprint, content["by"], False)
        index._set(embed, *(content[name] for name in ("by", "every_slice", "factory", "search_options")))
        check_fingerprint(file, content["fingerprint"], index.fingerprint)
        index.directory, index._memory_map = directory, memory_map
        for name, documents, items in content["shards"]:
            shard = _Shard.read(directory / name, verify=not memory_map)
            if (len(shard.metadata), *shard.embeddings.shape) != (documents, items, content["dim"]):
                raise ValueError(f"{shard.file} does not hold what {file.name} says. {REBUILD}")
            index._shards.append(shard)
        index._arrange()
        if content["faiss"] is not None:
            index._faiss_file = directory / content["faiss"]
            flags = faiss.IO_FLAG_MMAP_IFC if memory_map else 0
            try:
                index._faiss = faiss.read_index(str(index._faiss_file), flags)
            except RuntimeError as error:
                raise ValueError(
                    f"{index._faiss_file} cannot be read ({error}). Build the index again with the same data."
                ) from error
        return index


class Documents(Sequence):
    """The rows of an index in the conversational vision format: `messages`, `images` (bytes or paths), `id`."""

    def __init__(self, index: SugarIndex):
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, document: int) -> dict[str, Any]:
        if not 0 <= document < len(self):
            raise IndexError(f"There is no document {document}; the index has {len(self)}.")
        number = bisect_right(self._index._starts, document) - 1
        [stored] = self._index._shards[number].table.slice(document - self._index._starts[number], 1).to_pylist()
        return stored_row(stored["row"], stored["images"])


def stored_row(row: str | None, images: list[dict[str, Any]]) -> dict[str, Any]:
    """A row as it was put into the index."""
    if row is None:
        raise ValueError("The index was made of embeddings alone and holds no documents. Build it with `build`.")
    return {**json.loads(row), "images": images}


def check_fingerprint(where: Any, stored: str, asked: str) -> None:
    if stored != asked:
        raise ValueError(
            f"{where} was built with the model {stored!r}, not {asked!r}. Load that model, or build the index anew."
        )


def embedded_queries(
    queries: Sequence[Any] | np.ndarray, k: int, embed: Callable[[Sequence[Any]], np.ndarray] | None, dim: int
) -> np.ndarray:
    """Queries as L2-normalised embeddings, or the error that says what is wrong with them."""
    if k < 1:
        raise ValueError(f"`k` is {k}; ask for at least 1 hit.")
    if not isinstance(queries, np.ndarray):
        if not isinstance(queries, Sequence) or isinstance(queries, str):
            raise TypeError(f"`queries` is a single {type(queries).__name__}. Put it in a list.")
        for n, query in enumerate(queries):
            if not isinstance(query, str | Path | list | tuple | dict | Image.Image):
                raise TypeError(
                    f"`queries[{n}]` is a {type(query).__name__}; give a text, an image or a list of those, or all "
                    "queries as one array of embeddings."
                )
        if embed is None:
            raise ValueError("The index has no `embed` function. Pass one to `SugarIndex.load`, or embed the queries.")
        queries = embed(queries)
    queries = checked(queries, "queries")
    if queries.shape[1] != dim:
        raise ValueError(
            f"`queries` have dimension {queries.shape[1]} but the index has {dim}. Embed them with the model the "
            "index was built with."
        )
    return queries


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


def _write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # FAISS raises the latter
        temporary.unlink(missing_ok=True)
        raise OSError(
            *([error.errno] if isinstance(error, OSError) else []),
            f"{file} cannot be written ({error}). What stood in the directory is as it was, and the shards that were "
            "finished are kept: make room and run the same again",
        ) from error
