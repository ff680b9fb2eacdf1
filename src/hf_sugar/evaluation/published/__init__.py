"""
Published benchmarks, each read from the files as they are published. A benchmark is built from its settings, which
reads and checks the data without any model; `run` then measures an embedding and a generating function on it.
"""

import inspect
import json
from typing import Any, ClassVar, Protocol

from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction
from .coco import Coco
from .mmvp import MMVP
from .rag import RagGain
from .vist import Vist
from .webqa import WebQA
from .winoground import Winoground


class Benchmark(Protocol):
    """
    What every class of [`BENCHMARKS`] has.

    Attributes:
        paper (`dict[str, float]`): what the paper (https://huggingface.co/papers/2411.00304) reports for its 7B model,
            in percent, by the names of the results of `run`.
        axis (`str`): what the number after `@` in the names of the results counts.
    """

    paper: ClassVar[dict[str, float]]
    axis: ClassVar[str]

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]: ...


BENCHMARKS: dict[str, type[Benchmark]] = {
    "coco": Coco,
    "vist": Vist,
    "winoground": Winoground,
    "mmvp": MMVP,
    "webqa": WebQA,
    "rag": RagGain,
}


def load_benchmarks(settings: dict[str, dict[str, Any]], tasks: list[str] | None = None) -> dict[str, Benchmark]:
    """
    Read the data of benchmarks.

    Args:
        settings (`dict[str, dict[str, Any]]`):
            For each benchmark, by its name in [`BENCHMARKS`], the arguments of its class.
        tasks (`list[str]`, *optional*): Names of those to read. By default all that have settings.

    Returns:
        `dict[str, Benchmark]`: by name, in the order of `tasks`.

    Raises:
        `FileNotFoundError`: if a file is missing.
        `ValueError`: if a benchmark or one of its settings is not known or missing, or its data are malformed.
    """
    benchmarks = {}
    for name in tasks or settings:
        if name not in BENCHMARKS:
            raise ValueError(f"There is no benchmark {name!r}. Use some of {', '.join(BENCHMARKS)}.")
        if name not in settings:
            raise ValueError(
                f"`tasks` names {name!r}, but `benchmarks.{name}` is not set. Say there where its data are."
            )
        given, signature = settings[name], inspect.signature(BENCHMARKS[name])
        try:
            signature.bind(**given)
        except TypeError as error:
            takes = ", ".join(map(str, signature.parameters.values()))
            raise ValueError(f"`benchmarks.{name}` is {given!r}: {error}. It takes {takes}.") from error
        try:
            benchmarks[name] = BENCHMARKS[name](**given)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} Set the paths of `benchmarks.{name}`, or leave it out of `tasks`."
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`benchmarks.{name}`: {given['path']} is not JSON ({error}). Download it again."
            ) from error
    return benchmarks
