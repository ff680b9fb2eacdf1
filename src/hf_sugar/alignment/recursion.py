"""The recursion of the alignment kernel in PyTorch, for many pairs at a time. naive.py says what it computes."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F


# Finite, because -inf would meet itself in a difference and give NaN gradients.
LOG_ZERO = -1e30
# A float64 holds a kernel, and everything on the way to it, if its logarithm is at most this in size.
LOG_RANGE = 690
LARGEST_DISTANCE = 4.01
# Cells of a chunk: a megabyte of float64, which a core's cache holds.
CHUNK_CELLS = 1 << 17


def log_kernels(distances, row, column, n, m, total, delta) -> torch.Tensor:
    """As [`~hf_sugar.alignment.naive.log_kernels`], differentiable in `distances`. Pairs of like lengths go through the
    recursion together, one anti-diagonal at a time. Index tensors are on the CPU."""
    device, width = distances.device, distances.shape[1]
    flat, corner = distances.flatten(), row * width + column
    scale = 1 / (delta**2 * total.double())
    # Lengths that are the same power of 2 when rounded up share a grid, on which pairs end one after the other.
    levels = (64 * n.log2().ceil() + m.log2().ceil()).long()
    order = torch.from_numpy(np.lexsort((n + m, levels)))
    values = []
    for group in order.split(levels[order].unique_consecutive(return_counts=True)[1].tolist()):
        rows, columns = int(n[group].max()), int(m[group].max())
        i, j = _antidiagonals(rows, columns)
        # Bounds the logarithms of the smallest product of a path and of the number of paths.
        largest = (rows + columns) * (LARGEST_DISTANCE * float(scale[group].max()) + math.log(1 + math.sqrt(2)))
        linear = largest < LOG_RANGE and device.type != "mps"
        for pairs in group.split(max(1, CHUNK_CELLS // (rows * columns))):
            # Cells outside a shorter pair read some other distance, and nothing of that pair depends on them.
            index = (i * width + j)[:, None] + corner[pairs]
            x = flat.take(index.clamp_(max=len(flat) - 1).to(device)).to(wide_dtype(device))
            x = x.mul_(scale[pairs].to(x))
            # s / (2 - s) for s = exp(-x), or its logarithm
            local = (2 * x.exp_()).sub_(1).reciprocal_() if linear else -x - torch.log1p(-torch.expm1(-x))
            values.append(_sum_alignments(local, rows, columns, n[pairs], m[pairs], linear))
    return torch.cat(values)[order.argsort().to(device)]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Differences of large logarithms need float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def _sum_alignments(
    local: torch.Tensor, rows: int, columns: int, n: torch.Tensor, m: torch.Tensor, linear: bool
) -> torch.Tensor:
    """Theorem 1: each cell is the sum of its three neighbours times its local kernel. `local` has shape `(cells, pairs)`,
    by anti-diagonal and row of a grid; `n + m` increases."""
    add, multiply, zero = (torch.add, torch.mul, 0.0) if linear else (torch.logaddexp, torch.add, LOG_ZERO)
    traced = local.requires_grad and torch.is_grad_enabled()
    ends = dict(zip(*(part.tolist() for part in (n + m - 2).unique_consecutive(return_counts=True))))
    n, pairs = n.to(local.device), torch.arange(len(n), device=local.device)
    values, done, start = [], 0, 0
    # The last three anti-diagonals, row i at i + 1.
    corner, before, cells = (local.new_full((rows + 1, len(n)), zero) for _ in range(3))
    for t in range(rows + columns - 1):
        first, last = max(0, t - columns + 1), min(t, rows - 1)
        now = local[start : (start := start + last - first + 1)]
        here, above = slice(first + 1, last + 2), slice(first, last + 1)
        out = None if traced else cells[here]
        if t:
            now = multiply(add(add(before[here], before[above], out=out), corner[above], out=out), now, out=out)
        elif not traced:
            out.copy_(now)
        if traced:
            cells = F.pad(now, (0, 0, first + 1, rows - 1 - last), value=zero)
        if t in ends:
            here = slice(done, done := done + ends[t])
            values.append(cells[n[here], pairs[here]])
        corner, before, cells = before, cells, corner
    values = torch.cat(values)
    return values.log() if linear else values


@functools.lru_cache(maxsize=64)
def _antidiagonals(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the cells of a grid by anti-diagonal and row."""
    t = torch.arange(rows)[:, None] + torch.arange(columns)
    cells = t.flatten().argsort(stable=True)
    return cells // columns, cells % columns
