"""Plots of training runs, of the label kernel, and of what retrieval finds. Each is written as one PNG file."""

import itertools
import os
import textwrap
from collections.abc import Sequence
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
from ..inference import SugarEmbedder, in_role
from ..models.rows_sugar import row_name
from ..teachers import TripleEncoder
from .metrics import Estimate
from .report import in_words
from .tasks import EvaluationData, image_text_pairs, named_sources


COLORS = ("#2f6db5", "#d9622b", "#3a9a5b", "#8a5bb0", "#c43c58", "#6b6b6b")
CORRECT = {"color": "#2a9d4a", "linewidth": 3}
WRONG = {"color": "#c8c8c8", "linewidth": 0.8}
EVALUATION = {"linestyle": "", "marker": "o", "markersize": 5.5, "markeredgecolor": "white"}


def plot_losses(runs: dict[str, Sequence[dict[str, float]]], path: str | os.PathLike) -> None:
    """
    The losses over the steps of runs, a panel for each that was logged: pale as they are, and averaged over a tenth of the
    entries around each. Evaluation values are dots. A run without a loss, such as plain SFT, is missing from its panel.

    Args:
        runs (`dict[str, Sequence[dict]]`): `log_history` of the trainer's state of each run, by its name.
        path (`str` or `os.PathLike`): PNG file to write.
    """
    panels = {
        "generative_loss": ("Generative loss $L_g$", "nats per token"),
        "structure_loss": ("Structure loss $L_s$", "squared error per row"),
        "contrastive_loss": ("Contrastive loss $L_c$", "nats per item"),
    }
    logged = {name for run in runs.values() for entry in run for name in entry}
    panels = {key: panel for key, panel in panels.items() if key in logged}
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (key, (title, unit)) in zip(axes, panels.items(), strict=True):
        for (label, run), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
            entries = [(entry["step"], entry[key]) for entry in run if key in entry]
            if entries:
                steps, values = np.transpose(entries)
                window = np.ones(1 + len(steps) // 20 * 2)
                sums, counts = (np.convolve(each, window, "same") for each in (values, np.ones_like(values)))
                ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                marker = "o" if len(steps) == 1 else None
                ax.plot(steps, sums / counts, color=color, linewidth=1.8, marker=marker, label=label)
            measured = [(entry["step"], entry[f"eval_{key}"]) for entry in run if f"eval_{key}" in entry]
            if measured:
                ax.plot(*zip(*measured, strict=True), color=color, **EVALUATION)
        ax.set_title(title, fontsize=11)
        ax.set(xlabel="optimiser step", ylabel=unit)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _finish(ax, legend=len(runs) > 1)
    _write(figure, path)


def plot_curves(runs: dict[str, dict[str, Any]], path: str | os.PathLike, axis: str = "k") -> None:
    """
    Results that depend on a number, such as recall@k: a panel for each, and in it a line for each run, with its interval.
    Values without one, such as those of chance or of a paper, are dashed.

    Args:
        runs (`dict[str, dict[str, Any]]`): Results of each run by its name; those named `<curve>@<number>` are drawn.
        path (`str` or `os.PathLike`): PNG file to write.
        axis (`str`, *optional*, defaults to `"k"`): What the number counts.
    """
    curves: dict[str, dict[str, dict[int, Any]]] = {}
    for run, results in runs.items():
        for name, value in results.items():
            curve, at, number = name.rpartition("@")
            if at and number.isdecimal():
                curves.setdefault(curve, {}).setdefault(run, {})[int(number)] = value
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(max(4.5, 2.8 * columns), 2.7 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    lines = {}
    for ax, (curve, of_runs) in zip(axes, curves.items(), strict=False):
        for run, color in zip(runs, itertools.cycle(COLORS), strict=False):
            if run not in of_runs:
                continue
            numbers, values = zip(*sorted(of_runs[run].items()), strict=True)
            if isinstance(values[0], Estimate):
                middle, low, high = zip(*((v.value, v.low, v.high) for v in values), strict=True)
                [lines[run]] = ax.plot(numbers, middle, color=color, marker="o", markersize=4)
                ax.fill_between(numbers, low, high, color=color, alpha=0.15)
            else:
                [lines[run]] = ax.plot(numbers, values, color=color, linestyle="--")
        ax.set(xlabel=axis, ylim=(0, 102))
        ax.set_title(textwrap.fill(in_words(curve), 36), fontsize=9)
        ax.set_xticks(sorted({number for values in of_runs.values() for number in values}))
        _finish(ax, legend=False)
    for ax in axes[::columns]:
        ax.set_ylabel("percent")
    for ax in axes[len(curves) :]:
        ax.set_axis_off()
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    _write(figure, path)


def _finish(ax: Axes, legend: bool) -> None:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize=9)


def plot_similarities(labels: np.ndarray, predicted: np.ndarray, path: str | os.PathLike) -> None:
    """
    Label similarities and predicted cosines of one batch as two heat maps on one colour scale.

    Args:
        labels, predicted (`np.ndarray` of shape `(n, n)`): M_l and M_r.
        path (`str` or `os.PathLike`): PNG file to write.
    """
    matrices = {"Labels $M_l$": labels, "Predicted cosines $M_r$": predicted}
    low, high = min(0.0, np.min(labels), np.min(predicted)), max(1.0, np.max(labels), np.max(predicted))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
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
    Expected alignment of two sequences as a heat map, with the slices themselves at the left and below.

    Args:
        expected (`np.ndarray` of shape `(n, m)`): Of [`hf_sugar.alignment.expected_alignment`].
        row_slices, column_slices (`Sequence[str | PIL.Image.Image]`): n and m slices.
        path (`str` or `os.PathLike`): PNG file to write.
    """
    n, m = expected.shape
    cell = min(1.0, 12 / max(n, m))
    width, height = cell * m + 2.6, cell * n + 1.7
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((1.55 / width, 1.15 / height, cell * m / width, cell * n / height))
    picture = ax.imshow(expected, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
    ax.set_xticks(np.arange(m - 1) + 0.5, [])
    ax.set_yticks(np.arange(n - 1) + 0.5, [])
    ax.grid(color="white", linewidth=1.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("Expected alignment", fontsize=11)
    for i, j in np.ndindex(n, m) if cell > 0.4 else ():
        color = "white" if expected[i, j] > 0.55 else "#333333"
        ax.text(j, i, f"{expected[i, j]:.2f}", ha="center", va="center", fontsize=8, color=color)
    x, y = 1 / (cell * m), 1 / (cell * n)  # an inch, as a share of the heat map
    colorbar = figure.colorbar(picture, cax=ax.inset_axes((1 + 0.1 * x, 0, 0.15 * x, 1)))
    colorbar.set_label("probability of a visit", fontsize=8)
    colorbar.ax.tick_params(labelsize=7)
    for i, part in zip(range(n), row_slices, strict=True):
        _draw(ax.inset_axes((-1.45 * x, 1 - (i + 0.95) / n, 1.4 * x, 0.9 / n)), part)
    for j, part in zip(range(m), column_slices, strict=True):
        _draw(ax.inset_axes(((j + 0.05) / m, -1.05 * y, 0.9 / m, y)), part)
    _write(figure, path)


def plot_gallery(rows: Sequence[dict[str, Any]], path: str | os.PathLike, titles: Sequence[str] = ()) -> None:
    """
    Queries with what was found for them, best first; correct hits are framed.

    Args:
        rows (`Sequence[dict]`):
            For each query a line with `query` and `truth` (each a `str`, a `PIL.Image.Image` or an interleaved list of
            those), `hits`, a list of such items, and `correct`, a `bool` for each of the hits.
        path (`str` or `os.PathLike`): PNG file to write.
        titles (`Sequence[str]`, *optional*): What stands above the hits, instead of `rank 1` and so on.
    """
    items = [[row["query"], row["truth"], *row["hits"]] for row in rows]
    widths = []
    for column in itertools.zip_longest(*items):
        widths.append(min(4.8, max([1.3, *(1.2 * len(item) for item in column if isinstance(item, list))])))
    width, height = sum(widths) + 0.4, 1.25 * len(rows) + 0.4
    figure = Figure(figsize=(width, height))
    widths.insert(2, 0.1)
    titles = ["query", "truth", *(titles or (f"rank {n + 1}" for n in range(len(widths))))]
    margins = {"left": 0.01, "right": 0.99, "top": 1 - 0.33 / height, "bottom": 0.07 / height}
    grid = figure.add_gridspec(len(rows), len(widths), width_ratios=widths, wspace=0.06, hspace=0.08, **margins)
    for r, (row, line) in enumerate(zip(rows, items, strict=True)):
        frames = [None, None, *(CORRECT if correct else WRONG for correct in row["correct"])]
        for c, (item, frame) in enumerate(zip(line, frames, strict=True)):
            ax = figure.add_subplot(grid[r, c if c < 2 else c + 1])
            if r == 0:
                ax.set_title(titles[c], fontsize=10)
            _draw(ax, item, frame)
    _write(figure, path)


def _draw(ax: Axes, item: Any, frame: dict[str, Any] | None = None) -> None:
    """A text, an image, or several of them side by side, in an axes of its own."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=frame is not None, **(frame or {}))
    ax.patch.set_visible(False)
    if isinstance(item, list):
        for p, part in enumerate(item):
            _draw(ax.inset_axes([p / len(item), 0.02, 1 / len(item), 0.96]), part)
    elif isinstance(item, str):
        box, dpi = ax.get_window_extent(), ax.figure.dpi
        characters, lines = max(6, int(box.width / dpi / 0.062)), max(1, int(box.height / dpi / 0.135))
        text = "\n".join(textwrap.wrap(item, characters, max_lines=lines, placeholder=" …"))
        # a caption may hold dollar signs
        style = {"ha": "center", "va": "center", "fontsize": 7, "parse_math": False}
        ax.text(0.5, 0.5, text, transform=ax.transAxes, **style)
    else:
        image = item.convert("RGB")
        image.thumbnail((256, 256))
        ax.set(xlim=(0, 1), ylim=(0, 1))
        inner = ax.inset_axes([0.05, 0.05, 0.9, 0.9])
        inner.imshow(np.asarray(image))
        inner.set_axis_off()


def _write(figure: Figure, path: str | os.PathLike) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def best_hits(embed: SugarEmbedder, data: EvaluationData, split: str = "test", k: int = 3) -> list[dict[str, Any]]:
    """Rows for [`plot_gallery`]: what a model finds for three texts and images, spread over the first of `image_text_data`."""
    rows = []
    for source in list(named_sources(data.image_text_data).values())[:1]:
        images, texts = image_text_pairs(load_data(source, split))
        asked, found = np.unique(np.linspace(0, len(images) - 1, 3).astype(int)).tolist(), []
        for queries, items in ((texts, images), (images, texts)):
            vectors = in_role(embed, "query")([queries[n] for n in asked])
            found.append(vectors @ in_role(embed, "document")(items).T)
        for n, of_text, of_image in zip(asked, *found, strict=True):
            for queries, items, scores in ((texts, images, of_text), (images, texts, of_image)):
                best = np.argsort(-scores, kind="stable")[:k].tolist()
                hits, correct = [items[hit] for hit in best], [texts[hit] == texts[n] for hit in best]
                rows.append({"query": queries[n], "truth": items[n], "hits": hits, "correct": correct})
    return rows


def write_pictures(
    directory: str | os.PathLike,
    data: EvaluationData,
    embed: SugarEmbedder,
    encoder: TripleEncoder,
    logs: dict[str, list[dict[str, float]]],
    found: dict[str, list[dict[str, Any]]],
    delta: float = 1.0,
) -> list[tuple[str, str]]:
    """The plots of a report, as far as there are data for them: of the trained model (`embed`), of its teachers, of the log of
    each run, and of what each model found ([`best_hits`]). Returns file names and captions."""
    directory = Path(directory)
    plot_losses(logs, directory / "losses.png")
    pictures = [("losses.png", "The losses over the steps: pale as logged, and averaged over a tenth of the run.")]
    for source in list(named_sources(data.interleaved_data).values())[:1]:
        rows = load_data(source, "test")
        documents = [row_slices(rows[index], row_name(rows[index], index)) for index in range(min(32, len(rows)))]
        lengths = list(map(len, documents))
        slices = sum(documents, [])
        teachers = encoder.encode(slices)
        modality = torch.tensor([int(not isinstance(item, str)) for item in slices])
        offsets = torch.tensor([0, *np.cumsum(lengths)])
        triple = {} if encoder.split is None else {"modality": modality, "split": encoder.split}
        prefixes = [(d, length) for d, n in enumerate(lengths[:8]) for length in range(1, n + 1)]
        every = torch.tensor([*prefixes, *enumerate(lengths)])
        matrix = label_matrix(teachers, offsets, every, delta=delta, **triple)[0].numpy()
        labels, alike = matrix[: len(prefixes), : len(prefixes)], matrix[len(prefixes) :, len(prefixes) :]
        predicted = np.concatenate(embed.every_slice(documents[:8]))
        plot_similarities(labels, predicted @ predicted.T, directory / "similarities.png")
        pictures.append(("similarities.png", "Labels and predicted cosines of every prefix of eight documents."))

        # two that are alike, and not copies; a single document is compared with itself
        first, second = np.unravel_index(np.argmax(np.triu(np.where(alike < 0.99, alike, 0), 1)), alike.shape)
        x, y = (teachers.split(lengths)[n] for n in (first, second))
        if triple:
            modality_x, modality_y = (modality.split(lengths)[n] for n in (first, second))
            triple = {"modality_x": modality_x, "modality_y": modality_y, "split": encoder.split}
        expected = expected_alignment(x, y, delta=delta, **triple)
        plot_alignment(expected.numpy(), documents[first], documents[second], directory / "alignment.png")
        pictures.append(("alignment.png", "Expected alignment, by the teachers, of the two documents most alike."))

    rows = [
        {**same[0], **{key: sum((row[key] for row in same), []) for key in ("hits", "correct")}}
        for same in zip(*found.values(), strict=True)
    ]
    if rows:
        titles = [f"{run} {n + 1}" for run, of_run in found.items() for n in range(len(of_run[0]["hits"]))]
        plot_gallery(rows, directory / "gallery.png", titles)
        pictures.append(("gallery.png", f"What {' and '.join(found)} find, best first. What is right is framed."))
    return pictures
