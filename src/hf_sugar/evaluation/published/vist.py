import json
import os
from pathlib import Path
from typing import ClassVar

from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction, Search, recall


class Vist:
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

    paper: ClassVar[dict[str, float]] = {
        f"{name}_recall@{k}": value
        for name, values in (
            ("5c", (10.1, 26.3, 36.2)),
            ("5c_unseen", (11.0, 27.3, 37.0)),
            ("5c+4i_unseen", (21.9, 46.7, 59.2)),
        )
        for k, value in zip((1, 5, 10), values, strict=True)
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
                number, photograph = int(step["worker_arranged_photo_order"]), str(step["photo_flickr_id"])
                stories.setdefault(str(step["story_id"]), []).append((number, step["text"], photograph))
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
        self.stories = [[(text, photo) for _, text, photo in steps] for steps in whole]
        self.left_out = len(stories) - len(whole)
        # those of the stories left out are candidates too
        used = dict.fromkeys(photo for steps in stories.values() for *_, photo in steps)
        self.candidates = {photo: photographs[photo] for photo in used if photo in photographs}

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        files, numbers = list(self.candidates.values()), {photo: n for n, photo in enumerate(self.candidates)}
        photos = [[numbers[photo] for _, photo in story] for story in self.stories]
        captions = [[text for text, _ in story] for story in self.stories]
        both = [
            [part for text, photo in story for part in (text, self.candidates[photo])][:-1] for story in self.stories
        ]
        targets = [story[-1] for story in photos]  # several stories are told of the same photographs
        searches = {}
        for name, queries in (("5c", captions), ("5c+4i", both)):
            searches[name] = Search(queries, files, [{target} for target in targets], groups=targets)
            searches[f"{name}_unseen"] = searches[name]._replace(excluded=[set(story[:-1]) for story in photos])
        return {**recall(embed, searches), "candidates": len(files), "stories_left_out": self.left_out}
