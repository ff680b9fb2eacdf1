"""Packed slices: checked, and compared with each other."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .recursion import wide_dtype


TEXT = 0
IMAGE = 1

# Slices whose distances are one matrix: large enough for BLAS, small enough for the cache.
BLOCK_SLICES = 1024
STRIP_SLICES = 96
# Below this squared distance, 2 - 2 cos loses too many digits in float32.
CLOSE = 0.1


class Block(NamedTuple):
    """Prefixes, in the order of their lengths, of samples whose slices are side by side."""

    number: int
    prefixes: np.ndarray  # which ones
    start: np.ndarray  # where in the block each begins
    length: np.ndarray


class Slices:
    """
    Packed slices, checked, and the squared distances between blocks of them. For the triple kernel the texts of a block
    stand before its images, so that every kind of pair is one product of the halves that Eq. 6 compares.
    """

    def __init__(
        self, embeddings: torch.Tensor, offsets: torch.Tensor, modality: torch.Tensor | None, split: int | None
    ):
        _check_embeddings(embeddings)
        _check_triple(embeddings, modality, split)
        self.offsets = _check_offsets(offsets, len(embeddings))
        self.dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        self.zeros = functools.partial(embeddings.new_zeros, dtype=wide_dtype(embeddings.device))
        # A sample is never cut.
        self.block_of = np.unique(self.offsets[:-1] // BLOCK_SLICES, return_inverse=True)[1]
        # Texts and images of each block are two runs; without modalities the second is empty.
        kind = np.repeat(2 * self.block_of, np.diff(self.offsets))
        halves = {"is all zeros and has no direction": embeddings}
        self.triple = split is not None
        if self.triple:
            kind = kind + modality.cpu().long().numpy()
            halves = {
                f"is all zeros in its first {split} dimensions": embeddings[:, :split],
                f"is all zeros after its first {split} dimensions": embeddings[:, split:],
            }
        bounds = [0, *np.bincount(kind, minlength=2 * int(self.block_of[-1]) + 2).cumsum().tolist()]
        self.runs = [slice(*run) for run in itertools.pairwise(bounds)]
        self.spans = [slice(*span) for span in itertools.pairwise(bounds[::2])]
        order = kind.argsort(kind="stable")
        self.order, self.place = (torch.from_numpy(i).to(embeddings.device) for i in (order, order.argsort()))
        self.halves = [self._measured(half, complaint) for complaint, half in halves.items()]
        self.inner = {}

    def _measured(self, half: torch.Tensor, complaint: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Slices in float32 at least, each block's texts before its images, and the inverses of their lengths."""
        norm = torch.linalg.vector_norm(half, dim=1, dtype=self.dtype)
        limit = 1e-150 if self.dtype == torch.float64 else 1e-15
        if not ((norm > limit) & (norm < 1 / limit)).all():
            # Bad, or products leave the range: then what is left over by the largest number has the same direction.
            largest = half.detach().abs().amax(dim=1)
            self._refuse(~largest.isfinite(), "holds NaN or infinity")
            self._refuse(largest == 0, complaint)
            half = half.to(self.dtype) / largest[:, None]
            norm = torch.linalg.vector_norm(half, dim=1)
        if self.triple:
            half, norm = half.index_select(0, self.order), norm.index_select(0, self.order)
        return half.to(self.dtype), 1 / norm

    def _refuse(self, bad: torch.Tensor, what: str):
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            sample = int(np.searchsorted(self.offsets, row, side="right")) - 1
            raise ValueError(
                f"Slice {row - self.offsets[sample]} of sequence {sample} (row {row} of the packed embeddings) {what}."
            )

    def blocks(self, prefixes: np.ndarray) -> list[Block]:
        order = prefixes[:, 1].argsort(kind="stable")
        sample, length = prefixes[order].T
        numbers, blocks = self.block_of[sample], []
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            start = self.offsets[sample[chosen]] - self.spans[number].start
            blocks.append(Block(number, order[chosen], start, length[chosen]))
        return blocks

    def distances(self, a: int, b: int) -> torch.Tensor:
        """Squared distances of the slices of two blocks, by their numbers."""
        if a == b and a not in self.inner:
            self.inner[a] = self._distances(a, a)
        return self.inner[a] if a == b else self._distances(a, b)

    def _distances(self, a: int, b: int) -> torch.Tensor:
        rows, columns = self.spans[a], self.spans[b]
        result = self.halves[0][0].new_empty(rows.stop - rows.start, columns.stop - columns.start)
        if not self.triple:
            return _squared_distances(self.halves[0], rows, columns, out=result)
        for i, j in itertools.product((TEXT, IMAGE), repeat=2):
            row_run, column_run = self.runs[2 * a + i], self.runs[2 * b + j]
            at = _moved(row_run, rows.start), _moved(column_run, columns.start)
            if a == b and i > j:
                result[at] = result[at[::-1]].T
            else:
                _squared_distances(self.halves[0 if i == j else 1], row_run, column_run, out=result[at])
        # From the order by modality to that of the samples.
        return result.index_select(0, self.place[rows] - rows.start).index_select(
            1, self.place[columns] - columns.start
        )


def _moved(run: slice, start: int) -> slice:
    return slice(run.start - start, run.stop - start)


def _squared_distances(
    half: tuple[torch.Tensor, torch.Tensor], rows: slice, columns: slice, out: torch.Tensor
) -> torch.Tensor:
    """Writes the squared distances of two runs of slices, when each has length 1, to `out`."""
    (a, inverse_a), (b, inverse_b) = ([part[run] for part in half] for run in (rows, columns))
    same = rows == columns
    # Of slices with themselves both triangles hold the same numbers, which are computed once.
    for begin in range(0, len(a), STRIP_SLICES) if same else (0,):
        strip, rest = slice(begin, begin + STRIP_SLICES if same else None), slice(begin, None)
        products = a[strip] @ b[rest].T
        out[strip, rest] = products
        if same:
            out[rest, strip] = products.T
    out.mul_(-2 * inverse_a[:, None]).mul_(inverse_b).add_(2).clamp_(min=0)
    # The gradient stays that of 2 - 2 cos.
    with torch.no_grad():
        if same:
            out.fill_diagonal_(CLOSE)
        if a.dtype == torch.float32 and out.numel() and out.min() < CLOSE:
            close = out < CLOSE
            i, j = close.any(dim=1).nonzero(), close.any(dim=0).nonzero()[:, 0]
            # MPS has no float64.
            device = "cpu" if a.device.type == "mps" else a.device
            x, y = (F.normalize(side.to(device, torch.float64)) for side in (a[i[:, 0]], b[j]))
            exact = (2 - 2 * (x @ y.T)).clamp_(min=0)
            out[i, j] = torch.where(close[i, j], exact.to(out), out[i, j])
        if same:
            out.fill_diagonal_(0)
    return out


def _check_embeddings(embeddings: torch.Tensor):
    if embeddings.ndim != 2 or not embeddings.is_floating_point() or embeddings.shape[1] == 0:
        raise ValueError(
            f"`embeddings` must have shape (total_slices, dim) and a floating-point dtype; got "
            f"{tuple(embeddings.shape)} of {embeddings.dtype}."
        )


def check_integers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {tensor.dtype}.")
    return tensor.cpu().long().contiguous()


def _check_triple(embeddings: torch.Tensor, modality: torch.Tensor | None, split: int | None):
    if (modality is None) != (split is None):
        raise ValueError("`modality` and `split` go together: pass both for the triple kernel, or neither.")
    if split is None:
        return
    if not 0 < split < embeddings.shape[1]:
        raise ValueError(
            f"`split` must lie between 1 and {embeddings.shape[1] - 1}, because embeddings have "
            f"{embeddings.shape[1]} dimensions; got {split}."
        )
    if modality.shape != embeddings.shape[:1]:
        raise ValueError(f"`modality` has shape {tuple(modality.shape)} for {len(embeddings)} slices.")
    if not ((modality == TEXT) | (modality == IMAGE)).all():
        raise ValueError(f"`modality` may hold {TEXT} (text) and {IMAGE} (image) only.")


def _check_offsets(offsets: torch.Tensor, total: int) -> np.ndarray:
    offsets = check_integers("offsets", offsets).numpy()
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"`offsets` must be one-dimensional and run from 0 to {total}, the number of slices.")
    empty = np.flatnonzero(np.diff(offsets) < 1)
    if len(empty):
        raise ValueError(f"`offsets` must increase, but sequence {empty[0]} is empty: every sample needs a slice.")
    return offsets


def check_prefixes(name: str, prefixes: torch.Tensor, offsets: np.ndarray) -> np.ndarray:
    prefixes = check_integers(name, prefixes).numpy()
    if prefixes.ndim != 2 or prefixes.shape[1] != 2 or len(prefixes) == 0:
        raise ValueError(f"`{name}` must have rows (sample, length), at least one; got shape {prefixes.shape}.")
    samples, lengths = prefixes.T
    bad = np.flatnonzero((samples < 0) | (samples >= len(offsets) - 1))
    if len(bad):
        raise ValueError(f"`{name}[{bad[0]}]` names sample {samples[bad[0]]} of {len(offsets) - 1}.")
    available = np.diff(offsets)[samples]
    bad = np.flatnonzero((lengths < 1) | (lengths > available))
    if len(bad):
        i = bad[0]
        raise ValueError(
            f"`{name}[{i}]` has length {lengths[i]}, but sample {samples[i]} has {available[i]} slices: "
            "lengths run from 1 to that."
        )
    return prefixes
