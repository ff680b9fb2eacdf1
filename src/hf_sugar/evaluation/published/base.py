"""What every published benchmark has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction


@contextmanager
def as_published(where: str) -> Iterator[None]:
    """Names the record of a file that is not of the published form."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} is not as published ({reason}). Use the original file.") from error


class Benchmark:
    """Built from its settings, which reads and checks the data without any model. `paper` has what the paper
    (https://huggingface.co/papers/2411.00304) reports for its 7B model, in percent, by the names of results; `axis` says
    what the number after `@` in them counts; `field` which data of [`~evaluation.EvaluationData`] are measured in the same
    way. Such a benchmark measures embeddings alone: `run(None, None)` gives what chance gives."""

    paper: ClassVar[dict[str, float]] = {}
    axis: ClassVar[str] = ""
    field: ClassVar[str | None] = None

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        """Measure an embedding and a generating function."""
        raise NotImplementedError
