"""Retrieval-augmented answers: the most similar answered questions are put before the question."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data import row_slices
from ..inference import SugarGenerator, require_sizes
from ..models.rows_sugar import as_row, fill_images
from .base import Hit, Index


def split_answer(row: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The conversation before its last assistant turn, with the images of that part, and the text of that turn; the row
    itself and `None` where there is none."""
    messages = row["messages"]
    turns = [m for m, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return row, None
    before, answer = messages[: turns[-1]], messages[turns[-1]]["content"]
    images = sum(part["type"] == "image" for message in before for part in message["content"])
    text = " ".join(part["text"] for part in answer if part["type"] == "text")
    return {**row, "messages": before, "images": row["images"][:images]}, text


def question_slices(row: dict[str, Any], where: str = "row") -> list[str | Image.Image]:
    """What a conversation is indexed and searched by: the images and texts of its user, without the answers, as slices in
    reading order. Errors call it `where`."""
    questions = [message for message in row["messages"] if message["role"] == "user"]
    return row_slices({"messages": questions, "images": row["images"]}, where)


def rag_messages(
    messages: Sequence[dict[str, Any]], images: Sequence[Any], examples: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages and images of a conversation with answered examples before it, as earlier turns, in the order given. System
    messages at the beginning of the conversation stay in front of everything; those of the examples are left out."""
    # a text as content has its images in front, which is only known within its own row
    asked = fill_images(messages, images, "question")
    turns = [
        message
        for example in examples
        for message in fill_images(example["messages"], example["images"], "example")
        if message["role"] != "system"
    ]
    start = next((m for m, message in enumerate(asked) if message["role"] != "system"), len(asked))
    return [*asked[:start], *turns, *asked[start:]], [*(i for e in examples for i in e["images"]), *images]


def find_examples(
    index: Index, questions: Sequence[dict[str, Any]], k: int, rerank: int | None = None
) -> list[list[Hit]]:
    """The answered questions of an index (built by `"question"`, with its embedding function) that are most similar to each
    row of `questions`: at most `k`, most similar first, of the `rerank` first hits as in [`~retrieval.base.Index.search`]. A
    row with an `id` is never its own example: documents that ask the same about the same pictures are left out, whatever
    their id."""

    def search(queries: list[Any], wanted: int) -> list[list[Hit]]:
        return index.search(queries, wanted, rerank=rerank and max(rerank, wanted))

    queries = [question_slices(question) for question in questions]
    result = []
    for question, query, hits in zip(questions, queries, search(queries, k + 1), strict=True):
        wanted = k + 1
        while True:
            documents: dict[int, Hit] = {}  # an index of every slice may find one at several places
            for hit in hits:
                if question.get("id") is None or not _asks(index.documents[hit.index], query):
                    documents.setdefault(hit.index, hit)
            if len(documents) >= k or len(hits) < wanted:
                break
            wanted *= 4
            [hits] = search([query], wanted)
        result.append(list(documents.values())[:k])
    return result


def _asks(row: dict[str, Any], query: list[str | Image.Image]) -> bool:
    """Whether a row asks the same, in texts and pixels."""
    found = question_slices(row, "document")
    return len(found) == len(query) and all(map(np.array_equal, found, query))


def rag_generator(
    generate: Callable[[Sequence[dict[str, Any]]], list[str]], index: Index, k: int = 1, rerank: int | None = None
) -> Callable[[Sequence[dict[str, Any]]], list[str]]:
    """A generating function such as a [`SugarGenerator`] that first looks up `k` examples as [`find_examples`] does, the
    most similar one next to the question; to take the place of `generate` in [`hf_sugar.evaluation.exact_match`]."""

    def generate_with_examples(conversations: Sequence[dict[str, Any]]) -> list[str]:
        prompts = []
        for row, hits in zip(conversations, find_examples(index, conversations, k, rerank), strict=True):
            examples = [index.documents[hit.index] for hit in reversed(hits)]
            messages, images = rag_messages(row["messages"], row["images"], examples)
            prompts.append({**row, "messages": messages, "images": images})
        return generate(prompts)

    return generate_with_examples


@dataclass(frozen=True)
class RAGPrompt:
    """The conversation that is answered (`messages` and `images`), the documents that were put before the question, most
    similar first (`citations`), those that had no room (`dropped`), and a `note` that says so to the user."""

    messages: list[dict[str, Any]]
    images: list[Any]
    citations: list[Hit]
    dropped: list[Hit]
    note: str | None = None


class SugarRAG:
    """
    Answers of one model with the help of what the same model finds in an index of answered questions.

    Questions are searched among questions; the found image, question and answer are put before the user's question, the
    most similar one last. Where that is more than the context holds, the farthest examples are left out. The pass that
    embeds the question cannot be reused for the answer: by causal attention every hidden state depends on the examples.

    Args:
        model ([`SugarForConditionalGeneration`]), processor ([`SugarProcessor`]): What answers.
        index ([`SugarIndex`] or [`LanceIndex`], *optional*):
            Index of rows, built by `"question"` (or `"auto"`) with this model. Without one the model answers alone.
        k (`int`, *optional*, defaults to `1`): Examples for a question.
        max_new_tokens (`int`, *optional*, defaults to `256`): Longest answer; the context has to hold it as well.
        max_length (`int`, *optional*): Tokens of the context. By default what the model's configuration allows.
        rerank (`int`, *optional*): How many hits the model looks at again to choose them, see [`SugarReranker`].
        generation_kwargs: Passed on to `model.generate`. Decoding is greedy unless `do_sample` says otherwise.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        index: Index | None = None,
        k: int = 1,
        max_new_tokens: int = 256,
        max_length: int | None = None,
        rerank: int | None = None,
        **generation_kwargs: Any,
    ):
        require_sizes(k=k, max_new_tokens=max_new_tokens, max_length=max_length)
        if rerank is not None and rerank < k:
            raise ValueError(f"`rerank` is {rerank} and `k` {k}: look again at no fewer hits than you ask for.")
        self.generator = SugarGenerator(model, processor)
        self.index, self.k, self.rerank = index, k, rerank
        self.max_length = max_length or self.generator.max_length
        self.generation_kwargs = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation_kwargs}

    def prompt(self, question: Any) -> RAGPrompt:
        """
        Search, and put what was found before the question: what [`~models.rows_sugar.as_row`] takes. A row ends with the user's
        turn; one with an `id` is never its own example, see [`~retrieval.rag.find_examples`].

        Raises:
            `ValueError`: if the question alone is too long or damaged, the last turn is not the user's, or the index
                holds no rows.
        """
        question = as_row(question, "question")
        last = question["messages"][-1]["role"]
        if last != "user":
            raise ValueError(f"The last turn of the question is the {last}'s; there is nothing to answer.")
        [hits] = [[]] if self.index is None else find_examples(self.index, [question], self.k, self.rerank)
        new_tokens = self.generation_kwargs["max_new_tokens"]
        for used in range(len(hits), -1, -1):
            rows = [self.index.documents[hit.index] for hit in hits[:used]]
            messages, images = rag_messages(question["messages"], question["images"], rows[::-1])
            inputs = self.generator.inputs([{"messages": messages, "images": images}], ["The question"])
            length = inputs["input_ids"].shape[1]
            if length <= self.max_length - new_tokens:
                note = None
                if used < len(hits):
                    note = (
                        f"{len(hits) - used} of {len(hits)} examples left out, farthest first: the context holds "
                        f"{self.max_length} tokens, {new_tokens} of them for the answer."
                    )
                return RAGPrompt(messages, images, hits[:used], hits[used:], note)
        raise ValueError(
            f"The question has {length} tokens and the answer may have {new_tokens}, but the context holds {self.max_length}."
        )

    def answer(self, question: Any) -> str:
        """The whole of [`~SugarRAG.stream`]."""
        return "".join(self.stream(question)).strip()

    def stream(self, question: Any) -> Iterator[str]:
        """Answer one question piece by piece; to know the citations, give it what [`~SugarRAG.prompt`] returned.
        Generation ends when the iterator is closed."""
        prompt = question if isinstance(question, RAGPrompt) else self.prompt(question)
        row = {"messages": prompt.messages, "images": prompt.images}
        yield from self.generator.stream(row, **self.generation_kwargs)
