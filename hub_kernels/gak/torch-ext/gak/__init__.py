"""log K of pairs of sequences from the squared distances of their slices, compiled for the CPU."""

import torch

from ._ops import add_op_namespace_prefix, ops


__all__ = ["log_kernels"]


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
    Logarithm of the raw global alignment kernel of pairs of sequences, without gradient.

    Pairs of like lengths run together if they are neighbours: sort them.

    Args:
        distances (`torch.Tensor` of shape `(rows, columns)`):
            Squared distances of slices, between 0 and 4, float32 or float64.
        row, column (`torch.Tensor` of shape `(pairs,)`, int64):
            Where the two sequences of a pair begin.
        n, m (`torch.Tensor` of shape `(pairs,)`, int64):
            Their lengths.
        total (`torch.Tensor` of shape `(pairs,)`, int64):
            Length that sets the bandwidth: `sigma^2 = delta^2 * total / 2`. `n + m`, but for self-kernels.
        delta (`float`):
            Bandwidth.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, float64.
    """
    return ops.log_kernels(distances.detach().contiguous(), row, column, n, m, total, delta)


@torch.library.register_fake(add_op_namespace_prefix("log_kernels"))
def _(distances, row, column, n, m, total, delta):
    return distances.new_empty(len(row), dtype=torch.float64)
