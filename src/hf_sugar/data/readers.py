"""Readers: known layouts of training data to TRL's conversational vision format, in which every content part is one
slice. A reader is one function from a record to a row; images stay paths until somebody looks at them."""

import gzip
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from tqdm.auto import tqdm

from hf_sugar.models.processing_sugar import fill_images

from .checks import row_problems, text_rows


logger = logging.getLogger(__name__)

_TEXT_FEATURES = {
    "messages": List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}),
    "loss_on": Value("string"),
    "id": Value("string"),
}
ROW_FEATURES = Features({**_TEXT_FEATURES, "images": List(Image())})
"""Columns of every dataset that this package reads; equal columns are what lets datasets be mixed."""

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_IMAGE = "<image>"
_SOURCE_KEYS = ("path", "format", "image_root", "weight", "split", "name", "revision")
_JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zip")
_LAYOUTS = """The layouts that are read:
  llava: {"id", "image": path or list of paths (optional), "conversations": [{"from": "human", "value": "<image>..."}]}
  mmc4: {"text_list": [...], "image_info": [{"image_name", "matched_text_index"}]}
  conversational: {"messages": [{"role", "content": [{"type", "text"}]}], "images": [...], "loss_on", "id"}"""


class _BadRow(Exception):
    def __init__(self, field: str, problem: str):
        self.field, self.problem = field, problem


def read_llava_json(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
) -> Dataset:
    """
    Read the LLaVA-1.5 SFT layout: a JSON list, or one JSON object a line, of records such as

    ```python
    {"id": "7", "image": "coco/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}
    ```

    Every `<image>` of a human turn becomes an image part in its place (the original training code moves a lone one to
    the front), the text around it becomes text parts, stripped. `image` is a path or a list of paths, or missing for a
    text-only record. The loss is on the answers.

    Args:
        path (`str` or `os.PathLike`):
            File, plain, gzip-compressed (`.gz`) or a zip archive of such files.
        image_root (`str` or `os.PathLike`, *optional*, defaults to the folder of `path`):
            Folder that image paths are relative to.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` raises at the first malformed record, `"skip"` leaves malformed records out and logs their number
            and the first few.

    Returns:
        [`datasets.Dataset`]: with the columns of `ROW_FEATURES`; `id` is `"<file name>:<record number, from 1>"`.

    Raises:
        `ValueError`: naming file, row, field and remedy for a malformed record, or if no record is left.
    """
    return _read_records(path, image_root, _llava_row, on_bad_row)


def read_mmc4(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
) -> Dataset:
    """
    Read the Multimodal C4 layout (https://huggingface.co/papers/2304.06939): one JSON object a line, such as

    ```python
    {"text_list": ["Two birds.", "A crow."], "image_info": [{"image_name": "crow.png", "matched_text_index": 1}]}
    ```

    A document becomes one user message in which every image stands directly before the sentence that it matches;
    several images of one sentence keep their order. The loss is on all text.

    Args:
        path (`str` or `os.PathLike`):
            File, plain, gzip-compressed (`.gz`) or a zip archive of such files.
        image_root (`str` or `os.PathLike`, *optional*, defaults to the folder of `path`):
            Folder that the `image_name`s are relative to.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` raises at the first malformed document, `"skip"` leaves malformed documents out and logs their
            number and the first few.

    Returns:
        [`datasets.Dataset`]: with the columns of `ROW_FEATURES`; `id` is `"<file name>:<line number, from 1>"`.

    Raises:
        `ValueError`: naming file, row, field and remedy for a malformed document, or if no document is left.
    """
    return _read_records(path, image_root, _mmc4_row, on_bad_row)


def load_data(
    sources: str | os.PathLike | dict[str, Any] | list[str | os.PathLike | dict[str, Any]],
    split: str = "train",
    *,
    seed: int = 0,
    on_bad_row: Literal["error", "skip"] = "error",
) -> Dataset:
    """
    Load one source of rows, or several and mix them. A source is a path, a Hub dataset id, or a mapping:

    - `path`: a file in one of the layouts below, a folder written by `Dataset.save_to_disk`, parquet, or a Hub id.
    - `format`: `"llava"` ([`read_llava_json`]), `"mmc4"` ([`read_mmc4`]), `"conversational"` (rows in the
      conversational vision format already), or `"auto"`, the default, which looks at the first record.
    - `image_root`: folder that image paths are relative to.
    - `weight`: share of this source in the mixture.
    - `split`, `name`, `revision`: split (instead of the argument), configuration and revision of a Hub dataset. A file
      is one split: there `split` is not looked at.

    ```yaml
    - {path: llava_v1_5_mix665k.json, image_root: images, weight: 0.7}
    - {path: docs_shard_0_v2.jsonl.zip, format: mmc4, image_root: mmc4_images, weight: 0.3}
    ```

    Without weights several sources are concatenated and shuffled. With weights every row is drawn from a source with
    the probability of its weight until all sources were used up once, so small sources are repeated and no row is lost.
    A single source keeps its order.

    Args:
        sources (`str` or `os.PathLike` or `dict` or `list`):
            One source or a list of sources. Only a Hub id needs the network.
        split (`str`, *optional*, defaults to `"train"`):
            Split of Hub datasets and saved dataset dictionaries.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the mixture.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` raises at the first malformed row, `"skip"` leaves malformed rows out and logs their number and
            the first few.

    Returns:
        [`datasets.Dataset`]: with the columns of `ROW_FEATURES`; images are decoded when they are looked at.

    Raises:
        `FileNotFoundError`: if a path does not exist.
        `ValueError`: for a malformed row (naming source, row, field and remedy), a layout that is not known, or
            arguments that contradict each other.
    """
    sources = [
        source if isinstance(source, dict) else {"path": source}
        for source in (sources if isinstance(sources, list) else [sources])
    ]
    if not sources:
        raise ValueError("`sources` is empty. Name at least one file, folder or Hub dataset.")
    for n, source in enumerate(sources):
        if "path" not in source or not source.keys() <= set(_SOURCE_KEYS):
            raise ValueError(
                f"sources[{n}] has the keys {', '.join(source)}. It needs `path` and may have "
                f"{', '.join(_SOURCE_KEYS[1:])}."
            )
    weights = [source["weight"] for source in sources if source.get("weight") is not None]
    if weights and (len(weights) < len(sources) or min(weights) <= 0):
        raise ValueError("Give every source a `weight` greater than 0, or none of them.")

    parts = [_load_source(source, split, on_bad_row) for source in sources]
    for source, part in zip(sources, parts, strict=True):
        logger.info("%s: %d rows", source["path"], len(part))
    if len(parts) == 1:
        return parts[0]
    if not weights:
        return concatenate_datasets(parts).shuffle(seed=seed)
    probabilities = [weight / sum(weights) for weight in weights]
    mixture = interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")
    logger.info("mixture: %d rows from %d", len(mixture), sum(map(len, parts)))
    return mixture


def _load_source(source: dict[str, Any], split: str, on_bad_row: str) -> Dataset:
    path, root = str(source["path"]), source.get("image_root")
    layout, split = source.get("format") or "auto", source.get("split") or split
    readers = {"llava": _llava_row, "mmc4": _mmc4_row, "conversational": _conversational_row}
    if layout not in ("auto", *readers):
        raise ValueError(f"{path}: `format` is {layout!r}. Use one of auto, {', '.join(readers)}.")
    if path.endswith(_JSON_SUFFIXES) and os.path.isfile(path):
        return _read_records(path, root, readers[_sniff(path) if layout == "auto" else layout], on_bad_row)
    if layout in ("llava", "mmc4"):
        _require_file(path)
        raise ValueError(f"{path}: the {layout} layout is read from {', '.join(_JSON_SUFFIXES)} files.")

    dataset = load_table(source, split)
    return _conversational_dataset(dataset, path, root, on_bad_row)


def load_table(source: str | os.PathLike | dict[str, Any], split: str = "train") -> Dataset:
    """
    Load a dataset of any columns as it is: a folder written by `Dataset.save_to_disk`, a folder or file of parquet, or a
    Hub id.

    Args:
        source (`str` or `os.PathLike` or `dict`):
            Path or Hub id, or a mapping as in [`load_data`] without `format`.
        split (`str`, *optional*, defaults to `"train"`):
            Split, where there are several.

    Returns:
        [`datasets.Dataset`]

    Raises:
        `FileNotFoundError`: if the path does not exist.
        `ValueError`: if it is none of these.
    """
    source = source if isinstance(source, dict) else {"path": source}
    path, split = str(source["path"]), source.get("split") or split
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, "dataset_info.json")):
        dataset = load_from_disk(path)
    elif os.path.isdir(path) and os.path.isfile(os.path.join(path, "dataset_dict.json")):
        dataset = _one_split(load_from_disk(path), path, split)
    elif os.path.isdir(path):
        dataset = load_dataset(path, source.get("name"), split=split)
    elif os.path.isfile(path) and path.endswith(".parquet"):
        dataset = load_dataset("parquet", data_files=path, split="train")
    elif os.path.isfile(path):
        raise ValueError(f"{path}: what kind of file is this? Read are {', '.join(_JSON_SUFFIXES)}, .parquet.")
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) and not path.endswith((*_JSON_SUFFIXES, ".parquet")):
        dataset = load_dataset(path, source.get("name"), split=split, revision=source.get("revision"))
    else:
        _require_file(path)
    return dataset


def _one_split(datasets: DatasetDict, path: str, split: str) -> Dataset:
    if split not in datasets:
        raise ValueError(
            f"{path}: there is no split {split!r}, but {', '.join(datasets)}. Set `split` to one of them."
        )
    return datasets[split]


def _require_file(path: str | os.PathLike):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist. Correct the `path`, relative to {os.getcwd()}.")


def _sniff(path: str) -> str:
    with _open_text(path) as files:
        _, file = next(files)
        text, record = "", None
        # a list is often one line of gigabytes: read until its first record is complete
        while record is None and (more := file.read(1 << 20)):
            text = (text + more).lstrip("\ufeff \t\r\n[")
            try:
                record, _ = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                continue
    fields = set(record) if isinstance(record, dict) else set()
    if "conversations" in fields:
        return "llava"
    if "text_list" in fields:
        return "mmc4"
    if "messages" in fields:
        return "conversational"
    found = f"has the fields {', '.join(sorted(fields))}" if fields else "is not a JSON object"
    raise ValueError(f"{path}: the first record {found}. {_LAYOUTS}")


@contextmanager
def _open_text(path: str | os.PathLike) -> Iterator[Iterator[tuple[str, io.TextIOBase]]]:
    """The text files behind a path with their names: one, or the members of a zip archive."""
    path = Path(path)
    _require_file(path)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
            if not names:
                raise ValueError(f"{path}: the archive has no .json or .jsonl file.")
            yield ((name, io.TextIOWrapper(archive.open(name), encoding="utf-8-sig")) for name in names)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            yield iter([(path.name, file)])


def _records(path: str | os.PathLike) -> Iterator[tuple[str, int, Any]]:
    """File name, number from 1 and record; of files with one object a line the undecoded line."""
    with _open_text(path) as files:
        for name, file in files:
            first = file.readline()
            while first.isspace():
                first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("["):
                try:
                    records = json.load(file)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}: {name} is not valid JSON: {error}. Repair or re-download it."
                    ) from error
                yield from ((name, number, record) for number, record in enumerate(records, 1))
            else:
                yield from ((name, number, line) for number, line in enumerate(file, 1) if not line.isspace())


class _Skipped:
    """Refuses a bad row, or counts it."""

    def __init__(self, source: str, on_bad_row: str):
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"`on_bad_row` is {on_bad_row!r}. Use 'error' or 'skip'.")
        self.source, self.skip, self.count, self.first = source, on_bad_row == "skip", 0, []

    def add(self, row: str, field: str, problem: str):
        message = f"{self.source}, {row}, `{field}`: {problem}"
        if not self.skip:
            raise ValueError(f"{message} Or leave such rows out with on_bad_row='skip'.")
        self.count += 1
        self.first = [*self.first, message][:5]

    def report(self, total: int):
        if self.count == total:
            raise ValueError("\n  ".join([f"{self.source}: none of {total} rows is left.", *self.first]))
        if self.count:
            logger.warning("\n  ".join([f"{self.source}: skipped {self.count} of {total} rows, first:", *self.first]))


def _read_records(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None,
    to_row: Callable[[Any, str], dict[str, Any]],
    on_bad_row: str,
) -> Dataset:
    root = os.path.abspath(image_root if image_root is not None else Path(path).parent)
    skipped = _Skipped(str(path), on_bad_row)
    tables, rows, total = [], [], 0
    for name, number, record in tqdm(_records(path), desc=f"reading {Path(path).name}", unit=" rows"):
        total += 1
        try:
            if isinstance(record, str):
                try:
                    record = json.loads(record)
                except json.JSONDecodeError as error:
                    raise _BadRow("line", f"is not valid JSON: {error}. Write one object a line.") from error
            if not isinstance(record, dict):
                raise _BadRow("record", f"is a {type(record).__name__}, not an object. {_LAYOUTS}")
            rows.append({"id": f"{name}:{number}", **to_row(record, root)})
        except _BadRow as bad:
            skipped.add(
                f"row {number}" if name == Path(path).name else f"{name}, row {number}", bad.field, bad.problem
            )
        if len(rows) == 10_000:
            tables.append(Dataset.from_list(rows, features=ROW_FEATURES))
            rows = []
    skipped.report(total)
    if rows:
        tables.append(Dataset.from_list(rows, features=ROW_FEATURES))
    return concatenate_datasets(tables)


def _image_path(name: Any, root: str, field: str) -> str:
    if not isinstance(name, str) or not name:
        raise _BadRow(field, f"is {name!r}, not a path. Give the image's path relative to {root}.")
    path = os.path.join(root, name)
    if not os.path.isfile(path):
        raise _BadRow(field, f"the image file {path} does not exist. Correct the path or set `image_root`.")
    return path


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(field, f"is {value!r}, not a string. Write the text.")
    if not value.strip():
        raise _BadRow(field, "is empty. Write the text or remove it.")
    return value.strip()


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _image_part() -> dict[str, None]:
    return {"type": "image", "text": None}


def _llava_row(record: dict[str, Any], root: str) -> dict[str, Any]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _BadRow("conversations", f"is missing, empty or not a list. {_LAYOUTS}")
    messages, placeholders = [], 0
    for t, turn in enumerate(turns):
        field = f"conversations[{t}]"
        if not isinstance(turn, dict) or turn.get("from") not in _LLAVA_ROLES:
            speaker = turn.get("from") if isinstance(turn, dict) else None
            raise _BadRow(f"{field}.from", f"is {speaker!r}. Use one of {', '.join(_LLAVA_ROLES)}.")
        value = _text(turn.get("value"), f"{field}.value")
        if turn["from"] == "human":
            before, *after = (piece.strip() for piece in value.split(_IMAGE))
            parts = [_text_part(before)] if before else []
            for piece in after:
                parts += [_image_part(), _text_part(piece)] if piece else [_image_part()]
            placeholders += len(after)
        elif _IMAGE in value:
            raise _BadRow(f"{field}.value", f"contains {_IMAGE}, which only a human turn may. Remove or move it.")
        else:
            parts = [_text_part(value)]
        messages.append({"role": _LLAVA_ROLES[turn["from"]], "content": parts})
    if not any(message["role"] == "assistant" for message in messages):
        raise _BadRow("conversations", "no gpt turn, so there is no answer to learn. Add one or drop the record.")

    images = record.get("image")
    single = not isinstance(images, list)
    images = [] if images is None else [images] if single else images
    if len(images) != placeholders:
        raise _BadRow(
            "image",
            f"{len(images)} images but {placeholders} {_IMAGE} placeholders in the human turns. Give one placeholder for "
            "each image, in the same order.",
        )
    paths = [_image_path(image, root, "image" if single else f"image[{n}]") for n, image in enumerate(images)]
    return {"messages": messages, "images": paths, "loss_on": "answers"}


def _mmc4_row(record: dict[str, Any], root: str) -> dict[str, Any]:
    sentences, infos = record.get("text_list"), record.get("image_info")
    if not isinstance(sentences, list) or not sentences:
        raise _BadRow("text_list", f"is missing, empty or not a list. {_LAYOUTS}")
    if not isinstance(infos, list):
        raise _BadRow("image_info", f"is missing or not a list. {_LAYOUTS}")
    before: list[list[str]] = [[] for _ in sentences]
    for n, info in enumerate(infos):
        field = f"image_info[{n}]"
        if not isinstance(info, dict):
            raise _BadRow(field, "is not an object. Give it `image_name` and `matched_text_index`.")
        index = info.get("matched_text_index")
        if type(index) is not int:
            raise _BadRow(
                f"{field}.matched_text_index",
                f"is {index!r}. Every image needs the index of the sentence it belongs to: match the images first.",
            )
        if not 0 <= index < len(sentences):
            raise _BadRow(
                f"{field}.matched_text_index",
                f"is {index}, but `text_list` has {len(sentences)} sentences. Use 0 to {len(sentences) - 1}.",
            )
        before[index].append(_image_path(info.get("image_name"), root, f"{field}.image_name"))
    parts = []
    for s, sentence in enumerate(sentences):
        parts += [_image_part() for _ in before[s]] + [_text_part(_text(sentence, f"text_list[{s}]"))]
    return {
        "messages": [{"role": "user", "content": parts}],
        "images": [path for paths in before for path in paths],
        "loss_on": "text",
    }


def _conversational_text(row: dict[str, Any], num_images: int) -> dict[str, Any]:
    for field, problem in row_problems(row, num_images):
        raise _BadRow(field, problem)
    return {
        "messages": [
            {
                "role": message["role"],
                "content": [
                    _text_part(part["text"]) if part["type"] == "text" else _image_part()
                    for part in message["content"]
                ],
            }
            for message in fill_images(row["messages"], [None] * num_images, "the row")
        ],
        "loss_on": row.get("loss_on") or "answers",
        **({"id": str(row["id"])} if row.get("id") is not None else {}),
    }


def _conversational_row(record: dict[str, Any], root: str) -> dict[str, Any]:
    images = record.get("images") or []
    if not isinstance(images, list):
        raise _BadRow("images", "is not a list. Give the images' paths in the order of the image parts.")
    text = _conversational_text(record, len(images))
    return {**text, "images": [_image_path(image, root, f"images[{n}]") for n, image in enumerate(images)]}


def _conversational_dataset(dataset: Dataset, path: str, image_root: str | None, on_bad_row: str) -> Dataset:
    if "messages" not in dataset.column_names:
        raise ValueError(f"{path}: there is no `messages` column but {', '.join(dataset.column_names)}. {_LAYOUTS}")
    if "images" in dataset.column_names and not isinstance(dataset.features["images"], List):
        raise ValueError(f"{path}: the `images` column is not a list but {dataset.features['images']}. {_LAYOUTS}")
    name = Path(path).name
    root = os.path.abspath(image_root or (Path(path).parent if os.path.isfile(path) else path))
    # a column of empty lists has the type null
    as_paths = "images" not in dataset.column_names or dataset.features["images"].feature in (
        Value("string"),
        Value("null"),
    )
    paths = dataset["images"] if as_paths and "images" in dataset.column_names else [[]] * len(dataset)
    skipped = _Skipped(path, on_bad_row)
    rows, kept = [], []
    for index, (row, num_images) in enumerate(
        tqdm(text_rows(dataset), total=len(dataset), desc=f"reading {name}", unit=" rows")
    ):
        try:
            if as_paths:
                row = _conversational_row({**row, "images": paths[index]}, root)
            else:
                row = _conversational_text(row, num_images)
            kept.append(index)
        except _BadRow as bad:
            skipped.add(f"row {index + 1}", bad.field, bad.problem)
            row = {"messages": [], "loss_on": None, "images": []}
        rows.append({"id": f"{name}:{index + 1}", **row})
    skipped.report(len(dataset))
    if as_paths:
        result = Dataset.from_list(rows, features=ROW_FEATURES)
    else:
        # only the text is written anew: stored images are neither read nor copied
        text = Dataset.from_list(
            [{key: row[key] for key in _TEXT_FEATURES} for row in rows], features=Features(_TEXT_FEATURES)
        )
        images = dataset.select_columns("images")
        if images.features["images"] != ROW_FEATURES["images"]:
            images = images.cast_column("images", ROW_FEATURES["images"])
        result = concatenate_datasets([text, images], axis=1)
    return result if len(kept) == len(result) else result.select(kept)
