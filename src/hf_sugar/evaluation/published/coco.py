import os
from typing import ClassVar

from ...data import captions_by_image, load_data
from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction, image_text_retrieval


class Coco:
    """
    Image-caption retrieval both ways on MSCOCO 5k, the test images of Karpathy's split. The first five captions of each
    image take part, as is usual; each finds its own image only, and an image is found by any of its five.

    Args:
        path (`str` or `os.PathLike`): `dataset_coco.json` of the split (or `dataset_flickr30k.json`, for Flickr30k).
        image_root (`str` or `os.PathLike`, *optional*): Folder that holds `val2014`. Defaults to the folder of the file.
        split (`str`, *optional*, defaults to `"test"`): Split of the file.
    """

    paper: ClassVar[dict[str, float]] = {
        **{f"text_to_image_recall@{k}": value for k, value in ((1, 22.0), (5, 49.1), (10, 63.1))},
        **{f"image_to_text_recall@{k}": value for k, value in ((1, 25.6), (5, 53.6), (10, 66.7))},
    }
    axis: ClassVar[str] = "candidates looked at"

    def __init__(self, path: str | os.PathLike, image_root: str | os.PathLike | None = None, split: str = "test"):
        source = {"path": str(path), "format": "coco", "image_root": image_root}
        self.images, captions = captions_by_image(load_data(source, split))
        self.captions = [texts[:5] for texts in captions]

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        return image_text_retrieval(embed, self.images, self.captions, match_copies=False)
