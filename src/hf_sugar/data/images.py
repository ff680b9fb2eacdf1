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

from hf_sugar.models.rows_sugar import conversation_row, fill_images, iter_slices, row_name, to_rgb


def load_image(image: Image.Image | str | Path | bytes | dict[str, Any], where: str = "image") -> Image.Image:
    """
    Decode an image, whatever form a dataset keeps it in, and bring it to 8-bit RGB as [`to_rgb`] does. Nothing is
    downloaded: a web address is refused.

    Args:
        image (`PIL.Image.Image` or `str` or `pathlib.Path` or `bytes` or `dict`):
            Decoded image, path of an image file, content of an image file, or the `{"bytes": ..., "path": ...}` mapping
            of an undecoded [`datasets.Image`] column.
        where (`str`, *optional*, defaults to `"image"`):
            What error messages name: the row and the position in it.

    Returns:
        `PIL.Image.Image`: image of mode `"RGB"`. An input that is an upright RGB image already is returned as it is.

    Raises:
        `ValueError`: if the file does not exist, cannot be decoded, has more pixels than Pillow's guard against
            decompression bombs lets through, has a mode with no defined conversion to 8 bits (floats, 32-bit
            integers), or if `image` is of another type or a web address.
    """
    if isinstance(image, Image.Image):
        name = f"image of mode {image.mode} and size {image.size}"
    elif isinstance(image, str | Path):
        image, name = {"path": str(image), "bytes": None}, f"image file {str(image)!r}"
    elif isinstance(image, bytes):
        image, name = {"path": None, "bytes": image}, f"image of {len(image)} bytes"
    elif isinstance(image, dict) and (image.get("bytes") is not None or image.get("path")):
        image = {"path": image.get("path"), "bytes": image.get("bytes")}
        name = f"image file {image['path']!r}" if image["path"] else f"image of {len(image['bytes'])} bytes"
    else:
        raise ValueError(
            f"{where}: expected a PIL image, a path, bytes or a mapping with `bytes` or `path`, got "
            f"{image if image is None or isinstance(image, dict) else type(image).__name__}."
        )
    if isinstance(image, dict) and image["bytes"] is None and image["path"].startswith(("http://", "https://")):
        raise ValueError(f"{where}: {name} is a web address. Download the images and give their local paths.")
    if isinstance(image, dict) and image["bytes"] == b"":
        raise ValueError(f"{where}: {name} is empty (0 bytes). Replace the file or drop the row.")

    try:
        with warnings.catch_warnings():
            # between one and two times its limit Pillow only warns
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(image, dict):
                image = datasets.Image().decode_example(image)  # orientation included
            else:
                image.load()
        return to_rgb(image)
    except FileNotFoundError as error:
        raise ValueError(
            f"{where}: {name} does not exist. Correct the path, or the root directory that paths are relative to."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{where}: {name} is too large: {error} Scale the file down, or set `PIL.Image.MAX_IMAGE_PIXELS` if you "
            "trust it."
        ) from error
    except Exception as error:  # a decoder may raise anything: OSError, SyntaxError, struct.error, EOFError ...
        raise ValueError(
            f"{where}: {name} cannot be decoded ({type(error).__name__}: {error}). Replace the file or drop the row."
        ) from error


def stored_image(image: Image.Image | str | Path | bytes | dict[str, Any], where: str = "image") -> dict[str, Any]:
    """
    What a dataset keeps of an image. A file stays a file, named by its full path; a PIL image is kept as the model sees
    it, in PNG: `datasets` 5.2 keeps the path of the file that it was opened from, whatever was done to it since, and
    writes modes that it cannot read back (YCbCr) or cannot write (HSV).

    Args:
        image (`PIL.Image.Image` or `str` or `pathlib.Path` or `bytes` or `dict`):
            As for [`load_image`].
        where (`str`, *optional*, defaults to `"image"`):
            What error messages name.

    Returns:
        `dict`: `{"bytes": ..., "path": ...}`, of which one is `None`.

    Raises:
        `ValueError`: as for [`load_image`]; files and bytes are not opened.
    """
    if isinstance(image, str | Path):
        image = {"path": image}
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        return {"bytes": None, "path": os.path.abspath(image["path"])}
    if isinstance(image, dict) and image.get("bytes") is not None:
        return {"bytes": image["bytes"], "path": None}
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    buffer = io.BytesIO()
    load_image(image, where).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def undecoded(
    dataset: datasets.Dataset | datasets.IterableDataset, name: str = "the dataset"
) -> datasets.Dataset | datasets.IterableDataset:
    """
    The dataset with its images left as bytes or paths, and without a format. Left to `datasets`, an unreadable image
    stops the iteration with an error that names no row.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Any dataset.
        name (`str`, *optional*, defaults to `"the dataset"`):
            What the error calls it.

    Raises:
        `ValueError`: if it has a transform, which would see undecoded images, and other texts than were checked.
    """
    streamed = isinstance(dataset, datasets.IterableDataset)
    if streamed:
        dataset = dataset if dataset.features else dataset._resolve_features()
    elif dataset.format["type"] == "custom":
        raise ValueError(
            f"{name} has a transform (`with_transform` or `set_transform`): rows are checked, embedded and collated apart, "
            "and would differ each time. Apply it with `map`, or take it off with `with_format(None)`."
        )
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
    The slices of a row in reading order: one for every content part of its user and assistant messages.

    A message whose content is a plain string is one text slice. As in TRL, the images of a row then stand before the
    first such user message. System messages hold no slices.

    Args:
        row (`dict`):
            Row in the conversational vision format: `messages`, and `images` in the order of the image parts
            (`None` and a missing column both mean no images). An image may have any form [`load_image`] takes.
        where (`str`, *optional*, defaults to `"row"`):
            What error messages call the row, see [`row_name`].

    Returns:
        `list[str | PIL.Image.Image]`: texts as they are, images in RGB.

    Raises:
        `ValueError`: for malformed messages, or an image that cannot be loaded.
    """
    row = conversation_row(row)
    numbers = iter(range(len(row["images"])))
    return [
        load_image(part["image"], f"{where}, images[{next(numbers)}]") if part["type"] == "image" else part["text"]
        for part in iter_slices(fill_images(row["messages"], row["images"], where))
    ]


def answer_to_image(row: dict[str, Any]) -> str | None:
    """
    The text that goes with the image of a row: its only answer, or its caption.

    Args:
        row (`dict`):
            Row of any layout that [`conversation_row`] takes.

    Returns:
        `str` or `None`: `None` if the row does not have exactly one image and one such text.
    """
    row = conversation_row(row)
    if len(row["images"]) != 1 or row["loss_on"] == "text":
        return None
    role = "user" if row["loss_on"] == "captions" else "assistant"
    messages = fill_images(row["messages"], row["images"])
    texts = [p["text"] for m in messages if m["role"] == role for p in m["content"] if p["type"] == "text"]
    return texts[0] if len(texts) == 1 else None


def captions_by_image(dataset: datasets.Dataset) -> tuple[list[Image.Image | Path], list[list[str]]]:
    """
    Every image once, with all of its captions: what [`~evaluation.tasks.image_text_retrieval`] measures where an image
    has several captions (COCO and Flickr30k have five).

    Args:
        dataset ([`datasets.Dataset`]):
            Rows of any layout that [`conversation_row`] takes. Those that do not have exactly one image and one answer
            or caption are left out.

    Returns:
        `tuple[list[PIL.Image.Image | pathlib.Path], list[list[str]]]`: images (paths where the dataset has paths, which
        are opened when they are needed) and their captions, in the order in which the images first appear.

    Raises:
        `ValueError`: if a stored image cannot be decoded; names the row.
    """
    images: dict[str | bytes, Image.Image | Path] = {}
    captions: dict[str | bytes, list[str]] = {}
    for index, row in enumerate(undecoded(dataset)):
        text = answer_to_image(row)
        if text is None:
            continue
        image = conversation_row(row)["images"][0]
        if image["bytes"] is None:
            key = image["path"]
            images[key] = Path(key)
        else:
            key = hashlib.blake2b(image["bytes"]).digest()
            if key not in images:
                images[key] = load_image(image, f"{row_name(row, index)}, images[0]")
        captions.setdefault(key, []).append(text)
    return list(images.values()), list(captions.values())
