"""Sources of rows, one or several: files, folders, tables and Hub datasets of any layout, read and mixed."""

import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets, interleave_datasets
from tqdm.auto import tqdm

from hf_sugar.models.rows_sugar import IMAGE_SUFFIXES, LOSS_ON, LOSSES, UNREAD, row_problems

from .checks import Problem
from .files import JSON_SUFFIXES, check_source, damaged, file_records, first_record, load_located, locate
from .images import undecoded
from .layouts import LAYOUTS, UNREAD_MEMBERS, BadRow, layout_of


logger = logging.getLogger(__name__)

_PART = {"type": Value("string"), "text": Value("string")}
ROW_FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": List(_PART)}),
        "loss_on": Value("string"),
        **dict.fromkeys(LOSSES, Value("bool")),
        "id": Value("string"),
        "images": List(Image()),
    }
)
"""Columns of every dataset that this package reads; equal columns are what lets datasets be mixed."""

# what the contrastive loss puts beside a row
BESIDE = ("positives", "negatives")
IMAGES_BESIDE = "Images can stand there in a table with `messages` alone."

_AS_JSON = json.JSONEncoder(ensure_ascii=False, default=lambda _: None)
# keys of a source, and the values of those that have a few
_SOURCE_KEYS = {
    **dict.fromkeys(("path", "image_root", "weight", "split", "name", "revision", "rename")),
    "format": ("auto", *LAYOUTS),
    "loss_on": LOSS_ON,
    **dict.fromkeys(LOSSES, (True, False)),
}


def load_data(
    sources: str | os.PathLike | dict[str, Any] | list[str | os.PathLike | dict[str, Any]],
    split: str = "train",
    *,
    seed: int = 0,
    on_bad_row: Literal["error", "skip"] = "error",
    streaming: bool = False,
    image_root: str | os.PathLike | None = None,
    bad_rows: list[Problem] | None = None,
) -> Dataset | IterableDataset:
    """
    Load one source of rows, or several and mix them. A source is a path (a file, a glob or a folder), a Hub dataset id, or
    a mapping with `path` and the other keys that docs/data.md describes, as are the layouts:

    ```yaml
    - {path: llava_v1_5_mix665k.json, image_root: images, weight: 0.6}
    - {path: docs_no_face_shard_*_v2.jsonl.zip, image_root: mmc4_images, weight: 0.3}
    - {path: coyo/*.tar, weight: 0.1, structure: false}
    ```

    Without weights several sources are concatenated and shuffled (streamed ones take turns). With weights every row is
    drawn from a source with the probability of its weight until all sources were used up once, so small sources are
    repeated and no row is lost. A single source keeps its order.

    Args:
        sources (`str` or `os.PathLike` or `dict` or `list`): One source or a list. Only a Hub id needs the network.
        split (`str`, *optional*, defaults to `"train"`):
            Split of Hub datasets, of saved dataset dictionaries and of the Karpathy file.
        seed (`int`, *optional*, defaults to `0`): Seed of the mixture.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` raises at the first malformed row, `"skip"` leaves malformed rows out and logs their number and
            the first few. A file that is damaged as a whole is an error in both cases.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows when they are asked for. Otherwise texts are held in memory, stored images on disk.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that image paths are relative to. Defaults to the folder of each file.
        bad_rows (`list[Problem]`, *optional*): List that the problems of the rows left out are appended to.

    Returns:
        [`datasets.Dataset`] or, with `streaming`, [`datasets.IterableDataset`]: with the columns of `ROW_FEATURES`, and
        `positives` and `negatives`, lists of texts, of a source whose first record has them (or its table, which may have images);
        images are decoded when they are looked at. `id` is `"<file>:<number of the record, from 1>"`, and
        `"<file>:<record>.<n>"` where a record gives several rows.

    Raises:
        `FileNotFoundError`: if a path does not exist, or a glob finds nothing.
        `ValueError`: for a malformed row (naming file, row, field and remedy; when streaming it is raised when the row
            is reached), a damaged file, a layout that is not known, or arguments that contradict each other.
    """
    sources = [
        {"image_root": image_root, **(source if isinstance(source, dict) else {"path": source})}
        for source in (sources if isinstance(sources, list) else [sources])
    ]
    if not sources:
        raise ValueError("`sources` is empty. Name at least one file, folder or Hub dataset.")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"`on_bad_row` is {on_bad_row!r}. Use 'error' or 'skip'.")
    for n, source in enumerate(sources):
        name = str(source.get("path", f"source {n + 1}"))
        check_source(source, _SOURCE_KEYS, name)
        for key, value in source.items():
            if value is not None and _SOURCE_KEYS[key] and value not in _SOURCE_KEYS[key]:
                raise ValueError(f"{name}: `{key}` is {value!r}. Use one of {', '.join(map(str, _SOURCE_KEYS[key]))}.")
        if not isinstance(source.get("rename") or {}, dict):
            raise ValueError(f"{name}: `rename` is {source['rename']!r}. Write it as {{name: new name}}.")
    weights = source_weights(sources)

    datasets = [_load_source(source, split, on_bad_row, streaming, bad_rows) for source in sources]
    if not streaming:
        for source, dataset in zip(sources, datasets, strict=True):
            logger.info("%s: %d rows", source["path"], len(dataset))
    if len(datasets) == 1:
        return datasets[0]
    if weights:
        probabilities = [weight / sum(weights) for weight in weights]
        return interleave_datasets(datasets, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")
    if streaming:
        return interleave_datasets(datasets, stopping_strategy="all_exhausted_without_replacement")
    return concatenate_datasets(datasets).shuffle(seed=seed)


def source_weights(sources: list[Any]) -> list[float]:
    """The weights of sources, for each or for none: otherwise a `ValueError`."""
    weights = [source["weight"] for source in sources if isinstance(source, dict) and source.get("weight") is not None]
    numbers = [isinstance(weight, int | float) and 0 < weight < float("inf") for weight in weights]
    if weights and (len(weights) < len(sources) or not all(numbers)):
        raise ValueError("Give every source a `weight` greater than 0, or none of them.")
    return weights


def _load_source(
    source: dict[str, Any], split: str, on_bad_row: str, streaming: bool, bad_rows: list[Problem] | None
) -> Dataset | IterableDataset:
    path, layout = str(source["path"]), source.get("format") or "auto"
    reading = _Reading(source, source.get("split") or split, on_bad_row, bad_rows)
    kind, files = locate(source, reading.split)
    if kind == "json":
        fields = set(_renamed(first_record(files[0]), source))
        reading.layout = layout_of(fields, f"{files[0]}, first record") if layout == "auto" else layout
        if source.get("split") and path.endswith(JSON_SUFFIXES) and reading.layout != "coco":
            raise ValueError(
                f"{path}: `split` would have no effect: a file of {reading.layout} has none. Leave it out."
            )
        reading.keep_beside(fields)
        return reading.stream(files) if streaming else reading.collect(files)
    if kind == "tar" and streaming:
        reading.layout = "captions" if layout == "auto" else layout
        return reading.stream(files)

    table = load_located(kind, files, source, reading.split, streaming)
    added = {"teacher_embeddings", *BESIDE} & set(table.column_names or ())
    if added and "messages" in table.column_names:  # of `hf-sugar prepare` or `mine`: rows already
        if changed := {"rename", "loss_on", *LOSSES} & source.keys():
            reason = f"which are taken as they are: `{min(changed)}` comes too late. Set it where they are made."
            raise ValueError(f"{path} holds rows with `{min(added)}`, {reason}")
        return table
    table = undecoded(table, path)
    features = _renamed(table.features, source)
    reading.layout = layout_of(set(features), path) if layout == "auto" else layout
    for name in BESIDE:
        if name in features and features[name] != List(Value("string")):
            raise ValueError(f"{path}: `{name}` is no list of texts. {IMAGES_BESIDE}")
    reading.keep_beside(set(features))
    if reading.root is None:
        reading.root = path if os.path.isdir(path) else os.path.dirname(path)
    if streaming:
        return reading.stream([table.shard(table.num_shards, n) for n in range(table.num_shards)])
    columns = [name for name in table.column_names if _stores_images(table, name)]
    return reading.collect_stored(table, columns) if columns else reading.collect([table])


class _Reading:
    """Reads one source into rows, and refuses or counts the bad ones."""

    def __init__(self, source: dict[str, Any], split: str, on_bad_row: str, bad_rows: list[Problem] | None):
        self.source, self.split, self.bad_rows = source, split, bad_rows
        self.path, self.skip = str(source["path"]), on_bad_row == "skip"
        self.layout, self.root, self.features = "", source.get("image_root"), ROW_FEATURES
        self.unseen = {*(source.get("rename") or ())}  # of the fields to be renamed

    def keep_beside(self, fields: set[str]) -> None:
        beside = {name: List(Value("string")) for name in BESIDE if name in fields}
        self.features = Features({**ROW_FEATURES, **beside})

    def stream(self, shards: list[str | IterableDataset]) -> IterableDataset:
        names = [self.path] if len(shards) == 1 else [f"{self.path}[{n}]" for n in range(len(shards))]
        gen_kwargs = {"shards": shards, "names": names}
        return IterableDataset.from_generator(self.rows, features=self.features, gen_kwargs=gen_kwargs)

    def rows(self, shards: list[str | IterableDataset], names: list[str]) -> Iterator[dict[str, Any]]:
        for *_, row in self.numbered_rows(shards, names):
            yield {**row, "images": [image for _, image in row["images"]]}

    def collect(self, shards: list[str | Dataset]) -> Dataset:
        rows = iter(tqdm(self.rows(shards, [self.path] * len(shards)), desc=f"reading {self.path}", unit=" rows"))
        tables = []
        while chunk := list(itertools.islice(rows, 10_000)):
            tables.append(Dataset.from_list(chunk, features=self.features))
        self.require_rows(tables)
        return concatenate_datasets(tables)

    def collect_stored(self, table: Dataset, columns: list[str]) -> Dataset:
        """Rows of a table with columns of stored images: the text is written anew, the images are not read."""
        names = {new: old for old, new in (self.source.get("rename") or {}).items()}
        # a record may give several rows with the same image: the first ones of all records, then the second ones ...
        groups: dict[tuple[str | None, int], list[dict[str, Any]]] = {}
        found, none = [], dict.fromkeys(self.features)
        records = tqdm(_without_bytes(table, columns), total=len(table), desc=f"reading {self.path}", unit=" rows")
        for number, nth, row in self.numbered_rows([records], [self.path]):
            field = row["images"][0][0].partition("[")[0] if row["images"] else ""
            column = names.get(field, field) if names.get(field, field) in columns else None
            row["images"] = [] if column else [image for _, image in row["images"]]
            groups.setdefault((column, nth), [none] * len(table))[number - 1] = none | row
            found.append(((column, nth), number - 1))
        self.require_rows(found)
        tables = []
        for (column, _), rows in groups.items():
            rows = Dataset.from_list(rows, features=self.features)
            if column:
                rows = concatenate_datasets([rows.remove_columns("images"), _image_lists(table, column)], axis=1)
            tables.append(rows)
        starts = {group: n * len(table) for n, group in enumerate(groups)}
        result, order = concatenate_datasets(tables), [starts[group] + n for group, n in found]
        return result if order == list(range(len(result))) else result.select(order)

    def numbered_rows(self, shards: Iterable[Any], names: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The number of each record, that of the row among those of the record, and the row with the fields that its images
        are in."""
        self.total, self.problems = 0, []
        whole = LAYOUTS[self.layout].records
        try:
            for shard, source in zip(shards, names, strict=True):
                if isinstance(shard, str):
                    source, records = shard, file_records(shard, whole and (lambda data: whole(data, self.split)))
                else:
                    records = _table_records(shard, source)
                root = os.path.abspath(os.path.dirname(source) if self.root is None else self.root)
                for name, number, record in records:
                    self.total += 1
                    row_id = f"{name}:{number}"
                    try:
                        rows = self.record_rows(record, root)
                    except BadRow as bad:
                        member = "" if name == os.path.basename(os.path.normpath(source)) else f"{name}, "
                        message = f"{source}, {member}row {number}, `{bad.field}`: {bad.problem}"
                        if not self.skip:
                            raise ValueError(f"{message} Or leave such rows out with on_bad_row='skip'.") from None
                        self.problems.append(message)
                        if self.bad_rows is not None:
                            self.bad_rows.append(Problem(None, bad.field, bad.problem, row_id, bad.kind))
                        continue
                    for n, row in enumerate(rows, 1):
                        yield self.total, n, {"id": row_id if len(rows) == 1 else f"{row_id}.{n}", **row}
        finally:  # training may stop before the end
            if self.problems:
                logger.warning(self.report())

    def record_rows(self, record: Any, root: str) -> list[dict[str, Any]]:
        if isinstance(record, BadRow):
            raise record
        if not isinstance(record, dict):
            raise BadRow("record", f"is a {type(record).__name__}, not an object. Write it as docs/data.md shows.")
        self.unseen -= record.keys()
        record = _renamed(record, self.source)
        for field in (*UNREAD, *UNREAD_MEMBERS):
            if record.get(field):
                raise BadRow(field, "is not read: a row is of texts and images. Drop the record or the field.")
        beside = {name: record.get(name) for name in BESIDE if name in self.features or record.get(name)}
        for name, texts in beside.items():
            if name not in self.features:
                raise BadRow(name, "is not in the first record of its source. Write it there too, if only as `[]`.")
            if texts and not (isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts)):
                raise BadRow(name, f"is {texts!r}, not a list of texts. {IMAGES_BESIDE}")
        given = {**record, **{name: value for name, value in self.source.items() if value is not None}}
        rows = LAYOUTS[self.layout].rows(record)
        for row in rows:
            row.update(beside)
            try:  # JSON can say half of a surrogate pair, Arrow and files cannot
                _AS_JSON.encode(row).encode()
            except UnicodeEncodeError as error:
                near = error.object[max(error.start - 20, 0) : error.start]
                problem = f"has half of a surrogate pair after {near!r}. Write the whole character."
                raise BadRow("record", problem) from None
            row["images"] = [(field, _image(value, root, field)) for field, value in row["images"]]
            row.update({name: given[name] for name in ("loss_on", *LOSSES) if given.get(name) is not None})
            for kind, field, problem in row_problems(row, len(row["images"])):
                raise BadRow(field, problem, kind)
            row.update({name: bool(row.get(name, True)) for name in LOSSES})
        return rows

    def require_rows(self, rows: list[Any]) -> None:
        if not rows:
            raise ValueError(self.report())
        if self.unseen:
            raise ValueError(
                f"{self.path}: `rename` is of a field {min(self.unseen)!r}, which no row has. Correct it."
            )

    def report(self) -> str:
        if not self.total:
            return f"{self.path} holds no rows."
        left = f"skipped {len(self.problems)} of {self.total} rows, first:"
        if len(self.problems) == self.total:
            left = f"none of {self.total} rows is left."
        return "\n  ".join([f"{self.path}: {left}", *self.problems[:5]])


def _renamed(record: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    names = source.get("rename") or {}
    return {names.get(name, name): value for name, value in record.items()}


def _table_records(table: Iterable[dict[str, Any]], source: str) -> Iterator[tuple[str, int | str, dict[str, Any]]]:
    number = 0
    try:
        for number, record in enumerate(table, 1):
            if "__key__" in record:  # WebDataset
                yield os.path.basename(record["__url__"]), record["__key__"], record
            else:
                yield os.path.basename(os.path.normpath(source)), number, record
    except Exception as error:  # of pyarrow, tarfile, the builders ...
        raise damaged(f"{source}, after row {number},", error) from error


def _arrow(table: Dataset, column: str) -> pa.ChunkedArray:
    return table.select_columns(column).with_format("arrow")[:][column]


def _stores_images(table: Dataset, column: str) -> bool:
    """Whether the images of a column are all in the table. One of paths is as good as one of texts."""
    feature = table.features[column]
    in_lists = isinstance(feature, List)
    feature = feature.feature if in_lists else feature
    if not isinstance(feature, Image):
        return feature in (Value("binary"), Value("large_binary"))
    images = pc.list_flatten(_arrow(table, column)) if in_lists else _arrow(table, column)
    inside, paths = (pc.is_valid(pc.struct_field(images, name)) for name in ("bytes", "path"))
    return bool(pc.any(inside).as_py() and pc.all(pc.or_(inside, pc.invert(paths))).as_py())


def _without_bytes(table: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Records of a table, with a mark where an image is stored."""

    def marks(images: pa.ChunkedArray) -> list[Any]:
        if pa.types.is_list(images.type):
            flat = iter(marks(pc.list_flatten(images)))
            return [list(itertools.islice(flat, n or 0)) for n in pc.list_value_length(images).to_pylist()]
        images = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
        return [b"." if there else None for there in pc.is_valid(images).to_pylist()]

    images = zip(*(marks(_arrow(table, column)) for column in columns))
    for record, values in zip(table.remove_columns(columns), images, strict=True):
        yield {**record, **dict(zip(columns, values))}


def _image_lists(table: Dataset, column: str) -> Dataset:
    """The column `images` of a column of images or of lists of them."""
    images = table.select_columns(column)
    if column != "images":
        images = images.rename_column(column, "images")
    features = Features({"images": ROW_FEATURES["images"]})
    if images.features["images"] == List(Image(decode=False)):
        images.info.features = features
        return images
    return images.map(_in_lists, batched=True, features=features, desc="arranging images")


def _in_lists(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    lists = [images if isinstance(images, list) else [images] for images in batch["images"]]
    return {"images": [[image for image in images if image is not None] for images in lists]}


def _image(value: Any, root: str, field: str) -> dict[str, Any]:
    """What a dataset stores of an image: a mapping of `path` and `bytes`."""
    if isinstance(value, dict) and value.get("bytes") is None:
        value = value.get("path")
    if isinstance(value, dict | bytes):
        return {"path": None, "bytes": value["bytes"] if isinstance(value, dict) else value}
    if value is None:
        raise BadRow(field, "there is no image. Give its path or drop the row.", "image")
    if not isinstance(value, str) or not value:
        raise BadRow(field, f"is {value!r}, not a path. Give the image's path relative to {root}.", "image")
    if value.startswith(("http://", "https://")):
        raise BadRow(field, f"{value} is a web address. Download the images and give their local paths.", "image")
    path = os.path.join(root, value)
    # photographs of VIST are named by their number alone
    for suffix in ("", *IMAGE_SUFFIXES) if not os.path.splitext(value)[1] else ("",):
        if os.path.isfile(path + suffix):
            return {"path": path + suffix, "bytes": None}
    raise BadRow(field, f"the image file {path} does not exist. Correct the path or set `image_root`.", "image")
