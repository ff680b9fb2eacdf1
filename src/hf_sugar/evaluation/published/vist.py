import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..metrics import Estimate, recall_at_k
from ..tasks import EmbedFunction, GenerateFunction


class Vist:
    """
    Retrieval of the last photograph of the stories of VIST among the photographs of all stories: given the five
    captions (`5c`), or these with the four photographs before (`5c+4i`). For the `unseen` figures the four photographs
    are no candidates. This is the protocol of [FROMAGe](https://huggingface.co/papers/2301.13823) (its
    `evals/eval_vist_retrieval.py`, on the validation split): captions are the field `text`, photographs are told apart
    by their number, and stories of which a photograph is missing are left out.

    Args:
        path (`str` or `os.PathLike`):
            `val.story-in-sequence.json`.
        image_root (`str` or `os.PathLike`):
            Folder of the photographs, which are named by their number (`<photo_flickr_id>.jpg`, or another suffix).

    Raises:
        `FileNotFoundError`: if the file or the folder does not exist.
        `ValueError`: if an annotation is malformed, or no story has all of its photographs.
    """

    paper: ClassVar[dict[str, float]] = {
        "5c_recall@1": 10.1,
        "5c_recall@5": 26.3,
        "5c_recall@10": 36.2,
        "5c_unseen_recall@1": 11.0,
        "5c_unseen_recall@5": 27.3,
        "5c_unseen_recall@10": 37.0,
        "5c+4i_unseen_recall@1": 21.9,
        "5c+4i_unseen_recall@5": 46.7,
        "5c+4i_unseen_recall@10": 59.2,
    }
    axis: ClassVar[str] = "candidates looked at"

    def __init__(self, path: str | os.PathLike, image_root: str | os.PathLike):
        photographs = {file.stem: file for file in Path(image_root).iterdir()}
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        annotations = data.get("annotations") if isinstance(data, dict) else None
        if not annotations:
            raise ValueError(f"{path} has no `annotations`. Use the file of stories in sequence (SIS).")
        stories: dict[str, list[tuple[int, str, str]]] = {}
        for n, annotation in enumerate(annotations):
            try:
                [step] = annotation
                photograph = str(step["photo_flickr_id"])
                stories.setdefault(str(step["story_id"]), []).append(
                    (int(step["worker_arranged_photo_order"]), step["text"], photograph)
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: annotations[{n}] is not a list of one step with story_id, worker_arranged_photo_order, "
                    "photo_flickr_id and text. Use the file of stories in sequence (SIS) as it is published."
                ) from error
        whole = [sorted(steps) for steps in stories.values() if all(photo in photographs for *_, photo in steps)]
        if not whole:
            raise ValueError(
                f"{path}: of none of the {len(stories)} stories all photographs are in {image_root}. Put them there, "
                "named <photo_flickr_id>.jpg."
            )
        self.captions = [[text for _, text, _ in steps] for steps in whole]
        self.photographs = [[photo for *_, photo in steps] for steps in whole]
        self.left_out = len(stories) - len(whole)
        # those of the stories left out are candidates too
        used = dict.fromkeys(photo for steps in stories.values() for *_, photo in steps)
        self.candidates = {photo: photographs[photo] for photo in used if photo in photographs}

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        numbers = {photo: n for n, photo in enumerate(self.candidates)}
        stories = [[numbers[photo] for photo in story] for story in self.photographs]
        targets = [story[-1] for story in stories]
        embeddings = embed(list(self.candidates.values()))
        interleaved: list[list[Any]] = []
        for captions, photos in zip(self.captions, self.photographs, strict=True):
            parts = zip(captions, [self.candidates[photo] for photo in photos], strict=True)
            interleaved.append([part for pair in parts for part in pair][:-1])
        results: dict[str, Estimate | int] = {}
        for name, queries in (("5c", self.captions), ("5c+4i", interleaved)):
            scores = embed(queries) @ embeddings.T
            unseen = scores.copy()
            for row, story in zip(unseen, stories, strict=True):
                row[story[:-1]] = -np.inf
            for suffix, values in (("", scores), ("_unseen", unseen)):
                # several stories are told of the same photographs
                results |= {
                    f"{name}{suffix}_recall@{k}": Estimate.from_hits(hits, groups=targets)
                    for k, hits in recall_at_k(values, targets).items()
                }
        return {**results, "candidates": len(numbers), "stories_left_out": self.left_out}
