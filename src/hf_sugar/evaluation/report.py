"""The report of one or several runs: JSON and Markdown."""

import itertools
import json
import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import replacing
from .metrics import BOOTSTRAP, Estimate


def to_dict(results: dict[str, Any]) -> dict[str, Any]:
    """Results of a task with every [`Estimate`] turned into a `dict`, ready for `json.dump`."""
    return {name: asdict(value) if isinstance(value, Estimate) else value for name, value in results.items()}


WORDS = {
    "context": "next image given the story so far",
    "context_unseen": "next image, images so far left out",
    "last_sentence": "next image given the last sentence",
    **{f"{kind}_score": f"{kind} score of pairs" for kind in ("text", "image", "group")},
}


def in_words(metric: str) -> str:
    """The name of a result for a reader: `"unseen: image to text R@5"` for `"unseen/image_to_text_recall@5"`."""
    label, _, metric = metric.rpartition("/")
    curve, at, number = metric.partition("@")
    name = curve.removesuffix("_recall")
    words = WORDS.get(name, name.replace("_", " ")) + (" R" if at and name != curve else "") + at + number
    return f"{label.replace('_', ' ')}: {words}" if label else words


def _cells(runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """What stands in the lines of a table of results, names first."""
    shown: dict[str, dict[str, str]] = {}
    for run, results in runs.items():
        numbers = {
            metric: value for metric, value in results.items() if isinstance(value, Estimate | int | float | str)
        }
        if numbers:
            shown[run] = {metric: f"{v:.1f}" if isinstance(v, float) else str(v) for metric, v in numbers.items()}
    metrics = dict.fromkeys(itertools.chain(*sorted(shown.values(), key=len, reverse=True)))
    lines = [[in_words(metric), *(results.get(metric, "") for results in shown.values())] for metric in metrics]
    return [["metric", *shown], *lines]


def report_table(runs: dict[str, dict[str, Any]]) -> str:
    """
    Markdown table of the results of runs by their names: a line for each metric, in the order of the run that has most, and
    a column for each run that has figures. Estimates, numbers and texts are shown; a list, such as that of misses, is left out.

    Example:

    ```python
    >>> print(report_table({"SFT": {"recall@1": Estimate(20.0, 15.0, 25.0, 500)}, "paper": {"recall@1": 40.0}}))
    | metric | SFT | paper |
    |---|---|---|
    | recall@1 | 20.0 [15.0, 25.0] | 40.0 |
    ```
    """
    cells = _cells(runs)
    header, *rows = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([header, "|" + "---|" * len(cells[0]), *rows])


def terminal_table(runs: dict[str, dict[str, Any]], width: int = 100) -> str:
    """The table of [`report_table`] in aligned columns. One that would be wider than `width` has values without what stands
    behind them, such as intervals, and names over several lines."""
    cells = _cells(runs)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    gap = "  "
    if sum(widths) + 2 * len(widths) - 2 > width:
        gap = " "
        cells[1:] = [[name, *(value.partition(" ")[0] for value in values)] for name, *values in cells[1:]]
        widths[1:] = [max(map(len, " ".join(column).split())) for column in list(zip(*cells, strict=True))[1:]]
        widths[0] = max(12, min(widths[0], width - sum(widths[1:]) - len(widths) + 1))
    lines = []
    for row in cells:
        broken = [textwrap.wrap(cell, size) for cell, size in zip(row, widths, strict=True)]
        for name, *values in itertools.zip_longest(*broken, fillvalue=""):
            aligned = [value.rjust(size) for value, size in zip(values, widths[1:], strict=True)]
            lines.append(gap.join([name.ljust(widths[0]), *aligned]).rstrip())
        if row is cells[0]:
            lines.append(gap.join("-" * size for size in widths))
    return "\n".join(lines)


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
    introduction: str = "",
    closing: str = "",
) -> str:
    """
    Write `report.json` and `report.md` into `directory`, in place of those that are there. Returns the table and the notes
    for a terminal of 100 columns.

    Args:
        runs (`dict[str, dict[str, Any]]`): As in [`report_table`]. Their `"notes"` are put under the table, each once.
        settings (`dict[str, Any]`): What made the figures, for JSON.
        notes (`Sequence[str]`, *optional*): Further paragraphs under the table.
        pictures (`Sequence[tuple[str, str]]`, *optional*): File names in `directory` and their captions.
        introduction, closing (`str`, *optional*): What `report.md` says before the table and at its end, in Markdown.
    """
    notes = list(dict.fromkeys([*notes, *(note for results in runs.values() for note in results.get("notes", []))]))
    content = {
        "title": title,
        "runs": {name: to_dict(results) for name, results in runs.items()},
        "settings": settings,
        "bootstrap": BOOTSTRAP,
        "notes": notes,
        "environment": environment(),
    }
    unit = "Percent; in square brackets 95% bootstrap intervals over the queries."
    shown = [f"![{caption}]({name})\n\n{caption}" for name, caption in pictures]
    parts = filter(None, [f"# {title}", introduction, report_table(runs), unit, *notes, *shown, closing])
    for name, text in (("report.json", json.dumps(content, indent=2)), ("report.md", "\n\n".join(parts) + "\n")):
        with replacing(Path(directory) / name) as file:
            file.write_text(text, encoding="utf-8")
    return "\n\n".join([terminal_table(runs), *(textwrap.fill(note, 100) for note in notes)])
