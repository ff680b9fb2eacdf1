"""Global alignment kernel between sequences of slice embeddings."""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from . import recursion
from .backends import compiled_kernel
from .slices import Slices, check_integers, check_prefixes


NORMALIZATIONS = (None, "self", "count", "self+count")
SMALLEST_DELTA, LARGEST_DELTA = 1e-3, 1e3


def global_alignment_kernel(
    x: Sequence[torch.Tensor],
    y: Sequence[torch.Tensor] | None = None,
    *,
    delta: float = 1.0,
    normalize: bool | str | None = True,
    log: bool = False,
    modality_x: Sequence[torch.Tensor | Sequence[int]] | None = None,
    modality_y: Sequence[torch.Tensor | Sequence[int]] | None = None,
    split: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""
    Global alignment kernel between every sequence of `x` and every sequence of `y`.

    The kernel adds up, over all monotone alignments of two sequences (steps right, down and diagonal through the grid
    of their slices), the product of the local similarities on the way:

    $$K(x, y) = \sum_\pi \prod_i k(x_{\pi_1(i)}, y_{\pi_2(i)}), \qquad k = \frac{s}{2 - s}, \qquad
    s = e^{-\phi / (2 \sigma^2)}, \qquad \sigma = \delta \sqrt{(n + m) / 2}$$

    with $\phi$ the squared distance of two L2-normalised slice embeddings and $n$, $m$ the lengths of the pair.
    Inner products are taken in float32, or in float64 for float64 inputs, whatever the autocast state; the recursion
    runs in float64. With gradients, PyTorch computes whatever `backend` says.

    Args:
        x (`Sequence[torch.Tensor]`):
            Sequences of shape `(length_i, dim)`, at least one slice each. Slices (with `split`, each half of them) are
            L2-normalised inside.
        y (`Sequence[torch.Tensor]`, *optional*):
            Second set of sequences. Without it the symmetric matrix of `x` with itself is computed.
        delta (`float`, *optional*, defaults to `1.0`):
            Bandwidth, from 0.001 to 1000. Small values tell slices apart sharply, large ones hardly at all.
        normalize (`bool` or `str`, *optional*, defaults to `True`): What the kernel is divided by.

            - `None`, `False` or `"none"`: nothing. Values reach the number of alignments (3 for two against two slices).
            - `"self"` or `True`: the geometric mean of the two self-kernels, both at the pair's bandwidth.
            - `"count"`: the number of alignments, see [`log_delannoy`].
            - `"self+count"`: both, each kernel being divided by its own number of alignments first. Unlike `"self"`
              it does not punish a difference in length; it can exceed 1 where lengths differ.
        log (`bool`, *optional*, defaults to `False`): Whether to return the logarithm, which cannot underflow.
        modality_x, modality_y (`Sequence[torch.Tensor | Sequence[int]]`, *optional*):
            For every sequence the modality of its slices, `hf_sugar.alignment.TEXT` (0) or `hf_sugar.alignment.IMAGE` (1).
            With `split`, they switch on the triple kernel: slices of the same modality are compared by the first half of
            their embeddings, slices of different modalities by the second.
        split (`int`, *optional*): Number of dimensions of the first half.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"torch"`, `"local"` or `"hub"`: see [`~hf_sugar.alignment.compiled_kernel`].

    Returns:
        `torch.Tensor`: kernel values of shape `(len(x), len(y))`, float32, or float64 for float64 inputs.

    Raises:
        `ValueError`: if a slice has no direction (zeros, NaN, infinity); naming the argument, for anything else.

    Sources: the kernel is that of [Cuturi (2011)](https://icml.cc/2011/papers/489_icmlpaper.pdf), in the form of
    Theorem 1 and Eq. 4-6 of [Sugar](https://huggingface.co/papers/2411.00304); normalisations are this library's.

    Example:

    ```python
    >>> import torch
    >>> from hf_sugar import global_alignment_kernel

    >>> x = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> global_alignment_kernel(x, normalize=None)
    tensor([[3.0000, 0.1193],
            [0.1193, 1.0000]])
    ```
    """
    if len(x) == 0 or (y is not None and len(y) == 0):
        raise ValueError("`x` and `y` must hold at least one sequence.")
    sequences = [*x, *(() if y is None else y)]
    for i, sequence in enumerate(sequences):
        if sequence.ndim != 2 or len(sequence) == 0 or sequence.shape[1] != x[0].shape[-1]:
            name = f"x[{i}]" if i < len(x) else f"y[{i - len(x)}]"
            expected = f"(length, {x[0].shape[-1]}) with length >= 1"
            raise ValueError(f"`{name}` has shape {tuple(sequence.shape)}; expected {expected}.")
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    modality = None
    if modality_x is not None or modality_y is not None:
        codes = [torch.as_tensor(c) for group in (modality_x, modality_y) if group is not None for c in group]
        if [c.shape for c in codes] != [sequence.shape[:1] for sequence in sequences]:
            counts = f"they have {list(map(len, codes))} entries for {lengths.tolist()} slices"
            raise ValueError(f"`modality_x` and `modality_y` must say what every slice of `x` and `y` is: {counts}.")
        modality = torch.cat(codes)
    prefixes = torch.stack([torch.arange(len(lengths)), lengths], dim=1)
    # Autocast would refuse or convert some dtypes here.
    with torch.autocast(sequences[0].device.type, enabled=False):
        embeddings = torch.cat(sequences)
    return packed_alignment_kernel(
        embeddings,
        F.pad(lengths.cumsum(0), (1, 0)),
        prefixes[: len(x)],
        None if y is None else prefixes[len(x) :],
        **{"delta": delta, "normalize": normalize, "log": log, "backend": backend},
        **{"modality": modality, "split": split},
    )


def packed_alignment_kernel(
    embeddings: torch.Tensor,
    offsets: torch.Tensor,
    prefixes: torch.Tensor,
    other_prefixes: torch.Tensor | None = None,
    *,
    delta: float = 1.0,
    normalize: bool | str | None = True,
    log: bool = False,
    modality: torch.Tensor | None = None,
    split: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """
    [`global_alignment_kernel`] between prefixes of packed samples, whose slices are multiplied once for all of them.

    Args:
        embeddings (`torch.Tensor` of shape `(total_slices, dim)`):
            Slice embeddings of all samples, one sample after the other.
        offsets (`torch.Tensor` of shape `(samples + 1,)`, int64):
            Where each sample begins in `embeddings`, and the total: cumulative lengths starting from 0.
        prefixes (`torch.Tensor` of shape `(P, 2)`, int64):
            Rows `(sample, length)`: the first `length >= 1` slices of that sample.
        other_prefixes (`torch.Tensor` of shape `(Q, 2)`, int64, *optional*):
            Prefixes of the same packed samples to compare with. Without it `prefixes` are compared with themselves.
        modality (`torch.Tensor` of shape `(total_slices,)`, int64, *optional*):
            0 for text and 1 for images; with `split`, switches on the triple kernel.
        delta, normalize, log, split, backend: As for [`global_alignment_kernel`].

    Returns:
        `torch.Tensor`: kernel values of shape `(P, P)` or `(P, Q)`, float32, or float64 for float64 embeddings.

    Raises:
        `ValueError`: as [`global_alignment_kernel`].
    """
    normalize = {True: "self", False: None, "none": None}.get(normalize, normalize)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"`normalize` must be a bool or one of {NORMALIZATIONS}, got {normalize!r}.")
    _check_delta(delta)
    compiled = compiled_kernel(embeddings.device.type, backend)
    slices = Slices(embeddings, offsets, modality, split)
    rows = check_prefixes("prefixes", prefixes, slices.offsets)
    symmetric = other_prefixes is None
    columns = rows if symmetric else check_prefixes("other_prefixes", other_prefixes, slices.offsets)
    n, m = rows[:, 1], columns[:, 1]
    # Pairs of like lengths are neighbours.
    by_n, by_m = n.argsort(kind="stable"), m.argsort(kind="stable")
    i, j = np.triu_indices(len(n)) if symmetric else np.indices((len(n), len(m))).reshape(2, -1)
    i, j = by_n[i], by_m[j]
    jobs = [(rows[i], columns[j], n[i] + m[j])]
    if normalize in ("self", "self+count"):
        # A self-kernel depends on a prefix and the length of its partner alone.
        for prefixes, lengths in ((rows, m), (columns, n))[: 1 if symmetric else 2]:
            lengths = np.unique(lengths)
            repeated = prefixes.repeat(len(lengths), axis=0)
            jobs.append((repeated, repeated, np.add.outer(prefixes[:, 1], lengths).ravel()))
    traced = embeddings.requires_grad and torch.is_grad_enabled()
    op = recursion.log_kernels if compiled is None or traced else compiled.log_kernels
    with torch.autocast(embeddings.device.type, enabled=False):
        values = _log_kernels(slices, *map(np.concatenate, zip(*jobs)), delta, op)
        values, *self_kernels = values.split([len(total) for *_, total in jobs])
        i, j = torch.from_numpy(i), torch.from_numpy(j)
        result = values.new_zeros(len(n), len(m))
        result[i, j] = values
        if symmetric:
            result[j, i] = values
        if self_kernels:
            row_self, column_self = (
                kernels.view(len(lengths), -1)[:, torch.from_numpy(np.unique(others, return_inverse=True)[1])]
                for kernels, lengths, others in ((self_kernels[0], n, m), (self_kernels[-1], m, n))
            )
            result = result - (row_self + column_self.T) / 2
            if symmetric:
                result.fill_diagonal_(0)
        if normalize in ("count", "self+count"):
            counts = _log_counts(n[:, None], m)
            if normalize == "self+count":
                counts -= (_log_counts(n, n)[:, None] + _log_counts(m, m)) / 2
            result = result - torch.from_numpy(counts).to(result)
        return (result if log else result.exp()).to(slices.dtype)


def _log_kernels(
    slices: Slices, first: np.ndarray, second: np.ndarray, total: np.ndarray, delta: float, op: Callable
) -> torch.Tensor:
    """log K of pairs of prefixes, one pair of blocks of slices after the other."""
    a, b = slices.block_of[first[:, 0]], slices.block_of[second[:, 0]]
    swap = (a > b)[:, None]
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    number = np.minimum(a, b) * len(slices.spans) + np.maximum(a, b)
    chosen, values = [np.flatnonzero(number == n) for n in np.unique(number)], []
    for pairs in chosen:
        a, b = divmod(int(number[pairs[0]]), len(slices.spans))
        (x, n), (y, m) = first[pairs].T, second[pairs].T
        row, column = slices.offsets[x] - slices.spans[a].start, slices.offsets[y] - slices.spans[b].start
        indices = (torch.tensor(index) for index in (row, column, n, m, total[pairs]))
        values.append(op(slices.distances(a, b), *indices, delta))
    return torch.cat(values)[torch.from_numpy(np.concatenate(chosen).argsort())]


def expected_alignment(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    delta: float = 1.0,
    modality_x: torch.Tensor | Sequence[int] | None = None,
    modality_y: torch.Tensor | Sequence[int] | None = None,
    split: int | None = None,
) -> torch.Tensor:
    """
    How likely an alignment of two sequences, weighted by its share of the kernel, passes through each pair of slices.

    It is the gradient of `log K` with respect to the logarithms of the local kernels: a heat map of what matches what.

    Args:
        x (`torch.Tensor` of shape `(n, dim)`), y (`torch.Tensor` of shape `(m, dim)`): The sequences.
        modality_x (of shape `(n,)`), modality_y (of shape `(m,)`), delta, split: As for [`global_alignment_kernel`].

    Returns:
        `torch.Tensor`: probabilities of shape `(n, m)`, detached, 1 in the first and in the last cell.

    Raises:
        `ValueError`: for the reasons of [`global_alignment_kernel`].
    """
    if (modality_x is None) != (modality_y is None):
        raise ValueError("`modality_x` and `modality_y` go together: pass both or neither.")
    _check_delta(delta)
    n, m = len(x), len(y)
    modality = None
    if modality_x is not None:
        modality = torch.cat([torch.as_tensor(codes, device=x.device) for codes in (modality_x, modality_y)])
    with torch.autocast(x.device.type, enabled=False):
        slices = Slices(torch.cat([x, y]).detach(), torch.tensor([0, n, n + m]), modality, split)
        distances = slices.distances(*slices.block_of.tolist())[:n, -m:].contiguous().requires_grad_()
        with torch.enable_grad():
            pair = [torch.tensor([number]) for number in (0, 0, n, m, n + m)]
            gradient = torch.autograd.grad(recursion.log_kernels(distances, *pair, delta).sum(), distances)[0]
        # From the distance to the logarithm of the local kernel, which is that of s / (2 - s).
        bandwidth = delta**2 * (n + m)
        return gradient * (torch.exp(-distances.detach() / bandwidth) / 2 - 1) * bandwidth


def log_delannoy(n: int | torch.Tensor, m: int | torch.Tensor) -> torch.Tensor:
    """
    Logarithm of the number of monotone alignments of `n` with `m` slices: of the Delannoy number `D(n - 1, m - 1)`, which is
    1 for `n = 1`, 3 for `n = m = 2`, 13 for 3 and 63 for 4.

    Args:
        n, m (`int` or `torch.Tensor`): Lengths, at least 1, that are broadcast.

    Returns:
        `torch.Tensor`: float64, of the broadcast shape, on the CPU.

    Raises:
        `ValueError`: if a length is below 1 or not an integer.
    """
    n, m = torch.broadcast_tensors(check_integers("n", torch.as_tensor(n)), check_integers("m", torch.as_tensor(m)))
    if not n.numel():
        return torch.zeros(n.shape, dtype=torch.float64)
    if min(n.min(), m.min()) < 1:
        raise ValueError("`n` and `m` must be at least 1.")
    return torch.as_tensor(_log_counts(n.numpy(), m.numpy()))


def _log_counts(n: np.ndarray, m: np.ndarray) -> np.ndarray:
    shorter, longer = np.minimum(n, m), np.maximum(n, m)
    return _log_delannoy_table(int(shorter.max()), int(longer.max()))[shorter - 1, longer - 1]


@functools.lru_cache(maxsize=4)
def _log_delannoy_table(rows: int, columns: int) -> np.ndarray:
    """D[i, j] = D[i, j - 1] + D[i - 1, j] + D[i - 1, j - 1], of which each row is one running sum."""
    table = np.zeros((rows, columns))
    for above, row in itertools.pairwise(table):
        row[1:] = np.logaddexp(above[1:], above[:-1])
        np.logaddexp.accumulate(row, out=row)
    return table


def _check_delta(delta: float):
    if not SMALLEST_DELTA <= delta <= LARGEST_DELTA:
        raise ValueError(f"`delta` must lie between {SMALLEST_DELTA} and {LARGEST_DELTA:.0f}, got {delta}.")
