"""Packed slices: checked, and compared with each other."""

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .recursion import wide_dtype


TEXT = 0
IMAGE = 1

# Slices whose distances are one matrix: large enough for BLAS, small enough for the cache.
BLOCK_SLICES = 1024
STRIP_SLICES = 64
# Below this squared distance, 2 - 2 cos loses too many digits in float32.
CLOSE = 0.1


class Block(NamedTuple):
    """Prefixes, in the order of their lengths, of samples whose slices are side by side."""

    number: int
    prefixes: torch.Tensor  # which ones
    start: torch.Tensor  # where in the block each begins
    length: torch.Tensor


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
        self.block_of = (self.offsets[:-1] // BLOCK_SLICES).unique_consecutive(return_inverse=True)[1]
        # Texts and images of each block are two runs; without modalities the second is empty.
        kind = 2 * self.block_of.repeat_interleave(self.offsets.diff())
        halves = {"is all zeros and has no direction": embeddings}
        self.place = None
        if split is not None:
            kind = kind + modality.cpu().long()
            order = kind.argsort(stable=True)
            self.place = order.argsort()
            halves = {
                f"is all zeros in its first {split} dimensions": embeddings[:, :split],
                f"is all zeros after its first {split} dimensions": embeddings[:, split:],
            }
        bounds = [0, *kind.bincount(minlength=2 * int(self.block_of[-1]) + 2).cumsum(0).tolist()]
        self.runs = [slice(*run) for run in itertools.pairwise(bounds)]
        self.spans = [slice(*span) for span in itertools.pairwise(bounds[::2])]
        self.inner = {}
        self.halves = [self._measured(half, complaint) for complaint, half in halves.items()]
        if self.place is not None:
            order = order.to(embeddings.device)
            self.halves = [tuple(part.index_select(0, order) for part in half) for half in self.halves]

    def _measured(self, half: torch.Tensor, complaint: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The slices, in float32 at least, and the inverses of their lengths."""
        half = half.to(self.dtype)
        norm = torch.linalg.vector_norm(half, dim=1)
        limit = 1e-150 if self.dtype == torch.float64 else 1e-15
        if not ((norm > limit) & (norm < 1 / limit)).all():
            # Bad, or products of it leave the range. What is left over by the largest number has the same direction.
            largest = half.detach().abs().amax(dim=1)
            self._refuse(~largest.isfinite(), "holds NaN or infinity")
            self._refuse(largest == 0, complaint)
            half = half / largest[:, None]
            norm = torch.linalg.vector_norm(half, dim=1)
        return half, 1 / norm

    def _refuse(self, bad: torch.Tensor, what: str):
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            sample = int(torch.searchsorted(self.offsets, row, right=True)) - 1
            raise ValueError(
                f"Slice {row - self.offsets[sample]} of sequence {sample} (row {row} of the packed embeddings) {what}."
            )

    def blocks(self, prefixes: torch.Tensor) -> list[Block]:
        order = prefixes[:, 1].argsort(stable=True)
        sample, length = prefixes[order].unbind(1)
        blocks = []
        for number in self.block_of[sample].unique().tolist():
            chosen = self.block_of[sample] == number
            start = self.offsets[sample[chosen]] - self.spans[number].start
            blocks.append(Block(number, order[chosen], start, length[chosen]))
        return blocks

    def distances(self, a: int, b: int) -> torch.Tensor:
        """Squared distances of the slices of two blocks, by their numbers."""
        if a == b and a not in self.inner:
            self.inner[a] = self._distances(a, a)
        return self.inner[a] if a == b else self._distances(a, b)

    def _distances(self, a: int, b: int) -> torch.Tensor:
        if self.place is None:
            return _squared_distances(self.halves[0], self.spans[a], self.spans[b])
        kinds = [[None, None], [None, None]]
        for i, j in itertools.product((TEXT, IMAGE), repeat=2):
            if a == b and i > j:
                kinds[i][j] = kinds[j][i].T
            else:
                half = self.halves[0 if i == j else 1]
                kinds[i][j] = _squared_distances(half, self.runs[2 * a + i], self.runs[2 * b + j])
        sorted_by_kind = torch.cat([torch.cat(kind, dim=1) for kind in kinds])
        i, j = (
            (self.place[self.spans[number]] - self.spans[number].start).to(sorted_by_kind.device) for number in (a, b)
        )
        return sorted_by_kind.index_select(0, i).index_select(1, j)


def _squared_distances(half: tuple[torch.Tensor, torch.Tensor], rows: slice, columns: slice) -> torch.Tensor:
    """Squared distances of two runs of slices when each has length 1."""
    (a, inverse_a), (b, inverse_b) = ([part[run] for part in half] for run in (rows, columns))
    same, strips = rows == columns, []
    for begin in range(0, len(a), STRIP_SLICES):
        # Of slices with themselves both triangles hold the same numbers.
        strip, rest = slice(begin, begin + STRIP_SLICES), slice(begin if same else 0, None)
        cosines = (a[strip] @ b[rest].T) * inverse_a[strip, None] * inverse_b[rest]
        strips.append(F.pad(2 - 2 * cosines, (rest.start, 0)))
    distances = torch.cat(strips) if strips else a.new_zeros(0, len(b))
    if same:
        distances = distances.triu(1) + distances.triu(1).T
    distances.clamp_(min=0)
    # The gradient stays that of 2 - 2 cos.
    with torch.no_grad():
        if same:
            distances.fill_diagonal_(CLOSE)
        if a.dtype == torch.float32 and distances.numel() and distances.min() < CLOSE:
            close = distances < CLOSE
            i, j = close.any(dim=1).nonzero(), close.any(dim=0).nonzero()[:, 0]
            # MPS has no float64.
            device = "cpu" if a.device.type == "mps" else a.device
            x, y = (F.normalize(side.to(device, torch.float64)) for side in (a[i[:, 0]], b[j]))
            exact = (2 - 2 * (x @ y.T)).clamp_(min=0)
            distances[i, j] = torch.where(close[i, j], exact.to(distances), distances[i, j])
        if same:
            distances.fill_diagonal_(0)
    return distances


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


def _check_offsets(offsets: torch.Tensor, total: int) -> torch.Tensor:
    offsets = check_integers("offsets", offsets)
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"`offsets` must be one-dimensional and run from 0 to {total}, the number of slices.")
    empty = (offsets.diff() < 1).nonzero()
    if len(empty):
        raise ValueError(
            f"`offsets` must increase, but sequence {int(empty[0])} is empty: every sample needs a slice."
        )
    return offsets


def check_prefixes(name: str, prefixes: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    prefixes = check_integers(name, prefixes)
    if prefixes.ndim != 2 or prefixes.shape[1] != 2 or len(prefixes) == 0:
        raise ValueError(f"`{name}` must have rows (sample, length), at least one; got shape {tuple(prefixes.shape)}.")
    samples, lengths = prefixes.T
    bad = ((samples < 0) | (samples >= len(offsets) - 1)).nonzero()
    if len(bad):
        raise ValueError(f"`{name}[{int(bad[0])}]` names sample {samples[bad[0, 0]]} of {len(offsets) - 1}.")
    available = offsets.diff()[samples]
    bad = ((lengths < 1) | (lengths > available)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"`{name}[{i}]` has length {lengths[i]}, but sample {samples[i]} has {available[i]} slices: "
            "lengths run from 1 to that."
        )
    return prefixes
