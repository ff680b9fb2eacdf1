"""A column that is slow to compute, kept in files beside the data so that no value is computed twice."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from datasets.table import ConcatenationTable, InMemoryTable, Table, concat_tables
from tqdm.auto import tqdm

from hf_sugar.distributed import distributed_state
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
    remedy: str = "Compute it first.",
    rows_per_shard: int = 512,
) -> Dataset | IterableDataset:
    """
    Add a column that is slow to compute.

    Values are computed for a block of rows at a time and written to `shard-<digest>.arrow` in `cache_dir`: Arrow streams
    ([`datasets.Dataset.from_file`] opens them) of a key for each row and its values. The shards are mapped into memory
    and become the new column as they are. A run that was interrupted goes on where it was, and computes again at most one
    shard in each process.

    Rows are known by their content: a value that is in any shard is not computed again, whatever the order, the mixture
    or the selection of the rows. Blocks are made of the rows as they lie in their table, below any shuffling, and end at
    rows chosen by their content; so the shards of a source are found again where other sources or rows come before it.

    In a distributed run every process has to call this with the same rows; the blocks are divided over the processes,
    and `cache_dir` has to be one that they share.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows.
        name (`str`):
            What is computed, for messages and the file `<name>.json`, which says what made the values.
        function (`Callable[[list[dict], list[str]], pa.Table]`, *optional*):
            Gives the values of rows (with undecoded images), as a table of one line a row. The names of the rows are for
            its error messages. Without it nothing is computed, and a row without a value is an error.
        cache_dir (`str` or `os.PathLike`):
            Where the shards are kept.
        columns (`list[str]`):
            Columns that the values depend on; the function gets these and `id`. Those that are missing are passed over.
        fingerprint (`str`):
            Of everything else that the values depend on.
        description (`str`):
            The same in words.
        remedy (`str`, *optional*, defaults to `"Compute it first."`):
            What an error advises where a value is missing and there is no function.
        rows_per_shard (`int`, *optional*, defaults to `512`):
            Most rows in a shard; the mean is about half of it.

    Returns:
        [`~datasets.Dataset`] with the columns of the function's table (null for rows of no value), in the order of
        `dataset`; or [`~datasets.IterableDataset`] that looks the values up: a stream is read through once before, unless
        there is no function.

    Raises:
        `ValueError`: if `cache_dir` holds values of another fingerprint, a shard is damaged, or a row has no value and
            there is no function.
    """
    if rows_per_shard < 1:
        raise ValueError(f"`rows_per_shard` must be at least 1, got {rows_per_shard}.")
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError("the dataset has no rows.")
    shards = _Shards(Path(cache_dir), name, function, fingerprint, description, remedy)
    if isinstance(dataset, IterableDataset):
        return _add_to_stream(dataset, shards, columns, rows_per_shard)
    base, used, positions = dataset, np.arange(len(dataset)), np.arange(len(dataset))
    if dataset._indices is not None:  # shuffled, selected, mixed: back to the rows as they lie in their table
        indices = dataset._indices.column(0).to_numpy()
        base = Dataset(dataset.data, dataset.info, dataset.split, fingerprint=dataset._fingerprint)
        used, positions = np.unique(indices, return_index=True)
    base = base.with_format(None)
    rows = (
        undecoded(base).select_columns([c for c in (*columns, "id") if c in base.column_names]).select(used.tolist())
    )
    keys: list[bytes | None] = [None] * len(base)
    for row, place in zip(tqdm(_rows(rows), desc=f"{name}: reading rows", total=len(rows), disable=None), used):
        keys[place] = _key(row)
    order = {place: n for n, place in enumerate(used)}
    blocks = list(_blocks(keys, rows_per_shard))
    names = [_shard_name(keys[start:end]) for start, end in blocks]
    state = distributed_state()
    missing = [n for n, shard in enumerate(names) if shard not in shards.names]
    state.wait_for_everyone()  # all have seen the same files
    mine = tqdm(missing[state.process_index :: state.num_processes], desc=name, unit=" blocks", disable=None)
    for n in mine if missing else ():
        wanted = [place for place in range(*blocks[n]) if keys[place] is not None]
        chosen = [order[place] for place in wanted]
        block = list(_rows(rows.select(chosen)))
        values = shards.values(
            block,
            [keys[place] for place in wanted],
            [row_name(row, positions[i]) for row, i in zip(block, chosen)],
        )
        if len(wanted) < blocks[n][1] - blocks[n][0]:  # null where a row is not used
            places = np.full(blocks[n][1] - blocks[n][0], -1)
            places[np.array(wanted) - blocks[n][0]] = np.arange(len(wanted))
            values = values.take(pa.array(places, mask=places < 0))
        shards.write(names[n], values)
    state.wait_for_everyone()
    column = [shards.read(shard).remove_columns("key") for shard in names]
    for part, shard, (start, end) in zip(column, names, blocks, strict=True):
        if len(part) != end - start:
            raise shards.damaged(shard, f"it has {len(part)} rows instead of {end - start}")
    result = concatenate_datasets([_in_pieces(base, blocks), concatenate_datasets(column)], axis=1)
    if dataset._indices is not None:
        result = result.select(indices)
    return result


def _add_to_stream(dataset: IterableDataset, shards: "_Shards", columns: list[str], size: int) -> IterableDataset:
    dataset = undecoded(dataset)
    columns = [c for c in (*columns, "id") if c in dataset.features]
    state = distributed_state()
    state.wait_for_everyone()  # all have seen the same files
    if shards.function is not None:
        found: set[bytes] = set()
        fresh: list[tuple[bytes, str, dict[str, Any]]] = []
        turn = 0

        def write():
            nonlocal turn
            if turn % state.num_processes == state.process_index:
                keys, names, rows = map(list, zip(*fresh))
                shards.write(_shard_name(keys), shards.values(rows, keys, names))
            turn += 1
            fresh.clear()

        rows = dataset.select_columns(columns)
        for index, row in enumerate(tqdm(rows, desc=shards.name, unit=" rows", disable=None)):
            key = _key(row)
            if key not in found and not shards.known([key])[0]:
                found.add(key)
                fresh.append((key, row_name(row, index), row))
            if len(fresh) == size:
                write()
        if fresh:
            write()
        state.wait_for_everyone()
        shards = shards.again()
    if not shards.names:
        raise ValueError(
            f"{shards.directory} holds no {shards.name}, and a streaming dataset is not read before it is used. {shards.remedy}"
        )
    features = shards.read(min(shards.names)).remove_columns("key").features

    def add(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(columns, values)) for values in zip(*(batch[column] for column in columns))]
        keys = list(map(_key, rows))
        for row, known in zip(rows, shards.known(keys)):
            if not known:
                excerpt = json.dumps(_stamped({c: row[c] for c in columns if c != "id"}))[:200]
                raise shards.lacks(f"the row {row.get('id') or excerpt}")
        return {**batch, **shards.lookup(keys).to_pydict()}

    return dataset.map(add, batched=True, batch_size=64, features=Features({**dataset.features, **features}))


class _Shards:
    """The files of a column. What other processes write after the construction is not seen."""

    def __init__(
        self, directory: Path, name: str, function: Callable | None, fingerprint: str, description: str, remedy: str
    ):
        self.directory, self.name, self.function = directory, name, function
        self.fingerprint, self.description, self.remedy = fingerprint, description, remedy
        self.names = {path.name for path in directory.glob("shard-*.arrow")}
        header = directory / f"{name}.json"
        if header.exists() or self.names:
            try:
                made = json.loads(header.read_text(encoding="utf-8"))
                found, by = made["fingerprint"], made["description"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{header}, which says what made the {name} there, cannot be read ({type(error).__name__}: {error}). "
                    "Use another directory or delete this one."
                ) from error
            if found != fingerprint:
                raise ValueError(
                    f"{directory} holds {name} of other settings.\n  there:     {by}\n  asked for: {description}\nUse "
                    "another directory, or delete this one to compute them anew."
                )
        for path in directory.glob(".*.tmp"):  # what a killed run left; one of the last hour may be another run's
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)
        self._open: dict[str, Dataset] = {}
        self._index: tuple[list[str], np.ndarray, np.ndarray, np.ndarray] | None = None

    def again(self) -> "_Shards":
        """With what has been written since."""
        return _Shards(self.directory, self.name, self.function, self.fingerprint, self.description, self.remedy)

    def values(self, rows: list[dict[str, Any]], keys: list[bytes], names: list[str]) -> pa.Table:
        """Keys and values of rows, of which those that are in a shard are not computed again."""
        known = self.known(keys)
        fresh = [n for n, there in enumerate(known) if not there]
        if fresh and self.function is None:
            raise self.lacks(names[fresh[0]])
        parts = [self.lookup([key for key, there in zip(keys, known) if there])] if len(fresh) < len(keys) else []
        if fresh:
            parts.append(self.function([rows[n] for n in fresh], [names[n] for n in fresh]))
        order = np.argsort([n for n in range(len(keys)) if known[n]] + fresh)
        values = pa.concat_tables(parts).take(pa.array(order)) if len(parts) > 1 else parts[0]
        return values.add_column(0, "key", pa.array(keys, pa.binary(16)))

    def write(self, name: str, table: pa.Table) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        header = self.directory / f"{self.name}.json"
        if not header.exists():
            content = json.dumps({"fingerprint": self.fingerprint, "description": self.description}, indent=2)
            _write_atomically(header, lambda path: path.write_text(content, encoding="utf-8"))

        def write(path: Path):
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table.combine_chunks())

        _write_atomically(self.directory / name, write)

    def read(self, name: str) -> Dataset:
        if name not in self._open:
            try:
                self._open[name] = Dataset.from_file(str(self.directory / name))
            except FileNotFoundError as error:
                raise ValueError(
                    f"{self.directory / name} is not there: `cache_dir` must be a directory that all processes share."
                ) from error
            except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
                raise self.damaged(name, str(error)) from error
        return self._open[name]

    def lacks(self, row: str) -> ValueError:
        return ValueError(f"{row} has no {self.name} in {self.directory}. {self.remedy}")

    def damaged(self, name: str, reason: str) -> ValueError:
        return ValueError(
            f"The file {self.directory / name} is damaged: {reason}. Delete it; what it holds is then computed again."
        )

    def known(self, keys: list[bytes]) -> np.ndarray:
        _, index, *_ = self._keys()
        if not len(index):
            return np.zeros(len(keys), bool)
        places = np.searchsorted(index, np.array(keys, "S16"))
        return index[np.minimum(places, len(index) - 1)] == np.array(keys, "S16")

    def lookup(self, keys: list[bytes]) -> pa.Table:
        """The values of keys that are known."""
        names, index, shards, rows = self._keys()
        found = []
        for place in np.searchsorted(index, np.array(keys, "S16")):
            table = self.read(names[shards[place]]).data.table
            found.append(table.slice(rows[place], 1).drop_columns("key"))
        return pa.concat_tables(found)

    def _keys(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """Shards; all keys, sorted, with the number of their shard and their row in it."""
        if self._index is None:
            names = sorted(self.names)
            parts = [np.array(self.read(name).data.column("key").to_pylist(), object) for name in names]
            places = [(n, row) for n, part in enumerate(parts) for row, key in enumerate(part) if key is not None]
            shards, rows = np.array(places, int).reshape(-1, 2).T
            keys = np.array([parts[n][row] for n, row in places], "S16")
            keys, first = np.unique(keys, return_index=True)
            self._index = names, keys, shards[first], rows[first]
        return self._index


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter(batch_size=256):
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


def _blocks(keys: Iterable[bytes | None], size: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most `size` rows that have a key. They end where the key says so, so that the ends stay where they are
    when something changes before them."""
    start = count = end = 0
    for end, key in enumerate(keys, 1):
        if key is not None:
            count += 1
            if count == size or (count >= size // 4 and int.from_bytes(key[:4]) % size < 2):
                yield start, end
                start, count = end, 0
    if start < end:
        yield start, end


def _shard_name(keys: list[bytes | None]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key in keys:
        digest.update(bytes(17) if key is None else b"\1" + key)
    return f"shard-{digest.hexdigest()}.arrow"


def _in_pieces(dataset: Dataset, blocks: list[tuple[int, int]]) -> Dataset:
    """The dataset as blocks, of which those in memory have memory of their own: a slice is pickled (for a worker) with all
    that it is cut from."""

    def copied(table: Table) -> Table:
        if isinstance(table, ConcatenationTable):
            return ConcatenationTable.from_blocks([list(map(copied, row)) for row in table.blocks])
        if not isinstance(table, InMemoryTable):
            return table
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.table)
        return InMemoryTable(pa.ipc.open_stream(sink.getvalue()).read_all())

    table = concat_tables([copied(dataset.data.slice(start, end - start)) for start, end in blocks])
    return Dataset(table, dataset.info, dataset.split, fingerprint=dataset._fingerprint)
