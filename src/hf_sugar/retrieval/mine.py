"""Hard negatives: what a model finds for a row before its teachers would."""

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from ..data.images import load_image, stored_image, undecoded
from ..models.rows_sugar import check_row, conversation_row, row_name, row_parts
from ..teachers import TripleEncoder
from .base import Index


logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 64


def mine_negatives(
    dataset: Dataset,
    index: Index,
    encoder: TripleEncoder,
    *,
    num_negatives: int = 4,
    num_candidates: int = 50,
    margin: float = 0.05,
    progress: bool = False,
) -> Dataset:
    """
    Add a column `negatives`, which the contrastive loss of [`SugarTrainer`] puts beside the rows: what an index finds for a
    row, best first, without what is right.

    A row with a column `positives` is searched for as a whole, an image-caption row by its image, and its caption is the
    right answer. Candidates are of the kind of the right answers, texts or images. One is left out if it is a right answer
    of this row or of another that asks the same, or if the teachers call it nearly the same as one of this row's: with
    their cosine `s`, whose mean over the right answers of different rows is `m`, if `(s - m) / (1 - m) >= 1 - margin`.

    Args:
        dataset ([`~datasets.Dataset`]): Rows in any layout that [`~models.rows_sugar.conversation_row`] takes.
        index ([`~retrieval.base.Index`]):
            Index of candidates with its embedding function. Of a document with texts and images, that of the wanted kind is
            the candidate.
        encoder ([`TripleEncoder`]): The teachers.
        num_negatives (`int`, *optional*, defaults to `4`): Most negatives of a row.
        num_candidates (`int`, *optional*, defaults to `50`): Hits that they are chosen from.
        margin (`float`, *optional*, defaults to `0.05`):
            How far a negative has to be from the right answers: above 0 (equal), at most 1 (the mean). The default is what
            training asks of the candidates of other rows, 1 - `contrastive_mask_above`.
        progress (`bool`, *optional*, defaults to `False`): Whether to show bars.

    Returns:
        [`~datasets.Dataset`]: the rows with `negatives`, a list of texts or of images.

    Raises:
        `ValueError`: if the dataset has the column already, a number is out of range, a row or a document cannot be used
            (names it), or no negative is left.

    Source of the margin: guided negatives, [GISTEmbed](https://huggingface.co/papers/2402.16829).
    """
    if "negatives" in dataset.column_names:
        raise ValueError("The dataset has a column `negatives`. Keep it, or `remove_columns('negatives')`.")
    if not 1 <= num_negatives <= num_candidates or not 0 < margin <= 1:
        raise ValueError("`num_negatives` must be from 1 to `num_candidates`, and `margin` above 0 and at most 1.")
    rows, kinds = undecoded(dataset), set()
    asked, right = [], defaultdict(set)  # what each row asks, and all that is right to that
    for n, row in enumerate(tqdm(rows, desc="reading rows", unit=" rows", disable=not progress)):
        question, answers = question_and_answers(row, row_name(row, n))
        asked.append(_digest(*question))
        right[asked[n]].update(map(_digest, answers))
        kinds.update(map(type, answers))
        if len(kinds) > 1:
            raise ValueError(f"{row_name(row, n)}: answers are texts in some rows, images in others. Mine apart.")
    if not asked:
        raise ValueError("The dataset has no rows.")
    [kind] = kinds
    known: dict[bytes, torch.Tensor] = {}  # halves of the teachers' embeddings that compare slices of one kind

    def embed(items: dict[str, str | dict[str, Any]]) -> None:
        """Make items known that are not, by what errors call them."""
        fresh = {digest: name for name, item in items.items() if (digest := _digest(item)) not in known}
        if fresh:
            names = list(fresh.values())
            found = encoder.encode([items[name] for name in names], names=names)
            known.update(zip(fresh, found[:, : encoder.split].half(), strict=True))

    def read(numbers: Iterable[int]) -> tuple[list[dict[str, Any]], list[str], list[torch.Tensor]]:
        """Rows, their names and the embeddings of their right answers."""
        batch, names = [rows[n] for n in numbers], [row_name(rows[n], n) for n in numbers]
        answers = [question_and_answers(row, name)[1] for row, name in zip(batch, names)]
        embed({f"{name}, right answer {n}": a for name, some in zip(names, answers) for n, a in enumerate(some)})
        return batch, names, [torch.stack([known[_digest(a)] for a in some]).float() for some in answers]

    sample = read(np.linspace(0, len(rows) - 1, min(len(rows), 256)).astype(int).tolist())[2]
    sample = torch.stack([answers[0] for answers in sample])
    between = sample.sum(dim=0).square().sum() - sample.square().sum()  # of all pairs but those of one with itself
    mean = between.item() / max(len(sample) * (len(sample) - 1), 1)
    alike = mean + (1 - margin) * (1 - mean)

    features = Features({"negatives": List(Value("string") if kind is str else Image())})
    tables, counts = [], Counter()
    starts = range(0, len(rows), _ROWS_AT_A_TIME)
    for start in tqdm(starts, desc="mining", unit=" batches", disable=not progress):
        numbers = range(start, min(start + _ROWS_AT_A_TIME, len(rows)))
        batch, names, answers = read(numbers)
        try:
            hits = index.search(list(map(_query, batch, names)), num_candidates)
        except ValueError as error:  # which calls the queries by their numbers
            named = re.sub(r"\bitem (\d+)\b", lambda match, names=names: names[int(match[1])], str(error), count=1)
            raise ValueError(named) from error
        items = {}
        for number in {hit.index for found in hits for hit in found}:
            item = _candidate(index.documents[number], kind, f"document {number} of the index")
            if item is not None:
                items[number] = item
        embed({f"document {number} of the index": item for number, item in items.items()})
        negatives = []
        for n, of_row, found in zip(numbers, answers, hits, strict=True):
            candidates = {_digest(items[hit.index]): items[hit.index] for hit in found if hit.index in items}
            far = [
                item
                for digest, item in candidates.items()
                if digest not in right[asked[n]] and (of_row @ known[digest].float()).max() < alike
            ]
            negatives.append(far[:num_negatives])
            counts[len(negatives[-1])] += 1
        tables.append(Dataset.from_dict({"negatives": negatives}, features=features))
    if counts[0] == len(rows):
        raise ValueError(f"No row has a negative among {num_candidates} hits. Lower `margin`, or take another index.")
    if fewer := len(rows) - counts[num_negatives]:
        logger.warning(
            "%d of %d rows have fewer than %d negatives, %d none: raise `num_candidates`, or lower `margin`.",
            *(fewer, len(rows), num_negatives, counts[0]),
        )
    return concatenate_datasets([dataset, concatenate_datasets(tables)], axis=1)


def question_and_answers(row: dict[str, Any], name: str) -> tuple[list[Any], list[Any]]:
    """What stands before the right answers of a row, and these: texts, and images as a dataset stores them."""
    given, row = row.get("positives"), conversation_row(row)
    check_row(row, len(row["images"]), name)
    slices = _slices(row, name)
    if row["structure"] and given:
        return slices, [item.strip() if isinstance(item, str) else stored_image(item, name) for item in given]
    if row["structure"] and row["loss_on"] == "captions" and len(slices) == 2:
        return slices[:1], slices[1:]
    raise ValueError(
        f"{name} has nothing to mine for: no image with its caption and no `positives`, or its `structure` is false."
    )


def _query(row: dict[str, Any], name: str) -> Any:
    return row if row.get("positives") else load_image(conversation_row(row)["images"][0], f"{name}, images[0]")


def _candidate(document: dict[str, Any], kind: type, name: str) -> str | dict[str, Any] | None:
    """The only text, or image, of a document; `None` if it has none."""
    found = [item for item in _slices(document, name) if isinstance(item, kind)]
    if len(found) > 1:
        raise ValueError(
            f"{name} has {len(found)} {'texts' if kind is str else 'images'}, and a negative is one. Index them apart."
        )
    return found[0] if found else None


def _slices(row: dict[str, Any], name: str) -> list[str | dict[str, Any]]:
    parts = row_parts(row)
    return [p["text"].strip() if p["type"] == "text" else stored_image(p["image"], name) for p in parts]


def _digest(*items: str | dict[str, Any]) -> bytes:
    """Of texts, and of images by their bytes or by the paths of their files."""
    contents = [item if isinstance(item, str) else item["bytes"] or f"\0{item['path']}" for item in items]
    contents = [c if isinstance(c, bytes) else c.encode() for c in contents]
    return hashlib.blake2b(b"".join(b"%d %b" % (len(c), c) for c in contents), digest_size=16).digest()
