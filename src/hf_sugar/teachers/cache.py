"""Teacher embeddings on disk, computed once per slice."""

import hashlib
import json
import logging
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_sugar.data.images import load_image, undecoded
from hf_sugar.distributed import distributed_state
from hf_sugar.models.rows_sugar import conversation_row, fill_images, row_name

from .encoder import TripleEncoder


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
# Every mapped file holds a file descriptor.
_MAX_OPEN_SHARDS = 256
_COUNTS = ("rows", "skipped", "slices")
_ROW_COLUMNS = ("messages", "prompt", "completion", "image", "images", "loss_on", "structure", "id")


def slice_key(item: Any) -> bytes:
    """
    Name of a slice by its content, so that equal slices share one embedding wherever they occur.

    Args:
        item (`str` or `PIL.Image.Image` or `pathlib.Path` or `bytes` or `dict`):
            Text, or an image in any form but `str` that [`~hf_sugar.data.load_image`] takes: its size and its RGB pixels
            count, not its file.

    Returns:
        `bytes`: 16 bytes (BLAKE2b).
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(item, str):
        digest.update(b"text\0" + item.encode("utf-8"))
    else:
        image = load_image(item)
        digest.update(b"image\0%d\0%d\0" % image.size)
        digest.update(image.tobytes())
    return digest.digest()


def _digest(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class TeacherCache:
    """
    A directory of teacher embeddings, found by the content of their slices.

    - `cache.json` says which teachers the embeddings are from.
    - `shard-<digest of its keys>.arrow`: Arrow streams ([`datasets.Dataset.from_file`] opens them) with the columns `key`
      (16 bytes), `embedding` (`dim` values in float16) and `checksum` (CRC-32 of both). They are mapped into memory, and
      the checksum is verified whenever an embedding is read.
    - `blocks.jsonl` names the blocks of rows that are done, so that a second run need not look at them again.
    - `keys-<digest of the shards' names>.index`: all keys sorted, with their places. It is made from the shards and made
      again where it does not fit them.

    Files appear in one step. A shard belongs to a block of rows and holds the slices that occur there first; its content
    does not depend on what happened to other shards. So an interrupted run loses at most the shard it was working on and
    leaves a valid cache, the next one computes what is missing to the same bytes, and processes that write at the same
    time write the same.

    Rounding to float16 moves the cosine of two embedding halves by less than 1e-4 (measured on all pairs of 1000 random
    768-dimensional unit vectors and as many near neighbours of them: 6e-5 at most; at 64 dimensions 2e-4).

    Args:
        directory (`str` or `os.PathLike`):
            Where the cache is, or will be: it is created by the first [`~TeacherCache.add`].
        fingerprint (`str`):
            [`TripleEncoder.fingerprint`] of the teachers.
        dim (`int`):
            Width of an embedding.
        split (`int` or `None`):
            Width of its first half; `None` where the embedding is a single vector.
        description (`str`, *optional*, defaults to `"unnamed teachers"`):
            The teachers in words, for error messages.

    Raises:
        `ValueError`: if `directory` holds embeddings of other teachers or of another format, or a file in it is damaged.

    Example:

    ```python
    >>> from hf_sugar import TripleEncoder
    >>> from hf_sugar.teachers import TeacherCache

    >>> encoder = TripleEncoder()
    >>> cache = TeacherCache.for_encoder("teacher-cache", encoder)
    >>> cache.fill(dataset, encoder)
    {'rows': 665298, 'skipped': 0, 'slices': 7331404, 'encoded': 5120822}
    >>> cache.lookup(["What is in the picture?"]).shape
    torch.Size([1, 1536])
    ```
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        fingerprint: str,
        dim: int,
        split: int | None,
        description: str = "unnamed teachers",
    ):
        self.directory = Path(directory)
        self.fingerprint = fingerprint
        self.dim = dim
        self.split = split
        self.description = description
        self._shards: list[str] | None = None
        self._open: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._read()

    @classmethod
    def for_encoder(cls, directory: str | os.PathLike, encoder: TripleEncoder) -> "TeacherCache":
        """
        Open the cache of an encoder, or begin one. The encoder's weights are not read where the cache exists.

        Args:
            directory (`str` or `os.PathLike`):
                Where the cache is, or will be.
            encoder ([`TripleEncoder`]):
                Teachers whose embeddings it holds.

        Returns:
            [`TeacherCache`]

        Raises:
            `ValueError`: as the constructor.
        """
        if (Path(directory) / "cache.json").exists():
            header = cls._read_header(Path(directory))
            dim, split = header["dim"], header["split"]
        else:
            dim, split = encoder.dim, encoder.split
        return cls(directory, encoder.fingerprint, dim, split, encoder.description)

    @staticmethod
    def _read_header(directory: Path) -> dict[str, Any]:
        try:
            header = json.loads((directory / "cache.json").read_bytes())
            if header["format_version"] == FORMAT_VERSION:
                return {name: header[name] for name in ("fingerprint", "description", "dim", "split")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{directory / 'cache.json'} of the teacher cache is damaged ({type(error).__name__}: {error}). Use another "
                "directory or delete this one."
            ) from error
        raise ValueError(
            f"The teacher cache {directory} has format version {header['format_version']}, this release reads "
            f"{FORMAT_VERSION}. Use another directory or delete this one."
        )

    def _check(self, header: dict[str, Any]) -> None:
        if (header["fingerprint"], header["dim"], header["split"]) != (self.fingerprint, self.dim, self.split):
            raise ValueError(
                f"The teacher cache {self.directory} holds embeddings of other teachers.\n"
                f"  in the cache: {header['description']} (dim {header['dim']}, split {header['split']})\n"
                f"  asked for:    {self.description} (dim {self.dim}, split {self.split})\n"
                "Use another directory, or delete this one to compute the embeddings anew."
            )

    # --- files

    def _read(self) -> None:
        """Take in what is on disk now."""
        shards = sorted(path.name for path in self.directory.glob("shard-*.arrow"))
        if (self.directory / "cache.json").exists():
            self._check(self._read_header(self.directory))
        elif shards:
            raise ValueError(
                f"The teacher cache {self.directory} has {len(shards)} shards but no cache.json to say which teachers they "
                "are from. Use another directory or delete this one."
            )
        if shards == self._shards:
            return
        self._shards = shards
        if not self._map_index():
            parts = [self._shard(name)[0] for name in shards]
            keys = np.concatenate([np.empty(0, "S16"), *parts])
            # Should a key be in two shards, the first one counts.
            self._keys, first = np.unique(keys, return_index=True)
            sizes = [len(part) for part in parts]
            self._numbers = np.repeat(np.arange(len(shards), dtype="u4"), sizes)[first]
            starts = np.cumsum([0, *sizes])[:-1]
            self._rows = (first - np.repeat(starts, sizes)[first]).astype("u4")

    @property
    def _index_path(self) -> Path:
        return self.directory / f"keys-{_digest(' '.join(self._shards).encode())}.index"

    def _map_index(self) -> bool:
        if not self._index_path.exists():
            return False
        raw = np.memmap(self._index_path, dtype="u1", mode="r")
        n = len(raw) // 24
        if len(raw) != 24 * n + 4 or zlib.crc32(raw[:-4]) != int(raw[-4:].view("u4")[0]):
            return False
        self._keys = raw[: 16 * n].view("S16")
        self._numbers, self._rows = raw[16 * n : 20 * n].view("u4"), raw[20 * n : 24 * n].view("u4")
        return True

    def _write_index(self) -> None:
        content = self._keys.tobytes() + self._numbers.tobytes() + self._rows.tobytes()
        content += np.uint32(zlib.crc32(content)).tobytes()
        _write_atomically(self._index_path, lambda path: path.write_bytes(content))
        for path in self.directory.glob("keys-*.index"):
            if path != self._index_path:
                path.unlink(missing_ok=True)
        self._map_index()

    def _shard(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, checksums and embeddings of a shard, mapped into memory."""
        if name in self._open:
            return self._open[name]
        path = self.directory / name
        try:
            batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
            n = batch.num_rows
            # Straight from the buffers: Arrow's own conversions crash the process where the description is damaged.
            keys, checksums, embeddings = (
                np.frombuffer(batch[column].buffers()[-1], dtype, count)
                for column, dtype, count in (
                    ("key", "S16", n),
                    ("checksum", "u4", n),
                    ("embedding", "f2", n * self.dim),
                )
            )
        except (pa.ArrowException, OSError, KeyError, IndexError, ValueError, TypeError, StopIteration) as error:
            raise self._damaged(name, f"it cannot be read ({error})") from error
        if name != self._shard_name(keys.tobytes()):
            raise self._damaged(name, "its keys are not those it was written with")
        while len(self._open) >= _MAX_OPEN_SHARDS:
            del self._open[next(iter(self._open))]
        self._open[name] = keys, checksums, embeddings.reshape(n, self.dim)
        return self._open[name]

    @staticmethod
    def _shard_name(keys: bytes) -> str:
        return f"shard-{_digest(keys)}.arrow"

    def _damaged(self, name: str, reason: str) -> ValueError:
        return ValueError(
            f"The shard {self.directory / name} of the teacher cache is damaged: {reason}. Delete this file and run "
            "`hf-sugar prepare` again."
        )

    def _write_shard(self, keys: list[bytes], embeddings: torch.Tensor) -> None:
        if embeddings.shape != (len(keys), self.dim):
            raise ValueError(
                f"`embeddings` has shape {tuple(embeddings.shape)}, expected {(len(keys), self.dim)}: one row per slice."
            )
        if not torch.isfinite(embeddings).all():
            raise ValueError("`embeddings` has values that are not finite.")
        self.directory.mkdir(parents=True, exist_ok=True)
        header = self.directory / "cache.json"
        if not header.exists():
            content = {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "description": self.description,
                "dim": self.dim,
                "split": self.split,
            }
            _write_atomically(header, lambda path: path.write_text(json.dumps(content, indent=2), encoding="utf-8"))
        values = embeddings.detach().cpu().to(torch.float16).numpy()
        checksums = [zlib.crc32(value.tobytes(), zlib.crc32(key)) for key, value in zip(keys, values, strict=True)]
        table = pa.table(
            {
                "key": pa.array(keys, pa.binary(16)),
                "checksum": pa.array(checksums, pa.uint32()),
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self.dim),
            }
        )

        def write(path: Path):
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)

        _write_atomically(self.directory / self._shard_name(b"".join(keys)), write)

    # --- slices

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, item: Any) -> bool:
        return bool(_present(self._keys, [slice_key(item)])[0])

    def missing(self, slices: Sequence[Any]) -> list[Any]:
        """
        The slices that have no embedding yet, each once, in order of first occurrence.

        Args:
            slices (`Sequence[str | PIL.Image.Image]`):
                Texts and images.

        Returns:
            `list[str | PIL.Image.Image]`
        """
        unique: dict[bytes, Any] = {}
        for item in slices:
            unique.setdefault(slice_key(item), item)
        present = _present(self._keys, list(unique))
        return [item for item, there in zip(unique.values(), present, strict=True) if not there]

    def add(self, slices: Sequence[Any], embeddings: torch.Tensor) -> None:
        """
        Write embeddings to a new shard.

        Args:
            slices (`Sequence[str | PIL.Image.Image]`):
                Texts and images.
            embeddings (`torch.Tensor` of shape `(len(slices), dim)`):
                Their embeddings, as [`TripleEncoder.encode`] gives them. Stored in float16.

        Raises:
            `ValueError`: if the shape of `embeddings` does not fit, or a value is not finite.
        """
        self._write_shard([slice_key(item) for item in slices], embeddings)
        self._read()

    def lookup(self, slices: Sequence[Any]) -> torch.Tensor:
        """
        Embeddings of slices.

        Args:
            slices (`Sequence[str | PIL.Image.Image]`):
                Texts and images.

        Returns:
            `torch.Tensor` of shape `(len(slices), dim)` and dtype `torch.float32`. Both halves have length one.

        Raises:
            `KeyError`: if a slice has no embedding; the message says which.
            `ValueError`: if the shard that holds an embedding is damaged; the message names it.
        """
        keys = [slice_key(item) for item in slices]
        embeddings = np.empty((len(keys), self.dim), np.float32)
        places = np.searchsorted(self._keys, np.array(keys, "S16"))
        for i, (key, present, place) in enumerate(zip(keys, _present(self._keys, keys), places, strict=True)):
            if not present:
                excerpt = (
                    repr(slices[i][:60])
                    if isinstance(slices[i], str)
                    else f"an image of size {load_image(slices[i]).size}"
                )
                raise KeyError(
                    f"slices[{i}], {excerpt}, has no embedding in the teacher cache {self.directory}. Run `hf-sugar "
                    "prepare` on the data you train on."
                )
            name = self._shards[self._numbers[place]]
            _, checksums, values = self._shard(name)
            row = self._rows[place]
            if row >= len(values) or zlib.crc32(values[row].tobytes(), zlib.crc32(key)) != checksums[row]:
                raise self._damaged(name, f"row {row} does not have its checksum")
            embeddings[i] = values[row]
        embeddings = torch.from_numpy(embeddings)
        if self.split is None:
            return F.normalize(embeddings, dim=-1)
        first, second = embeddings[:, : self.split], embeddings[:, self.split :]
        return torch.cat([F.normalize(first, dim=-1), F.normalize(second, dim=-1)], dim=1)

    def fill(
        self,
        rows: Iterable[dict[str, Any]],
        encoder: TripleEncoder,
        on_row_error: str = "error",
        rows_per_shard: int = 512,
    ) -> dict[str, int]:
        """
        Embed whatever a dataset needs and the cache lacks. A run that was interrupted goes on where it was.

        In a distributed run (`accelerate launch`, `torchrun`) every process has to call this with the same rows; the
        blocks of rows are divided over them, and the directory has to be one that they share.

        Args:
            rows (`datasets.Dataset` or `datasets.IterableDataset` or `Iterable[dict]`):
                Rows in any layout that [`~hf_sugar.models.rows_sugar.conversation_row`] takes. Of datasets whose columns are known
                the blocks that an earlier run finished are not looked at again; image files are taken to be the same if
                their size and time are.
            encoder ([`TripleEncoder`]):
                The teachers of this cache.
            on_row_error (`str`, *optional*, defaults to `"error"`):
                `"error"` stops at a row that cannot be read, `"skip"` leaves it out, counts it and logs the first few.
            rows_per_shard (`int`, *optional*, defaults to `512`):
                Rows in a block, whose new slices become one shard.

        Returns:
            `dict[str, int]`: number of `rows` read, rows `skipped`, `slices` in the others, and `encoded` ones, which were
            not in the cache before. In a distributed run all processes get the sums.

        Raises:
            `ValueError`: for a row that cannot be read, naming its position, its `id` and the cause; for an encoder with
                another fingerprint; for another value of `on_row_error`.
        """
        if on_row_error not in ("error", "skip"):
            raise ValueError(f"`on_row_error` must be 'error' or 'skip', got {on_row_error!r}.")
        if rows_per_shard < 1:
            raise ValueError(f"`rows_per_shard` must be at least 1, got {rows_per_shard}.")
        if encoder.fingerprint != self.fingerprint:
            raise ValueError(
                f"The encoder is not the one of the teacher cache {self.directory}.\n  cache:   {self.description}\n"
                f"  encoder: {encoder.description}\nOpen the cache with `TeacherCache.for_encoder`."
            )
        state = distributed_state()
        rank = state.process_index
        if state.is_main_process:
            self._remove_leftovers()
        self._read()  # another process may have filled the cache since it was opened
        finished = self._finished_blocks()
        known = self._keys
        counts = Counter(rows=0, skipped=0, slices=0, encoded=0)
        texts, long_texts = 0, Counter()
        start, unmarked = 0, None
        blocks, features = _blocks(rows, rows_per_shard)
        with tqdm(
            desc="Teacher embeddings",
            total=len(rows) if isinstance(rows, datasets.Dataset) else None,
            unit="row",
            disable=not state.is_local_main_process,
        ) as progress:
            # A block for every process at a time. All of them meet in `gather_object`, also those left without a block.
            while turn := list(islice(blocks, state.num_processes)):
                found, record, fresh = {}, {}, False
                if rank < len(turn):
                    digest = _block_digest(turn[rank])
                    record = finished.get(digest)
                    if record is None or (record["skipped"] and on_row_error == "error"):
                        fresh = True
                        first = start + sum(map(len, turn[:rank]))
                        block = _block_rows(turn[rank], features)
                        found, record = _find_slices(block, first, on_row_error, counts["skipped"])
                        record["block"] = digest
                    counts.update({name: record[name] for name in _COUNTS})
                everyones_keys = gather_object([list(found)])
                # Now all processes have written their shards of the turn before.
                self._mark_finished(unmarked)
                claimed: set[bytes] = set()
                for number, keys in enumerate(everyones_keys):
                    present = _present(known, keys)
                    new = [key for key, there in zip(keys, present) if not there and key not in claimed]
                    claimed.update(new)
                    if number == rank and new:
                        record["shard"] = self._shard_name(b"".join(new))
                        if not (self.directory / record["shard"]).exists():  # or another run has just written the same
                            slices = [found[key] for key in new]
                            self._write_shard(new, encoder.encode(slices, long_texts=long_texts))
                            counts["encoded"] += len(new)
                            texts += sum(isinstance(item, str) for item in slices)
                keys = np.array(sorted(claimed), "S16")
                known = np.insert(known, np.searchsorted(known, keys), keys)
                unmarked = record if fresh else None
                size = sum(map(len, turn))
                start += size
                progress.update(size)
        state.wait_for_everyone()
        self._mark_finished(unmarked)
        everyones = gather_object([(counts, texts, long_texts)])
        self._read()
        counts, texts, long_texts = (sum(values[1:], values[0]) for values in zip(*everyones))
        if state.is_main_process:
            if len(self) and not self._index_path.exists():
                self._write_index()
            if counts["skipped"]:
                logger.warning("Skipped %d of %d rows.", counts["skipped"], counts["rows"])
            encoder.report_long_texts(long_texts, texts)
        return {name: counts[name] for name in ("rows", "skipped", "slices", "encoded")}

    def _finished_blocks(self) -> dict[str, dict[str, Any]]:
        """Records of `blocks.jsonl` by digest; none where shards they rely on are gone."""
        path = self.directory / "blocks.jsonl"
        finished = {}
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
                finished[record["block"]] = {**record, **{name: int(record[name]) for name in _COUNTS}}
            except (ValueError, KeyError, TypeError):  # cut off by a kill, or damaged
                continue
        if not {record.get("shard") for record in finished.values()} <= {None, *self._shards}:
            path.unlink(missing_ok=True)
            return {}
        return finished

    def _mark_finished(self, record: dict[str, Any] | None) -> None:
        if record and record["block"] and self.directory.exists():
            # One write of a short line, so that processes do not mix theirs; it begins anew after a line cut off.
            with open(self.directory / "blocks.jsonl", "a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(record))

    def _remove_leftovers(self) -> None:
        """What killed runs left half written; what is recent may be another run's."""
        for path in self.directory.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)


def _present(sorted_keys: np.ndarray, keys: list[bytes]) -> np.ndarray:
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    keys = np.array(keys, "S16")
    places = np.searchsorted(sorted_keys, keys)
    return sorted_keys[np.minimum(places, len(sorted_keys) - 1)] == keys


def _blocks(rows: Iterable[dict[str, Any]], size: int) -> tuple[Iterator[Any], datasets.Features | None]:
    """Blocks of rows: Arrow tables of datasets whose features are known, else lists."""
    if isinstance(rows, datasets.Dataset | datasets.IterableDataset):
        rows = undecoded(rows)
        if rows.features:
            rows = rows.select_columns([name for name in _ROW_COLUMNS if name in rows.features])
            return rows.with_format("arrow").iter(batch_size=size), rows.features
    rows = iter(rows)
    return iter(lambda: list(islice(rows, size)), []), None


def _block_rows(block: Any, features: datasets.Features | None) -> Iterable[dict[str, Any]]:
    return block if features is None else map(features.decode_example, block.to_pylist())


def _block_digest(block: Any) -> str | None:
    """Digest of all that an Arrow block says, and of the size and time of its image files."""
    if not isinstance(block, pa.Table):
        return None
    block = block.combine_chunks().replace_schema_metadata(None)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as stream:
        stream.write_table(block)
    digest = hashlib.sha256(sink.getvalue())  # most of the time of a warm run; processors of today have it built in
    for name in {"image", "images"} & set(block.column_names):
        images = block[name].combine_chunks()
        images = images.flatten() if hasattr(images, "offsets") else images
        if not pa.types.is_struct(images.type):
            continue
        embedded = images.field("bytes").is_valid().to_pylist()
        for path, inside in zip(images.field("path").to_pylist(), embedded):
            if path and not inside and os.path.exists(path):
                stat = os.stat(path)
                digest.update(b"%d %d\0" % (stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def _find_slices(
    rows: Iterable[dict[str, Any]], first: int, on_row_error: str, skipped_before: int
) -> tuple[dict[bytes, Any], dict[str, Any]]:
    """The slices of a block by their keys, with images as they came (decoded ones would fill the memory), and counts."""
    found: dict[bytes, Any] = {}
    record = dict.fromkeys(_COUNTS, 0)
    for index, row in enumerate(rows, first):
        record["rows"] += 1
        try:
            slices = list(_row_slices(row, row_name(row, index)))
        except ValueError as error:
            if on_row_error == "error":
                raise
            record["skipped"] += 1
            if skipped_before + record["skipped"] <= 5:
                logger.warning("Skipped: %s", error)
            continue
        record["slices"] += len(slices)
        for key, item in slices:
            found.setdefault(key, item)
    return found, record


def _row_slices(row: dict[str, Any], where: str) -> Iterator[tuple[bytes, Any]]:
    row = conversation_row(row)
    if not row["structure"]:  # no teacher is asked about it
        return
    number = -1
    for message in fill_images(row["messages"], row["images"], where):
        for part in message["content"]:
            item = part.get("text")
            if part["type"] == "image":
                number += 1
                item = {"path": part["image"], "bytes": None} if isinstance(part["image"], str) else part["image"]
            if message["role"] != "system":
                loaded = item if isinstance(item, str) else load_image(item, f"{where}, images[{number}]")
                yield slice_key(loaded), item
