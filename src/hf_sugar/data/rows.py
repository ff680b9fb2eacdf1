"""One row of training data, taken apart into its slices."""

import copy
import hashlib
import warnings
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_sugar.models.processing_sugar import to_rgb
from hf_sugar.models.rows_sugar import conversation_row, fill_images, iter_slices, row_name


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
    texts = []
    for message in row["messages"]:
        if message["role"] == role:
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts += [part["text"] for part in content if part["type"] == "text"]
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


def undecoded(dataset: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset | datasets.IterableDataset:
    """
    The dataset with its images left as bytes or paths. Left to `datasets`, an unreadable image stops the iteration with
    an error that names no row.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Any dataset.
    """
    if isinstance(dataset, datasets.IterableDataset):
        dataset = dataset if dataset.features else dataset._resolve_features()
        return dataset.decode(False)
    dataset = copy.deepcopy(dataset)  # of the description; the data themselves are shared
    for feature in dataset.info.features.values():
        # `cast_column` would rewrite the whole dataset where the images are in lists
        feature = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(feature, datasets.Image):
            feature.decode = False
    return dataset


def load_image(image: Image.Image | str | Path | bytes | dict[str, Any], where: str = "image") -> Image.Image:
    """
    Decode an image, whatever form a dataset keeps it in, and bring it to 8-bit RGB.

    The EXIF orientation is applied, transparent pixels are laid over white, 16-bit greyscale is scaled down to 8 bits,
    and every other mode goes through Pillow's own conversion. Of an animation the first frame is taken. Nothing is
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
        `ValueError`: for an unknown role or part type, an empty text, a number of images that differs from the number
            of image parts, or an image that cannot be loaded.
    """
    row = conversation_row(row)
    images = iter(range(len(row["images"])))
    return [
        load_image(part["image"], f"{where}, images[{next(images)}]") if part["type"] == "image" else part["text"]
        for part in iter_slices(fill_images(row["messages"], row["images"], where))
    ]
