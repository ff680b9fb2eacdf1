"""A column that is slow to compute, kept in files beside the data so that no value is computed twice."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from datasets.table import ConcatenationTable, InMemoryTable, Table, concat_tables
from tqdm.auto import tqdm

from hf_sugar.distributed import distributed_state
from hf_sugar.files import replacing
from hf_sugar.models.rows_sugar import row_name

from .images import undecoded


def add_column(
    dataset: Dataset | IterableDataset,
    name: str,
    function: Callable[[list[dict[str, Any]], list[str]], pa.Table] | None,
    *,
    cache_dir: str | os.PathLike,
    columns: list[str],
    fingerprint: str,
    description: str,
    remedy: str,
    rows_per_shard: int,
) -> Dataset | IterableDataset:
    """
    Add the columns of a table that is slow to compute: `function` makes it of rows (with undecoded images) and their names,
    a line for each. Without `function` a row that has no values yet is an error, for a stream when it is met, and `remedy`
    says what to do.

    The values of a block of rows are an Arrow stream `shard-<digest>.arrow` in `cache_dir`, with a key for each row; shards
    are mapped into memory and become the column as they are. An interrupted run goes on where it was, and computes again
    at most one shard in each process; the processes of a distributed run divide the blocks and have to share `cache_dir`.
    A stream is read through once, if there is a function.

    Rows are known by the content of `columns`: what is in any shard is not computed again, whatever the order, the mixture
    or the selection of the rows. Blocks, of at most `rows_per_shard` rows, are of the rows as they lie in their table, below
    any shuffling, and end at rows chosen by their content; so the shards of a source are found again where other sources or
    rows come before it. `<name>.json` has the `fingerprint` and `description` of all else that the values depend on.

    Raises:
        `ValueError`: if `cache_dir` holds values of another fingerprint, or a shard is damaged.
    """
    if rows_per_shard < 1:
        raise ValueError(f"`rows_per_shard` must be at least 1, got {rows_per_shard}.")
    made = {"fingerprint": fingerprint, "description": description}
    shards = _Shards(Path(cache_dir), name, function, made, remedy)
    state = distributed_state()
    state.wait_for_everyone()  # all have seen the same files
    if isinstance(dataset, IterableDataset):
        return _add_to_stream(dataset, shards, columns, rows_per_shard)
    if not len(dataset):
        raise ValueError("the dataset has no rows.")
    base, used, positions = dataset, np.arange(len(dataset)), np.arange(len(dataset))
    if dataset._indices is not None:  # shuffled, selected, mixed: back to the rows as they lie in their table
        indices = dataset._indices.column(0).to_numpy()
        base = Dataset(dataset.data, dataset.info, dataset.split, fingerprint=dataset._fingerprint)
        used, positions = np.unique(indices, return_index=True)
    base = base.with_format(None)
    rows = undecoded(base).select_columns([c for c in (*columns, "id") if c in base.column_names])
    keys: list[bytes | None] = [None] * len(base)
    chosen = tqdm(_rows(rows, used), desc=f"{name}: reading rows", total=len(used), disable=None)
    for n, row in zip(used, chosen, strict=True):
        keys[n] = _key(row)
    blocks = list(_blocks(keys, rows_per_shard))
    names = [_shard_name(keys[start:end]) for start, end in blocks]
    missing = [n for n, shard in enumerate(names) if shard not in shards.names]
    mine = tqdm(missing[state.process_index :: state.num_processes], desc=name, unit=" blocks", disable=None)
    for n in mine if missing else ():
        start, end = blocks[n]

        def fresh_rows(places, start=start):
            places = np.array(places) + start
            block = list(_rows(rows, places))
            # a row is called by where it is in `dataset`
            return block, list(map(row_name, block, positions[np.searchsorted(used, places)]))

        shards.write(names[n], keys[start:end], fresh_rows)
    state.wait_for_everyone()
    column = [shards.read(shard) for shard in names]
    for values, shard, (start, end) in zip(column, names, blocks, strict=True):
        if len(values) != end - start:
            raise shards.damaged(shard, f"it has {len(values)} rows instead of {end - start}")
    values = concatenate_datasets(column).remove_columns("key")
    result = concatenate_datasets([_in_pieces(base, blocks), values], axis=1)
    return result if dataset._indices is None else result.select(indices)


def _add_to_stream(dataset: IterableDataset, shards: "_Shards", columns: list[str], size: int) -> IterableDataset:
    dataset = undecoded(dataset)
    columns = [c for c in (*columns, "id") if c in dataset.features]
    if shards.function is not None:
        state = distributed_state()
        written, turn = set(), 0
        fresh: dict[bytes, tuple[dict[str, Any], str]] = {}

        def write():
            if turn % state.num_processes == state.process_index:
                keys, rows = list(fresh), list(fresh.values())
                shards.write(_shard_name(keys), keys, lambda places: map(list, zip(*(rows[n] for n in places))))
            written.update(fresh)
            fresh.clear()

        rows = dataset.select_columns(columns)
        for index, row in enumerate(tqdm(rows, desc=shards.name, unit=" rows", disable=None)):
            key = _key(row)
            if key not in written and shards.find([key])[0] < 0:
                fresh.setdefault(key, (row, row_name(row, index)))
            if len(fresh) == size:
                write()
                turn += 1
        if fresh:
            write()
        state.wait_for_everyone()
        shards = replace(shards)  # with what has been written
    if not shards.names:
        reason = "and a streaming dataset is not read before it is used."
        raise ValueError(f"{shards.directory} holds no {shards.name}, {reason} {shards.remedy}")

    def add(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(columns, values)) for values in zip(*(batch[column] for column in columns))]
        numbers = shards.find(list(map(_key, rows)))
        for row, number in zip(rows, numbers):
            if number < 0:
                excerpt = json.dumps(_stamped({c: row[c] for c in columns if c != "id"}))[:200]
                raise shards.lacks(f"the row {row.get('id') or excerpt}")
        return {**batch, **shards.values(numbers).to_pydict()}

    features = shards.read(min(shards.names)).remove_columns("key").features
    return dataset.map(add, batched=True, batch_size=64, features=Features({**dataset.features, **features}))


@dataclass
class _Shards:
    """The files of a column. What is written after the construction is not seen."""

    directory: Path
    name: str
    function: Callable | None
    made: dict[str, str]  # the fingerprint and the description
    remedy: str

    def __post_init__(self):
        self.names = {path.name for path in self.directory.glob("shard-*.arrow")}
        self.header = self.directory / f"{self.name}.json"
        if not self.header.exists() and not self.names:
            return
        try:
            there = json.loads(self.header.read_text(encoding="utf-8"))
            same, by = there["fingerprint"] == self.made["fingerprint"], there["description"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"cannot be read ({type(error).__name__}: {error}). Use another directory or delete this one."
            raise ValueError(f"{self.header}, which says what made the {self.name} there, {reason}") from error
        if not same:
            both = f"  there:     {by}\n  asked for: {self.made['description']}"
            remedy = "Use another directory, or delete this one to compute them anew."
            raise ValueError(f"{self.directory} holds {self.name} of other settings.\n{both}\n{remedy}")

    def write(self, name: str, keys: list[bytes | None], fresh_rows: Callable[[list[int]], tuple[list, list]]) -> None:
        """Write a shard of rows with these keys (`None` and null for one that is not used). What is in no other shard is
        computed from `fresh_rows`, which gives rows by their place among the keys, and their names."""
        numbers = self.find(keys)
        fresh = [n for n, key in enumerate(keys) if key is not None and numbers[n] < 0]
        tables, order = [], np.full(len(keys), -1)
        if (numbers >= 0).any():
            tables.append(self.values(numbers[numbers >= 0]))
            order[numbers >= 0] = np.arange(len(tables[0]))
        if fresh:
            rows, names = fresh_rows(fresh)
            if self.function is None:
                raise self.lacks(names[0])
            order[fresh] = np.arange(len(fresh)) + sum(map(len, tables))
            tables.append(self.function(rows, names))
        values = pa.concat_tables(tables).take(pa.array(order, mask=order < 0)).combine_chunks()
        values = values.add_column(0, "key", pa.array(keys, pa.binary(16)))
        if not self.header.exists():
            with replacing(self.header) as path:
                path.write_text(json.dumps(self.made, indent=2), encoding="utf-8")
        with replacing(self.directory / name) as path, pa.OSFile(str(path), "wb") as file:
            with pa.ipc.new_stream(file, values.schema) as stream:
                stream.write_table(values)

    def read(self, name: str) -> Dataset:
        try:
            return Dataset.from_file(str(self.directory / name))
        except FileNotFoundError as error:
            shared = "`cache_dir` must be a directory that all processes share"
            raise ValueError(f"{self.directory / name} is not there: {shared}.") from error
        except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
            raise self.damaged(name, str(error)) from error

    def lacks(self, row: str) -> ValueError:
        return ValueError(f"{row} has no {self.name} in {self.directory}. {self.remedy}")

    def damaged(self, name: str, reason: str) -> ValueError:
        remedy = "Delete it; what it holds is then computed again."
        return ValueError(f"The file {self.directory / name} is damaged: {reason}. {remedy}")

    @cached_property
    def _all(self) -> Dataset:
        return concatenate_datasets([self.read(name) for name in sorted(self.names)]).with_format("arrow")

    @cached_property
    def _sorted_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """The keys in all shards, sorted, and the row of `_all` that each is of."""
        keys = self._all.data.column("key").to_pylist() if self.names else []
        return np.unique(np.array([key or b"" for key in keys], "S16"), return_index=True)

    def find(self, keys: list[bytes | None]) -> np.ndarray:
        """The numbers of rows among all that there are, -1 for those that are not there."""
        known, numbers = self._sorted_keys
        if not len(known):
            return np.full(len(keys), -1)
        wanted = np.array([key or b"" for key in keys], "S16")
        places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where((known[places] == wanted) & (wanted != b""), numbers[places], -1)

    def values(self, numbers: np.ndarray) -> pa.Table:
        return self._all[numbers.tolist()].drop_columns("key")


def _rows(dataset: Dataset, indices: np.ndarray) -> Iterator[dict[str, Any]]:
    for batch in dataset.select(indices.tolist()).iter(batch_size=256):
        yield from (dict(zip(batch, values)) for values in zip(*batch.values()))


def _key(row: dict[str, Any]) -> bytes:
    """Name of a row by its content; of an image that is a file of its own by the file's path, size and time."""
    content = json.dumps(_stamped({name: value for name, value in row.items() if name != "id"}), sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def _stamped(value: Any) -> Any:
    if isinstance(value, list):
        return [_stamped(item) for item in value]
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).hexdigest()
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"}:
        if value["bytes"] is not None:
            return _stamped(value["bytes"])
        if value["path"] and os.path.exists(value["path"]):
            stat = os.stat(value["path"])
            return [value["path"], stat.st_size, stat.st_mtime_ns]
    # a column of another dataset may lack what is null here
    return {name: _stamped(item) for name, item in value.items() if item is not None}


def _blocks(keys: list[bytes | None], size: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most `size` rows that have a key, with those that have none behind them. They end where the key says so,
    so that the ends stay where they are when something changes before them."""
    start = count = 0
    full = False
    for row, key in enumerate(keys):
        if key is not None:
            if full:
                yield start, row
                start, count = row, 0
            count += 1
            full = count == size or (count >= size // 4 and int.from_bytes(key[:4]) % size < 2)
    if keys:
        yield start, len(keys)


def _shard_name(keys: list[bytes | None]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key in keys:
        digest.update(bytes(17) if key is None else b"\1" + key)
    return f"shard-{digest.hexdigest()}.arrow"


def _in_pieces(dataset: Dataset, blocks: list[tuple[int, int]]) -> Dataset:
    """The dataset as blocks, of which those in memory are copied: Arrow (26.0) pickles a slice, for a worker, with all that
    it is cut from."""

    def copied(table: Table) -> Table:
        if isinstance(table, ConcatenationTable):
            return ConcatenationTable.from_blocks([list(map(copied, row)) for row in table.blocks])
        return InMemoryTable(table.table.take(np.arange(len(table)))) if isinstance(table, InMemoryTable) else table

    table = concat_tables([copied(dataset.data.slice(start, end - start)) for start, end in blocks])
    return Dataset(table, dataset.info, dataset.split, fingerprint=dataset._fingerprint)
