import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset, List, Value
from tqdm.auto import tqdm

from hf_sugar.data.checks import validate_rows
from hf_sugar.data.images import undecoded

from .collator import SugarCollator
from .config import SugarTrainingConfig


logger = logging.getLogger(__name__)


class RowFilter:
    """Tells rows that a [`SugarCollator`] takes from others, which it counts, in the workers of a data loader too. The
    teachers are not asked."""

    def __init__(self, collator: SugarCollator):
        self.collator = replace(collator, teachers=None, embed_slices=None)
        self.skipped = torch.zeros((), dtype=torch.long).share_memory_()

    def __call__(self, example: dict[str, Any]) -> bool:
        """Whether a row is good. Of those that are not the first few are logged."""
        try:
            self.collator([example])
        except ValueError as error:
            self.skipped += 1
            if self.skipped <= 5:
                logger.warning("Skipped: %s", error)
            return False
        return True

    def filter(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        """The good rows of a dataset (called `name` in the error if there is none): all are looked at now, those of a stream when
        they are asked for."""
        if isinstance(dataset, IterableDataset):
            return dataset.filter(self)
        good = [
            index for index, row in enumerate(tqdm(dataset, desc="looking for bad rows", unit=" rows")) if self(row)
        ]
        if not good:
            raise ValueError(f"{name}: none of {len(dataset)} rows can be used; the log names the first.")
        return dataset if len(good) == len(dataset) else dataset.select(good)


def each(dataset, name: str, function: Callable):
    """What a function makes of a dataset and its name, or of each in a `dict` of datasets; `None` stays."""
    if isinstance(dataset, dict):
        return {key: function(value, f"{name}[{key!r}]") for key, value in dataset.items()}
    return None if dataset is None else function(dataset, name)


def readable(dataset, name: str, validate: bool):
    """Refuse a dataset that cannot be trained on; leave its images undecoded, so that the collator can say which row an
    unreadable one is in."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}.")
    if validate and isinstance(dataset, Dataset):
        validate_rows(dataset, name)
    dataset = undecoded(dataset, name)
    for column in ("positives", "negatives"):
        kind = dataset.features.get(column, List(Value("string")))
        if kind not in (List(Value("string")), List(Value("null")), List(Image(decode=False))):
            raise ValueError(f"{name}: `{column}` is {kind}. Make it a list of texts or of images in each row.")
    return dataset


def require_pairs(args: SugarTrainingConfig, columns: list[str]) -> None:
    """Refuse columns that have no effect, and a contrastive loss without pairs."""
    beside = [name for name in ("positives", "negatives") if name in columns]
    if beside and args.discriminative_loss == "structure":
        raise ValueError(f"`{beside[0]}` are for the contrastive loss: remove them, or set `discriminative_loss`.")
    if args.discriminative_loss != "structure" and not args.singles_per_sample and "positives" not in beside:
        raise ValueError("The contrastive loss has no pairs: set `singles_per_sample`, or give the rows `positives`.")
