"""The teachers' embeddings as a column of a dataset."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from hf_sugar.data.columns import add_column
from hf_sugar.models.rows_sugar import conversation_row, fill_images

from .encoder import TripleEncoder


TEACHER_COLUMNS = ("teacher_embeddings", "teachers")
REMOVE = f"dataset.remove_columns({list(TEACHER_COLUMNS)})"
_ROW_COLUMNS = ["messages", "prompt", "completion", "image", "images", "structure"]


def add_teacher_embeddings(
    dataset: Dataset | IterableDataset,
    encoder: TripleEncoder,
    cache_dir: str | os.PathLike,
    *,
    compute: bool = True,
    rows_per_shard: int = 512,
    counts: Counter | None = None,
) -> Dataset | IterableDataset:
    """
    Add the teachers' embeddings of all slices to a dataset, in two columns:

    - `teacher_embeddings`: for each row an array `(slices, dim)` in float16, one line for each content part of its user and
      assistant messages in reading order; empty for rows that stay out of the structure loss.
    - `teachers`: which teachers they are from, see [`TripleEncoder.record`].

    The result is an ordinary dataset: it can be saved, pushed to the Hub, shuffled, mixed and streamed, and is trained on
    without its teachers. Rounding to float16 moves the cosine of two halves of 768 dimensions by less than 1e-4.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in any layout that [`~data.rows.conversation_row`] takes. A dataset that has the columns is only checked.
        encoder ([`TripleEncoder`]): The teachers. Their weights are not read where nothing is left to embed.
        cache_dir (`str` or `os.PathLike`):
            Where the embeddings are kept. [`~data.columns.add_column`] says how an interrupted run goes on, and how
            several processes share the work. Equal slices of a block of rows are embedded once.
        compute (`bool`, *optional*, defaults to `True`):
            Whether to embed what is missing. Otherwise it is an error, for a stream when it is met.
        rows_per_shard (`int`, *optional*, defaults to `512`): Most rows in a block.
        counts (`collections.Counter`, *optional*):
            The number of slices embedded, by all processes, is added to its `"encoded"`.

    Raises:
        `ValueError`: if `cache_dir` or the dataset has embeddings of other teachers (names both), or a row cannot be
            embedded (names it).

    Example:

    ```python
    >>> from hf_sugar import TripleEncoder
    >>> from hf_sugar.data import load_data
    >>> from hf_sugar.teachers import add_teacher_embeddings

    >>> rows = add_teacher_embeddings(load_data("llava.json"), TripleEncoder(), "teacher_cache")
    >>> rows.push_to_hub("me/llava-with-teachers")
    ```
    """
    made = teachers_of(dataset)
    if made is not None:
        check_same_teachers(made, encoder.fingerprint, encoder.description)
        return dataset
    encoded = 0

    def embed(rows: list[dict[str, Any]], names: list[str]) -> pa.Table:
        nonlocal encoded
        sizes, slots, unique = [], [], {}
        for row, name in zip(rows, names):
            slices = list(_named_slices(row, name))
            sizes.append(len(slices))
            # pixels in two files are taken for two images
            slots += [unique.setdefault(key, (len(unique), item, where))[0] for key, item, where in slices]
        items, where = [[entry[n] for entry in unique.values()] for n in (1, 2)]
        encoded += len(items)
        embeddings = encoder.encode(items, names=where)
        values = pa.array(embeddings.half().numpy()[slots].reshape(-1))
        ends = pa.array([0, *sizes], pa.int32())
        vectors = pa.FixedSizeListArray.from_arrays(values, encoder.dim)
        return pa.table(
            {
                TEACHER_COLUMNS[0]: pa.ListArray.from_arrays(pc.cumulative_sum(ends), vectors),
                TEACHER_COLUMNS[1]: [encoder.record] * len(rows),
            }
        )

    result = add_column(
        dataset,
        TEACHER_COLUMNS[0],
        embed if compute else None,
        cache_dir=cache_dir,
        columns=_ROW_COLUMNS,
        fingerprint=encoder.fingerprint,
        description=encoder.description,
        remedy="Run `hf-sugar prepare` on the data, or set `teacher_mode='online'`.",
        rows_per_shard=rows_per_shard,
    )
    if counts is not None:
        counts["encoded"] += sum(gather_object([encoded]))
    return result


def teachers_of(dataset: Dataset | IterableDataset) -> dict[str, Any] | None:
    """
    Which teachers the embeddings of a dataset are from; of a stream the first row is looked at.

    Returns:
        `dict` or `None`: what [`TripleEncoder.record`] says; `None` for a dataset without the columns.

    Raises:
        `ValueError`: if rows have embeddings of different teachers, or some have none.
    """
    if not set(TEACHER_COLUMNS) <= set(dataset.column_names or ()):
        return None
    if isinstance(dataset, Dataset):
        records = dataset.unique(TEACHER_COLUMNS[1])
    else:
        records = [row[TEACHER_COLUMNS[1]] for row in dataset.take(1)]
    if None in records:
        remedy = f"Add them to all sources before mixing, or take them off: `{REMOVE}`."
        raise ValueError(f"Some rows of the dataset have teacher embeddings and others have none. {remedy}")
    records = [json.loads(record) for record in records]
    for record in records[1:]:
        check_same_teachers(records[0], record["fingerprint"], record["description"])
    return records[0]


def check_same_teachers(made_by: dict[str, Any], fingerprint: str, description: str) -> None:
    """Refuse embeddings of other teachers than [`TripleEncoder`] describes, with a `ValueError` that names both; `made_by` is
    from [`teachers_of`]."""
    if made_by["fingerprint"] != fingerprint:
        both = f"  there:     {made_by['description']}\n  asked for: {description}"
        remedy = f"Set `teachers` to those, or take the embeddings off to compute them anew: `{REMOVE}`."
        raise ValueError(f"The teacher embeddings of the dataset are of other teachers.\n{both}\n{remedy}")


def _named_slices(row: dict[str, Any], name: str) -> Iterator[tuple[Any, Any, str]]:
    """What tells a slice from others, the slice, and what errors call it."""
    row = conversation_row(row)
    if not row["structure"]:  # no teacher is asked about it
        return
    images = 0
    for m, message in enumerate(fill_images(row["messages"], row["images"], name)):
        for c, part in enumerate(message["content"]):
            if part["type"] == "image":
                where, images = f"{name}, images[{images}]", images + 1
                item = {"path": part["image"], "bytes": None} if isinstance(part["image"], str) else part["image"]
                key = (item.get("bytes") or item.get("path")) if isinstance(item, dict) else id(item)
            else:
                key, item, where = ("text", part["text"]), part["text"], f"{name}, messages[{m}].content[{c}]"
            if message["role"] != "system":
                yield key, item, where
