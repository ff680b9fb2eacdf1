"""The recursion of the alignment kernel in PyTorch, for many pairs at a time. naive.py says what it computes."""

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F


# Finite, because -inf would meet itself in a difference and give NaN gradients.
LOG_ZERO = -1e30
# A float64 holds a kernel, and everything on the way to it, if its logarithm is at most this in size.
LOG_RANGE = 690
LARGEST_DISTANCE = 4.01
# Cells of a chunk: a megabyte of float64, which a core's cache holds.
CHUNK_CELLS = 1 << 17
# What an anti-diagonal of a chunk costs before the first number is computed, in cells.
DIAGONAL_CELLS = 600


def log_kernels(
    distances: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    total: torch.Tensor,
    delta: float,
) -> torch.Tensor:
    """
    As [`~hf_sugar.alignment.naive.log_kernels`], differentiable in `distances`. Pairs are sorted by their lengths, and a
    chunk of them goes through the recursion together, one anti-diagonal at a time. Index tensors are on the CPU.
    """
    device, width = distances.device, distances.shape[1]
    wide = wide_dtype(device)
    minus_one = distances.new_tensor(-1, dtype=wide)
    index_dtype = torch.int32 if distances.numel() < 1 << 30 else torch.int64
    flat, corner = distances.flatten(), (row * width + column).to(index_dtype)
    scale = 1 / (delta**2 * total.double())
    # The logarithm of the smallest product on the way, and of the number of alignments.
    smallest = (n + m - 1) * (LARGEST_DISTANCE * scale + math.log(2))
    base = int(m.max()) + 1
    lengths, order = (n * base + m).sort(stable=True)
    values = []
    for chunk in _chunks(lengths, base):
        pairs = order[chunk]
        rows, columns = int(n[pairs].max()), int(m[pairs].max())
        alignments = (rows + columns) * math.log(1 + math.sqrt(2))
        linear = wide == torch.float64 and max(float(smallest[pairs].max()), alignments) < LOG_RANGE
        i, j, sizes = antidiagonals(rows, columns)
        # Cells outside a shorter pair read some other distance, and nothing of that pair depends on them.
        index = ((i * width + j).to(index_dtype)[:, None] + corner[pairs]).clamp_(max=len(flat) - 1)
        exponent = flat.index_select(0, index.flatten().to(device)).view(index.shape).to(wide)
        exponent = exponent.mul_(scale[pairs].to(device, wide))
        local = torch.add(minus_one, exponent.exp_(), alpha=2).reciprocal_() if linear else log_local_kernel(exponent)
        values.append(sum_alignments(local, sizes, n[pairs], m[pairs], linear))
    return torch.cat(values)[order.argsort().to(device)]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Differences of large logarithms need float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def log_local_kernel(exponent: torch.Tensor) -> torch.Tensor:
    """log(s / (2 - s)) for s = exp(-exponent)."""
    return -exponent - torch.log1p(-torch.expm1(-exponent))


def sum_alignments(
    local: torch.Tensor, sizes: list[int], n: torch.Tensor, m: torch.Tensor, linear: bool = False
) -> torch.Tensor:
    """
    Theorem 1 for pairs of about the same lengths: each cell is the sum of its three neighbours times its local kernel.

    Args:
        local (`torch.Tensor` of shape `(cells, pairs)`): Logarithms of the local kernels, or with `linear` the kernels
            themselves, by anti-diagonal and row, on a grid for the longest pair.
        sizes (`list[int]`): Cells of each anti-diagonal.
        n, m (`torch.Tensor` of shape `(pairs,)`, int64): Lengths of each pair.

    Returns:
        `torch.Tensor` of shape `(pairs,)`: logarithms of the kernels.
    """
    add, multiply, zero = (torch.add, torch.mul, 0.0) if linear else (torch.logaddexp, torch.add, LOG_ZERO)
    traced = local.requires_grad and torch.is_grad_enabled()
    rows, columns, last = int(n.max()), int(m.max()), n + m - 2
    ends = {t: (last == t).nonzero()[:, 0] for t in last.unique().tolist()}
    values = []
    # The last three anti-diagonals, row i at i + 1.
    ring = [local.new_full((rows + 1, local.shape[1]), zero) for _ in range(3)]
    for t, now in enumerate(local.split(sizes)):
        first = max(0, t - columns + 1)
        here, above = slice(first + 1, first + 1 + len(now)), slice(first, first + len(now))
        before, corner, out = ring[t % 3 - 1], ring[t % 3 - 2], None if traced else ring[t % 3][here]
        if t == 0:
            total = now if traced else out.copy_(now)
        else:
            total = add(before[here], before[above], out=out)
            total = add(total, corner[above], out=out)
            total = multiply(total, now, out=out)
        if traced:
            ring[t % 3] = F.pad(total, (0, 0, first + 1, rows - first - len(now)), value=zero)
        if t in ends:
            pairs = ends[t]
            values.append(ring[t % 3][n[pairs].to(local.device), pairs.to(local.device)])
    values = torch.cat(values)[torch.cat(list(ends.values())).argsort().to(local.device)]
    return values.log() if linear else values


def _chunks(lengths: torch.Tensor, base: int) -> Iterator[slice]:
    """
    Cuts pairs, sorted by their lengths `n * base + m`, into runs that share a grid, where padding them costs less than
    another run would.
    """
    start = stop = rows = columns = 0
    for length, count in zip(*(part.tolist() for part in lengths.unique_consecutive(return_counts=True)), strict=True):
        n, m = divmod(length, base)
        higher, wider = max(rows, n), max(columns, m)
        cells = higher * wider * (stop - start + count)
        padding = cells - rows * columns * (stop - start) - n * m * count
        if cells > CHUNK_CELLS or padding > DIAGONAL_CELLS * (n + m):
            yield from _pieces(start, stop, rows * columns)
            start, higher, wider = stop, n, m
        stop, rows, columns = stop + count, higher, wider
    yield from _pieces(start, stop, rows * columns)


def _pieces(start: int, stop: int, cells: int) -> Iterator[slice]:
    if stop > start:
        step = max(1, CHUNK_CELLS // cells)
        yield from (slice(begin, min(begin + step, stop)) for begin in range(start, stop, step))


@functools.lru_cache(maxsize=64)
def antidiagonals(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Row and column of the cells of a grid by anti-diagonal and row, and how many cells each anti-diagonal has."""
    t = torch.arange(rows)[:, None] + torch.arange(columns)
    cells = t.flatten().argsort(stable=True)
    return cells // columns, cells % columns, t.flatten().bincount().tolist()
