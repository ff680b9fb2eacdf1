"""Inputs, reference and comparison: written once, for the tests and the benchmarks of every backend."""

import math

import numpy as np
import torch


# Largest |error| / max(1, |log K|) against float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def gen_inputs(
    samples: int,
    slices: int,
    dim: int,
    prefixes_per_sample: int | None = None,
    *,
    shortest: int = 2,
    triple: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, torch.Tensor | int | None]:
    """
    Random packed samples of ragged length, as keyword arguments of `packed_alignment_kernel`.

    Without `prefixes_per_sample` every sample is taken whole, else that many prefixes of each are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, slices + 1, (samples,), generator=generator)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(offsets[-1])
    # A shared direction, so that cosines are not all near zero.
    embeddings = torch.randn(total, dim, generator=generator) + 0.7 * torch.randn(1, dim, generator=generator)
    sample = torch.arange(samples).repeat_interleave(prefixes_per_sample or 1)
    length = lengths[sample]
    if prefixes_per_sample:
        length = (torch.rand(len(sample), generator=generator) * length).long() + 1
    split = dim // 2 if triple else None
    modality = torch.randint(0, 2, (total,), generator=generator) if triple else None
    return {
        "embeddings": embeddings.to(device=device, dtype=dtype),
        "offsets": offsets,
        "prefixes": torch.stack([sample, length], dim=1),
        "modality": modality,
        "split": split,
    }


def distances(embeddings: torch.Tensor, modality: torch.Tensor | None, split: int | None) -> np.ndarray:
    """Squared distances of all slices, from differences, in float64."""
    x = embeddings.detach().cpu().double().numpy()

    def squares(half):
        unit = half / np.linalg.norm(half, axis=1, keepdims=True)
        return np.stack([((unit - row) ** 2).sum(1) for row in unit])

    if split is None:
        return squares(x)
    codes = modality.cpu().numpy()
    return np.where(codes[:, None] == codes, squares(x[:, :split]), squares(x[:, split:]))


def log_prefixes(phi: np.ndarray, total: int, delta: float) -> np.ndarray:
    """Theorem 1 cell by cell in float64, in log space: `log K` of all prefixes of the two sequences."""
    exponent = phi / (delta**2 * total)
    local = -exponent - np.log(2 - np.exp(-exponent))
    rows, previous = [], [0.0] + [-math.inf] * phi.shape[1]
    for row in local.tolist():
        current = [-math.inf]
        for j, cell in enumerate(row):
            largest = max(current[j], previous[j], previous[j + 1])
            current.append(
                cell
                + largest
                + math.log(sum(math.exp(x - largest) for x in (current[j], previous[j], previous[j + 1])))
            )
        rows.append(current[1:])
        previous = current
    return np.array(rows)


def log_kernel(phi: np.ndarray, total: int, delta: float) -> float:
    return float(log_prefixes(phi, total, delta)[-1, -1])


def alignment_and_gradient(phi: np.ndarray, total: int, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """
    Share of the kernel that passes through each cell, and the gradient of `log K` by `phi`, in float64.

    From the kernels that lead to a cell and those that lead on from it: no backward pass.
    """
    exponent = phi / (delta**2 * total)
    local = -exponent - np.log(2 - np.exp(-exponent))
    before = log_prefixes(phi, total, delta)
    after = log_prefixes(phi[::-1, ::-1], total, delta)[::-1, ::-1]
    expected = np.exp(before + after - local - before[-1, -1])
    return expected, -expected * 2 / (2 - np.exp(-exponent)) / (delta**2 * total)


def log_count(n: int, m: int) -> float:
    return math.log(sum(math.comb(n - 1, k) * math.comb(m - 1, k) << k for k in range(min(n, m))))


def reference(
    embeddings: torch.Tensor,
    offsets: torch.Tensor,
    prefixes: torch.Tensor,
    other_prefixes: torch.Tensor | None = None,
    *,
    delta: float = 1.0,
    normalize: str | None = None,
    modality: torch.Tensor | None = None,
    split: int | None = None,
    phi: np.ndarray | None = None,
) -> torch.Tensor:
    """`log K` in float64, one pair after the other; from `phi`, the squared distances, if they are given."""
    if phi is None:
        phi = distances(embeddings, modality, split)
    start = offsets.tolist()
    rows = prefixes.tolist()
    columns = rows if other_prefixes is None else other_prefixes.tolist()
    known = {}

    def kernel(s, n, t, m, total):
        key = (s, n, t, m, total)
        if key not in known:
            block = phi[start[s] : start[s] + n, start[t] : start[t] + m]
            known[key] = log_kernel(block, total, delta)
            if normalize in ("count", "self+count"):
                known[key] -= log_count(n, m)
        return known[key]

    result = np.empty((len(rows), len(columns)))
    for i, (s, n) in enumerate(rows):
        for j, (t, m) in enumerate(columns):
            result[i, j] = kernel(s, n, t, m, n + m)
            if normalize in ("self", "self+count"):
                result[i, j] -= (kernel(s, n, s, n, n + m) + kernel(t, m, t, m, n + m)) / 2
    return torch.from_numpy(result)


def compare(value: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raises `AssertionError` unless two logarithms of kernels agree."""
    assert value.isfinite().all(), "NaN or infinity"
    error = (value.detach().cpu().double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    assert error.max() <= tolerance, f"error {error.max():.2e}, at most {tolerance:.0e} allowed"
