"""A second look at what was found: the same weights say how probable a query is after a document, or "yes" against "no"."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value

from ..data.images import stored_image, undecoded
from ..inference import SugarGenerator, require_several
from ..models.rows_sugar import as_row, row_name, row_parts
from .base import Hit
from .mine import question_and_answers


YES, NO = "yes", "no"
RERANK_PROMPT = "Query: {query} Document: {document} Does the document match the query? Answer yes or no."


def rerank_row(
    query: Any, document: Any, prompt: str, answer: str | None = None, name: str = "document"
) -> dict[str, Any]:
    """
    The question whether a document matches a query, with its answer, as a row in the conversational vision format.

    Args:
        query, document: What [`~models.rows_sugar.as_row`] takes. Of a conversation everything is read.
        prompt (`str`): The wording, with `{query}` and `{document}`, as [`SugarConfig`] has it.
        answer (`str`, *optional*): `"yes"` or `"no"`; without one the row is the question alone.
        name (`str`, *optional*, defaults to `"document"`): What errors call the document.
    """
    given = {"{query}": (query, "the query"), "{document}": (document, name)}
    content, images = [], []
    for piece in re.split(r"(\{query\}|\{document\})", prompt):
        parts = [{"type": "text", "text": piece}]
        if piece in given:
            item, called = given[piece]
            parts = row_parts(as_row(item, called), called)
        for part in parts:
            if part["type"] == "image":
                images.append(part["image"])
                content.append({"type": "image", "text": None})
            elif text := part["text"].strip():
                # one part of adjacent texts: some chat templates put nothing between two
                joined = content.pop()["text"] + " " if content and content[-1]["type"] == "text" else ""
                content.append({"type": "text", "text": joined + text})
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages, "images": images, "loss_on": "answers", "structure": False, "id": None}


class SugarReranker:
    """
    Scores (query, document) pairs with the weights of a model: by the likelihood of the query, a text, after the document (the
    geometric mean of the probabilities of its tokens), or, if the model's configuration has a `rerank_prompt`, by the
    probability of "yes" against "no" as the answer to it. A model has to be taught to answer: see [`~retrieval.rerank_rows`].

    Source of the former: query likelihood, [UPR](https://huggingface.co/papers/2204.07496).

    Args:
        model ([`SugarForConditionalGeneration`]), processor ([`SugarProcessor`]):
            What scores. The model is in evaluation mode meanwhile, and in its former mode afterwards.
        batch_size (`int`, *optional*, defaults to `32`): Pairs in one forward pass. Those of similar length share a batch.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, batch_size: int = 32):
        self.generator = SugarGenerator(model, processor, batch_size)

    def rank(self, query: Any, documents: Sequence[Any]) -> list[Hit]:
        """
        All documents, best first.

        Args:
            query: What [`~models.rows_sugar.as_row`] takes.
            documents (`Sequence`): The same of each.

        Returns:
            `list[Hit]`: `index` is the place in `documents`, `score` what [`SugarReranker.score`] gives.

        Raises:
            `TypeError`, `ValueError`: as for [`SugarEmbedder`]; names the query or the document.
        """
        require_several("documents", documents)
        names = [f"document {n}" for n in range(len(documents))]
        scores = self.score([(query, document) for document in documents], names)
        return [Hit(int(n), float(scores[n]), {}) for n in np.argsort(-scores, kind="stable")]

    def score(self, pairs: Sequence[tuple[Any, Any]], names: Sequence[str] | None = None) -> np.ndarray:
        """Scores of (query, document) pairs, from 0 to 1, float32 of shape `(pairs,)`. Errors call the documents `names`; without a
        `rerank_prompt` a query with an image is a `ValueError`."""
        names = names or [f"document {n}" for n in range(len(pairs))]
        prompt = self.generator.model.config.rerank_prompt
        if prompt is None:
            rows = [_document_and_query(*pair, name) for pair, name in zip(pairs, names, strict=True)]
            return self.generator.likelihood(rows, names)
        rows = [rerank_row(*pair, prompt, name=name) for pair, name in zip(pairs, names, strict=True)]
        return self.generator.choose(rows, YES, NO, names)


def _document_and_query(query: Any, document: Any, name: str) -> dict[str, Any]:
    asked = row_parts(as_row(query, "the query"), "the query")
    if any(part["type"] == "image" for part in asked):
        raise ValueError(
            "the query has an image, which has no likelihood. Ask in words, do not rerank, or use a model that was taught to "
            "(one with a `rerank_prompt`)."
        )
    parts = [
        *row_parts(as_row(document, name), name),
        {"type": "text", "text": " ".join(part["text"] for part in asked)},
    ]
    images = [part["image"] for part in parts if part["type"] == "image"]
    content = [{"type": part["type"], "text": part.get("text")} for part in parts]
    return {"messages": [{"role": "user", "content": content}], "images": images}


def rerank_rows(dataset: Dataset, prompt: str = RERANK_PROMPT, num_negatives: int = 1) -> Dataset:
    """
    Rows that teach a model to rerank, by the ordinary generative loss alone (`structure` is false): for every right answer
    of a row the question whether it matches, answered with "yes", and for its first negatives the same with "no".

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with a column `negatives`, such as [`~retrieval.mine_negatives`] gives: image-caption rows, or rows with
            `positives`. Of every second image-caption row the caption is the query and the image the document.
        prompt (`str`, *optional*): The wording, which the model's configuration has to have as `rerank_prompt`.
        num_negatives (`int`, *optional*, defaults to `1`): Most negatives for each right answer.

    Raises:
        `ValueError`: if the dataset has no `negatives`, or a row cannot be used (names it).
    """
    if "negatives" not in dataset.column_names:
        raise ValueError("The dataset has no column `negatives`. Mine them first: `hf-sugar mine`.")
    content = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    features = Features(messages=List(content), images=List(Image()), loss_on=Value("string"))
    features |= Features(structure=Value("bool"), id=Value("string"))

    def made(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        result = []
        for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
            row = dict(zip(batch, values, strict=True))
            name = row_name(row, number)
            question, right = question_and_answers(row, name)
            wrong = [item if isinstance(item, str) else stored_image(item, name) for item in row["negatives"] or []]
            wrong = wrong[: num_negatives * len(right)]
            for n, item in enumerate([*right, *wrong]):
                pair = [[p if isinstance(p, str) else {"type": "image", "image": p} for p in question], item]
                pair[1] = item if isinstance(item, str) else {"type": "image", "image": item}
                if number % 2 and not row.get("positives"):
                    pair.reverse()
                answer = YES if n < len(right) else NO
                result.append({**rerank_row(*pair, prompt, answer, name), "id": f"{row.get('id') or number}:{n}"})
        return {column: [row[column] for row in result] for column in features}

    settings = {"batched": True, "batch_size": 256, "with_indices": True, "remove_columns": dataset.column_names}
    return undecoded(dataset).map(made, features=features, desc="rows to rerank", **settings)
