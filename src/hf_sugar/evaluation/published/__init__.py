"""Published benchmarks, each read from the files as they are published."""

from typing import Any

from .answers import MMVP, RagGain, WebQA
from .base import Benchmark
from .demon import Demon
from .embedding import MMEB, WikiHowTIIR
from .retrieval import Coco, Vist, Winoground


BENCHMARKS: dict[str, type[Benchmark]] = {
    "coco": Coco,
    "vist": Vist,
    "winoground": Winoground,
    "mmvp": MMVP,
    "webqa": WebQA,
    "demon": Demon,
    "rag": RagGain,
    "mmeb": MMEB,
    "wikihow_tiir": WikiHowTIIR,
}


def load_benchmarks(settings: dict[str, dict[str, Any]], tasks: list[str] | None = None) -> dict[str, Benchmark]:
    """
    Read the data of benchmarks.

    Args:
        settings (`dict[str, dict[str, Any]]`): Arguments of classes, by their names in [`BENCHMARKS`].
        tasks (`list[str]`, *optional*): Names of those to read, in this order. By default all that have settings.

    Raises:
        `ValueError`: if a benchmark, a setting or a file is not known or missing, or its data are malformed.
    """
    benchmarks = {}
    for name in tasks or settings:
        if name not in BENCHMARKS:
            raise ValueError(f"There is no benchmark {name!r}. Use some of {', '.join(BENCHMARKS)}.")
        if name not in settings:
            raise ValueError(f"`tasks` names {name!r}, but `benchmarks.{name}` is not set: where are its data?")
        try:
            benchmarks[name] = BENCHMARKS[name](**settings[name])
        except (TypeError, ValueError, OSError) as error:
            raise ValueError(f"`benchmarks.{name}` cannot be read from {settings[name]}: {error}") from error
    return benchmarks
