"""Host side of the backends that run one pair of prefixes per thread block. The same file in `gak` and `gak-triton`."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


SELF, COUNT = 1, 2
NORMALIZATIONS = {None: 0, False: 0, True: SELF, "self": SELF, "count": COUNT, "self+count": SELF | COUNT}
# Below, exponents of a kernel could leave the range that the compiled ones set aside for them.
SMALLEST_DELTA = 1e-3
# Below this squared distance, 2 - 2 cos loses too many digits in float32: the product is taken again in float64, this
# many rows and columns at a time.
CLOSE, BLOCK = 0.1, 1024


class _LogPairs(torch.autograd.Function):
    """The recursion of every row with every column, and its gradient by the squared distances."""

    @staticmethod
    def forward(ctx, distances, launch, launch_backward, starts, lengths, delta, own, symmetric):
        ctx.save_for_backward(distances, *starts, *lengths)
        ctx.launch_backward, ctx.delta, ctx.own, ctx.symmetric = launch_backward, delta, own, symmetric
        return launch(distances, starts[0], lengths[0], starts[1], lengths[1], delta, own, symmetric)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        distances, row_start, column_start, row_length, column_length = ctx.saved_tensors
        if ctx.symmetric:
            # Only the upper triangle was computed; the kernels pass over zeros.
            gradient = gradient.triu() + gradient.tril(-1).T
        row_order, row_group = _groups(row_start)
        if ctx.own:
            # A row meets itself: all its columns write to the same place.
            column_order = torch.arange(len(column_length), device=distances.device)
            column_group = column_order.new_tensor([0, len(column_length)])
        else:
            column_order, column_group = _groups(column_start)
        rows = row_start[row_order], row_length[row_order], row_group
        columns = column_start if ctx.own else column_start[column_order], column_length[column_order], column_group
        gradient = gradient[row_order[:, None], column_order].float()
        result = ctx.launch_backward(gradient, distances, rows, columns, ctx.delta, ctx.own, False)
        return result, None, None, None, None, None, None, None


def _groups(start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An order that puts the prefixes of a sample side by side, and where each sample begins in it."""
    order = start.argsort(stable=True)
    counts = start[order].unique_consecutive(return_counts=True)[1]
    return order, F.pad(counts.cumsum(0), (1, 0))


def expected_alignment(
    launch_backward: Callable[..., torch.Tensor], distances: torch.Tensor, delta: float
) -> torch.Tensor:
    """Shares of the kernel that pass through each cell, from squared distances of shape `(n, m)`."""
    rows, columns = (
        tuple(torch.tensor(values, device=distances.device) for values in ([0], [length], [0, 1]))
        for length in distances.shape
    )
    weight = torch.ones(1, 1, device=distances.device)
    return launch_backward(weight, distances.float().contiguous(), rows, columns, delta, False, True)


def both(modality_x: torch.Tensor | None, modality_y: torch.Tensor | None) -> torch.Tensor | None:
    if (modality_x is None) != (modality_y is None):
        raise ValueError("`modality_x` and `modality_y` go together: pass both or neither.")
    return None if modality_x is None else torch.cat([modality_x, modality_y])


def mode_of(normalize: bool | str | None) -> int:
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"`normalize` must be one of {list(NORMALIZATIONS)}, got {normalize!r}.")
    return NORMALIZATIONS[normalize]


def log_kernels(
    launch: Callable[..., torch.Tensor],
    launch_backward: Callable[..., torch.Tensor],
    distances: torch.Tensor,
    offsets: torch.Tensor,
    prefixes: torch.Tensor,
    other_prefixes: torch.Tensor | None,
    delta: float,
    normalize: bool | str | None,
) -> torch.Tensor:
    """
    `log K` of all pairs in float64, normalised.

    `launch(distances, row_start, row_length, column_start, column_length, delta, own, symmetric)` runs the recursion for
    every row with every column; with `own`, of every row with itself at the bandwidth it has with that column's length.
    `launch_backward(gradient, distances, rows, columns, delta, own, expected_only)` gives the gradient by `distances`, or
    the expected alignment. Rows and columns are `(start, length, group)` of prefixes that lie side by side sample after
    sample; `group` says where each sample begins.
    """
    mode = mode_of(normalize)
    if not SMALLEST_DELTA <= delta < math.inf:
        raise ValueError(f"`delta` must be finite and at least {SMALLEST_DELTA}, got {delta}.")
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"`distances` must be square, got shape {tuple(distances.shape)}.")
    for name, index in {"offsets": offsets, "prefixes": prefixes, "other_prefixes": other_prefixes}.items():
        if index is not None and index.dtype != torch.int64:
            raise ValueError(f"`{name}` must be an int64 tensor, got {index.dtype}.")
    device = distances.device
    offsets = offsets.to(device)
    if offsets[0] != 0 or offsets[-1] != len(distances) or not (offsets[1:] > offsets[:-1]).all():
        raise ValueError(f"`offsets` must increase from 0 to {len(distances)}, the number of slices.")
    distances = distances.float().contiguous()

    def side(name, rows):
        if rows.ndim != 2 or rows.shape[1] != 2 or len(rows) == 0:
            raise ValueError(f"`{name}` must have rows (sample, length), at least one; got shape {tuple(rows.shape)}.")
        sample, length = rows.to(device).unbind(1)
        if not ((sample >= 0) & (sample < len(offsets) - 1)).all():
            raise ValueError(f"`{name}` names a sample that is not there.")
        if not ((length >= 1) & (length <= offsets[sample + 1] - offsets[sample])).all():
            raise ValueError(f"`{name}` has a length that its sample does not have.")
        return offsets[sample].contiguous(), length.contiguous()

    start, length = side("prefixes", prefixes)
    symmetric = other_prefixes is None
    column_start, column_length = (start, length) if symmetric else side("other_prefixes", other_prefixes)

    def run(starts, lengths, own, symmetric):
        return _LogPairs.apply(distances, launch, launch_backward, starts, lengths, delta, own, symmetric)

    result = run((start, column_start), (length, column_length), False, symmetric)
    if mode & SELF:
        lengths, place = column_length.unique(return_inverse=True)
        row_self = run((start, start), (length, lengths), True, False)[:, place]
        column_self = row_self
        if not symmetric:
            lengths, place = length.unique(return_inverse=True)
            column_self = run((column_start, column_start), (column_length, lengths), True, False)[:, place]
        result = result - (row_self + column_self.T) / 2
    if mode & COUNT:
        longest = max(int(length.max()), int(column_length.max()))
        counts = _log_counts(1 << (longest - 1).bit_length()).to(device)
        if mode & SELF:
            own = counts.diagonal()
            counts = counts - (own[:, None] + own) / 2
        result = result - counts[length[:, None] - 1, column_length - 1]
    return result


@torch.compiler.disable
@functools.lru_cache(maxsize=4)
def _log_counts(longest: int) -> torch.Tensor:
    """log of the number of alignments of all lengths up to `longest`, one anti-diagonal after the other."""
    table = torch.zeros(longest, longest, dtype=torch.float64)
    for t in range(2, 2 * longest - 1):
        i = torch.arange(max(1, t - longest + 1), min(t, longest))
        j = t - i
        table[i, j] = torch.logaddexp(torch.logaddexp(table[i - 1, j], table[i, j - 1]), table[i - 1, j - 1])
    return table


def squared_distances(x: torch.Tensor, modality: torch.Tensor | None, split: int | None) -> torch.Tensor:
    """Squared distances of all slices, of the half that their modalities call for; the gradient is that of 2 - 2 cos."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"`embeddings` must be a floating-point matrix, got {x.dtype} of shape {tuple(x.shape)}.")
    if (modality is None) != (split is None):
        raise ValueError("`modality` and `split` go together: pass both for the triple kernel, or neither.")
    if split is not None:
        if not 0 < split < x.shape[1]:
            raise ValueError(f"`split` must lie between 1 and {x.shape[1] - 1}, got {split}.")
        if modality.shape != x.shape[:1] or not ((modality == 0) | (modality == 1)).all():
            raise ValueError(f"`modality` must hold 0 (text) or 1 (image) for each of the {len(x)} slices.")
    with torch.autocast(x.device.type, enabled=False):
        if split is None:
            unit = _normalized(x)
            return _distances(unit, unit, True)
        uni, cross = _normalized(x[:, :split]), _normalized(x[:, split:])
        text, image = ((modality == kind).nonzero()[:, 0].to(x.device) for kind in (0, 1))
        result = x.new_empty(len(x), len(x))
        for kind in (text, image):
            result[kind[:, None], kind] = _distances(uni[kind], uni[kind], True)
        crossed = _distances(cross[text], cross[image], False)
        result[text[:, None], image] = crossed
        result[image[:, None], text] = crossed.T
        return result


def _normalized(x: torch.Tensor) -> torch.Tensor:
    # By the largest number first: squares could leave the range of the dtype. The direction is the same.
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    bad = ~(largest.isfinite() & (largest > 0))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"Row {row} of the packed embeddings holds NaN, infinity, or a half that is all zeros.")
    x = x / largest
    return x / x.norm(dim=1, keepdim=True)


def _distances(a: torch.Tensor, b: torch.Tensor, same: bool) -> torch.Tensor:
    """Squared distances of unit vectors; `same` says that `a` and `b` are the same ones."""
    distances = torch.addmm(a.new_tensor(2.0), a, b.T, alpha=-2).clamp_(min=0)
    with torch.no_grad():
        close = distances < CLOSE
        if same:
            distances.fill_diagonal_(0)
            close.fill_diagonal_(False)
        if a.dtype == torch.float32:
            rows, columns = (close.any(dim=dim).nonzero()[:, 0].split(BLOCK) for dim in (1, 0))
            for i in rows:
                x = a[i].double()
                for j in columns:
                    y, at = b[j].double(), (i[:, None], j)
                    exact = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
                    distances[at] = torch.where(close[at], exact.clamp(min=0).float(), distances[at])
    return distances
