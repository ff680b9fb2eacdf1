"""Retrieval-augmented answers: the most similar answered questions are put before the question."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..data.rows import row_slices
from .index import SugarIndex


def split_answer(row: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """
    Part a conversation from its last answer.

    Args:
        row (`dict`):
            Row in the conversational vision format.

    Returns:
        `tuple[dict, str | None]`: the row with the messages before the last assistant turn and their images only, and
        the text of that turn. Where there is no assistant turn: the row itself and `None`.
    """
    messages = row["messages"]
    turns = [m for m, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return row, None
    before, answer = messages[: turns[-1]], messages[turns[-1]]["content"]
    images = sum(part["type"] == "image" for message in before for part in message["content"])
    text = " ".join(part["text"] for part in answer if part["type"] == "text")
    return {**row, "messages": before, "images": row["images"][:images]}, text


def question_slices(row: dict[str, Any], where: str = "row") -> list[str | Image.Image]:
    """
    What a conversation is indexed and searched by: the images and texts of its user, without the answers.

    Args:
        row (`dict`):
            Row in the conversational vision format, with or without answers.
        where (`str`, *optional*, defaults to `"row"`):
            What error messages call the row.

    Returns:
        `list[str | PIL.Image.Image]`: slices in reading order, one item for an embedding function.

    Raises:
        `ValueError`: if the images do not fit the user's messages, or as in [`~data.rows.row_slices`].
    """
    questions = [message for message in row["messages"] if message["role"] == "user"]
    return row_slices({"messages": questions, "images": row["images"]}, where)


def rag_messages(
    messages: Sequence[dict[str, Any]], images: Sequence[Any], examples: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Put answered examples before a question, as earlier turns of the same conversation.

    Args:
        messages (`Sequence[dict]`):
            The user's own messages. System messages at their beginning stay in front of everything.
        images (`Sequence`):
            Images of those messages.
        examples (`Sequence[dict]`):
            Found rows with question and answer, in the order they are to be read. Their system messages are left out.

    Returns:
        `tuple[list[dict], list]`: messages and images of the whole conversation.
    """
    start = 0
    while start < len(messages) and messages[start]["role"] == "system":
        start += 1
    turns = [message for example in examples for message in example["messages"] if message["role"] != "system"]
    example_images = [image for example in examples for image in example["images"]]
    return [*messages[:start], *turns, *messages[start:]], [*example_images, *images]


def rag_generator(
    generate: Callable[[Sequence[dict[str, Any]]], list[str]],
    index: SugarIndex,
    embed: Callable[[Sequence[Any]], np.ndarray],
    rows: Sequence[dict[str, Any]],
    k: int = 1,
) -> Callable[[Sequence[dict[str, Any]]], list[str]]:
    """
    Generating function that looks up examples first. It takes the place of `generate` in
    [`hf_sugar.evaluation.exact_match`].

    Args:
        generate (`Callable`):
            Generating function, see [`hf_sugar.evaluation.generator`].
        index ([`SugarIndex`]):
            Index of the questions of `rows`, each item a row's [`question_slices`], in the order of `rows`.
        embed (`Callable`):
            Embedding function of the model the index was built with.
        rows (`Sequence[dict]`):
            The knowledge base: answered questions.
        k (`int`, *optional*, defaults to `1`):
            Examples for each question. The most similar one stands last, next to the question.

    Returns:
        `Callable`: turns a sequence of conversations into the list of answers.
    """

    def generate_with_examples(conversations: Sequence[dict[str, Any]]) -> list[str]:
        return generate([prompt for prompt, _ in _with_examples(index, embed, conversations, rows, k)])

    return generate_with_examples


def answer_with_retrieval(
    generate: Callable[[Sequence[dict[str, Any]]], list[str]],
    index: SugarIndex,
    embed: Callable[[Sequence[Any]], np.ndarray],
    row: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    k: int = 1,
) -> tuple[str, list[Any]]:
    """
    Answer one question with the help of the most similar answered questions.

    If the row ends with an answer already, that is taken off first. A row with the same `id` is never its own example.

    Args:
        generate (`Callable`):
            Generating function, see [`hf_sugar.evaluation.generator`].
        index ([`SugarIndex`]):
            Index of the questions of `rows`, each item a row's [`question_slices`], in the order of `rows`.
        embed (`Callable`):
            Embedding function of the model the index was built with.
        row (`dict`):
            The question, in the conversational vision format.
        rows (`Sequence[dict]`):
            The knowledge base: answered questions.
        k (`int`, *optional*, defaults to `1`):
            Examples. The most similar one stands last, next to the question.

    Returns:
        `tuple[str, list]`: the answer, and for each example, most similar first, its `id`, or its position in `rows` where
        it has none.

    Raises:
        `ValueError`: if index and rows differ in length.
    """
    question = split_answer(row)[0] if row["messages"][-1]["role"] == "assistant" else row
    [(prompt, used)] = _with_examples(index, embed, [question], rows, k)
    return generate([prompt])[0], used


def _with_examples(
    index: SugarIndex,
    embed: Callable[[Sequence[Any]], np.ndarray],
    questions: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    k: int,
) -> list[tuple[dict[str, Any], list[Any]]]:
    if len(index) != len(rows):
        raise ValueError(
            f"The index has {len(index)} items but `rows` has {len(rows)}. Index the questions of these rows."
        )
    result = []
    found = index.search(embed([question_slices(question) for question in questions]), k + 1)
    for question, hits in zip(questions, found, strict=True):
        examples, used = [], []
        for hit in hits:
            if len(examples) == k:
                break
            example = rows[hit.index]
            name = example.get("id")
            if name is None or name != question.get("id"):
                examples.append(example)
                used.append(hit.index if name is None else name)
        messages, images = rag_messages(question["messages"], question["images"], examples[::-1])
        result.append(({**question, "messages": messages, "images": images}, used))
    return result
