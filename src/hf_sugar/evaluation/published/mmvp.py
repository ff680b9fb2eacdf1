import csv
import os
import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction, winoground


QUESTION = "Which statement describes the image?\nA. {}\nB. {}\nAnswer with the option's letter from the given choices directly."


class MMVP:
    """
    MMVP-VLM: pairs of images that CLIP confuses, each with its statement, of nine visual patterns. Source: [Eyes Wide
    Shut?](https://huggingface.co/papers/2401.06209).

    `matching_pair_accuracy` is the published measure: a pair counts if both statements are more similar to their own
    image. `qa_pair_accuracy` asks for each image which of the two statements describes it; a pair counts if both answers
    are right (a quarter by chance, and no pair for one who always gives the same letter). `qa_accuracy` counts images.

    Args:
        path (`str` or `os.PathLike`):
            Folder with `Questions.csv` (number, pattern and statement; two lines in a row are a pair) and, in any folder
            below it, the images `<number>.jpg`.
    """

    paper: ClassVar[dict[str, float]] = {"qa_pair_accuracy": 57.8}
    axis: ClassVar[str] = ""

    def __init__(self, path: str | os.PathLike):
        file = Path(path) / "Questions.csv"
        images = {image.stem: image for image in Path(path).rglob("*.jpg")}
        with open(file, encoding="utf-8-sig", newline="") as stream:
            _, *lines = csv.reader(stream)
        for number, line in enumerate(lines, 2):
            if len(line) != 3 or line[0] not in images:
                raise ValueError(
                    f"{file}, line {number}: {line} is not a number, a pattern and a statement, or there is no image "
                    f"<number>.jpg below {path}."
                )
        if not lines or len(lines) % 2:
            raise ValueError(f"{file} has {len(lines)} statements. Two lines in a row are a pair; restore the file.")
        self.patterns = np.array([pattern for _, pattern, _ in lines[::2]])
        self.statements = [(first[2], second[2]) for first, second in zip(lines[::2], lines[1::2], strict=True)]
        self.images = [
            (images[first[0]], images[second[0]]) for first, second in zip(lines[::2], lines[1::2], strict=True)
        ]

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        rows, prompts = [], []
        for statements, pair in zip(self.statements, self.images, strict=True):
            captions = {f"caption_{n}": f"a photo of {statement}" for n, statement in enumerate(statements)}
            rows.append({**captions, "image_0": pair[0], "image_1": pair[1]})
            text = {"type": "text", "text": QUESTION.format(*statements)}
            message = {"role": "user", "content": [{"type": "image", "text": None}, text]}
            prompts += [{"messages": [message], "images": [image]} for image in pair]
        letters = [re.match(r"\W*([AB])\b", answer) for answer in generate(prompts)]
        right = np.array([letter is not None and letter[1] == "AB"[n % 2] for n, letter in enumerate(letters)])
        pairs = right.reshape(-1, 2).all(axis=1)
        of_pattern = {p: Estimate.from_hits(pairs[self.patterns == p]) for p in dict.fromkeys(self.patterns.tolist())}
        return {
            "matching_pair_accuracy": winoground(embed, rows)["image_score"],
            "qa_pair_accuracy": Estimate.from_hits(pairs),
            "qa_accuracy": Estimate.from_hits(right, groups=np.arange(len(right)) // 2),
            **{f"qa_pair_accuracy ({pattern})": accuracy for pattern, accuracy in of_pattern.items()},
        }
