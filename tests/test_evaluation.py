import itertools
import json
import math
import zlib

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, concatenate_datasets
from datasets import Image as DatasetImage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binom

from hf_sugar.cli import evaluate
from hf_sugar.cli.main import main
from hf_sugar.data import ROW_FEATURES, load_data
from hf_sugar.data.images import undecoded
from hf_sugar.evaluation.ceilings import chance, label_ceilings
from hf_sugar.evaluation.metrics import Estimate, bootstrap_interval, ranks, recall_at_k
from hf_sugar.evaluation.report import report_table, to_dict
from hf_sugar.evaluation.tasks import (
    WINOGROUND_CHANCE,
    EvaluationData,
    evaluate_tasks,
    exact_match,
    image_text_retrieval,
    interleaved_retrieval,
    load_tasks,
    winoground,
)
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor
from hf_sugar.world import load_world


def picture(color, size=(8, 8)):
    return Image.new("RGB", size, color)


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def conversation(*turns, images=(), **columns):
    """Turns alternate between user and assistant; `None` is an image part."""
    contents = [[{"type": "text" if part else "image", "text": part} for part in turn] for turn in turns]
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"messages": messages, "images": list(images), **columns}


# ranks, recalls


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_ranks_equal_the_worst_order_of_a_brute_force_sort(data):
    queries, candidates = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    # few distinct values, so that ties are common
    scores = np.array([[data.draw(st.integers(0, 3)) for _ in range(candidates)] for _ in range(queries)], dtype=float)
    relevant = [data.draw(st.sets(st.integers(0, candidates - 1), min_size=1)) for _ in range(queries)]
    for row, answers, rank in zip(scores, relevant, ranks(scores, relevant), strict=True):
        order = sorted(range(candidates), key=lambda c: (-row[c], c in answers))  # irrelevant first among equals
        assert rank == 1 + min(order.index(answer) for answer in answers)


def test_recall_refuses():
    for scores, relevant, message in (
        ([[0.1, np.nan]], [0], "query 0 hold NaN"),
        ([[0.1, 0.2]], [2], r"relevant\[0\]` is \[2\]"),
        ([[0.1, 0.2]], [set()], "at least one index from 0 to 1"),
        ([[0.1, 0.2]], [0, 1], r"shape \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            recall_at_k(np.array(scores), relevant)


# intervals


def test_interval_agrees_with_the_binomial_distribution():
    n, p = 400, 0.3
    values = np.zeros(n)
    values[: int(n * p)] = 1
    # exact quantiles of the mean of a resample, which is binomial(n, p) / n
    expected = binom(n, p).ppf([0.025, 0.975]) / n
    assert bootstrap_interval(values) == pytest.approx(expected, abs=1.5 / n)
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval([])


def test_figure_and_table():
    figure = Estimate(63.12, 58.94, 67.16, 500)
    assert str(figure) == "63.1 [58.9, 67.2]"
    assert Estimate.from_hits([True, False, False, False]).value == 25
    results = {"exact_match": figure, "misses": [{"row": "row 0"}], "duplicates": 3, "paper": 27.04}
    expected = {"value": 63.12, "low": 58.94, "high": 67.16, "n": 500}
    assert json.loads(json.dumps(to_dict(results)))["exact_match"] == expected
    assert report_table({"a": results, "b": {"exact_match": figure, "other": figure}}).splitlines() == [
        "| metric | a | b |",
        "|---|---|---|",
        "| exact match | 63.1 [58.9, 67.2] | 63.1 [58.9, 67.2] |",
        "| duplicates | 3 |  |",
        "| paper | 27.0 |  |",
        "| other |  | 63.1 [58.9, 67.2] |",
    ]


# tasks


def lookup(table, vectors=unit):
    """Embedding function that looks texts up by themselves and images by the colour of their first pixel."""

    def embed(items):
        return vectors([table[item if isinstance(item, str) else item.getpixel((0, 0))] for item in items])

    return embed


def test_image_text_retrieval_with_copies_and_several_captions():
    pictures = [picture("red"), picture((0, 255, 0))]
    red, green = (255, 0, 0), (0, 255, 0)
    same = lookup({red: [1, 0.1], green: [0, 1], "a shape": [1, 0]})
    several = lookup(
        {red: [1, 0], green: [0, 1], "red": [1, 0], "rot": [0.4, 0.5], "green": [0, 1], "gruen": [0.1, 1]}
    )
    for embed, captions, options, expected in (
        (same, ["a shape", "a shape"], {}, (100, 100, 1)),
        (same, ["a shape", "a shape"], {"match_copies": False}, (0, 50, 1)),
        (several, [["red", "rot"], ["green", "gruen"]], {}, (100, 75, 0)),
    ):
        results = image_text_retrieval(embed, pictures, captions, (1,), **options)
        assert results["image_to_text_recall@1"].value == expected[0]
        assert results["text_to_image_recall@1"].value == expected[1]
        assert results["duplicate_captions"] == expected[2]
    assert results["text_to_image_recall@1"].n == 4
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        image_text_retrieval(several, pictures[:1], captions)


def test_intervals_resample_images_and_stories(monkeypatch):
    monkeypatch.setattr("hf_sugar.evaluation.tasks.CHUNK", 7)
    generator = np.random.default_rng(0)
    colors = [(i, i, i) for i in range(40)]
    vectors = unit(generator.normal(size=(40, 30)))
    # every second image is found by all of its captions, the others by none
    table = dict(zip(colors, vectors, strict=True))
    table |= {f"{i} {n}": vectors[i - i % 2] for i in range(40) for n in range(8)}
    captions = [[f"{i} {n}" for n in range(8)] for i in range(40)]
    results = image_text_retrieval(lookup(table), [picture(color) for color in colors], captions, (1,))
    found = np.arange(40) % 2 == 0
    assert results["text_to_image_recall@1"] == Estimate(50, *(100 * end for end in bootstrap_interval(found)), 320)

    story = [
        [picture(colors[i]), *[part for n in range(8) for part in (f"{i} {n}", picture(colors[i]))]] for i in range(40)
    ]
    by_last_text = lookup(table)
    results = interleaved_retrieval(
        lambda items: by_last_text([item[-1] if isinstance(item, list) else item for item in items]), story, (1,)
    )
    assert results["context_recall@1"] == Estimate(50, *(100 * end for end in bootstrap_interval(found)), 320)


def test_interleaved_retrieval_queries_candidates_and_relevance():
    colors = {name: picture(name) for name in ("red", "green", "blue", "yellow")}
    stories = [
        ["one", colors["red"], "two", colors["green"], "three", colors["blue"]],
        [colors["yellow"], "four", picture("red"), colors["green"], "five"],
    ]
    seen = []

    def names(item):
        if isinstance(item, list):
            return [names(part) for part in item]
        return item if isinstance(item, str) else {v.tobytes(): k for k, v in colors.items()}[item.tobytes()]

    def embed(items):
        seen.append([names(item) for item in items])
        # a query's embedding is that of the image that follows "two", or else of red
        axes = {"red": 0, "green": 1, "blue": 2, "yellow": 3}
        rows = []
        for name in seen[-1]:
            key = name if isinstance(name, str) else name[-1]
            rows.append(np.eye(4)[axes.get(key, 1 if key == "two" else 0)])
        return np.array(rows, dtype=np.float32)

    results = interleaved_retrieval(embed, stories, ks=(1, 2))
    assert seen[0] == ["red", "green", "blue", "yellow"]
    assert seen[1] == [
        ["one", "red", "two"],
        ["one", "red", "two", "green", "three"],
        ["yellow", "four"],
        ["yellow", "four", "red"],
    ]
    assert seen[2] == ["two", "three", "four", "four"]
    assert results["candidates"] == 4
    assert results["duplicate_images"] == 2
    # right: green after "two", red after "four"
    assert results["context_recall@1"].value == 50
    assert results["last_sentence_recall@1"].value == 50
    # the others are equal to one image that is neither right nor in their context
    assert [results[f"{name}_recall@2"].value for name in ("context", "context_unseen")] == [50, 100]

    no_text_first = [colors["red"], colors["yellow"], colors["green"], "two", colors["green"]]
    results = interleaved_retrieval(embed, [no_text_first], (1,))
    assert [results[f"{name}_recall@1"].n for name in ("context", "last_sentence")] == [2, 1]

    with pytest.raises(ValueError, match="No image of the 1 stories has two slices before it"):
        interleaved_retrieval(embed, [["one", colors["red"], "two"]])


# s(c0,i0), s(c0,i1), s(c1,i0), s(c1,i1): text, image, group
WINOGROUND_TABLE = [
    ((0.9, 0.1, 0.2, 0.8), 1, 1, 1),
    ((0.9, 0.8, 0.1, 0.85), 1, 1, 1),
    ((0.5, 0.6, 0.4, 0.7), 1, 0, 0),  # the first caption prefers the wrong image
    ((0.5, 0.4, 0.6, 0.7), 0, 1, 0),  # the first image prefers the wrong caption
    ((0.1, 0.9, 0.8, 0.2), 0, 0, 0),
    ((0.5, 0.5, 0.1, 0.9), 1, 0, 0),  # ties do not count
    ((0.5, 0.1, 0.5, 0.9), 0, 1, 0),
    ((0.5, 0.5, 0.5, 0.5), 0, 0, 0),
]


def test_winoground_rule():
    row = {"image_0": picture("red"), "image_1": picture("blue"), "caption_0": "a b", "caption_1": "b a"}
    for (s00, s01, s10, s11), *expected in WINOGROUND_TABLE:
        # captions as the standard axes, so that an image's coordinates are its scores; inner products need no unit norm
        table = {"a b": [1, 0], "b a": [0, 1], (255, 0, 0): [s00, s10], (0, 0, 255): [s01, s11]}
        assert [score.value / 100 for score in winoground(lookup(table, np.array), [row]).values()] == expected


def test_winoground_chance():
    orders = list(itertools.permutations(range(4)))
    text = sum(a > c and d > b for a, b, c, d in orders) / len(orders)
    group = sum(min(a, d) > max(b, c) for a, b, c, d in orders) / len(orders)
    expected = {"text_score": 100 * text, "image_score": 100 * text, "group_score": 100 * group}
    assert winoground(None, []) == pytest.approx(expected) == WINOGROUND_CHANCE


def test_exact_match(monkeypatch):
    monkeypatch.setattr("hf_sugar.evaluation.tasks.CHUNK", 2)
    rows = [
        conversation([None, "What is it?"], ["A  red\nCircle "], images=[picture("red")], id="vqa:0"),
        conversation([None, "Describe"], ["a square"], ["And", None], ["two", "stars"], images=[picture("blue")] * 2),
        conversation(["Hello"], ["yes"], images=[], id="vqa:2"),
    ]
    seen = []

    def generate(conversations):
        seen.extend(conversations)
        return [{"What is it?": "a red circle", "And": "one star", "Hello": "Yes"}[question(c)] for c in conversations]

    def question(row):
        return next(part["text"] for part in row["messages"][-1]["content"] if part["type"] == "text")

    results = exact_match(generate, rows)
    assert [[m["role"] for m in c["messages"]] for c in seen] == [["user"], ["user", "assistant", "user"], ["user"]]
    assert [len(c["images"]) for c in seen] == [1, 2, 0]
    assert results["exact_match"].value == pytest.approx(200 / 3)
    assert results["misses"] == [{"index": 1, "row": "row 1", "expected": "two stars", "generated": "one star"}]
    with pytest.raises(ValueError, match=r"row 1 \(x\) has no assistant turn"):
        exact_match(generate, [rows[0], conversation(["Hello"], id="x")])


# ceilings


class RandomTeachers:
    """Five numbers in each half for everything that reads or looks the same."""

    split = 5

    def encode(self, slices):
        content = [part.encode() if isinstance(part, str) else part.tobytes() for part in slices]
        vectors = np.stack([np.random.default_rng(zlib.crc32(c)).normal(size=(2, 5)) for c in content])
        return torch.from_numpy(unit(vectors).reshape(-1, 10))


def label(x, y, delta, kernel):
    """By the definition: a cosine, or the kernel over the number of alignments and over those of x and y alone."""
    halves = [RandomTeachers().encode(item).numpy().astype(float).reshape(-1, 2, 5) for item in (x, y)]

    def cosine(a, i, b, j):
        same = isinstance((x, y)[a][i], str) == isinstance((x, y)[b][j], str)
        return float(halves[a][i, 1 - same] @ halves[b][j, 1 - same])

    def mean(a, b, delta):
        paths, counts = {(0, 0): 1.0}, {(0, 0): 1}
        for i, j in itertools.product(range(1, len(halves[a]) + 1), range(1, len(halves[b]) + 1)):
            s = math.exp(-(2 - 2 * cosine(a, i - 1, b, j - 1)) / (delta**2 * (len(x) + len(y))))
            before = [(i - 1, j), (i, j - 1), (i - 1, j - 1)]
            paths[i, j] = sum(paths.get(cell, 0) for cell in before) * s / (2 - s)
            counts[i, j] = sum(counts.get(cell, 0) for cell in before)
        return paths[i, j] / counts[i, j]

    if kernel == "mean" or len(x) == len(y) == 1:
        return np.mean([cosine(0, i, 1, j) for i in range(len(x)) for j in range(len(y))])
    return min(1, mean(0, 1, delta) / math.sqrt(mean(0, 0, delta) * mean(1, 1, delta)))


@pytest.mark.parametrize(("delta", "kernel"), [(0.7, "gak"), (1.0, "mean")])
def test_labels_rank_as_their_definition_and_chance_as_all_draws(tmp_path, monkeypatch, delta, kernel):
    monkeypatch.setattr("hf_sugar.evaluation.ceilings.BLOCK", 8)
    rows = {"captions": load_world("captions", "test", 6), "stories": load_world("stories", "test", 5)}
    rows["captions"] = concatenate_datasets([rows["captions"], rows["captions"].select([2])])
    rows["winoground"] = load_world("winoground", "test", 6)
    for kind in rows:
        rows[kind].to_parquet(tmp_path / f"{kind}.parquet")
    captions, stories, pairs = (str(tmp_path / f"{kind}.parquet") for kind in rows)
    tasks = load_tasks(EvaluationData(captions, stories, None, pairs))
    found = label_ceilings(tasks, RandomTeachers(), delta=delta, label_kernel=kernel)
    by_chance = chance(tasks)
    hits = {}

    def search(name, queries, candidates, right, excluded=None):
        for query, answers, out in zip(queries, right, excluded or [()] * len(right)):
            scores = {c: label(query, [x], delta, kernel) for c, x in enumerate(candidates) if c not in out}
            # of equal scores, which only the repeated caption has, all are right
            best = [c in answers for c in sorted(scores, key=scores.get, reverse=True)]
            for k in (1, 5, 10):
                draws = itertools.combinations(best, min(k, len(best))) if len(best) < 8 else None
                by_luck = np.mean([any(draw) for draw in draws]) if draws else min(1, k / len(best))
                hits.setdefault(f"{name}_recall@{k}", []).append((any(best[:k]), by_luck))

    images = [row["images"][0] for row in rows["captions"]]
    texts = [row["messages"][0]["content"][1]["text"] for row in rows["captions"]]
    right = [{0}, {1}, {2, 6}, {3}, {4}, {5}, {2, 6}]
    search("image_to_text", [[image] for image in images], texts, right)
    search("text_to_image", [[text] for text in texts], images, right)
    candidates, contexts, sentences, right, seen = [], [], [], [], []
    for row in rows["stories"]:
        said = [part["text"] for part in row["messages"][0]["content"][::2]]
        for n in range(1, len(said)):
            contexts.append([part for step in zip(said, row["images"][:n]) for part in step] + [said[n]])
            sentences.append([said[n]])
            right.append({len(candidates) + n})
            seen.append(range(len(candidates), len(candidates) + n))
        candidates += row["images"]
    search("context", contexts, candidates, right)
    search("context_unseen", contexts, candidates, right, seen)
    search("last_sentence", sentences, candidates, right)
    for metric, values in hits.items():
        reached, by_luck = np.mean(values, axis=0)
        assert found[metric].value == pytest.approx(100 * reached), metric
        assert by_chance[metric] == pytest.approx(100 * by_luck), metric
    assert 0 < found["context_recall@10"].value < found["context_unseen_recall@10"].value < 100

    group = []
    for row in rows["winoground"]:
        s = [[label([row[f"caption_{c}"]], [row[f"image_{i}"]], 1, "") for i in (0, 1)] for c in (0, 1)]
        group.append(min(s[0][0], s[1][1]) > max(s[0][1], s[1][0]))
    assert found["group_score"] == Estimate.from_hits(group)
    assert {name: by_chance[name] for name in WINOGROUND_CHANCE} == WINOGROUND_CHANCE
    assert found.keys() ^ by_chance.keys() == {"notes"}
    assert [note.split(":")[0] for note in by_chance["notes"]] == [
        "Images and texts",
        "Next images",
        "Winoground scores",
    ]


# data of tasks, and the report


def answered(text, *more, image="red", **columns):
    return conversation([None, "Which?"], [text], *more, images=[picture(image)], loss_on="answers", **columns)


@pytest.fixture
def mixed(tmp_path):
    """Rows of which not all fit every task, and rows one of which has no readable image."""
    rows = [
        answered("red"),
        answered("green", ["And?"], ["more"], image="green"),
        conversation(["Hello"], ["world"], loss_on="answers"),
        conversation([None, "blue"], images=[picture("blue")], loss_on="captions"),
        conversation([None, "one"], [None, "two"], images=[picture("red")] * 2, loss_on="answers"),
    ]
    bad = {**rows[0], "images": [{"bytes": b"no image", "path": None}]}
    for name, content in (("mixed", rows), ("bad", [rows[0], bad])):
        content = [{key: row.get(key) for key in ROW_FEATURES} for row in content]
        Dataset.from_list(content, features=ROW_FEATURES).to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def test_the_data_of_a_task_say_what_they_leave_out(mixed):
    source = str(mixed / "mixed.parquet")
    [task] = load_tasks(EvaluationData(image_text_data={"seen": source}))
    asked = []

    def embed(items):
        asked.append(list(items))
        return np.eye(len(items))

    assert task.prefix == "seen/" and task.run(embed, None)["pairs"] == 3
    assert asked[0] == ["red", "green", "blue"]
    assert [image.getpixel((0, 0)) for image in asked[1]] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert task.notes == [
        "image_text_data seen: 1 of 5 rows have more than one answer; the first one is taken.",
        "image_text_data seen: 2 of 5 rows do not have one image with an answer or a caption and are left out.",
    ]

    def generate(prompts):
        assert [len(prompt["messages"]) for prompt in prompts] == [1, 3, 1, 1]
        return ["red", "more", "?", "two"]

    results = evaluate_tasks(EvaluationData(generation_data=source), embed, generate)
    assert results["exact_match"] == Estimate.from_hits([1, 1, 0, 1])
    assert results["notes"] == [
        "generation_data: 1 of 5 rows have no answer and are left out.",
        "generation_data: 1 of 4 rows have more than one answer; the last one is compared.",
    ]
    assert evaluate_tasks(EvaluationData(generation_data=source), embed) == {}
    named = EvaluationData(generation_data=[{"a": source, "b": source}])  # as on the command line
    assert [task.prefix for task in load_tasks(named)] == ["a/", "b/"]
    with pytest.raises(ValueError, match="has no column caption_0, caption_1, image_0, image_1, but"):
        load_tasks(EvaluationData(winoground_data=[source]))  # a list, as on the command line


def test_bad_rows_are_errors_or_left_out_and_counted(mixed):
    good, bad = (row["images"][0] for row in undecoded(load_data(str(mixed / "bad.parquet"))))
    pairs = [{"image_0": good, "image_1": image, "caption_0": "a b", "caption_1": "b a"} for image in (good, bad)]
    rows = Dataset.from_list(pairs).cast_column("image_0", DatasetImage()).cast_column("image_1", DatasetImage())
    rows.to_parquet(mixed / "pairs.parquet")
    for name, file, metric in (("image_text", "bad", "pairs"), ("winoground", "pairs", "text_score")):
        data = EvaluationData(**{f"{name}_data": str(mixed / f"{file}.parquet")})
        with pytest.raises(ValueError, match="row 1.*cannot be decoded"):
            evaluate_tasks(data, lambda items: np.eye(len(list(items))))
        results = evaluate_tasks(data, lambda items: np.eye(len(list(items))), on_bad_row="skip")
        assert results[metric] == 1 or results[metric].n == 1
        assert results["notes"] == [f"{name}_data: 1 of 2 rows cannot be read and are left out."]


def test_a_projector_that_is_not_trained_is_not_measured(mixed, tmp_path, monkeypatch):
    projects, embedder = [], evaluate.SugarEmbedder
    monkeypatch.setattr(evaluate, "SugarEmbedder", lambda *a, **k: projects.append(k) or embedder(*a, **k))
    source = str(mixed / "mixed.parquet")
    tiny.llava().save_pretrained(tmp_path / "llava")
    tiny.processor().save_pretrained(tmp_path / "llava")
    model = SugarForConditionalGeneration.from_pretrained(tmp_path / "llava", retrieval_dim=16)
    for name in ("new", "sugar"):
        model.save_pretrained(tmp_path / name)
        SugarProcessor.from_pretrained(tmp_path / "llava").save_pretrained(tmp_path / name)
        model.config.random_projector = False
    settings = "--structure_weight 0 --max_steps 1 --use_peft false --use_cpu true --bf16 false --report_to none"
    data = [str(tmp_path / "llava"), source, "--image_text_data", source, "--output_dir", str(tmp_path / "sft")]
    main(["train", *data, *settings.split()])
    found = {"train": json.loads((tmp_path / "sft" / "report.json").read_text())}
    for name, *flags in (("llava",), ("new",), ("sugar",), ("sugar", "--untrained"), ("sft",)):
        output = tmp_path / "reports" / "-".join([name, *flags])
        flags += ["--image_text_data", source, "--max_batch_tokens", "90"]
        main(["evaluate", str(tmp_path / name), "--output_dir", str(output), *flags])
        found[output.name] = json.loads((output / "report.json").read_text())
    said = {name: " ".join(report["notes"]) for name, report in found.items()}
    assert "not trained (llava is a plain 'llava' model)" in said["llava"]
    assert all("not trained (`random_projector` is true in its config.json" in said[name] for name in ("new", "sft"))
    assert "not trained (`structure_weight` 0)" in said["train"]
    assert "without the retrieval projector" in said["sugar---untrained"] and "projector" not in said["sugar"]
    assert found["llava"]["settings"]["untrained"] and "1 of 5 rows have more than one answer" in said["llava"]
    assert [settings["project"] for settings in projects] == [False, False, True, False, False]
    assert projects[0]["max_batch_tokens"] == 90
    before = (output / "report.md").read_bytes()
    with pytest.raises(ValueError, match="holds a report already.*`overwrite`"):
        main(["evaluate", str(tmp_path / "sugar"), "--image_text_data", source, "--output_dir", str(output)])
    assert before == (output / "report.md").read_bytes()


# plots
