"""Host side of the backends that run one pair of prefixes per thread block. The same file in `gak` and `gak-triton`."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


SELF, COUNT = 1, 2
NORMALIZATIONS = {None: 0, False: 0, True: SELF, "self": SELF, "count": COUNT, "self+count": SELF | COUNT}
# Below, exponents of a kernel could leave the range that the compiled ones set aside for them.
SMALLEST_DELTA = 1e-3
# Below this squared distance, 2 - 2 cos loses too many digits in float32: the product is taken again in float64.
CLOSE = 0.1
# Most and fewest slices that are compared at a time, slices that are compared in float64, and pairs whose kernels are
# computed.
BLOCK, SMALL_BLOCK, CLOSE_BLOCK, PAIRS = 512, 64, 128, 1 << 17

Prefixes = tuple[torch.Tensor, torch.Tensor]  # where they start, and their lengths


def both(modality_x: torch.Tensor | None, modality_y: torch.Tensor | None) -> torch.Tensor | None:
    if (modality_x is None) != (modality_y is None):
        raise ValueError("`modality_x` and `modality_y` go together: pass both or neither.")
    return None if modality_x is None else torch.cat([modality_x, modality_y])


def _check_delta(delta: float):
    if not SMALLEST_DELTA <= delta < math.inf:
        raise ValueError(f"`delta` must be finite and at least {SMALLEST_DELTA}, got {delta}.")


def mode_of(normalize: bool | str | None) -> int:
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"`normalize` must be one of {list(NORMALIZATIONS)}, got {normalize!r}.")
    return NORMALIZATIONS[normalize]


def log_kernels(
    launch: Callable[..., torch.Tensor],
    launch_backward: Callable[..., torch.Tensor],
    distances: torch.Tensor,
    offsets: torch.Tensor,
    prefixes: torch.Tensor,
    other_prefixes: torch.Tensor | None,
    delta: float,
    normalize: bool | str | None,
) -> torch.Tensor:
    """
    `log K` of all pairs, normalised, in the dtype of `distances`.

    `launch(distances, row_start, row_length, column_start, column_length, delta, own, symmetric)` runs the recursion for
    every row with every column and returns `log K` in float64; with `own`, of every row with itself at the bandwidth it
    has with that column's length; with `symmetric`, only where the column does not come before the row.
    `launch_backward(gradient, distances, rows, columns, delta, own, expected_only)` gives the gradient by `distances`, or
    the expected alignment. Rows and columns are `(start, length, group)` of prefixes that lie side by side sample after
    sample; `group` says where each sample begins.
    """
    mode = mode_of(normalize)
    _check_delta(delta)
    if distances.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`distances` must be float32 or float64, got {distances.dtype}.")
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"`distances` must be square, got shape {tuple(distances.shape)}.")
    for name, index in {"offsets": offsets, "prefixes": prefixes, "other_prefixes": other_prefixes}.items():
        if index is not None and index.dtype != torch.int64:
            raise ValueError(f"`{name}` must be an int64 tensor, got {index.dtype}.")
    offsets = offsets.to(distances.device)
    if (
        offsets.ndim != 1
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != len(distances)
        or not (offsets[1:] > offsets[:-1]).all()
    ):
        raise ValueError(f"`offsets` must increase from 0 to {len(distances)}, the number of slices.")

    def side(name: str, rows: torch.Tensor) -> Prefixes:
        if rows.ndim != 2 or rows.shape[1] != 2 or len(rows) == 0:
            raise ValueError(f"`{name}` must have rows (sample, length), at least one; got shape {tuple(rows.shape)}.")
        sample, length = rows.to(distances.device).unbind(1)
        if not ((sample >= 0) & (sample < len(offsets) - 1)).all():
            raise ValueError(f"`{name}` names a sample that is not there.")
        if not ((length >= 1) & (length <= offsets[sample + 1] - offsets[sample])).all():
            raise ValueError(f"`{name}` has a length that its sample does not have.")
        return offsets[sample].contiguous(), length.contiguous()

    rows = side("prefixes", prefixes)
    columns = rows if other_prefixes is None else side("other_prefixes", other_prefixes)
    return _LogKernels.apply(distances, launch, launch_backward, rows, columns, delta, mode)


class _LogKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, distances, launch, launch_backward, rows, columns, delta, mode):
        ctx.save_for_backward(distances, *rows, *columns)
        ctx.symmetric = symmetric = rows is columns
        ctx.launch_backward, ctx.delta, ctx.mode = launch_backward, delta, mode
        phi = distances.float().contiguous()

        def half_self(side, partners):
            lengths, place = partners.unique(return_inverse=True)
            return launch(phi, *side, side[0], lengths, delta, True, False).div_(2)[:, place]

        result = distances.new_empty(len(rows[0]), len(columns[0]))
        # By length, so that the rows of a block meet the other side at few bandwidths.
        row_order = rows[1].argsort(stable=True)
        column_order = row_order if symmetric else torch.arange(result.shape[1], device=phi.device)
        step = max(1, PAIRS // result.shape[1])
        for first in range(0, len(result), step):
            i, j = row_order[first : first + step], column_order[first if symmetric else 0 :]
            a, b = tuple(part[i] for part in rows), tuple(part[j] for part in columns)
            values = launch(phi, *a, *b, delta, False, symmetric)
            if mode & SELF:
                row_self = half_self(a, b[1])
                values -= row_self
                values -= (row_self if symmetric and len(i) == len(j) else half_self(b, a[1])).T
            if mode & COUNT:
                values -= _log_counts(a[1], b[1], mode)
            if symmetric:
                # What lies below the diagonal was not computed.
                corner = values[:, : len(i)]
                corner.copy_(corner.triu() + corner.triu(1).T)
                result[j[:, None], i] = values.T.to(result.dtype)
            result[i[:, None], j] = values.to(result.dtype)
        return result

    @staticmethod
    def backward(ctx, gradient):
        distances, *prefixes = ctx.saved_tensors
        with torch.no_grad():
            phi, rows, columns = distances.float().contiguous(), prefixes[:2], prefixes[2:]
            launch = functools.partial(_launch_backward, ctx.launch_backward, phi, ctx.delta)
            if ctx.symmetric:
                # Only the upper triangle was computed; the kernels pass over zeros.
                result = launch(gradient.triu() + gradient.tril(-1).T, rows, rows, False)
                sides = [(gradient + gradient.T, rows, rows)]
            else:
                result = launch(gradient, rows, columns, False)
                sides = [(gradient, rows, columns), (gradient.T, columns, rows)]
            if ctx.mode & SELF:
                for shares, side, partners in sides:
                    lengths, place = partners[1].unique(return_inverse=True)
                    # A product, because adding up at an index comes in no fixed order on a GPU.
                    same_length = F.one_hot(place, len(lengths)).double()
                    parts = shares.split(max(1, PAIRS // shares.shape[1]))
                    shares = torch.cat([part.double() @ same_length for part in parts])
                    result += launch(shares / -2, side, (side[0], lengths), True)
        return NoSecondDerivative.apply(result.to(distances.dtype), distances, gradient), *[None] * 6


def _launch_backward(launch_backward, phi, delta, gradient, rows, columns, own):
    row_order, row_group = _groups(rows[0])
    if own:
        # A row meets itself: all its columns write to the same place.
        column_order = torch.arange(len(columns[1]), device=phi.device)
        column_group = column_order.new_tensor([0, len(columns[1])])
    else:
        column_order, column_group = _groups(columns[0])
    gradient = gradient[row_order[:, None], column_order].float()
    rows = *(part[row_order] for part in rows), row_group
    columns = columns[0] if own else columns[0][column_order], columns[1][column_order], column_group
    return launch_backward(gradient, phi, rows, columns, delta, own, False)


class NoSecondDerivative(torch.autograd.Function):
    """Hands on a gradient that depends on some tensors, and complains about its derivative, which would be left out."""

    @staticmethod
    def forward(ctx, gradient, *tensors):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *gradient):
        raise NotImplementedError(
            "The compiled alignment kernel has no second derivative: use the PyTorch implementation."
        )


def _groups(start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An order that puts the prefixes of a sample side by side, and where each sample begins in it."""
    order = start.argsort(stable=True)
    counts = start[order].unique_consecutive(return_counts=True)[1]
    return order, F.pad(counts.cumsum(0), (1, 0))


def expected_alignment(
    launch_backward: Callable[..., torch.Tensor], distances: torch.Tensor, delta: float
) -> torch.Tensor:
    """Shares of the kernel that pass through each cell, from squared distances of shape `(n, m)`."""
    _check_delta(delta)
    if not distances.numel():
        raise ValueError("Both sequences need at least one slice.")
    rows, columns = (
        tuple(torch.tensor(values, device=distances.device) for values in ([0], [length], [0, 1]))
        for length in distances.shape
    )
    weight = torch.ones(1, 1, device=distances.device)
    return launch_backward(weight, distances.float().contiguous(), rows, columns, delta, False, True)


def _log_counts(rows: torch.Tensor, columns: torch.Tensor, mode: int) -> torch.Tensor:
    """log of the numbers of alignments of some lengths with others, each divided by those with itself for both modes."""
    sides = [lengths.unique(return_inverse=True) for lengths in (rows, columns)]
    row_index, column_index = (lengths.cpu() - 1 for lengths, _ in sides)
    longest = int(max(row_index[-1], column_index[-1])) + 1
    table = _log_count_table(1 << (longest - 1).bit_length())
    counts = table[row_index][:, column_index]
    if mode & SELF:
        own = table.diagonal() / 2
        counts -= own[row_index, None] + own[column_index]
    return counts.to(rows.device)[sides[0][1]][:, sides[1][1]]


@torch.compiler.disable
@functools.lru_cache(maxsize=4)
def _log_count_table(longest: int) -> torch.Tensor:
    """log of the number of alignments of all lengths up to `longest`, one anti-diagonal after the other."""
    table = torch.zeros(longest, longest, dtype=torch.float64)
    for t in range(2, 2 * longest - 1):
        i = torch.arange(max(1, t - longest + 1), min(t, longest))
        j = t - i
        table[i, j] = torch.logaddexp(torch.logaddexp(table[i - 1, j], table[i, j - 1]), table[i - 1, j - 1])
    return table


def squared_distances(x: torch.Tensor, modality: torch.Tensor | None, split: int | None) -> torch.Tensor:
    """
    Squared distances of all slices, of the half that their modalities call for (Eq. 6): float32, or float64 for float64
    slices. Symmetric blocks are taken once. Not differentiable by itself: see [`squared_distances_backward`].
    """
    if x.ndim != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(f"`embeddings` must be a floating-point matrix, got {x.dtype} of shape {tuple(x.shape)}.")
    if (modality is None) != (split is None):
        raise ValueError("`modality` and `split` go together: pass both for the triple kernel, or neither.")
    if split is not None:
        if not 0 < split < x.shape[1]:
            raise ValueError(f"`split` must lie between 1 and {x.shape[1] - 1}, got {split}.")
        if modality.shape != x.shape[:1] or not ((modality == 0) | (modality == 1)).all():
            raise ValueError(f"`modality` must hold 0 (text) or 1 (image) for each of the {len(x)} slices.")
    halves, comparisons = _comparisons(x, modality, split)
    result = x.new_empty(len(x), len(x), dtype=halves[0].dtype)
    with torch.autocast(x.device.type, enabled=False):
        for half, rows, columns in comparisons:
            for place, i in enumerate(rows.split(half.block)):
                a = half.unit(i)
                for other, j in enumerate(columns.split(half.block)):
                    same = rows is columns and place == other
                    if rows is columns and other < place:
                        continue
                    block = _distances(a, a if same else half.unit(j), same)
                    result[j[:, None], i] = block.T
                    result[i[:, None], j] = block
    return result


def squared_distances_backward(
    gradient: torch.Tensor, x: torch.Tensor, modality: torch.Tensor | None, split: int | None
) -> torch.Tensor:
    """Gradient by the embeddings: that of 2 - 2 cos."""
    halves, comparisons = _comparisons(x, modality, split)
    with torch.autocast(x.device.type, enabled=False):
        towards = {half: torch.zeros_like(half.values, dtype=half.dtype) for half in halves}
        for half, rows, columns in comparisons:
            unit = half.unit(columns)
            for i in rows.split(BLOCK):
                weight = (gradient[i[:, None], columns] + gradient[columns[:, None], i].T).mul_(-2)
                towards[half][i] += weight @ unit
                if rows is not columns:
                    towards[half][columns] += weight.T @ half.unit(i)
        return torch.cat([half.backward(towards[half]) for half in halves], dim=1).to(x.dtype)


class _Half:
    """Some dimensions of all slices, L2-normalised a few at a time where no gradient needs them all."""

    def __init__(self, values: torch.Tensor):
        self.values = values
        self.dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        # A few even of some hundred slices: in float32, all would take twice the memory of narrow ones.
        self.block = min(BLOCK, max(SMALL_BLOCK, len(values) // 4))
        parts = values.split(self.block)
        # By the largest number first: squares could leave the range of the dtype. The direction is the same.
        largest = [torch.linalg.vector_norm(part, math.inf, dim=1, keepdim=True, dtype=self.dtype) for part in parts]
        self.largest = torch.cat(largest)
        bad = ~(self.largest.isfinite() & (self.largest > 0))
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(f"Row {row} of the packed embeddings holds NaN, infinity, or a half that is all zeros.")
        norms = [
            torch.linalg.vector_norm(part / large, dim=1, keepdim=True)
            for part, large in zip(parts, largest, strict=True)
        ]
        self.norm = torch.cat(norms)

    def unit(self, rows: torch.Tensor) -> torch.Tensor:
        return self.values[rows].to(self.dtype).div_(self.largest[rows]).div_(self.norm[rows])

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        unit = self.values / self.largest / self.norm
        return (gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit) / self.norm / self.largest


def _comparisons(
    x: torch.Tensor, modality: torch.Tensor | None, split: int | None
) -> tuple[list[_Half], list[tuple[_Half, torch.Tensor, torch.Tensor]]]:
    """The halves of the slices, and which half of which slices is compared with that of which others."""
    if split is None:
        half, everything = _Half(x), torch.arange(len(x), device=x.device)
        return [half], [(half, everything, everything)]
    text, image = ((modality == kind).nonzero()[:, 0].to(x.device) for kind in (0, 1))
    uni, cross = _Half(x[:, :split]), _Half(x[:, split:])
    return [uni, cross], [(uni, text, text), (uni, image, image), (cross, text, image)]


def _distances(a: torch.Tensor, b: torch.Tensor, same: bool) -> torch.Tensor:
    """Squared distances of unit vectors; `same` says that `a` and `b` are the same ones."""
    distances = torch.addmm(a.new_tensor(2.0), a, b.T, alpha=-2).clamp_(min=0)
    close = distances < CLOSE
    if same:
        distances.fill_diagonal_(0)
        close.fill_diagonal_(False)
    if a.dtype == torch.float32 and close.any():
        rows, columns = (close.any(dim=dim).nonzero()[:, 0].split(CLOSE_BLOCK) for dim in (1, 0))
        for i in rows:
            x = a[i].double()
            for j in columns:
                y, at = b[j].double(), (i[:, None], j)
                squares = [torch.linalg.vector_norm(side, dim=1).square() for side in (x, y)]
                exact = (x @ y.T).mul_(-2).add_(squares[0][:, None]).add_(squares[1])
                distances[at] = torch.where(close[at], exact.clamp_(min=0).float(), distances[at])
    return distances
