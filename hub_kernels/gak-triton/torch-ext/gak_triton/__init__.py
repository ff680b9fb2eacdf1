"""log K of pairs of sequences from the squared distances of their slices, in Triton."""

import contextlib

import torch
import triton
import triton.language as tl


__all__ = ["log_kernels"]

NEVER = tl.constexpr(-1e300)  # the logarithm of a cell that no alignment reaches


@triton.jit
def _recursion(distances, width, row, column, n, m, total, result, inverse_square: tl.float64, BLOCK: tl.constexpr):
    """One pair a program, one row of its grid a lane, one anti-diagonal a step, in log space and float64."""
    pair = tl.program_id(0)
    a, b = tl.load(row + pair), tl.load(column + pair)
    rows, columns = tl.load(n + pair).to(tl.int32), tl.load(m + pair).to(tl.int32)
    scale = inverse_square / tl.load(total + pair).to(tl.float64)
    i = tl.arange(0, BLOCK)
    cells = tl.full((BLOCK,), NEVER, tl.float64)
    corner = tl.where(i == 0, 0.0, NEVER).to(tl.float64)
    for t in range(0, rows + columns - 1):
        j = t - i
        inside = (i < rows) & (j >= 0) & (j < columns)
        x = tl.load(distances + (a + i) * width + b + j, mask=inside, other=0.0).to(tl.float64) * scale
        up = tl.where(i == 0, NEVER, tl.gather(cells, tl.maximum(i - 1, 0), 0))
        most = tl.maximum(tl.maximum(cells, up), corner)
        ways = tl.exp(cells - most) + tl.exp(up - most) + tl.exp(corner - most)
        corner = up
        cells = tl.where(inside, most + tl.log(ways) - x - tl.log(2.0 - tl.exp(-x)), NEVER)
    tl.store(result + pair, tl.sum(tl.where(i == rows - 1, cells, 0.0), 0))


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
    Logarithm of the raw global alignment kernel of pairs of sequences, without gradient: the op of
    [`gak`](https://huggingface.co/hf-sugar/gak), whose arguments and values it has. Index tensors may be on the CPU.
    """
    distances = distances.detach().contiguous()
    block = triton.next_power_of_2(int(n.max()))
    indices = [index.to(distances.device) for index in (row, column, n, m, total)]
    result = torch.empty(len(n), dtype=torch.float64, device=distances.device)
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device(distances.device) if distances.is_cuda else contextlib.nullcontext():
        _recursion[(len(n),)](
            *(distances, distances.shape[1], *indices, result, 1 / delta**2),
            BLOCK=block,
            num_warps=max(1, min(8, block // 32)),
        )
    return result
