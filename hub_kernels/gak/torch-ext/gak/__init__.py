"""Global alignment kernel between prefixes of packed sequences of slice embeddings, compiled."""

import torch

from . import pairs
from ._ops import add_op_namespace_prefix, ops
from .pairs import log_kernels


__all__ = ["expected_alignment", "packed_alignment_kernel", "recursion"]

# Of the CUDA backend, whose borders between strips live in shared memory.
LONGEST = 1024


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

    The op L2-normalises the slices (with `split`, each half on its own), so their scale does not matter. Inner products
    are taken once for every pair of slices, on CPUs a tile at a time; the recursion runs for every pair of prefixes in
    float64 with a bandwidth of its own. With gradients, and on CUDA, the whole matrix of squared distances is held.

    Args:
        embeddings (`torch.Tensor` of shape `(total_slices, dim)`):
            Slice embeddings of all samples, one sample after the other, in bfloat16, float16, float32 or float64.
        offsets (`torch.Tensor` of shape `(samples + 1,)`, int64):
            Where each sample begins in `embeddings`, and the total.
        prefixes (`torch.Tensor` of shape `(P, 2)`, int64):
            Rows `(sample, length)`: the first `length >= 1` slices of that sample.
        other_prefixes (`torch.Tensor` of shape `(Q, 2)`, int64, *optional*):
            Prefixes of the same samples to compare with. Without it `prefixes` are compared with themselves.
        delta (`float`, *optional*, defaults to `1.0`):
            Bandwidth: the pair of lengths `n` and `m` uses `sigma = delta * sqrt((n + m) / 2)`.
        normalize (`bool` or `str`, *optional*, defaults to `True`):
            `None` or `False`, `"self"` or `True`, `"count"`, `"self+count"`.
        log (`bool`, *optional*, defaults to `False`):
            Whether to return the logarithm, which cannot underflow.
        modality (`torch.Tensor` of shape `(total_slices,)`, int64, *optional*):
            0 for text and 1 for images; with `split`, switches on the triple kernel.
        split (`int`, *optional*):
            Number of dimensions of the first half of an embedding.

    Returns:
        `torch.Tensor`: kernel values of shape `(P, P)` or `(P, Q)`, float32, or float64 for float64 embeddings.

    Raises:
        `ValueError`: if an option is unknown or `modality` comes without `split`.
        `RuntimeError`: if the tensors are refused: empty sequences, offsets that do not increase, a prefix longer than
            its sample, NaN, infinity or zeros in a slice, a wrong dtype or device, `delta` not positive.

    Sources: [Sugar](https://huggingface.co/papers/2411.00304), Eq. 4-6 and Theorem 1.
    """
    mode = pairs.mode_of(normalize)
    if (modality is None) != (split is None):
        raise ValueError("`modality` and `split` go together: pass both for the triple kernel, or neither.")
    if embeddings.is_cuda:
        result = recursion(
            _squared_distances(embeddings, modality, split),
            *(offsets, prefixes, other_prefixes),
            delta=delta,
            normalize=normalize,
        )
        return result if log else result.exp()
    offsets, prefixes = offsets.contiguous(), prefixes.contiguous()
    other_prefixes = None if other_prefixes is None else other_prefixes.contiguous()
    modality = None if modality is None else modality.contiguous()
    if embeddings.requires_grad and torch.is_grad_enabled():
        distances = _squared_distances(embeddings, modality, split)
        result = ops.log_recursion(distances, offsets, prefixes, other_prefixes, delta, mode)
        return result if log else result.exp()
    result = ops.log_alignment(
        embeddings.detach().contiguous(), offsets, prefixes, other_prefixes, modality, split or 0, delta, mode
    )
    return result if log else result.exp_()


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
            Number of dimensions of the first half.

    Returns:
        `torch.Tensor`: probabilities of shape `(n, m)`, 1 in the first and in the last cell.
    """
    modality = pairs.both(modality_x, modality_y)
    with torch.no_grad():
        distances = pairs.squared_distances(torch.cat([x, y]), modality, split)[: len(x), len(x) :]
        if distances.is_cuda:
            return pairs.expected_alignment(_launch_backward, distances, delta)
        return ops.expected_alignment(distances.contiguous(), delta)


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
    if distances.is_cuda:
        return log_kernels(_launch, _launch_backward, distances, offsets, prefixes, other_prefixes, delta, normalize)
    offsets, prefixes = offsets.contiguous(), prefixes.contiguous()
    other_prefixes = None if other_prefixes is None else other_prefixes.contiguous()
    return ops.log_recursion(
        distances.contiguous(), offsets, prefixes, other_prefixes, delta, pairs.mode_of(normalize)
    )


@torch.library.custom_op(
    add_op_namespace_prefix("squared_distances"),
    mutates_args=(),
    schema="(Tensor embeddings, Tensor? modality, int? split) -> Tensor",
)
def _squared_distances(embeddings: torch.Tensor, modality: torch.Tensor | None, split: int | None) -> torch.Tensor:
    """An op of its own, because what it does depends on the values: torch.compile cannot look inside."""
    return pairs.squared_distances(embeddings, modality, split)


@_squared_distances.register_fake
def _(embeddings, modality, split):
    return embeddings.new_empty(len(embeddings), len(embeddings), dtype=_wide(embeddings))


@torch.library.custom_op(
    add_op_namespace_prefix("squared_distances_backward"),
    mutates_args=(),
    schema="(Tensor gradient, Tensor embeddings, Tensor? modality, int? split) -> Tensor",
)
def _squared_distances_backward(
    gradient: torch.Tensor, embeddings: torch.Tensor, modality: torch.Tensor | None, split: int | None
) -> torch.Tensor:
    return pairs.squared_distances_backward(gradient, embeddings, modality, split)


@_squared_distances_backward.register_fake
def _(gradient, embeddings, modality, split):
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format)


def _setup_distances(ctx, inputs, output):
    embeddings, modality, ctx.split = inputs
    ctx.save_for_backward(embeddings, modality)


def _distances_backward(ctx, gradient):
    embeddings, modality = ctx.saved_tensors
    return _squared_distances_backward(gradient, embeddings, modality, ctx.split), None, None


_squared_distances.register_autograd(_distances_backward, setup_context=_setup_distances)


def _launch(distances, row_start, row_length, column_start, column_length, delta, own, symmetric):
    _longest(row_length, column_length)
    return ops.log_pairs(distances, row_start, row_length, column_start, column_length, delta, own, symmetric)


def _launch_backward(gradient, distances, rows, columns, delta, own, expected_only):
    longest_row, longest_column = _longest(rows[1], columns[1])
    longest = longest_row, longest_row if own else longest_column
    gradient = gradient.contiguous()
    return ops.log_pairs_backward(gradient, distances, *rows, *columns, *longest, delta, own, expected_only)


def _longest(row_length, column_length):
    longest = int(row_length.max()), int(column_length.max())
    if max(longest) > LONGEST:
        raise NotImplementedError(f"The CUDA kernel takes sequences of at most {LONGEST} slices: use PyTorch.")
    return longest


def _wide(embeddings):
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


@torch.library.register_fake(add_op_namespace_prefix("log_alignment"))
def _(embeddings, offsets, prefixes, others, modality, split, delta, normalize):
    columns = prefixes if others is None else others
    return embeddings.new_empty(len(prefixes), len(columns), dtype=_wide(embeddings))


@torch.library.register_fake(add_op_namespace_prefix("log_recursion"))
def _(distances, offsets, prefixes, others, delta, normalize):
    return distances.new_empty(len(prefixes), len(prefixes if others is None else others))


@torch.library.register_fake(add_op_namespace_prefix("log_recursion_backward"))
def _(gradient, distances, offsets, prefixes, others, delta, normalize):
    return torch.empty_like(distances)


@torch.library.register_fake(add_op_namespace_prefix("log_pairs"))
def _(distances, row_start, row_length, column_start, column_length, delta, own, symmetric):
    return distances.new_empty(len(row_start), len(column_length), dtype=torch.float64)


@torch.library.register_fake(add_op_namespace_prefix("log_pairs_backward"))
def _(gradient, distances, *settings):
    return torch.empty_like(distances)


@torch.library.register_fake(add_op_namespace_prefix("expected_alignment"))
def _(distances, delta):
    return torch.empty_like(distances)


def _setup_context(ctx, inputs, output):
    distances, offsets, prefixes, others, ctx.delta, ctx.normalize = inputs
    ctx.save_for_backward(distances, offsets, prefixes, others)


def _backward(ctx, gradient):
    distances, offsets, prefixes, others = ctx.saved_tensors
    result = ops.log_recursion_backward(
        gradient.contiguous(), distances, offsets, prefixes, others, ctx.delta, ctx.normalize
    )
    return result, None, None, None, None, None


_squared_distances_backward.register_autograd(pairs.NoSecondDerivative.backward)
torch.library.register_autograd(add_op_namespace_prefix("log_recursion_backward"), pairs.NoSecondDerivative.backward)
torch.library.register_autograd(add_op_namespace_prefix("log_recursion"), _backward, setup_context=_setup_context)
