"""Images of rows: opened whatever form they have, left unopened, and stored; and what of a row needs its images."""

import copy
import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_sugar.models.rows_sugar import conversation_row, fill_images, row_name, row_parts, to_rgb


def load_image(image: Image.Image | str | Path | bytes | dict[str, Any], where: str = "image") -> Image.Image:
    """
    Decode an image, whatever form a dataset keeps it in, and bring it to 8-bit RGB as [`to_rgb`] does. Nothing is
    downloaded.

    Args:
        image (`PIL.Image.Image` or `str` or `pathlib.Path` or `bytes` or `dict`):
            Decoded image, which is returned as it is if it is upright RGB already, path or content of an image file, or
            the `{"bytes": ..., "path": ...}` of an undecoded [`datasets.Image`] column.
        where (`str`, *optional*, defaults to `"image"`): What error messages name: the row and the position in it.

    Raises:
        `ValueError`: if the file does not exist, is a web address, cannot be decoded, has more pixels than Pillow's guard
            against decompression bombs lets through, or has a mode with no defined conversion to 8 bits (floats, 32-bit
            integers).
    """
    if not isinstance(image, Image.Image):
        image = _undecoded_image(image, where)
    if isinstance(image, Image.Image):
        name = f"image of mode {image.mode} and size {image.size}"
    else:
        name = f"image file {image['path']!r}" if image["path"] else f"image of {len(image['bytes'])} bytes"
        if image["bytes"] is None and image["path"].startswith(("http://", "https://")):
            raise ValueError(f"{where}: {name} is a web address. Download the images and give their local paths.")
    try:
        with warnings.catch_warnings():
            # between one and two times its limit Pillow only warns
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(image, dict):
                image = datasets.Image().decode_example(image)  # orientation included
            else:
                image.load()
        return to_rgb(image)
    except Exception as error:  # a decoder may raise anything: OSError, SyntaxError, struct.error, EOFError ...
        problem = f"cannot be decoded ({type(error).__name__}: {error}). Replace the file or drop the row."
        if isinstance(error, FileNotFoundError):
            problem = "does not exist. Correct the path, or the root directory that paths are relative to."
        elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            problem = f"is too large: {error} Scale it down, or set `PIL.Image.MAX_IMAGE_PIXELS` if you trust it."
        raise ValueError(f"{where}: {name} {problem}") from error


def image_size(image: Image.Image | str | Path | bytes | dict[str, Any]) -> tuple[int, int]:
    """Height and width of an image that [`load_image`] takes, from the head of its file; of one that it will refuse, any."""
    try:
        if not isinstance(image, Image.Image):
            image = _undecoded_image(image, "image")
            with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
                return opened.size[::-1]
        return image.size[::-1]
    except Exception:  # a decoder may raise anything, and says it again when the image is loaded
        return 336, 336


def _undecoded_image(image: str | Path | bytes | dict[str, Any], where: str) -> dict[str, Any]:
    """An image that is not decoded as `{"bytes": ..., "path": ...}`."""
    if isinstance(image, str | Path):
        return {"bytes": None, "path": str(image)}
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, dict) and (image.get("bytes") is not None or image.get("path")):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    got = image if image is None or isinstance(image, dict) else type(image).__name__
    raise ValueError(f"{where}: expected a PIL image, a path, bytes or a mapping with `bytes` or `path`, got {got}.")


def stored_image(image: Image.Image | str | Path | bytes | dict[str, Any], where: str = "image") -> dict[str, Any]:
    """
    What a dataset keeps of an image that [`load_image`] takes: `{"bytes": ..., "path": ...}`, of which one is `None`. A
    file stays a file, named by its full path; a PIL image is kept as the model sees it, in PNG: `datasets` 5.2 keeps the
    path of the file that it was opened from, whatever was done to it since, and writes modes that it cannot read back
    (YCbCr) or cannot write (HSV).

    Raises:
        `ValueError`: as for [`load_image`]; files and bytes are not opened.
    """
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        load_image(image, where).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}
    image = _undecoded_image(image, where)
    if image["bytes"] is not None:
        return {"bytes": image["bytes"], "path": None}
    return {"bytes": None, "path": os.path.abspath(image["path"])}


def undecoded(
    dataset: datasets.Dataset | datasets.IterableDataset, name: str = "the dataset"
) -> datasets.Dataset | datasets.IterableDataset:
    """
    The dataset (called `name` in errors) with its images left as bytes or paths, and without a format. Left to
    `datasets`, an unreadable image stops the iteration with an error that names no row.

    Raises:
        `ValueError`: if it has a transform, which would see undecoded images, and other texts than were checked.
    """
    streamed = isinstance(dataset, datasets.IterableDataset)
    if streamed:
        dataset = dataset if dataset.features else dataset._resolve_features()
    elif dataset.format["type"] == "custom":
        remedy = "Apply it with `map`, or take it off with `with_format(None)`."
        raise ValueError(f"{name} has a transform (`with_transform`): rows would differ at each reading. {remedy}")
    # `decode(False)` of a stream would leave JSON columns undecoded too, and `cast_column` would rewrite the whole table
    # where images are in lists
    features = copy.deepcopy(dataset.features)
    for feature in features.values():
        feature = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(feature, datasets.Image):
            feature.decode = False
    if streamed:
        return dataset.with_format(None).cast(features)  # changes the description alone
    dataset = copy.deepcopy(dataset.with_format(None))  # of the description; the data themselves are shared
    dataset.info.features = features
    return dataset


def row_slices(row: dict[str, Any], where: str = "row") -> list[str | Image.Image]:
    """
    The slices of a row (of any layout that [`conversation_row`] takes) in reading order: one for every content part of its
    user and assistant messages, texts as they are (`str`), images in RGB (`PIL.Image.Image`).

    A message whose content is a plain string is one text slice. As in TRL, the images of a row then stand before the
    first such user message. System messages hold no slices. Errors call the row `where`, see [`row_name`].

    Raises:
        `ValueError`: for malformed messages, or an image that cannot be loaded.
    """
    row = conversation_row(row)
    numbers = iter(range(len(row["images"])))
    return [
        load_image(part["image"], f"{where}, images[{next(numbers)}]") if part["type"] == "image" else part["text"]
        for part in row_parts(row, where)
    ]


def answers_to_image(row: dict[str, Any]) -> list[str]:
    """The texts that go with the only image of a row: its caption, or the answers of a conversation that begins with it.
    None, if the row has no such image, or several captions."""
    row = conversation_row(row)
    if len(row["images"]) != 1 or row["loss_on"] == "text":
        return []
    messages = fill_images(row["messages"], row["images"])
    asked = next((message["content"] for message in messages if message["role"] == "user"), [])
    if all(part["type"] != "image" for part in asked):
        return []
    role = "user" if row["loss_on"] == "captions" else "assistant"
    texts = [[p["text"] for p in m["content"] if p["type"] == "text"] for m in messages if m["role"] == role]
    if row["loss_on"] == "captions":
        return sum(texts, []) if sum(map(len, texts)) == 1 else []
    return [" ".join(answer) for answer in texts if answer]


def captions_by_image(dataset: datasets.Dataset) -> tuple[list[Image.Image | Path], list[list[str]]]:
    """
    Every image once, with all of its captions: what [`~evaluation.tasks.image_text_retrieval`] measures where an image
    has several captions (COCO and Flickr30k have five).

    Args:
        dataset ([`datasets.Dataset`]):
            Rows of any layout that [`conversation_row`] takes. Those that do not have exactly one image and one answer
            or caption are left out.

    Returns:
        `tuple[list[PIL.Image.Image | pathlib.Path], list[list[str]]]`: images (paths where the dataset has paths) and
        their captions, in the order of the images' first rows.
    """
    found: dict[str | bytes, tuple[Image.Image | Path, list[str]]] = {}
    for index, row in enumerate(undecoded(dataset)):
        texts = answers_to_image(row)
        if len(texts) != 1:
            continue
        [image] = conversation_row(row)["images"]
        stored = image["bytes"] is not None
        key = hashlib.blake2b(image["bytes"]).digest() if stored else image["path"]
        if key not in found:
            found[key] = load_image(image, f"{row_name(row, index)}, images[0]") if stored else Path(key), []
        found[key][1].extend(texts)
    return [image for image, _ in found.values()], [captions for _, captions in found.values()]
