"""Evaluation tasks as functions of an embedding or a generating function."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.rows import load_image, row_name
from ..inference import SugarEmbedder, SugarGenerator
from ..retrieval.rag import split_answer
from .metrics import Figure, recall_at_k


Slice = str | Image.Image | Path
Item = Slice | list[Slice]
EmbedFunction = Callable[[Sequence[Item]], np.ndarray]
GenerateFunction = Callable[[Sequence[dict[str, Any]]], list[str]]

# Of four independent scores, in percent: each of the two comparisons is won by half, and of the 24 orders of the four
# scores 4 have both matching pairs above both others.
WINOGROUND_CHANCE = {"text_score": 25.0, "image_score": 25.0, "group_score": 100 / 6}


def image_text_retrieval(
    embed: EmbedFunction,
    images: Sequence[Image.Image],
    captions: Sequence[str] | Sequence[list[str]],
    ks: Sequence[int] = (1, 5, 10),
    match_copies: bool = True,
) -> dict[str, Figure | int]:
    """
    Recall of captions given images and of images given captions, over all images and all captions.

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, see [`SugarEmbedder`].
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
        `dict[str, Figure | int]`: `image_to_text_recall@k` and `text_to_image_recall@k` for each k, and
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
        **{f"image_to_text_recall@{k}": Figure.from_hits(found_texts[k]) for k in ks},
        **{f"text_to_image_recall@{k}": Figure.from_hits(found_images[k], groups=owners) for k in ks},
        "duplicate_captions": len(texts) - len(set(texts)),
    }


def interleaved_retrieval(
    embed: EmbedFunction, stories: Sequence[list[Slice]], ks: Sequence[int] = (1, 5, 10), min_context: int = 2
) -> dict[str, Figure | int]:
    """
    Recall of the next image of a story, given all of the story before it, among the images of all stories.

    This is how visual stories (VIST) are used to test whether a model makes use of context. For reference each image
    is also searched with the last sentence before it alone: what the full context finds beyond that is what the
    context is good for. The images of the context are among the candidates. Images with the same pixels are one
    candidate.

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, see [`SugarEmbedder`].
        stories (`Sequence[list[str | PIL.Image.Image]]`):
            Stories as slices in reading order. [`hf_sugar.data.rows.row_slices`] makes one of a row.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`):
            Cut-offs.
        min_context (`int`, *optional*, defaults to `2`):
            Slices that must precede an image for it to be searched. With 1, the first image of a story that begins with
            a sentence is searched as well, and there the two queries are the same.

    Returns:
        `dict[str, Figure | int]`: `context_recall@k` and `last_sentence_recall@k` for each k, `candidates`, and
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
    results: dict[str, Figure | int] = {}
    for name, queries in (("context", contexts), ("last_sentence", sentences)):
        if queries:
            items, targets, groups = zip(*queries, strict=True)
            hits = _recall(embed(list(items)), image_embeddings, targets, ks)
            results |= {f"{name}_recall@{k}": Figure.from_hits(hits[k], groups=groups) for k in ks}
    return {**results, "candidates": len(images), "duplicate_images": total - len(images)}


def winoground(embed: EmbedFunction, rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """
    Text, image and group score of pairs of captions with the same words and their two images.

    With `s(c, i)` the cosine of caption c and image i, a row counts for the text score if each image prefers its own
    caption (`s(c0, i0) > s(c1, i0)` and `s(c1, i1) > s(c0, i1)`), for the image score if each caption prefers its own
    image (`s(c0, i0) > s(c0, i1)` and `s(c1, i1) > s(c1, i0)`), and for the group score if both hold. Equal scores do
    not count. [`WINOGROUND_CHANCE`] has what random scores reach: 25, 25 and 16.7. Source: [Winoground: Probing Vision
    and Language Models for Visio-Linguistic Compositionality](https://huggingface.co/papers/2204.03162).

    Args:
        embed (`Callable`):
            Turns a list of items into L2-normalised float32 embeddings of shape `(items, dim)`, see [`SugarEmbedder`].
        rows (`Sequence[dict]`):
            Rows with `image_0`, `image_1`, `caption_0` and `caption_1`, as in the published dataset.

    Returns:
        `dict[str, Figure]`: `text_score`, `image_score` and `group_score`.
    """
    captions, images = [], []
    for row in rows:
        captions += [row["caption_0"], row["caption_1"]]
        images += [row["image_0"], row["image_1"]]
    caption_embeddings, image_embeddings = embed(captions), embed(images)
    pairs = len(images) // 2
    # s[row, caption, image]
    s = np.einsum("rcd,rid->rci", caption_embeddings.reshape(pairs, 2, -1), image_embeddings.reshape(pairs, 2, -1))
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    return {
        "text_score": Figure.from_hits(text),
        "image_score": Figure.from_hits(image),
        "group_score": Figure.from_hits(text & image),
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
            see [`SugarGenerator`].
        rows (`Sequence[dict]`):
            Rows in the conversational vision format. The prompt is what precedes the last assistant turn, with its
            images.
        normalise (`Callable`, *optional*, defaults to [`~evaluation.tasks.normalise_answer`]):
            Applied to both the expected and the generated answer before they are compared.
        chunk_size (`int`, *optional*, defaults to `1024`):
            Rows handed to `generate` at a time: this many have their images in memory.

    Returns:
        `dict[str, Any]`: `exact_match`, a [`Figure`], and `misses`, a list of `{"row", "expected", "generated"}` of the
        rows answered otherwise, where `row` is position and id.

    Raises:
        `ValueError`: if a row has no assistant turn.
    """
    hits, misses = [], []
    for start in range(0, len(rows), chunk_size):
        names, prompts, answers = [], [], []
        for index in range(start, min(start + chunk_size, len(rows))):
            row = rows[index]
            names.append(row_name(row, index))
            prompt, answer = split_answer(row)
            if answer is None:
                raise ValueError(f"{names[-1]} has no assistant turn to compare with. Drop it, or add the answer.")
            prompts.append(prompt)
            answers.append(answer)
        for name, expected, generated in zip(names, answers, generate(prompts), strict=True):
            hits.append(normalise(expected) == normalise(generated))
            if not hits[-1]:
                misses.append({"row": name, "expected": expected, "generated": generated})
    return {"exact_match": Figure.from_hits(hits), "misses": misses}


def embedder(model: torch.nn.Module, processor: Any, *args: Any, **kwargs: Any) -> SugarEmbedder:
    """Former name of [`SugarEmbedder`]."""
    return SugarEmbedder(model, processor, *args, **kwargs)


def generator(model: torch.nn.Module, processor: Any, *args: Any, **kwargs: Any) -> SugarGenerator:
    """Former name of [`SugarGenerator`]."""
    return SugarGenerator(model, processor, *args, **kwargs)


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
