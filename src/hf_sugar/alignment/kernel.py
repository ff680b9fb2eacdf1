"""Global alignment kernel between sequences of slice embeddings, in PyTorch."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .selection import BACKENDS, compiled_kernel


logger = logging.getLogger(__name__)

TEXT = 0
IMAGE = 1

NORMALIZATIONS = (None, "self", "count", "self+count")

# A block is a run of samples whose slices share one Gram matrix, a chunk a set of pairs that share one recursion. They
# bound the memory (about 20 MB for 1536 dimensions), except that a single longer sequence is never cut.
BLOCK_SLICES = 1024
BLOCK_PREFIXES = 512
CHUNK_CELLS = 1 << 17
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
# many rows and columns at a time.
CLOSE, CLOSE_BLOCK = 0.1, 48


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
    offsets = _check_offsets(offsets, len(embeddings))
    symmetric = other_prefixes is None
    rows = _check_prefixes("prefixes", prefixes, offsets)
    columns = rows if symmetric else _check_prefixes("other_prefixes", other_prefixes, offsets)
    by_self = normalize in ("self", "self+count")

    compiled = compiled_kernel(embeddings.device.type, backend)
    if compiled is not None:
        _check_triple(embeddings, modality, split)
        try:
            with torch.autocast(embeddings.device.type, enabled=False):
                return compiled.packed_alignment_kernel(
                    embeddings,
                    torch.from_numpy(offsets),
                    torch.from_numpy(rows),
                    None if symmetric else torch.from_numpy(columns),
                    delta=delta,
                    normalize=normalize,
                    log=log,
                    modality=None if modality is None else modality.cpu().long(),
                    split=split,
                )
        except NotImplementedError as error:
            logger.debug("The PyTorch implementation takes over: %s", error)
        except (RuntimeError, ValueError):
            # The kernels refuse bad slices; this says in one way which.
            _Slices(embeddings, offsets, modality, split)
            raise

    with torch.autocast(embeddings.device.type, enabled=False):
        slices = _Slices(embeddings, offsets, modality, split)
        row_order, column_order = (np.argsort(p[:, 0], kind="stable") for p in (rows, columns))
        rows, columns = rows[row_order], columns[column_order]
        row_blocks, column_blocks = _blocks(rows, offsets), _blocks(columns, offsets)

        def self_kernels(prefixes: np.ndarray, squared_distances: torch.Tensor, partners: np.ndarray) -> torch.Tensor:
            lengths, inverse = np.unique(partners[:, 1], return_inverse=True)
            i, length = (index.ravel() for index in np.indices((len(prefixes), len(lengths))))
            totals = prefixes[i, 1] + lengths[length]
            table = _log_kernels(squared_distances, offsets, prefixes, prefixes, i, i, totals, delta)
            return table.view(len(prefixes), -1)[:, inverse]

        def own_distances(prefixes: np.ndarray) -> torch.Tensor:
            return slices.squared_distances(_span(prefixes, offsets), _span(prefixes, offsets))

        wide = _wide(slices.dtype, embeddings.device)
        result = torch.zeros(len(rows), len(columns), dtype=wide, device=embeddings.device)
        row_self = []
        for row_block in row_blocks:
            for column_block in column_blocks:
                if symmetric and column_block.start < row_block.start:
                    continue
                a, b = rows[row_block], columns[column_block]
                distances = slices.squared_distances(_span(a, offsets), _span(b, offsets))
                diagonal = symmetric and column_block == row_block
                if diagonal and by_self:
                    row_self.append(self_kernels(a, distances, columns))
                if diagonal:
                    i, j = np.triu_indices(len(a), k=1 if by_self else 0)
                else:
                    i, j = (index.ravel() for index in np.indices((len(a), len(b))))
                if len(i) == 0:
                    continue
                values = _log_kernels(distances, offsets, a, b, i, j, a[i, 1] + b[j, 1], delta)
                tile = result.new_zeros(len(a), len(b)).index_put(
                    (torch.as_tensor(i, device=result.device), torch.as_tensor(j, device=result.device)), values
                )
                if diagonal:
                    tile = tile + tile.triu(1).T
                elif symmetric:
                    result[column_block, row_block] = tile.T
                result[row_block, column_block] = tile

        if by_self and symmetric:
            row_self = torch.cat(row_self)
            result = result - (row_self + row_self.T) / 2
            # The diagonal was left out above: it is 1 by definition.
            result = result.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=result.device), 0.0)
        elif by_self:
            row_self = [self_kernels(rows[k], own_distances(rows[k]), columns) for k in row_blocks]
            column_self = [self_kernels(columns[k], own_distances(columns[k]), rows) for k in column_blocks]
            result = result - (torch.cat(row_self) + torch.cat(column_self).T) / 2
        if normalize in ("count", "self+count"):
            n, m = torch.from_numpy(rows[:, 1]), torch.from_numpy(columns[:, 1])
            count = log_delannoy(n[:, None], m[None, :])
            if normalize == "self+count":
                count = count - (log_delannoy(n, n)[:, None] + log_delannoy(m, m)[None, :]) / 2
            result = result - count.to(result)

        result = result[np.argsort(row_order)][:, np.argsort(column_order)]
        return (result if log else result.exp()).to(slices.dtype)


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
        order, _ = _diagonal_order(n, m)
        cells = _log_local_kernel(squared_distances / (delta**2 * (n + m))).reshape(-1, 1)[order]
        with torch.enable_grad():
            cells.requires_grad_()
            log_kernel = _recursion(cells, n, m)[-2].sum()
        visits = torch.autograd.grad(log_kernel, cells)[0]
        return torch.empty_like(visits).index_copy_(0, torch.from_numpy(order).to(x.device), visits).view(n, m)


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
    n, m = torch.minimum(n, m), torch.maximum(n, m)
    # Powers of two, so that growing lengths do not fill the cache.
    table = _log_delannoy_table(*(1 << (int(size.max()) - 1).bit_length() for size in (n, m)))
    return table[n - 1, m - 1]


@functools.lru_cache(maxsize=16)
def _log_delannoy_table(n: int, m: int) -> torch.Tensor:
    row = [1] * m
    table = [[0.0] * m]
    for _ in range(1, n):
        previous, row = row, [1]
        for j in range(1, m):
            row.append(row[-1] + previous[j] + previous[j - 1])
        table.append([math.log(count) for count in row])
    return torch.tensor(table, dtype=torch.float64)


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
        if split is None:
            halves = {"is all zeros and has no direction": embeddings}
        else:
            halves = {
                f"is all zeros in its first {split} dimensions": embeddings[:, :split],
                f"is all zeros after its first {split} dimensions": embeddings[:, split:],
            }
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
        return half, torch.linalg.vector_norm(half, dim=1, keepdim=True, dtype=self.dtype)

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
            return vectors[place].to(self.dtype) / norms[place]

        if self.modality is None:
            a = unit(places[0], 0)
            return compare(a, a if same else unit(places[1], 0), same)
        # Each of the four kinds of pairs needs one half of the embeddings only.
        result = self.halves[0][1].new_empty(*map(len, places))
        for code, other in ((TEXT, TEXT), (IMAGE, IMAGE), (TEXT, IMAGE), (IMAGE, TEXT)):
            if same and (code, other) == (IMAGE, TEXT):
                break
            half = 0 if code == other else 1
            i, j = (np.flatnonzero(self.modality[p] == c) for p, c in zip(places, (code, other), strict=True))
            a = unit(places[0][i], half)
            alike = same and half == 0
            values = compare(a, a if alike else unit(places[1][j], half), alike)
            result[i[:, None], j] = values
            if same and half == 1:
                result[j[:, None], i] = values.T
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
            rows, columns = (close.any(dim=dim).nonzero()[:, 0].split(CLOSE_BLOCK) for dim in (1, 0))
            for i in rows:
                x = a[i].to(device).double()
                for j in columns:
                    y, at = b[j].to(device).double(), (i[:, None], j)
                    squares = [torch.linalg.vector_norm(side, dim=1).square() for side in (x, y)]
                    exact = (x @ y.T).mul_(-2).add_(squares[0][:, None]).add_(squares[1])
                    distances[at] = torch.where(close[at], exact.clamp_(min=0).to(distances), distances[at])
    return distances


def _check_embeddings(embeddings: torch.Tensor):
    if embeddings.ndim != 2 or not embeddings.is_floating_point() or embeddings.shape[1] == 0:
        raise ValueError(
            f"`embeddings` must have shape (total_slices, dim) and a floating-point dtype; got "
            f"{tuple(embeddings.shape)} of {embeddings.dtype}."
        )


def _integers(name: str, tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {tensor.dtype}.")
    return tensor.cpu().long().contiguous().numpy()


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
    offsets = _integers("offsets", offsets)
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"`offsets` must be one-dimensional and run from 0 to {total}, the number of slices.")
    empty = np.flatnonzero(np.diff(offsets) < 1)
    if len(empty):
        raise ValueError(f"`offsets` must increase, but sequence {empty[0]} is empty: every sample needs a slice.")
    return offsets


def _check_prefixes(name: str, prefixes: torch.Tensor, offsets: np.ndarray) -> np.ndarray:
    prefixes = _integers(name, prefixes)
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


def _blocks(prefixes: np.ndarray, offsets: np.ndarray) -> list[slice]:
    """Cuts prefixes that are sorted by sample into runs that span few slices."""
    blocks, start = [], 0
    for stop in range(1, len(prefixes) + 1):
        full = stop == len(prefixes) or (
            offsets[prefixes[stop, 0] + 1] - offsets[prefixes[start, 0]] > BLOCK_SLICES
            or stop - start == BLOCK_PREFIXES
        )
        if full:
            blocks.append(slice(start, stop))
            start = stop
    return blocks


def _span(prefixes: np.ndarray, offsets: np.ndarray) -> slice:
    """All slices of the samples of prefixes that are sorted by sample."""
    return slice(offsets[prefixes[0, 0]], offsets[prefixes[-1, 0] + 1])


def _log_kernels(
    squared_distances: torch.Tensor,
    offsets: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    totals: np.ndarray,
    delta: float,
) -> torch.Tensor:
    """log K of the pairs `(a[i], b[j])`, each at the bandwidth of the total length given with it."""
    width = squared_distances.shape[1]
    flat, device = squared_distances.flatten(), squared_distances.device
    row_start, column_start = offsets[a[0, 0]], offsets[b[0, 0]]

    n, m = a[i, 1], b[j, 1]
    corner = (offsets[a[i, 0]] - row_start) * width + offsets[b[j, 0]] - column_start
    # K is symmetric, so the shorter sequence can always be the one whose index runs along a diagonal.
    swap = n > m
    down, right = np.where(swap, 1, width), np.where(swap, width, 1)
    n, m = np.minimum(n, m), np.maximum(n, m)
    # Lengths of neighbours are close when m runs up and down in turn as n grows.
    order = np.lexsort((np.where(n % 2, m, -m), n))
    jobs = np.stack([n, m, corner, down, right])[:, order]
    # Half the bytes of the indices, which are most of the work on small lengths.
    index_type = torch.int32 if flat.numel() < 1 << 30 else torch.int64
    wide = _wide(flat.dtype, device)
    scale = torch.as_tensor(1 / (delta**2 * totals[order]), dtype=wide, device=device)

    def log_kernels(flat: torch.Tensor, chunk: slice) -> torch.Tensor:
        rows, columns = int(jobs[0, chunk].max()), int(jobs[1, chunk].max())
        cells, position = _diagonal_order(rows, columns)
        job = torch.from_numpy(jobs[2:, chunk]).to(device, index_type)
        row, column = (torch.from_numpy(part).to(device, index_type)[:, None] for part in divmod(cells, columns))
        # Cells outside a shorter pair read some other finite distance, and nothing of that pair depends on them.
        index = (row * job[1]).addcmul_(column, job[2]).add_(job[0]).clamp_(max=len(flat) - 1)
        exponent = flat.index_select(0, index.flatten()).view_as(index).to(wide) * scale[chunk]
        del index
        steps = jobs[0, chunk] + jobs[1, chunk] - 1
        # Past the rows of zeros of every diagonal before.
        last = torch.from_numpy(position[jobs[0, chunk] - 1, jobs[1, chunk] - 1] + 2 * steps - 1).to(device)
        lowest = (steps * (LARGEST_DISTANCE / (delta**2 * totals[order][chunk]) + math.log(2))).max()
        highest = (rows + columns) * math.log(1 + math.sqrt(2))
        if max(lowest, highest) < LOG_RANGE and wide == torch.float64:
            similarity = exponent.neg_().exp_()
            kernels = _recursion(similarity / (2 - similarity), rows, columns, linear=True)
            return kernels.gather(0, last[None]).squeeze(0).log()
        return _recursion(_log_local_kernel(exponent), rows, columns).gather(0, last[None]).squeeze(0)

    chunks = _chunks(jobs[0], jobs[1])
    if flat.requires_grad and torch.is_grad_enabled():
        # Run again on the way back, so that no more than a chunk is ever held.
        values = [
            checkpoint(log_kernels, flat, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
        ]
    else:
        values = [log_kernels(flat, chunk) for chunk in chunks]
    return torch.cat(values)[np.argsort(order)]


def _wide(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Differences of large logarithms need float64, which MPS does not have."""
    return dtype if device.type == "mps" else torch.float64


def _chunks(n: np.ndarray, m: np.ndarray) -> Iterator[slice]:
    """Cuts pairs, sorted by lengths, into runs that are padded little and fit in memory."""
    change = np.flatnonzero(np.diff(n, prepend=0) | np.diff(m, prepend=0)).tolist()
    start = used = rows = columns = 0
    for begin, end in zip(change, [*change[1:], len(n)], strict=True):
        wider, higher = max(rows, int(n[begin])), max(columns, int(m[begin]))
        cells = int(n[begin] * m[begin]) * (end - begin)
        padded = wider * higher * (end - start)
        if begin > start and (
            padded > CHUNK_CELLS or (padded > SMALL_CHUNK_CELLS and padded > PADDING * (used + cells))
        ):
            yield from _pieces(start, begin, rows * columns)
            start, used, wider, higher = begin, 0, int(n[begin]), int(m[begin])
        rows, columns, used = wider, higher, used + cells
    yield from _pieces(start, len(n), rows * columns)


def _pieces(start: int, stop: int, cells: int) -> Iterator[slice]:
    step = max(1, CHUNK_CELLS // cells)
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


@functools.lru_cache(maxsize=16)
def _diagonal_order(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of an (n, m) grid anti-diagonal by anti-diagonal, and where each cell stands in that order."""
    diagonal = np.arange(n)[:, None] + np.arange(m)
    order = np.argsort(diagonal, axis=None, kind="stable")
    position = np.empty_like(order)
    position[order] = np.arange(n * m)
    return order, position.reshape(n, m)


def _log_local_kernel(exponent: torch.Tensor) -> torch.Tensor:
    """log(s / (2 - s)) for s = exp(-exponent)."""
    return -exponent - torch.log1p(-torch.expm1(-exponent))


def _recursion(local: torch.Tensor, n: int, m: int, linear: bool = False) -> torch.Tensor:
    """
    Theorem 1 in log space, or `linear`, one anti-diagonal at a time for all pairs together.

    `local` has shape `(n * m, pairs)`, cells in the order of `_diagonal_order`. The result has a row of zeros (in log
    space) before and after the cells of each diagonal: the kernel of whole sequences is its last row but one.
    """
    first = [max(0, t - m + 1) for t in range(n + m - 1)]
    sizes = [min(t, n - 1) - first[t] + 1 for t in range(n + m - 1)]
    diagonals = local.split(sizes)
    zero = 0.0 if linear else LOG_ZERO
    add, multiply = (torch.add, torch.mul) if linear else (torch.logaddexp, torch.add)
    # Where autograd looks on, nothing can be written in place.
    traced = local.requires_grad and torch.is_grad_enabled()
    result = None if traced else local.new_full((n * m + 2 * len(sizes), local.shape[1]), zero)
    done = [] if traced else result.split([size + 2 for size in sizes])
    for t, (current, size) in enumerate(zip(diagonals, sizes, strict=True)):
        place = None if traced else done[t][1:-1]
        if t > 0:
            up = first[t] - first[t - 1]
            kernels = add(done[t - 1][up : up + size], done[t - 1][up + 1 : up + 1 + size], out=place)
            if t > 1:
                corner = first[t] - first[t - 2]
                kernels = add(kernels, done[t - 2][corner : corner + size], out=place)
            current = multiply(current, kernels, out=place)
        if traced:
            done.append(F.pad(current, (0, 0, 1, 1), value=zero))
        elif t == 0:
            place.copy_(current)
    return torch.cat(done) if traced else result
