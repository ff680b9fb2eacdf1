"""Global alignment kernel between prefixes of packed sequences of slice embeddings, in Triton (forward only)."""

import torch
import triton
import triton.language as tl

from .pairs import log_kernels, squared_distances


__all__ = ["packed_alignment_kernel", "recursion"]


@triton.jit
def _recursion(
    phi,
    stride,
    row_start,
    row_length,
    column_start,
    column_length,
    result,
    inverse_square,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """
    One pair a program, one row of the first sequence a lane, one anti-diagonal a step.

    Every cell is a mantissa in [1, 2) and an exponent, so that no bandwidth and no length can underflow. With `OWN` a
    sequence meets itself, and the columns only name the length that its bandwidth is made for.
    """
    p = tl.program_id(0)
    q = tl.program_id(1)
    a = tl.load(row_start + p)
    n = tl.load(row_length + p).to(tl.int32)
    other = tl.load(column_length + q).to(tl.int32)
    if OWN:
        b = a
        m = n
    else:
        b = tl.load(column_start + q)
        m = other
    scale = inverse_square / (n + other).to(tl.float32)
    wanted = True
    if SYMMETRIC:
        wanted = q >= p
    steps = tl.where(wanted, n + m - 1, 0)

    never = -(1 << 29)
    i = tl.arange(0, BLOCK)
    above = tl.maximum(i - 1, 0)
    mantissa = tl.zeros((BLOCK,), tl.float32)
    exponent = tl.full((BLOCK,), never, tl.int32)
    corner = tl.where(i == 0, 1.0, 0.0)
    corner_exponent = tl.where(i == 0, 0, never)
    for t in range(0, steps):
        j = t - i
        inside = (i < n) & (j >= 0) & (j < m)
        x = tl.load(phi + (a + i) * stride + b + j, mask=inside, other=0.0) * scale
        # k = s / (2 - s) with s = exp(-x) = fraction * 2^whole
        power = -x * 1.4426950408889634
        whole = tl.floor(power + 0.5)
        fraction = tl.exp2(power - whole)
        s = fraction * tl.exp2(tl.maximum(whole, -126.0))
        local = fraction / (2.0 - s)

        up = tl.where(i == 0, 0.0, tl.gather(mantissa, above, 0))
        up_exponent = tl.where(i == 0, never, tl.gather(exponent, above, 0))
        largest = tl.maximum(tl.maximum(up_exponent, exponent), corner_exponent)
        total = mantissa * tl.exp2(tl.maximum(exponent - largest, -126).to(tl.float32))
        total += up * tl.exp2(tl.maximum(up_exponent - largest, -126).to(tl.float32))
        total += corner * tl.exp2(tl.maximum(corner_exponent - largest, -126).to(tl.float32))
        bits = (total * local).to(tl.int32, bitcast=True)
        mantissa = tl.where(inside, ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True), 0.0)
        exponent = tl.where(inside, largest + whole.to(tl.int32) + (bits >> 23) - 127, never)
        corner = up
        corner_exponent = up_exponent
    # The differences that normalise would lose digits in float32.
    last = tl.log(tl.sum(tl.where(i == n - 1, mantissa, 0.0), 0)).to(tl.float64)
    value = last + tl.sum(tl.where(i == n - 1, exponent, 0), 0).to(tl.float64) * 0.6931471805599453
    columns = tl.num_programs(1)
    tl.store(result + p * columns + q, value, mask=wanted)
    if SYMMETRIC:
        tl.store(result + q * columns + p, value, mask=wanted)


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

    Arguments and values are those of the compiled kernel `gak`. The recursion runs in float32 with exponents of its own,
    for float64 embeddings too. There is no backward pass.

    Returns:
        `torch.Tensor`: kernel values of shape `(P, P)` or `(P, Q)`, float32, or float64 for float64 embeddings.

    Raises:
        `NotImplementedError`: if a gradient is asked for.
        `ValueError`: if an option is unknown, or the tensors are refused: empty sequences, offsets that do not increase,
            a prefix longer than its sample, NaN, infinity or zeros in a slice, `delta` not positive.
    """
    if embeddings.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("The Triton kernel has no backward pass: use the PyTorch implementation.")
    if (modality is None) != (split is None):
        raise ValueError("`modality` and `split` go together: pass both for the triple kernel, or neither.")
    if split is not None and not 0 < split < embeddings.shape[1]:
        raise ValueError(f"`split` must lie between 1 and {embeddings.shape[1] - 1}, got {split}.")
    x = embeddings.detach()
    x = x if x.dtype == torch.float64 else x.float()
    distances = squared_distances(x, modality, split)
    result = recursion(distances, offsets, prefixes, other_prefixes, delta=delta, normalize=normalize).to(x.dtype)
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
            Squared distances between all slices, symmetric, between 0 and 4.
        offsets, prefixes, other_prefixes, delta, normalize:
            As for [`packed_alignment_kernel`].

    Returns:
        `torch.Tensor`: `log K` of shape `(P, P)` or `(P, Q)`, float64.
    """
    return log_kernels(_launch, distances, offsets, prefixes, other_prefixes, delta, normalize)


def _launch(distances, row_start, row_length, column_start, column_length, delta, own, symmetric):
    result = torch.empty(len(row_start), len(column_length), dtype=torch.float64, device=distances.device)
    block = triton.next_power_of_2(int(row_length.max()))
    _recursion[result.shape](
        *(distances, distances.stride(0), row_start, row_length, column_start, column_length, result, 1 / delta**2),
        BLOCK=block,
        OWN=own,
        SYMMETRIC=symmetric,
        num_warps=max(1, min(8, block // 32)),
    )
    return result
