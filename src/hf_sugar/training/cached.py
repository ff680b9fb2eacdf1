"""Large label matrices in small memory: GradCache (https://huggingface.co/papers/2101.06983)."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .discriminative import ROW_COLUMNS, DiscriminativeLoss, discriminative_rows, pad_rows


@dataclass
class Compared:
    """A batch whose rows have been compared with those of other batches. Called with the rows computed again, it gives
    the loss of the whole matrix, and sends the rows' share of its gradient back to them."""

    loss: torch.Tensor
    found: dict[str, torch.Tensor]
    gradients: tuple[torch.Tensor, torch.Tensor]  # of embeddings and singles
    random_state: list[torch.Tensor]
    batches: int  # in the matrix

    def __call__(self, embeddings, teacher_embeddings, modality, singles, single_slices):
        share = (embeddings * self.gradients[0]).sum() + (singles * self.gradients[1]).sum()
        return self.loss + self.batches * (share - share.detach()), self.found

    @contextmanager
    def random_numbers(self):
        """Dropout draws what it drew the first time; the training's random numbers go on where they were."""
        cuda = self.gradients[0].device if self.gradients[0].is_cuda else None
        with torch.random.fork_rng([cuda] if cuda else []):
            torch.set_rng_state(self.random_state[0])
            if cuda:
                torch.cuda.set_rng_state(self.random_state[1], cuda)
            yield


def compare_ahead(
    model: torch.nn.Module, batches: list[dict[str, Any]], loss: DiscriminativeLoss, gather: bool
) -> None:
    """Compare the rows of several batches of [`SugarCollator`] with one another, and with `gather` with those of all
    processes: their embeddings are computed without gradients, a batch at a time, and each batch gets a [`Compared`]
    under `"compared"`, with which its own backward pass is that of the whole matrix. The model, as it is wrapped for
    several processes, is in training mode, and the batches on its device."""
    rows, states = [], []
    for batch in batches:
        device = batch["input_ids"].device
        states.append([torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])])
        with torch.no_grad():
            inputs = {name: value for name, value in batch.items() if name not in (*ROW_COLUMNS, "labels")}
            embeddings = model(**inputs, without_head=True)
        rows.append(discriminative_rows(*embeddings, *(batch.get(name) for name in ROW_COLUMNS)))
    leaves = [[embeddings.requires_grad_(), singles.requires_grad_()] for embeddings, _, _, singles, _ in rows]
    value, found = loss(*pad_rows(rows), training=True, gather=gather)
    value.backward()
    for batch, state, tensors in zip(batches, states, leaves):
        gradients = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in tensors)
        batch["compared"] = Compared(value.detach(), found, gradients, state, len(batches))
