"""The report of one or several runs: JSON and Markdown."""

import json
import os
import platform
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


def report_table(runs: dict[str, dict[str, Any]]) -> str:
    """
    Markdown table of the results of runs by their names: a line for each metric, in the order of the run that has most, and
    a column for each run. Estimates, numbers and texts are shown; a list, such as that of misses, is left out.

    Example:

    ```python
    >>> print(report_table({"SFT": {"recall@1": Estimate(20.0, 15.0, 25.0, 500)}, "paper": {"recall@1": 40.0}}))
    | metric | SFT | paper |
    |---|---|---|
    | recall@1 | 20.0 [15.0, 25.0] | 40.0 |
    ```
    """
    shown = {
        run: {
            metric: f"{value:.1f}" if isinstance(value, float) else str(value)
            for metric, value in results.items()
            if isinstance(value, Estimate | int | float | str)
        }
        for run, results in runs.items()
    }
    longest_first = sorted(shown.values(), key=len, reverse=True)
    metrics = dict.fromkeys(metric for results in longest_first for metric in results)
    lines = [[metric, *(results.get(metric, "") for results in shown.values())] for metric in metrics]
    rows = [f"| {' | '.join(line)} |" for line in (["metric", *shown], *lines)]
    return "\n".join([rows[0], "|" + "---|" * (len(shown) + 1), *rows[1:]])


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
    Write `report.json` and `report.md` into `directory`, in place of those that are there. Returns the table in Markdown,
    with the notes.

    Args:
        runs (`dict[str, dict[str, Any]]`): As in [`report_table`]. Their `"notes"` are put under the table, each once.
        settings (`dict[str, Any]`): What made the figures: anything that JSON can hold.
        notes (`Sequence[str]`, *optional*): Further paragraphs under the table.
        pictures (`Sequence[tuple[str, str]]`, *optional*): File names in `directory` and their captions.
    """
    table = report_table(runs)
    notes = list(dict.fromkeys([*notes, *(note for results in runs.values() for note in results.get("notes", []))]))
    content = {
        "title": title,
        "runs": {name: to_dict(results) for name, results in runs.items()},
        "settings": settings,
        "bootstrap": BOOTSTRAP,
        "notes": notes,
        "environment": environment(),
    }
    parts = [f"# {title}", table, "Percent, with 95% bootstrap intervals over the queries.", *notes]
    parts += [f"![{caption}]({name})\n\n{caption}" for name, caption in pictures]
    for name, text in (("report.json", json.dumps(content, indent=2)), ("report.md", "\n\n".join(parts) + "\n")):
        with replacing(Path(directory) / name) as file:
            file.write_text(text, encoding="utf-8")
    return "\n\n".join([table, *notes])
