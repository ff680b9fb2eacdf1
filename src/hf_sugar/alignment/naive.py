"""The definition of the alignment kernel, cell by cell. What is fast must give the same numbers under the same signature."""

import numpy as np
import torch


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
    Logarithm of the raw kernel of pairs of sequences.

    Args:
        distances (`torch.Tensor` of shape `(rows, columns)`): Squared distances of slices, between 0 and 4.
        row, column (`torch.Tensor` of shape `(pairs,)`, int64): Where the two sequences of a pair begin.
        n, m (`torch.Tensor` of shape `(pairs,)`, int64): Their lengths.
        total (`torch.Tensor` of shape `(pairs,)`, int64): Length that sets the bandwidth: `sigma^2 = delta^2 * total / 2`.
        delta (`float`): Bandwidth.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, float64.

    Source: [Sugar](https://huggingface.co/papers/2411.00304), Eq. 4-5 and Theorem 1.
    """
    result = []
    for a, b, rows, columns, length in torch.stack([row, column, n, m, total], dim=1).tolist():
        exponent = distances[a : a + rows, b : b + columns].double().numpy() / (delta**2 * length)
        local = -exponent - np.log(2 - np.exp(-exponent))
        table = np.full((rows + 1, columns + 1), -np.inf)
        table[0, 0] = 0
        for i, j in np.ndindex(rows, columns):
            before = table[i, j + 1], table[i + 1, j], table[i, j]
            table[i + 1, j + 1] = local[i, j] + np.logaddexp.reduce(before)
        result.append(table[-1, -1])
    return torch.tensor(result, dtype=torch.float64)
