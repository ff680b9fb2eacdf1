"""Evaluation tasks as functions of an embedding or a generating function. Without one they give what chance gives."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image

from ..data import load_data, load_table
from ..data.checks import readable_rows
from ..data.images import answers_to_image, load_image, row_slices, undecoded
from ..inference import in_role
from ..models.rows_sugar import conversation_row, row_name
from ..retrieval.rag import split_answer
from ..settings import setting
from .metrics import Estimate, recall_at_k


Slice = str | Image.Image | Path
Item = Slice | list[Slice]
EmbedFunction = Callable[[Sequence[Item]], np.ndarray]
GenerateFunction = Callable[[Sequence[dict[str, Any]]], list[str]]
Run = Callable[[EmbedFunction | None, GenerateFunction | None], dict[str, Any]]

KS = (1, 5, 10)
CHUNK = 1024  # rows or queries at a time, where all would not fit in memory
# Of four independent scores, in percent: each of the two comparisons is won by half, and of the 24 orders of the four
# scores 4 have both matching pairs above both others.
WINOGROUND_CHANCE = {"text_score": 25.0, "image_score": 25.0, "group_score": 100 / 6}


@dataclass
class EvaluationData:
    """Which data each task is run on. Every field is a source as [`hf_sugar.data.load_data`] takes it, or a mapping of
    names to sources, each measured apart."""

    image_text_data: list[str] | None = setting(
        "Rows with one image and an answer or caption: retrieval both ways.", None
    )
    interleaved_data: list[str] | None = setting(
        "Documents: retrieval of the next image given what precedes it.", None
    )
    generation_data: list[str] | None = setting("Conversations: exact match of the last answer.", None)
    winoground_data: list[str] | None = setting("Dataset with image_0, image_1, caption_0, caption_1.", None)

    def any(self) -> bool:
        return any(vars(self).values())


class Task(NamedTuple):
    """What [`load_tasks`] makes of a source; `prefix` stands before the names of the results of `run`."""

    field: str
    prefix: str
    run: Run
    notes: list[str]


def named_sources(sources: Any) -> dict[str, Any]:
    """The sources of a field of [`EvaluationData`] by name; a source without one is named `""`. A mapping may be the one entry of
    a list, as the command line has it."""
    if isinstance(sources, list) and len(sources) == 1 and isinstance(sources[0], dict):
        [sources] = sources
    if isinstance(sources, dict) and "path" not in sources:
        return sources
    return {"": sources} if sources else {}


def load_tasks(data: EvaluationData, split: str = "test", on_bad_row: str = "error") -> list[Task]:
    """Read and check the data of every task, for which no model is needed. `on_bad_row="skip"` leaves malformed rows and
    those with unreadable images out and says how many. Raises as [`hf_sugar.data.load_data`], and a `ValueError` if no row
    of a source fits its task."""
    tasks = []
    for name, prepare in _TASKS.items():
        for label, source in named_sources(getattr(data, name)).items():
            notes: list[str] = []
            bad: list[Any] = []
            if name == "winoground_data":
                rows, check = load_pairs(source, split), _pair_images
            else:
                rows, check = load_data(source, split, on_bad_row=on_bad_row, bad_rows=bad), row_slices
            if on_bad_row == "skip":
                counts: Counter = Counter()
                rows = readable_rows(rows, counts, check)
                if left_out := len(bad) + counts["skipped"]:
                    total = len(bad) + counts["rows"]
                    notes.append(f"{left_out} of {total} rows cannot be read and are left out.")
            run = prepare(undecoded(rows), notes)
            where = f"{name} {label}".strip()
            tasks.append(Task(name, label and f"{label}/", run, [f"{where}: {note}" for note in notes]))
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
        data, split, on_bad_row: As in [`load_tasks`], which also says what is refused.
        embed (`Callable`): Embedding function, such as a [`SugarEmbedder`].
        generate (`Callable`, *optional*): Generating function, such as a [`SugarGenerator`]; without, nothing is generated.

    Returns:
        `dict[str, Any]`: results of all tasks ([`Estimate`] or `int`); a name given to a source stands before those of
        its results. `"notes"`, if there, is a list of what rows were left out, and why.
    """
    if generate is None:
        data = EvaluationData(data.image_text_data, data.interleaved_data, None, data.winoground_data)
    return run_tasks(load_tasks(data, split, on_bad_row), embed, generate)


def run_tasks(tasks: Sequence[Task], embed: EmbedFunction | None, generate: GenerateFunction | None) -> dict[str, Any]:
    """Results of what [`load_tasks`] returned, as [`evaluate_tasks`] returns them."""
    results = {f"{task.prefix}{name}": v for task in tasks for name, v in task.run(embed, generate).items()}
    notes = [note for task in tasks for note in task.notes]
    return {**results, "notes": notes} if notes else results


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
    """Images, decoded when they are asked for, and the text that belongs to each: the caption of a document of one image, or
    the first answer of a conversation that begins with its only image. `notes` gets what is to be said of rows that have no
    such pair, or more answers; a `ValueError` if none has one."""
    rows = undecoded(rows)
    indices, pairs, several = [], [], 0
    for index, row in enumerate(rows):
        if texts := answers_to_image(row):
            several += len(texts) > 1
            indices.append(index)
            pairs.append(texts[0])
    if not indices:
        raise ValueError(f"None of the {len(rows)} rows has one image at its beginning and an answer or caption.")
    left_out, of_all = len(rows) - len(indices), f"of {len(rows)} rows"
    if several and notes is not None:
        notes.append(f"{several} {of_all} have more than one answer; the first one is taken.")
    if left_out and notes is not None:
        notes.append(f"{left_out} {of_all} do not have one image with an answer or a caption and are left out.")
    return _Images(rows, indices), pairs


def _image_text_task(rows: Dataset, notes: list[str]) -> Run:
    images, texts = image_text_pairs(rows, notes)
    return lambda embed, generate: {**image_text_retrieval(embed, images, texts), "pairs": len(texts)}


def _interleaved_task(rows: Dataset, notes: list[str]) -> Run:
    stories = [row_slices(row, row_name(row, index)) for index, row in enumerate(rows)]
    short = sum(all(isinstance(part, str) for part in story[2:]) for story in stories)
    if short:
        notes.append(f"{short} of {len(stories)} documents have no image after two other slices: not searched for.")
    return lambda embed, generate: interleaved_retrieval(embed, stories)


def _generation_task(rows: Dataset, notes: list[str]) -> Run:
    answers = [sum(message["role"] == "assistant" for message in messages) for messages in rows["messages"]]
    answered = [n for n, count in enumerate(answers) if count]
    if not answered:
        raise ValueError(f"None of the {len(rows)} rows has an answer to compare with.")
    if len(answered) < len(rows):
        notes.append(f"{len(rows) - len(answered)} of {len(rows)} rows have no answer and are left out.")
    if max(answers) > 1:
        several = sum(count > 1 for count in answers)
        notes.append(f"{several} of {len(answered)} rows have more than one answer; the last one is compared.")
    rows = rows.select(answered)
    return lambda embed, generate: {"exact_match": exact_match(generate, rows)["exact_match"]} if generate else {}


_TASKS = {
    "image_text_data": _image_text_task,
    "interleaved_data": _interleaved_task,
    "winoground_data": lambda rows, notes: lambda embed, generate: winoground(embed, rows),
    "generation_data": _generation_task,
}


def load_pairs(source: Any, split: str = "test") -> Dataset:
    """A dataset with the columns of Winoground, of a source as [`hf_sugar.data.load_table`] takes it."""
    if isinstance(source, list):  # of the command line
        if len(source) > 1:
            raise ValueError(f"`winoground_data` takes one source, got {len(source)}.")
        [source] = source
    rows = load_table(source, split)
    if missing := {"image_0", "image_1", "caption_0", "caption_1"} - set(rows.column_names):
        there = ", ".join(rows.column_names)
        raise ValueError(f"The dataset has no column {', '.join(sorted(missing))}, but {there}. Rename them.")
    return rows


class Search(NamedTuple):
    """Queries over one list of candidates: those in `relevant` are right for a query, those in `excluded` are no
    candidates of it. Intervals resample `groups` of queries."""

    queries: Sequence[Item]
    candidates: Sequence[Item]
    relevant: Sequence[set[int]]
    groups: Sequence[int] | None = None
    excluded: Sequence[set[int]] | None = None


def recall(embed: EmbedFunction | None, searches: dict[str, Search], ks: Sequence[int] = KS) -> dict[str, Any]:
    """`<name>_recall@<k>` of each search: an [`Estimate`], or without `embed` that of candidates in random order."""
    as_query, as_candidate = (in_role(embed, role) for role in ("query", "document"))
    embedded = {}  # lists are shared by searches
    for search in searches.values() if embed is not None else ():
        for how, items in ((as_candidate, search.candidates), (as_query, search.queries)):
            if (how, id(items)) not in embedded:
                embedded[how, id(items)] = how(items)
    results = {}
    for name, search in searches.items():
        excluded = search.excluded or [set()] * len(search.queries)
        if embed is None:
            sizes = [len(search.candidates) - len(out) for out in excluded]
            for k in ks:
                missed = map(_chance_to_miss, search.relevant, sizes, [k] * len(sizes))
                results[f"{name}_recall@{k}"] = 100 - 100 * float(np.mean([*missed]))
            continue
        queries, candidates = embedded[as_query, id(search.queries)], embedded[as_candidate, id(search.candidates)]
        found = []
        for start in range(0, len(search.queries), CHUNK):
            block = slice(start, start + CHUNK)
            scores = queries[block] @ candidates.T
            for row, out in zip(scores, excluded[block], strict=True):
                row[list(out)] = -np.inf
            found.append(recall_at_k(scores, search.relevant[block], ks))
        for k in ks:
            results[f"{name}_recall@{k}"] = Estimate.from_hits(
                np.concatenate([hits[k] for hits in found]), search.groups
            )
    return results


def _chance_to_miss(relevant: set[int], candidates: int, k: int) -> float:
    draws = min(k, candidates)
    return math.comb(candidates - len(relevant), draws) / math.comb(candidates, draws)


def image_text_retrieval(
    embed: EmbedFunction | None,
    images: Sequence[Image.Image],
    captions: Sequence[str] | Sequence[list[str]],
    ks: Sequence[int] = KS,
    match_copies: bool = True,
) -> dict[str, Estimate | int]:
    """
    Recall of captions given images and of images given captions, over all images and all captions.

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, such as a
            [`SugarEmbedder`]. `None` gives the recall of candidates in random order.
        images (`Sequence[PIL.Image.Image]`), captions (`Sequence[str]` or `Sequence[list[str]]`):
            Images, which may be decoded lazily, and the caption or captions of each; `ValueError` for other numbers.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs.
        match_copies (`bool`, *optional*, defaults to `True`):
            Whether captions that read the same count as one, which belongs to all of their images. The published
            benchmarks do not allow for that: with `False` every caption belongs to its own image only.

    Returns:
        `dict[str, Estimate | int]`: `image_to_text_recall@k` and `text_to_image_recall@k` for each k, and
        `duplicate_captions`, how many captions repeat an earlier one. The intervals of captions resample images.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions; `captions[i]` belongs to `images[i]`.")
    captions = [[caption] if isinstance(caption, str) else caption for caption in captions]
    texts = [text for several in captions for text in several]
    owners = [i for i, several in enumerate(captions) for _ in several]
    keys = captions if match_copies else [[(i, n) for n in range(len(each))] for i, each in enumerate(captions)]
    texts_of, images_of = defaultdict(set), defaultdict(set)
    for text, (image, key) in enumerate((i, key) for i, several in enumerate(keys) for key in several):
        texts_of[key].add(text)
        images_of[key].add(image)
    relevant_texts = [set().union(*(texts_of[key] for key in several)) for several in keys]
    relevant_images = [images_of[key] for several in keys for key in several]
    searches = {
        "image_to_text": Search(images, texts, relevant_texts),
        "text_to_image": Search(texts, images, relevant_images, owners),
    }
    return {**recall(embed, searches, ks), "duplicate_captions": len(texts) - len(set(texts))}


def interleaved_retrieval(
    embed: EmbedFunction | None, stories: Sequence[list[Slice]], ks: Sequence[int] = KS
) -> dict[str, Estimate | int]:
    """
    Recall of the next image of a story, given all of the story before it (at least two slices), among the images of all
    stories. For reference each image is also searched with the last sentence before it alone. Images with the same pixels
    are one candidate.

    Args:
        embed (`Callable`), ks (`Sequence[int]`): As in [`image_text_retrieval`].
        stories (`Sequence[list[str | PIL.Image.Image]]`):
            Slices in reading order, see [`hf_sugar.data.row_slices`]. `ValueError` if no image has that much before it.

    Returns:
        `dict[str, Estimate | int]`: for each k `context_recall@k`, `context_unseen_recall@k` (the images of the context are
        no candidates) and `last_sentence_recall@k` (of images with a sentence before them); `candidates`; and
        `duplicate_images`, how many images repeat an earlier one. The intervals resample stories.
    """
    numbers: dict[bytes, int] = {}
    images, contexts, sentences = [], [], []
    for s, story in enumerate(stories):
        sentence, seen = None, set()
        for position, part in enumerate(story):
            if isinstance(part, str):
                sentence = part
                continue
            image = load_image(part)
            key = hashlib.blake2b(image.tobytes(), key=repr(image.size).encode()).digest()
            target = numbers.setdefault(key, len(numbers))
            if target == len(images):
                images.append(part)
            if position >= 2:
                contexts.append((story[:position], {target}, s, seen - {target}))
                if sentence is not None:
                    sentences.append((sentence, {target}, s))
            seen = seen | {target}
    if not contexts:
        raise ValueError(f"No image of the {len(stories)} stories has two slices before it. Do they hold images?")
    queries, targets, groups, seen = zip(*contexts, strict=True)
    searches = {"context": Search(queries, images, targets, groups)}
    searches["context_unseen"] = searches["context"]._replace(excluded=seen)
    if sentences:
        queries, targets, groups = zip(*sentences, strict=True)
        searches["last_sentence"] = Search(queries, images, targets, groups)
    copies = sum(not isinstance(part, str) for story in stories for part in story) - len(images)
    return {**recall(embed, searches, ks), "candidates": len(images), "duplicate_images": copies}


def winoground(embed: EmbedFunction | None, rows: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """
    `text_score`, `image_score` and `group_score` of pairs of captions with the same words and their two images.

    A row counts for the text score if each image prefers its own caption, for the image score if each caption prefers its
    own image, and for the group score if both hold. Equal scores do not count. Source:
    [Winoground](https://huggingface.co/papers/2204.03162).

    Args:
        embed (`Callable`): As in [`image_text_retrieval`]; `None` gives [`WINOGROUND_CHANCE`].
        rows (`Sequence[dict]`): Rows with `image_0`, `image_1`, `caption_0` and `caption_1`.
    """
    if embed is None:
        return WINOGROUND_CHANCE
    captions, images = [], []
    for n, row in enumerate(rows):
        captions += [row["caption_0"], row["caption_1"]]
        images += _pair_images(row, f"row {n}")
    of_captions, of_images = in_role(embed, "query")(captions), in_role(embed, "document")(images)
    pairs = [slice(start, start + 2) for start in range(0, len(images), 2)]
    s = np.stack([of_captions[pair] @ of_images[pair].T for pair in pairs])  # row, caption, image
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    hits = {"text_score": text, "image_score": image, "group_score": text & image}
    return {name: Estimate.from_hits(each) for name, each in hits.items()}


def _pair_images(row: dict[str, Any], where: str) -> list[Image.Image]:
    return [load_image(row[name], f"{where}, {name}") for name in ("image_0", "image_1")]


def exact_match(generate: GenerateFunction, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Share of rows whose last answer is generated word for word, upper case and runs of white space aside.

    Args:
        generate (`Callable`): Answers conversations that end with the user's turn, such as a [`SugarGenerator`].
        rows (`Sequence[dict]`):
            Rows in the conversational vision format. The prompt is what precedes the last assistant turn; a row without
            one is a `ValueError`.

    Returns:
        `dict[str, Any]`: `exact_match`, an [`Estimate`], and `misses`, a list of `{"index", "row", "expected",
        "generated"}` of the rows answered otherwise, where `row` is position and id.
    """
    hits, misses = [], []
    for start in range(0, len(rows), CHUNK):
        chunk = [rows[index] for index in range(start, min(start + CHUNK, len(rows)))]
        names = [row_name(row, index) for index, row in enumerate(chunk, start)]
        prompts, answers = zip(*map(split_answer, chunk), strict=True)
        if None in answers:
            name = names[answers.index(None)]
            raise ValueError(f"{name} has no assistant turn to compare with. Drop it, or add the answer.")
        for name, expected, generated in zip(names, answers, generate(prompts), strict=True):
            hits.append(expected.lower().split() == generated.lower().split())
            if not hits[-1]:
                index = len(hits) - 1
                misses.append({"index": index, "row": name, "expected": expected, "generated": generated})
    return {"exact_match": Estimate.from_hits(hits), "misses": misses}
