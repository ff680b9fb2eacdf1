"""Packed slices: checked, and compared with each other."""

import itertools

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


class Slices:
    """Packed slices, checked, and the squared distances between blocks of them. The texts of a block stand before its
    images, so that every kind of pair is one product of the halves that Eq. 6 compares; without modalities all are
    texts."""

    def __init__(
        self, embeddings: torch.Tensor, offsets: torch.Tensor, modality: torch.Tensor | None, split: int | None
    ):
        if embeddings.ndim != 2 or not embeddings.is_floating_point() or embeddings.shape[1] == 0:
            got = f"{tuple(embeddings.shape)} of {embeddings.dtype}"
            raise ValueError(f"`embeddings` must be floating-point of shape (total_slices, dim), got {got}.")
        _check_triple(embeddings, modality, split)
        self.offsets = _check_offsets(offsets, len(embeddings))
        self.dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        # A sample is never cut.
        self.block_of = np.unique(self.offsets[:-1] // BLOCK_SLICES, return_inverse=True)[1]
        kind = np.repeat(2 * self.block_of, np.diff(self.offsets))
        if split is not None:
            kind = kind + modality.cpu().long().numpy()
        order = kind.argsort(kind="stable")
        sizes = np.bincount(kind, minlength=2 * int(self.block_of[-1]) + 2)
        self.spans = [slice(*span) for span in itertools.pairwise([0, *sizes.cumsum()[1::2].tolist()])]
        place = torch.from_numpy(order.argsort()).to(embeddings.device)
        self.places = [place[span] - span.start for span in self.spans]
        order = torch.from_numpy(order).to(embeddings.device)
        halves = {"": embeddings}
        if split is not None:
            names = f" in its first {split} dimensions", f" after its first {split} dimensions"
            halves = dict(zip(names, embeddings.tensor_split([split], dim=1)))
        self.halves = [self._directions(*half)[order].split(sizes.tolist()) for half in halves.items()]

    def _directions(self, where: str, half: torch.Tensor) -> torch.Tensor:
        half = half.to(self.dtype)
        norm = torch.linalg.vector_norm(half, dim=1, keepdim=True)
        least = torch.finfo(self.dtype).tiny ** 0.4
        for bad, what in ((~norm.isfinite(), "is infinite or not a number"), (norm < least, "is all zeros")):
            if bad.any():
                row = int(bad.nonzero()[0, 0])
                sample = int(np.searchsorted(self.offsets, row, side="right")) - 1
                name = f"Slice {row - self.offsets[sample]} of sequence {sample} (row {row} of the packed embeddings)"
                raise ValueError(f"{name} {what}{where} and has no direction.")
        return half / norm

    def distances(self, a: int, b: int) -> torch.Tensor:
        """Squared distances of the slices of two blocks, by their numbers."""
        (uni_a, cross_a), (uni_b, cross_b) = (
            [half[2 * block : 2 * block + 2] for half in (self.halves[0], self.halves[-1])] for block in (a, b)
        )
        text_image = _squared_distances(cross_a[TEXT], cross_b[IMAGE])
        image_text = text_image.T if a == b else _squared_distances(cross_a[IMAGE], cross_b[TEXT])
        texts, images = map(_squared_distances, uni_a, uni_b)
        result = torch.cat([torch.cat([texts, text_image], dim=1), torch.cat([image_text, images], dim=1)])
        # From the order by modality to that of the samples.
        return result.index_select(0, self.places[a]).index_select(1, self.places[b])


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    same = a is b
    if same:  # both triangles hold the same numbers
        out = a.new_empty(len(a), len(a))
        for begin in range(0, len(a), STRIP_SLICES):
            strip = slice(begin, begin + STRIP_SLICES)
            products = a[strip] @ a[begin:].T
            out[strip, begin:] = products
            out[begin:, strip] = products.T
    else:
        out = a @ b.T
    out = out.mul_(-2).add_(2).clamp_(min=0)
    with torch.no_grad():  # the gradient stays that of 2 - 2 cos
        if same:
            out.fill_diagonal_(CLOSE)
        if a.dtype == torch.float32 and out.numel() and out.min() < CLOSE:
            close = out < CLOSE
            i, j = close.any(dim=1).nonzero(), close.any(dim=0).nonzero()[:, 0]
            x, y = (F.normalize(side.to(wide_dtype(side.device))) for side in (a[i[:, 0]], b[j]))
            exact = (2 - 2 * (x @ y.T)).clamp_(min=0)
            out[i, j] = torch.where(close[i, j], exact.to(out), out[i, j])
        if same:
            out.fill_diagonal_(0)
    return out


def check_integers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {tensor.dtype}.")
    return tensor.cpu().long().contiguous()


def _check_triple(embeddings: torch.Tensor, modality: torch.Tensor | None, split: int | None):
    if (modality is None) != (split is None):
        raise ValueError("`modality` and `split` go together: pass both for the triple kernel, or neither.")
    if split is None:
        return
    total, dim = embeddings.shape
    if not 0 < split < dim:
        raise ValueError(f"`split` must lie between 1 and {dim - 1} for embeddings of {dim} dimensions; got {split}.")
    if modality.shape != (total,) or not ((modality == TEXT) | (modality == IMAGE)).all():
        expected = f"{TEXT} (text) or {IMAGE} (image) for each of {total} slices"
        raise ValueError(f"`modality` must hold {expected}; its shape is {tuple(modality.shape)}.")


def _check_offsets(offsets: torch.Tensor, total: int) -> np.ndarray:
    offsets = check_integers("offsets", offsets).numpy()
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != total or np.diff(offsets).min() < 1:
        raise ValueError(f"`offsets` must be one-dimensional and increase from 0 to {total}, the number of slices.")
    return offsets


def check_prefixes(name: str, prefixes: torch.Tensor, offsets: np.ndarray) -> np.ndarray:
    prefixes = check_integers(name, prefixes).numpy()
    if prefixes.ndim != 2 or prefixes.shape[1] != 2 or len(prefixes) == 0:
        raise ValueError(f"`{name}` must have rows (sample, length), at least one; got shape {prefixes.shape}.")
    slices = np.diff(offsets)
    for i, (sample, length) in enumerate(prefixes.tolist()):
        if not 0 <= sample < len(slices):
            raise ValueError(f"`{name}[{i}]` is of sample {sample}; samples run from 0 to {len(slices) - 1}.")
        if not 1 <= length <= slices[sample]:
            raise ValueError(f"`{name}[{i}]` asks for {length} slices of sample {sample}, which has {slices[sample]}.")
    return prefixes
