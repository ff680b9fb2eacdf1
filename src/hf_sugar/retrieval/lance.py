"""The index over LanceDB, which serves more than one machine."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ..distributed import distributed_state
from ..inference import SugarEmbedder
from .base import Hit, Index
from .documents import Document, item_features, stored_row, to_table


class LanceIndex(Index):
    """
    Embedded documents in a [LanceDB](https://lancedb.github.io/lancedb/) table, with the extra `lancedb`: in a local
    directory, in an object store that many machines read and write (`s3://`, `gs://`, `az://`), or on a LanceDB server
    (`db://`). Search is exact until [`~LanceIndex.create_index`] is called. The number of a document is made of its content
    and metadata, so it is never another's, and a document that is added again is there once.

    Args:
        uri (`str`): Where the database is.
        embed, fingerprint, by, every_slice: As in [`SugarIndex.build`]; those of a table that is there, or a `ValueError`.
        table (`str`, *optional*, defaults to `"documents"`): Name of the table.
        connection: Further arguments of `lancedb.connect`.

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

        self._set_model(embed, fingerprint, by, every_slice)
        self._name, self._table = table, None
        self._database = lancedb.connect(uri, **connection)
        if table in self._database.list_tables().tables:
            self._table = self._database.open_table(table)
            stored = json.loads((self._table.schema.metadata or {}).get(b"hf_sugar", b"{}"))
            columns = {"embeddings", "slices"} if stored.get("every_slice") else {"embeddings"}
            if "fingerprint" not in stored or not columns <= {*self._table.schema.names}:
                raise ValueError(f"The table {table!r} in {uri} is not one of this version of hf_sugar. Take another.")
            self._check_model(f"The table {table!r} in {uri}", stored["fingerprint"])
            if (stored["by"], stored["every_slice"]) != (by, every_slice):
                raise ValueError(
                    f"The table {table!r} in {uri} was built with by={stored['by']!r} and every_slice={stored['every_slice']}."
                )

    def __len__(self) -> int:
        return 0 if self._table is None else self._table.count_rows("slice = 0")

    @property
    def dim(self) -> int:
        return self._table.schema.field("embeddings").type.list_size

    def __getitem__(self, number: int) -> dict[str, Any]:
        rows = self._documents([number], ["row", "images"])
        if not rows:
            raise IndexError(f"There is no document {number}.")
        return stored_row(**rows[0])

    def _documents(self, numbers: Iterable[int], columns: list[str]) -> list[dict[str, Any]]:
        if self._table is None:
            return []
        return self._table.search().where(f"slice = 0 AND {_among(numbers)}").select(columns).to_list()

    def _add(self, blocks: Iterator[tuple[int, list[Document]]], on_bad_row: str) -> None:
        state = distributed_state()
        if self._table is None:
            if state.is_main_process:
                sugar = isinstance(self.embed, SugarEmbedder)
                dim = self.embed.dim if sugar else np.asarray(self.embed(["a"])).shape[1]
                settings = {"fingerprint": self.fingerprint, "by": self.by, "every_slice": self.every_slice}
                schema = item_features(dim).arrow_schema.append(pa.field("document", pa.int64()))
                if self.every_slice:  # a multivector beside the first slice of a document, for late interaction
                    schema = schema.append(pa.field("slices", pa.list_(pa.list_(pa.float32(), dim))))
                schema = schema.with_metadata({"hf_sugar": json.dumps(settings)})
                self._database.create_table(self._name, schema=schema)
            state.wait_for_everyone()
            self._table = self._database.open_table(self._name)
        for _, documents in blocks:
            fresh = {_number(document): document for document in documents}
            for row in self._documents(fresh, ["document"]):
                del fresh[row["document"]]
            documents, embeddings = self._embed(list(fresh.values()), on_bad_row, self.dim) if fresh else ([], [])
            if documents:
                numbers = np.repeat([_number(document) for document in documents], list(map(len, embeddings)))
                table = to_table(documents, embeddings).append_column("document", pa.array(numbers))
                if self.every_slice:  # LanceDB 0.40 never finds a row without a multivector
                    slices = [None if n else vectors.tolist() for vectors in embeddings for n in range(len(vectors))]
                    table = table.append_column("slices", pa.array(slices, self._table.schema.field("slices").type))
                self._table.merge_insert(["document", "slice"]).when_not_matched_insert_all().execute(table)
        state.wait_for_everyone()
        self._table = self._database.open_table(self._name)

    def delete(self, documents: Sequence[int]) -> None:
        for number in documents:
            self[number]  # an error if it is not there
        self._table.delete(_among(documents))

    def _search(self, queries: np.ndarray, k: int) -> list[list[Hit]]:
        return [self._hits(query, "embeddings", 1, k) for query in queries]

    def _search_late(self, query: np.ndarray, k: int) -> list[Hit]:
        # the distance of multivectors is the number of vectors of the query minus MaxSim
        return [replace(hit, slice=None) for hit in self._hits(query, "slices", len(query), k)]

    def _hits(self, query: np.ndarray, column: str, highest: int, k: int) -> list[Hit]:
        columns = ["document", "slice", "metadata", "_distance"]
        search = self._table.search(query, vector_column_name=column).distance_type("dot").select(columns)

        def hit(document: int, slice: int, metadata: str, _distance: float) -> Hit:
            return Hit(document, highest - _distance, json.loads(metadata), slice if self.every_slice else None)

        return [hit(**row) for row in search.limit(k).to_list()]

    def create_index(self, **settings: Any) -> None:
        """Build an approximate index over what is in the table. Takes the arguments of LanceDB's `create_index`."""
        self._table.create_index(metric="dot", **{"vector_column_name": "embeddings", **settings})


def _number(document: Document) -> int:
    return int.from_bytes(document.digest()[:8], "big") >> 1


def _among(numbers: Iterable[int]) -> str:
    return f"document IN ({', '.join(str(int(number)) for number in numbers)})"
