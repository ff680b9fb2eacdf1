"""Sources of rows, one or several: files, folders, tables and Hub datasets of any layout, read and mixed."""

import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from tqdm.auto import tqdm

from hf_sugar.models.rows_sugar import IMAGE_SUFFIXES, LOSS_ON, UNREAD, row_problems

from .checks import Problem
from .files import Line, file_records, first_record, load_located, locate
from .images import undecoded
from .layouts import LAYOUTS, UNREAD_MEMBERS, BadRow, Layout, encodable, layout_of


logger = logging.getLogger(__name__)

_TEXT_FEATURES = {
    "messages": List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}),
    "loss_on": Value("string"),
    "structure": Value("bool"),
    "id": Value("string"),
}
ROW_FEATURES = Features({**_TEXT_FEATURES, "images": List(Image())})
"""Columns of every dataset that this package reads; equal columns are what lets datasets be mixed."""

_SOURCE_KEYS = (
    "path",
    "format",
    "image_root",
    "weight",
    "split",
    "name",
    "revision",
    "rename",
    "loss_on",
    "structure",
)


class _Stored(NamedTuple):
    """Stands for an image of a table, which stays where it is while the text of its row is written anew."""

    column: str
    path: str | None  # of an image that is a file of its own


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
    Load one source of rows, or several and mix them. A source is a path, a Hub dataset id, or a mapping:

    - `path`: a file, a glob (`shards/*.tar`), a folder (of `Dataset.save_to_disk`, of JSON or parquet files, of images
      with their `metadata.jsonl` or `metadata.csv`), or a Hub id. Files are JSON or JSON lines, also compressed (`.gz`)
      or in zip archives, parquet, and WebDataset `.tar`.
    - `format`: the layout, one of those in docs/data.md, or `"auto"`, the default, which looks at the first record.
    - `image_root`: folder that image paths are relative to, instead of the argument.
    - `weight`: share of this source in the mixture.
    - `split`, `name`, `revision`: split (instead of the argument), configuration and revision of a Hub dataset. A file
      is one split, and `split` is not looked at, except in the layout `"coco"`, where every image says its own.
    - `rename`: mapping of fields to the names that the layout has for them, such as `{alt: caption}`.
    - `loss_on`: which text of every row of this source carries the generative loss, instead of what the layout says:
      `"answers"`, `"captions"` or `"text"`.
    - `structure`: `false` keeps the rows of this source out of the structure loss.

    ```yaml
    - {path: llava_v1_5_mix665k.json, image_root: images, weight: 0.6}
    - {path: docs_no_face_shard_*_v2.jsonl.zip, image_root: mmc4_images, weight: 0.3}
    - {path: coyo/*.tar, weight: 0.1, structure: false}
    ```

    Without weights several sources are concatenated and shuffled (streamed ones take turns). With weights every row is
    drawn from a source with the probability of its weight until all sources were used up once, so small sources are
    repeated and no row is lost. A single source keeps its order.

    Args:
        sources (`str` or `os.PathLike` or `dict` or `list`):
            One source or a list of sources. Only a Hub id needs the network.
        split (`str`, *optional*, defaults to `"train"`):
            Split of Hub datasets, of saved dataset dictionaries and of the Karpathy file.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the mixture.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` raises at the first malformed row, `"skip"` leaves malformed rows out and logs their number and
            the first few. A file that is damaged as a whole is an error in both cases.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows when they are asked for. Otherwise texts are held in memory, stored images on disk.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that image paths are relative to. Defaults to the folder of each file.
        bad_rows (`list[Problem]`, *optional*):
            List that the problems of the rows left out are appended to.

    Returns:
        [`datasets.Dataset`] or, with `streaming`, [`datasets.IterableDataset`]: with the columns of `ROW_FEATURES`;
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
        if "path" not in source or not source.keys() <= set(_SOURCE_KEYS):
            keys = ", ".join(key for key in source if key != "image_root")
            raise ValueError(
                f"sources[{n}] has the keys {keys}. It needs `path` and may have {', '.join(_SOURCE_KEYS[1:])}."
            )
        if not isinstance(source.get("rename") or {}, dict):
            raise ValueError(f"{source['path']}: `rename` is {source['rename']!r}. Write it as {{name: new name}}.")
        for key, choices in (("format", ("auto", *LAYOUTS)), ("loss_on", LOSS_ON), ("structure", (True, False))):
            if source.get(key) is not None and source[key] not in choices:
                raise ValueError(
                    f"{source['path']}: `{key}` is {source[key]!r}. Use one of {', '.join(map(str, choices))}."
                )
    weights = [source["weight"] for source in sources if source.get("weight") is not None]
    numbers = [isinstance(weight, int | float) and 0 < weight < float("inf") for weight in weights]
    if weights and (len(weights) < len(sources) or not all(numbers)):
        raise ValueError("Give every source a `weight` greater than 0, or none of them.")

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


def _load_source(
    source: dict[str, Any], split: str, on_bad_row: str, streaming: bool, bad_rows: list[Problem] | None
) -> Dataset | IterableDataset:
    path, layout = str(source["path"]), source.get("format") or "auto"
    reading = _Reading(source, source.get("split") or split, on_bad_row, bad_rows)
    kind, files = locate(source, reading.split)
    if kind == "json":
        if layout == "auto":
            layout = layout_of(set(_renamed(first_record(files[0]), source)), f"{files[0]}, first record")
        reading.layout = layout
        return reading.stream(files) if streaming else reading.collect(files)
    if kind == "tar" and streaming:
        reading.layout = "captions" if layout == "auto" else layout
        return reading.stream(files)

    table = load_located(kind, files, source, reading.split, streaming)
    if {"messages", "teacher_embeddings"} <= set(table.column_names or ()):  # of `hf-sugar prepare`: rows already
        if changed := {"rename", "loss_on", "structure"} & source.keys():
            raise ValueError(
                f"{path} holds rows with teacher embeddings, which are taken as they are: `{min(changed)}` comes too late. Set "
                "it where they are prepared."
            )
        return table
    table = undecoded(table, path)
    reading.layout = layout_of(set(_renamed(table.features, source)), path) if layout == "auto" else layout
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
        self.layout, self.root = "", source.get("image_root")
        self.total, self.problems = 0, []

    def stream(self, shards: list[str | IterableDataset]) -> IterableDataset:
        names = [self.path] if len(shards) == 1 else [f"{self.path}[{n}]" for n in range(len(shards))]
        gen_kwargs = {"shards": shards, "names": names}
        return IterableDataset.from_generator(self.rows, features=ROW_FEATURES, gen_kwargs=gen_kwargs)

    def rows(self, shards: list[str | IterableDataset], names: list[str]) -> Iterator[dict[str, Any]]:
        try:
            for _, row in self.numbered_rows(shards, names):
                yield row
        finally:  # training may stop before the end
            if self.problems:
                logger.warning(self.report())

    def collect(self, shards: list[str | Dataset]) -> Dataset:
        rows = iter(tqdm(self.rows(shards, [self.path] * len(shards)), desc=f"reading {self.path}", unit=" rows"))
        tables = []
        while chunk := list(itertools.islice(rows, 10_000)):
            tables.append(Dataset.from_list(chunk, features=ROW_FEATURES))
        if not tables:
            raise ValueError(self.report())
        return concatenate_datasets(tables)

    def collect_stored(self, table: Dataset, columns: list[str]) -> Dataset:
        """Rows of a table with columns of stored images: the text is written anew, the images are not read."""
        # a record may give several rows with the same image: the first ones of all records, then the second ones ...
        rows: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
        found = []
        records = tqdm(_without_images(table, columns), total=len(table), desc=f"reading {self.path}", unit=" rows")
        for number, row in self.numbered_rows([records], [self.path]):
            column, nth = row.pop("images")[0].column if row["images"] else columns[0], 0
            while number in rows.setdefault((column, nth), {}):
                nth += 1
            rows[column, nth][number] = row
            found.append((column, nth, number))
        if not found:
            raise ValueError(self.report())
        if self.problems:
            logger.warning(self.report())
        tables, starts = [], {}
        for (column, nth), by_number in rows.items():
            starts[column, nth] = len(tables) * len(table) - 1
            texts = [{**dict.fromkeys(_TEXT_FEATURES), **by_number.get(n, {})} for n in range(1, len(table) + 1)]
            texts = Dataset.from_list(texts, features=Features(_TEXT_FEATURES))
            tables.append(concatenate_datasets([texts, _image_lists(table, column)], axis=1))
        result = concatenate_datasets(tables)
        order = [starts[column, nth] + number for column, nth, number in found]
        return result if order == list(range(len(result))) else result.select(order)

    def numbered_rows(self, shards: Iterable[Any], names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        self.total, self.problems = 0, []
        layout = LAYOUTS[self.layout]
        whole = None if layout.records is None else lambda data, where: layout.records(data, self.split, where)
        for shard, source in zip(shards, names, strict=True):
            if isinstance(shard, str):
                source, records = shard, file_records(shard, whole)
            else:
                records = _table_records(shard, source)
            root = os.path.abspath(os.path.dirname(source) if self.root is None else self.root)
            for name, number, record in records:
                self.total += 1
                row_id = f"{name}:{number}"
                try:
                    rows = self.record_rows(record, layout, root)
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
                    yield self.total, {"id": row_id if len(rows) == 1 else f"{row_id}.{n}", **row}

    def record_rows(self, record: Any, layout: Layout, root: str) -> list[dict[str, Any]]:
        record = record.decoded() if isinstance(record, Line) else record
        if not isinstance(record, dict):
            raise BadRow("record", f"is a {type(record).__name__}, not an object. Write it as {layout.example}.")
        record = _renamed(record, self.source)
        for field in (*UNREAD, *UNREAD_MEMBERS):
            if record.get(field):
                raise BadRow(field, "is not read: a row is of texts and images. Drop the record or the field.")
        given = {**record, **{name: value for name, value in self.source.items() if value is not None}}
        rows = layout.rows(record)
        for row in rows:
            row["images"] = [_image(value, root, field) for field, value in row["images"]]
            row.update({name: given[name] for name in ("loss_on", "structure") if given.get(name) is not None})
            for kind, field, problem in row_problems(row, len(row["images"])):
                raise BadRow(field, problem, kind)
            row["structure"] = bool(row.get("structure", True))
        return rows

    def report(self) -> str:
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
        raise ValueError(
            f"{source} cannot be read after row {number} ({type(error).__name__}: {error}). Repair it or download it "
            "again."
        ) from error


def _images(table: Dataset, column: str) -> pa.ChunkedArray:
    """A column of images or of lists of them, flat."""
    images = table.select_columns(column).with_format("arrow")[:][column]
    return pc.list_flatten(images) if isinstance(table.features[column], List) else images


def _stores_images(table: Dataset, column: str) -> bool:
    """Whether a column has the bytes of images. One of paths alone is as good as one of texts."""
    feature = table.features[column]
    feature = feature.feature if isinstance(feature, List) else feature
    if isinstance(feature, Image):
        return bool(pc.any(pc.is_valid(pc.struct_field(_images(table, column), "bytes"))).as_py())
    return feature in (Value("binary"), Value("large_binary"))


def _without_images(table: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Records in which every image is only marked."""
    marks = {name: iter(_marks(_images(table, name), name)) for name in columns}
    counts = {}
    for name in columns:
        if isinstance(table.features[name], List):
            lists = table.select_columns(name).with_format("arrow")[:][name]
            counts[name] = iter(pc.list_value_length(lists).to_pylist())
    for record in table.remove_columns(columns):
        for name in columns:
            many = counts.get(name)
            record[name] = list(itertools.islice(marks[name], next(many) or 0)) if many else next(marks[name])
        yield record


def _marks(images: pa.ChunkedArray, column: str) -> list[_Stored | None]:
    if not pa.types.is_struct(images.type):
        return [_Stored(column, None) if valid else None for valid in pc.is_valid(images).to_pylist()]
    stored = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
    paths = pc.struct_field(images, "path").to_pylist()
    return [
        _Stored(column, None if inside else path) if inside or path else None
        for inside, path in zip(stored, paths, strict=True)
    ]


def _image_lists(table: Dataset, column: str) -> Dataset:
    """The column `images` of a column of images or of lists of them."""
    images = table.select_columns(column)
    if images.features[column] == ROW_FEATURES["images"]:
        return images if column == "images" else images.rename_column(column, "images")
    if isinstance(images.features[column], List):
        images = images.rename_column(column, "images") if column != "images" else images
        return images.cast_column("images", ROW_FEATURES["images"])
    return (
        images.with_format("arrow")
        .map(
            _as_lists,
            batched=True,
            remove_columns=column,
            features=Features({"images": ROW_FEATURES["images"]}),
            desc="arranging images",
        )
        .with_format(None)
    )


def _as_lists(batch: pa.Table) -> pa.Table:
    images = Image().cast_storage(pa.concat_arrays(batch.column(0).chunks))
    ends = pa.array([0, *itertools.accumulate(map(int, pc.is_valid(images).to_pylist()))], pa.int32())
    return pa.table({"images": pa.ListArray.from_arrays(ends, images.drop_null())})


def _image(value: Any, root: str, field: str) -> Any:
    """What a dataset stores of an image: a mapping of `path` and `bytes`."""
    if isinstance(value, _Stored):
        if value.path is not None and _image(value.path, root, field)["path"] != os.path.abspath(value.path):
            raise BadRow(field, f"is the path {value.path} among stored images. Write it in full, or store the image.")
        return value
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
    path = os.path.join(root, encodable(value, field))
    # photographs of VIST are named by their number alone
    for suffix in ("", *IMAGE_SUFFIXES) if not os.path.splitext(value)[1] else ("",):
        if os.path.isfile(path + suffix):
            return {"path": path + suffix, "bytes": None}
    raise BadRow(field, f"the image file {path} does not exist. Correct the path or set `image_root`.", "image")
