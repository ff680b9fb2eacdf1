"""DEMON: instructions that interleave pictures and texts."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import Estimate
from ..tasks import EmbedFunction, GenerateFunction
from .base import Benchmark, as_published


# The tasks and their datasets, by the names of the folders.
TASKS = {
    "multimodal_dialogue_rouge_l": "MMCoQA ALFRED",
    "visual_storytelling_rouge_l": "AESOP DiDeMoSV FlintstonesSV PororoSV VIST",
    "visual_relation_inference_rouge_l": "IEdit Spot-the-Diff Birds-to-Words CLEVR-Change",
    "multimodal_cloze_accuracy": "COMICS_Dialogue COMICS_Panel RecipeQA_VisualCloze RecipeQA_TextCloze",
    "knowledge_grounded_qa_accuracy": "WebQA TQA MultiModalQA",
    "text_rich_images_qa_accuracy": "SlideVQA OCR-VQA DocVQA",
    "multi_image_reasoning_accuracy": "Fashion200K NLVR2 nuscenes VizWiz MIT-States_StateCoherence "
    "MIT-States_PropertyCoherence VISION RecipeQA_ImageCoherence",
}
# of which the options are pictures, "Image A" to "Image D"
PICTURES = ("COMICS_Panel", "RecipeQA_VisualCloze", "RecipeQA_ImageCoherence")


def plain(text: str) -> str:
    """A text as the benchmark compares it: in lower case, and without punctuation by the rules of VQA's evaluation."""
    text = result = re.sub(r"[\n\t]", " ", text).strip()
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        removed = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        result = result.replace(mark, "" if removed else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32).strip("'").strip('"').strip().lower()


def rouge_l(answer: str, truth: str) -> float:
    """ROUGE-L F as the package `rouge` 1.0.1 has it: of all sentences, and of sets of words."""
    found, expected = ([" ".join(s.split()).split(" ") for s in text.split(".") if s] for text in (answer, truth))
    if not found or not expected:
        return 0.0
    common = set().union(*(_common_words(x, y) for x in expected for y in found))
    recall, precision = (len(common) / len(set().union(*sentences)) for sentences in (expected, found))
    return 2 * precision * recall / (precision + recall + 1e-8)


def _common_words(x: list[str], y: list[str]) -> frozenset[str]:
    """Of the longest common subsequence."""
    row: list[tuple[int, frozenset[str]]] = [(0, frozenset())] * (len(y) + 1)
    for word in x:
        above, row = row, row[:1]
        for j, other in enumerate(y):
            longer = above[j + 1] if above[j + 1][0] > row[j][0] else row[j]
            row.append((above[j][0] + 1, above[j][1] | {word}) if word == other else longer)
    return row[-1][1]


def chosen(answer: str, options: list[str]) -> str:
    """The option that is nearest to an answer by TF-IDF, as scikit-learn has it; the answer, if there are no words."""
    counts = [Counter(re.findall(r"\b\w\w+\b", text)) for text in (answer, *options)]
    words = sorted(set().union(*counts))
    if not words:
        return answer
    weights = np.array([[count[word] for word in words] for count in counts], dtype=float)
    weights *= np.log((1 + len(counts)) / (1 + (weights > 0).sum(axis=0))) + 1
    weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
    return options[int(np.argmax(weights[1:] @ weights[0]))]


class Demon(Benchmark):
    """
    DEMON-Core, the seven tasks of [Fine-tuning Multimodal LLMs to Follow Zero-shot Demonstrative
    Instructions](https://huggingface.co/papers/2308.04152), with the prompts and rules of its programs: ROUGE-L; of options
    the nearest by TF-IDF; of pictures the letter. A task is the mean of its datasets, and is measured if all are there.

    Args:
        path (`str` or `os.PathLike`): Folder with `<dataset>/core/core.json` and `<dataset>/core/images`.
        max_images (`int`, *optional*): Samples with more are left out, and counted.
    """

    paper = dict(zip(TASKS, (51.8, 34.3, 32.3, 16.8, 64.4, 65.9, 51.7)))

    def __init__(self, path: str | os.PathLike, max_images: int | None = None):
        self.prompts: list[dict[str, Any]] = []
        self.truths: list[tuple[str, str, list[str]]] = []  # dataset, answer, options
        self.left_out = 0
        for task, dataset in [(task, dataset) for task, datasets in TASKS.items() for dataset in datasets.split()]:
            file = Path(path, dataset, "core", "core.json")
            content = json.loads(file.read_text(encoding="utf-8")) if file.parent.is_dir() else {"data": []}
            for n, sample in enumerate(content["data"]):
                with as_published(f"{file}: data[{n}]"):
                    row = _prompt(sample, content["metadata"]["task_instruction"], file.parent / "images")
                    truth, options = plain(str(sample["response"])), []
                    if task.endswith("accuracy") and dataset not in PICTURES:
                        options = [plain(str(option)) for option in sample["task_instance"]["choice_list"]]
                        options.index(truth)
                if max_images is None or len(row["images"]) <= max_images:
                    self.prompts.append({**row, "id": f"{dataset}/{n}"})
                    self.truths.append((dataset, truth, options))
                else:
                    self.left_out += 1
        if not self.prompts:
            raise ValueError(f"{path} has no folder of a dataset, such as {path}/AESOP/core. Unpack some there.")

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        scores: dict[str, list[float]] = {}
        for (dataset, truth, options), answer in zip(self.truths, map(plain, generate(self.prompts)), strict=True):
            score = chosen(answer, options) == truth if options else rouge_l(answer, truth)
            if dataset in PICTURES:
                score = answer[:7] == truth[:7] and sum(f"image {letter}" in answer for letter in "abcd") < 2
            scores.setdefault(dataset, []).append(float(score))
        results = {}
        for task, datasets in TASKS.items():
            found = {dataset: scores[dataset] for dataset in datasets.split() if dataset in scores}
            total = sum(map(len, found.values()))
            if len(found) == len(datasets.split()):  # each dataset counts alike
                means = [np.multiply(values, total / len(values) / len(found)) for values in found.values()]
                results[task] = Estimate.from_hits(np.concatenate(means))
            results |= {f"{task} ({dataset})": Estimate.from_hits(values) for dataset, values in found.items()}
        return {**results, "samples_left_out": self.left_out}


def _prompt(sample: dict[str, Any], instructions: list[str], folder: Path) -> dict[str, Any]:
    instance = sample["task_instance"]
    text = instructions[sample["task_instruction_id"]] + instance["context"]
    if "choice_list" in instance:
        text += "Choice list:['" + "', '".join(map(str, instance["choice_list"])) + "']. Your answer is:"
    content, images = [], []
    for n, part in enumerate(re.split(r"\{(?:image|table)#([1-9]\d*)\}", text)):
        if n % 2:
            images.append(folder / instance["images_path"][int(part) - 1])
            images[-1].stat()  # raises where it is missing
            content.append({"type": "image", "text": None})
        elif part.strip():
            content.append({"type": "text", "text": part})
    return {"messages": [{"role": "user", "content": content}], "images": images}
