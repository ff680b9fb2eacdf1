"""DEMON, on small files of its layout, and its rules beside the packages that its program uses."""

import json
import shutil

import numpy as np
import pytest
import tiny
from rows import write

from hf_sugar.evaluation import load_benchmarks
from hf_sugar.evaluation.published.demon import PICTURES, TASKS, Demon, chosen, plain, rouge_l


def write_demon(root, picture):
    """Every dataset, as the benchmark's programs read it."""
    for task, datasets in TASKS.items():
        for dataset in datasets.split():
            folder = root / dataset / "core"
            (folder / "images").mkdir(parents=True)
            picture.save(folder / "images" / "0.jpg")
            data, several = [], dataset in ("WebQA", "TQA", "COMICS_Panel", "Fashion200K")
            for n, response in enumerate(("a red star", "a blue star", "none")[: 3 if several else 1]):
                instance = {"context": "Look: {image#1}{table#2} What is it?", "images_path": ["0.jpg", "0.jpg"]}
                if dataset in PICTURES:
                    instance["context"] += "Choice List:['Image A: {image#1}', 'Image B: {image#2}']Your answer is: "
                    response = f"Image {'ABC'[n]}"
                elif task.endswith("accuracy"):
                    instance["choice_list"] = ["a red star", "a blue star", "none"]
                sample = {"sample_id": str(n), "task_instruction_id": n % 2, "task_instance": instance}
                data.append({**sample, "response": response})
            if dataset == "Fashion200K":  # two numbers, and options without a word of two letters
                data[0]["task_instance"]["choice_list"], data[0]["response"] = ["0", "1", "2"], 2
            metadata = {"dataset": dataset, "split": "core", "num_sample": len(data), "question_type": ""}
            metadata["task_instruction"] = ["Answer. ", "Reply. "]
            write(folder / "core.json", {"metadata": metadata, "data": data})


def test_tasks(tmp_path):
    root = tmp_path / "all"
    write_demon(root, tiny.image(1))
    benchmark = load_benchmarks({"demon": {"path": str(root)}})["demon"]
    prompts = {row["id"]: row for row in benchmark.prompts}
    assert len(prompts) == 29 + 4 * 2
    content = prompts["WebQA/1"]["messages"][0]["content"]
    assert [part["text"] for part in content] == [
        *("Reply. Look: ", None, None),
        " What is it?Choice list:['a red star', 'a blue star', 'none']. Your answer is:",
    ]
    assert len(prompts["COMICS_Panel/0"]["images"]) == 4

    answers = {"WebQA/0": "It is RED.", "WebQA/1": "red or blue, a star", "WebQA/2": "none", "VIST/0": "the red star"}
    answers |= {"Fashion200K/0": "2", "COMICS_Panel/0": "image A: a star", "COMICS_Panel/1": "Image B, not Image A"}
    found = benchmark.run(None, lambda rows: [answers.get(row["id"], "") for row in rows])
    # without a word of any option the first is taken; two of three words in order: recall and precision 2 / 3
    expected = {
        "knowledge_grounded_qa_accuracy (WebQA)": 200 / 3,
        "knowledge_grounded_qa_accuracy (TQA)": 100 / 3,
        "knowledge_grounded_qa_accuracy": 200 / 3,
        "visual_storytelling_rouge_l (VIST)": 200 / 3,
        "visual_storytelling_rouge_l": 40 / 3,
        "multimodal_cloze_accuracy (COMICS_Panel)": 100 / 3,
        "multi_image_reasoning_accuracy (Fashion200K)": 100 / 3,
    }
    assert {name: found[name].value for name in expected} == pytest.approx(expected, rel=1e-6)

    # of some datasets only, of which one is shorter; samples with more pictures
    for dataset in ("WebQA", "TQA"):
        shutil.copytree(root / dataset, tmp_path / dataset)
    file = tmp_path / "TQA" / "core" / "core.json"
    whole = json.loads(file.read_text())
    assert not {"knowledge_grounded_qa_accuracy"} & set(Demon(tmp_path).run(None, lambda r: [""] * len(r)))
    shutil.copytree(root / "MultiModalQA", tmp_path / "MultiModalQA")
    write(file, {**whole, "data": whole["data"][:1]})
    found = Demon(tmp_path).run(None, lambda rows: [""] * len(rows))
    assert found["knowledge_grounded_qa_accuracy"].value == pytest.approx((100 / 3 + 200) / 3)
    whole["data"][0]["task_instance"]["images_path"] *= 2
    whole["data"][0]["task_instance"]["context"] += "{image#3}"
    write(file, whole)
    assert Demon(tmp_path, max_images=2).left_out == 1

    for change, message in (
        (
            {"response": "a star"},
            r"core.json: data\[0\] is not as published \(ValueError: 'a star' is not in list",
        ),
        ({"task_instruction_id": 9}, "IndexError"),
        ({"task_instance": {"images_path": []}}, "KeyError: 'context'"),
    ):
        write(file, {**whole, "data": [{**whole["data"][0], **change}]})
        with pytest.raises(ValueError, match=message):
            Demon(tmp_path)
    (tmp_path / "TQA" / "core" / "images" / "0.jpg").unlink()
    write(file, whole)
    with pytest.raises(OSError, match="0.jpg"):
        Demon(tmp_path)


def test_rules():
    assert plain("\n'A red, blue (big) star... 3.5 km!'") == "a red blue big star 3.5 km"
    assert plain("red,blue/green") == "red blue green" and plain("1,000 red/blue") == "1000 redblue"
    # of the package rouge 1.0.1: repeated words, and sentences, which a decimal point also ends
    for answer, truth, expected in (
        ("the cat sat on the mat the end", "a cat sat on a mat at the end", 0.8571428522448981),
        ("it ran 3.5 km then stopped", "they ran 3.5 km and then it stopped", 0.8749999950781251),
        ("red star", "blue moon", 0.0),
        ("b a c d", "a b d c", 0.4999999950000001),
    ):
        assert rouge_l(answer, truth) == pytest.approx(expected, abs=1e-9)
    assert rouge_l("", "a star") == rouge_l(".", "a star") == 0
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="tslearn brings scikit-learn")
    generator = np.random.default_rng(0)
    words = np.array("a the cat dog red blue 3.5 7 bird".split())
    for _ in range(50):
        answer, *options = (" ".join(generator.choice(words, size=generator.integers(1, 6))) for _ in range(5))
        weights = text.TfidfVectorizer().fit_transform([answer, *options]).toarray()
        assert chosen(answer, options) == options[np.argmax(weights[1:] @ weights[0])]
    assert chosen("4", ["3", "4"]) == "4"
