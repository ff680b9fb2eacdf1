"""MMEB-V2 and wikiHow-TIIR, on small files of the published layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from rows import mmeb, wikihow_tiir
from test_published import embed, no_answers

from hf_sugar.evaluation import load_benchmarks


PICTURES = [tiny.image(n) for n in range(7)]


def test_mmeb(tmp_path, monkeypatch):
    settings = mmeb(tmp_path, PICTURES[:4])
    benchmark = load_benchmarks({"mmeb": settings})["mmeb"]
    asked = []

    def seen(items):
        asked.extend(items)
        return embed(items)

    found = benchmark.run(seen, no_answers)

    def score(query, candidate):
        return float(embed([query])[0] @ embed([candidate])[0])

    def hit(query, first, *others):
        return all(score(query, first) > score(query, other) for other in others)

    def picture(n):
        return tmp_path / "MMEB" / "images" / f"{n}.jpg"

    what, shown = "Identify the object.", "Represent the given image."
    labels = (["bird", "car", "dog"], ["car", "bird", "dog"], ["dog", "bird"])  # the same candidate twice is one
    hits = {
        "VOC2007": [hit([picture(n), what], *names) for n, names in enumerate(labels)],
        "MSCOCO_t2i": [
            hit(f"Find the picture. a caption {n}", *([picture((n + k) % 4), shown] for k in range(3)))
            for n in range(4)
        ],
        "EDIS": [
            hit(
                f"Find the news. news {n}",
                [picture(n), f"{shown} headline {n}"],
                [picture(n), f"{shown} headline"],
                [picture(3), f"{shown} another"],
            )
            for n in range(2)
        ],
        "CIRR": [hit([picture(0), f"{what} but red"], [picture(1), shown], [picture(2), shown])],
    }
    means = {task: 100 * np.mean(values) for task, values in hits.items()}
    assert 0 < np.mean(list(means.values())) < 100
    expected = {f"hit@1 ({task})": mean for task, mean in means.items()}
    expected["hit@1 classification"] = means["VOC2007"]
    expected["hit@1 retrieval"] = np.mean([means["MSCOCO_t2i"], means["EDIS"], means["CIRR"]])
    expected["hit@1 all"] = np.mean(list(means.values()))
    assert {name: value.value for name, value in found.items()} == pytest.approx(expected)
    assert [picture(0), f"{what} but red"] in asked and ["bird"] in asked
    roles = []
    monkeypatch.setattr("hf_sugar.evaluation.published.embedding.in_role", lambda e, role: roles.append(role) or e)
    # nothing is right by being equal to all others
    constant = benchmark.run(lambda items: np.ones((len(items), 2)), no_answers)
    assert constant["hit@1 all"].value == 0 and roles == ["query", "document"] * len(hits)


def test_wikihow_tiir(tmp_path):
    benchmark = load_benchmarks({"wikihow_tiir": wikihow_tiir(tmp_path / "tiir", PICTURES)})["wikihow_tiir"]
    folder = tmp_path / "tiir"
    queries = embed([[f"How do I do {n}?", folder / f"{n}.png", "As here."] for n in range(3)])
    steps = [[f"Step {n}.", folder / f"{n}.png", f"Step {n + 1}.", folder / f"{n + 1}.png"] for n in range(5)]
    ranked = np.argsort(-queries @ embed(steps).T, axis=1)
    found = benchmark.run(embed, no_answers)
    assert found["candidates"] == 5
    hits = {k: [n in ranked[n][:k] for n in range(3)] for k in (1, 5)}
    assert {k: found[f"document_recall@{k}"].value for k in hits} == pytest.approx(
        {k: 100 * np.mean(v) for k, v in hits.items()}
    )


def test_what_is_missing_is_named(tmp_path):
    settings = mmeb(tmp_path / "mmeb", PICTURES[:4])
    for change, message in (
        ({"tasks": ["MSCOCO", "COCO"]}, "no task COCO. Use some of ImageNet-1K"),
        ({"image_root": str(tmp_path / "no")}, "No such file or directory: .*no"),
        ({"image_root": str(tmp_path)}, "No such file or directory: .*images/0.jpg"),
        ({"tasks": None}, "ImageNet-1K.* does not exist"),
    ):
        with pytest.raises(ValueError, match=f"`benchmarks.mmeb` .*{message}"):
            load_benchmarks({"mmeb": {**settings, **change}})
    settings = wikihow_tiir(tmp_path / "tiir", PICTURES)
    for name, line, message in (
        ("qrels", {"qid": "q9", "did": 1}, "queries.jsonl has no qid 'q9', which .*qrels.jsonl names"),
        ("qrels", {"qid": "q0", "did": 9}, "documents.jsonl has no id 9"),
        ("queries", {"id": 1, "data": []}, "queries.jsonl, line 4 is not as published .KeyError: 'qid'"),
        ("documents", {"id": 0, "data": ["9.png"]}, "No such file or directory: .*9.png"),
        ("documents", "{", "documents.jsonl, line 7 is not as published .JSON"),
    ):
        file, content = Path(settings[name]), Path(settings[name]).read_text()
        file.write_text(content + (line if isinstance(line, str) else json.dumps(line)))
        with pytest.raises(ValueError, match=message):
            load_benchmarks({"wikihow_tiir": settings})
        file.write_text(content)
