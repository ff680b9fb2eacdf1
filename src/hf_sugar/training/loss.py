import torch
import torch.nn.functional as F
from torch import nn


class StructureLoss(nn.Module):
    r"""
    Teaches a set of embeddings the similarity structure that a label matrix prescribes.

    The cosine similarity of every pair of embeddings is pulled towards the label of that pair. Labels are graded: there
    are no positives and negatives, and nothing has to be mined. In Sugar the embeddings belong to positions inside
    interleaved image-text samples, and the labels are global alignment kernels of what precedes these positions, taken
    over frozen teachers; any other matrix of target similarities does as well.

    $$L_s = \frac{1}{n} \sum_{i=1}^{n} \sum_{j=1}^{n} \left(\cos(r_i, r_j) - M_l[i, j]\right)^2$$

    Args:
        reduction (`str`, *optional*, defaults to `"row_mean"`): What the sum over all pairs is divided by.

            - `"row_mean"`: `n`, as in the paper. A row's errors add up, so the loss, and with it the weight against
              the generative loss, grows with the number of positions in the batch.
            - `"mean"`: `n * n`. Does not depend on the number of positions.
            - `"sum"`: nothing.

    Raises:
        `ValueError`: if `reduction` is unknown; on the call, if shapes do not fit together.

    References:
        - Unified Generative and Discriminative Training for Multi-modal Large Language Models, Eq. 3:
          https://huggingface.co/papers/2411.00304

    Requirements:
        1. Labels on the scale of a cosine, at most 1. [`~hf_sugar.alignment.label_matrix`] makes them.
        2. At least two positions. With fewer the loss is 0 and so is its gradient.

    Inputs:
        | argument     | shape      | dtype        | content                                                     |
        |--------------|------------|--------------|-------------------------------------------------------------|
        | `embeddings` | `(n, dim)` | any floating | one row per position; normalised inside                     |
        | `labels`     | `(n, n)`   | any floating | target similarity of positions `i` and `j`; takes no gradient |

        The result is a scalar in float32 (float64 for float64 embeddings), computed outside autocast.

    Recommendations:
        - Structure lives between samples: draw positions from many samples, and gather across devices before the call.
          Gradient accumulation adds up several small matrices and does not make a large one.
        - Choose the weight against the generative loss together with the reduction and the number of positions.

    Relations to other losses:

        - sentence-transformers' `CosineSimilarityLoss` fits given pairs; this loss fits all pairs of a batch.
        - Contrastive losses (InfoNCE, `MultipleNegativesRankingLoss`) take every other sample for a negative. Here two
          samples that resemble each other are labelled so.
        - Relational distillation matches similarities of a student to those of one teacher on the same inputs; here the
          labels come from several teachers and from sequences of slices.

    Example:

    ```python
    >>> import torch
    >>> from hf_sugar import StructureLoss
    >>> from hf_sugar.alignment import label_matrix

    >>> _ = torch.manual_seed(0)
    >>> slices = torch.randn(7, 16)  # teacher embeddings of three samples with 2, 2 and 3 slices
    >>> offsets = torch.tensor([0, 2, 4, 7])
    >>> positions = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 1], [2, 3]])  # (sample, slices up to there)
    >>> labels, share_clamped = label_matrix(slices, offsets, positions)

    >>> embeddings = torch.randn(5, 8, requires_grad=True)  # what the model says at these positions
    >>> loss = StructureLoss()(embeddings, labels)
    >>> loss.backward()
    >>> embeddings.grad.shape
    torch.Size([5, 8])
    ```
    """

    def __init__(self, reduction: str = "row_mean"):
        super().__init__()
        if reduction not in ("row_mean", "mean", "sum"):
            raise ValueError(f"`reduction` must be 'row_mean', 'mean' or 'sum', got {reduction!r}.")
        self.reduction = reduction

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of the inputs that the table of the class describes."""
        if embeddings.ndim != 2:
            raise ValueError(f"`embeddings` must have shape (n, dim), got {tuple(embeddings.shape)}.")
        n = len(embeddings)
        if labels.shape != (n, n):
            raise ValueError(f"`labels` must have shape {(n, n)} for {n} embeddings, got {tuple(labels.shape)}.")
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            if n < 2:
                return (embeddings * 0).sum()
            embeddings = F.normalize(embeddings, dim=-1)
            loss = (embeddings @ embeddings.T - labels.detach().to(embeddings.dtype)).square().sum()
        return loss / {"row_mean": n, "mean": n * n, "sum": 1}[self.reduction]
