import os
from typing import Any, ClassVar

from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction, load_pairs, winoground


class Winoground:
    """
    Winoground, see [`~evaluation.tasks.winoground`].

    Args:
        path (`str` or `os.PathLike` or `dict`, *optional*, defaults to `"facebook/winoground"`):
            The dataset, as [`hf_sugar.data.load_table`] takes it. The one on the Hub asks for an agreement.
        split (`str`, *optional*, defaults to `"test"`): Split, where there are several.
    """

    paper: ClassVar[dict[str, float]] = {"text_score": 40.0, "image_score": 36.3, "group_score": 27.0}
    axis: ClassVar[str] = ""

    def __init__(self, path: str | os.PathLike | dict[str, Any] = "facebook/winoground", split: str = "test"):
        self.rows = load_pairs(path, split)

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        return winoground(embed, self.rows)
