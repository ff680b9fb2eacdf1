"""
Files and tables: what a path names, and the records in it as they are written.

JSON files and tar shards are read here. `datasets` guesses the types of JSON values from those that come first: contents that
are texts in one file and lists of parts in another come as JSON text, texts that are all dates as datetimes, 3.5 as 3. Of
samples of a tar shard whose members differ from those of the first it drops members, and it refuses a shard whose first five
samples differ. Seen with 5.2.0; this can go when `load_dataset` gives what the files say.
"""

import glob
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    DownloadManager,
    Features,
    Image,
    IterableDataset,
    Json,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from huggingface_hub import HfFileSystem

from hf_sugar.models.rows_sugar import IMAGE_SUFFIXES

from .layouts import CAPTION_FIELDS, BadRow


JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zip")


def load_table(
    source: str | os.PathLike | dict[str, Any], split: str = "train", *, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Load a dataset of any columns as it is: a folder written by `Dataset.save_to_disk`, a folder, file or glob of JSON,
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
    split = source.get("split") or split
    return load_located(*locate(source, split), source, split, streaming)


def load_located(kind: str, files: list[str], source: dict[str, Any], split: str, streaming: bool):
    path = str(source["path"])
    if kind in ("json", "tar"):
        if streaming:
            records = json_records if kind == "json" else tar_records
            return IterableDataset.from_generator(records, gen_kwargs={"files": files})
        return json_table(files) if kind == "json" else tar_table(files)
    if kind == "saved":
        dataset = load_from_disk(path)
        if isinstance(dataset, DatasetDict):
            dataset = dataset[_known_split(split, dataset, path)]
        return dataset.to_iterable_dataset() if streaming else dataset
    if kind == "parquet":
        return _load_dataset(path, "parquet", data_files=files, split="train", streaming=streaming)
    revision = {} if os.path.isdir(path) else {"revision": source.get("revision")}
    return _load_dataset(path, path, name=source.get("name"), split=split, streaming=streaming, **revision)


def locate(source: dict[str, Any], split: str) -> tuple[str, list[str]]:
    """What the `path` of a source is, and its files: `"json"` and `"tar"` are read here, see `files.py`, and `"saved"`,
    `"parquet"` and `"other"` by `datasets`."""
    path = str(source["path"])
    if path.endswith(JSON_SUFFIXES):
        return "json", _files(path)
    if path.endswith((".tar", ".parquet")):
        return path.rpartition(".")[2], _files(path)
    if any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json")):
        return "saved", []
    if os.path.isfile(path):
        raise ValueError(f"{path}: what kind of file is this? Read are {', '.join(JSON_SUFFIXES)}, .parquet, .tar.")
    is_folder = os.path.isdir(path)
    if not is_folder and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise _not_found(path)

    revision = None if is_folder else source.get("revision")
    try:
        builder = load_dataset_builder(path, source.get("name"), revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        if is_folder:
            raise
        raise FileNotFoundError(f"{path} is no file or folder in {os.getcwd()} and no Hub dataset: {error}") from error
    kind, by_split = type(builder).__module__.rpartition(".")[2], builder.config.data_files or {}
    suffixes = {"json": JSON_SUFFIXES, "webdataset": (".tar",), "imagefolder": ("metadata.jsonl",)}.get(kind)
    names = {os.path.basename(file) for files in by_split.values() for file in files}
    if kind == "imagefolder" and not any(name.startswith("metadata.") for name in names):
        # perhaps images beside the files that name them
        suffixes, by_split = JSON_SUFFIXES, load_dataset_builder("json", data_dir=path).config.data_files
    if suffixes is None or not any(file.endswith(suffixes) for files in by_split.values() for file in files):
        return "other", []
    files = [file for file in by_split[_known_split(split, by_split, path)] if file.endswith(suffixes)]
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


class Line(str):
    """A line of a file that is still to be decoded."""

    def decoded(self) -> Any:
        try:
            return json.loads(self)
        except json.JSONDecodeError as error:
            raise BadRow("line", f"is not valid JSON: {error}. Write one object a line.") from error


def file_records(
    path: str, whole: Callable[[Any, str], Iterator[tuple[int, Any]]] | None = None
) -> Iterator[tuple[str, int | str, Any]]:
    """
    Records of a file.

    Args:
        path (`str`):
            JSON file, list or lines, perhaps compressed or in a zip archive, or tar shard.
        whole (`Callable`, *optional*):
            Gives the numbered records of a JSON file that is one object, from the object and its name.

    Yields:
        `tuple[str, int | str, Any]`: name of the file (of a zip archive that of the member), number from 1 (of a tar
        shard the key), and the record; of files with one object a line a [`Line`].

    Raises:
        `ValueError`: for a file that is damaged as a whole.
    """
    if path.endswith(".tar"):
        yield from ((os.path.basename(path), sample["__key__"], sample) for sample in tar_records([path]))
        return
    with open_text(path) as files:
        for name, file in files:
            with readable(path, name):
                first = file.readline()
                while first.isspace():
                    first = file.readline()
                file.seek(0)
                if whole is None and not first.lstrip().startswith("["):
                    yield from ((name, n, Line(line)) for n, line in enumerate(file, 1) if not line.isspace())
                    continue
                try:
                    records = json.load(file)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}: {name} is not valid JSON: {error}. Repair or re-download it."
                    ) from error
                numbered = enumerate(records, 1) if whole is None else whole(records, f"{path}: {name}")
                yield from ((name, number, record) for number, record in numbered)


def first_record(path: str) -> Any:
    """The first record of a JSON file, or the object that it is. A list is often one line of gigabytes: it is read until
    the record is complete."""
    with open_text(path) as files:
        name, file = next(files)
        text, record, size = "", None, 1 << 20
        with readable(path, name):
            while record is None and (more := file.read(size)):
                text = (text + more).lstrip("\ufeff \t\r\n[")
                size = len(text)  # twice as much every time, or one large record is parsed again and again
                try:
                    record, _ = json.JSONDecoder().raw_decode(text)
                except json.JSONDecodeError:
                    continue
    if not isinstance(record, dict):
        raise ValueError(f"{path}: the first record is not a JSON object. Write a list of objects, or one a line.")
    return record


@contextmanager
def open_text(path: str | os.PathLike) -> Iterator[Iterator[tuple[str, io.TextIOBase]]]:
    """The text files behind a path with their names: one, or the members of a zip archive."""
    path = Path(path)
    if path.suffix == ".zip":
        with readable(path, path.name), zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
            if not names:
                raise ValueError(f"{path}: the archive has no .json or .jsonl file.")
            yield ((name, io.TextIOWrapper(archive.open(name), encoding="utf-8-sig")) for name in names)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            yield iter([(path.name, file)])


@contextmanager
def readable(path: str | os.PathLike, name: str) -> Iterator[None]:
    """Turns what the libraries say of a damaged file into an error that names it."""
    damage = (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError, UnicodeDecodeError)
    try:
        yield
    except damage as error:
        raise ValueError(
            f"{path}: {name} is damaged ({type(error).__name__}: {error}). Repair it or download it again."
        ) from error


def json_records(files: list[str]) -> Iterator[dict[str, Any]]:
    """All records of JSON files; a bad one is an error that names file and row."""
    for path in files:
        for name, number, record in file_records(path):
            try:
                record = record.decoded() if isinstance(record, Line) else record
            except BadRow as bad:
                raise ValueError(f"{path}: {name}, row {number}, `{bad.field}`: {bad.problem}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}: {name}, row {number} is a {type(record).__name__}, not an object.")
            yield record


def json_table(files: list[str]) -> Dataset:
    """[`json_records`] as a table. A column whose values are of several kinds is one of JSON."""
    records = list(json_records(files))
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


@contextmanager
def _open_tar(path: str) -> Iterator[tarfile.TarFile]:
    with (
        readable(path, os.path.basename(path)),
        fsspec.open(path) as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        yield archive


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Members of a shard: key and, in lower case, field, which is all that follows the first dot."""
    for member in archive:
        folder, name = os.path.split(member.name)
        key, dot, field = name.partition(".")
        if member.isfile() and key and dot:
            yield member, os.path.join(folder, key), field.lower()
    # at a header that is damaged or cut short `tarfile` stops without a word
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no header and no end of the archive at byte {archive.offset}")


def _tar_feature(field: str) -> Any:
    suffix = "." + field.rpartition(".")[2]
    if suffix in IMAGE_SUFFIXES:
        return Image()
    return Json() if suffix == ".json" else Value("string" if suffix[1:] in CAPTION_FIELDS else "binary")


def tar_records(files: list[str]) -> Iterator[dict[str, Any]]:
    """Samples of tar shards, with `__key__` and `__url__`. A text that is not UTF-8 is None, a JSON member that is not
    JSON its text."""
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
                            value = json.loads(value) if feature == Json() else value
                        except UnicodeDecodeError:
                            value = None
                        except json.JSONDecodeError:
                            pass
                    sample[field] = value
                yield sample


def tar_table(files: list[str]) -> Dataset:
    """[`tar_records`] as a table in the cache of `datasets`, with a column for every field that one of them has."""
    files = DownloadManager().download(files)
    features = {"__key__": Value("string"), "__url__": Value("string")}
    for path in files:
        with _open_tar(path) as archive:
            features.update({field: _tar_feature(field) for _, _, field in _tar_members(archive)})
    stats = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]

    def rows(files):
        for sample in tar_records(files):
            # as text, because `Json` takes a text that could be JSON, such as "3", for the number
            texts = {name: json.dumps(sample.get(name)) for name in features if features[name] == Json()}
            yield {**dict.fromkeys(features), **sample, **texts}

    fingerprint = Hasher.hash([stats, sorted(features)])
    try:
        return Dataset.from_generator(rows, Features(features), gen_kwargs={"files": files}, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
