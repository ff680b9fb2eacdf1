import math

import torch
import torch.nn.functional as F
from torch import nn


class ContrastiveLoss(nn.Module):
    r"""
    Tells the candidate that belongs to a query from all others of the batch (InfoNCE), in both directions.

    In [`SugarTrainer`] the query is a prefix of a sample and the candidate its next slice alone: an image and its own
    caption, a story so far and its next image; or what the columns `positives` and `negatives` give.

    $$L_c = -\frac{1}{2}\left(\underset{i, j \in P}{\mathrm{mean}} \log \frac{e^{s_{ij}}}{e^{s_{ij}} + \sum_{k \in N_i}
    e^{s_{ik}}} + \underset{i, j \in P}{\mathrm{mean}} \log \frac{e^{s_{ij}}}{e^{s_{ij}} + \sum_{k \in N_j} e^{s_{kj}}}
    \right), \quad s_{ij} = \cos(q_i, c_j) / \tau$$

    where `P` are the pairs that belong together and `N` those that do not.

    Args:
        temperature (`float`, *optional*, defaults to `0.1`): What cosines are divided by.
        learn_temperature (`bool`, *optional*, defaults to `False`):
            Whether it is a parameter, `log_temperature`, for a training loop that optimises it.

    Raises:
        `ValueError`: if `temperature` is not positive; on the call, if shapes do not fit together.

    References:
        - Representation Learning with Contrastive Predictive Coding: https://huggingface.co/papers/1807.03748
        - Guided negatives, GISTEmbed: https://huggingface.co/papers/2402.16829

    Requirements:
        1. At least one pair that belongs together and one that does not. Without the loss is 0 and so is its gradient.

    Inputs:
        | argument     | shape      | dtype        | content                                                        |
        |--------------|------------|--------------|----------------------------------------------------------------|
        | `queries`    | `(n, dim)` | any floating | normalised inside                                              |
        | `candidates` | `(m, dim)` | any floating | normalised inside                                              |
        | `positives`  | `(n, m)`   | bool         | which pairs belong together; several of a row, or none, may     |
        | `ignored`    | `(n, m)`   | bool         | which others are no negatives either: the teachers, for example, call them alike |

        The result is a scalar in float32 (float64 for float64 embeddings), computed outside autocast.

    Recommendations:
        - More candidates teach more: gather across devices, and see `matrix_batch_size`.

    Relations to other losses:

        - sentence-transformers' `MultipleNegativesRankingLoss` is its first direction, with one positive for each query.
        - [`StructureLoss`] grades all pairs; this one orders those that are known.

    Example:

    ```python
    >>> import torch
    >>> from hf_sugar.training import ContrastiveLoss

    >>> images, captions = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    >>> loss = ContrastiveLoss()(images, captions, torch.eye(4, dtype=torch.bool))
    >>> loss.backward()
    ```
    """

    def __init__(self, temperature: float = 0.1, learn_temperature: bool = False):
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        self.temperature = temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None

    def forward(
        self,
        queries: torch.Tensor,
        candidates: torch.Tensor,
        positives: torch.Tensor,
        ignored: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, a scalar, of the inputs that the table of the class describes."""
        shape = (len(queries), len(candidates))
        for name, mask in (("positives", positives), ("ignored", ignored)):
            if mask is not None and mask.shape != shape:
                raise ValueError(f"`{name}` must have shape {shape} (queries, candidates), got {tuple(mask.shape)}.")
        with torch.autocast(queries.device.type, enabled=False):
            if queries.dtype != torch.float64:
                queries, candidates = queries.float(), candidates.float()
            cosines = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T
            scores = cosines / (self.temperature if self.log_temperature is None else self.log_temperature.exp())
            negatives = ~positives if ignored is None else ~(positives | ignored)
            return (_info_nce(scores, positives, negatives) + _info_nce(scores.T, positives.T, negatives.T)) / 2


def _info_nce(scores: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """The mean over pairs that belong together, of those with something to be told from."""
    row, column = (positives & negatives.any(dim=1, keepdim=True)).nonzero(as_tuple=True)
    if not len(row):
        return (scores * 0).sum()
    others = scores.masked_fill(~negatives, -math.inf).logsumexp(dim=1)[row]
    return F.softplus(others - scores[row, column]).mean()
