"""Global alignment kernel between sequences of slice embeddings."""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from . import recursion
from .backends import BACKENDS, compiled_kernel
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

    with \\(\phi\\) the squared distance of two L2-normalised slice embeddings and \\(n, m\\) the lengths of the pair.
    Inner products are taken in float32, or in float64 for float64 inputs, whatever the autocast state. The recursion
    runs in float64, in log space where it could underflow. With gradients, PyTorch computes whatever `backend` says.

    Args:
        x (`Sequence[torch.Tensor]`):
            Sequences of shape `(length_i, dim)`, at least one slice each. Slices are L2-normalised inside (with
            `split`, each half on its own), so their scale does not matter.
        y (`Sequence[torch.Tensor]`, *optional*):
            Second set of sequences. Without it the symmetric matrix of `x` with itself is computed.
        delta (`float`, *optional*, defaults to `1.0`):
            Bandwidth. Small values tell slices apart sharply, large ones hardly at all.
        normalize (`bool` or `str`, *optional*, defaults to `True`):
            What the kernel is divided by.

            - `None` or `False`: nothing. Values reach the number of alignments (3 for two against two slices).
            - `"self"` or `True`: the geometric mean of the two self-kernels, both at the pair's bandwidth.
            - `"count"`: the number of alignments, see [`log_delannoy`].
            - `"self+count"`: both, each kernel being divided by its own number of alignments first. Unlike `"self"`
              it does not punish a difference in length; it can exceed 1 where lengths differ.
        log (`bool`, *optional*, defaults to `False`):
            Whether to return the logarithm, which cannot underflow.
        modality_x (`Sequence`, *optional*):
            For every sequence of `x` the modality of its slices, shape `(length_i,)`: `hf_sugar.alignment.TEXT` (0) or
            `hf_sugar.alignment.IMAGE` (1). Together with `split` it switches on the triple kernel: slices of the same
            modality are compared by the first half of their embeddings, slices of different modalities by the second.
        modality_y (`Sequence`, *optional*):
            The same for `y`.
        split (`int`, *optional*):
            Number of dimensions of the first half.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"torch"`, `"local"` or `"hub"`: which implementation runs, see
            [`~hf_sugar.alignment.compiled_kernel`]. Where the compiled ones are missing, PyTorch gives the same values.

    Returns:
        `torch.Tensor`: kernel values of shape `(len(x), len(y))`, float32, or float64 for float64 inputs.

    Raises:
        `ValueError`: if a sequence is empty, holds NaN or infinity or a slice of zeros; if shapes do not fit together;
            if `delta` does not lie between 0.001 and 1000; if `split` is out of range or does not come with the
            modalities; if `normalize` or `backend` is unknown.

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
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS}, got {backend!r}.")
    if (modality_x is None) != (split is None):
        raise ValueError("`modality_x` and `split` go together: pass both for the triple kernel, or neither.")
    if (modality_y is None) != (modality_x is None or y is None):
        raise ValueError("`modality_y` must be given exactly when both `y` and `modality_x` are.")

    sequences, modalities = [], []
    for name, group, group_modality in (("x", x, modality_x), ("y", y, modality_y)):
        if group is None:
            continue
        if group_modality is not None and len(group_modality) != len(group):
            raise ValueError(f"`modality_{name}` has {len(group_modality)} entries for {len(group)} sequences.")
        for index, sequence in enumerate(group):
            if sequence.ndim != 2 or len(sequence) == 0:
                raise ValueError(
                    f"`{name}[{index}]` has shape {tuple(sequence.shape)}; expected (length, dim) with length >= 1."
                )
            if sequence.shape[1] != x[0].shape[1]:
                raise ValueError(
                    f"`{name}[{index}]` has {sequence.shape[1]} dimensions but `x[0]` has {x[0].shape[1]}."
                )
            sequences.append(sequence)
            if group_modality is not None:
                modality = torch.as_tensor(group_modality[index], device=sequence.device)
                if modality.shape != sequence.shape[:1]:
                    raise ValueError(
                        f"`modality_{name}[{index}]` has shape {tuple(modality.shape)} for {len(sequence)} slices."
                    )
                modalities.append(modality)
    if len(x) == 0 or (y is not None and len(y) == 0):
        raise ValueError("`x` and `y` must hold at least one sequence.")

    lengths = torch.tensor([len(sequence) for sequence in sequences])
    prefixes = torch.stack([torch.arange(len(lengths)), lengths], dim=1)
    # Autocast would refuse or convert some dtypes here.
    with torch.autocast(sequences[0].device.type, enabled=False):
        embeddings = torch.cat(sequences)
    return packed_alignment_kernel(
        embeddings,
        F.pad(lengths.cumsum(0), (1, 0)),
        prefixes[: len(x)],
        prefixes[len(x) :] if y is not None else None,
        delta=delta,
        normalize=normalize,
        log=log,
        modality=torch.cat(modalities) if modalities else None,
        split=split,
        backend=backend,
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
    [`global_alignment_kernel`] between prefixes of packed samples.

    All prefixes of a sample share its slices, so inner products are taken once for every pair of slices, and only the
    recursion runs for every pair of prefixes. The self-kernels of a normalised kernel depend on a prefix and the length
    of its partner alone, and are computed once for each such combination.

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
        delta, normalize, log, split, backend:
            As for [`global_alignment_kernel`].

    Returns:
        `torch.Tensor`: kernel values of shape `(P, P)` or `(P, Q)`, float32, or float64 for float64 embeddings.

    Raises:
        `ValueError`: if offsets are not increasing or do not cover `embeddings`, a prefix does not lie in its sample, or
            for any of the reasons of [`global_alignment_kernel`].
    """
    normalize = {True: "self", False: None}.get(normalize, normalize)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"`normalize` must be a bool or one of {NORMALIZATIONS}, got {normalize!r}.")
    _check_delta(delta)
    slices = Slices(embeddings, offsets, modality, split)
    rows = check_prefixes("prefixes", prefixes, slices.offsets)
    symmetric = other_prefixes is None
    columns = rows if symmetric else check_prefixes("other_prefixes", other_prefixes, slices.offsets)
    compiled = compiled_kernel(embeddings.device.type, backend)
    traced = embeddings.requires_grad and torch.is_grad_enabled()
    log_kernels = functools.partial(
        recursion.log_kernels if compiled is None or traced else compiled.log_kernels, delta=delta
    )
    with torch.autocast(embeddings.device.type, enabled=False):
        result = _log_matrix(slices, rows, None if symmetric else columns, log_kernels)
        n, m = rows[:, 1], columns[:, 1]
        if normalize in ("self", "self+count"):
            row_self = _log_self_kernels(slices, rows, m, log_kernels)
            column_self = row_self if symmetric else _log_self_kernels(slices, columns, n, log_kernels)
            result = result - (row_self + column_self.T) / 2
            if symmetric:
                result.fill_diagonal_(0)
        if normalize in ("count", "self+count"):
            counts = _log_counts(n[:, None], m)
            if normalize == "self+count":
                counts -= (_log_counts(n, n)[:, None] + _log_counts(m, m)) / 2
            result = result - torch.from_numpy(counts).to(result)
        return (result if log else result.exp()).to(slices.dtype)


def _log_matrix(
    slices: Slices, rows: np.ndarray, columns: np.ndarray | None, log_kernels: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """log K of all pairs of prefixes."""
    blocks = slices.blocks(rows)
    if columns is None:
        pairs = itertools.combinations_with_replacement(blocks, 2)
    else:
        pairs = itertools.product(blocks, slices.blocks(columns))
    result = slices.zeros(len(rows), len(rows if columns is None else columns))
    for a, b in pairs:
        if a is b:
            i, j = torch.triu_indices(len(a.length), len(a.length)).numpy()
        else:
            i, j = np.divmod(np.arange(len(a.length) * len(b.length)), len(b.length))
        n, m = a.length[i], b.length[j]
        arguments = map(torch.from_numpy, (a.start[i], b.start[j], n, m, n + m))
        values = log_kernels(slices.distances(a.number, b.number), *arguments)
        row, column = torch.from_numpy(a.prefixes[i]), torch.from_numpy(b.prefixes[j])
        result[row, column] = values
        if columns is None:
            result[column, row] = values
    return result


def _log_self_kernels(
    slices: Slices, prefixes: np.ndarray, lengths: np.ndarray, log_kernels: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """log K of each prefix with itself, at the bandwidths that it has with partners of some lengths."""
    lengths, place = np.unique(lengths, return_inverse=True)
    result = slices.zeros(len(prefixes), len(lengths))
    for block in slices.blocks(prefixes):
        start, n = (torch.from_numpy(part.repeat(len(lengths))) for part in (block.start, block.length))
        total = torch.from_numpy(np.add.outer(block.length, lengths).ravel())
        values = log_kernels(slices.distances(block.number, block.number), start, start, n, n, total)
        result[torch.from_numpy(block.prefixes)] = values.view(len(block.length), -1)
    return result[:, torch.from_numpy(place)]


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
    How likely an alignment of two sequences passes through each pair of slices.

    Alignments are weighted by their share of the kernel. The result is the gradient of `log K` with respect to the
    logarithms of the local kernels; it makes a good heat map of what matches what.

    Args:
        x (`torch.Tensor` of shape `(n, dim)`):
            First sequence.
        y (`torch.Tensor` of shape `(m, dim)`):
            Second sequence.
        modality_x, modality_y (`torch.Tensor` of shapes `(n,)` and `(m,)`, *optional*):
            Modalities of their slices, for the triple kernel.
        delta, split:
            As for [`global_alignment_kernel`].

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
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        slices = Slices(torch.cat([x, y]), torch.tensor([0, n, n + m]), modality, split)
        log_local = recursion.log_local_kernel(slices.distances(0, 0)[:n, n:] / (delta**2 * (n + m)))
        with torch.enable_grad():
            log_local.requires_grad_()
            i, j, sizes = recursion.antidiagonals(n, m)
            log_kernel = recursion.sum_alignments(log_local[i, j, None], sizes, torch.tensor([n]), torch.tensor([m]))
            return torch.autograd.grad(log_kernel.sum(), log_local)[0]


def log_delannoy(n: int | torch.Tensor, m: int | torch.Tensor) -> torch.Tensor:
    """
    Logarithm of the number of monotone alignments of `n` with `m` slices.

    That is the Delannoy number `D(n - 1, m - 1)`: 1 for `n = 1`, 3 for `n = m = 2`, 13 for 3 and 63 for 4.

    Args:
        n (`int` or `torch.Tensor`):
            Length or lengths of the first sequence, at least 1.
        m (`int` or `torch.Tensor`):
            Length or lengths of the second sequence, at least 1; broadcast with `n`.

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
