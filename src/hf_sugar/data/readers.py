"""Readers: known layouts of training data to TRL's conversational vision format, in which every content part is one
slice. A layout is one function from a record to rows; images stay paths or stored bytes until somebody looks at them."""

import glob
import gzip
import io
import itertools
import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    DownloadManager,
    Features,
    Image,
    IterableDataset,
    Json,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from huggingface_hub import HfFileSystem
from tqdm.auto import tqdm

from hf_sugar.models.processing_sugar import IMAGE_SUFFIXES
from hf_sugar.models.rows_sugar import LOSS_ON, UNREAD, conversation_row, fill_images, row_problems

from .checks import Problem
from .rows import undecoded


logger = logging.getLogger(__name__)

_TEXT_FEATURES = {
    "messages": List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}),
    "loss_on": Value("string"),
    "structure": Value("bool"),
    "id": Value("string"),
}
ROW_FEATURES = Features({**_TEXT_FEATURES, "images": List(Image())})
"""Columns of every dataset that this package reads; equal columns are what lets datasets be mixed."""

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_IMAGE = "<image>"
_JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zip")
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
# where image-caption data keep the image and the text; the first that a record has counts
_IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "file_name")
_CAPTION_FIELDS = ("caption", "text", "txt")
_KARPATHY_SPLITS = {"train": ("train", "restval"), "validation": ("val",)}


class _BadRow(Exception):
    def __init__(self, field: str, problem: str, kind: str = "malformed"):
        self.field, self.problem, self.kind = field, problem, kind


class _Line(str):
    """A line of a file that is still to be decoded."""


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
    bad_rows: list[Problem] | None = None,
) -> Dataset | IterableDataset:
    """
    Load one source of rows, or several and mix them. A source is a path, a Hub dataset id, or a mapping:

    - `path`: a file, a glob (`shards/*.tar`), a folder (of `Dataset.save_to_disk`, of parquet, of images with their
      `metadata.jsonl` or `metadata.csv`), or a Hub id. Files are JSON or JSON lines, also compressed (`.gz`) or in zip
      archives, parquet, and WebDataset `.tar`.
    - `format`: the layout, one of those in docs/data.md, or `"auto"`, the default, which looks at the first record.
    - `image_root`: folder that image paths are relative to. Defaults to the folder of the file.
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
        source if isinstance(source, dict) else {"path": source}
        for source in (sources if isinstance(sources, list) else [sources])
    ]
    if not sources:
        raise ValueError("`sources` is empty. Name at least one file, folder or Hub dataset.")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"`on_bad_row` is {on_bad_row!r}. Use 'error' or 'skip'.")
    for n, source in enumerate(sources):
        if "path" not in source or not source.keys() <= set(_SOURCE_KEYS):
            raise ValueError(
                f"sources[{n}] has the keys {', '.join(source)}. It needs `path` and may have "
                f"{', '.join(_SOURCE_KEYS[1:])}."
            )
        for key, choices in (("format", ("auto", *_LAYOUTS)), ("loss_on", LOSS_ON), ("structure", (True, False))):
            if source.get(key) is not None and source[key] not in choices:
                raise ValueError(
                    f"{source['path']}: `{key}` is {source[key]!r}. Use one of {', '.join(map(str, choices))}."
                )
    weights = [source["weight"] for source in sources if source.get("weight") is not None]
    if weights and (len(weights) < len(sources) or min(weights) <= 0):
        raise ValueError("Give every source a `weight` greater than 0, or none of them.")

    parts = [_load_source(source, split, on_bad_row, streaming, bad_rows) for source in sources]
    if not streaming:
        for source, part in zip(sources, parts, strict=True):
            logger.info("%s: %d rows", source["path"], len(part))
    if len(parts) == 1:
        return parts[0]
    if weights:
        probabilities = [weight / sum(weights) for weight in weights]
        return interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")
    if streaming:
        return interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
    return concatenate_datasets(parts).shuffle(seed=seed)


def load_table(
    source: str | os.PathLike | dict[str, Any], split: str = "train", *, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Load a dataset of any columns as it is: a folder written by `Dataset.save_to_disk`, a folder, file or glob of
    parquet or WebDataset tar archives, a folder of images with metadata, or a Hub id.

    Args:
        source (`str` or `os.PathLike` or `dict`):
            Path or Hub id, or a mapping as in [`load_data`].
        split (`str`, *optional*, defaults to `"train"`):
            Split, where there are several.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows when they are asked for.

    Returns:
        [`datasets.Dataset`] or [`datasets.IterableDataset`]

    Raises:
        `FileNotFoundError`: if the path does not exist.
        `ValueError`: if it is none of these, or damaged.
    """
    source = source if isinstance(source, dict) else {"path": source}
    path, split = str(source["path"]), source.get("split") or split
    kind, files = _locate(source, split)
    if kind == "json":
        if streaming:
            return IterableDataset.from_generator(_json_records, gen_kwargs={"files": files})
        return _json_table(files)
    if kind == "tar":
        if streaming:
            return IterableDataset.from_generator(_tar_records, gen_kwargs={"files": files})
        return _tar_table(files)
    if kind == "saved":
        dataset = load_from_disk(path)
        if isinstance(dataset, DatasetDict):
            dataset = dataset[_known_split(split, dataset, path)]
        return dataset.to_iterable_dataset() if streaming else dataset
    if kind == "parquet":
        return _load_dataset(path, "parquet", data_files=files, split="train", streaming=streaming)
    revision = {} if os.path.isdir(path) else {"revision": source.get("revision")}
    return _load_dataset(path, path, name=source.get("name"), split=split, streaming=streaming, **revision)


def _locate(source: dict[str, Any], split: str) -> tuple[str, list[str]]:
    """
    What the `path` of a source is, and its files: `"json"` and `"tar"` are read here, `"saved"`, `"parquet"` and
    `"other"` by `datasets`.

    `datasets` guesses the types of JSON values from those that come first: contents that are texts in one file and
    lists of parts in another come as JSON text, texts that are all dates as datetimes, 3.5 as 3; of samples in tar
    shards whose members differ from those of the first it drops members. Seen with 5.2.0; what is read here can go
    when `load_dataset` gives what the files say.
    """
    path = str(source["path"])
    if path.endswith(_JSON_SUFFIXES):
        return "json", _files(path)
    if path.endswith((".tar", ".parquet")):
        return path.rpartition(".")[2], _files(path)
    if any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json")):
        return "saved", []
    if os.path.isfile(path):
        raise ValueError(f"{path}: what kind of file is this? Read are {', '.join(_JSON_SUFFIXES)}, .parquet, .tar.")
    is_folder = os.path.isdir(path)
    if not is_folder and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise _not_found(path)

    builder = load_dataset_builder(path, source.get("name"), revision=None if is_folder else source.get("revision"))
    kind, by_split = type(builder).__module__.rpartition(".")[2], builder.config.data_files
    suffixes = {"json": _JSON_SUFFIXES, "webdataset": (".tar",), "imagefolder": ("metadata.jsonl",)}.get(kind)
    if suffixes is None:
        return "other", []
    if kind == "imagefolder" and not any(
        os.path.basename(f).startswith("metadata.") for f in sum(by_split.values(), [])
    ):
        # images beside the files that name them
        suffixes, by_split = _JSON_SUFFIXES, load_dataset_builder("json", data_dir=path).config.data_files
    files = [file for file in by_split[_known_split(split, by_split, path)] if file.endswith(suffixes)]
    if not files:
        return "other", []
    return ("tar", files) if kind == "webdataset" else ("json", DownloadManager().download(files))


def _load_dataset(path: str, builder: str, **kwargs) -> Dataset | IterableDataset:
    try:
        return load_dataset(builder, **kwargs)
    except FileNotFoundError:
        raise
    except Exception as error:  # of pyarrow, tarfile, the builders ...
        cause = (error.__cause__ or error) if isinstance(error, DatasetGenerationError) else error
        raise ValueError(
            f"{path} cannot be read ({type(cause).__name__}: {cause}). Repair it or download it again."
        ) from error


def _known_split(split: str, splits: Iterable[str], path: str) -> str:
    if split not in splits:
        raise ValueError(
            f"{path}: there is no split {split!r}, but {', '.join(map(str, splits))}. Set `split` to one of them."
        )
    return split


def _not_found(path: str) -> FileNotFoundError:
    found = "finds no file" if glob.has_magic(path) else "does not exist"
    return FileNotFoundError(f"{path} {found}. Correct the `path`, relative to {os.getcwd()}.")


def _files(path: str) -> list[str]:
    """The files that a path or a glob names, in the order of their names."""
    if path.startswith("hf://"):
        return [f"hf://{file}" for file in HfFileSystem().glob(path)]
    files = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.isfile(path) else [path]
    if not files or not all(map(os.path.isfile, files)):
        raise _not_found(path)
    return files


def _load_source(
    source: dict[str, Any], split: str, on_bad_row: str, streaming: bool, bad_rows: list[Problem] | None
) -> Dataset | IterableDataset:
    path, layout = str(source["path"]), source.get("format") or "auto"
    reading = _Reading(source, source.get("split") or split, on_bad_row, bad_rows)
    kind, files = _locate(source, reading.split)
    if kind == "json":
        reading.layout = _sniff(files[0], source) if layout == "auto" else layout
        return reading.stream(files) if streaming else reading.collect(files)
    if kind == "tar" and streaming:
        reading.layout = "captions" if layout == "auto" else layout
        return reading.stream(files)

    table = undecoded(load_table(source, split, streaming=streaming))
    reading.layout = _layout_of(set(_renamed(table.features, source)), path) if layout == "auto" else layout
    if reading.root is None:
        reading.root = path if os.path.isdir(path) else os.path.dirname(path)
    if streaming:
        return reading.stream([table.shard(table.num_shards, n) for n in range(table.num_shards)])
    if any(_holds_images(feature) for feature in table.features.values()):
        return reading.collect_stored(table)
    return reading.collect([table])


def _layout_of(fields: set[str], where: str) -> str:
    """The layout of a record (or of the object that a whole file is) with these fields."""
    for name, layout in _LAYOUTS.items():
        if any(mark <= fields for mark in layout.marks):
            return name
    hint = "Download the images that `url` names first, for example with img2dataset. " if "url" in fields else ""
    examples = "\n  ".join(f"{name}: {layout.example}" for name, layout in _LAYOUTS.items())
    raise ValueError(
        f"{where}: no layout is known with the fields {', '.join(sorted(fields))}. {hint}Use `rename`, or bring the data into "
        f"one of these layouts:\n  {examples}"
    )


def _sniff(path: str, source: dict[str, Any]) -> str:
    with _open_text(path) as files:
        name, file = next(files)
        text, record, size = "", None, 1 << 20
        # a list is often one line of gigabytes: read until its first record is complete
        with _readable(path, name):
            while record is None and (more := file.read(size)):
                text = (text + more).lstrip("\ufeff \t\r\n[")
                size = len(text)  # twice as much every time, or one large record is parsed again and again
                try:
                    record, _ = json.JSONDecoder().raw_decode(text)
                except json.JSONDecodeError:
                    continue
    if not isinstance(record, dict):
        raise ValueError(f"{path}: the first record is not a JSON object. Write a list of objects, or one a line.")
    return _layout_of(set(_renamed(record, source)), f"{path}, first record")


@contextmanager
def _open_text(path: str | os.PathLike) -> Iterator[Iterator[tuple[str, io.TextIOBase]]]:
    """The text files behind a path with their names: one, or the members of a zip archive."""
    path = Path(path)
    if path.suffix == ".zip":
        with _readable(path, path.name), zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
            if not names:
                raise ValueError(f"{path}: the archive has no .json or .jsonl file.")
            yield ((name, io.TextIOWrapper(archive.open(name), encoding="utf-8-sig")) for name in names)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            yield iter([(path.name, file)])


@contextmanager
def _readable(path: str | os.PathLike, name: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: {name} is damaged ({type(error).__name__}: {error}). Repair it or download it again."
        ) from error


def _file_records(path: str, layout: "_Layout | None", split: str) -> Iterator[tuple[str, int | str, Any]]:
    """File name, number from 1 (of a tar shard the key) and record; of files with one object a line the undecoded
    line."""
    if path.endswith(".tar"):
        yield from ((os.path.basename(path), sample["__key__"], sample) for sample in _tar_records([path]))
        return
    with _open_text(path) as files:
        for name, file in files:
            with _readable(path, name):
                first = file.readline()
                while first.isspace():
                    first = file.readline()
                file.seek(0)
                whole = layout is not None and layout.records is not None
                if whole or first.lstrip().startswith("["):
                    try:
                        records = json.load(file)
                    except json.JSONDecodeError as error:
                        raise ValueError(
                            f"{path}: {name} is not valid JSON: {error}. Repair or re-download it."
                        ) from error
                    numbered = layout.records(records, split, f"{path}: {name}") if whole else enumerate(records, 1)
                    yield from ((name, number, record) for number, record in numbered)
                else:
                    lines = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
                    yield from ((name, number, _Line(line)) for number, line in lines)


def _parsed(line: _Line) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadRow("line", f"is not valid JSON: {error}. Write one object a line.") from error


def _json_records(files: list[str]) -> Iterator[dict[str, Any]]:
    for path in files:
        for name, number, record in _file_records(path, None, ""):
            try:
                record = _parsed(record) if isinstance(record, _Line) else record
            except _BadRow as bad:
                raise ValueError(f"{path}: {name}, row {number}, `{bad.field}`: {bad.problem}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}: {name}, row {number} is a {type(record).__name__}, not an object.")
            yield record


def _json_table(files: list[str]) -> Dataset:
    """All records of JSON files. A column whose values are of several kinds is one of JSON."""
    records = list(_json_records(files))
    columns, features = {}, {}
    for name in dict.fromkeys(itertools.chain.from_iterable(records)):
        values = [record.get(name) for record in records]
        try:
            columns[name] = pa.array(values)
            features[name] = Features.from_arrow_schema(pa.schema([(name, columns[name].type)]))[name]
        except (pa.ArrowException, OverflowError):
            features[name] = Json()
            # as text, because `Json` takes a text that could be JSON, such as "3", for the number
            columns[name] = Json().cast_storage(pa.array([None if v is None else json.dumps(v) for v in values]))
    return Dataset(pa.table(columns), DatasetInfo(features=Features(features)))


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Members of a WebDataset shard: key and, in lower case, field, which is all that follows the first dot."""
    for member in archive:
        folder, name = os.path.split(member.name)
        key, dot, field = name.partition(".")
        if member.isfile() and key and dot:
            yield member, os.path.join(folder, key), field.lower()
    # at a header that is damaged or cut short `tarfile` stops without a word
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no header and no end of the archive at byte {archive.offset}")


@contextmanager
def _open_tar(path: str) -> Iterator[tarfile.TarFile]:
    try:
        with fsspec.open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Repair it or download it again."
        ) from error


def _tar_records(files: list[str]) -> Iterator[dict[str, Any]]:
    """Samples of WebDataset shards. A text that is not UTF-8 is None, a JSON member that is not JSON its text."""
    for path in files:
        with _open_tar(path) as archive:
            for key, members in itertools.groupby(_tar_members(archive), lambda member: member[1]):
                sample = {"__key__": key, "__url__": path}
                for member, _, field in members:
                    if field in sample:
                        raise ValueError(f"{path}: the sample {key} has two members {field}. Give one another key.")
                    value = archive.extractfile(member).read()
                    feature = _tar_feature(field)
                    if isinstance(feature, Image):
                        value = {"path": os.path.basename(member.name), "bytes": value}
                    elif feature != Value("binary"):
                        try:
                            value = value.decode()
                        except UnicodeDecodeError:
                            value = None
                        if isinstance(feature, Json):
                            try:
                                value = json.loads(value or "null")
                            except json.JSONDecodeError:
                                pass
                    sample[field] = value
                yield sample


def _tar_feature(field: str) -> Any:
    suffix = "." + field.rpartition(".")[2]
    if suffix in IMAGE_SUFFIXES:
        return Image()
    return Json() if suffix == ".json" else Value("string" if suffix[1:] in _CAPTION_FIELDS else "binary")


def _tar_table(files: list[str]) -> Dataset:
    """All samples of WebDataset shards, in the cache of `datasets`, with a column for every field that one has."""
    files = DownloadManager().download(files)
    features = {"__key__": Value("string"), "__url__": Value("string")}
    for path in files:
        with _open_tar(path) as archive:
            features.update({field: _tar_feature(field) for _, _, field in _tar_members(archive)})
    stats = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]

    def rows(files):
        for sample in _tar_records(files):
            # as text, because `Json` takes a text that could be JSON, such as "3", for the number
            texts = {name: json.dumps(sample.get(name)) for name in features if features[name] == Json()}
            yield {**dict.fromkeys(features), **sample, **texts}

    fingerprint = Hasher.hash([stats, sorted(features)])
    try:
        return Dataset.from_generator(rows, Features(features), gen_kwargs={"files": files}, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


class _Reading:
    """Reads one source into rows, and refuses or counts the bad ones."""

    def __init__(self, source: dict[str, Any], split: str, on_bad_row: str, bad_rows: list[Problem] | None):
        self.source, self.split, self.bad_rows = source, split, bad_rows
        self.path, self.skip = str(source["path"]), on_bad_row == "skip"
        self.layout, self.root = "", source.get("image_root")
        self.total, self.problems = 0, []

    def stream(self, parts: list[str | IterableDataset]) -> IterableDataset:
        names = [self.path]
        if len(parts) > 1:
            names = [f"{self.path}[{n}]" for n in range(len(parts))]
        return IterableDataset.from_generator(
            self.rows, features=ROW_FEATURES, gen_kwargs={"parts": parts, "names": names}
        )

    def rows(self, parts: list[str | IterableDataset], names: list[str]) -> Iterator[dict[str, Any]]:
        try:
            for _, row in self.numbered_rows(parts, names):
                yield row
        finally:  # training may stop before the end
            if self.problems:
                logger.warning(self.report())

    def collect(self, parts: list[str | Dataset]) -> Dataset:
        rows = iter(tqdm(self.rows(parts, [self.path] * len(parts)), desc=f"reading {self.path}", unit=" rows"))
        tables = []
        while chunk := list(itertools.islice(rows, 10_000)):
            tables.append(Dataset.from_list(chunk, features=ROW_FEATURES))
        if not tables:
            raise ValueError(self.report())
        return concatenate_datasets(tables)

    def collect_stored(self, table: Dataset) -> Dataset:
        """Rows of a table that holds images: the text is written anew, the images are not read."""
        columns = [name for name, feature in table.features.items() if _holds_images(feature)]
        # a record may give several rows with the same image: the first ones of all records, then the second ones ...
        rows: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
        order = []
        records = tqdm(_without_images(table, columns), total=len(table), desc=f"reading {self.path}", unit=" rows")
        for number, row in self.numbered_rows([records], [self.path]):
            column, nth = row.pop("images")[0].column if row["images"] else columns[0], 0
            while number in rows.setdefault((column, nth), {}):
                nth += 1
            rows[column, nth][number] = row
            order.append((column, nth, number))
        if self.problems or not order:
            report = self.report()
            if not order:
                raise ValueError(report)
            logger.warning(report)
        unused = dict.fromkeys(_TEXT_FEATURES)
        parts, starts = [], {}
        for (column, nth), found in rows.items():
            starts[column, nth] = len(parts) * len(table) - 1
            texts = [{**unused, **found.get(number, {})} for number in range(1, len(table) + 1)]
            texts = Dataset.from_list(texts, features=Features(_TEXT_FEATURES))
            parts.append(concatenate_datasets([texts, _image_lists(table, column)], axis=1))
        result = concatenate_datasets(parts)
        places = [starts[column, nth] + number for column, nth, number in order]
        return result if places == list(range(len(result))) else result.select(places)

    def numbered_rows(self, parts: Iterable[Any], names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        self.total, self.problems = 0, []
        for part, source in zip(parts, names, strict=True):
            is_file = isinstance(part, str)
            root = os.path.abspath(os.path.dirname(part) if is_file and self.root is None else self.root)
            records = (
                _file_records(part, _LAYOUTS[self.layout], self.split) if is_file else _table_records(part, source)
            )
            source = part if is_file else source
            for name, number, record in records:
                self.total += 1
                row_id = f"{name}:{number}"
                try:
                    rows = self.record_rows(record, root)
                except _BadRow as bad:
                    row = (
                        f"row {number}"
                        if name == os.path.basename(os.path.normpath(source))
                        else f"{name}, row {number}"
                    )
                    message = f"{source}, {row}, `{bad.field}`: {bad.problem}"
                    if not self.skip:
                        raise ValueError(f"{message} Or leave such rows out with on_bad_row='skip'.") from None
                    self.problems.append(message)
                    if self.bad_rows is not None:
                        self.bad_rows.append(Problem(None, bad.field, bad.problem, row_id, bad.kind))
                    continue
                for n, row in enumerate(rows, 1):
                    yield self.total, {"id": row_id if len(rows) == 1 else f"{row_id}.{n}", **row}

    def record_rows(self, record: Any, root: str) -> list[dict[str, Any]]:
        record = _parsed(record) if isinstance(record, _Line) else record
        layout = _LAYOUTS[self.layout]
        if not isinstance(record, dict):
            raise _BadRow("record", f"is a {type(record).__name__}, not an object. Write it as {layout.example}.")
        record = _renamed(record, self.source)
        for field in UNREAD:
            if record.get(field):
                raise _BadRow(field, "is not read: a row is of texts and images. Drop the record, or the field.")
        rows = layout.rows(record)
        for row in rows:
            row["images"] = [_image(value, root, field) for field, value in row["images"]]
            if self.source.get("structure") is not None:
                row["structure"] = self.source["structure"]
            row.setdefault("structure", True)
            if self.source.get("loss_on") is not None:
                row["loss_on"] = self.source["loss_on"]
                for kind, field, problem in row_problems(row, len(row["images"])):
                    raise _BadRow(field, problem, kind)
        return rows

    def report(self) -> str:
        left = (
            "none of {} rows is left."
            if len(self.problems) == self.total
            else f"skipped {len(self.problems)} of {{}} rows, first:"
        )
        return "\n  ".join([f"{self.path}: {left.format(self.total)}", *self.problems[:5]])


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


def _holds_images(feature: Any) -> bool:
    feature = feature.feature if isinstance(feature, List) else feature
    return isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary"))


def _without_images(table: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Records in which every image is only marked."""
    marks = {}
    for name in columns:
        images = table.select_columns(name).with_format("arrow")[:][name]
        if isinstance(table.features[name], List):
            every = iter(_marks(pc.list_flatten(images), name))
            counts = pc.list_value_length(images).to_pylist()
            marks[name] = [list(itertools.islice(every, count or 0)) for count in counts]
        else:
            marks[name] = _marks(images, name)
    number = 0
    for batch in table.remove_columns(columns).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield {**dict(zip(batch, values, strict=True)), **{name: marks[name][number] for name in columns}}
            number += 1


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
        if value.path is not None:
            _image(value.path, root, field)
        return value
    if isinstance(value, dict) and value.get("bytes") is None:
        value = value.get("path")
    if isinstance(value, dict | bytes):
        return {"path": None, "bytes": value["bytes"] if isinstance(value, dict) else value}
    if value is None:
        raise _BadRow(field, "there is no image. Give its path or drop the row.", "image")
    if not isinstance(value, str) or not value:
        raise _BadRow(field, f"is {value!r}, not a path. Give the image's path relative to {root}.", "image")
    if value.startswith(("http://", "https://")):
        raise _BadRow(field, f"{value} is a web address. Download the images and give their local paths.", "image")
    path = os.path.join(root, _encodable(value, field))
    # photographs of VIST are named by their number alone
    for suffix in ("", *IMAGE_SUFFIXES) if not os.path.splitext(value)[1] else ("",):
        if os.path.isfile(path + suffix):
            return {"path": path + suffix, "bytes": None}
    raise _BadRow(field, f"the image file {path} does not exist. Correct the path or set `image_root`.", "image")


def _encodable(value: str, field: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say it, Arrow and files cannot
        raise _BadRow(
            field, f"has half of a surrogate pair at character {error.start + 1}. Write the whole character."
        ) from error
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(field, f"is {value!r}, not a string. Write the text.")
    if not value.strip():
        raise _BadRow(field, "is empty. Write the text or remove it.", "empty")
    return _encodable(value.strip(), field)


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _image_part() -> dict[str, None]:
    return {"type": "image", "text": None}


def _conversational_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    images = record.get("images") or []
    if not isinstance(images, list):
        raise _BadRow("images", "is not a list. Give the images' paths in the order of the image parts.")
    images = [(f"images[{n}]", image) for n, image in enumerate(images)]
    for field in ("image", "file_name"):  # one picture, or the row of a folder of images
        if not images and record.get(field) is not None:
            images = [(field, record[field])]
    for kind, field, problem in row_problems(record, len(images)):
        raise _BadRow(field, problem, kind)
    row = conversation_row(record)
    messages = [
        {
            "role": message["role"],
            "content": [
                _text_part(_encodable(part["text"], f"messages[{m}].content[{c}].text"))
                if part["type"] == "text"
                else _image_part()
                for c, part in enumerate(message["content"])
            ],
        }
        for m, message in enumerate(fill_images(record["messages"], [None] * len(images)))
    ]
    row = {
        "messages": messages,
        "images": images,
        "loss_on": row["loss_on"],
        "structure": row["structure"],
    }
    return [row if record.get("id") is None else {**row, "id": _encodable(str(record["id"]), "id")}]


def _llava_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _BadRow("conversations", f"is missing, empty or not a list. Write {_LAYOUTS['llava'].example}.")
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

    name = "images" if "images" in record else "image"
    images = record.get(name)
    single = not isinstance(images, list)
    images = [] if images is None else [images] if single else images
    if len(images) != placeholders:
        raise _BadRow(
            name,
            f"{len(images)} images but {placeholders} {_IMAGE} placeholders in the human turns. Give one placeholder for "
            "each image, in the same order.",
            "count",
        )
    images = [(name if single else f"{name}[{n}]", image) for n, image in enumerate(images)]
    return [{"messages": messages, "images": images, "loss_on": "answers"}]


def _mmc4_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    sentences, infos = record.get("text_list"), record.get("image_info")
    if not isinstance(sentences, list) or not sentences:
        raise _BadRow("text_list", f"is missing, empty or not a list. Write {_LAYOUTS['mmc4'].example}.")
    if not isinstance(infos, list):
        raise _BadRow("image_info", f"is missing or not a list. Write {_LAYOUTS['mmc4'].example}.")
    before: list[list[tuple[str, str]]] = [[] for _ in sentences]
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
        before[index].append((f"{field}.image_name", info.get("image_name")))
    parts = []
    for s, sentence in enumerate(sentences):
        parts += [_image_part() for _ in before[s]] + [_text_part(_text(sentence, f"text_list[{s}]"))]
    return [_document(parts, [image for images in before for image in images], "text")]


def _document(parts: list[dict[str, Any]], images: list[tuple[str, Any]], loss_on: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": parts}], "images": images, "loss_on": loss_on}


def _caption(image_field: str, image: Any, caption_field: str, caption: Any) -> dict[str, Any]:
    parts = [_image_part(), _text_part(_text(caption, caption_field))]
    return _document(parts, [(image_field, image)], "captions")


def _caption_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    image = next((field for field in _IMAGE_FIELDS if record.get(field) is not None), None)
    if image is None:
        raise _BadRow("image", f"there is no image in {', '.join(_IMAGE_FIELDS)}. Give one or drop the row.", "image")
    caption = next((field for field in _CAPTION_FIELDS if record.get(field) is not None), None)
    if caption is not None:
        texts = record[caption]
    elif isinstance(record.get("json"), dict) and record["json"].get("caption") is not None:  # WebDataset
        caption, texts = "json.caption", record["json"]["caption"]
    elif isinstance(record.get("json"), str):
        raise _BadRow("json", 'is not a JSON object. Write {"caption": ...}.')
    else:
        fields = ", ".join(_CAPTION_FIELDS)
        raise _BadRow("caption", f"is missing or not UTF-8. Write the text into one of {fields}.", "empty")
    if not isinstance(texts, list):
        return [_caption(image, record[image], caption, texts)]
    if not texts:
        raise _BadRow(caption, "is an empty list. Write a caption or drop the row.", "empty")
    return [_caption(image, record[image], f"{caption}[{n}]", text) for n, text in enumerate(texts)]


def _coco_records(data: Any, split: str, where: str) -> Iterator[tuple[int, Any]]:
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not images:
        raise ValueError(f"{where}: `images` is missing, empty or not a list. Write {_LAYOUTS['coco'].example}.")
    wanted = _KARPATHY_SPLITS.get(split, (split,))
    splits = {image.get("split") for image in images if isinstance(image, dict)}
    if not splits & set(wanted):
        raise ValueError(
            f"{where}: no image is of the split {split!r}, but of {', '.join(sorted(map(str, splits)))}. Set `split` to "
            "one of them."
        )
    for number, image in enumerate(images, 1):
        # one without a split belongs to all of them: it is a bad row in each
        if not isinstance(image, dict) or not isinstance(image.get("split"), str) or image["split"] in wanted:
            yield number, image


def _coco_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(record.get("split", ""), str):
        raise _BadRow("split", f"is {record['split']!r}, not a string. Use train, restval, val or test.")
    sentences = record.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise _BadRow("sentences", f"is missing, empty or not a list. Write {_LAYOUTS['coco'].example}.")
    field, image = "image", record.get("image")
    if image is None:
        field, image = "filename", record.get("filename")
        if isinstance(image, str) and record.get("filepath"):
            image = os.path.join(str(record["filepath"]), image)
    rows = []
    for n, sentence in enumerate(sentences):
        name = f"sentences[{n}]"
        if isinstance(sentence, dict):
            name, sentence = f"{name}.raw", sentence.get("raw")
        rows.append(_caption(field, image, name, sentence))
    return rows


def _vist_records(data: Any, split: str, where: str) -> Iterator[tuple[int, Any]]:
    annotations = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(annotations, list) or not annotations:
        raise ValueError(f"{where}: `annotations` is missing, empty or not a list. Write {_LAYOUTS['vist'].example}.")
    stories: dict[Any, list[tuple[int, Any]]] = {}
    for n, annotation in enumerate(annotations):
        step = annotation[0] if isinstance(annotation, list) and len(annotation) == 1 else annotation
        story = step.get("story_id") if isinstance(step, dict) else None
        # one that names no story is a bad row of its own
        stories.setdefault(n if story is None else str(story), []).append((n, step))
    yield from enumerate(({"steps": steps} for steps in stories.values()), 1)


def _vist_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    ordered: dict[int, tuple[str, dict[str, Any]]] = {}
    for n, step in record["steps"]:
        field = f"annotations[{n}]"
        if not isinstance(step, dict) or step.get("story_id") is None:
            raise _BadRow(field, f"is not a list of one step with a `story_id`. Write {_LAYOUTS['vist'].example}.")
        place = step.get("worker_arranged_photo_order")
        if type(place) is not int or place in ordered:
            raise _BadRow(
                f"{field}.worker_arranged_photo_order",
                f"is {place!r}. The steps of story {step['story_id']} need different whole numbers.",
            )
        ordered[place] = field, step
    places = sorted(ordered)
    if places != list(range(places[0], places[0] + len(places))):
        raise _BadRow(
            f"{ordered[places[0]][0]}.story_id",
            f"of the story {ordered[places[0]][1]['story_id']} only the steps {', '.join(map(str, places))} are there. "
            "Restore the others or drop the story.",
            "count",
        )
    parts, images = [], []
    for place in places:
        field, step = ordered[place]
        text = "original_text" if "original_text" in step else "text"
        images.append((f"{field}.photo_flickr_id", step.get("photo_flickr_id")))
        parts += [_image_part(), _text_part(_text(step.get(text), f"{field}.{text}"))]
    return [_document(parts, images, "text")]


def _winoground_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        _caption(f"image_{n}", record.get(f"image_{n}"), f"caption_{n}", record.get(f"caption_{n}")) for n in (0, 1)
    ]


class _Layout(NamedTuple):
    """
    How one layout is told and read: a record that has all fields of one of `marks` is of this layout, `rows` makes rows
    of it, and `records` gives the numbered records of a file that is one object.
    """

    rows: Callable[[dict[str, Any]], list[dict[str, Any]]]
    marks: list[set[str]]
    example: str
    records: Callable[[Any, str, str], Iterator[tuple[int, Any]]] | None = None


_LAYOUTS = {
    "conversational": _Layout(
        _conversational_rows,
        [{"messages"}],
        '{"messages": [{"role", "content": [{"type", "text"}]}], "images": [...], "loss_on", "id"}',
    ),
    "llava": _Layout(
        _llava_rows,
        [{"conversations"}],
        '{"image": path or list of paths (optional), "conversations": [{"from": "human", "value": "<image>..."}, ...]}',
    ),
    "mmc4": _Layout(
        _mmc4_rows,
        [{"text_list"}],
        '{"text_list": [...], "image_info": [{"image_name", "matched_text_index"}]}',
    ),
    "winoground": _Layout(
        _winoground_rows,
        [{"image_0", "image_1", "caption_0", "caption_1"}],
        '{"image_0", "image_1", "caption_0", "caption_1"}',
    ),
    "vist": _Layout(
        _vist_rows,
        [{"images", "annotations"}],
        '{"images": [...], "annotations": [[{"story_id", "worker_arranged_photo_order", "photo_flickr_id", "text"}], ...]}',
        _vist_records,
    ),
    "coco": _Layout(
        _coco_rows,
        [{"images", "dataset"}, {"sentences"}],
        '{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}, ...]}], "dataset": "coco"}',
        _coco_records,
    ),
    "captions": _Layout(
        _caption_rows,
        [{image, caption} for image in _IMAGE_FIELDS for caption in (*_CAPTION_FIELDS, "json")],
        '{"image": path or stored image, "caption": text or list of texts}',
    ),
}
