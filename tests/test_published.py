"""The published benchmarks, on small files of the published layouts with the images of the rendered world."""

import base64
import csv
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from datasets import Dataset
from PIL import Image
from rows import karpathy, mmeb, wikihow_tiir, write
from test_demon import write_demon

from hf_sugar.cli.main import main
from hf_sugar.data import load_data, load_image
from hf_sugar.evaluation import BENCHMARKS, Estimate, load_benchmarks, recall_at_k
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor
from hf_sugar.world.dataset import load_world


def _slices(row):
    return [part["text"] for message in row["messages"] for part in message["content"] if part["type"] == "text"]


def _png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Settings of every benchmark, with files as they are published."""
    root = tmp_path_factory.mktemp("published")
    captions = load_world("captions", "test", 14, seed=3)
    pictures = [row["images"][0] for row in captions]
    texts = [_slices(row)[0] for row in captions]

    # Karpathy's file: the first image has seven captions, one caption stands under two images, one image is of training
    (root / "val2014").mkdir()
    images = []
    for i, picture in enumerate(pictures[:7]):
        picture.save(root / "val2014" / f"{i}.jpg")
        own = [f"{texts[i]} {n}" for n in range(7 if i == 0 else 5)]
        own[4] = "a caption of two images" if i in (1, 2) else own[4]
        images.append(karpathy(f"{i}.jpg", "train" if i == 6 else "test", own, filepath="val2014", cocoid=i))
    write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})

    # stories in sequence; two are told of the same photographs, one photograph of the last story is gone
    (root / "photographs").mkdir()
    annotations, stories = [], load_world("stories", "test", 12, seed=4)
    for s, row in enumerate(stories):
        source = stories[0] if s == 1 else row
        for n, (text, photograph) in enumerate(zip(_slices(row), source["images"], strict=False)):
            number = f"{0 if s == 1 else s}{n}"
            if (s, n) != (5, 1):
                photograph.save(root / "photographs" / f"{number}.png")
            step = {"story_id": str(100 + s), "photo_flickr_id": number, "worker_arranged_photo_order": n}
            annotations.append([{**step, "text": text, "original_text": f"{text}!", "album_id": str(s)}])
    sis = {"images": [], "albums": [], "annotations": annotations, "type": "story-in-sequence"}
    (root / "val.story-in-sequence.json").write_text(json.dumps(sis))

    load_world("winoground", "test", 8, seed=5).to_parquet(root / "winoground.parquet")

    (root / "mmvp").mkdir()
    with open(root / "mmvp" / "Questions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question ID", "Type", "Statement"])
        for i, (picture, text) in enumerate(zip(pictures[:12], texts, strict=False), 1):
            pattern = "Orientation" if i <= 4 else "Camera Perspective"
            (root / "mmvp" / "MLLM_VLM Images" / pattern).mkdir(parents=True, exist_ok=True)
            picture.save(root / "mmvp" / "MLLM_VLM Images" / pattern / f"{i}.jpg")
            writer.writerow([i, pattern, text])

    # three questions that take part, and four that do not
    (root / "webqa").mkdir()
    lines, offsets = [], [0]
    for i, picture in enumerate(pictures):
        lines.append(f"{30_000_000 + i if i % 2 else i}\t{base64.b64encode(_png(picture)).decode()}\n")
        offsets.append(offsets[-1] + len(lines[-1]))
    (root / "webqa" / "imgs.tsv").write_text("".join(lines))
    (root / "webqa" / "imgs.lineidx").write_text("".join(f"{offset}\n" for offset in offsets[:-1]))

    def fact(i):
        return {"image_id": 30_000_000 + i if i % 2 else i, "caption": texts[i], "title": "", "url": "", "imgUrl": ""}

    def record(answer, useful=(0,), others=(1, 2, 3, 4, 5, 6), **fields):
        facts = {"img_posFacts": [fact(i) for i in useful], "img_negFacts": [fact(i) for i in others]}
        return {"Q": '"Is there a star?"', "A": [answer], "split": "val", "Qcate": "YesNo", **facts, **fields}

    records = [
        record('"Yes, there is a star."'),
        record('"No, there is none."', (7,), (8, 9, 10, 11, 12)),
        record('"yes"', (13,)),
        record('"Yes."', (1, 2)),  # two useful images
        record('"Yes."', (1,), (2, 3)),  # too few others
        record('"A star."'),  # neither yes nor no
        record('"Yes."', split="train"),
        record('"red"', Qcate="color"),
        record('"Yes."', ()),  # about texts
    ]
    (root / "webqa" / "WebQA_train_val.json").write_text(json.dumps({f"d5b{n}": r for n, r in enumerate(records)}))

    write_demon(root / "demon", pictures[0])

    conversations = load_world("conversations", "test", 16, seed=6)
    conversations.select(range(6)).to_parquet(root / "questions.parquet")
    conversations.select(range(6, 16)).to_parquet(root / "knowledge.parquet")
    return {
        "coco": {"path": str(root / "dataset_coco.json")},
        "vist": {"path": str(root / "val.story-in-sequence.json"), "image_root": str(root / "photographs")},
        "winoground": {"path": str(root / "winoground.parquet")},
        "mmvp": {"path": str(root / "mmvp")},
        "webqa": {"path": str(root / "webqa")},
        "demon": {"path": str(root / "demon")},
        "rag": {"questions": str(root / "questions.parquet"), "knowledge": str(root / "knowledge.parquet")},
        "mmeb": mmeb(root / "mmeb", pictures[:4]),
        "wikihow_tiir": wikihow_tiir(root / "wikihow_tiir", pictures[:7]),
    }


def _vector(item, salt=0):
    """A random direction for everything that reads or looks the same."""
    parts = item if isinstance(item, list) else [item]
    content = b"|".join(part.encode() if isinstance(part, str) else load_image(part).tobytes() for part in parts)
    vector = np.random.default_rng(zlib.crc32(content, salt)).normal(size=6)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def embed(items):
    return np.stack([_vector(item) for item in items])


def no_answers(prompts):
    raise AssertionError("nothing is generated")


def test_coco(published):
    benchmark = load_benchmarks({"coco": published["coco"]})["coco"]
    found = benchmark.run(embed, no_answers)
    file = json.loads(Path(published["coco"]["path"]).read_text())
    images = [image for image in file["images"] if image["split"] == "test"]
    folder = Path(published["coco"]["path"]).parent / "val2014"
    pictures = embed([folder / image["filename"] for image in images])
    captions = [sentence["raw"] for image in images for sentence in image["sentences"][:5]]
    assert len(captions) == 30  # five for each image
    scores = pictures @ embed(captions).T
    for k in (1, 5, 10):
        to_text = [any(c // 5 == i for c in np.argsort(-scores[i], kind="stable")[:k]) for i in range(6)]
        to_image = [c // 5 in np.argsort(-scores[:, c])[:k] for c in range(30)]
        assert found[f"image_to_text_recall@{k}"].value == pytest.approx(100 * np.mean(to_text))
        assert found[f"text_to_image_recall@{k}"].value == pytest.approx(100 * np.mean(to_image))
    assert (found["image_to_text_recall@1"].n, found["text_to_image_recall@1"].n) == (6, 30)
    assert found["duplicate_captions"] == 1


def test_vist_is_the_published_protocol(published):
    benchmark = load_benchmarks({"vist": published["vist"]})["vist"]
    found = benchmark.run(embed, no_answers)
    assert found["stories_left_out"] == 1

    # FROMAGe's script: its order, its filter, 10000 taken off the scores of the photographs already seen
    stories = {}
    for [step] in json.loads(Path(published["vist"]["path"]).read_text())["annotations"]:
        stories.setdefault(step["story_id"], []).append((step["text"], step["photo_flickr_id"]))
    files = {file.stem: file for file in Path(published["vist"]["image_root"]).iterdir()}
    assert found["candidates"] == len(files)
    numbers = list(files)
    candidates = embed([files[number] for number in numbers])
    hits = {}
    for story in stories.values():
        if any(number not in files for _, number in story):
            continue
        captions = [text for text, _ in story]
        seen = [number for _, number in story[:-1]]
        both = [part for text, number in story for part in (text, files[number])][:-1]
        for name, query in (("5c", captions), ("5c+4i", both)):
            scores = candidates @ _vector(query)
            for suffix, drop in (("", []), ("_unseen", seen)):
                lowered = scores - 10000 * np.isin(numbers, drop)
                best = [numbers[n] for n in np.argsort(-lowered)]
                for k in (1, 5, 10):
                    hits.setdefault(f"{name}{suffix}_recall@{k}", []).append(story[-1][1] in best[:k])
    assert {name: value.value for name, value in found.items() if "@" in name} == pytest.approx(
        {name: 100 * np.mean(values) for name, values in hits.items()}
    )
    assert 0 < found["5c_recall@10"].value < found["5c_unseen_recall@10"].value


def test_mmvp(published):
    benchmark = load_benchmarks({"mmvp": published["mmvp"]})["mmvp"]
    with open(Path(published["mmvp"]["path"]) / "Questions.csv") as file:
        rows = list(csv.reader(file))[1:]
    pictures = {p.stem: load_image(p) for p in Path(published["mmvp"]["path"]).rglob("*.jpg")}

    def generate(prompts):
        # wrong for image 3, no answer for image 7
        answers = []
        for n, prompt in enumerate(prompts):
            [message] = prompt["messages"]
            pair = rows[n - n % 2 : n - n % 2 + 2]
            assert load_image(prompt["images"][0]).tobytes() == pictures[rows[n][0]].tobytes()
            assert f"\nA. {pair[0][2]}\nB. {pair[1][2]}\n" in message["content"][1]["text"]
            answers.append({2: "B", 6: "neither A nor B"}.get(n, ("A", "B.")[n % 2]))
        return answers

    found = benchmark.run(lambda items: np.stack([_vector(item, 4) for item in items]), generate)
    assert found["qa_accuracy"].value == pytest.approx(1000 / 12)
    assert found["qa_pair_accuracy"].value == pytest.approx(400 / 6)
    assert found["qa_pair_accuracy (Orientation)"] == Estimate.from_hits([1, 0])
    assert found["qa_pair_accuracy (Camera Perspective)"].n == 4
    # the published script: for both statements the softmax over the two images (with this salt the text score differs)
    pairs = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        scores = [
            [_vector(f"a photo of {s}", 4) @ _vector(pictures[i], 4) for i in (first[0], second[0])]
            for s in (first[2], second[2])
        ]
        chosen = [np.exp(s[0]) / np.exp(s).sum() > 0.5 for s in scores]
        pairs.append(chosen == [True, False])
    assert found["matching_pair_accuracy"].value == pytest.approx(100 * np.mean(pairs))
    assert any(pairs)
    assert not benchmark.run(embed, lambda prompts: ["A"] * len(prompts))["qa_pair_accuracy"].value


def test_webqa_moves_the_useful_pair(published):
    benchmark = load_benchmarks({"webqa": published["webqa"]})["webqa"]
    captions = [_slices(row)[0] for row in load_world("captions", "test", 14, seed=3)]
    pictures = [load_image(row["images"][0]).tobytes() for row in load_world("captions", "test", 14, seed=3)]
    useful, truths = (0, 7, 13), ("yes", "no", "yes")

    def generate(prompts):
        answers = []
        for n in range(len(prompts)):
            question, place = divmod(n, 6)
            [message] = prompts[n]["messages"]
            assert [part["type"] for part in message["content"]] == ["image", "text"] * 6 + ["text"]
            assert message["content"][-1]["text"].startswith("Is there a star?\n")
            shown = [pictures.index(load_image(image).tobytes()) for image in prompts[n]["images"]]
            assert [part["text"] for part in message["content"][1:12:2]] == [captions[i] for i in shown]
            assert shown.index(useful[question]) == place
            assert len(set(shown)) == 6
            right = truths[question]
            wrong = "no" if right == "yes" else "yes"
            # what stands first is always of use, what stands last only to the first question
            answers.append(f"{right.title()}, it is." if place == 0 or question == 0 else ("maybe", wrong)[place % 2])
        return answers

    found = benchmark.run(embed, generate)
    assert [found[f"accuracy@{n}"].value for n in range(1, 7)] == pytest.approx([100] + 5 * [100 / 3])
    assert found["questions_left_out"] == 3


def test_rag_gain(published):
    with pytest.raises(ValueError, match="`k` is 0"):
        load_benchmarks({"rag": {**published["rag"], "k": 0}})
    benchmark = load_benchmarks({"rag": published["rag"]})["rag"]
    questions = load_data(published["rag"]["questions"])
    right = [row["messages"][-1]["content"][0]["text"] for row in questions]

    def generate(prompts):
        # with an example all answers but the last are right, without one only the first two are, and the last
        answers = []
        for n, prompt in enumerate(prompts):
            own = len(questions[n]["messages"]) - 1
            retrieved = len(prompt["messages"]) > own
            answers.append(right[n] if n != 5 and (retrieved or n < 2) or n == 5 and not retrieved else "?")
        return answers

    found = benchmark.run(embed, generate)
    assert found["exact_match_without_retrieval"].value == pytest.approx(50)
    assert found["exact_match_with_retrieval"].value == pytest.approx(500 / 6)
    assert found["gain"] == Estimate.from_hits([0, 0, 1, 1, 1, -1])
    assert found["knowledge_rows"] == 10


def test_what_is_wrong_is_said_before_a_model_is_loaded(published, tmp_path):
    def run(settings, *arguments):
        (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump({"benchmarks": settings}))
        main(["evaluate", "--config", str(tmp_path / "evaluate.yaml"), "--model_name_or_path", "no/model", *arguments])

    (tmp_path / "half.json").write_text('{"annotations": [[')
    for settings, message, *arguments in (
        (
            {"vist": {**published["vist"], "path": str(tmp_path / "half.json")}},
            "`benchmarks.vist` cannot be read from .*half.json.*: Expecting value: line 1",
        ),
        ({"imagenet": {}}, "no benchmark 'imagenet'. Use some of coco, vist"),
        ({"coco": published["coco"]}, "`benchmarks.mmvp` is not set", "--tasks", "coco", "mmvp"),
        (
            {"vist": {"path": published["vist"]["path"]}},
            "`benchmarks.vist` .*missing 1 required positional argument: 'image_root'",
        ),
        ({"webqa": {"path": "webqa", "seed": 1}}, "`benchmarks.webqa` .*unexpected keyword argument 'seed'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(settings, *arguments)
    Dataset.from_dict({"image_0": [1], "caption_0": ["a"]}).to_parquet(tmp_path / "columns.parquet")
    with pytest.raises(ValueError, match="has no column caption_1, image_1, but image_0, caption_0"):
        run({"winoground": {"path": str(tmp_path / "columns.parquet")}})


def test_malformed_files(published, tmp_path):
    story = [{"story_id": "1", "photo_flickr_id": "2", "worker_arranged_photo_order": 0, "text": "a"}]
    for name, file, content, message in (
        (
            "vist",
            "sis.json",
            [story, [{"story_id": "1"}]],
            r"annotations\[1\] is not as published \(KeyError: 'worker",
        ),
        ("vist", "sis.json", [], "has no `annotations`"),
        ("vist", "sis.json", [story], "of none of the 1 stories all photographs"),
        ("mmvp", "Questions.csv", "ID,Type,Statement\n1,Color,a\n", "line 2: .* no image"),
        ("mmvp", "Questions.csv", "ID,Type,Statement\n", "has 0 statements"),
    ):
        (tmp_path / file).write_text(json.dumps({"annotations": content}) if name == "vist" else content)
        with pytest.raises(ValueError, match=message):
            BENCHMARKS[name](*([tmp_path / file, tmp_path] if name == "vist" else [tmp_path]))

    folder = Path(published["webqa"]["path"])
    for name in ("imgs.tsv", "imgs.lineidx", "WebQA_train_val.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match="no yes-or-no question of the split 'test'"):
        BENCHMARKS["webqa"](tmp_path, "test")
    offsets = (tmp_path / "imgs.lineidx").read_text().split()
    (tmp_path / "imgs.lineidx").write_text("\n".join(offsets[1:] + offsets[:1]))
    with pytest.raises(ValueError, match="where image 0 should be is b'30000001'"):
        BENCHMARKS["webqa"](tmp_path)[0]
    (tmp_path / "imgs.lineidx").write_text("\n".join(offsets[:3]))
    with pytest.raises(ValueError, match="image 30000013 would be line 13, but `imgs.lineidx` has 3"):
        BENCHMARKS["webqa"](tmp_path)
    (tmp_path / "WebQA_train_val.json").write_text(json.dumps({"d5": {"split": "val", "Qcate": "YesNo"}}))
    with pytest.raises(ValueError, match="question d5 is not as published .KeyError: 'img_posFacts'"):
        BENCHMARKS["webqa"](tmp_path)


def test_the_command_runs_them_all(published, tmp_path, monkeypatch):
    model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16)
    model.save_pretrained(tmp_path / "model")
    SugarProcessor.from_processor(tiny.processor()).save_pretrained(tmp_path / "model")
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump({"benchmarks": published}))
    out = ["--config", str(tmp_path / "evaluate.yaml"), "--output_dir", str(tmp_path / "out"), "--overwrite"]
    out += ["--model_name_or_path", str(tmp_path / "model"), "--max_new_tokens", "3", "--batch_size", "4"]
    out += ["--teachers", "tiny"]
    main(["evaluate", *out])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    results, paper = report["runs"]["model"], report["runs"]["paper (7B)"]
    assert {name.split("/")[0] for name in results} == set(BENCHMARKS)
    assert set(paper) <= set(results)  # every published figure has ours beside it
    assert [results[name]["n"] for name in ("coco/text_to_image_recall@1", "webqa/accuracy@6")] == [30, 3]
    assert report["bootstrap"] == {"confidence": 0.95, "resamples": 2000, "seed": 0}
    assert report["settings"]["benchmarks"] == published
    assert report["environment"]["transformers"]
    table = (tmp_path / "out" / "report.md").read_text()
    assert "| metric | chance | labels | paper (7B) | model |" in table
    assert "| winoground: group score of pairs | 16.7 | " in table and " | 27.0 | " in table
    assert "The labels have the default kernel: how the model was trained is not known." in report["notes"]
    # what bounds a model stands beside all that embeddings alone give, and beside nothing else
    bounded = {name: value for name, value in results.items() if name.split("/")[0] in ("coco", "vist", "winoground")}
    for name in ("labels", "chance"):
        assert report["runs"][name].keys() - {"notes"} == bounded.keys()
    assert report["runs"]["chance"]["coco/text_to_image_recall@1"] == pytest.approx(100 / 6)
    assert all(
        report["runs"]["labels"][name]["n"] == value["n"]
        for name, value in bounded.items()
        if "/" in name and isinstance(value, dict)
    )
    for name, width in ("coco", 5.6), ("vist", 11.2), ("webqa", 4.5):  # a panel for each curve
        assert Image.open(tmp_path / "out" / f"{name}.png").width == int(150 * width)

    main(["evaluate", *out, "--tasks", "winoground"])
    again = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]["model"]
    assert again == {name: value for name, value in results.items() if name.startswith("winoground/")}

    def fail(self, embed, generate):
        raise ValueError("a broken image")

    monkeypatch.setattr(BENCHMARKS["mmvp"], "run", fail)
    with pytest.raises(ValueError, match="a broken image"):
        main(["evaluate", *out, "--tasks", "coco", "mmvp"])
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]["model"]
    assert kept == {name: value for name, value in results.items() if name.startswith("coco/")}


def test_the_example_names_every_benchmark(tmp_path, monkeypatch):
    example = yaml.safe_load((Path(__file__).parent.parent / "examples" / "paper_table.yaml").read_text())
    assert set(example["benchmarks"]) == set(BENCHMARKS)
    monkeypatch.chdir(tmp_path)  # complete settings: what is missing is the data
    for name in set(BENCHMARKS) - {"winoground"}:
        with pytest.raises(
            ValueError, match=f"benchmarks.{name}.*(No such file|does not exist|nor a dataset|no folder of a dataset)"
        ):
            load_benchmarks(example["benchmarks"], [name])


@pytest.mark.extras
def test_recall_agrees_with_trec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="no trec_eval: pip install pytrec-eval-terrier==0.5.11")
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(60, 40))
    relevant = [set(generator.choice(40, size=generator.integers(1, 6), replace=False).tolist()) for _ in range(60)]
    judged = {f"q{q}": {f"c{c}": 1 for c in answers} for q, answers in enumerate(relevant)}
    run = {f"q{q}": {f"c{c}": float(s) for c, s in enumerate(row)} for q, row in enumerate(scores)}
    theirs = pytrec_eval.RelevanceEvaluator(judged, {"success.1,5,10"}).evaluate(run)
    for k, hits in recall_at_k(scores, relevant).items():
        assert hits.tolist() == [theirs[f"q{q}"][f"success_{k}"] for q in range(60)] and 0 < hits.mean() < 1
