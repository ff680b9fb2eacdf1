"""The interface of the index over LanceDB, which serves more than one machine."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..distributed import distributed_state
from .base import Hit
from .documents import IMAGE_TYPE, Block, blocks, checked_embedder
from .index import check_fingerprint, checked, embedded_queries, stored_row


class LanceIndex:
    """
    Embedded documents in a [LanceDB](https://lancedb.github.io/lancedb/) table: in a local directory, in an object store
    that many machines read and write (`s3://`, `gs://`, `az://`), or on a LanceDB server (`db://`). Search is exact until
    [`~LanceIndex.create_index`] is called.

    Needs `lancedb`, the extra of that name. Documents keep their number when others are deleted.

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

        self.fingerprint = checked_embedder(embed, fingerprint, by, every_slice)
        self.embed, self.by, self.every_slice = embed, by, every_slice
        self._name = table
        self._database = lancedb.connect(uri, **connection)
        self._table = None
        if table in self._database.list_tables().tables:
            self._table = self._database.open_table(table)
            stored = json.loads(self._table.schema.metadata[b"hf_sugar"])
            check_fingerprint(f"The table {table!r} in {uri}", stored["fingerprint"], self.fingerprint)
            if (stored["by"], stored["every_slice"]) != (by, every_slice):
                raise ValueError(
                    f"The table {table!r} in {uri} was built with by={stored['by']!r} and "
                    f"every_slice={stored['every_slice']}. Open it with these."
                )

    def __len__(self) -> int:
        return 0 if self._table is None else self._table.count_rows("last")

    def add(
        self,
        items: Iterable[Any],
        metadata: Sequence[dict[str, Any]] | None = None,
        *,
        start: int = 0,
        shard_size: int = 1024,
        progress: bool = False,
    ) -> None:
        """
        Embed documents and write them, shard by shard. Each is one transaction, and a shard that is in the table already
        is left out, so the same call after an interruption goes on; under `accelerate launch` the processes share the
        work.

        Args:
            items, metadata, shard_size, progress:
                As in [`SugarIndex.build`].
            start (`int`, *optional*, defaults to `0`):
                Number of the first document. To put others behind those in the table, give a number above all of theirs.
        """
        state = distributed_state()
        if self._table is None:
            # the width is known when something is embedded
            width = np.asarray(self.embed(["a"])).shape[1]
            if state.is_main_process:
                self._database.create_table(self._name, schema=self._schema(width))
            state.wait_for_everyone()
            self._table = self._database.open_table(self._name)
        ranks = state.num_processes
        total = len(items) if hasattr(items, "__len__") else None
        with tqdm(
            total=total, desc="Indexing", unit="document", disable=not progress or state.process_index > 0
        ) as bar:
            for number, block_items in blocks(items, shard_size, state.process_index, ranks):
                first = start + number * shard_size
                if self._table.count_rows(f"document >= {first} AND document < {first + len(block_items)}") == 0:
                    entries = None if metadata is None else metadata[first - start : first - start + len(block_items)]
                    self._table.add(self._rows(Block(block_items, entries, first - start), first))
                bar.update(len(block_items) * ranks)
        state.wait_for_everyone()
        self._table = self._database.open_table(self._name)

    def _schema(self, width: int) -> pa.Schema:
        settings = {"fingerprint": self.fingerprint, "by": self.by, "every_slice": self.every_slice}
        return pa.schema(
            [
                ("vector", pa.list_(pa.float32(), width)),
                ("document", pa.int64()),
                ("slice", pa.int32()),
                ("last", pa.bool_()),
                ("metadata", pa.string()),
                ("row", pa.string()),
                ("images", pa.list_(IMAGE_TYPE)),
            ],
            metadata={"hf_sugar": json.dumps(settings)},
        )

    def _rows(self, block: Block, first: int) -> pa.Table:
        rows = []
        for n, embeddings in enumerate(block.embed(self.embed, self.by, self.every_slice)):
            for place, vector in enumerate(checked(embeddings, f"embeddings of document {first + n}")):
                # the content of a document is stored once, with its last slice
                last = place == len(embeddings) - 1
                content = {name: block.columns[name][n] if last else None for name in ("row", "images")}
                entry = block.columns["metadata"][n]
                rows.append(
                    {
                        "vector": vector,
                        "document": first + n,
                        "slice": place,
                        "last": last,
                        "metadata": entry,
                        **content,
                    }
                )
        return pa.Table.from_pylist(rows, schema=self._table.schema)

    def delete(self, documents: Sequence[int]) -> None:
        """
        Take documents out.

        Args:
            documents (`Sequence[int]`):
                Numbers, as [`Hit.index`] has them.
        """
        self._table.delete(f"document IN ({', '.join(str(int(document)) for document in documents)})")

    def search(self, queries: Sequence[Any] | np.ndarray, k: int = 5) -> list[list[Hit]]:
        """
        The k most similar items of each query, best first. Takes and raises what [`SugarIndex.search`] does.

        Returns:
            `list[list[Hit]]`: a list for each query.
        """
        if len(self) == 0:
            raise ValueError("The index is empty. Add documents before you search.")
        queries = embedded_queries(queries, k, self.embed, self._table.schema.field("vector").type.list_size)
        columns = ["document", "slice", "metadata", "_distance"]
        found = []
        for query in queries:
            rows = self._table.search(query).distance_type("dot").select(columns).limit(k).to_list()
            found.append(
                [
                    Hit(
                        row["document"],
                        1 - row["_distance"],
                        json.loads(row["metadata"]),
                        row["slice"] if self.every_slice else None,
                    )
                    for row in rows
                ]
            )
        return found

    def document(self, number: int) -> dict[str, Any]:
        """
        An indexed row in the conversational vision format.

        Args:
            number (`int`):
                As [`Hit.index`] has it.
        """
        rows = self._table.search().where(f"document = {int(number)} AND last").limit(1).to_list()
        if not rows:
            raise IndexError(f"There is no document {number}.")
        return stored_row(rows[0]["row"], rows[0]["images"])

    def create_index(self, **settings: Any) -> None:
        """
        Build an approximate index over what is in the table.

        Args:
            settings:
                Arguments of LanceDB's `create_index`, such as `num_partitions` and `num_sub_vectors`.
        """
        self._table.create_index(metric="dot", **settings)
