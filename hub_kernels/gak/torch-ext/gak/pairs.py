"""Host side of the backends that run one pair of prefixes per thread block. The same file in `gak` and `gak-triton`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


SELF, COUNT = 1, 2
NORMALIZATIONS = {None: 0, False: 0, True: SELF, "self": SELF, "count": COUNT, "self+count": SELF | COUNT}
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
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"`normalize` must be one of {list(NORMALIZATIONS)}, got {normalize!r}.")
    if not 0 < delta < math.inf:
        raise ValueError(f"`delta` must be positive and finite, got {delta}.")
    mode = NORMALIZATIONS[normalize]
    device = distances.device
    offsets = offsets.to(device)
    if offsets[0] != 0 or offsets[-1] != len(distances) or not (offsets[1:] > offsets[:-1]).all():
        raise ValueError(f"`offsets` must increase from 0 to {len(distances)}, the number of slices.")
    distances = distances.float().contiguous()

    def side(name, rows):
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
        result = result - _log_counts(length, column_length)
    if mode == SELF | COUNT:
        own, column_own = (_log_counts(values, values, paired=True) for values in (length, column_length))
        result = result + (own[:, None] + column_own) / 2
    return result


def _log_counts(n: torch.Tensor, m: torch.Tensor, paired: bool = False) -> torch.Tensor:
    """log of the number of alignments of all lengths of `n` with all of `m`, or of each with its partner."""
    known = {}

    def log_count(n, m):
        if (n, m) not in known:
            known[n, m] = math.log(sum(math.comb(n - 1, k) * math.comb(m - 1, k) << k for k in range(min(n, m))))
        return known[n, m]

    rows, columns = n.tolist(), m.tolist()
    if paired:
        values = [log_count(a, b) for a, b in zip(rows, columns)]
    else:
        values = [[log_count(a, b) for b in columns] for a in rows]
    return torch.tensor(values, dtype=torch.float64, device=n.device)


def squared_distances(x: torch.Tensor, modality: torch.Tensor | None, split: int | None) -> torch.Tensor:
    """Squared distances of all slices, of the half that their modalities call for; the gradient is that of 2 - 2 cos."""
    if split is not None:
        if not 0 < split < x.shape[1]:
            raise ValueError(f"`split` must lie between 1 and {x.shape[1] - 1}, got {split}.")
        if modality.shape != x.shape[:1] or not ((modality == 0) | (modality == 1)).all():
            raise ValueError(f"`modality` must hold 0 (text) or 1 (image) for each of the {len(x)} slices.")
    halves = [x] if split is None else [x[:, :split], x[:, split:]]
    norms = torch.stack([half.norm(dim=1) for half in halves])
    if not (norms.isfinite() & (norms > 0)).all():
        row = int((~(norms.isfinite() & (norms > 0)).all(0)).nonzero()[0])
        raise ValueError(f"Row {row} of the packed embeddings holds NaN, infinity, or a half that is all zeros.")
    halves = [F.normalize(half, dim=1, eps=0) for half in halves]
    if split is None:
        return _distances(halves[0], halves[0], True)
    # Texts first: each block then needs one half of the embeddings only.
    modality = modality.to(x.device)
    order = modality.argsort(stable=True)
    texts = int((modality == 0).sum())
    uni, cross = (half[order] for half in halves)
    ordered = x.new_empty(len(x), len(x))
    ordered[:texts, :texts] = _distances(uni[:texts], uni[:texts], True)
    ordered[texts:, texts:] = _distances(uni[texts:], uni[texts:], True)
    ordered[:texts, texts:] = _distances(cross[:texts], cross[texts:], False)
    ordered[texts:, :texts] = ordered[:texts, texts:].T
    back = order.argsort()
    return ordered[back[:, None], back]


def _distances(a: torch.Tensor, b: torch.Tensor, same: bool) -> torch.Tensor:
    """Squared distances of unit vectors; `same` says that `a` and `b` are the same ones."""
    distances = (2 - 2 * a @ b.T).clamp(min=0)
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
