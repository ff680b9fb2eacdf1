"""
Files and tables: what a path names, and the records in it as they are written.

JSON files and tar shards are read here: `datasets` guesses the types of JSON values from those that come first (texts beside
lists of parts become JSON text, texts that are all dates datetimes, 3.5 becomes 3), drops members of tar samples that the first
sample lacks, and refuses shards whose first five samples differ. Seen with 5.2.0; this can go when `load_dataset` gives what
the files say.
"""

import difflib
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
from typing import Any

import datasets
import fsspec
import pyarrow as pa
from datasets import Dataset, DownloadManager, Features, Image, IterableDataset, Json, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from huggingface_hub import HfFileSystem

from hf_sugar.models.rows_sugar import IMAGE_SUFFIXES

from .layouts import CAPTION_FIELDS, BadRow


JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zip")
TABLE_KEYS = ("path", "split", "name", "revision")


def load_table(
    source: str | os.PathLike | dict[str, Any], split: str = "train", *, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Load a dataset of any columns as it is: a folder written by `Dataset.save_to_disk`, a folder, file or glob of JSON,
    parquet or WebDataset tar archives, a folder of images with metadata, or a Hub id.

    Args:
        source (`str` or `os.PathLike` or `dict`): Path or Hub id, or a mapping as in [`load_data`].
        split (`str`, *optional*, defaults to `"train"`): Split, where there are several.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read rows when they are asked for.

    Raises:
        `FileNotFoundError`, `ValueError`: if the path does not exist, is none of these, or is damaged.
    """
    source = source if isinstance(source, dict) else {"path": source}
    check_source(source, TABLE_KEYS)
    split = source.get("split") or split
    return load_located(*locate(source, split), source, split, streaming)


def check_source(source: dict[str, Any], keys: Iterable[str], name: str = "source") -> None:
    """A `ValueError` for a key of a source that is none of `keys`, or would have no effect."""
    name = str(source.get("path", name))
    for key in source:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"There are {', '.join(keys)}."
            raise ValueError(f"{name}: a source has no key `{key}`. {hint}")
    if "path" not in source:
        raise ValueError(f"{name} has no `path`.")
    unused = ("revision",) if os.path.isdir(name) else ()
    if name.endswith((".tar", ".parquet")) or os.path.isfile(os.path.join(name, "dataset_info.json")):
        unused = ("name", "revision", "split")
    elif name.endswith(JSON_SUFFIXES):  # one of Karpathy's has splits
        unused = ("name", "revision")
    for key in unused:
        if source.get(key) is not None:
            raise ValueError(f"{name}: `{key}` would have no effect. Leave it out.")


def load_located(kind: str, files: list[str], source: dict[str, Any], split: str, streaming: bool):
    path = str(source["path"])
    if kind in ("json", "tar"):
        if source.get("split") and path.endswith(JSON_SUFFIXES):
            raise ValueError(f"{path}: `split` would have no effect: a file has none. Leave it out.")
        if streaming:
            records = json_records if kind == "json" else tar_records
            return IterableDataset.from_generator(records, gen_kwargs={"files": files})
        return json_table(files) if kind == "json" else tar_table(files)
    if kind == "saved":
        dataset = datasets.load_from_disk(path)
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[_known_split(split, dataset, path)]
        return dataset.to_iterable_dataset() if streaming else dataset
    how = {"path": path, "name": source.get("name"), "split": split}
    if kind == "parquet":
        how = {"path": "parquet", "data_files": files, "split": "train"}
    elif not os.path.isdir(path):
        how["revision"] = source.get("revision")
    try:
        return datasets.load_dataset(**how, streaming=streaming)
    except FileNotFoundError:
        raise
    except Exception as error:  # of pyarrow, the builders ...
        cause = (error.__cause__ or error) if isinstance(error, DatasetGenerationError) else error
        raise damaged(path, cause) from error


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
        builder = datasets.load_dataset_builder(path, source.get("name"), revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        if is_folder:
            raise
        raise FileNotFoundError(f"{path} is no file or folder in {os.getcwd()} and no Hub dataset: {error}") from error
    kind, by_split = type(builder).__module__.rpartition(".")[2], builder.config.data_files or {}
    suffixes = {"json": JSON_SUFFIXES, "webdataset": (".tar",), "imagefolder": ("metadata.jsonl",)}.get(kind)
    names = {os.path.basename(file) for files in by_split.values() for file in files}
    if kind == "imagefolder" and not any(name.startswith("metadata.") for name in names):
        # perhaps images beside the files that name them
        suffixes, by_split = JSON_SUFFIXES, datasets.load_dataset_builder("json", data_dir=path).config.data_files
    if suffixes is None or not any(file.endswith(suffixes) for files in by_split.values() for file in files):
        return "other", []
    files = [file for file in by_split[_known_split(split, by_split, path)] if file.endswith(suffixes)]
    return ("tar", files) if kind == "webdataset" else ("json", DownloadManager().download(files))


def _known_split(split: str, splits: Iterable[str], path: str) -> str:
    if split not in splits:
        raise ValueError(f"{path}: there is no split {split!r}, but {', '.join(map(str, splits))}. Set `split`.")
    return split


def _not_found(path: str) -> FileNotFoundError:
    found = "finds no file" if glob.has_magic(path) else "does not exist"
    relative = "" if "://" in path else f", relative to {os.getcwd()}"
    return FileNotFoundError(f"{path} {found}. Correct the `path`{relative}.")


def _files(path: str) -> list[str]:
    """The files that a path or a glob names, in the order of their names."""
    if path.startswith("hf://"):
        if not (found := HfFileSystem().glob(path)):
            raise _not_found(path)
        return [f"hf://{file}" for file in found]
    files = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.isfile(path) else [path]
    if not files or not all(map(os.path.isfile, files)):
        raise _not_found(path)
    return files


def file_records(
    path: str, whole: Callable[[Any], Iterator[tuple[int, Any]]] | None = None
) -> Iterator[tuple[str, int | str, Any]]:
    """
    Records of a file: JSON, list or lines, perhaps compressed or in a zip archive, or tar shard. `whole` gives the numbered
    records of a JSON file that is one object.

    Yields:
        `tuple[str, int | str, Any]`: name of the file (of a zip archive that of the member), number from 1 (of a tar
        shard the key), and the record; for a line that is not JSON a [`BadRow`].
    """
    if path.endswith(".tar"):
        yield from ((os.path.basename(path), sample["__key__"], sample) for sample in tar_records([path]))
        return
    with readable(path):
        for name, file in _text_files(path):
            first = next((line for line in file if not line.isspace()), "")
            file.seek(0)
            if whole is not None or first.lstrip().startswith("["):
                numbered = enumerate(json.load(file), 1) if whole is None else whole(json.load(file))
            else:
                numbered = ((n, _decoded(line)) for n, line in enumerate(file, 1) if not line.isspace())
            yield from ((name, number, record) for number, record in numbered)


def _decoded(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow("line", f"is not valid JSON: {error}. Write one object a line.")


def first_record(path: str) -> dict[str, Any]:
    """The first record of a JSON file, or the object that it is."""
    for _, _, record in file_records(path):
        if isinstance(record, BadRow):  # perhaps an object of several lines
            _, _, record = next(file_records(path, lambda whole: iter([(1, whole)])))
        if not isinstance(record, dict):
            raise ValueError(f"{path}: the first record is not a JSON object. Write a list of objects, or one a line.")
        return record
    raise ValueError(f"{path} holds no rows.")


def _text_files(path: str) -> Iterator[tuple[str, io.TextIOBase]]:
    """The text files behind a path with their names: one, or the members of a zip archive."""
    url = f"zip://**/*.json*::{path}" if path.endswith(".zip") else [path]
    files = fsspec.open_files(url, "rt", encoding="utf-8-sig", compression="infer")
    if not files:
        raise ValueError(f"{path}: the archive has no .json or .jsonl file.")
    for file in files:
        with file as text:
            yield file.path if path.endswith(".zip") else os.path.basename(path), text


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what the libraries say of a damaged file into an error that names it."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Repair it or download it again.") from error
    except BadRow as bad:
        raise ValueError(f"{path}: `{bad.field}` {bad.problem}") from None
    except (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise damaged(path, error) from error


def damaged(path: str, error: BaseException) -> ValueError:
    return ValueError(f"{path} cannot be read ({type(error).__name__}: {error}). Repair it or download it again.")


def json_records(files: list[str]) -> Iterator[dict[str, Any]]:
    """All records of JSON files; a bad one is an error that names file and row."""
    for path in files:
        for name, number, record in file_records(path):
            if isinstance(record, BadRow):
                raise ValueError(f"{path}: {name}, row {number} {record.problem}")
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
    return Dataset(pa.table(columns), datasets.DatasetInfo(features=Features(features)))


def _tar_members(path: str) -> Iterator[tuple[str, str, str, Callable[[], bytes]]]:
    """Members of a shard: key, field (in lower case all that follows the first dot), file name, and what reads it."""
    with readable(path), fsspec.open(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            folder, name = os.path.split(member.name)
            key, dot, field = name.partition(".")
            if member.isfile() and key and dot:
                yield os.path.join(folder, key), field.lower(), name, archive.extractfile(member).read
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
    """Samples of tar shards, with `__key__` and `__url__`. A text that is not UTF-8, or JSON that is none, is None."""
    for path in files:
        for key, members in itertools.groupby(_tar_members(path), lambda member: member[0]):
            sample = {"__key__": key, "__url__": path}
            for _, field, name, read in members:
                if field in sample:
                    raise ValueError(f"{path}: the sample {key} has two members {field}. Give one another key.")
                sample[field], feature = read(), _tar_feature(field)
                try:
                    if isinstance(feature, Image):
                        sample[field] = {"path": name, "bytes": sample[field]}
                    elif feature != Value("binary"):
                        text = sample[field].decode()
                        sample[field] = json.loads(text) if feature == Json() else text
                except ValueError:
                    sample[field] = None
            yield sample


def tar_table(files: list[str]) -> Dataset:
    """[`tar_records`] as a table in the cache of `datasets`, with a column for every field that one of them has."""
    files = DownloadManager().download(files)
    members = itertools.chain.from_iterable(map(_tar_members, files))
    features = {field: _tar_feature(field) for _, field, *_ in members}
    if not features:
        raise ValueError(f"{', '.join(files)} holds no rows.")
    features = Features({"__key__": Value("string"), "__url__": Value("string"), **features})
    stats = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]

    def rows(files):
        yield from ({**dict.fromkeys(features), **sample} for sample in tar_records(files))

    fingerprint = Hasher.hash([stats, sorted(features)])
    try:
        return Dataset.from_generator(rows, features, gen_kwargs={"files": files}, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
