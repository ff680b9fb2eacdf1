"""The label matrix of the structure-induced loss."""

import numpy as np
import torch

from .kernel import _check_offsets, _check_prefixes, _Slices, packed_alignment_kernel


# A self-normalised kernel of equal sequences is 1 up to rounding; that is no clamping worth reporting.
ROUNDING = 1e-5


@torch.no_grad()
def label_matrix(
    embeddings: torch.Tensor,
    offsets: torch.Tensor,
    prefixes: torch.Tensor,
    *,
    delta: float = 1.0,
    normalize: bool | str | None = "self+count",
    label_kernel: str = "gak",
    modality: torch.Tensor | None = None,
    split: int | None = None,
) -> tuple[torch.Tensor, float]:
    """
    Similarities that the retrieval embeddings of the selected positions are trained to have.

    An entry is the global alignment kernel of two prefixes, except that

    - two single slices get their cosine (of the halves that the kernel compares), which may be negative;
    - two prefixes of the same sample get 1;
    - what exceeds 1 is clamped to 1.

    Args:
        embeddings (`torch.Tensor` of shape `(total_slices, dim)`):
            Teacher embeddings of all slices of the batch, one sample after the other.
        offsets (`torch.Tensor` of shape `(samples + 1,)`, int64):
            Where each sample begins in `embeddings`, and the total.
        prefixes (`torch.Tensor` of shape `(P, 2)`, int64):
            Selected positions as rows `(sample, length)`: the first `length >= 1` slices of that sample.
        delta (`float`, *optional*, defaults to `1.0`):
            Bandwidth of the kernel.
        normalize (`bool` or `str`, *optional*, defaults to `"self+count"`):
            Normalisation of the kernel, see [`global_alignment_kernel`]. `None` keeps the kernel itself, of which
            everything above 1 is then clamped.
        label_kernel (`str`, *optional*, defaults to `"gak"`):
            `"gak"`, or `"mean"` for the average cosine over all pairs of slices, which ignores order (the ablation
            without the alignment kernel; `delta` and `normalize` then have no effect).
        modality (`torch.Tensor` of shape `(total_slices,)`, int64, *optional*):
            0 for text and 1 for images; with `split`, switches on the triple kernel.
        split (`int`, *optional*):
            Number of dimensions of the uni-modal half of an embedding.

    Returns:
        `tuple[torch.Tensor, float]`: labels of shape `(P, P)` in float32, without gradient, and the share of entries
        between different samples that were clamped.

    Raises:
        `ValueError`: if `label_kernel` is unknown, or for the reasons of [`packed_alignment_kernel`].

    Sources: [Sugar](https://huggingface.co/papers/2411.00304), Eq. 4-6 and Theorem 3; the clamping belongs to this
    library.
    """
    if label_kernel not in ("gak", "mean"):
        raise ValueError(f"`label_kernel` must be 'gak' or 'mean', got {label_kernel!r}.")
    starts = _check_offsets(offsets, len(embeddings))
    samples, lengths = torch.from_numpy(_check_prefixes("prefixes", prefixes, starts)).to(embeddings.device).unbind(1)

    first = torch.from_numpy(starts).to(embeddings.device)[samples]

    with torch.autocast(embeddings.device.type, enabled=False):
        if label_kernel == "mean":
            slices = _Slices(embeddings, starts, modality, split)
            place = torch.arange(len(embeddings), device=embeddings.device)
            inside = (place >= first[:, None]) & (place < (first + lengths)[:, None])
            weights = inside.to(slices.dtype) / lengths[:, None]
            labels = weights @ slices.cosines(slice(None), slice(None)) @ weights.T
        else:
            labels = packed_alignment_kernel(
                embeddings, offsets, prefixes, delta=delta, normalize=normalize, modality=modality, split=split
            )
            single = (lengths == 1).nonzero().squeeze(1)
            picked = first[single]
            codes = modality[picked.to(modality.device)] if modality is not None else None
            slices = _Slices(embeddings[picked], np.arange(len(picked) + 1), codes, split)
            labels[single[:, None], single] = slices.cosines(slice(None), slice(None)).to(labels.dtype)

    same = samples[:, None] == samples[None, :]
    clamped = (labels > 1 + ROUNDING) & ~same
    share = clamped.sum().item() / max((~same).sum().item(), 1)
    return labels.clamp(max=1).masked_fill(same, 1.0).float(), share
