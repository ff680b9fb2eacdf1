"""The table of layouts: how a record of each becomes rows in the conversational vision format. A new layout is a function
from a record to rows, and an entry in [`LAYOUTS`]."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hf_sugar.models.rows_sugar import fill_images, row_problems, unread_in_message


IMAGE = "<image>"
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# where image-caption data keep the image and the text; the first that a record has counts
IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "file_name")
CAPTION_FIELDS = ("caption", "text", "txt")
UNREAD_MEMBERS = ("mp4", "webm", "mov", "avi", "mkv", "mp3", "wav", "flac", "ogg", "m4a")  # of tar shards
KARPATHY_SPLITS = {"train": ("train", "restval"), "validation": ("val",)}


class BadRow(Exception):
    """What is wrong with a record, as in [`Problem`]."""

    def __init__(self, field: str, problem: str, kind: str = "malformed"):
        self.field, self.problem, self.kind = field, problem, kind


class Layout(NamedTuple):
    """
    How one layout is told and read.

    Args:
        rows (`Callable`):
            Makes rows of a record, or raises [`BadRow`]. Their `images` are pairs of the field and the value there.
        marks (`list[set[str]]`): A record that has all fields of one of these is of this layout.
        records (`Callable`, *optional*):
            Gives the numbered records of a file that is one object, from the object and the split.
    """

    rows: Callable[[dict[str, Any]], list[dict[str, Any]]]
    marks: list[set[str]]
    records: Callable[[Any, str], Iterator[tuple[int, Any]]] | None = None


def layout_of(fields: set[str], where: str) -> str:
    """The layout of a record (or of the object that a whole file is) with these fields; `where` is for errors."""
    for name, layout in LAYOUTS.items():
        if any(mark <= fields for mark in layout.marks):
            return name
    hint = "Download the images that `url` names first, for example with img2dataset. " if "url" in fields else ""
    known = "; ".join(f"{name}: {', '.join(sorted(layout.marks[0]))}" for name, layout in LAYOUTS.items())
    remedy = f"{hint}Use `rename`, or bring the data into one of these (docs/data.md shows a record of each): {known}."
    raise ValueError(f"{where}: no layout is known with the fields {', '.join(sorted(fields))}. {remedy}")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(field, f"is {value!r}, not a string. Write the text.")
    if not value.strip():
        raise BadRow(field, "is empty. Write the text or remove it.", "empty")
    return value.strip()


def _list(record: Any, field: str, empty: bool = False) -> list[Any]:
    values = record.get(field) if isinstance(record, dict) else None
    if not isinstance(values, list) or not (values or empty):
        raise BadRow(field, "is missing, empty or not a list. Write it as docs/data.md shows.")
    return values


def _part(text: str | None = None) -> dict[str, str | None]:
    return {"type": "image" if text is None else "text", "text": text}


def _document(parts: list[dict[str, Any]], images: list[tuple[str, Any]], loss_on: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": parts}], "images": images, "loss_on": loss_on}


def _caption(image_field: str, image: Any, caption_field: str, caption: Any) -> dict[str, Any]:
    parts = [_part(), _part(_text(caption, caption_field))]
    return _document(parts, [(image_field, image)], "captions")


def _conversational_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    images = record.get("images") or []
    if not isinstance(images, list):
        raise BadRow("images", "is not a list. Give the images' paths in the order of the image parts.")
    images = [(f"images[{n}]", image) for n, image in enumerate(images)]
    for field in ("image", "file_name"):  # one picture, or the row of a folder of images
        if not images and record.get(field) is not None:
            images = [(field, record[field])]
    for kind, field, problem in row_problems(record, len(images)):
        raise BadRow(field, problem, kind)
    for m, message in enumerate(record["messages"]):
        for c, part in enumerate(message["content"] if isinstance(message["content"], list) else []):
            for name in ("image", "url", "path"):
                if part.get(name) is not None:
                    field = f"messages[{m}].content[{c}].{name}"
                    raise BadRow(field, "is not read. Put the image into `images`, in the order of the image parts.")
    messages = []
    for message in fill_images(record["messages"], [None] * len(images)):
        messages.append({"role": message["role"], "content": [_part(part.get("text")) for part in message["content"]]})
    row = {"messages": messages, "images": images, "loss_on": "answers"}
    return [row if record.get("id") is None else {**row, "id": str(record["id"])}]


def _llava_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    messages, placeholders = [], 0
    for t, turn in enumerate(_list(record, "conversations")):
        field = f"conversations[{t}]"
        if not isinstance(turn, dict) or turn.get("from") not in LLAVA_ROLES:
            speaker = turn.get("from") if isinstance(turn, dict) else None
            raise BadRow(f"{field}.from", f"is {speaker!r}. Use one of {', '.join(LLAVA_ROLES)}.")
        value = _text(turn.get("value"), f"{field}.value")
        if turn["from"] == "human":
            before, *after = (piece.strip() for piece in value.split(IMAGE))
            parts = [_part(before)] if before else []
            for piece in after:
                parts += [_part(), _part(piece)] if piece else [_part()]
            placeholders += len(after)
        elif IMAGE in value:
            raise BadRow(f"{field}.value", f"contains {IMAGE}, which only a human turn may. Remove or move it.")
        else:
            parts = [_part(value)]
        for name in unread_in_message(turn):
            raise BadRow(f"{field}.{name}", "is not read. Remove it or drop the row; `loss_on` says what is learnt.")
        messages.append({"role": LLAVA_ROLES[turn["from"]], "content": parts})
    name = "images" if "images" in record else "image"
    images = record.get(name)
    if isinstance(images, list):
        images = [(f"{name}[{n}]", image) for n, image in enumerate(images)]
    else:
        images = [] if images is None else [(name, images)]
    if len(images) != placeholders:
        problem = f"{len(images)} images but {placeholders} {IMAGE} placeholders in the human turns."
        raise BadRow(name, f"{problem} Give one placeholder for each image, in the same order.", "count")
    return [{"messages": messages, "images": images, "loss_on": "answers"}]


def _mmc4_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    sentences, infos = _list(record, "text_list"), _list(record, "image_info", empty=True)
    before: list[list[tuple[str, str]]] = [[] for _ in sentences]
    for n, info in enumerate(infos):
        field = f"image_info[{n}]"
        if not isinstance(info, dict):
            raise BadRow(field, "is not an object. Give it `image_name` and `matched_text_index`.")
        index = info.get("matched_text_index")
        if type(index) is not int or not 0 <= index < len(sentences):
            remedy = f"Every image needs the index of the sentence it belongs to, from 0 to {len(sentences) - 1}."
            raise BadRow(f"{field}.matched_text_index", f"is {index!r}. {remedy}")
        before[index].append((f"{field}.image_name", info.get("image_name")))
    parts = []
    for s, sentence in enumerate(sentences):
        parts += [_part() for _ in before[s]] + [_part(_text(sentence, f"text_list[{s}]"))]
    return [_document(parts, [image for images in before for image in images], "text")]


def _caption_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(record.get("json"), dict):  # WebDataset
        record = {**record, "json.caption": record["json"].get("caption")}
    image = next((field for field in IMAGE_FIELDS if record.get(field) is not None), None)
    if image is None:
        raise BadRow("image", f"there is no image in {', '.join(IMAGE_FIELDS)}. Give one or drop the row.", "image")
    caption = next((field for field in (*CAPTION_FIELDS, "json.caption") if record.get(field) is not None), None)
    if caption is None:
        problem = f"is missing or cannot be decoded. Write the text into one of {', '.join(CAPTION_FIELDS)}."
        raise BadRow("caption", problem, "empty")
    texts = record[caption]
    if not isinstance(texts, list):
        return [_caption(image, record[image], caption, texts)]
    if not texts:
        raise BadRow(caption, "is an empty list. Write a caption or drop the row.", "empty")
    return [_caption(image, record[image], f"{caption}[{n}]", text) for n, text in enumerate(texts)]


def _coco_records(data: Any, split: str) -> Iterator[tuple[int, Any]]:
    images = _list(data, "images")
    wanted = KARPATHY_SPLITS.get(split, (split,))
    splits = {image.get("split") for image in images if isinstance(image, dict)}
    if not splits & set(wanted):
        there = ", ".join(sorted(map(str, splits)))
        raise BadRow("images", f"no image is of the split {split!r}, but of {there}. Set `split` to one of them.")
    for number, image in enumerate(images, 1):
        # one without a split belongs to all of them: it is a bad row in each
        if not isinstance(image, dict) or not isinstance(image.get("split"), str) or image["split"] in wanted:
            yield number, image


def _coco_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(record.get("split", ""), str):
        raise BadRow("split", f"is {record['split']!r}, not a string. Use train, restval, val or test.")
    field, image = "image", record.get("image")
    if image is None:
        field, image = "filename", record.get("filename")
        if isinstance(image, str) and record.get("filepath"):
            image = os.path.join(str(record["filepath"]), image)
    rows = []
    for n, sentence in enumerate(_list(record, "sentences")):
        name = f"sentences[{n}]"
        if isinstance(sentence, dict):
            name, sentence = f"{name}.raw", sentence.get("raw")
        rows.append(_caption(field, image, name, sentence))
    return rows


def _vist_records(data: Any, split: str) -> Iterator[tuple[int, Any]]:
    stories: dict[Any, list[tuple[int, Any]]] = {}
    for n, annotation in enumerate(_list(data, "annotations")):
        step = annotation[0] if isinstance(annotation, list) and len(annotation) == 1 else annotation
        story = step.get("story_id") if isinstance(step, dict) else None
        # one that names no story is a bad row of its own
        stories.setdefault(n if story is None else str(story), []).append((n, step))
    yield from enumerate(({"steps": steps} for steps in stories.values()), 1)


def _vist_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    steps, parts, images = {}, [], []
    for n, step in record["steps"]:
        field = f"annotations[{n}]"
        if not isinstance(step, dict) or step.get("story_id") is None:
            raise BadRow(field, "is not a list of one step with a `story_id`. Write it as docs/data.md shows.")
        order = step.get("worker_arranged_photo_order")
        if type(order) is not int or order in steps:
            problem = f"is {order!r}. The steps of story {step['story_id']} need different whole numbers."
            raise BadRow(f"{field}.worker_arranged_photo_order", problem)
        steps[order] = field, step
    if max(steps) - min(steps) + 1 != len(steps):
        there = f"is a story of which only the steps {', '.join(map(str, sorted(steps)))} are there."
        raise BadRow(f"{steps[min(steps)][0]}.story_id", f"{there} Restore the others or drop the story.", "count")
    for _, (field, step) in sorted(steps.items()):
        text = "original_text" if "original_text" in step else "text"
        images.append((f"{field}.photo_flickr_id", step.get("photo_flickr_id")))
        parts += [_part(), _part(_text(step.get(text), f"{field}.{text}"))]
    return [_document(parts, images, "text")]


def _winoground_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        _caption(f"image_{n}", record.get(f"image_{n}"), f"caption_{n}", record.get(f"caption_{n}")) for n in (0, 1)
    ]


LAYOUTS = {
    "conversational": Layout(_conversational_rows, [{"messages"}]),
    "llava": Layout(_llava_rows, [{"conversations"}]),
    "mmc4": Layout(_mmc4_rows, [{"text_list"}]),
    "winoground": Layout(_winoground_rows, [{"image_0", "image_1", "caption_0", "caption_1"}]),
    "vist": Layout(_vist_rows, [{"images", "annotations"}], _vist_records),
    "coco": Layout(_coco_rows, [{"images", "dataset"}, {"sentences"}], _coco_records),
    "captions": Layout(
        _caption_rows, [{image, caption} for image in IMAGE_FIELDS for caption in (*CAPTION_FIELDS, "json")]
    ),
}
