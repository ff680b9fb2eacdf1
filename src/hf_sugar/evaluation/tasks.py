"""Evaluation tasks as functions of an embedding or a generating function."""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

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

KS = (1, 5, 10)
# Of four independent scores, in percent: each of the two comparisons is won by half, and of the 24 orders of the four
# scores 4 have both matching pairs above both others.
WINOGROUND_CHANCE = {"text_score": 25.0, "image_score": 25.0, "group_score": 100 / 6}
WINOGROUND_COLUMNS = ("image_0", "image_1", "caption_0", "caption_1")


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


@dataclass
class Task:
    """
    A task with its data.

    Args:
        run (`Callable[[EmbedFunction, GenerateFunction], dict]`):
            Gives the results by name.
        chance (`dict[str, float]`):
            What those of the results that have a chance level reach by chance, in percent.
        worth (`str`):
            What the results say, in a sentence.
        source (`str`):
            Field of [`EvaluationData`] and name of the source.
        prefix (`str`):
            Stands before the names of the results.
        notes (`list[str]`):
            What is to be said about the data.
    """

    run: Callable[[EmbedFunction, GenerateFunction], dict[str, Any]]
    chance: dict[str, float]
    worth: str
    source: str = ""
    prefix: str = ""
    notes: list[str] = field(default_factory=list)


def load_tasks(data: EvaluationData, split: str = "test", on_bad_row: str = "error") -> list[Task]:
    """
    Read and check the data of every task, for which no model is needed.

    Args:
        data ([`EvaluationData`]): What to run on.
        split (`str`, *optional*, defaults to `"test"`): Split of datasets that have several.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at the first malformed row, `"skip"` leaves malformed rows and those with unreadable images
            out and says how many.

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
                rows, check = load_pairs(source, split), _pair_images
            else:
                rows, check = load_data(source, split, on_bad_row=on_bad_row, bad_rows=bad), row_slices
            if on_bad_row == "skip":
                rows = _readable(rows, check, len(bad), notes)
            task = prepare(rows, notes)
            task.source, task.prefix = f"{name} {label}".strip(), label and f"{label}/"
            task.notes = [f"{task.source}: {note}" for note in notes]
            tasks.append(task)
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
        data ([`EvaluationData`]): What to run on.
        embed (`Callable`): Embedding function, such as a [`SugarEmbedder`].
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


def run_tasks(tasks: Sequence[Task], embed: EmbedFunction, generate: GenerateFunction | None) -> dict[str, Any]:
    """Results of what [`load_tasks`] returned, as [`evaluate_tasks`] returns them."""
    results: dict[str, Any] = {}
    for task in tasks:
        results |= {f"{task.prefix}{name}": value for name, value in task.run(embed, generate).items()}
    notes = [note for task in tasks for note in task.notes]
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
        rows ([`datasets.Dataset`]): Rows in the conversational vision format.
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
    searches = _image_text_searches(images, texts)
    return Task(
        lambda embed, generate: {**image_text_retrieval(embed, images, texts), "pairs": len(texts)},
        _chance(searches),
        "recall falls with the number of candidates, so that it compares models on this set alone; what the labels miss, "
        "the structure loss cannot teach.",
    )


def _interleaved_task(rows: Dataset, notes: list[str]) -> Task:
    stories = [row_slices(row, row_name(row, index)) for index, row in enumerate(undecoded(rows))]
    short = sum(all(isinstance(part, str) for part in story[2:]) for story in stories)
    if short:
        notes.append(f"{short} of {len(stories)} documents have no image after two other slices: not searched for.")
    return Task(
        lambda embed, generate: interleaved_retrieval(embed, stories),
        _chance(_interleaved_searches(stories)[0]),
        "the label of several slices with one image knows no order, and images of the context are most like it: what is "
        "found beyond the labels has another source than the structure loss.",
    )


def _winoground_task(rows: Dataset, notes: list[str]) -> Task:
    return Task(
        lambda embed, generate: winoground(embed, undecoded(rows)),
        WINOGROUND_CHANCE,
        "both captions have the same words, so that only their order tells the images apart; labels are the cosines of one "
        "caption and one image, the most that the structure loss can teach.",
    )


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
    return Task(
        lambda embed, generate: {"exact_match": exact_match(generate, rows)["exact_match"]},
        {},
        "an answer counts if it is right word for word, so that a right answer in other words is lost; labels have no "
        "part in it.",
    )


def load_pairs(source: Any, split: str = "test") -> Dataset:
    """The dataset of a source as [`hf_sugar.data.load_table`] reads it, refused without the columns of Winoground."""
    rows = load_table(source, split)
    if missing := sorted(set(WINOGROUND_COLUMNS) - set(rows.column_names)):
        raise ValueError(
            f"The dataset has no column {', '.join(missing)}, but {', '.join(rows.column_names)}. Rename them."
        )
    return rows


class Search(NamedTuple):
    """
    Queries over one list of candidates: those in `relevant` are right for a query, those in `excluded` are no candidates
    of it. Intervals resample `groups` of queries.
    """

    queries: Sequence[Item]
    candidates: Sequence[Item]
    relevant: Sequence[set[int]]
    groups: Sequence[int] | None = None
    excluded: Sequence[set[int]] | None = None


def recall(embed: EmbedFunction, searches: dict[str, Search], ks: Sequence[int] = KS) -> dict[str, Estimate]:
    """`<name>_recall@<k>` of each search. A list that several searches share is embedded once."""
    embedded, results = {}, {}
    for name, search in searches.items():
        for items in (search.candidates, search.queries):
            if id(items) not in embedded:
                embedded[id(items)] = embed(items)
        queries, candidates = embedded[id(search.queries)], embedded[id(search.candidates)]
        hits: dict[int, list[np.ndarray]] = {k: [] for k in ks}
        for start in range(0, len(queries), 1024):  # the scores of a large test set would not fit in memory
            block = slice(start, start + 1024)
            scores = queries[block] @ candidates.T
            for row, excluded in zip(scores, search.excluded[block] if search.excluded else ()):
                row[list(excluded)] = -np.inf
            for k, found in recall_at_k(scores, search.relevant[block], ks).items():
                hits[k].append(found)
        for k in ks:
            results[f"{name}_recall@{k}"] = Estimate.from_hits(np.concatenate(hits[k]), groups=search.groups)
    return results


def _chance(searches: dict[str, Search], ks: Sequence[int] = KS) -> dict[str, float]:
    """What [`recall`] finds in candidates in random order: one minus the share of draws of k without a relevant one."""
    results = {}
    for name, search in searches.items():
        excluded = search.excluded or [()] * len(search.relevant)
        sizes = [(len(search.candidates) - len(out), len(good)) for out, good in zip(excluded, search.relevant)]
        for k in ks:
            missed = [math.comb(n - good, min(k, n)) / math.comb(n, min(k, n)) for n, good in sizes]
            results[f"{name}_recall@{k}"] = 100 * (1 - float(np.mean(missed)))
    return results


def image_text_retrieval(
    embed: EmbedFunction,
    images: Sequence[Image.Image],
    captions: Sequence[str] | Sequence[list[str]],
    ks: Sequence[int] = KS,
    match_copies: bool = True,
) -> dict[str, Estimate | int]:
    """
    Recall of captions given images and of images given captions, over all images and all captions.

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, such as a [`SugarEmbedder`].
        images (`Sequence[PIL.Image.Image]`): Images. A lazily decoded column of a dataset will do.
        captions (`Sequence[str]` or `Sequence[list[str]]`):
            `captions[i]` is the caption of `images[i]`, or the list of its captions.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs.
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
    searches = _image_text_searches(images, captions, match_copies)
    texts = searches["image_to_text"].candidates
    return {**recall(embed, searches, ks), "duplicate_captions": len(texts) - len(set(texts))}


def _image_text_searches(
    images: Sequence[Image.Image], captions: Sequence[str] | Sequence[list[str]], match_copies: bool = True
) -> dict[str, Search]:
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions; `captions[i]` belongs to `images[i]`.")
    captions = [[caption] if isinstance(caption, str) else caption for caption in captions]
    texts = [text for several in captions for text in several]
    owners = [i for i, several in enumerate(captions) for _ in several]
    keys: Sequence[str | int] = texts if match_copies else range(len(texts))
    texts_alike: dict[str | int, set[int]] = {}
    images_alike: dict[str | int, set[int]] = {}
    for t, (key, owner) in enumerate(zip(keys, owners, strict=True)):
        texts_alike.setdefault(key, set()).add(t)
        images_alike.setdefault(key, set()).add(owner)
    relevant_texts: list[set[int]] = [set() for _ in images]
    for key, owner in zip(keys, owners, strict=True):
        relevant_texts[owner] |= texts_alike[key]
    return {
        "image_to_text": Search(images, texts, relevant_texts),
        "text_to_image": Search(texts, images, [images_alike[key] for key in keys], groups=owners),
    }


def interleaved_retrieval(
    embed: EmbedFunction, stories: Sequence[list[Slice]], ks: Sequence[int] = KS, min_context: int = 2
) -> dict[str, Estimate | int]:
    """
    Recall of the next image of a story, given all of the story before it, among the images of all stories.

    This is how visual stories (VIST) are used to test whether a model makes use of context. For reference each image
    is also searched with the last sentence before it alone: what the full context finds beyond that is what the
    context is good for. The images of the context are among the candidates, except where `unseen` is measured. Images
    with the same pixels are one candidate.

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, such as a [`SugarEmbedder`].
        stories (`Sequence[list[str | PIL.Image.Image]]`):
            Stories as slices in reading order. [`hf_sugar.data.row_slices`] makes one of a row.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs.
        min_context (`int`, *optional*, defaults to `2`):
            Slices that must precede an image for it to be searched. With 1, the first image of a story that begins with
            a sentence is searched as well, and there the two queries are the same.

    Returns:
        `dict[str, Estimate | int]`: `context_recall@k`, `context_unseen_recall@k` and `last_sentence_recall@k` for each
        k, `candidates`, and `duplicate_images`, how many images repeat an earlier one. Images with no sentence before
        them are missing from the reference, as its `n` shows. The intervals resample stories.

    Raises:
        `ValueError`: if `min_context` is below 1, or no image has that much context.
    """
    searches, total = _interleaved_searches(stories, min_context)
    if not searches:
        raise ValueError(
            f"No image of the {len(stories)} stories has {min_context} slices before it. Lower `min_context`, or check "
            "that the stories hold images."
        )
    candidates = len(searches["context"].candidates)
    return {**recall(embed, searches, ks), "candidates": candidates, "duplicate_images": total - candidates}


def _interleaved_searches(stories: Sequence[list[Slice]], min_context: int = 2) -> tuple[dict[str, Search], int]:
    """The searches, if there are any, and the number of images."""
    if min_context < 1:
        raise ValueError(f"`min_context` is {min_context}; a query needs at least 1 slice.")
    numbers: dict[bytes, int] = {}
    images, contexts, sentences = [], [], []
    total = 0
    for s, story in enumerate(stories):
        sentence, seen = None, set()
        for position, part in enumerate(story):
            if isinstance(part, str):
                sentence = part
                continue
            total += 1
            target = numbers.setdefault(_image_key(part), len(numbers))
            if target == len(images):
                images.append(part)
            if position >= min_context:
                contexts.append((story[:position], {target}, s, seen - {target}))
                if sentence is not None:
                    sentences.append((sentence, {target}, s))
            seen = seen | {target}
    searches = {}
    if contexts:
        queries, targets, groups, seen = zip(*contexts, strict=True)
        searches["context"] = Search(queries, images, targets, groups)
        searches["context_unseen"] = Search(queries, images, targets, groups, excluded=seen)
    if sentences:
        queries, targets, groups = zip(*sentences, strict=True)
        searches["last_sentence"] = Search(queries, images, targets, groups)
    return searches, total


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
    blocks = [slice(2 * pair, 2 * pair + 2) for pair in range(pairs)]
    s = np.stack([caption_embeddings[block] @ image_embeddings[block].T for block in blocks])  # [row, caption, image]
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


def _image_key(image: Image.Image | Path) -> bytes:
    image = load_image(image)
    return hashlib.blake2b(image.tobytes(), key=repr(image.size).encode()).digest()
