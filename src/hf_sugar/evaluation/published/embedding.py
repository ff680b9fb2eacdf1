"""Benchmarks of embedding models: the images of MMEB-V2, and wikiHow-TIIR."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ...data import load_table
from ...inference import in_role
from ..metrics import Estimate, ranks
from ..tasks import EmbedFunction, GenerateFunction, Item, Search, recall
from .base import Benchmark, as_published


# Names of the data, and of the groups that the leaderboard averages.
MMEB_TASKS = {
    "classification": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    "vqa": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA",
    "retrieval": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA FashionIQ Wiki-SS-NQ OVEN EDIS",
    "grounding": "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing",
}
GROUP_OF = {task: group for group, tasks in MMEB_TASKS.items() for task in tasks.split()}


class MMEB(Benchmark):
    """
    The 36 image tasks of MMEB-V2: of about a thousand candidates of its own, each query finds the first. Source:
    [VLM2Vec-V2](https://huggingface.co/papers/2507.04590). `hit@1` of each task, of each group and of all (means over tasks).

    A query or candidate with an image is the image, then the instruction and the text; the instructions of the files
    stand in the text, as in the authors' program, not in a system message.

    Args:
        path (`str` or `os.PathLike`, *optional*, defaults to `"ziyjiang/MMEB_Test_Instruct"`):
            The dataset on the Hub, or a folder of it, with a folder of parquet files for each task.
        image_root (`str` or `os.PathLike`): Folder of the unpacked `image-tasks/mmeb_v1.tar.gz` of `TIGER-Lab/MMEB-V2`.
        tasks (`list[str]`, *optional*): Some of the tasks.
    """

    def __init__(self, image_root, path="ziyjiang/MMEB_Test_Instruct", tasks: list[str] | None = None):
        self.image_root = Path(image_root).resolve(strict=True)  # raises where it is missing
        if unknown := sorted(set(tasks or []) - set(GROUP_OF)):
            raise ValueError(f"There is no task {', '.join(unknown)}. Use some of {', '.join(GROUP_OF)}.")
        self.rows: dict[str, Dataset] = {}
        for task in tasks or GROUP_OF:
            source = str(Path(path) / task) if Path(path).is_dir() else {"path": str(path), "name": task}
            rows = self.rows[task] = load_table(source, "test")
            if missing := {"qry_text", "tgt_text"} - set(rows.column_names):
                raise ValueError(f"{task} has no column {min(missing)}, but {', '.join(rows.column_names)}.")
            files = set()
            for row in rows.select_columns([name for name in rows.column_names if name.endswith("_img_path")]):
                files.update([row.get("qry_img_path"), *(row.get("tgt_img_path") or [])])
            for file in sorted(filter(None, files)):
                (self.image_root / file).stat()

    def _item(self, instruction: str | None, text: str, image: str | None) -> Item:
        text = " ".join(f"{instruction or ''} {text}".replace("<|image_1|>", " ").split())
        parts = [self.image_root / image] if image else []
        return [*parts, text] if text else parts

    def _hits(self, rows: Dataset, embed: EmbedFunction) -> np.ndarray:
        """1 for each query whose candidate is closer than all others; equal candidates are one."""
        queries, numbers, candidates = [], {}, []
        for row in rows:
            queries.append(self._item(row.get("qry_inst"), row["qry_text"], row.get("qry_img_path")))
            images = row.get("tgt_img_path") or [None] * len(row["tgt_text"])
            # the instruction is about an image; a candidate that is a text has none
            pairs = zip(row["tgt_text"], images, strict=True)
            keys = [(row.get("tgt_inst") if image else None, text, image) for text, image in pairs]
            candidates.append([numbers.setdefault(key, len(numbers)) for key in keys])
        query_embeddings = in_role(embed, "query")(queries)
        embeddings = in_role(embed, "document")([self._item(*key) for key in numbers])
        hits = np.zeros(len(queries))
        for n, (first, *others) in enumerate(candidates):
            scores = embeddings[[first, *(set(others) - {first})]] @ query_embeddings[n]
            hits[n] = ranks(scores[None], [0])[0] == 1
        return hits

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        hits = {task: self._hits(rows, embed) for task, rows in self.rows.items()}
        results = {f"hit@1 ({task})": Estimate.from_hits(values) for task, values in hits.items()}
        for group in [*MMEB_TASKS, "all"]:
            values = [hits[task] for task in hits if group in (GROUP_OF[task], "all")]
            if values:  # weighted, where tasks differ in size
                mean = sum(map(len, values)) / len(values)
                results[f"hit@1 {group}"] = Estimate.from_hits(np.concatenate([v * mean / len(v) for v in values]))
        return results


class WikiHowTIIR(Benchmark):
    """
    wikiHow-TIIR: queries of interleaved texts and images find the tutorial, interleaved too, that answers them. Source:
    [Towards Text-Image Interleaved Retrieval](https://huggingface.co/papers/2502.12799).

    Args:
        queries, documents, qrels (`str` or `os.PathLike`):
            JSON lines as the authors' program reads them: `{"qid", "data"}`, `{"id", "data"}` and `{"qid", "did"}`. `data` is a
            list of texts and of names of images, which end in `.png`. The documents of `qrels` are the candidates, those
            whose `qid` is null too.
        image_root (`str` or `os.PathLike`): Folder that the names of the images start from.
    """

    axis = "candidates looked at"

    def __init__(self, queries, documents, qrels, image_root: str | os.PathLike):
        root = Path(image_root)
        pairs = [(row["qid"], row["did"]) for row in _lines(qrels, ("qid", "did")) if row["did"] is not None]
        items = []
        for file, key, wanted in (
            (queries, "qid", {qid for qid, _ in pairs}),
            (documents, "id", {did for _, did in pairs}),
        ):
            found = {row[key]: row["data"] for row in _lines(file, (key, "data")) if row[key] in wanted}
            if missing := wanted - set(found) - {None}:
                raise ValueError(f"{file} has no {key} {next(iter(missing))!r}, which {qrels} names.")
            items.append({name: _interleaved(data, root) for name, data in found.items()})
        self.queries, documents_of = items
        self.documents = list(documents_of.values())
        numbers = {name: n for n, name in enumerate(documents_of)}
        self.relevant: dict[Any, set[int]] = {qid: set() for qid in self.queries}
        for qid, did in pairs:
            if qid is not None:
                self.relevant[qid].add(numbers[did])

    def run(self, embed: EmbedFunction, generate: GenerateFunction) -> dict[str, Estimate | int]:
        search = Search(list(self.queries.values()), self.documents, list(self.relevant.values()))
        return {**recall(embed, {"document": search}), "candidates": len(self.documents)}


def _lines(path: str | os.PathLike, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            with as_published(f"{path}, line {number}"):
                row = json.loads(line)
                yield {key: row[key] for key in keys}


def _interleaved(data: list[str], root: Path) -> Item:
    # `resolve` raises where an image is missing
    return [(root / part).resolve(strict=True) if part.endswith(".png") else part for part in data if part.strip()]
