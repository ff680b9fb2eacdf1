"""Benchmarks of embeddings alone: MSCOCO, VIST and Winoground."""

import json
import os
from pathlib import Path
from typing import Any

from ...data import captions_by_image, load_data
from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction, Search, image_text_retrieval, load_pairs, recall, winoground
from .base import Benchmark, as_published


class Coco(Benchmark):
    """
    Image-caption retrieval both ways on MSCOCO 5k, the test images of Karpathy's split. The first five captions of each
    image take part, as is usual; each finds its own image only, and an image is found by any of its five.

    Args:
        path (`str` or `os.PathLike`): `dataset_coco.json` of the split (or `dataset_flickr30k.json`, for Flickr30k).
        image_root (`str` or `os.PathLike`, *optional*): Folder that holds `val2014`. Defaults to the folder of the file.
        split (`str`, *optional*, defaults to `"test"`): Split of the file.
    """

    paper = {
        **{f"text_to_image_recall@{k}": value for k, value in ((1, 22.0), (5, 49.1), (10, 63.1))},
        **{f"image_to_text_recall@{k}": value for k, value in ((1, 25.6), (5, 53.6), (10, 66.7))},
    }
    axis = "candidates looked at"
    field = "image_text_data"

    def __init__(self, path: str | os.PathLike, image_root: str | os.PathLike | None = None, split: str = "test"):
        source = {"path": str(path), "format": "coco", "image_root": image_root}
        self.images, captions = captions_by_image(load_data(source, split))
        self.captions = [texts[:5] for texts in captions]

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        return image_text_retrieval(embed, self.images, self.captions, match_copies=False)


class Vist(Benchmark):
    """
    Retrieval of the last photograph of the stories of VIST among the photographs of all stories: given the five
    captions (`5c`), or these with the four photographs before (`5c+4i`). For the `unseen` figures the four photographs
    are no candidates. This is the protocol of [FROMAGe](https://huggingface.co/papers/2301.13823) (its
    `evals/eval_vist_retrieval.py`, on the validation split): captions are the field `text`, photographs are told apart
    by their number, and stories of which a photograph is missing are left out.

    Args:
        path (`str` or `os.PathLike`): `val.story-in-sequence.json`.
        image_root (`str` or `os.PathLike`):
            Folder of the photographs, which are named by their number (`<photo_flickr_id>.jpg`, or another suffix).
    """

    paper = {
        **{f"5c_recall@{k}": value for k, value in ((1, 10.1), (5, 26.3), (10, 36.2))},
        **{f"5c_unseen_recall@{k}": value for k, value in ((1, 11.0), (5, 27.3), (10, 37.0))},
        **{f"5c+4i_unseen_recall@{k}": value for k, value in ((1, 21.9), (5, 46.7), (10, 59.2))},
    }
    axis = "candidates looked at"
    field = "interleaved_data"

    def __init__(self, path: str | os.PathLike, image_root: str | os.PathLike):
        photographs = {file.stem: file for file in Path(image_root).iterdir()}
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        annotations = data.get("annotations") if isinstance(data, dict) else None
        if not annotations:
            raise ValueError(f"{path} has no `annotations`. Use the file of stories in sequence (SIS).")
        stories: dict[str, list[tuple[int, str, str]]] = {}
        for n, annotation in enumerate(annotations):
            with as_published(f"{path}: annotations[{n}]"):
                [step] = annotation
                number, photograph = int(step["worker_arranged_photo_order"]), str(step["photo_flickr_id"])
                stories.setdefault(str(step["story_id"]), []).append((number, step["text"], photograph))
        whole = [sorted(steps) for steps in stories.values() if all(photo in photographs for *_, photo in steps)]
        if not whole:
            raise ValueError(f"{path}: of none of the {len(stories)} stories all photographs are in {image_root}.")
        self.stories = [[(text, photo) for _, text, photo in steps] for steps in whole]
        self.left_out = len(stories) - len(whole)
        # those of the stories left out are candidates too
        used = dict.fromkeys(photo for steps in stories.values() for *_, photo in steps)
        self.candidates = {photo: photographs[photo] for photo in used if photo in photographs}

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        files, numbers = list(self.candidates.values()), {photo: n for n, photo in enumerate(self.candidates)}
        photos = [[numbers[photo] for _, photo in story] for story in self.stories]
        captions = [[text for text, _ in story] for story in self.stories]
        both = [[part for text, photo in story for part in (text, self.candidates[photo])] for story in self.stories]
        targets = [story[-1] for story in photos]  # several stories are told of the same photographs
        searches = {}
        for name, queries in (("5c", captions), ("5c+4i", [story[:-1] for story in both])):
            searches[name] = Search(queries, files, [{target} for target in targets], groups=targets)
            searches[f"{name}_unseen"] = searches[name]._replace(excluded=[set(story[:-1]) for story in photos])
        return {**recall(embed, searches), "candidates": len(files), "stories_left_out": self.left_out}


class Winoground(Benchmark):
    """
    Winoground, see [`~evaluation.tasks.winoground`].

    Args:
        path (`str` or `os.PathLike` or `dict`, *optional*, defaults to `"facebook/winoground"`):
            The dataset, as [`hf_sugar.data.load_table`] takes it. The one on the Hub asks for an agreement.
        split (`str`, *optional*, defaults to `"test"`): Split, where there are several.
    """

    paper = {"text_score": 40.0, "image_score": 36.3, "group_score": 27.0}
    field = "winoground_data"

    def __init__(self, path: str | os.PathLike | dict[str, Any] = "facebook/winoground", split: str = "test"):
        self.rows = load_pairs(path, split)

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        return winoground(embed, self.rows)
