"""Evaluation tasks as functions of an embedding or a generating function."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from ..data import load_data, load_table
from ..data.images import load_image, row_slices, undecoded
from ..models.rows_sugar import conversation_row, row_name
from ..retrieval.rag import split_answer
from .metrics import Estimate, recall_at_k


logger = logging.getLogger(__name__)

Slice = str | Image.Image | Path
Item = Slice | list[Slice]
EmbedFunction = Callable[[Sequence[Item]], np.ndarray]
GenerateFunction = Callable[[Sequence[dict[str, Any]]], list[str]]
Task = Callable[[EmbedFunction, GenerateFunction], dict[str, Any]]

# Of four independent scores, in percent: each of the two comparisons is won by half, and of the 24 orders of the four
# scores 4 have both matching pairs above both others.
WINOGROUND_CHANCE = {"text_score": 25.0, "image_score": 25.0, "group_score": 100 / 6}


@dataclass
class EvaluationData:
    """
    Which data each task is run on. Every field is a source as [`hf_sugar.data.load_data`] takes it, or a mapping of
    names to sources, each measured apart.
    """

    image_text_data: list[str] | None = field(
        default=None, metadata={"help": "Rows with one image and an answer or caption: retrieval both ways."}
    )
    interleaved_data: list[str] | None = field(
        default=None, metadata={"help": "Documents: retrieval of the next image given what precedes it."}
    )
    generation_data: list[str] | None = field(
        default=None, metadata={"help": "Conversations: exact match of the last answer."}
    )
    winoground_data: list[str] | None = field(
        default=None, metadata={"help": "Dataset with image_0, image_1, caption_0, caption_1."}
    )

    def any(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))


def load_tasks(
    data: EvaluationData, split: str = "test", on_bad_row: str = "error"
) -> list[tuple[str, Task, list[str]]]:
    """
    Read and check the data of every task, for which no model is needed.

    Args:
        data ([`EvaluationData`]):
            What to run on.
        split (`str`, *optional*, defaults to `"test"`):
            Split of datasets that have several.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at the first malformed row, `"skip"` leaves malformed rows and those with unreadable images
            out and says how many.

    Returns:
        `list[tuple[str, Callable, list[str]]]`: for each source what stands before the names of its results, the task
        as a function of an embedding and a generating function, and what is to be said about the data.

    Raises:
        `FileNotFoundError`, `ValueError`: as [`hf_sugar.data.load_data`]; or if no row of a source fits its task.
    """
    tasks = []
    for name, prepare in (
        ("image_text_data", _image_text_task),
        ("interleaved_data", _interleaved_task),
        ("winoground_data", _winoground_task),
        ("generation_data", _generation_task),
    ):
        sources = getattr(data, name) or {}
        if not isinstance(sources, dict) or "path" in sources:
            sources = {"": sources}
        for label, source in sources.items():
            notes: list[str] = []
            bad: list[Any] = []
            if name == "winoground_data":
                if isinstance(source, list):  # of the command line
                    if len(source) > 1:
                        raise ValueError(f"`winoground_data` takes one source, got {len(source)}.")
                    source = source[0]
                rows, check = load_table(source, split), _pair_images
                require_columns(rows)
            else:
                rows, check = load_data(source, split, on_bad_row=on_bad_row, bad_rows=bad), row_slices
            if on_bad_row == "skip":
                rows = _readable(rows, check, len(bad), notes)
            task = prepare(rows, notes)
            where = f"{name} {label}".strip()
            tasks.append((label and f"{label}/", task, [f"{where}: {note}" for note in notes]))
    return tasks


def evaluate_tasks(
    data: EvaluationData,
    embed: EmbedFunction,
    generate: GenerateFunction | None = None,
    split: str = "test",
    on_bad_row: str = "error",
) -> dict[str, Any]:
    """
    Run every task that has data.

    Args:
        data ([`EvaluationData`]):
            What to run on.
        embed (`Callable`):
            Embedding function, such as a [`SugarEmbedder`].
        generate (`Callable`, *optional*):
            Generating function, such as a [`SugarGenerator`]. Left out, nothing is generated.
        split (`str`, *optional*, defaults to `"test"`), on_bad_row (`str`, *optional*, defaults to `"error"`):
            As in [`load_tasks`], which also says what is refused.

    Returns:
        `dict[str, Any]`: results of all tasks ([`Estimate`] or `int`); a name given to a source stands before those of
        its results. `"notes"`, if there, is a list of what rows were left out, and why.
    """
    if generate is None:
        data = EvaluationData(data.image_text_data, data.interleaved_data, None, data.winoground_data)
    return run_tasks(load_tasks(data, split, on_bad_row), embed, generate)


def run_tasks(
    tasks: Sequence[tuple[str, Task, list[str]]], embed: EmbedFunction, generate: GenerateFunction | None
) -> dict[str, Any]:
    """Results of what [`load_tasks`] returned, as [`evaluate_tasks`] returns them."""
    results: dict[str, Any] = {}
    for prefix, task, _ in tasks:
        results |= {f"{prefix}{name}": value for name, value in task(embed, generate).items()}
    notes = [note for *_, said in tasks for note in said]
    return {**results, "notes": notes} if notes else results


def _readable(rows: Dataset, check: Callable[[dict[str, Any], str], Any], bad: int, notes: list[str]) -> Dataset:
    """The rows that `check` does not refuse; `bad` others were left out before."""
    good = []
    for index, row in enumerate(undecoded(rows)):
        try:
            check(row, row_name(row, index))
            good.append(index)
        except ValueError as error:
            logger.warning("%s Left out.", error)
    bad += len(rows) - len(good)
    if bad:
        notes.append(f"{bad} of {len(good) + bad} rows cannot be read and are left out.")
    return rows.select(good)


def _pair_images(row: dict[str, Any], where: str) -> list[Image.Image]:
    return [load_image(row[name], f"{where}, {name}") for name in ("image_0", "image_1")]


class _Images(Sequence):
    """The first images of rows, decoded when they are asked for."""

    def __init__(self, rows: Dataset, indices: list[int]):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Image.Image:
        row = self.rows[self.indices[number]]
        return load_image(conversation_row(row)["images"][0], f"{row_name(row, self.indices[number])}, images[0]")


def image_text_pairs(rows: Dataset, notes: list[str] | None = None) -> tuple[Sequence[Image.Image], list[str]]:
    """
    Images and the texts that belong to them: the caption of a document of one image, or the first answer of a
    conversation that begins with its only image.

    Args:
        rows ([`datasets.Dataset`]):
            Rows in the conversational vision format.
        notes (`list[str]`, *optional*):
            Gets what is to be said of the rows that have no such pair, or more texts than the first.

    Returns:
        `tuple[Sequence[PIL.Image.Image], list[str]]`: images, decoded when they are asked for, and their texts.

    Raises:
        `ValueError`: if no row has such a pair.
    """
    rows = undecoded(rows)
    indices, pairs, several = [], [], 0
    for index, row in enumerate(rows):
        row = conversation_row(row)
        first = next((message for message in row["messages"] if message["role"] == "user"), None)
        captions = row["loss_on"] == "captions"
        if len(row["images"]) != 1 or row["loss_on"] == "text" or first is None:
            continue
        if isinstance(first["content"], list) and all(part["type"] != "image" for part in first["content"]):
            continue
        texts = [_texts(m) for m in row["messages"] if m["role"] == ("user" if captions else "assistant")]
        texts = [text for each in texts for text in each] if captions else [" ".join(each) for each in texts if each]
        if not texts or captions and len(texts) > 1:
            continue
        several += len(texts) > 1
        indices.append(index)
        pairs.append(texts[0])
    if not indices:
        raise ValueError(
            f"None of the {len(rows)} rows has one image at its beginning and an answer or caption: nothing to retrieve."
        )
    if notes is not None and several:
        notes.append(f"{several} of {len(rows)} rows have more than one answer; the first one is taken.")
    if notes is not None and len(indices) < len(rows):
        notes.append(
            f"{len(rows) - len(indices)} of {len(rows)} rows do not have one image with an answer or a caption and are "
            "left out."
        )
    return _Images(rows, indices), pairs


def _texts(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _image_text_task(rows: Dataset, notes: list[str]) -> Task:
    images, texts = image_text_pairs(rows, notes)
    return lambda embed, generate: {**image_text_retrieval(embed, images, texts), "pairs": len(texts)}


def _interleaved_task(rows: Dataset, notes: list[str]) -> Task:
    stories = [row_slices(row, row_name(row, index)) for index, row in enumerate(undecoded(rows))]
    short = sum(all(isinstance(part, str) for part in story[2:]) for story in stories)
    if short:
        notes.append(f"{short} of {len(stories)} documents have no image after two other slices: not searched for.")
    return lambda embed, generate: interleaved_retrieval(embed, stories)


def _winoground_task(rows: Dataset, notes: list[str]) -> Task:
    return lambda embed, generate: winoground(embed, undecoded(rows))


def _generation_task(rows: Dataset, notes: list[str]) -> Task:
    roles = [[message["role"] for message in messages] for messages in rows["messages"]]
    answered = [n for n, each in enumerate(roles) if "assistant" in each]
    if len(answered) < len(rows):
        if not answered:
            raise ValueError(f"None of the {len(rows)} rows has an answer to compare with.")
        notes.append(f"{len(rows) - len(answered)} of {len(rows)} rows have no answer and are left out.")
        rows = rows.select(answered)
    several = sum(each.count("assistant") > 1 for each in roles)
    if several:
        notes.append(f"{several} of {len(rows)} rows have more than one answer; the last one is compared.")
    rows = undecoded(rows)
    return lambda embed, generate: {"exact_match": exact_match(generate, rows)["exact_match"]}


def require_columns(rows: Dataset) -> None:
    """Refuse a dataset without the columns of Winoground."""
    if missing := {"image_0", "image_1", "caption_0", "caption_1"} - set(rows.column_names):
        raise ValueError(
            f"The dataset has no column {', '.join(sorted(missing))}, but {', '.join(rows.column_names)}. Rename them."
        )


def image_text_retrieval(
    embed: EmbedFunction,
    images: Sequence[Image.Image],
    captions: Sequence[str] | Sequence[list[str]],
    ks: Sequence[int] = (1, 5, 10),
    match_copies: bool = True,
) -> dict[str, Estimate | int]:
    """
    Recall of captions given images and of images given captions, over all images and all captions.

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, such as a [`SugarEmbedder`].
        images (`Sequence[PIL.Image.Image]`):
            Images. A lazily decoded column of a dataset will do.
        captions (`Sequence[str]` or `Sequence[list[str]]`):
            `captions[i]` is the caption of `images[i]`, or the list of its captions.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`):
            Cut-offs.
        match_copies (`bool`, *optional*, defaults to `True`):
            Captions that read the same cannot be told apart, so an image finds its caption in any copy of it, and a
            caption finds its image in the image of any copy. The published benchmarks do not allow for that: with
            `False` every caption belongs to its own image only.

    Returns:
        `dict[str, Estimate | int]`: `image_to_text_recall@k` and `text_to_image_recall@k` for each k, and
        `duplicate_captions`, how many captions repeat an earlier one. The intervals of captions resample images.

    Raises:
        `ValueError`: if the numbers of images and of captions differ.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions; `captions[i]` belongs to `images[i]`.")
    texts, owners = [], []
    for i, caption in enumerate(captions):
        for text in [caption] if isinstance(caption, str) else caption:
            texts.append(text)
            owners.append(i)
    keys: Sequence[str | int] = texts if match_copies else range(len(texts))
    texts_alike: dict[str | int, set[int]] = {}
    images_alike: dict[str | int, set[int]] = {}
    relevant_texts: list[set[int]] = [set() for _ in images]
    for t, (key, owner) in enumerate(zip(keys, owners, strict=True)):
        texts_alike.setdefault(key, set()).add(t)
        images_alike.setdefault(key, set()).add(owner)
    for key, owner in zip(keys, owners, strict=True):
        relevant_texts[owner] |= texts_alike[key]

    image_embeddings, text_embeddings = embed(images), embed(texts)
    found_texts = _recall(image_embeddings, text_embeddings, relevant_texts, ks)
    found_images = _recall(text_embeddings, image_embeddings, [images_alike[key] for key in keys], ks)
    return {
        **{f"image_to_text_recall@{k}": Estimate.from_hits(found_texts[k]) for k in ks},
        **{f"text_to_image_recall@{k}": Estimate.from_hits(found_images[k], groups=owners) for k in ks},
        "duplicate_captions": len(texts) - len(set(texts)),
    }


def interleaved_retrieval(
    embed: EmbedFunction, stories: Sequence[list[Slice]], ks: Sequence[int] = (1, 5, 10), min_context: int = 2
) -> dict[str, Estimate | int]:
    """
    Recall of the next image of a story, given all of the story before it, among the images of all stories.

    This is how visual stories (VIST) are used to test whether a model makes use of context. For reference each image
    is also searched with the last sentence before it alone: what the full context finds beyond that is what the
    context is good for. The images of the context are among the candidates. Images with the same pixels are one
    candidate.

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, such as a [`SugarEmbedder`].
        stories (`Sequence[list[str | PIL.Image.Image]]`):
            Stories as slices in reading order. [`hf_sugar.data.row_slices`] makes one of a row.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`):
            Cut-offs.
        min_context (`int`, *optional*, defaults to `2`):
            Slices that must precede an image for it to be searched. With 1, the first image of a story that begins with
            a sentence is searched as well, and there the two queries are the same.

    Returns:
        `dict[str, Estimate | int]`: `context_recall@k` and `last_sentence_recall@k` for each k, `candidates`, and
        `duplicate_images`, how many images repeat an earlier one. Images with no sentence before them are missing from
        the reference, as its `n` shows. The intervals resample stories.

    Raises:
        `ValueError`: if `min_context` is below 1, or no image has that much context.
    """
    if min_context < 1:
        raise ValueError(f"`min_context` is {min_context}; a query needs at least 1 slice.")
    candidates: dict[bytes, int] = {}
    images, contexts, sentences = [], [], []
    total = 0
    for s, story in enumerate(stories):
        sentence = None
        for position, part in enumerate(story):
            if isinstance(part, str):
                sentence = part
                continue
            total += 1
            target = candidates.setdefault(_image_key(part), len(candidates))
            if target == len(images):
                images.append(part)
            if position >= min_context:
                contexts.append((story[:position], target, s))
                if sentence is not None:
                    sentences.append((sentence, target, s))
    if not contexts:
        raise ValueError(
            f"No image of the {len(stories)} stories has {min_context} slices before it. Lower `min_context`, or check "
            "that the stories hold images."
        )

    image_embeddings = embed(images)
    results: dict[str, Estimate | int] = {}
    for name, queries in (("context", contexts), ("last_sentence", sentences)):
        if queries:
            items, targets, groups = zip(*queries, strict=True)
            hits = _recall(embed(list(items)), image_embeddings, targets, ks)
            results |= {f"{name}_recall@{k}": Estimate.from_hits(hits[k], groups=groups) for k in ks}
    return {**results, "candidates": len(images), "duplicate_images": total - len(images)}


def winoground(embed: EmbedFunction, rows: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """
    Text, image and group score of pairs of captions with the same words and their two images.

    With `s(c, i)` the cosine of caption c and image i, a row counts for the text score if each image prefers its own
    caption (`s(c0, i0) > s(c1, i0)` and `s(c1, i1) > s(c0, i1)`), for the image score if each caption prefers its own
    image (`s(c0, i0) > s(c0, i1)` and `s(c1, i1) > s(c1, i0)`), and for the group score if both hold. Equal scores do
    not count. [`WINOGROUND_CHANCE`] has what random scores reach: 25, 25 and 16.7. Source: [Winoground: Probing Vision
    and Language Models for Visio-Linguistic Compositionality](https://huggingface.co/papers/2204.03162).

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, such as a [`SugarEmbedder`].
        rows (`Sequence[dict]`):
            Rows with `image_0`, `image_1`, `caption_0` and `caption_1`, as in the published dataset.

    Returns:
        `dict[str, Estimate]`: `text_score`, `image_score` and `group_score`.
    """
    captions, images = [], []
    for n, row in enumerate(rows):
        captions += [row["caption_0"], row["caption_1"]]
        images += _pair_images(row, f"row {n}")
    caption_embeddings, image_embeddings = embed(captions), embed(images)
    pairs = len(images) // 2
    # s[row, caption, image]
    s = np.einsum("rcd,rid->rci", caption_embeddings.reshape(pairs, 2, -1), image_embeddings.reshape(pairs, 2, -1))
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    return {
        "text_score": Estimate.from_hits(text),
        "image_score": Estimate.from_hits(image),
        "group_score": Estimate.from_hits(text & image),
    }


def normalise_answer(text: str) -> str:
    """Lower case, with every run of white space made one space and none at the ends."""
    return " ".join(text.lower().split())


def exact_match(
    generate: GenerateFunction,
    rows: Sequence[dict[str, Any]],
    normalise: Callable[[str], str] = normalise_answer,
    chunk_size: int = 1024,
) -> dict[str, Any]:
    """
    Share of rows whose last answer is generated word for word.

    Args:
        generate (`Callable`):
            Turns a list of conversations that end with the user's turn, each with its images, into a list of answers,
            such as a [`SugarGenerator`].
        rows (`Sequence[dict]`):
            Rows in the conversational vision format. The prompt is what precedes the last assistant turn, with its
            images.
        normalise (`Callable`, *optional*, defaults to [`~evaluation.tasks.normalise_answer`]):
            Applied to both the expected and the generated answer before they are compared.
        chunk_size (`int`, *optional*, defaults to `1024`):
            Rows handed to `generate` at a time: this many have their images in memory.

    Returns:
        `dict[str, Any]`: `exact_match`, an [`Estimate`], and `misses`, a list of `{"index", "row", "expected",
        "generated"}` of the rows answered otherwise, where `row` is position and id.

    Raises:
        `ValueError`: if a row has no assistant turn.
    """
    hits, misses = [], []
    for start in range(0, len(rows), chunk_size):
        chunk = [rows[index] for index in range(start, min(start + chunk_size, len(rows)))]
        names = [row_name(row, index) for index, row in enumerate(chunk, start)]
        prompts, answers = zip(*map(split_answer, chunk), strict=True)
        if None in answers:
            name = names[answers.index(None)]
            raise ValueError(f"{name} has no assistant turn to compare with. Drop it, or add the answer.")
        for name, expected, generated in zip(names, answers, generate(prompts), strict=True):
            hits.append(normalise(expected) == normalise(generated))
            if not hits[-1]:
                miss = {"index": len(hits) - 1, "row": name, "expected": expected, "generated": generated}
                misses.append(miss)
    return {"exact_match": Estimate.from_hits(hits), "misses": misses}


def _recall(
    queries: np.ndarray, candidates: np.ndarray, relevant: Sequence[set[int]] | Sequence[int], ks: Sequence[int]
) -> dict[int, np.ndarray]:
    blocks = [  # the full score matrix of a large test set would not fit in memory
        recall_at_k(queries[start : start + 1024] @ candidates.T, relevant[start : start + 1024], ks)
        for start in range(0, len(queries), 1024)
    ]
    return {k: np.concatenate([block[k] for block in blocks]) for k in ks}


def _image_key(image: Image.Image | Path) -> bytes:
    image = load_image(image)
    return hashlib.blake2b(image.tobytes(), key=repr(image.size).encode()).digest()
