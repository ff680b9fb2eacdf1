"""Global alignment kernel between sequences of slice embeddings, in PyTorch."""

import functools
import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .selection import BACKENDS, compiled_kernel


logger = logging.getLogger(__name__)

TEXT = 0
IMAGE = 1

NORMALIZATIONS = (None, "self", "count", "self+count")

# A block is a run of samples whose slices share one Gram matrix (a longer sample is never cut), a group some pairs of its
# prefixes, a chunk those of them that share one recursion, of which some diagonals are held at a time. Smaller inputs get
# smaller groups and chunks, so that the memory stays in proportion.
BLOCK_SLICES = 1024
NARROW_SLICES = 512
GROUP_PAIRS = 1 << 15
CHUNK_CELLS = 1 << 17
CHUNK_DIAGONALS = 8
CACHED_CELLS = 1 << 8
# What the objects of a call take, however small its inputs.
CALL_BYTES = 1 << 16
# Below this size padding costs less than starting another chunk.
SMALL_CHUNK_CELLS = 1 << 15
PADDING = 1.3
# Up to this size, both triangles of a symmetric matrix cost less than two calls.
SQUARE = 256

# Finite, because -inf would meet itself in a difference and give NaN gradients.
LOG_ZERO = -1e30
# A float64 holds a kernel, and everything on the way to it, if its logarithm is at most this in size.
LOG_RANGE = 690
LARGEST_DISTANCE = 4.01
# Below, exponents of a kernel could leave the range that the compiled ones set aside for them.
SMALLEST_DELTA = 1e-3
# Below this squared distance, 2 - 2 cos loses too many digits in float32: the product is taken again in float64, of so
# many rows at a time.
CLOSE, CLOSE_ROWS = 0.1, 48


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
    runs in float64, in log space where it could underflow. It is differentiable in the embeddings.

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
            if `delta` is not positive; if `split` is out of range or does not come with the modalities; if `normalize`
            or `backend` is unknown.

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
    of its partner alone, and are computed once for each such combination. No tensor of shape `(pairs, length, length)`
    is built for more than a chunk of the pairs (with gradients, autograd keeps what it needs).

    Args:
        embeddings (`torch.Tensor` of shape `(total_slices, dim)`):
            Slice embeddings of all samples, one sample after the other.
        offsets (`torch.Tensor` of shape `(samples + 1,)`, int64):
            Where each sample begins in `embeddings`, and the total: cumulative lengths starting from 0.
        prefixes (`torch.Tensor` of shape `(P, 2)`, int64):
            Rows `(sample, length)`: the first `length >= 1` slices of that sample.
        other_prefixes (`torch.Tensor` of shape `(Q, 2)`, int64, *optional*):
            Prefixes of the same packed samples to compare with. Without it `prefixes` are compared with themselves.
        delta (`float`, *optional*, defaults to `1.0`):
            Bandwidth.
        normalize (`bool` or `str`, *optional*, defaults to `True`):
            `None`, `"self"`, `"count"` or `"self+count"`, see [`global_alignment_kernel`].
        log (`bool`, *optional*, defaults to `False`):
            Whether to return the logarithm.
        modality (`torch.Tensor` of shape `(total_slices,)`, int64, *optional*):
            0 for text and 1 for images; with `split`, switches on the triple kernel.
        split (`int`, *optional*):
            Number of dimensions of the first half of an embedding.
        backend (`str`, *optional*, defaults to `"auto"`):
            Which implementation runs, see [`~hf_sugar.alignment.compiled_kernel`].

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
    _check_embeddings(embeddings)
    arguments = embeddings, offsets, prefixes, other_prefixes, modality, split

    compiled = compiled_kernel(embeddings.device.type, backend)
    if compiled is not None:
        if modality is not None and modality.dtype != torch.int64:
            # The conversion below would hide what is wrong.
            _check_triple(embeddings, modality, split)
        try:
            return compiled.packed_alignment_kernel(
                embeddings,
                _integers("offsets", offsets),
                _integers("prefixes", prefixes),
                None if other_prefixes is None else _integers("other_prefixes", other_prefixes),
                delta=delta,
                normalize=normalize,
                log=log,
                modality=None if modality is None else modality.cpu().long(),
                split=split,
            )
        except NotImplementedError as error:
            logger.debug("The PyTorch implementation takes over: %s", error)
        except (RuntimeError, ValueError):
            # The kernels refuse bad inputs; this says in one way which.
            _checked(*arguments)
            raise

    with torch.autocast(embeddings.device.type, enabled=False):
        return _kernel_matrix(*_checked(*arguments), other_prefixes is None, delta, normalize, log)


def _checked(
    embeddings: torch.Tensor,
    offsets: torch.Tensor,
    prefixes: torch.Tensor,
    other_prefixes: torch.Tensor | None,
    modality: torch.Tensor | None,
    split: int | None,
) -> tuple["_Slices", np.ndarray, np.ndarray]:
    offsets = _check_offsets(offsets, len(embeddings))
    rows = _check_prefixes("prefixes", prefixes, offsets)
    columns = rows if other_prefixes is None else _check_prefixes("other_prefixes", other_prefixes, offsets)
    return _Slices(embeddings, offsets, modality, split), rows, columns


def _kernel_matrix(
    slices: "_Slices",
    rows: np.ndarray,
    columns: np.ndarray,
    symmetric: bool,
    delta: float,
    normalize: str | None,
    log: bool,
) -> torch.Tensor:
    by_self, by_count = normalize in ("self", "self+count"), normalize in ("count", "self+count")
    # Pairs are many: half the bytes.
    offsets, rows, columns = (part.astype(np.int32) for part in (slices.offsets, rows, columns))
    total = int(offsets[-1])
    (row_lengths, row_index), (column_lengths, column_index) = (
        np.unique(p[:, 1], return_inverse=True) for p in (rows, columns)
    )
    result = slices.new_zeros(len(rows), len(columns))

    # What self-kernels, indices of pairs and recursions may take. What autograd keeps is in no proportion anyway.
    spare = slices.nbytes + result.element_size() * (result.numel() + total**2) // 4
    spare -= min(spare // 4, CALL_BYTES)
    group, cells = (GROUP_PAIRS, CHUNK_CELLS) if slices.traced else (spare // 400 + 1, spare // 48 + 1)
    group, scratch = min(group, GROUP_PAIRS), _Scratch(min(cells, CHUNK_CELLS))
    # Self-kernels are kept if they are few. Else, with some long samples, they are computed for each group, and all slices
    # are one block, which holds every sample with itself.
    few = 8 * (len(rows) * len(column_lengths) + len(columns) * len(row_lengths)) <= spare // 4
    one_block = total <= BLOCK_SLICES or (by_self and not few)
    row_blocks, column_blocks = (
        _blocks(p, offsets, total if one_block else BLOCK_SLICES, whole=one_block and by_self) for p in (rows, columns)
    )
    if by_count and few:
        counts = _log_counts(row_lengths, column_lengths, by_self).to(
            result.device, _wide(result.dtype, result.device)
        )
    if by_self and few:
        row_self = result.new_zeros(len(rows), len(column_lengths), dtype=_wide(result.dtype, result.device))
        column_self = row_self if symmetric else row_self.new_zeros(len(columns), len(row_lengths))
    held = {}

    def distances(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        if (a, b) not in held:
            held.clear()
            held[a, b] = slices.squared_distances(slice(*a), slice(*b))
        return held[a, b]

    def own(prefixes: np.ndarray, lengths: np.ndarray, span: tuple[int, int]) -> torch.Tensor:
        """Half of log K of prefixes with themselves, at the bandwidths that they have with prefixes of some lengths."""
        lengths, place = np.unique(lengths, return_inverse=True)
        i, j = _all_pairs(len(prefixes), len(lengths))
        start, n = offsets[prefixes[i, 0]] - span[0], prefixes[i, 1]
        values = _log_kernels(distances(span, span), start, start, n, n, n + lengths[j], delta, scratch)
        return values.view(len(prefixes), len(lengths))[:, place] / 2

    def keep(table: torch.Tensor, prefixes: np.ndarray, lengths: np.ndarray, block: "_Block"):
        for piece in _pieces(0, len(block.prefixes), max(1, group // len(lengths))):
            members = block.prefixes[piece]
            table[members] = own(prefixes[members], lengths, block.span)

    def fill(row_block: "_Block", column_block: "_Block", triangle: bool = False):
        """The pairs of two blocks, both by length; of a block with itself, those above the diagonal."""
        end = 0
        while end < len(row_block.prefixes):
            b = column_block.prefixes[end if triangle else 0 :]
            begin, end = end, end + max(1, group // len(b))
            a = row_block.prefixes[begin:end]
            (row, n), (column, m) = rows[a].T, columns[b].T
            i, j = _all_pairs(len(a), len(b))
            if triangle:
                # With self-kernels, the diagonal is 1.
                above = i < j if by_self else i <= j
                i, j = i[above], j[above]
            values = _log_kernels(
                distances(row_block.span, column_block.span),
                (offsets[row] - row_block.span[0])[i],
                (offsets[column] - column_block.span[0])[j],
                n[i],
                m[j],
                n[i] + m[j],
                delta,
                scratch,
            )
            if triangle:
                place = (torch.from_numpy(i).to(values.device), torch.from_numpy(j).to(values.device))
                values = values.new_zeros(len(a), len(b)).index_put(place, values)
            values = values.view(len(a), len(b))
            if by_self and few:
                values = values - row_self[a][:, column_index[b]] - column_self[b][:, row_index[a]].T
            elif by_self:
                values = values - own(rows[a], m, row_block.span) - own(columns[b], n, column_block.span).T
            if by_count and few:
                values = values - counts[row_index[a]][:, column_index[b]]
            elif by_count:
                values = values - _log_counts(n, m, by_self).to(values)
            if triangle:
                corner = values[:, : len(a)].triu(1 if by_self else 0)
                values = torch.cat([corner + corner.triu(1).T, values[:, len(a) :]], dim=1)
            values = (values if log else values.exp()).to(result.dtype)
            if symmetric:
                result[b[:, None], a] = values.T
            result[a[:, None], b] = values

    if symmetric:
        # Blocks with themselves first: they hold the self-kernels that all others are divided by.
        for block in row_blocks:
            if by_self and few:
                keep(row_self, rows, column_lengths, block)
            fill(block, block, triangle=True)
        for a, b in itertools.combinations(row_blocks, 2):
            fill(a, b)
        return result
    if by_self and few:
        for block in row_blocks:
            keep(row_self, rows, column_lengths, block)
        for block in column_blocks:
            keep(column_self, columns, row_lengths, block)
    for a, b in itertools.product(row_blocks, column_blocks):
        fill(a, b)
    return result


def _log_counts(n: np.ndarray, m: np.ndarray, by_self: bool) -> torch.Tensor:
    """log of the numbers of alignments of some lengths with others, each divided by those with itself if asked for."""
    (n, row), (m, column) = (np.unique(lengths, return_inverse=True) for lengths in (n, m))
    counts, longest = np.empty((len(n), len(m))), max(int(n[-1]), int(m[-1]))
    itself = np.empty(longest + 1)
    for length, numbers in zip(range(1, longest + 1), _delannoy_rows(longest), strict=False):
        itself[length] = math.log(numbers[length - 1])
        place = np.searchsorted(n, length)
        if place < len(n) and n[place] == length:
            counts[place] = [math.log(numbers[other - 1]) for other in m.tolist()]
    if by_self:
        counts -= (itself[n, None] + itself[m]) / 2
    return torch.from_numpy(counts)[row][:, column]


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
        delta (`float`, *optional*, defaults to `1.0`):
            Bandwidth.
        modality_x (`torch.Tensor` of shape `(n,)`, *optional*):
            Modality of each slice of `x`, for the triple kernel.
        modality_y (`torch.Tensor` of shape `(m,)`, *optional*):
            Modality of each slice of `y`.
        split (`int`, *optional*):
            Number of dimensions of the first half of an embedding.

    Returns:
        `torch.Tensor`: probabilities of shape `(n, m)`, detached, 1 in the first and in the last cell.

    Raises:
        `ValueError`: for the reasons of [`global_alignment_kernel`].
    """
    if (modality_x is None) != (modality_y is None):
        raise ValueError("`modality_x` and `modality_y` go together: pass both or neither.")
    _check_delta(delta)
    n, m = len(x), len(y)
    offsets = _check_offsets(torch.tensor([0, n, n + m]), n + m)
    modality = None
    if modality_x is not None:
        modality = torch.cat([torch.as_tensor(code, device=x.device) for code in (modality_x, modality_y)])
    with torch.autocast(x.device.type, enabled=False), torch.no_grad():
        slices = _Slices(torch.cat([x, y]), offsets, modality, split)
        squared_distances = slices.squared_distances(slice(0, n), slice(n, n + m))
        row, column = (torch.from_numpy(part[:, 0]).to(x.device) for part in _cells(n, m, 0, n + m - 1))
        cells = _log_local_kernel(squared_distances / (delta**2 * (n + m)))[row, column, None]
        with torch.enable_grad():
            cells.requires_grad_()
            log_kernel = _recursion(cells, n, m, 0, n + m - 1)[-2].sum()
        visits = torch.autograd.grad(log_kernel, cells)[0]
        return squared_distances.index_put((row, column), visits[:, 0])


def log_delannoy(n: int | torch.Tensor, m: int | torch.Tensor) -> torch.Tensor:
    """
    Logarithm of the number of monotone alignments of `n` with `m` slices.

    That is the Delannoy number `D(n - 1, m - 1)`: 1 for `n = 1`, 3 for `n = m = 2`, 13 for 3 and 63 for 4. Counted in
    exact integers, of which the logarithm is taken last.

    Args:
        n (`int` or `torch.Tensor`):
            Length or lengths of the first sequence, at least 1.
        m (`int` or `torch.Tensor`):
            Length or lengths of the second sequence, at least 1; broadcast with `n`.

    Returns:
        `torch.Tensor`: float64, of the broadcast shape, on the CPU.

    Raises:
        `ValueError`: if a length is below 1.
    """
    n, m = torch.broadcast_tensors(torch.as_tensor(n).cpu().long(), torch.as_tensor(m).cpu().long())
    if n.numel() and min(n.min(), m.min()) < 1:
        raise ValueError("`n` and `m` must be at least 1.")
    if not n.numel():
        return torch.zeros(n.shape, dtype=torch.float64)
    n, m = torch.minimum(n, m).numpy(), torch.maximum(n, m).numpy()
    longest = int(m.max())
    wanted, place = np.unique(n * (longest + 1) + m, return_inverse=True)
    values, rows, length = np.empty(len(wanted)), _delannoy_rows(longest), 0
    for index, (shorter, longer) in enumerate(divmod(pair, longest + 1) for pair in wanted.tolist()):
        while length < shorter:
            row, length = next(rows), length + 1
        values[index] = math.log(row[longer - 1])
    return torch.as_tensor(values[place])


def _delannoy_rows(longest: int) -> Iterator[list[int]]:
    """Rows of the table of all numbers, of which one is held at a time: it would be large."""
    row = [1] * longest
    while True:
        yield row
        row = list(itertools.accumulate(map(operator.add, row[1:], row), initial=1))


class _Slices:
    """Slices, and the cosines of the halves that Eq. 6 compares between two runs of them."""

    def __init__(
        self, embeddings: torch.Tensor, offsets: np.ndarray, modality: torch.Tensor | None, split: int | None
    ):
        self.offsets = offsets
        _check_embeddings(embeddings)
        _check_triple(embeddings, modality, split)
        # Codes lead the index arithmetic, which is done on the host.
        self.modality = None if modality is None else modality.cpu().numpy()
        self.dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        self.traced = embeddings.requires_grad and torch.is_grad_enabled()
        self.nbytes = embeddings.nbytes
        self.new_zeros = functools.partial(embeddings.new_zeros, dtype=self.dtype)
        if split is None:
            halves = {"is all zeros and has no direction": embeddings}
        else:
            halves = {
                f"is all zeros in its first {split} dimensions": embeddings[:, :split],
                f"is all zeros after its first {split} dimensions": embeddings[:, split:],
            }
        # Slices that are taken at a time. Unit vectors of all would be as much memory as the slices, of narrow ones twice
        # that, and the products of two kinds lie beside the matrix that they go into.
        self.part = len(embeddings)
        if not self.traced:
            narrow = embeddings.element_size() < self.dtype.itemsize
            self.part = len(embeddings) // (8 if narrow and split is None else 4) + 1
            if narrow:
                self.part = min(NARROW_SLICES, self.part)
        # Only norms are kept: unit vectors of all slices would take as much memory as the slices.
        self.halves = [self._measured(half, complaint) for complaint, half in halves.items()]

    def _measured(self, half: torch.Tensor, complaint: str) -> tuple[torch.Tensor, torch.Tensor]:
        smallest, largest = half.detach().aminmax(dim=1, keepdim=True)
        largest = torch.maximum(-smallest, largest)
        self._refuse(~largest.isfinite(), "holds NaN or infinity")
        self._refuse(largest == 0, complaint)
        limit = 1e-150 if self.dtype == torch.float64 else 1e-15
        if not ((largest > limit) & (largest < 1 / limit)).all():
            # The squares would leave the range of the dtype. The direction is the same.
            half = half.to(self.dtype) / largest
        norms = [
            torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=self.dtype) for part in half.split(self.part)
        ]
        return half, torch.cat(norms)

    def _refuse(self, bad: torch.Tensor, what: str):
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            sample = int(np.searchsorted(self.offsets, row, side="right")) - 1
            raise ValueError(
                f"Slice {row - self.offsets[sample]} of sequence {sample} (row {row} of the packed embeddings) {what}."
            )

    def cosines(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._pairs(rows, columns, lambda a, b, same: a @ b.T)

    def squared_distances(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._pairs(rows, columns, _squared_distances)

    def _pairs(self, rows: slice, columns: slice, compare: Callable[..., torch.Tensor]) -> torch.Tensor:
        same = rows == columns
        places = [np.arange(len(self.halves[0][0]))[span] for span in (rows, columns)]

        def unit(place: np.ndarray, half: int) -> torch.Tensor:
            vectors, norms = self.halves[half]
            return vectors[place].to(self.dtype).div_(norms[place])

        if self.modality is None and max(map(len, places)) <= self.part:
            a = unit(places[0], 0)
            return compare(a, a if same else unit(places[1], 0), same)
        if self.modality is None:
            kinds = [(0, *(np.arange(len(place)) for place in places))]
        else:
            # Each of the four kinds of pairs needs one half of the embeddings only.
            codes = [self.modality[place] for place in places]
            kinds = [
                (0 if code == other else 1, np.flatnonzero(codes[0] == code), np.flatnonzero(codes[1] == other))
                for code, other in ((TEXT, TEXT), (IMAGE, IMAGE), (TEXT, IMAGE), (IMAGE, TEXT))
            ]
            if same:
                # The last is the one before, mirrored.
                kinds.pop()
        result = self.new_zeros(*map(len, places))
        for half, i, j in kinds:
            alike = same and half == 0
            for begin in range(0, len(i), self.part):
                row = i[begin : begin + self.part]
                a = unit(places[0][row], half)
                for other in range(begin if alike else 0, len(j), self.part):
                    column = j[other : other + self.part]
                    twin = alike and other == begin
                    values = compare(a, a if twin else unit(places[1][column], half), twin)
                    at = (row[:, None], column)
                    if self.modality is None:
                        at = (slice(row[0], row[-1] + 1), slice(column[0], column[-1] + 1))
                    result[at] = values
                    if same and not twin:
                        result.T[at] = values
        return result


def _squared_distances(a: torch.Tensor, b: torch.Tensor, same: bool) -> torch.Tensor:
    """Squared distances of unit vectors; `same` says that `a` and `b` are the same ones."""
    if same and len(a) > SQUARE:
        # Both triangles hold the same numbers.
        distances, cut = a.new_empty(len(a), len(a)), len(a) // 2
        top, bottom = slice(cut), slice(cut, None)
        distances[top, bottom] = _squared_distances(a[top], a[bottom], False)
        distances[bottom, top] = distances[top, bottom].T
        for part in (top, bottom):
            distances[part, part] = _squared_distances(a[part], a[part], True)
        return distances
    distances = torch.addmm(a.new_tensor(2.0), a, b.T, alpha=-2).clamp_(min=0)
    # The gradient stays that of 2 - 2 cos.
    with torch.no_grad():
        close = distances < CLOSE
        if same:
            distances.fill_diagonal_(0)
            close.fill_diagonal_(False)
        if a.dtype == torch.float32 and close.any():
            # MPS has no float64.
            device = "cpu" if a.device.type == "mps" else a.device
            rows, columns = (close.any(dim=dim).nonzero()[:, 0] for dim in (1, 0))
            for i in rows.split(CLOSE_ROWS):
                exact = torch.zeros(len(i), len(columns), dtype=torch.float64, device=device)
                # In float64, both sides together take half the memory of `a`.
                for dims in _pieces(0, a.shape[1], max(1, a.numel() // (4 * (len(i) + len(columns))))):
                    x, y = (side[index, dims].to(device).double() for side, index in ((a, i), (b, columns)))
                    squares = [torch.linalg.vector_norm(side, dim=1).square() for side in (x, y)]
                    exact.addmm_(x, y.T, alpha=-2).add_(squares[0][:, None]).add_(squares[1])
                at = (i[:, None], columns)
                distances[at] = torch.where(close[at], exact.clamp_(min=0).to(distances), distances[at])
    return distances


def _check_embeddings(embeddings: torch.Tensor):
    if embeddings.ndim != 2 or not embeddings.is_floating_point() or embeddings.shape[1] == 0:
        raise ValueError(
            f"`embeddings` must have shape (total_slices, dim) and a floating-point dtype; got "
            f"{tuple(embeddings.shape)} of {embeddings.dtype}."
        )


def _integers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {tensor.dtype}.")
    return tensor.cpu().long().contiguous()


def _check_triple(embeddings: torch.Tensor, modality: torch.Tensor | None, split: int | None):
    if (modality is None) != (split is None):
        raise ValueError("`modality` and `split` go together: pass both for the triple kernel, or neither.")
    if split is None:
        return
    if not 0 < split < embeddings.shape[1]:
        raise ValueError(
            f"`split` must lie between 1 and {embeddings.shape[1] - 1}, because embeddings have "
            f"{embeddings.shape[1]} dimensions; got {split}."
        )
    if modality.shape != embeddings.shape[:1]:
        raise ValueError(f"`modality` has shape {tuple(modality.shape)} for {len(embeddings)} slices.")
    if not ((modality == TEXT) | (modality == IMAGE)).all():
        raise ValueError(f"`modality` may hold {TEXT} (text) and {IMAGE} (image) only.")


def _check_delta(delta: float):
    if not SMALLEST_DELTA <= delta < math.inf:
        raise ValueError(f"`delta` must be finite and at least {SMALLEST_DELTA}, got {delta}.")


def _check_offsets(offsets: torch.Tensor, total: int) -> np.ndarray:
    offsets = _integers("offsets", offsets).numpy()
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"`offsets` must be one-dimensional and run from 0 to {total}, the number of slices.")
    empty = np.flatnonzero(np.diff(offsets) < 1)
    if len(empty):
        raise ValueError(f"`offsets` must increase, but sequence {empty[0]} is empty: every sample needs a slice.")
    return offsets


def _check_prefixes(name: str, prefixes: torch.Tensor, offsets: np.ndarray) -> np.ndarray:
    prefixes = _integers(name, prefixes).numpy()
    if prefixes.ndim != 2 or prefixes.shape[1] != 2 or len(prefixes) == 0:
        raise ValueError(f"`{name}` must have rows (sample, length), at least one; got shape {prefixes.shape}.")
    samples, lengths = prefixes.T
    bad = np.flatnonzero((samples < 0) | (samples >= len(offsets) - 1))
    if len(bad):
        raise ValueError(f"`{name}[{bad[0]}]` names sample {samples[bad[0]]} of {len(offsets) - 1}.")
    available = np.diff(offsets)[samples]
    bad = np.flatnonzero((lengths < 1) | (lengths > available))
    if len(bad):
        raise ValueError(
            f"`{name}[{bad[0]}]` has length {lengths[bad[0]]}, but sample {samples[bad[0]]} has "
            f"{available[bad[0]]} slices: lengths run from 1 to that."
        )
    return prefixes


def _all_pairs(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(n, dtype=np.int32), m), np.tile(np.arange(m, dtype=np.int32), n)


class _Block(NamedTuple):
    prefixes: np.ndarray  # which ones, by length
    span: tuple[int, int]  # of the slices of their samples


def _blocks(prefixes: np.ndarray, offsets: np.ndarray, slices: int, whole: bool) -> list[_Block]:
    """Prefixes of samples that span about so many slices; `whole` makes the span all slices."""
    by_sample = np.argsort(prefixes[:, 0], kind="stable")
    sample = prefixes[by_sample, 0]
    blocks, start = [], 0
    for stop in range(1, len(prefixes) + 1):
        if stop == len(prefixes) or offsets[sample[stop] + 1] - offsets[sample[start]] > slices:
            members = by_sample[start:stop]
            members = members[np.argsort(prefixes[members, 1], kind="stable")]
            span = (
                (0, int(offsets[-1])) if whole else (int(offsets[sample[start]]), int(offsets[sample[stop - 1] + 1]))
            )
            blocks.append(_Block(members, span))
            start = stop
    return blocks


class _Scratch:
    """
    Memory that one recursion after the other uses. Freed ones would stay with the allocator, in pieces of all sizes.
    """

    def __init__(self, cells: int):
        self.cells = cells
        # Of each diagonal there are views, which take more memory than the few numbers that it may have.
        self.diagonals = cells // 128 + 8
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # Indices may be wider for one block than for another.
        size, key = math.prod(shape), (name, dtype)
        if key not in self.buffers or len(self.buffers[key]) < size:
            self.buffers[key] = torch.empty(max(size, self.cells), dtype=dtype, device=device)
        return self.buffers[key][:size].view(shape)


def _log_kernels(
    squared_distances: torch.Tensor,
    row_start: np.ndarray,
    column_start: np.ndarray,
    n: np.ndarray,
    m: np.ndarray,
    totals: np.ndarray,
    delta: float,
    scratch: _Scratch,
) -> torch.Tensor:
    """
    log K of pairs, each of `n` slices from `row_start` on with `m` from `column_start` on, at the bandwidth of the total
    length given with it.
    """
    if len(n) == 0:
        return squared_distances.new_zeros(0)
    width = squared_distances.shape[1]
    flat, device = squared_distances.flatten(), squared_distances.device
    wide = _wide(flat.dtype, device)
    traced = flat.requires_grad and torch.is_grad_enabled()
    # Half the bytes of the indices, which are most of the work on small lengths.
    index_type, dtype = (torch.int32, np.int32) if flat.numel() < 1 << 30 else (torch.int64, np.int64)
    # K is symmetric, so the shorter sequence can always be the one whose index runs along a diagonal.
    shorter, longer = np.minimum(n, m), np.maximum(n, m)
    # Lengths of neighbours are close when the longer runs up and down in turn as the shorter grows.
    highest = int(longer.max())
    order = np.argsort(
        shorter.astype(dtype) * (highest + 1) + np.where(shorter % 2, longer, highest - longer), kind="stable"
    )
    take = (lambda *_: None) if traced else scratch

    def log_kernels(flat: torch.Tensor, chunk: slice) -> torch.Tensor:
        pairs = order[chunk]
        n_, m_ = shorter[pairs], longer[pairs]
        rows, columns = int(n_.max()), int(m_.max())
        corner = row_start[pairs].astype(dtype) * width + column_start[pairs]
        swap = n[pairs] > m[pairs]
        job = np.stack([corner, np.where(swap, 1, width), np.where(swap, width, 1)])
        job = torch.from_numpy(job).to(device, index_type)
        scale = 1 / (delta**2 * totals[pairs])
        lowest = ((n_ + m_ - 1) * (LARGEST_DISTANCE * scale + math.log(2))).max()
        linear = max(lowest, (rows + columns) * math.log(1 + math.sqrt(2))) < LOG_RANGE and wide == torch.float64
        scale = torch.as_tensor(scale, dtype=wide, device=device)
        first, sizes = _diagonals(rows, columns)
        # Where their cells begin, each diagonal with a row of zeros before and after it.
        begin = np.cumsum(sizes + 2) - sizes - 1
        last = n_ + m_ - 2
        result, before, start = scale.new_empty(len(pairs)), (), 0
        while start < len(sizes):
            stop = len(sizes)
            if not traced:
                fitting = np.searchsorted(np.cumsum(sizes[start:] + 2) * len(pairs), scratch.cells, side="right")
                stop = min(stop, start + max(1, int(fitting)), start + scratch.diagonals)
            # Long grids, and their many parts, would fill the cache.
            grid = _cells if stop - start == len(sizes) and rows * columns <= CACHED_CELLS else _cells.__wrapped__
            row, column = (torch.from_numpy(part).to(device, index_type) for part in grid(rows, columns, start, stop))
            shape = (len(row), len(pairs))
            # Cells outside a shorter pair read some other finite distance, and nothing of that pair depends on them.
            index = torch.mul(row, job[1], out=take("index", shape, index_type, device))
            index.addcmul_(column, job[2]).add_(job[0]).clamp_(max=len(flat) - 1)
            near = take("distance", shape, flat.dtype, device)
            near = torch.index_select(flat, 0, index.flatten(), out=None if traced else near.flatten()).view(shape)
            exponent = take("exponent", shape, wide, device)
            exponent = (near.to(wide) if traced else exponent.copy_(near)).mul_(scale)
            local = (_local_kernel if linear else _log_local_kernel)(exponent, take("local", shape, wide, device))
            # The exponents are done with.
            out = take("exponent", (int((sizes[start:stop] + 2).sum()), len(pairs)), wide, device)
            diagonals = _recursion(local, rows, columns, start, stop, before, linear, out)
            ended = np.flatnonzero((start <= last) & (last < stop))
            place = begin[last[ended]] - begin[start] + n_[ended] - first[last[ended]]
            values = diagonals[torch.from_numpy(place).to(device), torch.from_numpy(ended).to(device)]
            values = values.log() if linear else values
            if len(ended) == len(pairs):
                return values
            result[torch.from_numpy(ended).to(device)] = values
            last_two = (sizes[start:stop][-2:] + 2).tolist()
            done = diagonals[-sum(last_two) :].split(last_two)
            before = [*before, *(diagonal.clone() for diagonal in done)][-2:]
            start = stop
        return result

    chunks = _chunks(shorter[order], longer[order], scratch.cells, highest if traced else CHUNK_DIAGONALS)
    if traced:
        # Run again on the way back, so that no more than a chunk is ever held.
        values = [
            checkpoint(log_kernels, flat, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
        ]
        return torch.cat(values)[np.argsort(order)]
    values = flat.new_empty(len(n), dtype=wide)
    for chunk in chunks:
        values[order[chunk]] = log_kernels(flat, chunk)
    return values


def _wide(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Differences of large logarithms need float64, which MPS does not have."""
    return dtype if device.type == "mps" else torch.float64


def _chunks(n: np.ndarray, m: np.ndarray, cells: int, diagonals: int) -> Iterator[slice]:
    """
    Cuts pairs, sorted by lengths, into runs that are padded little, and of which so many diagonals have no more than so
    many cells (of a single pair they may).
    """

    def most(rows: int, columns: int) -> int:
        return max(1, cells // ((rows + 2) * min(columns + 2, diagonals)))

    # As integers of Python they would take more memory than all else that pairs have.
    change = np.append(np.flatnonzero((np.diff(n, prepend=0) != 0) | (np.diff(m, prepend=0) != 0)), len(n))
    start = used = rows = columns = 0
    for begin, end in itertools.pairwise(map(int, change)):
        wider, higher = max(rows, int(n[begin])), max(columns, int(m[begin]))
        area = int(n[begin] * m[begin]) * (end - begin)
        padded = wider * higher * (end - start)
        if begin > start and (
            end - start > most(wider, higher) or (padded > SMALL_CHUNK_CELLS and padded > PADDING * (used + area))
        ):
            yield from _pieces(start, begin, most(rows, columns))
            start, used, wider, higher = begin, 0, int(n[begin]), int(m[begin])
        rows, columns, used = wider, higher, used + area
    yield from _pieces(start, len(n), most(rows, columns))


def _pieces(start: int, stop: int, step: int) -> Iterator[slice]:
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


@functools.lru_cache(maxsize=4)
def _diagonals(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each anti-diagonal of a grid, and how many cells it has."""
    t = np.arange(rows + columns - 1, dtype=np.int32)
    first = np.maximum(0, t - columns + 1)
    return first, np.minimum(t, rows - 1) - first + 1


@functools.lru_cache(maxsize=16)
def _cells(rows: int, columns: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the cells of some anti-diagonals, of shape `(cells, 1)`."""
    first, sizes = (part[start:stop] for part in _diagonals(rows, columns))
    row = np.arange(sizes.sum(), dtype=np.int32)
    row -= np.repeat(np.cumsum(sizes, dtype=np.int32) - sizes - first, sizes)
    column = np.repeat(np.arange(start, stop, dtype=np.int32), sizes)
    column -= row
    return row[:, None], column[:, None]


def _local_kernel(exponent: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """s / (2 - s) for s = exp(-exponent), which is not kept."""
    return torch.add(exponent.new_tensor(-1), exponent.exp_(), alpha=2, out=out).reciprocal_()


def _log_local_kernel(exponent: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """log(s / (2 - s)) for s = exp(-exponent)."""
    if out is None:
        # Autograd needs the result of expm1.
        return -exponent - torch.log1p(-torch.expm1(-exponent))
    return torch.neg(exponent, out=out).expm1_().neg_().log1p_().add_(exponent).neg_()


def _recursion(
    local: torch.Tensor,
    rows: int,
    columns: int,
    start: int,
    stop: int,
    before: Sequence[torch.Tensor] = (),
    linear: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Theorem 1 in log space, or `linear`, one anti-diagonal at a time for all pairs together.

    `local` has shape `(cells, pairs)` and holds the anti-diagonals from `start` to `stop - 1`; `before` are the results for
    the (at most two) diagonals that come before. The result has a row of zeros (in log space) before and after the cells
    of each diagonal and is written to `out` if that is given, out of autograd's sight.
    """
    first, sizes = (part[:stop].tolist() for part in _diagonals(rows, columns))
    zero = 0.0 if linear else LOG_ZERO
    add, multiply = (torch.add, torch.mul) if linear else (torch.logaddexp, torch.add)
    done = [*before]
    if out is not None:
        done += out.fill_(zero).split([size + 2 for size in sizes[start:]])
    for t, current in enumerate(local.split(sizes[start:]), start):
        now, size = t - start + len(before), sizes[t]
        place = None if out is None else done[now][1:-1]
        if t > 0:
            up = first[t] - first[t - 1]
            kernels = add(done[now - 1][up : up + size], done[now - 1][up + 1 : up + 1 + size], out=place)
            if t > 1:
                corner = first[t] - first[t - 2]
                kernels = add(kernels, done[now - 2][corner : corner + size], out=place)
            current = multiply(current, kernels, out=place)
        if out is None:
            done.append(F.pad(current, (0, 0, 1, 1), value=zero))
        elif t == 0:
            place.copy_(current)
    return torch.cat(done) if out is None else out
