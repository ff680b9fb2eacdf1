"""The labels of positions, and what is measured of them once over the data."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from hf_sugar.alignment import label_matrix
from hf_sugar.alignment.calibration import BLOCKS, block_statistics, label_blocks
from hf_sugar.files import replacing

from .config import LabelSettings


# In a directory of teacher embeddings: mean and spread of each block, by what they depend on.
STATISTICS_FILE = "label_statistics.json"
MEASURED_ROWS = 256


def draw_positions(
    modality: torch.Tensor, count: int, spread: bool = False, wanted: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample and slice of `count` positions of every sample, each the end of a slice, or of all that it has: at random, or
    `spread` evenly with the last slice among them. `modality` is of shape `(samples, slices)`, -1 where a sample has fewer;
    the slices `wanted`, of the same shape, come first, because they have a partner in the batch."""
    present = modality >= 0
    if spread:
        slices = present.sum(dim=1, keepdim=True)
        share = torch.arange(modality.shape[1] + 1, device=modality.device) * slices.clamp(max=count)
        drawn = (share // slices.clamp(min=1)).diff(dim=1) > 0
        drawn = drawn if wanted is None else drawn | wanted
    else:  # the largest random numbers of each row, absent slices last
        order = torch.rand(modality.shape, device=modality.device)
        order = (order if wanted is None else order + wanted).masked_fill(~present, -1)
        drawn = order.argsort(dim=1, descending=True).argsort(dim=1) < count
    return (drawn & present).nonzero(as_tuple=True)


def span_labels(
    spans: torch.Tensor,
    teacher_embeddings: torch.Tensor,
    modality: torch.Tensor,
    settings: LabelSettings,
    split: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """
    What the teachers say of positions, from their embeddings `(samples, slices, dim)` of slices and the `modality` of these
    `(samples, slices)`, -1 where a sample has fewer; kernel, bandwidth, normalisation and `split` as in
    [`~alignment.label_matrix`]. `spans` `(n, 3)` are the sample of each position, its first slice and the one after its last:
    `(sample, 0, length)` for a prefix, `(sample, slice, slice + 1)` for a slice that stands alone.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, float]`: labels `(n, n)`, in which a sequence is 1 to its own prefixes but not yet
        to its slices alone; block of each, see [`~alignment.calibration.label_blocks`]; the share that was clamped.
    """
    if not len(spans):
        return spans.new_zeros(0, 0, dtype=torch.float), spans.new_zeros(0, 0), 0.0
    sample, first, end = spans.T
    present = modality >= 0
    counts = present.sum(dim=1)
    # a slice that stands alone is a sequence of its own, behind the samples that have slices
    alone = first > 0
    sequence = torch.where(alone, (counts > 0).sum() + alone.cumsum(0) - 1, (counts > 0).cumsum(0)[sample] - 1)
    lengths = torch.cat([counts[counts > 0], counts.new_ones(int(alone.sum()))])
    kinds = torch.cat([modality[present], modality[sample[alone], first[alone]]])
    labels, clamped = label_matrix(
        torch.cat([teacher_embeddings[present], teacher_embeddings[sample[alone], first[alone]]]),
        torch.cat([counts.new_zeros(1), lengths.cumsum(0)]),
        torch.stack([sequence, end - first], dim=1),
        delta=settings.delta,
        normalize=settings.label_normalization,
        label_kernel=settings.label_kernel,
        modality=None if split is None else kinds,
        split=split,
    )
    return labels, label_blocks(end - first, modality[sample, end - 1]), clamped


def label_statistics(
    dataset: Dataset | IterableDataset,
    collator: Callable,
    settings: LabelSettings,
    split: int | None,
    cache_dir: str | os.PathLike | None = None,
    store_rows: int | None = None,
) -> torch.Tensor:
    """
    Mean and spread of each block of the label matrix of the data: see [`~alignment.calibration.block_statistics`].

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The rows to train on.
        collator ([`SugarCollator`]): Gives teacher embeddings, modality and slices alone; its processor is not used.
        settings ([`LabelSettings`]): What the labels depend on.
        split (`int`, *optional*): That of [`~alignment.label_matrix`].
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where `hf-sugar prepare` has stored them, for the same rows, teachers and settings; a stream, whose rows nobody knows
            before it is read, gets those of the last one that was prepared there.
        store_rows (`int`, *optional*): How many rows there are, to measure them and store them in `cache_dir`.

    Returns:
        `torch.Tensor` of shape `(5, 2)`: what is stored; else of 256 rows that are spread over the dataset, of a stream the
        first ones, or with `store_rows` rows spread over it.

    Raises:
        `ValueError`: if the file of statistics is damaged.
    """
    rows = []
    if isinstance(dataset, Dataset):
        chosen = torch.linspace(0, len(dataset) - 1, min(len(dataset), MEASURED_ROWS), dtype=torch.float64).long()
        rows = [dataset[int(index)] for index in chosen]
    collator = dataclasses.replace(collator, processor=None)
    if cache_dir is not None and collator.teachers is not None:  # else the teachers embed during training
        file, key = Path(cache_dir, STATISTICS_FILE), _key(rows, collator, settings)
        known = _read(file) if file.exists() else {}
        if key in known and store_rows is None:
            return torch.tensor(known[key])
    if not isinstance(dataset, Dataset):
        step = max(1, (store_rows or 0) // MEASURED_ROWS)
        rows = list(islice(dataset, 0, step * MEASURED_ROWS, step))
    statistics = measure_labels(rows, collator, settings, split)
    if store_rows is not None:
        known[key] = statistics.tolist()
        stored = {key: dict(zip(BLOCKS, values)) for key, values in known.items()}
        with replacing(file) as path:
            path.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    return statistics


def measure_labels(
    rows: list[dict[str, Any]], collator: Callable, settings: LabelSettings, split: int | None
) -> torch.Tensor:
    """Statistics as in [`label_statistics`], of some rows."""
    batch = collator(rows)
    modality, single_slices = batch["slice_modality"], batch.get("single_slices", torch.empty(0, 0))
    sample, number = draw_positions(modality, settings.positions_per_sample, spread=True)
    row, column = (single_slices > 0).nonzero(as_tuple=True)
    alone = single_slices[row, column].long()
    spans = torch.stack([sample, torch.zeros_like(number), number + 1], dim=1)
    spans = torch.cat([spans, torch.stack([row, alone, alone + 1], dim=1)])
    labels, blocks, _ = span_labels(spans, batch["teacher_embeddings"], modality, settings, split)
    return block_statistics(labels, blocks, spans[:, :1] != spans[:, 0])


def _key(rows: list[dict[str, Any]], collator: Callable, settings: LabelSettings) -> str:
    """Teachers, settings, and the embeddings of rows by which the data are known; none for a stream."""
    said = [getattr(settings, field.name) for field in dataclasses.fields(LabelSettings)]
    said += [json.loads(collator.teachers)["fingerprint"], collator.flip_captions, collator.seed]
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=16)
    for row in rows:
        digest.update(np.array([*row["teacher_embeddings"]], np.float16).tobytes())
    return digest.hexdigest()


def _read(file: Path) -> dict[str, list[list[float]]]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        pairs = {key: [values[block] for block in BLOCKS] for key, values in stored.items()}
        return {key: [[float(mean), float(spread)] for mean, spread in each] for key, each in pairs.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it, and run `hf-sugar prepare` again.") from error
