"""The label matrix of the structure-induced loss."""

import itertools

import numpy as np
import torch

from .kernel import packed_alignment_kernel
from .slices import Slices, check_prefixes


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
        embeddings, offsets, prefixes, delta, modality, split:
            As for [`packed_alignment_kernel`]: the teachers' embeddings of a batch, and the selected positions.
        normalize (`bool` or `str`, *optional*, defaults to `"self+count"`):
            Normalisation of the kernel, see [`global_alignment_kernel`]. `None` keeps the kernel itself, of which
            everything above 1 is then clamped.
        label_kernel (`str`, *optional*, defaults to `"gak"`):
            `"gak"`, or `"mean"` for the average cosine over all pairs of slices, which ignores order (the ablation
            without the alignment kernel; `delta` and `normalize` then have no effect).

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
    with torch.autocast(embeddings.device.type, enabled=False):
        if label_kernel == "mean":
            labels = _mean_cosines(Slices(embeddings, offsets, modality, split), prefixes)
        else:
            log_labels = packed_alignment_kernel(
                *(embeddings, offsets, prefixes),
                **{"delta": delta, "normalize": normalize, "log": True, "modality": modality, "split": split},
            )
            labels = log_labels.exp()
            # The kernel of two single slices is s / (2 - s), from which their cosine, 1 + delta^2 log s, is had back.
            single = (prefixes[:, 1] == 1).nonzero()
            log_kernels = log_labels[single, single.T]
            log_s = log_kernels - torch.log1p(torch.expm1(log_kernels) / 2)
            labels[single, single.T] = 1 + delta**2 * log_s

    sample = prefixes[:, 0].to(labels.device)
    same = sample[:, None] == sample
    clamped = (labels > 1 + ROUNDING) & ~same
    share = clamped.sum().item() / max((~same).sum().item(), 1)
    return labels.clamp(max=1).masked_fill(same, 1.0).float(), share


def _mean_cosines(slices: Slices, prefixes: torch.Tensor) -> torch.Tensor:
    sample, length = check_prefixes("prefixes", prefixes, slices.offsets).T
    place, first = np.arange(slices.offsets[-1]), slices.offsets[sample, None]
    weights = ((place >= first) & (place < first + length[:, None])) / length[:, None]
    weights = torch.from_numpy(weights).to(slices.halves[0][0])
    labels = weights.new_zeros(len(prefixes), len(prefixes))
    for a, b in itertools.product(range(len(slices.spans)), repeat=2):
        # Half the squared distance of unit vectors is 1 minus their cosine.
        cosines = 1 - slices.distances(a, b) / 2
        labels += weights[:, slices.spans[a]] @ cosines @ weights[:, slices.spans[b]].T
    return labels
