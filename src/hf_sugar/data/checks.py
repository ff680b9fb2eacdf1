"""Checks of rows: the quick one that needs no image, and the thorough one that opens every image."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from hf_sugar.models.rows_sugar import (
    LOSSES,
    UNREAD,
    conversation_row,
    fill_images,
    iter_slices,
    row_name,
    row_problems,
)

from .images import load_image, row_slices, undecoded


logger = logging.getLogger(__name__)

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
        row (`int`, *optional*): Position in the dataset; `None` for one that was left out when the dataset was read.
        field (`str`): Place in the row, such as `"messages[0].content[1]"`.
        message (`str`): What is wrong there, and the remedy.
        id (`str`, *optional*): The row's `id`: of what [`~data.load_data`] reads, file and number.
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
        rows (`int`): Number of rows, those included that were left out when the dataset was read.
        problems (`list[Problem]`): Everything that is wrong: what was left out in reading, then in the order of the rows.
        max_length (`int`, *optional*): The limit that the rows were compared with.
        images (`int`), texts (`int`): Number of image slices and of text slices in the good rows.
        text_only (`int`), no_structure (`int`):
            Good rows without an image, and good rows that stay out of the structure loss.
        duplicates (`int`): Rows that repeat an earlier one: same messages, same image files or bytes.
        kinds (`dict[str, int]`):
            Good rows whose loss is on answers (`"conversations"`), on captions (`"captions"`), on all text
            (`"documents"`).
        slices (`list[int]`): Number of slices in each good row.
        tokens (`list[int]`): Tokens in each good row, image tokens included. Empty without a processor.
    """

    rows: int
    problems: list[Problem]
    max_length: int | None = None
    images: int = 0
    texts: int = 0
    text_only: int = 0
    no_structure: int = 0
    duplicates: int = 0
    kinds: Counter = field(default_factory=Counter)
    slices: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """`bool`: whether no row has a problem."""
        return not self.problems

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        lines = [
            f"{self.rows} rows ({kinds}; {self.text_only} without an image)",
            f"{self.images} images and {self.texts} texts",
            f"slices a row: {_range(self.slices)}",
            f"{self.duplicates} rows repeat an earlier one",
        ]
        if self.no_structure:
            lines.append(f"{self.no_structure} rows stay out of the structure loss")
        if self.tokens:
            limit = "no limit given" if self.max_length is None else f"the limit is {self.max_length}"
            lines.append(f"tokens a row, images included: {_range(self.tokens)}; {limit}")
        counts = Counter(problem.kind for problem in self.problems)
        lines += [f"{name}: {counts[kind]}" for kind, name in KINDS.items()]
        lines.append(_listing(self.problems) if self.problems else "no problems")
        return "\n".join(lines)


def _range(numbers: list[int]) -> str:
    if not numbers:
        return "none"
    return f"{min(numbers)} to {max(numbers)}, {sum(numbers) / len(numbers):.1f} on average"


def _listing(problems: list[Problem], shown: int = 5) -> str:
    rows = {problem.id if problem.row is None else problem.row for problem in problems}
    lines = [f"{len(problems)} problems in {len(rows)} rows:"]
    lines += [f"  {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  and {len(problems) - shown} more")
    return "\n".join(lines)


def text_rows(dataset: Dataset, name: str = "the dataset") -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of [`conversation_row`] without their images, and the number of these, which are not read. Errors call the
    dataset `name`."""
    dataset = undecoded(dataset, name)
    columns = dataset.column_names
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        there = f"it has {', '.join(columns)}"
        raise ValueError(f"{name} has no `messages` column ({there}). Bring it into the format of docs/data.md.")
    counts = [0] * len(dataset)
    images = next((column for column in ("images", "image") if column in columns), None)
    if images is not None:
        values = dataset.select_columns(images).with_format("arrow")[:][images]
        counts = (pc.list_value_length if images == "images" else pc.is_valid)(values).to_pylist()
    names = ("messages", "prompt", "completion", "loss_on", *LOSSES, "id", *UNREAD)
    texts = dataset.select_columns([name for name in names if name in columns])
    for row, count in zip(texts, counts, strict=True):
        row = conversation_row(row)
        del row["images"]
        yield row, int(count or 0)


def readable_rows(
    rows: Dataset | IterableDataset, counts: Counter, check: Callable[[dict[str, Any], str], Any] = row_slices
) -> Dataset | IterableDataset:
    """The rows, images undecoded, that `check` of a row and its name does not refuse with a `ValueError`; `counts` gets how many
    `rows` there were, and how many were `skipped`."""

    def readable(row: dict[str, Any], index: int) -> bool:
        counts["rows"] += 1
        try:
            check(row, row_name(row, index))
        except ValueError as error:
            counts["skipped"] += 1
            if counts["skipped"] <= 5:
                logger.warning("Skipped: %s", error)
            return False
        return True

    rows = undecoded(rows)
    if isinstance(rows, IterableDataset):
        return rows.filter(readable, with_indices=True)
    return rows.select([n for n, row in enumerate(tqdm(rows, desc="opening images")) if readable(row, n)])


def validate_rows(dataset: Dataset, name: str = "dataset") -> None:
    """
    Refuse a dataset (called `name` in the error) with malformed rows. No image is read, so this is quick on large datasets
    too.

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
        dataset ([`datasets.Dataset`]): Rows in the conversational vision format.
        processor ([`SugarProcessor`], *optional*):
            Processor of the model to be trained. With it every row is tokenized, images included, to find its length,
            and rows that the processor refuses are reported.
        max_length (`int`, *optional*): Report rows of more tokens than this. Needs `processor`.
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
    report, digests = CheckReport(len(dataset) + len(bad_rows), [*bad_rows], max_length), set()
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
        report.duplicates += digest.digest() in digests
        digests.add(digest.digest())
        if not found:
            messages = fill_images(row["messages"], images)
            texts = sum(part["type"] == "text" for part in iter_slices(messages))
            report.texts += texts
            report.images += len(images)
            report.text_only += not images
            report.no_structure += not row["structure"]
            report.slices.append(texts + len(images))
            report.kinds[_KIND_OF[row["loss_on"]]] += 1
            if processor is not None:
                try:
                    tokens = processor.encode_conversations([messages], names=["the row"])["input_ids"].shape[1]
                    report.tokens.append(tokens)
                    if max_length is not None and tokens > max_length:
                        message = f"{tokens} tokens, more than max_length={max_length}. Shorten or split the row."
                        found.append(("length", "messages", message))
                except ValueError as error:
                    found.append(("malformed", "messages", str(error).removeprefix("the row: ")))
        report.problems += [Problem(index, field, message, row["id"], kind) for kind, field, message in found]
    return report
