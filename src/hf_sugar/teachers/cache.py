"""Teacher embeddings on disk, computed once per slice."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from hf_sugar.data.rows import conversation_row, load_image, row_name, row_slices, undecoded

from .encoder import TripleEncoder


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


def slice_key(item: str | Image.Image) -> str:
    """
    Name of a slice by its content, so that equal slices share one embedding wherever they occur.

    Args:
        item (`str` or `PIL.Image.Image`):
            Text, or image (its size and its RGB pixels count, not its file).

    Returns:
        `str`: 64 hexadecimal digits (BLAKE2b with a digest of 32 bytes).
    """
    digest = hashlib.blake2b(digest_size=32)
    if isinstance(item, str):
        digest.update(b"text\0" + item.encode("utf-8"))
    else:
        image = load_image(item)
        digest.update(b"image\0%d\0%d\0" % image.size)
        digest.update(image.tobytes())
    return digest.hexdigest()


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


class TeacherCache:
    """
    A directory of teacher embeddings, found by the content of their slices.

    `cache.json` says which teachers the embeddings are from; numbered shards (`shard-00000.safetensors`, ...) hold
    `keys` of shape `(n, 32)` in uint8 and `embeddings` of shape `(n, dim)` in float16. Files appear in one step, so an
    interrupted run leaves a valid cache, and the next one computes only what is missing. One process may write at a
    time; any number may read.

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
        `ValueError`: if `directory` holds embeddings of other teachers or of another format, or a file in it cannot be
            read.

    Example:

    ```python
    >>> from hf_sugar import TripleEncoder
    >>> from hf_sugar.teachers import TeacherCache

    >>> encoder = TripleEncoder()
    >>> cache = TeacherCache.for_encoder("teacher-cache", encoder)
    >>> cache.fill(dataset, encoder)
    {'rows': 665298, 'skipped': 0, 'slices': 7331404, 'unique': 5120822, 'encoded': 5120822}
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
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> shard, row
        self._embeddings: dict[int, torch.Tensor] = {}
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
        header = json.loads((directory / "cache.json").read_text(encoding="utf-8"))
        if header["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"The teacher cache {directory} has format version {header['format_version']}, this release reads "
                f"{FORMAT_VERSION}. Use another directory or delete this one."
            )
        return header

    def _check(self, header: dict[str, Any]) -> None:
        if (header["fingerprint"], header["dim"], header["split"]) != (self.fingerprint, self.dim, self.split):
            raise ValueError(
                f"The teacher cache {self.directory} holds embeddings of other teachers.\n"
                f"  in the cache: {header['description']} (dim {header['dim']}, split {header['split']})\n"
                f"  asked for:    {self.description} (dim {self.dim}, split {self.split})\n"
                "Use another directory, or delete this one to compute the embeddings anew."
            )

    def _read(self) -> None:
        """Take in the shards on disk that are not known yet."""
        shards = sorted(self.directory.glob("shard-*.safetensors"))
        if (self.directory / "cache.json").exists():
            self._check(self._read_header(self.directory))
        elif shards:
            raise ValueError(
                f"The teacher cache {self.directory} has {len(shards)} shards but no cache.json to say which teachers they "
                "are from. Use another directory or delete this one."
            )
        for path in shards:
            number = int(path.stem.removeprefix("shard-"))
            if number in self._embeddings:
                continue
            try:
                shard = load_file(path)
            except SafetensorError as error:
                raise ValueError(
                    f"The shard {path} of the teacher cache cannot be read ({error}). Delete this file and run "
                    "`hf-sugar prepare` again."
                ) from error
            self._register(number, shard)

    def _register(self, number: int, shard: dict[str, torch.Tensor]) -> None:
        self._embeddings[number] = shard["embeddings"]
        for row, key in enumerate(shard["keys"].numpy()):
            self._places[key.tobytes()] = (number, row)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item: str | Image.Image) -> bool:
        return bytes.fromhex(slice_key(item)) in self._places

    def missing(self, slices: Sequence[str | Image.Image]) -> list[str | Image.Image]:
        """
        The slices that have no embedding yet, each once, in order of first occurrence.

        Args:
            slices (`Sequence[str | PIL.Image.Image]`):
                Texts and images.

        Returns:
            `list[str | PIL.Image.Image]`
        """
        unique: dict[bytes, str | Image.Image] = {}
        for item in slices:
            unique.setdefault(bytes.fromhex(slice_key(item)), item)
        return [item for key, item in unique.items() if key not in self._places]

    def add(self, slices: Sequence[str | Image.Image], embeddings: torch.Tensor) -> None:
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
        self._add([bytes.fromhex(slice_key(item)) for item in slices], embeddings)

    def _add(self, keys: list[bytes], embeddings: torch.Tensor) -> None:
        if embeddings.shape != (len(keys), self.dim):
            raise ValueError(
                f"`embeddings` has shape {tuple(embeddings.shape)}, expected {(len(keys), self.dim)}: one row per slice."
            )
        if not torch.isfinite(embeddings).all():
            raise ValueError("`embeddings` has values that are not finite.")
        if not keys:
            return
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
        number = max(self._embeddings, default=-1) + 1
        shard = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32).copy()),
            "embeddings": embeddings.detach().cpu().to(torch.float16).contiguous(),
        }
        _write_atomically(self.directory / f"shard-{number:05d}.safetensors", lambda path: save_file(shard, path))
        self._register(number, shard)

    def lookup(self, slices: Sequence[str | Image.Image]) -> torch.Tensor:
        """
        Embeddings of slices.

        Args:
            slices (`Sequence[str | PIL.Image.Image]`):
                Texts and images.

        Returns:
            `torch.Tensor` of shape `(len(slices), dim)` and dtype `torch.float32`. Both halves have length one.

        Raises:
            `KeyError`: if a slice has no embedding; the message says which.
        """
        embeddings = torch.empty(len(slices), self.dim)
        for i, item in enumerate(slices):
            place = self._places.get(bytes.fromhex(slice_key(item)))
            if place is None:
                excerpt = repr(item[:60]) if isinstance(item, str) else f"an image of size {item.size}"
                raise KeyError(
                    f"slices[{i}], {excerpt}, has no embedding in the teacher cache {self.directory}. Run `hf-sugar "
                    "prepare` on the data you train on."
                )
            shard, row = place
            embeddings[i] = self._embeddings[shard][row]
        if self.split is None:
            return F.normalize(embeddings, dim=-1)
        first, second = embeddings[:, : self.split], embeddings[:, self.split :]
        return torch.cat([F.normalize(first, dim=-1), F.normalize(second, dim=-1)], dim=1)

    def fill(
        self,
        rows: Iterable[dict[str, Any]],
        encoder: TripleEncoder,
        on_row_error: str = "error",
        batch_slices: int = 512,
    ) -> dict[str, int]:
        """
        Embed whatever a dataset needs and the cache lacks. A run that was interrupted goes on where it was.

        Args:
            rows (`datasets.Dataset` or `datasets.IterableDataset` or `Iterable[dict]`):
                Rows in any layout that [`~hf_sugar.data.rows.conversation_row`] takes.
            encoder ([`TripleEncoder`]):
                The teachers of this cache.
            on_row_error (`str`, *optional*, defaults to `"error"`):
                `"error"` stops at a row that cannot be read, `"skip"` leaves it out, counts it and logs the first few.
            batch_slices (`int`, *optional*, defaults to `512`):
                Slices that are collected, embedded and written to one shard at a time.

        Returns:
            `dict[str, int]`: number of `rows` read, rows `skipped`, `slices` in the others, `unique` ones among these, and
            `encoded` ones, which were not in the cache before.

        Raises:
            `ValueError`: for a row that cannot be read, naming its position, its `id` and the cause; for an encoder with
                another fingerprint; for another value of `on_row_error`.
        """
        if on_row_error not in ("error", "skip"):
            raise ValueError(f"`on_row_error` must be 'error' or 'skip', got {on_row_error!r}.")
        if batch_slices < 1:
            raise ValueError(f"`batch_slices` must be at least 1, got {batch_slices}.")
        if encoder.fingerprint != self.fingerprint:
            raise ValueError(
                f"The encoder is not the one of the teacher cache {self.directory}.\n  cache:   {self.description}\n"
                f"  encoder: {encoder.description}\nOpen the cache with `TeacherCache.for_encoder`."
            )
        if isinstance(rows, datasets.Dataset | datasets.IterableDataset):
            rows = undecoded(rows)
        self._read()  # another process may have filled the cache since it was opened

        counts = Counter(rows=0, skipped=0, slices=0, unique=0, encoded=0)
        seen: set[bytes] = set()
        pending: dict[bytes, str | Image.Image] = {}
        truncated: Counter = Counter()
        texts = 0
        for index, row in enumerate(tqdm(rows, desc="Teacher embeddings", unit="row")):
            counts["rows"] += 1
            try:
                slices = row_slices(conversation_row(row), row_name(row, index))
            except ValueError as error:
                if on_row_error == "error":
                    raise
                counts["skipped"] += 1
                if counts["skipped"] <= 5:
                    logger.warning("Skipped: %s", error)
                continue
            counts["slices"] += len(slices)
            for item in slices:
                key = bytes.fromhex(slice_key(item))
                if key not in seen:
                    seen.add(key)
                    if key not in self._places:
                        pending[key] = item
                        texts += isinstance(item, str)
            if len(pending) >= batch_slices:
                self._add(list(pending), encoder.encode(list(pending.values()), truncated=truncated))
                counts["encoded"] += len(pending)
                pending = {}
        if pending:
            self._add(list(pending), encoder.encode(list(pending.values()), truncated=truncated))
            counts["encoded"] += len(pending)
        counts["unique"] = len(seen)
        if counts["skipped"]:
            logger.warning("Skipped %d of %d rows.", counts["skipped"], counts["rows"])
        encoder.warn_truncated(truncated, texts)
        return dict(counts)
