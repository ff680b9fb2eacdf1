"""Plots of training runs, of the label kernel, and of what retrieval finds. Each is written as one PNG file."""

import itertools
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..alignment import expected_alignment, label_matrix
from ..data import load_data, row_slices
from ..files import replacing
from ..inference import SugarEmbedder
from ..models.rows_sugar import row_name
from .tasks import EvaluationData, image_text_pairs


COLORS = ("#2f6db5", "#d9622b", "#3a9a5b", "#8a5bb0", "#c43c58", "#6b6b6b")
CORRECT = "#2a9d4a"
GREY = "#c8c8c8"
EVALUATION_STYLE = {"linestyle": "", "marker": "o", "markersize": 5.5, "markeredgecolor": "white"}
DPI = 150


def plot_losses(
    log_history: Sequence[dict[str, float]] | dict[str, Sequence[dict[str, float]]], path: str | os.PathLike
) -> None:
    """
    Generative and structure loss over the steps of one or several runs, side by side.

    Evaluation values are drawn as dots over the training curve. A run that logs only one loss, such as plain SFT, is
    missing from the other panel.

    Args:
        log_history (`Sequence[dict]` or `dict[str, Sequence[dict]]`):
            `trainer.state.log_history` of a run, or of several by their names.
        path (`str` or `os.PathLike`):
            PNG file to write.

    Raises:
        `ValueError`: if no run logs one of the two losses.
    """
    runs = log_history if isinstance(log_history, dict) else {"": log_history}
    keys = ("generative_loss", "structure_loss")
    logged = {key for run in runs.values() for entry in run for key in entry}
    if not logged.intersection(keys):
        raise ValueError(f"No run logs {' or '.join(keys)}, but {', '.join(sorted(logged))}.")

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    titles, units = ("Generative loss $L_g$", "Structure loss $L_d$"), ("nats per token", "squared error per row")
    for ax, key, title, unit in zip(figure.subplots(1, 2), keys, titles, units, strict=True):
        for (label, run), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
            for name, style in ((key, {"linewidth": 1.6, "label": label}), (f"eval_{key}", EVALUATION_STYLE)):
                entries = [entry for entry in run if name in entry]
                if entries:
                    steps, values = [entry["step"] for entry in entries], [entry[name] for entry in entries]
                    ax.plot(steps, values, color=color, **style)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("optimiser step")
        ax.set_ylabel(unit)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if len(runs) > 1 and ax.lines:
            ax.legend(frameon=False, fontsize=9)
        if not ax.lines:
            ax.text(0.5, 0.5, "not logged", ha="center", va="center", transform=ax.transAxes, color="grey")
    _write(figure, path)


def plot_curves(
    results: dict[str, Any], path: str | os.PathLike, axis: str = "k", reference: dict[str, float] | None = None
) -> None:
    """
    Results that depend on a number, such as recall@k, as curves with their intervals.

    Args:
        results (`dict[str, Any]`):
            Results by name. Those named `<curve>@<number>` are drawn, a curve for each name; the others are not.
        path (`str` or `os.PathLike`):
            PNG file to write.
        axis (`str`, *optional*, defaults to `"k"`):
            What the number counts.
        reference (`dict[str, float]`, *optional*):
            Published values under the same names, drawn dashed.

    Raises:
        `ValueError`: if no result has such a name.
    """
    curves: dict[str, list[tuple[int, Any]]] = {}
    for name, value in results.items():
        curve, at, number = name.rpartition("@")
        if at and number.isdecimal():
            curves.setdefault(curve, []).append((int(number), value))
    if not curves:
        raise ValueError(f"There is nothing to draw: none of {', '.join(results)} is named <curve>@<number>.")
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for (curve, points), color in zip(sorted(curves.items()), itertools.cycle(COLORS), strict=False):
        numbers, values = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        ax.plot(numbers, [v.value for v in values], color=color, marker="o", markersize=4, label=curve)
        ax.fill_between(numbers, [v.low for v in values], [v.high for v in values], color=color, alpha=0.15)
        published = [(n, reference[f"{curve}@{n}"]) for n in numbers if f"{curve}@{n}" in (reference or {})]
        if published:
            ax.plot(*zip(*published, strict=True), color=color, linestyle="--", label=f"{curve} (paper)")
    ax.set_xlabel(axis)
    ax.set_ylabel("percent")
    ax.set_ylim(0, 100)
    ax.set_xticks(sorted({number for points in curves.values() for number, _ in points}))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    _write(figure, path)


def plot_similarities(labels: np.ndarray, predicted: np.ndarray, path: str | os.PathLike) -> None:
    """
    Label similarities and predicted cosines of one batch as two heat maps on one colour scale.

    Args:
        labels (`np.ndarray` of shape `(n, n)`):
            Label matrix M_l.
        predicted (`np.ndarray` of shape `(n, n)`):
            Matrix of the cosines of the embeddings, M_r.
        path (`str` or `os.PathLike`):
            PNG file to write.

    Raises:
        `ValueError`: if the shapes differ.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.shape != predicted.shape:
        raise ValueError(f"`labels` have shape {labels.shape} but `predicted` {predicted.shape}.")
    low, high = min(0.0, labels.min(), predicted.min()), max(1.0, labels.max(), predicted.max())
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, matrix, title in zip(axes, (labels, predicted), ("Labels $M_l$", "Predicted cosines $M_r$"), strict=True):
        picture = ax.imshow(matrix, vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("position in the batch")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
    axes[0].set_ylabel("position in the batch")
    figure.colorbar(picture, ax=axes, label="similarity", shrink=0.85)
    _write(figure, path)


def plot_alignment(
    expected: np.ndarray,
    row_slices: Sequence[str | Image.Image],
    column_slices: Sequence[str | Image.Image],
    path: str | os.PathLike,
) -> None:
    """
    Expected alignment of two sequences as a heat map, with the slices themselves along its sides.

    Args:
        expected (`np.ndarray` of shape `(n, m)`):
            Probability that an alignment visits each cell, see [`hf_sugar.alignment.expected_alignment`].
        row_slices (`Sequence[str | PIL.Image.Image]`):
            The n slices of the first sequence, shown at the left.
        column_slices (`Sequence[str | PIL.Image.Image]`):
            The m slices of the second sequence, shown below.
        path (`str` or `os.PathLike`):
            PNG file to write.

    Raises:
        `ValueError`: if the shape of `expected` does not fit the slices.
    """
    expected = np.asarray(expected)
    n, m = len(row_slices), len(column_slices)
    if expected.shape != (n, m):
        raise ValueError(f"`expected` has shape {expected.shape}; {n} row and {m} column slices need ({n}, {m}).")
    cell = min(1.0, 12 / max(n, m))
    figure = Figure(figsize=(cell * m + 2.6, cell * n + 1.7))
    grid = figure.add_gridspec(
        n + 1,
        m + 2,
        width_ratios=[1.4, *[cell] * m, 0.15],
        height_ratios=[*[cell] * n, 1.0],
        wspace=0.1,
        hspace=0.1,
        left=0.04,
        right=1 - 0.6 / figure.get_figwidth(),
        top=1 - 0.5 / figure.get_figheight(),
        bottom=0.1 / figure.get_figheight(),
    )
    ax = figure.add_subplot(grid[:n, 1 : m + 1])
    picture = ax.imshow(expected, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
    ax.set_xticks(np.arange(m - 1) + 0.5, [])
    ax.set_yticks(np.arange(n - 1) + 0.5, [])
    ax.grid(color="white", linewidth=1.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("Expected alignment", fontsize=11)
    if cell > 0.4:
        for i, j in np.ndindex(n, m):
            color = "white" if expected[i, j] > 0.55 else "#333333"
            ax.text(j, i, f"{expected[i, j]:.2f}", ha="center", va="center", fontsize=8, color=color)
    colorbar = figure.colorbar(picture, cax=figure.add_subplot(grid[:n, m + 1]))
    colorbar.set_label("probability of a visit", fontsize=8)
    colorbar.ax.tick_params(labelsize=7)
    for i, part in enumerate(row_slices):
        _draw(figure.add_subplot(grid[i, 0]), part)
    for j, part in enumerate(column_slices):
        _draw(figure.add_subplot(grid[n, j + 1]), part)
    _write(figure, path)


def plot_gallery(rows: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """
    Queries with what was found for them, best first; correct hits are framed.

    Args:
        rows (`Sequence[dict]`):
            For each query a line with `query` and `truth` (each a `str`, a `PIL.Image.Image` or an interleaved list of
            those), `hits`, a list of such items, and `correct`, a list of `bool` that says which of the hits are right.
        path (`str` or `os.PathLike`):
            PNG file to write.

    Raises:
        `ValueError`: if there are no rows, or a row has another number of `correct` than of `hits`.
    """
    if len(rows) == 0:
        raise ValueError("`rows` is empty: there is nothing to draw.")
    for r, row in enumerate(rows):
        if len(row["correct"]) != len(row["hits"]):
            raise ValueError(
                f"`rows[{r}]` has {len(row['hits'])} hits but {len(row['correct'])} entries in `correct`."
            )
    columns = max(len(row["hits"]) for row in rows)
    items = [[row["query"], row["truth"], *row["hits"]] for row in rows]
    widths = [
        min(4.8, max([1.3, *(1.2 * len(line[c]) for line in items if c < len(line) and isinstance(line[c], list))]))
        for c in range(columns + 2)
    ]
    width, height = sum(widths) + 0.4, 1.25 * len(rows) + 0.4
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        len(rows),
        columns + 3,
        width_ratios=[*widths[:2], 0.1, *widths[2:]],
        wspace=0.06,
        hspace=0.08,
        left=0.01,
        right=0.99,
        top=1 - 0.33 / height,
        bottom=0.07 / height,
    )
    for r, (row, line) in enumerate(zip(rows, items, strict=True)):
        for c, item in enumerate(line):
            ax = figure.add_subplot(grid[r, c if c < 2 else c + 1])
            if r == 0:
                ax.set_title(("query", "truth")[c] if c < 2 else f"rank {c - 1}", fontsize=10)
            if c < 2:
                _draw(ax, item)
            elif row["correct"][c - 2]:
                _draw(ax, item, frame=CORRECT, frame_width=3)
            else:
                _draw(ax, item, frame=GREY)
    _write(figure, path)


def _draw(ax: Axes, item: Any, frame: str | None = None, frame_width: float = 0.8) -> None:
    """A text, an image, or several of them side by side, in an axes of its own."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(frame is not None)
    ax.spines[:].set(color=frame, linewidth=frame_width)
    ax.patch.set_visible(False)
    if isinstance(item, list):
        for p, part in enumerate(item):
            _draw(ax.inset_axes([p / len(item), 0.02, 1 / len(item), 0.96]), part)
    elif isinstance(item, str):
        box = ax.get_window_extent()
        inches = box.width / ax.figure.dpi, box.height / ax.figure.dpi
        characters, lines = max(6, int(inches[0] / 0.062)), max(1, int(inches[1] / 0.135))
        wrapped = textwrap.wrap(item, characters, max_lines=lines, placeholder=" …")
        ax.text(
            0.5,
            0.5,
            "\n".join(wrapped),
            ha="center",
            va="center",
            fontsize=7,
            transform=ax.transAxes,
            parse_math=False,  # a caption may hold dollar signs
        )
    else:
        image = item.convert("RGB")
        image.thumbnail((256, 256))
        ax.set(xlim=(0, 1), ylim=(0, 1))
        inner = ax.inset_axes([0.05, 0.05, 0.9, 0.9])
        inner.imshow(np.asarray(image))
        inner.set_axis_off()


def _write(figure: Figure, path: str | os.PathLike) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def write_pictures(
    directory: str | os.PathLike,
    data: EvaluationData,
    embed: SugarEmbedder,
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
        embed ([`SugarEmbedder`]):
            Of the trained model.
        embed_teachers (`Callable`):
            Gives the teacher embeddings of slices.
        teacher_split (`int`, *optional*):
            Size of the uni-modal half of the teacher embeddings.
        logs (`dict[str, list[dict]]`):
            Training log of each run.
        delta (`float`, *optional*, defaults to `1.0`), normalize (`str`, *optional*, defaults to `"self+count"`):
            Bandwidth and normalisation of the labels.
        split (`str`, *optional*, defaults to `"test"`):
            Split of datasets that have several.

    Returns:
        `list[tuple[str, str]]`: file names and captions.
    """
    directory = Path(directory)
    pictures = []
    plot_losses(logs, directory / "losses.png")
    pictures.append(("losses.png", "Generative and structure loss over the training steps."))

    for source in _first_source(data.interleaved_data):
        rows = load_data(source, split)
        documents = [row_slices(rows[index], row_name(rows[index], index)) for index in range(min(8, len(rows)))]
        lengths = [len(document) for document in documents]
        teachers = embed_teachers([item for document in documents for item in document])
        modality = torch.tensor([int(not isinstance(item, str)) for document in documents for item in document])
        offsets = torch.tensor([0, *np.cumsum(lengths)])
        prefixes = torch.tensor([(d, length) for d, n in enumerate(lengths) for length in range(1, n + 1)])
        triple = {} if teacher_split is None else {"modality": modality, "split": teacher_split}
        labels, _ = label_matrix(teachers, offsets, prefixes, delta=delta, normalize=normalize, **triple)
        predicted = np.concatenate(embed.every_slice(documents))
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

    for source in _first_source(data.image_text_data):
        images, texts = image_text_pairs(load_data(source, split))
        vectors = {"image": embed(images), "text": embed(texts)}
        lines = []
        for n in range(min(3, len(images))):
            for kind, items, query, truth in (
                ("image", images, texts[n], images[n]),
                ("text", texts, images[n], texts[n]),
            ):
                of_query = vectors["text" if kind == "image" else "image"][n]
                best = np.argsort(-(vectors[kind] @ of_query), kind="stable")[:5].tolist()
                correct = [texts[hit] == texts[n] for hit in best]
                lines.append(
                    {"query": query, "truth": truth, "hits": [items[hit] for hit in best], "correct": correct}
                )
        plot_gallery(lines, directory / "gallery.png")
        pictures.append(("gallery.png", "Queries, the truth, and the five best candidates of the trained model."))
    return pictures


def _first_source(sources: Any) -> list[Any]:
    if isinstance(sources, dict) and "path" not in sources:
        return list(sources.values())[:1]
    return [sources] if sources else []
