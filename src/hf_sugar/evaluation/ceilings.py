"""What bounds the results of a model: the labels it was trained with, and chance."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..alignment import label_matrix
from ..teachers import TripleEncoder
from .tasks import EvaluationData, Item, evaluate_tasks, load_tasks


BLOCK = 128  # sequences in one label matrix, twice


def label_ceilings(
    data: EvaluationData,
    encoder: TripleEncoder,
    *,
    delta: float = 1.0,
    normalize: bool | str | None = "self+count",
    label_kernel: str = "gak",
    split: str = "test",
    on_bad_row: str = "error",
) -> dict[str, Any]:
    """
    What the labels of structure-induced training reach on each retrieval task: candidates are ranked by the label that a
    query and a candidate have. A model that fitted its labels perfectly would reach this.

    Args:
        data ([`EvaluationData`]): What to run on. Nothing is generated.
        encoder ([`TripleEncoder`]): The teachers.
        delta (`float`, *optional*, defaults to `1.0`), normalize (`bool` or `str`, *optional*, defaults to
            `"self+count"`), label_kernel (`str`, *optional*, defaults to `"gak"`):
            As in [`~alignment.label_matrix`].
        split (`str`, *optional*, defaults to `"test"`), on_bad_row (`str`, *optional*, defaults to `"error"`):
            As in [`~evaluation.load_tasks`], which also says what is refused.

    Returns:
        `dict[str, Any]`: as [`~evaluation.evaluate_tasks`] gives them.
    """
    embed = LabelEmbedder(encoder, delta=delta, normalize=normalize, label_kernel=label_kernel)
    return evaluate_tasks(data, embed, split=split, on_bad_row=on_bad_row)


def chance(data: EvaluationData, split: str = "test", on_bad_row: str = "error") -> dict[str, Any]:
    """
    What each task gives by chance, in percent, under the names of [`~evaluation.evaluate_tasks`]: recall of candidates in
    random order, Winoground's scores of random similarities. `"notes"` says of each task what its results are worth.

    Args:
        data ([`EvaluationData`]), split (`str`), on_bad_row (`str`): As in [`~evaluation.load_tasks`].
    """
    tasks = load_tasks(data, split, on_bad_row)
    results: dict[str, Any] = {f"{task.prefix}{name}": v for task in tasks for name, v in task.chance.items()}
    worth = {task.source.split()[0]: task.worth for task in tasks}
    return {**results, "notes": [f"{source}: {sentence}" for source, sentence in worth.items()]}


class LabelEmbedder:
    """
    Stands where an embedding function stands in a task: the product of the "embeddings" of some items with those of others
    holds their labels.

    Args:
        encoder ([`TripleEncoder`]): The teachers.
        settings: Of [`~alignment.label_matrix`].
    """

    def __init__(self, encoder: TripleEncoder, **settings: Any):
        self.encoder, self.settings = encoder, settings

    def __call__(self, items: Sequence[Item]) -> "LabelEmbeddings":
        sequences = []
        for start in range(0, len(items), 256):
            window = [items[n] for n in range(start, min(start + 256, len(items)))]
            window = [item if isinstance(item, list) else [item] for item in window]
            slices = {id(part): part for item in window for part in item}  # contexts of a story share theirs
            embeddings = dict(zip(slices, self.encoder.encode(list(slices.values())), strict=True))
            modality = dict(zip(slices, self.encoder.modality(list(slices.values())), strict=True))
            for item in window:
                keys = [id(part) for part in item]
                sequences.append(
                    (torch.stack([embeddings[k] for k in keys]), torch.stack([modality[k] for k in keys]))
                )
        return LabelEmbeddings(sequences, self.encoder.split, self.settings)


class LabelEmbeddings:
    """Teacher embeddings and modalities of the slices of each item; `a @ b.T` holds labels."""

    def __init__(
        self, sequences: list[tuple[torch.Tensor, torch.Tensor]], split: int | None, settings: dict[str, Any]
    ):
        self.sequences, self.split, self.settings = sequences, split, settings

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, chosen: slice) -> "LabelEmbeddings":
        return LabelEmbeddings(self.sequences[chosen], self.split, self.settings)

    @property
    def T(self) -> "LabelEmbeddings":
        return self

    def __matmul__(self, other: "LabelEmbeddings") -> np.ndarray:
        result = np.empty((len(self), len(other)), np.float32)
        for i in range(0, len(self), BLOCK):
            rows = self.sequences[i : i + BLOCK]
            for j in range(0, len(other), BLOCK):
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
