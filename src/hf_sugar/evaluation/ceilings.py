"""What bounds the results of a model: the labels it was trained with, and chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..alignment import IMAGE, TEXT, label_matrix
from ..teachers import TripleEncoder
from .tasks import Item, Task, run_tasks


BLOCK = 128  # sequences in one label matrix, twice
WORTH = {
    "image_text_data": "Images and texts: recall falls with the number of candidates, so that it compares models on this "
    "set alone; what the labels, the similarities of the teachers, miss, the structure loss cannot teach.",
    "interleaved_data": "Next images: the label of several slices with one image knows no order, and images of the context are most like "
    "it: what is found beyond the labels has another source than the structure loss.",
    "winoground_data": "Winoground scores: both captions have the same words, so that only their order tells the images apart; labels are the "
    "cosines of one caption and one image, the most that the structure loss can teach.",
    "generation_data": "Exact match: an answer counts if it is right word for word, so that a right one in other words is lost; labels "
    "have no part in it.",
}


def kernel_settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings of a training that its labels depend on, as [`label_ceilings`] takes them."""
    names = {"delta": "delta", "label_normalization": "normalize", "label_kernel": "label_kernel"}
    return {argument: training[name] for name, argument in names.items() if name in training}


def label_ceilings(
    tasks: Sequence[Task],
    encoder: TripleEncoder,
    *,
    delta: float = 1.0,
    normalize: bool | str | None = "self+count",
    label_kernel: str = "gak",
) -> dict[str, Any]:
    """
    What the labels of structure-induced training reach on each retrieval task: candidates are ranked by the label that a
    query and a candidate have. A model that fitted its labels perfectly would reach this, calibrated by block or not.

    Args:
        tasks (`list[Task]`): From [`~evaluation.load_tasks`]. Nothing is generated.
        encoder ([`TripleEncoder`]): The teachers.
        delta, normalize, label_kernel: As in [`~alignment.label_matrix`].

    Returns:
        `dict[str, Any]`: as [`~evaluation.evaluate_tasks`] gives them.
    """
    settings = {"delta": delta, "normalize": normalize, "label_kernel": label_kernel}

    def embed(items: Sequence[Item]) -> LabelledItems:
        sequences = []
        for start in tqdm(range(0, len(items), 256), "teachers", delay=5):
            window = [items[n] for n in range(start, min(start + 256, len(items)))]
            window = [item if isinstance(item, list) else [item] for item in window]
            slices = {id(part): part for item in window for part in item}  # contexts of a story share theirs
            numbers = {key: n for n, key in enumerate(slices)}
            embeddings = encoder.encode([*slices.values()])
            modality = torch.tensor([TEXT if isinstance(part, str) else IMAGE for part in slices.values()])
            for item in window:
                chosen = [numbers[id(part)] for part in item]
                sequences.append((embeddings[chosen], modality[chosen]))
        return LabelledItems(sequences, encoder.split, settings)

    return run_tasks(tasks, embed, None)


def chance(tasks: Sequence[Task]) -> dict[str, Any]:
    """What tasks from [`~evaluation.load_tasks`] give by chance, in percent, under the names of their results: recall of
    candidates in random order, Winoground's scores of random similarities. `"notes"` says what the results are worth."""
    notes = list(dict.fromkeys(WORTH[task.field] for task in tasks))
    return {**run_tasks(tasks, None, None), "notes": notes}


@dataclass
class LabelledItems:
    """Teacher embeddings and modalities of the slices of items, in the place of embeddings: `a @ b.T` holds labels."""

    sequences: list[tuple[torch.Tensor, torch.Tensor]]
    split: int | None
    settings: dict[str, Any]

    @property
    def T(self) -> "LabelledItems":
        return self

    def __getitem__(self, chosen: slice) -> "LabelledItems":
        return LabelledItems(self.sequences[chosen], self.split, self.settings)

    def __matmul__(self, other: "LabelledItems") -> np.ndarray:
        result = np.empty((len(self.sequences), len(other.sequences)), np.float32)
        for i in tqdm(range(0, len(self.sequences), BLOCK), "labels", delay=5):
            rows = self.sequences[i : i + BLOCK]
            for j in range(0, len(other.sequences), BLOCK):
                labels = self._labels(rows + other.sequences[j : j + BLOCK])
                result[i : i + BLOCK, j : j + BLOCK] = labels[: len(rows), len(rows) :]
        return result

    def _labels(self, sequences: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        embeddings, modality = (torch.cat(parts) for parts in zip(*sequences, strict=True))
        lengths = torch.tensor([len(codes) for _, codes in sequences])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        prefixes = torch.stack([torch.arange(len(lengths)), lengths], dim=1)
        triple = {} if self.split is None else {"modality": modality, "split": self.split}
        return label_matrix(embeddings, offsets, prefixes, **self.settings, **triple)[0]
