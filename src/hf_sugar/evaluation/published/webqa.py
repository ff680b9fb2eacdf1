import base64
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction


_YES_OR_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


class WebQA(Sequence):
    """
    Accuracy on yes-or-no questions of WebQA where the useful image and its caption stand at index 1 to 6 among five
    that do not help. Source of the data: [WebQA](https://huggingface.co/papers/2109.00590).

    Questions of the category `YesNo` with exactly one useful image and at least five others take part (the first five
    in the order of the file); an answer counts by its first word. As a sequence it is the prompts, `pairs` in a row for
    each question, whose images are read when they are asked for.

    Args:
        path (`str` or `os.PathLike`): Folder with `WebQA_train_val.json`, `imgs.tsv` and `imgs.lineidx`.
        split (`str`, *optional*, defaults to `"val"`): Split of the file.
        pairs (`int`, *optional*, defaults to `6`): Images with captions in a prompt.
    """

    paper: ClassVar[dict[str, float]] = {
        f"accuracy@{n}": value for n, value in enumerate((63.8, 60.4, 59.6, 59.2, 60.4, 61.0), 1)
    }
    axis: ClassVar[str] = "index of the useful pair"

    def __init__(self, path: str | os.PathLike, split: str = "val", pairs: int = 6):
        self.images, self.pairs = Path(path) / "imgs.tsv", pairs
        self.images.stat()  # raises where it is missing, as the other two do
        self.offsets = [int(line) for line in (Path(path) / "imgs.lineidx").read_text().split()]
        file = Path(path) / "WebQA_train_val.json"
        self.questions: list[tuple[str, bool, list[tuple[int, str]]]] = []
        self.left_out = 0
        for name, record in json.loads(file.read_text(encoding="utf-8")).items():
            try:
                if record["split"] != split or record["Qcate"] != "YesNo" or not record["img_posFacts"]:
                    continue
                answer = _YES_OR_NO.match(record["A"][0])
                facts = [*record["img_posFacts"], *record["img_negFacts"]][:pairs]
                if answer and len(record["img_posFacts"]) == 1 and len(facts) == pairs:
                    facts = [(int(fact["image_id"]), fact["caption"].strip()) for fact in facts]
                    self.questions.append((record["Q"].strip('"'), answer[1].lower() == "yes", facts))
                else:
                    self.left_out += 1
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"{file}: question {name} has no {error}. Use the file as it is published; the one of the test "
                    "split has no answers."
                ) from error
        if not self.questions:
            raise ValueError(
                f"{file}: no yes-or-no question of the split {split!r} has one useful and {pairs - 1} other images. "
                "Correct `split` (train or val), or lower `pairs`."
            )
        for _, _, facts in self.questions:
            for image_id, _ in facts:
                self._offset(image_id)

    def _offset(self, image_id: int) -> int:
        line = image_id % 10_000_000  # the digits before say which collection the image is of
        if line >= len(self.offsets):
            raise ValueError(
                f"{self.images}: image {image_id} would be line {line}, but `imgs.lineidx` has {len(self.offsets)}. Join "
                "all parts of the archive."
            )
        return self.offsets[line]

    def _image(self, image_id: int) -> bytes:
        with open(self.images, "rb") as file:
            file.seek(self._offset(image_id))
            found, _, content = file.readline().partition(b"\t")
        if found != str(image_id).encode():
            where = f"{self.images}: where image {image_id} should be is {found[:20]!r}"
            raise ValueError(f"{where}. Use the `imgs.lineidx` that belongs to it.")
        return base64.b64decode(content)

    def __len__(self) -> int:
        return len(self.questions) * self.pairs

    def __getitem__(self, number: int) -> dict[str, Any]:
        question, _, (useful, *facts) = self.questions[number // self.pairs]
        facts.insert(number % self.pairs, useful)
        content = []
        for _, caption in facts:
            content += [{"type": "image", "text": None}, {"type": "text", "text": caption}]
        content.append({"type": "text", "text": f"{question}\nAnswer with yes or no."})
        images = [self._image(image_id) for image_id, _ in facts]
        return {"messages": [{"role": "user", "content": content}], "images": images}

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        answers = [_YES_OR_NO.match(answer) for answer in generate(self)]
        truths = [truth for _, truth, _ in self.questions for _ in range(self.pairs)]
        hits = [bool(a) and (a[1].lower() == "yes") == truth for a, truth in zip(answers, truths, strict=True)]
        of_index = {f"accuracy@{n + 1}": Estimate.from_hits(hits[n :: self.pairs]) for n in range(self.pairs)}
        return {**of_index, "questions_left_out": self.left_out}
