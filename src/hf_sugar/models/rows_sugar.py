"""The rules of a row and its images, for training and embedding alike. It travels to the Hub with the model, so it imports
nothing of the package; nor torch, which reading data does not need."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
LOSS_ON = ("answers", "captions", "text")
LOSSES = ("structure", "generative")  # which a row can stay out of
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXT_SUFFIXES = (".txt", ".md")
# Columns and fields of messages of other libraries that would have no effect.
UNREAD = ("video", "videos", "audio", "audios")
UNREAD_IN_MESSAGES = ("loss", "weight", "tool_calls", "reasoning_content", "thinking")


def conversation_row(row: dict[str, Any]) -> dict[str, Any]:
    """
    A row of any layout that TRL takes for vision data: `messages`, or `prompt` and `completion` (lists of messages; only
    what the assistant says in the completion is learnt then), and `images` or `image`.

    Returns:
        `dict`: `messages`, `images` (a list), `loss_on` (defaults to `"answers"`), `structure` and `generative` (default to
        `True`), `id` (or `None`), and what there is of [`UNREAD`].

    Raises:
        `ValueError`: if the row has neither `messages` nor conversational `prompt` and `completion`.
    """
    if row.get("messages") is not None:
        messages = row["messages"]
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        messages = [{**message, "learn": False} for message in row["prompt"]] + row["completion"]
    elif "messages" in row:  # a row without a value, which `row_problems` names
        messages = None
    else:
        raise ValueError(
            f"a row has the columns {', '.join(row)}; its slices are the content parts of `messages` (or of lists `prompt` and "
            "`completion`). Bring the dataset into that format, for example with `hf_sugar.data.load_data`."
        )
    flags = {name: True if row.get(name) is None else row[name] for name in LOSSES}
    # what is neither true nor false is left for `row_problems`
    flags = {name: bool(value) if value in (0, 1) else value for name, value in flags.items()}
    return {
        "messages": messages,
        "images": row.get("images") or ([row["image"]] if row.get("image") is not None else []),
        "loss_on": row.get("loss_on") or "answers",
        **flags,
        "id": row.get("id"),
        **{name: row[name] for name in UNREAD if row.get(name)},
    }


def as_row(item: Any, where: str = "item", strip: bool = True) -> dict[str, Any]:
    """
    An item as a row in the conversational vision format. An item is a text (`str`, whatever it says), a PIL image, the
    `Path` of an image or text file, a part `{"type": "text", "text": ...}` or `{"type": "image", "image": ...}`, a list
    of those (interleaved, in this order), or a row with `messages` and `images`. Images keep whatever form they have.
    Unless `strip` is false, texts lose the white space at their ends.

    Raises:
        `TypeError`: if the item is of another type; calls it `where`.
        `ValueError`: if there is nothing in it, or a file does not exist.
    """
    if isinstance(item, dict) and "type" not in item:
        return conversation_row(item)
    content, images = [], []
    for part in item if isinstance(item, list | tuple) else [item]:
        if isinstance(part, str) and part.lower().endswith(IMAGE_SUFFIXES) and Path(part).is_file():
            logger.warning("%s: %r is taken as a text; for the image in that file, give its `Path`.", where, part)
        elif isinstance(part, Path) and not part.is_file():
            raise ValueError(f"{where}: the file {str(part)!r} does not exist.")
        elif isinstance(part, Path) and part.suffix.lower() in TEXT_SUFFIXES:
            part = part.read_text(encoding="utf-8")
        elif isinstance(part, dict) and part.get("type") == "text":
            part = part.get("text") or ""
        if isinstance(part, str):
            if not part.strip():
                raise ValueError(f"{where} is empty or holds an empty text; there is nothing to embed.")
            content.append({"type": "text", "text": part.strip() if strip else part})
            continue
        image, found = part, type(part).__name__
        if isinstance(part, dict):
            found = f"a part with the keys {', '.join(map(str, part))}"
            keys = ("image", "url", "path") if part.get("type") == "image" else ()
            image = next((part[key] for key in keys if part.get(key) is not None), None)
        if image is None or (image is part and not isinstance(part, Path | Image.Image)):
            raise TypeError(
                f"{where} is or holds {found}; give a text, a PIL image, a Path, an image part, a list of those, or a row."
            )
        content.append({"type": "image", "text": None})
        images.append(image)
    if not content:
        raise ValueError(f"{where} is an empty list; there is nothing to embed.")
    return {"messages": [{"role": "user", "content": content}], "images": images, "loss_on": "text", "id": None}


def row_name(row: dict[str, Any], index: int) -> str:
    """How errors call a row: its position, and its `id` where it has one, as in `"row 17 (llava.json:18)"`."""
    return f"row {index} ({row['id']})" if row.get("id") else f"row {index}"


def row_text(row: dict[str, Any]) -> str:
    """All that a row says, to count its tokens."""
    contents = [message["content"] for message in row["messages"]]
    return "".join(c if isinstance(c, str) else "".join(part.get("text") or "" for part in c) for c in contents)


def unread_in_message(message: dict[str, Any]) -> list[str]:
    """The fields of a message that say something which would have no effect."""
    return [name for name in UNREAD_IN_MESSAGES if message.get(name) not in (None, 1, "", [])]  # 1 is what is done


def row_problems(row: dict[str, Any], num_images: int, loss: bool = True) -> list[tuple[str, str, str]]:
    """
    What is wrong with a row in the conversational vision format to which `num_images` images belong. They are not looked at.
    With `loss` some text has to carry the generative loss.

    Returns:
        `list[tuple[str, str, str]]`: kind (`"image"`, `"count"`, `"empty"` or `"malformed"`), field, and what is wrong
        there with the remedy; empty for a good row.
    """
    problems: list[tuple[str, str, str]] = []

    def add(field: str, problem: str, kind: str = "malformed"):
        problems.append((kind, field, problem))

    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        add("messages", "is not a list with at least one message. Give the row its messages or drop it.")
        return problems
    for m, message in enumerate(messages):
        if not isinstance(message, dict):
            add(f"messages[{m}]", "is not a mapping. Write it as {'role': ..., 'content': [...]}.")
            return problems
    image_parts, texts = 0, dict.fromkeys(LOSS_ON, 0)
    for m, (role, content) in enumerate(_contents(messages, num_images)):
        field = f"messages[{m}].content"
        if role not in ROLES:
            add(f"messages[{m}].role", f"is {role!r}. Use one of {', '.join(ROLES)}.")
        for name in unread_in_message(messages[m]):
            add(f"messages[{m}].{name}", "is not read. Remove it or drop the row; `loss_on` says what is learnt.")
        if content is not None and not isinstance(content, list):
            add(field, _not_a_text(content))
            continue
        if not content:
            add(field, "is empty. Fill it or remove the message.", "empty")
            continue
        image_seen = False
        for c, part in enumerate(content):
            part = part if isinstance(part, dict) else {}
            kind, text = part.get("type"), part.get("text")
            name, text_name = f"{field}[{c}]", f"{field}[{c}].text"
            if isinstance(messages[m]["content"], str):
                name = text_name = field
            if kind == "image" and role == "system":
                add(name, "is an image in a system message. Move it to a user message.")
            elif kind == "image":
                image_parts += 1
                image_seen = True
            elif kind != "text":
                add(f"{name}.type", f"is {kind!r}. Every part is of the type 'text' or 'image'.")
            elif text is not None and not isinstance(text, str):
                add(text_name, _not_a_text(text))
            elif not (text or "").strip():
                add(text_name, "is empty. Fill it or remove the part.", "empty")
            elif _is_json_of_parts(text):
                made = "which `datasets` makes of JSON files that hold both texts and lists of parts"
                add(name, f"is JSON text of parts, {text[:40]!r}..., {made}. Use `hf_sugar.data.load_data`.")
            elif role != "system":
                texts["text"] += 1
                texts["answers"] += role == "assistant"
                texts["captions"] += image_seen
    if image_parts != num_images:
        counts = f"holds {num_images} images but `messages` has {image_parts} image parts"
        add("images", f"{counts}. Give one image for each image part, in the same order.", "count")
    for name in UNREAD:
        if row.get(name):
            add(name, "is not read: a row is of texts and images. Drop the column or the row.")
    for name in LOSSES:
        if row.get(name) not in (None, 0, 1):
            add(name, f"is {row[name]!r}. Use true or false.")
    if all(row.get(name) == 0 for name in LOSSES):
        add("structure", "is false, and `generative` too, so that nothing is learnt. Drop the row.")
    loss_on = row.get("loss_on") or "answers"
    if loss_on not in LOSS_ON:
        add("loss_on", f"is {loss_on!r}. Use one of {', '.join(LOSS_ON)}.")
    elif loss and not problems and row.get("generative") in (None, 1) and not texts[loss_on]:
        remedies = {
            "answers": "no answer. Add an assistant turn, or set loss_on='text' for a document.",
            "captions": "no caption. Put a text after the image, or set loss_on='text' for a document.",
            "text": "no text. Add a text part or drop the row.",
        }
        add("messages", remedies[loss_on])
    return problems


def check_row(row: dict[str, Any], num_images: int, where: str, loss: bool = True) -> None:
    """Refuse a malformed row, see [`row_problems`]: a `ValueError` that names `where`, field and remedy of the first
    problem."""
    for _, field, problem in row_problems(row, num_images, loss):
        raise ValueError(f"{where}, `{field}`: {problem}")


def fill_images(
    messages: list[dict[str, Any]], images: Sequence[Any], where: str | None = None
) -> list[dict[str, Any]]:
    """
    Put the images of a row into the image parts of its messages.

    Args:
        messages (`list[dict]`):
            Messages in the conversational vision format. Content that is a plain string becomes one text part; the
            images then stand before the first such user message, as in TRL.
        images (`list`): Images in the order of the image parts; they are put in as they are.
        where (`str`, *optional*):
            What errors call the row. Without it the messages are not checked again; with it malformed ones, or another
            number of images, are a `ValueError`, see [`row_problems`].

    Returns:
        `list[dict]`: new messages that [`SugarProcessor.encode_conversations`] takes.
    """
    if where is not None:
        check_row({"messages": messages}, len(images), where, loss=False)
    left, filled = iter(images), []
    for message, (_, content) in zip(messages, _contents(messages, len(images)), strict=True):
        parts = [
            {"type": "image", "image": next(left)} if p["type"] == "image" else {"type": "text", "text": p["text"]}
            for p in content
        ]
        filled.append({**message, "content": parts})
    return filled


def instructed(messages: list[dict[str, Any]], instruction: str | None) -> list[dict[str, Any]]:
    """Messages that [`fill_images`] gave, with an instruction at the beginning of their system message, which is no slice."""
    if not instruction:
        return messages
    part = {"type": "text", "text": instruction.strip()}
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": [part, *messages[0]["content"]]}, *messages[1:]]
    return [{"role": "system", "content": [part]}, *messages]


def iter_slices(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The slices of messages that [`fill_images`] gave, in reading order: every content part outside of system messages."""
    for message in messages:
        if message["role"] != "system":
            yield from message["content"]


def row_parts(row: dict[str, Any], where: str | None = None) -> list[dict[str, Any]]:
    """The slices of a row, with its images in them; `where` as for [`fill_images`]."""
    return list(iter_slices(fill_images(row["messages"], row["images"], where)))


def to_rgb(image: Image.Image) -> Image.Image:
    """
    8-bit RGB of any image, upright; an upright RGB image is returned as it is.

    The EXIF orientation is applied, transparent pixels are laid over white, 16-bit greyscale is scaled to 8 bits, and
    every other mode goes through Pillow's own conversion. Of an animation the first frame is taken.

    Raises:
        `ValueError`: for floating-point pixels and integers beyond 16 bits, whose range is not known.
    """
    if image.getexif().get(0x0112) is not None:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("values outside of 16 bits; scale them to 8 bits first")
        # Pillow's own conversion clips at 255. Mode "I" is 16-bit content from a file, or an integer array of 0..255.
        eight_bit = image.mode == "I" and values.max() <= 255
        return Image.fromarray((values if eight_bit else values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point values of unknown range; scale them to 8 bits first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _contents(messages: list[dict[str, Any]], num_images: int) -> Iterator[tuple[Any, Any]]:
    """Role and parts of each message; the images of a row stand before its first user message that is a string."""
    strings_seen = False
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
            if role == "user" and not strings_seen:
                strings_seen = True
                content = [{"type": "image"}] * num_images + content
        yield role, content


def _not_a_text(value: Any) -> str:
    # `datasets` 5.2 reads texts of JSON files as dates or numbers where they all look like one
    remedy = "Write the text, or read JSON files with `hf_sugar.data.load_data`."
    return f"is {value!r} of type {type(value).__name__}, not a text. {remedy}"


def _is_json_of_parts(text: str) -> bool:
    if not re.match(r'\s*\[\s*\{\s*"(type|text)"', text):
        return False
    try:
        return all(part.get("type") in ("text", "image") for part in json.loads(text))
    except (json.JSONDecodeError, AttributeError):
        return False
