"""Benchmarks of answers: MMVP, WebQA, and what retrieval adds."""

import base64
import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data import load_data
from ...inference import require_sizes
from ...models.rows_sugar import row_name
from ...retrieval.index import SugarIndex
from ...retrieval.rag import rag_generator
from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction, exact_match, winoground
from .base import Benchmark, as_published


QUESTION = "Which statement describes the image?\nA. {}\nB. {}\nAnswer with the option's letter from the given choices directly."
_YES_OR_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


class MMVP(Benchmark):
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

    paper = {"qa_pair_accuracy": 57.8}

    def __init__(self, path: str | os.PathLike):
        file = Path(path) / "Questions.csv"
        images = {image.stem: image for image in Path(path).rglob("*.jpg")}
        with open(file, encoding="utf-8-sig", newline="") as stream:
            _, *lines = csv.reader(stream)
        for number, line in enumerate(lines, 2):
            if len(line) != 3 or line[0] not in images:
                what = "a number, a pattern and a statement, or there is no image <number>.jpg"
                raise ValueError(f"{file}, line {number}: {line} is not {what} below {path}.")
        if not lines or len(lines) % 2:
            raise ValueError(f"{file} has {len(lines)} statements. Two lines in a row are a pair; restore the file.")
        self.patterns = np.array([pattern for _, pattern, _ in lines[::2]])
        pairs = list(zip(lines[::2], lines[1::2], strict=True))
        self.statements = [[statement for *_, statement in pair] for pair in pairs]
        self.images = [[images[number] for number, *_ in pair] for pair in pairs]

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


class WebQA(Benchmark, Sequence):
    """
    Accuracy on yes-or-no questions of WebQA where the useful image and its caption stand at index 1 to 6 among five
    that do not help. Source of the data: [WebQA](https://huggingface.co/papers/2109.00590).

    Questions of the category `YesNo` with exactly one useful image and at least five others (the first five of the file)
    take part; an answer counts by its first word. As a sequence it is the prompts, `pairs` in a row for each question.

    Args:
        path (`str` or `os.PathLike`): Folder with `WebQA_train_val.json`, `imgs.tsv` and `imgs.lineidx`.
        split (`str`, *optional*, defaults to `"val"`): Split of the file.
        pairs (`int`, *optional*, defaults to `6`): Images with captions in a prompt.
    """

    paper = {f"accuracy@{n}": value for n, value in enumerate((63.8, 60.4, 59.6, 59.2, 60.4, 61.0), 1)}
    axis = "index of the useful pair"

    def __init__(self, path: str | os.PathLike, split: str = "val", pairs: int = 6):
        self.images, self.pairs = Path(path) / "imgs.tsv", pairs
        self.images.stat()  # raises where it is missing, as the other two do
        self.offsets = [int(line) for line in (Path(path) / "imgs.lineidx").read_text().split()]
        file = Path(path) / "WebQA_train_val.json"
        self.questions: list[tuple[str, bool, list[tuple[int, str]]]] = []
        self.left_out = 0
        for name, record in json.loads(file.read_text(encoding="utf-8")).items():
            with as_published(f"{file}: question {name}"):
                if record["split"] != split or record["Qcate"] != "YesNo" or not record["img_posFacts"]:
                    continue
                answer = _YES_OR_NO.match(record["A"][0])
                facts = [*record["img_posFacts"], *record["img_negFacts"]][:pairs]
                facts = [(int(fact["image_id"]), fact["caption"].strip()) for fact in facts]
                if answer and len(record["img_posFacts"]) == 1 and len(facts) == pairs:
                    self.questions.append((record["Q"].strip('"'), answer[1].lower() == "yes", facts))
                else:
                    self.left_out += 1
        if not self.questions:
            missing = f"no yes-or-no question of the split {split!r} has one useful and {pairs - 1} other images"
            raise ValueError(f"{file}: {missing}. Correct `split` (train or val), or lower `pairs`.")
        used = [image_id for *_, facts in self.questions for image_id, _ in facts]
        last = max(used, key=self._line)
        if self._line(last) >= len(self.offsets):
            problem = f"image {last} would be line {self._line(last)}, but `imgs.lineidx` has {len(self.offsets)}"
            raise ValueError(f"{self.images}: {problem}. Join all parts of the archive.")

    @staticmethod
    def _line(image_id: int) -> int:
        return image_id % 10_000_000  # the digits before say which collection the image is of

    def _image(self, image_id: int) -> bytes:
        with open(self.images, "rb") as file:
            file.seek(self.offsets[self._line(image_id)])
            found, _, content = file.readline().partition(b"\t")
        if found != str(image_id).encode():
            problem = f"where image {image_id} should be is {found[:20]!r}. Use the `imgs.lineidx` that belongs to it."
            raise ValueError(f"{self.images}: {problem}")
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


class RagGain(Benchmark):
    """
    What retrieval adds: exact match of the answers with the most similar answered questions of a knowledge base before
    each question, without them, and the difference. Rows of the knowledge base that ask the same about the same pictures
    are not shown, so that a set can be its own knowledge base.

    Args:
        questions (source): Conversations that end with an answer, as [`hf_sugar.data.load_data`] takes them.
        knowledge (source): Answered questions to search, the same way.
        k (`int`, *optional*, defaults to `1`): Examples before a question.
        split (`str`, *optional*, defaults to `"test"`): Split of sources that have several and do not name one.
    """

    def __init__(self, questions: Any, knowledge: Any, k: int = 1, split: str = "test"):
        require_sizes(k=k)
        self.questions, self.knowledge, self.k = load_data(questions, split), load_data(knowledge, split), k
        for n, row in enumerate(self.questions.remove_columns("images")):
            if not row["messages"] or row["messages"][-1]["role"] != "assistant":
                raise ValueError(f"{row_name(row, n)} of `questions` does not end with an answer. Drop it.")

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        index = SugarIndex.build(self.knowledge, embed, by="question", progress=True)
        results, hits = {}, {}
        for name, answer in (("without", generate), ("with", rag_generator(generate, index, self.k))):
            found = exact_match(answer, self.questions)
            results[f"exact_match_{name}_retrieval"] = found["exact_match"]
            hits[name] = np.ones(len(self.questions))
            hits[name][[miss["index"] for miss in found["misses"]]] = 0
        gain = Estimate.from_hits(hits["with"] - hits["without"])
        return {**results, "gain": gain, "knowledge_rows": len(self.knowledge)}
