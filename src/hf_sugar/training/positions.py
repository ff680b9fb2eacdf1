"""Which positions of a batch the structure loss compares, and what their label matrix is."""

import torch

from hf_sugar.alignment import label_matrix

from .config import SugarTrainingConfig


def draw_positions(modality: torch.Tensor, count: int, spread: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Positions of every sample, each the end of a slice.

    Args:
        modality (`torch.LongTensor` of shape `(samples, slices)`):
            -1 where a sample has fewer slices.
        count (`int`):
            How many of each sample; one with fewer slices gives all.
        spread (`bool`, *optional*, defaults to `False`):
            Whether they are spread evenly, the last slice among them, rather than drawn at random.

    Returns:
        `tuple[torch.LongTensor, torch.LongTensor]`: sample and slice of each position.
    """
    present = modality >= 0
    if spread:
        slices = present.sum(dim=1, keepdim=True)
        share = torch.arange(modality.shape[1] + 1, device=modality.device) * slices.clamp(max=count)
        drawn = (share // slices.clamp(min=1)).diff(dim=1) > 0
    else:  # the largest random numbers of each row, absent slices last
        order = torch.rand(modality.shape, device=modality.device).masked_fill(~present, -1)
        drawn = order.argsort(dim=1, descending=True).argsort(dim=1) < count
    return (drawn & present).nonzero(as_tuple=True)


def position_labels(
    prefixes: torch.Tensor,
    teacher_embeddings: torch.Tensor,
    modality: torch.Tensor,
    args: SugarTrainingConfig,
    split: int | None = None,
) -> tuple[torch.Tensor, float]:
    """
    Label matrix of positions.

    Args:
        prefixes (`torch.LongTensor` of shape `(n, 2)`):
            Sample of each position, and how many of its slices lead up to there.
        teacher_embeddings (`torch.Tensor` of shape `(samples, slices, dim)`):
            What the teachers say of the slices.
        modality (`torch.LongTensor` of shape `(samples, slices)`):
            Modality of the slices, -1 where a sample has fewer. A sample may have none, and then no position.
        args ([`SugarTrainingConfig`]):
            Kernel, bandwidth and normalisation.
        split (`int`, *optional*):
            As in [`~hf_sugar.alignment.label_matrix`].

    Returns:
        `tuple[torch.Tensor, float]`: labels `(n, n)` and the share of them that was clamped.
    """
    present = modality >= 0
    counts = present.sum(dim=1)
    # the labels know only the samples that have slices
    prefixes = torch.stack([(counts > 0).cumsum(0)[prefixes[:, 0]] - 1, prefixes[:, 1]], dim=1)
    offsets = torch.cat([counts.new_zeros(1), counts[counts > 0].cumsum(0)])
    return label_matrix(
        teacher_embeddings[present],
        offsets,
        prefixes,
        delta=args.delta,
        normalize=None if args.label_normalization == "none" else args.label_normalization,
        label_kernel=args.label_kernel,
        modality=None if split is None else modality[present],
        split=split,
    )
