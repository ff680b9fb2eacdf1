"""Global alignment kernel between prefixes of packed sequences of slice embeddings, in Triton."""

import contextlib

import torch
import triton
import triton.language as tl

from . import pairs
from .pairs import log_kernels


__all__ = ["expected_alignment", "packed_alignment_kernel", "recursion"]

NEVER = tl.constexpr(-(1 << 29))  # exponent of a cell that no alignment reaches
# What the backward pass may hold beside the distances, or as much as they take, or one pair of the longest sequences.
WORKSPACE_BYTES = 1 << 24


@triton.jit
def _power_of_two(exponent):
    """Of exponents between -1000 and 1000, in float64."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _cell(x, i, inside, mantissa, exponent, corner, corner_exponent, BLOCK: tl.constexpr):
    """
    One anti-diagonal: (left + up + corner) * k with k = s / (2 - s), s = exp(-x).

    Returns the cells, those above them, and for the way back the shares that came from the left, from above and from the
    corner, and the derivative of log k by x.
    """
    # s = fraction * 2^whole
    power = -x * 1.4426950408889634
    whole = tl.floor(power + 0.5)
    fraction = tl.exp2(power - whole)
    s = fraction * _power_of_two(tl.maximum(whole, -1000.0).to(tl.int32))

    above = tl.maximum(i - 1, 0)
    up = tl.where(i == 0, 0.0, tl.gather(mantissa, above, 0))
    up_exponent = tl.where(i == 0, NEVER, tl.gather(exponent, above, 0))
    largest = tl.maximum(tl.maximum(up_exponent, exponent), corner_exponent)
    from_left = mantissa * _power_of_two(tl.maximum(exponent - largest, -1000))
    from_up = up * _power_of_two(tl.maximum(up_exponent - largest, -1000))
    from_corner = corner * _power_of_two(tl.maximum(corner_exponent - largest, -1000))
    total = (from_left + from_up) + from_corner
    bits = (total * (fraction / (2.0 - s))).to(tl.int64, bitcast=True)
    value = tl.where(inside, ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True), 0.0)
    value_exponent = tl.where(inside, largest + whole.to(tl.int32) + (bits >> 52).to(tl.int32) - 1023, NEVER)
    share = 1.0 / tl.where(inside, total, 1.0)
    slope = -2.0 / (2.0 - s)
    return value, value_exponent, up, up_exponent, from_left * share, from_up * share, from_corner * share, slope


@triton.jit
def _recursion(
    phi,
    stride,
    row_start,
    row_length,
    column_start,
    column_length,
    result,
    columns,
    inverse_square: tl.float64,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """
    One pair a program, one row of the first sequence a lane, one anti-diagonal a step.

    Every cell is a mantissa in [1, 2) and an exponent, so that no bandwidth and no length can underflow, in float64,
    because what a cell loses adds up. With `OWN` a sequence meets itself, and the columns only name the length that its
    bandwidth is made for.
    """
    program = tl.program_id(0).to(tl.int64)
    p = program // columns
    q = program % columns
    a = tl.load(row_start + p)
    n = tl.load(row_length + p).to(tl.int32)
    other = tl.load(column_length + q).to(tl.int32)
    if OWN:
        b = a
        m = n
    else:
        b = tl.load(column_start + q)
        m = other
    scale = inverse_square / (n + other).to(tl.float64)
    wanted = True
    if SYMMETRIC:
        wanted = q >= p
    steps = tl.where(wanted, n + m - 1, 0)

    i = tl.arange(0, BLOCK)
    mantissa = tl.zeros((BLOCK,), tl.float64)
    exponent = tl.full((BLOCK,), NEVER, tl.int32)
    corner = tl.where(i == 0, 1.0, 0.0).to(tl.float64)
    corner_exponent = tl.where(i == 0, 0, NEVER)
    for t in range(0, steps):
        j = t - i
        inside = (i < n) & (j >= 0) & (j < m)
        x = tl.load(phi + (a + i) * stride + b + j, mask=inside, other=0.0).to(tl.float64) * scale
        mantissa, exponent, corner, corner_exponent, _, _, _, _ = _cell(
            x, i, inside, mantissa, exponent, corner, corner_exponent, BLOCK
        )
    last = tl.log(tl.sum(tl.where(i == n - 1, mantissa, 0.0), 0))
    value = last + tl.sum(tl.where(i == n - 1, exponent, 0), 0).to(tl.float64) * 0.6931471805599453
    tl.store(result + program, value, mask=wanted)


@triton.jit
def _recursion_backward(
    upstream,
    phi,
    stride,
    row_start,
    row_length,
    row_group,
    column_start,
    column_length,
    column_group,
    columns,
    column_groups,
    jobs,
    workspace,
    cells,
    gradient,
    inverse_square: tl.float64,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    EXPECTED: tl.constexpr,
):
    """
    One pair of samples a program, which alone writes their block of `gradient`, pair of prefixes after pair of prefixes:
    the sums are the same on every run. With `EXPECTED` the expected alignment takes the place of the gradient.
    """
    kept = workspace + tl.program_id(0).to(tl.int64) * 4 * cells
    i = tl.arange(0, BLOCK)
    under = tl.minimum(i + 1, BLOCK - 1)
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        g = job // column_groups
        h = job % column_groups
        for p in range(tl.load(row_group + g), tl.load(row_group + g + 1)):
            for q in range(tl.load(column_group + h), tl.load(column_group + h + 1)):
                weight = tl.load(upstream + p * columns + q)
                a = tl.load(row_start + p)
                n = tl.load(row_length + p).to(tl.int32)
                other = tl.load(column_length + q).to(tl.int32)
                if OWN:
                    b = a
                    m = n
                else:
                    b = tl.load(column_start + q)
                    m = other
                scale = inverse_square / (n + other).to(tl.float64)
                steps = tl.where(weight == 0, 0, n + m - 1)

                mantissa = tl.zeros((BLOCK,), tl.float64)
                exponent = tl.full((BLOCK,), NEVER, tl.int32)
                corner = tl.where(i == 0, 1.0, 0.0).to(tl.float64)
                corner_exponent = tl.where(i == 0, 0, NEVER)
                for t in range(0, steps):
                    j = t - i
                    inside = (i < n) & (j >= 0) & (j < m)
                    x = tl.load(phi + (a + i) * stride + b + j, mask=inside, other=0.0).to(tl.float64) * scale
                    mantissa, exponent, corner, corner_exponent, from_left, from_up, from_corner, slope = _cell(
                        x, i, inside, mantissa, exponent, corner, corner_exponent, BLOCK
                    )
                    place = kept + t * BLOCK + i
                    tl.store(place, from_left.to(tl.float32), mask=inside)
                    tl.store(place + cells, from_up.to(tl.float32), mask=inside)
                    tl.store(place + 2 * cells, from_corner.to(tl.float32), mask=inside)
                    tl.store(place + 3 * cells, (slope * scale).to(tl.float32), mask=inside)
                tl.debug_barrier()

                # What a lane's last cell sends to the left, up and to the corner; `held` came for its next.
                left = tl.zeros((BLOCK,), tl.float32)
                up = tl.zeros((BLOCK,), tl.float32)
                diagonal = tl.zeros((BLOCK,), tl.float32)
                held = tl.zeros((BLOCK,), tl.float32)
                for back in range(0, steps):
                    t = steps - 1 - back
                    j = t - i
                    inside = (i < n) & (j >= 0) & (j < m)
                    below = tl.where(i == BLOCK - 1, 0.0, tl.gather(up, under, 0))
                    beside = tl.where(i == BLOCK - 1, 0.0, tl.gather(diagonal, under, 0))
                    expected = ((left + below) + held) + tl.where((i == n - 1) & (j == m - 1), 1.0, 0.0)
                    place = kept + t * BLOCK + i
                    left = expected * tl.load(place, mask=inside, other=0.0)
                    up = expected * tl.load(place + cells, mask=inside, other=0.0)
                    diagonal = expected * tl.load(place + 2 * cells, mask=inside, other=0.0)
                    held = beside
                    share = expected * weight
                    if not EXPECTED:
                        share *= tl.load(place + 3 * cells, mask=inside, other=0.0)
                    into = gradient + (a + i) * stride + b + j
                    tl.store(into, tl.load(into, mask=inside, other=0.0) + share, mask=inside)
                tl.debug_barrier()


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
) -> torch.Tensor:
    """
    Global alignment kernel between prefixes of packed samples.

    Arguments, values and gradients are those of the compiled kernel `gak`. Squared distances are rounded to float32, for
    float64 embeddings too; the recursion runs in float64. There is no second derivative.

    Returns:
        `torch.Tensor`: kernel values of shape `(P, P)` or `(P, Q)`, float32, or float64 for float64 embeddings.

    Raises:
        `ValueError`: if an option is unknown, or the tensors are refused: empty sequences, offsets that do not increase,
            a prefix longer than its sample, NaN, infinity or zeros in a slice, `delta` not positive.
    """
    result = recursion(
        _SquaredDistances.apply(embeddings, modality, split),
        *(offsets, prefixes, other_prefixes),
        delta=delta,
        normalize=normalize,
    )
    return result if log else result.exp()


def recursion(
    distances: torch.Tensor,
    offsets: torch.Tensor,
    prefixes: torch.Tensor,
    other_prefixes: torch.Tensor | None = None,
    *,
    delta: float = 1.0,
    normalize: bool | str | None = True,
) -> torch.Tensor:
    """
    Logarithm of the kernel from squared distances that are known already.

    Args:
        distances (`torch.Tensor` of shape `(total_slices, total_slices)`):
            Squared distances between all slices, float32 or float64, symmetric, between 0 and 4.
        offsets, prefixes, other_prefixes, delta, normalize:
            As for [`packed_alignment_kernel`].

    Returns:
        `torch.Tensor`: `log K` of shape `(P, P)` or `(P, Q)`, differentiable in `distances`.
    """
    return log_kernels(_launch, _launch_backward, distances, offsets, prefixes, other_prefixes, delta, normalize)


def expected_alignment(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    delta: float = 1.0,
    modality_x: torch.Tensor | None = None,
    modality_y: torch.Tensor | None = None,
    split: int | None = None,
) -> torch.Tensor:
    """
    The share of the kernel of two sequences that passes through each pair of slices.

    Arguments and values are those of the compiled kernel `gak`.

    Returns:
        `torch.Tensor`: probabilities of shape `(n, m)`, float32, 1 in the first and in the last cell.
    """
    modality = pairs.both(modality_x, modality_y)
    with torch.no_grad():
        distances = pairs.squared_distances(torch.cat([x, y]), modality, split)[: len(x), len(x) :]
        return pairs.expected_alignment(_launch_backward, distances, delta)


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, modality, split):
        ctx.save_for_backward(embeddings, modality)
        ctx.split = split
        return pairs.squared_distances(embeddings, modality, split)

    @staticmethod
    def backward(ctx, gradient):
        embeddings, modality = ctx.saved_tensors
        with torch.no_grad():
            result = pairs.squared_distances_backward(gradient, embeddings, modality, ctx.split)
        return pairs.NoSecondDerivative.apply(result, embeddings, gradient), None, None


def _launch(distances, row_start, row_length, column_start, column_length, delta, own, symmetric):
    result = torch.empty(len(row_start), len(column_length), dtype=torch.float64, device=distances.device)
    block = triton.next_power_of_2(int(row_length.max()))
    with _on(distances):
        _recursion[(result.numel(),)](
            *(distances, distances.stride(0), row_start, row_length, column_start, column_length),
            *(result, result.shape[1], 1 / delta**2),
            BLOCK=block,
            OWN=own,
            SYMMETRIC=symmetric,
            num_warps=max(1, min(8, block // 32)),
        )
    return result


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _launch_backward(gradient, distances, rows, columns, delta, own, expected_only):
    (row_start, row_length, row_group), (column_start, column_length, column_group) = rows, columns
    longest = int(row_length.max())
    block = triton.next_power_of_2(longest)
    cells = (longest + (longest if own else int(column_length.max())) - 1) * block
    column_groups = len(column_group) - 1
    jobs = (len(row_group) - 1) * column_groups
    programs = max(1, min(jobs, max(distances.nbytes, WORKSPACE_BYTES) // (16 * cells)))
    workspace = torch.empty(programs, 4, cells, device=distances.device)
    result = torch.zeros_like(distances)
    with _on(distances):
        _recursion_backward[(programs,)](
            *(gradient.contiguous(), distances, distances.stride(0)),
            *(row_start, row_length, row_group, column_start, column_length, column_group),
            *(gradient.shape[1], column_groups, jobs, workspace, cells, result, 1 / delta**2),
            BLOCK=block,
            OWN=own,
            EXPECTED=expected_only,
            num_warps=max(1, min(8, block // 32)),
        )
    return result
