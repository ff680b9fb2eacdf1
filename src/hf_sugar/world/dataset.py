"""The rendered world as datasets, in the same row format as any other data."""

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from tqdm.auto import tqdm

from .. import data
from ..data import stored_image
from ..files import replacing
from .scenes import COLORS, SPLITS, Scene, render, scenes, story


DESCRIBE = "Describe the image."
FACT = "What color is the back of the picture?"

ROW_FEATURES = Features({name: data.ROW_FEATURES[name] for name in ("messages", "images", "loss_on", "id")})
WINOGROUND_FEATURES = Features(
    {f"image_{i}": Image() for i in (0, 1)} | {name: Value("string") for name in ("caption_0", "caption_1", "id")}
)
_IMAGE = {"type": "image", "text": None}


def load_world(
    kind: str, split: str = "train", size: int = 1000, image_size: int = 32, seed: int = 0, progress: bool = False
) -> Dataset:
    """
    Renders a dataset. The same arguments give the same bytes.

    Args:
        kind (`str`):
            - `"captions"`: an image and its caption (`loss_on="captions"`), each once while there are any.
            - `"conversations"`: half of the rows ask to describe the image and answer with the caption, the others ask
              one to three questions about it (`loss_on="answers"`).
            - `"stories"`: documents of three to six sentences, each followed by its image (`loss_on="text"`).
            - `"facts"`: two pictures of one scene, the colour of whose back is asked and answered after each
              (`loss_on="answers"`). No picture shows it: the second answer is known from the first, and the first from
              nowhere.
            - `"winoground"`: pairs of images and of captions made of the same words in another order.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"`, `"test"`, or `"test_unseen"` (scenes with combinations of colour and shape that no
            other split shows).
        size (`int`, *optional*, defaults to 1000): Number of rows.
        image_size (`int`, *optional*, defaults to 32): Width and height of the images in pixels.
        seed (`int`, *optional*, defaults to 0): Of the order of the scenes, of positions, lighting and questions.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a bar.

    Returns:
        `datasets.Dataset`: `messages`, `images`, `loss_on`, `id`, or for `"winoground"` `image_0`, `image_1`,
        `caption_0`, `caption_1`, `id`.

    Example:

    ```python
    >>> load_world("captions", "test", size=2)[0]["messages"][0]["content"][1]["text"]
    'a large cyan cross to the left of a small blue cross'
    ```
    """
    for name, value, known in (("kind", kind, KINDS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} does not exist: choose from {', '.join(known)}.")
    rows = KINDS[kind](split, image_size, random.Random(f"{seed}/{kind}/{split}"))
    rows = [
        {**next(rows), "id": f"world/{kind}/{split}:{i}"}
        for i in tqdm(range(size), desc=f"{kind}/{split}", unit="row", disable=not progress)
    ]
    return Dataset.from_list(rows, features=WINOGROUND_FEATURES if kind == "winoground" else ROW_FEATURES)


def write_world(
    directory: str | os.PathLike, sizes: Mapping[str, Mapping[str, int]], image_size: int = 32, seed: int = 0
) -> dict[str, dict[str, Path]]:
    """
    Writes each kind and split as parquet, laid out so that `datasets.load_dataset(f"{directory}/{kind}")` opens a kind
    with its splits. Returns the files by kind and split; those of the same name are replaced.

    Args:
        directory (`str` or `os.PathLike`): Where to write.
        sizes (`Mapping`): Rows by kind and split, such as `{"captions": {"train": 10000, "test": 500}}`.
        image_size, seed: As in [`load_world`].
    """
    written = {}
    for kind, splits in sizes.items():
        written[kind] = {}
        for split, size in splits.items():
            rows = load_world(kind, split, size, image_size, seed, progress=True)
            # of a plain "test_unseen.parquet" `load_dataset` would make more rows of "test"
            path = written[kind][split] = Path(directory) / kind / "data" / f"{split}-00000-of-00001.parquet"
            with replacing(path) as file:
                rows.to_parquet(file)
    return written


def _row(turns: list[tuple[str, list[dict]]], images: list, loss_on: str) -> dict:
    messages = [{"role": role, "content": parts} for role, parts in turns]
    return {"messages": messages, "images": list(map(stored_image, images)), "loss_on": loss_on}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _shuffled(split: str, rng: random.Random) -> Iterator[Scene]:
    """All scenes of a split in random order, then all again."""
    while True:
        yield from rng.sample(scenes(split), len(scenes(split)))


def _captions(split: str, image_size: int, rng: random.Random) -> Iterator[dict]:
    for scene in _shuffled(split, rng):
        yield _row([("user", [_IMAGE, _text(scene.caption)])], [scene.render(rng, image_size)], "captions")


def _conversations(split: str, image_size: int, rng: random.Random) -> Iterator[dict]:
    for scene in _shuffled(split, rng):
        answers = {DESCRIBE: scene.caption}
        if rng.random() >= 0.5:
            answers = dict(scene.question(rng) for _ in range(rng.randint(1, 3)))
        turns = []
        for question, answer in answers.items():
            turns += [("user", [_text(question)]), ("assistant", [_text(answer)])]
        turns[0][1].insert(0, _IMAGE)
        yield _row(turns, [scene.render(rng, image_size)], "answers")


def _stories(split: str, image_size: int, rng: random.Random) -> Iterator[dict]:
    while True:
        steps = story(split, rng)
        parts = [part for sentence, _ in steps for part in (_text(sentence), _IMAGE)]
        yield _row([("user", parts)], [render(placed, rng, image_size) for _, placed in steps], "text")


def _facts(split: str, image_size: int, rng: random.Random) -> Iterator[dict]:
    for scene in _shuffled(split, rng):
        turns = [("user", [_IMAGE, _text(FACT)]), ("assistant", [_text(rng.choice(list(COLORS)))])]
        yield _row(turns * 2, [scene.render(rng, image_size) for _ in range(2)], "answers")


def _winoground(split: str, image_size: int, rng: random.Random) -> Iterator[dict]:
    for scene in _shuffled(split, rng):
        if len(scene.things) == 1:
            continue
        # in a scene of groups a shape is a plural in one place and a singular in the other
        attributes = ["thing", "color", "size", "shape"] if scene.relation else ["color", "size"]
        swaps = [other for other in map(scene.swapped, attributes) if other != scene and other.split == split]
        swaps = [other for other in swaps if other.things[0] != other.things[1] and other.words == scene.words]
        if swaps:
            both = {"0": scene, "1": rng.choice(swaps)}
            images = {f"image_{n}": stored_image(each.render(rng, image_size)) for n, each in both.items()}
            yield {**images, **{f"caption_{n}": each.caption for n, each in both.items()}}


KINDS = {
    "captions": _captions,
    "conversations": _conversations,
    "stories": _stories,
    "facts": _facts,
    "winoground": _winoground,
}
