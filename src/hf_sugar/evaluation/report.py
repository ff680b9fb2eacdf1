"""All tasks on a model, and the report of one or several runs: JSON, Markdown and plots."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..alignment import expected_alignment, label_matrix
from ..data.readers import load_data, load_table
from ..data.rows import answer_to_image, load_image, row_name, row_slices
from ..retrieval.index import SugarIndex
from .metrics import BOOTSTRAP, report_table, to_dict
from .plots import plot_alignment, plot_gallery, plot_losses, plot_similarities
from .tasks import (
    EmbedFunction,
    GenerateFunction,
    exact_match,
    image_text_retrieval,
    interleaved_retrieval,
    winoground,
)


@dataclass
class EvaluationData:
    """
    Which data each task is run on. Every field is a source as [`hf_sugar.data.load_data`] takes it, or a mapping of
    names to sources, each measured apart.

    Parameters:
        image_text_data (source or `dict`, *optional*):
            Rows with one image and one answer or caption, for retrieval both ways.
        interleaved_data (source or `dict`, *optional*):
            Documents, for retrieval of the next image given what precedes it.
        generation_data (source or `dict`, *optional*):
            Conversations, for the exact match of the last answer.
        winoground_data (source or `dict`, *optional*):
            Dataset with `image_0`, `image_1`, `caption_0` and `caption_1`.
    """

    image_text_data: list[str] | None = field(
        default=None, metadata={"help": "Rows with one image and one answer or caption: retrieval both ways."}
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
        return any([self.image_text_data, self.interleaved_data, self.generation_data, self.winoground_data])


def _sources(value: Any) -> dict[str, Any]:
    """Sources by the prefix of the names of their results."""
    if value is None:
        return {}
    if isinstance(value, dict) and "path" not in value:
        return {f"{name}/": source for name, source in value.items()}
    return {"": value}


def image_text_pairs(dataset: Dataset) -> tuple[list, list[str]]:
    """
    Images and the texts that belong to them.

    Args:
        dataset ([`datasets.Dataset`]):
            Rows in the conversational vision format. Those that do not have exactly one image and one answer or caption
            are left out.

    Returns:
        `tuple[list, list[str]]`: images and texts of the same length.
    """
    images, texts = [], []
    for index, row in enumerate(dataset):
        text = answer_to_image(row)
        if text is not None:
            images.append(load_image(row["images"][0], row_name(row, index)))
            texts.append(text)
    return images, texts


def evaluate_tasks(
    data: EvaluationData, embed: EmbedFunction, generate: GenerateFunction | None = None, split: str = "test"
) -> dict[str, Any]:
    """
    Run every task that has data.

    Args:
        data ([`EvaluationData`]):
            What to run on.
        embed (`Callable`):
            Embedding function, see [`embedder`].
        generate (`Callable`, *optional*):
            Generating function, see [`generator`]. Left out, nothing is generated.
        split (`str`, *optional*, defaults to `"test"`):
            Split of datasets that have several.

    Returns:
        `dict[str, Figure | int]`: results of all tasks; a name given to a source stands before those of its results.
    """
    results: dict[str, Any] = {}
    for prefix, source in _sources(data.image_text_data).items():
        images, texts = image_text_pairs(load_data(source, split))
        found = image_text_retrieval(embed, images, texts)
        results |= {f"{prefix}{name}": value for name, value in {**found, "pairs": len(images)}.items()}
    for prefix, source in _sources(data.interleaved_data).items():
        rows = load_data(source, split)
        stories = [row_slices(row, row_name(row, index)) for index, row in enumerate(rows)]
        results |= {f"{prefix}{name}": value for name, value in interleaved_retrieval(embed, stories).items()}
    for prefix, source in _sources(data.winoground_data).items():
        rows = load_table(source, split)
        results |= {f"{prefix}{name}": value for name, value in winoground(embed, rows).items()}
    if generate is not None:
        for prefix, source in _sources(data.generation_data).items():
            results[f"{prefix}exact_match"] = exact_match(generate, load_data(source, split))["exact_match"]
    return results


def environment() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = ("hf_sugar", "torch", "transformers", "trl", "peft", "datasets", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_report(
    directory: str | os.PathLike,
    title: str,
    runs: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    notes: Sequence[str] = (),
    pictures: Sequence[tuple[str, str]] = (),
) -> str:
    """
    Write `report.json` and `report.md`.

    Args:
        directory (`str` or `os.PathLike`):
            Where to write.
        title (`str`):
            Heading.
        runs (`dict[str, dict[str, Any]]`):
            Results of each run, see [`report_table`].
        settings (`dict[str, Any]`):
            What made the figures: anything that JSON can hold.
        notes (`Sequence[str]`, *optional*):
            Paragraphs put under the table.
        pictures (`Sequence[tuple[str, str]]`, *optional*):
            File names in `directory` and their captions.

    Returns:
        `str`: the table in Markdown.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    table = report_table(runs)
    content = {
        "title": title,
        "runs": {name: to_dict(results) for name, results in runs.items()},
        "settings": settings,
        "bootstrap": BOOTSTRAP,
        "notes": list(notes),
        "environment": environment(),
    }
    parts = [f"# {title}", table, "Percent, with 95% bootstrap intervals over the queries.", *notes]
    parts += [f"![{caption}]({name})\n\n{caption}" for name, caption in pictures]
    for name, text in (("report.json", json.dumps(content, indent=2)), ("report.md", "\n\n".join(parts) + "\n")):
        temporary = directory / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / name)
    return table


def write_pictures(
    directory: str | os.PathLike,
    data: EvaluationData,
    embed: EmbedFunction,
    embed_prefixes: Callable[[list[list[Any]]], list[np.ndarray]],
    embed_teachers: Callable[[list[Any]], torch.Tensor],
    teacher_split: int | None,
    logs: dict[str, list[dict[str, float]]],
    delta: float = 1.0,
    normalize: str | None = "self+count",
    split: str = "test",
) -> list[tuple[str, str]]:
    """
    The plots of a report, as far as there are data for them.

    Args:
        directory (`str` or `os.PathLike`):
            Where to write.
        data ([`EvaluationData`]):
            Documents and image-text rows to draw examples from.
        embed (`Callable`):
            Embedding function of the trained model.
        embed_prefixes (`Callable`):
            Gives for each document the embeddings `(slices, dim)` of all of its prefixes.
        embed_teachers (`Callable`):
            Gives the teacher embeddings of slices.
        teacher_split (`int`, *optional*):
            Size of the uni-modal half of the teacher embeddings.
        logs (`dict[str, list[dict]]`):
            Training log of each run.
        delta (`float`, *optional*, defaults to `1.0`):
            Bandwidth of the labels.
        normalize (`str`, *optional*, defaults to `"self+count"`):
            Normalisation of the labels.
        split (`str`, *optional*, defaults to `"test"`):
            Split of datasets that have several.

    Returns:
        `list[tuple[str, str]]`: file names and captions.
    """
    directory = Path(directory)
    pictures = []
    plot_losses(list(logs.values()), directory / "losses.png", list(logs))
    pictures.append(("losses.png", "Generative and structure loss over the training steps."))

    for source in list(_sources(data.interleaved_data).values())[:1]:
        rows = load_data(source, split)
        documents = [row_slices(rows[index], row_name(rows[index], index)) for index in range(min(8, len(rows)))]
        lengths = [len(document) for document in documents]
        teachers = embed_teachers([item for document in documents for item in document])
        modality = torch.tensor([int(not isinstance(item, str)) for document in documents for item in document])
        offsets = torch.tensor([0, *np.cumsum(lengths)])
        prefixes = torch.tensor([(d, length) for d, n in enumerate(lengths) for length in range(1, n + 1)])
        triple = {} if teacher_split is None else {"modality": modality, "split": teacher_split}
        labels, _ = label_matrix(teachers, offsets, prefixes, delta=delta, normalize=normalize, **triple)
        predicted = np.concatenate(embed_prefixes(documents))
        plot_similarities(labels.numpy(), predicted @ predicted.T, directory / "similarities.png")
        pictures.append(("similarities.png", "Labels and predicted cosines of every prefix of eight documents."))

        first, second = (slice(int(offsets[d]), int(offsets[d + 1])) for d in (0, 1))
        expected = expected_alignment(
            teachers[first],
            teachers[second],
            delta=delta,
            **({} if teacher_split is None else {"modality_x": modality[first], "modality_y": modality[second]}),
            split=teacher_split,
        )
        plot_alignment(expected.numpy(), documents[0], documents[1], directory / "alignment.png")
        pictures.append(("alignment.png", "Expected alignment of two documents under the teachers' similarity."))

    for source in list(_sources(data.image_text_data).values())[:1]:
        images, texts = image_text_pairs(load_data(source, split))
        image_index, text_index = SugarIndex.build(images, embed), SugarIndex.build(texts, embed)
        lines = []
        for n in range(min(3, len(images))):
            for index, items, query, truth in (
                (image_index, images, texts[n], images[n]),
                (text_index, texts, images[n], texts[n]),
            ):
                hits = [hit.index for hit in index.search([query], 5)[0]]
                lines.append(
                    {
                        "query": query,
                        "truth": truth,
                        "hits": [items[hit] for hit in hits],
                        "correct": [texts[hit] == texts[n] for hit in hits],
                    }
                )
        plot_gallery(lines, directory / "gallery.png")
        pictures.append(("gallery.png", "Queries, the truth, and the five best candidates of the trained model."))
    return pictures
