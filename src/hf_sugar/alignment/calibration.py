"""
Labels of one scale.

A label matrix mixes cosines of several teachers with kernels, each with a mean and spread of its own; a cosine of two
embeddings cannot tell them apart. Here every block of the matrix is brought to one mean and spread by an affine map. The
paper has no such thing; it belongs to this library.
"""

import torch

from .slices import IMAGE


# A block is a kind of pair: two images, two texts, an image and a text, and pairs of which one or neither is a single slice.
BLOCKS = ("image-image", "text-text", "image-text", "single-sequence", "sequence-sequence")
# What the labels of different samples in every block are brought to.
LABEL_MEAN = 0.0
LABEL_SPREAD = 0.2


def label_blocks(length: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
    """Numbers in `BLOCKS` of the pairs of `n` positions, of shape `(n, n)`. Each position is the end of `length` slices (of
    shape `(n,)`), of which the last one is of `modality` (of shape `(n,)`)."""
    single, image = length == 1, modality == IMAGE
    of_singles = torch.where(image[:, None] & image, 0, torch.where(image[:, None] | image, 2, 1))
    return torch.where(single[:, None] & single, of_singles, torch.where(single[:, None] | single, 3, 4))


def block_statistics(labels: torch.Tensor, blocks: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean and spread of the `chosen` labels (those of different samples) of each block, of shape `(5, 2)`: of a block with
    fewer than two, or whose labels are all the same, what [`calibrate`] leaves as it is. Arguments are of shape `(n, n)`."""
    statistics = labels.new_tensor([LABEL_MEAN, LABEL_SPREAD]).repeat(len(BLOCKS), 1)
    for block in range(len(BLOCKS)):
        values = labels[chosen & (blocks == block)].double()
        if len(values) > 1 and values.std() > 1e-4:
            statistics[block] = torch.stack([values.mean(), values.std()])
    return statistics


def calibrate(labels: torch.Tensor, blocks: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    """Labels with the mean and spread of every block, which `statistics` of [`block_statistics`] has, brought to `LABEL_MEAN`
    and `LABEL_SPREAD`, within -1 and 1."""
    mean, spread = statistics.to(labels)[blocks].unbind(-1)
    return (LABEL_MEAN + LABEL_SPREAD * (labels - mean) / spread).clamp(-1, 1)
