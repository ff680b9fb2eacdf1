"""The index over LanceDB, which serves more than one machine."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..distributed import distributed_state
from ..inference import SugarEmbedder
from .base import Hit, Index, check_embedder, check_fingerprint, embedded_queries
from .documents import Document, blocks, embed_documents, read_documents, stored_row


class LanceIndex(Index):
    """
    Embedded documents in a [LanceDB](https://lancedb.github.io/lancedb/) table: in a local directory, in an object store
    that many machines read and write (`s3://`, `gs://`, `az://`), or on a LanceDB server (`db://`). Search is exact until
    [`~LanceIndex.create_index`] is called.

    Needs `lancedb`, the extra of that name. The number of a document is made of its content and metadata, so it is never
    another's, and a document that is added again is there once.

    Args:
        uri (`str`):
            Where the database is.
        embed (`Callable`):
            As in [`SugarIndex`].
        fingerprint (`str`, *optional*):
            Identifies the model, where `embed` does not.
        table (`str`, *optional*, defaults to `"documents"`):
            Name of the table.
        by (`str`, *optional*, defaults to `"auto"`), every_slice (`bool`, *optional*, defaults to `False`):
            As in [`SugarIndex.build`], for a new table.
        connection:
            Further arguments of `lancedb.connect`.

    Raises:
        `ValueError`: if the table was built with another model or other settings.

    Example:

    ```python
    >>> index = LanceIndex("s3://bucket/index", embed)
    >>> index.add(load_data("llava.json"))
    >>> index.search(["a red circle"], k=5)[0][0].metadata
    ```
    """

    def __init__(
        self,
        uri: str,
        embed: Callable[[Sequence[Any]], np.ndarray],
        fingerprint: str | None = None,
        table: str = "documents",
        by: str = "auto",
        every_slice: bool = False,
        **connection: Any,
    ):
        import lancedb

        self.fingerprint = check_embedder(embed, fingerprint, by)
        self.embed, self.by, self.every_slice = embed, by, every_slice
        self._name = table
        self._database = lancedb.connect(uri, **connection)
        self._table = None
        if table in self._database.list_tables().tables:
            self._table = self._database.open_table(table)
            stored = json.loads((self._table.schema.metadata or {}).get(b"hf_sugar", b"{}"))
            if "fingerprint" not in stored:
                raise ValueError(f"The table {table!r} in {uri} is not one of hf_sugar. Choose another name.")
            check_fingerprint(f"The table {table!r} in {uri}", stored["fingerprint"], self.fingerprint)
            if (stored["by"], stored["every_slice"]) != (by, every_slice):
                raise ValueError(
                    f"The table {table!r} in {uri} was built with by={stored['by']!r} and "
                    f"every_slice={stored['every_slice']}. Open it with these."
                )

    def __len__(self) -> int:
        return 0 if self._table is None else self._table.count_rows("last")

    def document(self, number: int) -> dict[str, Any]:
        rows = [] if self._table is None else self._table.search().where(f"last AND {_among([number])}").to_list()
        if not rows:
            raise IndexError(f"There is no document {number}.")
        return stored_row(rows[0]["row"], rows[0]["images"])

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
        Embed documents and write them, some at a time, each time in one transaction. What is in the table already is left
        out, so the same call after an interruption goes on; under `accelerate launch` the processes share the work.

        Args:
            items, metadata, shard_size, on_bad_row, progress:
                As in [`SugarIndex.build`].
        """
        state = distributed_state()
        if self._table is None:
            if state.is_main_process:
                sugar = isinstance(self.embed, SugarEmbedder)
                dim = self.embed.dim if sugar else np.asarray(self.embed(["a"])).shape[1]
                self._database.create_table(self._name, schema=self._schema(dim))
            state.wait_for_everyone()
            self._table = self._database.open_table(self._name)
        total = len(items) if hasattr(items, "__len__") else None
        rank, ranks = state.process_index, state.num_processes
        with tqdm(total=total, desc="Indexing", unit="document", disable=not progress or rank > 0) as bar:
            for number, block in blocks(items, shard_size, rank, ranks):
                start = number * shard_size
                entries = None if metadata is None else metadata[start : start + len(block)]
                documents = {_number(d): d for d in read_documents(block, entries, start, self.by, on_bad_row)}
                if documents:
                    there = self._table.search().where(f"last AND {_among(documents)}").select(["document"]).to_list()
                    for row in there:
                        documents.pop(row["document"], None)
                self._write(list(documents.values()), on_bad_row)
                bar.update(len(block) * ranks)
        state.wait_for_everyone()
        self._table = self._database.open_table(self._name)

    def _write(self, documents: list[Document], on_bad_row: str) -> None:
        if not documents:
            return
        dim = self._table.schema.field("vector").type.list_size
        documents, embeddings = embed_documents(documents, self.embed, self.every_slice, on_bad_row, dim)
        rows = [
            {
                "vector": vector,
                "document": _number(document),
                "slice": n,
                "last": n == len(vectors) - 1,
                "metadata": document.metadata,
                # stored once, with the last slice
                "row": document.row if n == len(vectors) - 1 else None,
                "images": document.images if n == len(vectors) - 1 else None,
            }
            for document, vectors in zip(documents, embeddings, strict=True)
            for n, vector in enumerate(vectors)
        ]
        if rows:
            table = pa.Table.from_pylist(rows, schema=self._table.schema)
            self._table.merge_insert(["document", "slice"]).when_not_matched_insert_all().execute(table)

    def _schema(self, dim: int) -> pa.Schema:
        settings = {"fingerprint": self.fingerprint, "by": self.by, "every_slice": self.every_slice}
        return pa.schema(
            [
                ("vector", pa.list_(pa.float32(), dim)),
                ("document", pa.int64()),
                ("slice", pa.int32()),
                ("last", pa.bool_()),
                ("metadata", pa.string()),
                ("row", pa.string()),
                ("images", pa.list_(pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))),
            ],
            metadata={"hf_sugar": json.dumps(settings)},
        )

    def delete(self, documents: Sequence[int]) -> None:
        """Take documents out, by their numbers; an `IndexError` if one is not there."""
        for document in documents:
            self.document(document)
        self._table.delete(_among(documents))

    def search(self, queries: Sequence[Any] | np.ndarray, k: int = 5) -> list[list[Hit]]:
        """The k most similar items of each query, best first. Takes and raises what [`SugarIndex.search`] does."""
        if len(self) == 0:
            raise ValueError("The index is empty. Add documents before you search.")
        queries = embedded_queries(queries, k, self.embed, self._table.schema.field("vector").type.list_size)
        columns = ["document", "slice", "metadata", "_distance"]
        return [
            [
                Hit(
                    row["document"],
                    1 - row["_distance"],
                    json.loads(row["metadata"]),
                    row["slice"] if self.every_slice else None,
                )
                for row in self._table.search(query).distance_type("dot").select(columns).limit(k).to_list()
            ]
            for query in queries
        ]

    def create_index(self, **settings: Any) -> None:
        """Build an approximate index over what is in the table. Takes the arguments of LanceDB's `create_index`."""
        self._table.create_index(metric="dot", **settings)


def _number(document: Document) -> int:
    return int.from_bytes(document.digest()[:8], "big") >> 1


def _among(numbers: Iterable[int]) -> str:
    return f"document IN ({', '.join(str(int(number)) for number in numbers)})"
