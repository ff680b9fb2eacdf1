"""Checks of rows: the quick one that needs no image, and the thorough one that opens every image."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset
from tqdm.auto import tqdm

from hf_sugar.models.rows_sugar import UNREAD, conversation_row, fill_images, iter_slices, row_name, row_problems

from .images import load_image, undecoded


_KIND_OF = {"answers": "conversations", "captions": "captions", "text": "documents"}


KINDS = {
    "image": "unreadable images",
    "count": "count mismatches",
    "empty": "empty texts",
    "length": "too long",
    "malformed": "malformed otherwise",
}


class Problem(NamedTuple):
    """
    One thing that is wrong with one row.

    Attributes:
        row (`int`, *optional*):
            Position of the row in the dataset; `None` for one that was left out when the dataset was read.
        field (`str`):
            Place in the row, such as `"messages[0].content[1]"`.
        message (`str`):
            What is wrong there, and the remedy.
        id (`str`, *optional*):
            The row's `id`: of what [`~data.load_data`] reads, file and number.
        kind (`str`, *optional*, defaults to `"malformed"`):
            `"image"`, `"count"` (images and image parts differ in number), `"empty"` (text), `"length"`, or
            `"malformed"` for anything else.
    """

    row: int | None
    field: str
    message: str
    id: str | None = None
    kind: str = "malformed"

    def __str__(self) -> str:
        name = self.id if self.row is None else row_name({"id": self.id}, self.row)
        return f"{name}, `{self.field}`: {self.message}"


@dataclass
class CheckReport:
    """
    What [`check_dataset`] found. `str(report)` is a summary to read.

    Attributes:
        rows (`int`), images (`int`), texts (`int`):
            Number of rows, of image slices and of text slices.
        kinds (`dict[str, int]`):
            Rows whose loss is on answers (`"conversations"`), on captions (`"captions"`), on all text (`"documents"`).
        text_only (`int`), no_structure (`int`):
            Rows without an image, and rows that stay out of the structure loss.
        slices_min (`int`), slices_mean (`float`), slices_max (`int`):
            Slices in a row.
        duplicates (`int`):
            Rows that repeat an earlier one: same messages, same image files or bytes.
        tokens_min (`int`), tokens_mean (`float`), tokens_max (`int`), *optional*:
            Tokens in a row, image tokens included. Only with a processor.
        max_length (`int`, *optional*):
            The limit that the rows were held against.
        problems (`list[Problem]`):
            Everything that is wrong: what was left out in reading, then in the order of the rows.
    """

    rows: int
    kinds: dict[str, int]
    images: int
    texts: int
    text_only: int
    no_structure: int
    slices_min: int
    slices_mean: float
    slices_max: int
    duplicates: int
    tokens_min: int | None
    tokens_mean: float | None
    tokens_max: int | None
    max_length: int | None
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """`bool`: whether no row has a problem."""
        return not self.problems

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        lines = [
            f"{self.rows} rows ({kinds}; {self.text_only} without an image)",
            f"{self.images} images and {self.texts} texts",
            f"slices a row: {self.slices_min} to {self.slices_max}, {self.slices_mean:.1f} on average",
            f"{self.duplicates} rows repeat an earlier one",
        ]
        if self.no_structure:
            lines.append(f"{self.no_structure} rows stay out of the structure loss")
        if self.tokens_max is not None:
            limit = "no limit given" if self.max_length is None else f"the limit is {self.max_length}"
            lines.append(
                f"tokens a row, images included: {self.tokens_min} to {self.tokens_max}, {self.tokens_mean:.1f} on "
                f"average; {limit}"
            )
        counts = Counter(problem.kind for problem in self.problems)
        lines += [f"{name}: {counts[kind]}" for kind, name in KINDS.items()]
        lines.append(_listing(self.problems) if self.problems else "no problems")
        return "\n".join(lines)


def _listing(problems: list[Problem], shown: int = 5) -> str:
    rows = {problem.id if problem.row is None else problem.row for problem in problems}
    lines = [f"{len(problems)} problems in {len(rows)} rows:"]
    lines += [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  and {len(problems) - shown} more")
    return "\n".join(lines)


def text_rows(dataset: Dataset, name: str = "the dataset") -> Iterator[tuple[dict[str, Any], int]]:
    """
    Iterate over the text of a dataset's rows without reading its images.

    Args:
        dataset ([`datasets.Dataset`]):
            Rows of any layout that [`conversation_row`] takes.
        name (`str`, *optional*, defaults to `"the dataset"`):
            What errors call the dataset.

    Yields:
        `tuple[dict, int]`: the row of [`conversation_row`] without its images, and their number.

    Raises:
        `ValueError`: if the dataset has a transform, or no `messages` column (nor `prompt` and `completion`).
    """
    dataset = undecoded(dataset, name)
    columns = dataset.column_names
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"{name} has no `messages` column (it has {', '.join(columns)}). Bring it into the conversational vision "
            "format, for example with `hf_sugar.data.load_data`."
        )
    if "images" in columns:
        lists = dataset.select_columns("images").with_format("arrow")[:]["images"]
        counts = [count or 0 for count in pc.list_value_length(lists).to_pylist()]
    elif "image" in columns:
        counts = pc.is_valid(dataset.select_columns("image").with_format("arrow")[:]["image"]).to_pylist()
    else:
        counts = [0] * len(dataset)
    names = ("messages", "prompt", "completion", "loss_on", "structure", "id", *UNREAD)
    texts = dataset.select_columns([name for name in names if name in columns])
    for row, count in zip(texts, counts, strict=True):
        row = conversation_row(row)
        del row["images"]
        yield row, int(count)


def validate_rows(dataset: Dataset, name: str = "dataset") -> None:
    """
    Refuse a dataset with malformed rows. No image is read, so this is quick on large datasets too.

    Args:
        dataset ([`datasets.Dataset`]):
            Rows in the conversational vision format.
        name (`str`, *optional*, defaults to `"dataset"`):
            What the error calls the dataset.

    Raises:
        `ValueError`: naming the first few malformed rows and their total, or if there is no row at all, or for what
            [`text_rows`] refuses.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows.")
    rows = tqdm(text_rows(dataset, name), total=len(dataset), desc="checking rows", unit=" rows")
    problems = [
        Problem(index, field, message, row.get("id"), kind)
        for index, (row, num_images) in enumerate(rows)
        for kind, field, message in row_problems(row, num_images)
    ]
    if problems:
        raise ValueError(f"{name} cannot be used: {_listing(problems)}")


def check_dataset(
    dataset: Dataset, processor: Any = None, max_length: int | None = None, bad_rows: Sequence[Problem] = ()
) -> CheckReport:
    """
    Check a dataset thoroughly, every image opened, and count what is in it.

    Args:
        dataset ([`datasets.Dataset`]):
            Rows in the conversational vision format.
        processor ([`SugarProcessor`], *optional*):
            Processor of the model to be trained. With it every row is tokenized, images included, to find its length,
            and rows that the processor refuses are reported.
        max_length (`int`, *optional*):
            Report rows of more tokens than this. Needs `processor`.
        bad_rows (`Sequence[Problem]`, *optional*):
            Problems of rows that were left out when the dataset was read, see [`load_data`]: they are reported too.

    Returns:
        [`CheckReport`]: counts and problems.

    Raises:
        `ValueError`: if the dataset has no rows or no `messages` column, or if `max_length` lacks the processor.
    """
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows.")
    if max_length is not None and processor is None:
        raise ValueError("`max_length` counts tokens: give the `processor` too.")
    problems, kinds, digests = [*bad_rows], Counter(), set()
    images_total = texts_total = text_only = no_structure = 0
    slices, lengths = [], []
    for index, row in enumerate(tqdm(undecoded(dataset), desc="checking rows", unit=" rows")):
        row = conversation_row(row)
        found = row_problems(row, len(row["images"]))
        digest = hashlib.blake2b(json.dumps(row["messages"], sort_keys=True, default=str).encode())
        images = []
        for n, image in enumerate(row["images"]):
            stored = image if isinstance(image, dict) else {"bytes": None, "path": image}
            digest.update(stored["bytes"] or (stored["path"] or "").encode())
            try:
                images.append(load_image(image, f"images[{n}]"))
            except ValueError as error:
                found.append(("image", f"images[{n}]", str(error).removeprefix(f"images[{n}]: ")))
        digests.add(digest.digest())
        if not found:
            messages = fill_images(row["messages"], images)
            texts = sum(part["type"] == "text" for part in iter_slices(messages))
            texts_total += texts
            images_total += len(images)
            text_only += not images
            no_structure += not row["structure"]
            slices.append(texts + len(images))
            kinds[_KIND_OF[row["loss_on"]]] += 1
            if processor is not None:
                found, tokens = _tokenized(messages, processor, max_length)
                lengths += tokens
        problems += [Problem(index, field, message, row["id"], kind) for kind, field, message in found]

    return CheckReport(
        rows=len(dataset),
        kinds=dict(kinds),
        images=images_total,
        texts=texts_total,
        text_only=text_only,
        no_structure=no_structure,
        slices_min=min(slices, default=0),
        slices_mean=sum(slices) / max(len(slices), 1),
        slices_max=max(slices, default=0),
        duplicates=len(dataset) - len(digests),
        tokens_min=min(lengths, default=None),
        tokens_mean=sum(lengths) / len(lengths) if lengths else None,
        tokens_max=max(lengths, default=None),
        max_length=max_length,
        problems=problems,
    )


def _tokenized(messages, processor, max_length) -> tuple[list[tuple[str, str, str]], list[int]]:
    """Problems and, if the row can be tokenized, its length."""
    try:
        tokens = processor.encode_conversations([messages], names=["the row"])["input_ids"].shape[1]
    except ValueError as error:
        return [("malformed", "messages", str(error).removeprefix("the row: "))], []
    if max_length is not None and tokens > max_length:
        message = f"{tokens} tokens, more than max_length={max_length}. Shorten or split the row."
        return [("length", "messages", message)], [tokens]
    return [], [tokens]
