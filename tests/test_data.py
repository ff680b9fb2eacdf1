import gzip
import io
import itertools
import json
import logging
import re
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage
from trl.data_utils import prepare_multimodal_messages

from hf_sugar import SugarProcessor, SugarTrainer, SugarTrainingConfig
from hf_sugar.cli.main import main
from hf_sugar.data import (
    ROW_FEATURES,
    captions_by_image,
    check_dataset,
    load_data,
    load_image,
    load_table,
    row_name,
    row_slices,
    stored_image,
    validate_rows,
)
from hf_sugar.data.images import undecoded
from hf_sugar.data.layouts import LAYOUTS
from hf_sugar.data.load import _SOURCE_KEYS
from hf_sugar.models.rows_sugar import conversation_row, fill_images
from hf_sugar.training.collator import SugarCollator


datasets.disable_progress_bars()

CLIPART = Path(__file__).parent.parent / "examples" / "clipart"
COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}
both = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture
def root(tmp_path):
    for name, colour in COLOURS.items():
        PILImage.new("RGB", (4, 4), colour).save(tmp_path / name)
    return tmp_path


def llava(image="red.png", human="<image>\nWhat is it?", gpt="A colour.", **extra):
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    record = {"id": "x", "conversations": turns, **extra}
    return record if image is None else {**record, "image": image}


def mmc4(texts=("one", "two"), images=(("red.png", 1),)):
    infos = [{"image_name": n, "raw_url": "", "matched_text_index": i, "matched_sim": 0.3} for n, i in images]
    return {"url": "u", "text_list": list(texts), "image_info": infos, "could_have_url_duplicate": 0}


def chat(images=1, answer="yes", **extra):
    content = [{"type": "image", "text": None}] * images + [{"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages, **extra}


def strings(*texts, **extra):
    roles = itertools.cycle(["user", "assistant"])
    return {"messages": [{"role": next(roles), "content": text} for text in texts], **extra}


def karpathy(name="red.png", split="train", sentences=("a", "b"), **extra):
    sentences = [{"tokens": text.split(), "raw": text, "sentid": n} for n, text in enumerate(sentences)]
    return {"filepath": "", "filename": name, "imgid": 0, "split": split, "sentences": sentences, **extra}


def story(*steps, story="45530"):
    return [
        [
            {
                "original_text": f"{sentence}!",
                "photo_flickr_id": photo,
                "story_id": story,
                "worker_arranged_photo_order": order,
                "text": f"{sentence} !",
            }
        ]
        for order, photo, sentence in steps
    ]


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, records in members.items():
            file.writestr(name, "".join(json.dumps(record) + "\n" for record in records))
    return path


def png(name, root):
    return (root / name).read_bytes()


def encoded(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def shape(row):
    """Reading order of a row: texts, and images as the name of their colour."""
    names = {colour: name.removesuffix(".png") for name, colour in COLOURS.items()}
    images = iter(names[image.convert("RGB").getpixel((0, 0))] for image in row["images"])
    return [
        (message["role"], [part["text"] if part["type"] == "text" else {next(images)} for part in message["content"]])
        for message in row["messages"]
    ]


def caption_shape(name, text):
    return [("user", [{name}, text])]


def stored(rows, root):
    rows = [{"loss_on": "answers", "structure": True, "id": None, **row} for row in rows]
    for row in rows:
        row["images"] = [str(root / name) for name in row.get("images", ())]
    return Dataset.from_list(rows, features=ROW_FEATURES)


def document(*parts, role="user"):
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return [{"role": role, "content": content}]


class TestLayouts:
    def test_llava(self, root):
        turns = ["Be short.", "What?\n<image>", "Red.", "<image>", "Blue."]
        roles = ["system", "human", "gpt", "human", "gpt"]
        records = [
            llava(),
            llava(["green.png", "blue.png"], "Compare <image> with <image>, please."),
            llava(None, "  No picture. "),
            {
                "id": "multi",
                "image": ["red.png", "blue.png"],
                "conversations": [{"from": r, "value": v} for r, v in zip(roles, turns, strict=True)],
            },
            llava(["green.png", "red.png"], "<image><image>\nTwo."),
        ]
        for name in ("data.json", "data.jsonl"):
            dataset = load_data(write(root / name, records))
            assert [shape(row) for row in dataset] == [
                [("user", [{"red"}, "What is it?"]), ("assistant", ["A colour."])],
                [("user", ["Compare", {"green"}, "with", {"blue"}, ", please."]), ("assistant", ["A colour."])],
                [("user", ["No picture."]), ("assistant", ["A colour."])],
                [
                    ("system", ["Be short."]),
                    ("user", ["What?", {"red"}]),
                    ("assistant", ["Red."]),
                    ("user", [{"blue"}]),
                    ("assistant", ["Blue."]),
                ],
                [("user", [{"green"}, {"red"}, "Two."]), ("assistant", ["A colour."])],
            ]
            assert set(dataset["loss_on"]) == {"answers"}
            assert dataset["id"] == [f"{name}:{n}" for n in range(1, 6)]
            assert dataset.features == ROW_FEATURES
        paths = dataset.with_format("arrow")[0]["images"].to_pylist()  # images stay paths
        assert paths == [[{"bytes": None, "path": str(root / "red.png")}]]

    @both
    def test_mmc4(self, root, streaming):
        """Shards are zip archives of one JSON lines file each."""
        images = [("blue.png", 2), ("red.png", 0), ("green.png", 2)]
        for n in (1, 0, 10):
            records = [mmc4([f"shard {n}", " b ", "c"], images), mmc4(["alone"], [])]
            archive(root / f"docs_{n}.jsonl.zip", {f"docs_{n}.jsonl": records})
        with pytest.raises(FileNotFoundError, match="finds no file"):
            load_data(root / "docs_*_v2")
        rows = list(load_data({"path": root / "docs_*.jsonl.zip"}, streaming=streaming))
        assert [row["id"] for row in rows] == [f"docs_{n}.jsonl:{k}" for n in (0, 1, 10) for k in (1, 2)]
        assert [shape(row) for row in rows[2:4]] == [
            [("user", [{"red"}, "shard 1", "b", {"blue"}, {"green"}, "c"])],
            [("user", ["alone"])],
        ]
        assert {row["loss_on"] for row in rows} == {"text"}

    @both
    def test_coco(self, root, streaming):
        images = [
            karpathy("red.png", "test", ["r1", "r2"]),
            karpathy("green.png", "train", [" g1 "]),
            karpathy("blue.png", "restval", ["b1"]),
            karpathy("green.png", "val", ["g2"]),
        ]
        path = root / "dataset_coco.json"
        path.write_text(json.dumps({"images": images, "dataset": "coco"}))
        for split, expected in [
            ("train", [("green", "g1"), ("blue", "b1")]),
            ("restval", [("blue", "b1")]),
            ("val", [("green", "g2")]),
            ("validation", [("green", "g2")]),
            ("test", [("red", "r1"), ("red", "r2")]),
        ]:
            rows = list(load_data(path, split, streaming=streaming))
            assert [shape(row) for row in rows] == [caption_shape(*pair) for pair in expected]
            assert {row["loss_on"] for row in rows} == {"captions"}
        assert [row["id"] for row in rows] == ["dataset_coco.json:1.1", "dataset_coco.json:1.2"]
        assert len(list(load_data({"path": path, "split": "test"}, streaming=streaming))) == 2
        with pytest.raises(ValueError, match="no image is of the split 'dev', but of restval, test, train, val"):
            list(load_data(path, "dev", streaming=streaming))

    @both
    def test_vist(self, root, streaming):
        for number, name in (("1741642", "red.png"), ("1741640", "blue.png")):
            (root / f"{number}.png").write_bytes(png(name, root))
        first = story((1, "1741640", "then"), (0, "1741642", "once"))
        second = story((0, "1741642", "other"), story="9")
        del second[0][0]["original_text"]
        path = root / "train.story-in-sequence.json"
        path.write_text(json.dumps({"images": [], "annotations": [first[0], second[0], first[1]]}))
        rows = list(load_data(path, streaming=streaming))
        assert [shape(row) for row in rows] == [
            [("user", [{"red"}, "once!", {"blue"}, "then!"])],
            [("user", [{"red"}, "other !"])],
        ]
        assert [(row["loss_on"], row["id"]) for row in rows] == [("text", f"{path.name}:{n}") for n in (1, 2)]

    @both
    def test_winoground(self, root, streaming):
        names = ("image_0", "image_1", "caption_0", "caption_1")
        features = Features({**dict.fromkeys(names[:2], Image()), **dict.fromkeys(names[2:], Value("string"))})
        rows = [("red", "blue", "red on blue", "blue on red"), ("green", None, "g", "r"), ("red", "green", "x", "")]
        rows += [("green", "red", "g", "r")]
        rows = [(a and str(root / f"{a}.png"), b and str(root / f"{b}.png"), *texts) for a, b, *texts in rows]
        table = Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows], features=features)
        table.to_parquet(root / "test.parquet")
        with pytest.raises(ValueError, match="test.parquet, row 2, `image_1`: there is no image"):
            list(load_data(root / "test.parquet", streaming=streaming))
        problems = []
        rows = list(load_data(root / "test.parquet", streaming=streaming, on_bad_row="skip", bad_rows=problems))
        # several rows of a record, in its order
        pairs = [("red", "red on blue"), ("blue", "blue on red"), ("green", "g"), ("red", "r")]
        assert [shape(row) for row in rows] == [caption_shape(*pair) for pair in pairs]
        assert [row["id"] for row in rows] == [f"test.parquet:{n}.{k}" for n in (1, 4) for k in (1, 2)]
        assert [(p.id, p.field) for p in problems] == [("test.parquet:2", "image_1"), ("test.parquet:3", "caption_1")]

    def test_conversational(self, root):
        rows = [
            chat(images=2, answer=None, loss_on="text", id="mine") | {"images": ["red.png", "blue.png"]},
            # contents as strings: the images stand before the first user text, as in TRL
            strings("what?", "red", "sure?", "yes", images=["red.png"]),
            strings("a", "b"),
            strings("a", "b", structure=0),
        ]
        rows[1]["messages"].insert(0, {"role": "system", "content": "Short."})
        for name in ("data.json", "data.jsonl"):
            dataset = load_data(write(root / name, rows))
            assert dataset.features == ROW_FEATURES
            assert dataset["id"] == ["mine", *(f"{name}:{n}" for n in (2, 3, 4))]
            assert dataset["loss_on"] == ["text", "answers", "answers", "answers"]
            assert dataset["structure"] == [True, True, True, False]
            assert [shape(row) for row in dataset][:3] == [
                [("user", [{"red"}, {"blue"}, "what?"])],
                [
                    ("system", ["Short."]),
                    ("user", [{"red"}, "what?"]),
                    ("assistant", ["red"]),
                    ("user", ["sure?"]),
                    ("assistant", ["yes"]),
                ],
                [("user", ["a"]), ("assistant", ["b"])],
            ]

    def test_auto(self, root):
        sources = [
            write(root / "a.json", [llava()]),
            write(root / "b.jsonl", [mmc4()]),
            write(root / "c.jsonl", [chat() | {"images": ["red.png"]}]),
        ]
        assert [load_data(source)["loss_on"] for source in sources] == [["answers"], ["text"], ["answers"]]
        path = write(root / "d.jsonl", [{"caption": "x", "url": "y"}])
        with pytest.raises(ValueError, match=r"d\.jsonl, first record: no layout .* the fields caption, url") as error:
            load_data(path)
        assert all(f"\n  {name}: " in str(error.value) for name in LAYOUTS)
        path = write(root / "a.json", [llava(gpt="long " * 300_000), llava()])  # one line of more than is read at once
        assert len(load_data(path)) == 2


GOOD = {
    "llava": llava(),
    "mmc4": mmc4(),
    "coco": karpathy(),
    "vist": story((0, "red.png", "good"), story="1")[0],
    "captions": {"image": "red.png", "caption": ["x", "y"]},
    "conversational": strings("a", "b"),
}
STEP = {"story_id": "7", "worker_arranged_photo_order": 0, "photo_flickr_id": "red.png"}
BAD = [
    ("llava", llava("lost.png"), "image", "lost.png does not exist"),
    ("llava", llava(["red.png", "lost.png"], "<image><image>"), "image[1]", "lost.png does not exist"),
    ("llava", llava(["red.png", "blue.png"]), "image", "2 images but 1 <image> placeholders"),
    ("llava", llava("red.png", "no placeholder"), "image", "1 images but 0 <image> placeholders"),
    ("llava", llava(None), "image", "0 images but 1 <image> placeholders"),
    ("llava", llava(""), "image", "is '', not a path"),
    ("llava", llava(7), "image", "is 7, not a path"),
    ("llava", llava(gpt="  "), "conversations[1].value", "is empty"),
    ("llava", llava(human=None), "conversations[0].value", "is None, not a string"),
    ("llava", llava(gpt="see <image>"), "conversations[1].value", "only a human turn"),
    ("llava", llava(conversations=[{"from": "bot", "value": "hi"}]), "conversations[0].from", "is 'bot'. Use one of human"),
    ("llava", llava(conversations=["hi"]), "conversations[0].from", "is None"),
    ("llava", llava(conversations=[{"from": "human", "value": "<image>"}]), "conversations", "no gpt turn"),
    ("llava", llava(conversations=[]), "conversations", "is missing, empty or not a list. Write {"),
    ("llava", ["list"], "record", "is a list, not an object"),
    ("llava", llava(structure="false"), "structure", "is 'false'. Use true or false"),
    ("llava", llava(loss_on="images"), "loss_on", "is 'images'. Use one of answers"),
    ("llava", llava(gpt="x\ud83d"), "conversations[1].value", "has half of a surrogate pair"),
    ("llava", llava("\ud83d.png"), "image", "has half of a surrogate pair"),
    *(("llava", llava(None, "what?") | {name: "x.mp4"}, name, "is not read") for name in ("video", "videos", "audio")),
    ("mmc4", mmc4(images=[("red.png", 0), ("red.png", 2)]), "image_info[1].matched_text_index", "is 2. Every image needs the index of the sentence it belongs to, from 0 to 1"),
    ("mmc4", mmc4(images=[("red.png", -1)]), "image_info[0].matched_text_index", "is -1"),
    ("mmc4", mmc4(images=[("red.png", 1.0)]), "image_info[0].matched_text_index", "is 1.0"),
    ("mmc4", {"text_list": ["a"], "image_info": [{"image_name": "red.png"}]}, "image_info[0].matched_text_index", "is None"),
    ("mmc4", {"text_list": ["a"], "image_info": ["red.png"]}, "image_info[0]", "is not an object"),
    ("mmc4", mmc4(images=[("lost.png", 0)]), "image_info[0].image_name", "lost.png does not exist"),
    ("mmc4", mmc4(["a", ""]), "text_list[1]", "is empty"),
    ("mmc4", mmc4(["a", 3]), "text_list[1]", "is 3, not a string"),
    ("mmc4", mmc4([], []), "text_list", "is missing, empty"),
    ("mmc4", {"text_list": ["a"]}, "image_info", "is missing"),
    ("coco", karpathy("lost.png"), "filename", "lost.png does not exist"),
    ("coco", karpathy(None), "filename", "no image"),
    ("coco", karpathy(sentences=[]), "sentences", "is missing, empty"),
    ("coco", karpathy(sentences=["a", "  "]), "sentences[1].raw", "is empty"),
    ("coco", karpathy() | {"sentences": [{"tokens": ["a"]}]}, "sentences[0].raw", "is None, not a string"),
    ("coco", karpathy(split=None), "split", "is None, not a string"),
    ("coco", "image.jpg", "record", "is a str, not an object"),
    ("vist", story((0, "404", "x")), "annotations[1].photo_flickr_id", "404 does not exist"),
    ("vist", story((0, None, "x")), "annotations[1].photo_flickr_id", "no image"),
    ("vist", story((0, "red.png", "x"), (0, "red.png", "y")), "annotations[2].worker_arranged_photo_order", "need different"),
    ("vist", story((None, "red.png", "x")), "annotations[1].worker_arranged_photo_order", "is None"),
    ("vist", story((0, "red.png", "x"), (2, "red.png", "y")), "annotations[1].story_id", "only the steps 0, 2 are there"),
    ("vist", [[STEP]], "annotations[1].text", "is None"),
    ("vist", [[{"photo_flickr_id": "red.png"}]], "annotations[1]", "with a `story_id`"),
    ("vist", [[]], "annotations[1]", "is not a list of one step"),
    ("captions", {"image": "lost.png", "caption": "x"}, "image", "lost.png does not exist"),
    ("captions", {"image": "red.png"}, "caption", "is missing"),
    ("captions", {"image": "red.png", "caption": ["x", 3]}, "caption[1]", "is 3, not a string"),
    ("captions", {"image": "red.png", "caption": []}, "caption", "is an empty list"),
    ("captions", {"image": "red.png", "caption": "\n"}, "caption", "is empty"),
    ("captions", {"caption": "x"}, "image", "no image"),
    ("captions", {"image": "https://a/b.png", "caption": "x"}, "image", "is a web address"),
    ("conversational", chat(answer=None), "images", "holds 0 images but `messages` has 1 image parts"),
    ("conversational", chat(images=0, answer=None), "messages", "no answer. Add an assistant turn, or set loss_on='text'"),
    ("conversational", chat() | {"images": "red.png"}, "images", "is not a list"),
    ("conversational", strings("a", "b", id="\ud83d"), "id", "has half of a surrogate pair"),
    ("conversational", strings("a\ud83d", "b"), "messages[0].content[0].text", "has half of a surrogate pair"),
    ("conversational", strings("a", 3), "messages[1].content", "is 3 of type int, not a text"),
    ("conversational", {"messages": None}, "messages", "is not a list with at least one message"),
]  # fmt: skip


class TestBadRows:
    @pytest.mark.parametrize(("layout", "bad", "field", "message"), BAD)
    def test_malformed(self, root, layout, bad, field, message):
        good = GOOD[layout]
        for name in ("data.json", "data.jsonl"):
            path, records = root / name, [good, bad, good]
            if layout == "coco":
                path.write_text(json.dumps({"images": records, "dataset": "coco"}))
            elif layout == "vist":
                path.write_text(json.dumps({"images": [], "annotations": [good, *bad]}))
            else:
                write(path, records)
            source, left = {"path": path, "format": layout}, {"vist": 1, "coco": 4, "captions": 4}.get(layout, 2)
            with pytest.raises(ValueError) as error:
                load_data(source)
            assert str(error.value).startswith(f"{path}, row 2, `{field}`: ")
            assert message in str(error.value) and "on_bad_row='skip'" in str(error.value)
            problems = []
            assert len(load_data(source, on_bad_row="skip", bad_rows=problems)) == left
            assert [(problem.id, problem.field) for problem in problems] == [(f"{name}:2", field)]

    def test_damaged_files(self, root):
        path = root / "data.jsonl"
        path.write_text(json.dumps(llava()) + "\n\n{'id': 1}\n" + json.dumps(llava()) + "\n")
        with pytest.raises(ValueError, match=r"data\.jsonl, row 3, `line`: is not valid JSON"):
            load_data(path)
        assert load_data(path, on_bad_row="skip")["id"] == ["data.jsonl:1", "data.jsonl:4"]
        (root / "cut.json").write_text(json.dumps([llava(), llava()])[:-20])
        with gzip.open(root / "docs.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(mmc4([f"{n}", "x"])) + "\n" for n in range(500)))
        (root / "docs.jsonl.gz").write_bytes((root / "docs.jsonl.gz").read_bytes()[:-200])
        (root / "latin.jsonl").write_bytes(json.dumps(mmc4(["caf@", "x"])).encode().replace(b"@", b"\xe9") + b"\n")
        archive(root / "none.zip", {"readme.txt": []})
        records = [mmc4([f"sentence {n} {'x' * 50}", "end"]) for n in range(200)]
        good = archive(root / "docs.zip", {"docs.jsonl": records}).read_bytes()
        (root / "cut.zip").write_bytes(good[: len(good) // 2])
        (root / "docs.zip").write_bytes(good[:400] + bytes([good[400] ^ 255]) + good[401:])
        Dataset.from_dict({"image": [png("red.png", root)], "text": ["x"]}).to_parquet(root / "rows.parquet")
        (root / "rows.parquet").write_bytes((root / "rows.parquet").read_bytes()[:-30])
        (root / "coco.json").write_text('{"images": [], "dataset": "coco"}')
        (root / "vist.json").write_text('{"images": [], "annotations": {}}')
        for name, message in [
            ("cut.json", r"cut\.json is not valid JSON.*Repair"),
            ("docs.jsonl.gz", "docs.jsonl.gz is damaged .EOFError"),
            ("latin.jsonl", "latin.jsonl is damaged .UnicodeDecodeError"),
            ("none.zip", "no .json or .jsonl file"),
            ("cut.zip", "cut.zip: cut.zip is damaged .BadZipFile.*download it again"),
            ("docs.zip", r"docs.zip: docs.jsonl is damaged \((BadZipFile|error)"),
            ("rows.parquet", r"rows.parquet cannot be read \(Arrow"),
            ("coco.json", "coco.json: `images` is missing, empty"),
            ("vist.json", "vist.json: `annotations` is missing, empty"),
        ]:
            for streaming in (False, True):
                with pytest.raises(ValueError, match=message):
                    list(load_data(root / name, on_bad_row="skip", streaming=streaming))

    def test_skip_reports(self, root, caplog):
        path = write(root / "data.json", [llava(), *(llava(f"lost{n}.png") for n in range(7)), llava()])
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            assert len(load_data(path, on_bad_row="skip")) == 2
        (record,) = caplog.records
        assert "skipped 7 of 9 rows" in record.getMessage()
        assert [f"lost{n}.png" in record.getMessage() for n in range(7)] == [True] * 5 + [False] * 2
        with pytest.raises(ValueError, match=r"none of 1 rows is left.\n.*row 1, `image`"):
            load_data(write(root / "data.json", [llava("lost.png")]), on_bad_row="skip")
        with pytest.raises(ValueError, match="none of 0 rows"):
            load_data({"path": write(root / "empty.jsonl", []), "format": "llava"})

    @both
    def test_stored_bad_rows(self, root, streaming, caplog):
        """As img2dataset writes them: plain binary, and nothing where the download failed."""
        rows = [("red.png", "a"), (None, "b"), ("blue.png", "c"), ("green.png", None)]
        table = {"key": ["0", "1", "2", "3"], "jpg": [name and png(name, root) for name, _ in rows]}
        Dataset.from_dict({**table, "caption": [text for _, text in rows]}).to_parquet(root / "0.parquet")
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            rows = list(load_data(root / "0.parquet", streaming=streaming, on_bad_row="skip"))
        assert [shape(row) for row in rows] == [caption_shape("red", "a"), caption_shape("blue", "c")]
        assert "skipped 2 of 4 rows" in caplog.text


class TestFiles:
    def test_compressed(self, root):
        text = "".join(json.dumps(llava(gpt=f"answer {n}")) + "\n" for n in range(3))
        with gzip.open(root / "data.jsonl.gz", "wt") as file:
            file.write(text)
        with zipfile.ZipFile(root / "data.zip", "w") as file:
            file.writestr("a.jsonl", text)
            file.writestr("b.json", json.dumps([llava(gpt="answer 3")]))
            file.writestr("notes.txt", "no data")
        rows = load_data(root / "data.zip")
        assert rows["id"] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.json:1"]
        assert load_data(root / "data.jsonl.gz")["messages"] == rows["messages"][:3]

    @both
    def test_folder_of_json(self, root, streaming):
        """Values as they are written, where `datasets` 5.2 gives JSON text for the contents of the second file, dates
        for those of the test split, and 3 for 3.5."""
        folder = root / "folder"
        folder.mkdir()
        texts = strings("3", '"now"', w=3, mixed="3")
        parts = chat() | {"images": ["red.png"], "mixed": ["x"]}
        parts["messages"][1]["content"] = "a"
        write(folder / "train-0.jsonl", [texts])
        write(folder / "train-1.json", [parts, texts | {"w": 3.5}])
        write(folder / "test.jsonl", [strings("2024-01-02", "2024-01-02")])
        (folder / "red.png").write_bytes(png("red.png", root))  # of more kinds of files than one
        said = [("user", ["3"]), ("assistant", ['"now"'])]
        rows = list(load_data(folder, streaming=streaming))
        assert [shape(row) for row in rows] == [said, [("user", [{"red"}, "what?"]), ("assistant", ["a"])], said]
        assert [row["id"] for row in rows] == ["train-0.jsonl:1", "train-1.json:1", "train-1.json:2"]
        (row,) = load_data(folder, "test", streaming=streaming)
        assert shape(row) == [("user", ["2024-01-02"]), ("assistant", ["2024-01-02"])]
        with pytest.raises(ValueError, match="no split 'dev', but train, test"):
            load_data(folder, "dev", streaming=streaming)
        table = load_table(folder, streaming=streaming)
        assert [row["messages"][1]["content"] for row in table] == ['"now"', "a", '"now"']
        assert [row["messages"][0]["content"] for row in table] == ["3", parts["messages"][0]["content"], "3"]
        assert [row.get("w") for row in table] == [3, None, 3.5]
        assert [row["mixed"] for row in table] == ["3", ["x"], "3"]
        if not streaming:
            table.save_to_disk(root / "saved")  # a column of JSON
            for again in (load_data(root / "saved", image_root=folder, streaming=s) for s in (False, True)):
                assert [row["messages"][0]["content"][-1]["text"] for row in again] == ["3", "what?", "3"]
        write(folder / "test.jsonl", ["text"])
        with pytest.raises(ValueError, match="test.jsonl, row 1 is a str, not an object"):
            list(load_table(folder, "test", streaming=streaming))

    @both
    def test_saved(self, root, streaming):
        rows = [chat() | {"images": [str(root / name)]} for name in ("red.png", "blue.png")]
        part = {"index": Value("int64"), "type": Value("string"), "text": Value("string")}
        messages = List({"content": List(part), "role": Value("string")})  # other order, one key more
        table = Dataset.from_list(rows, features=Features({"messages": messages, "images": List(Image())}))
        table.with_format("numpy").save_to_disk(root / "one")
        DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(root / "dict")
        table.to_parquet(root / "rows.parquet")
        expected = [[("user", [{c}, "what?"]), ("assistant", ["yes"])] for c in ("red", "blue")]
        for path in (root / "one", root / "dict", root / "rows.parquet"):
            dataset = load_data(path, streaming=streaming)
            assert dataset.features == ROW_FEATURES
            assert [shape(row) for row in dataset] == expected
            assert [row["id"] for row in dataset] == [f"{path.name}:1", f"{path.name}:2"]
        assert [shape(row) for row in load_data(root / "dict", "test", streaming=streaming)] == expected[1:]
        assert [shape(row) for row in load_data({"path": root / "dict", "split": "test"})] == expected[1:]
        with pytest.raises(ValueError, match="no split 'dev', but train, test"):
            load_data(root / "dict", split="dev")

    def test_stored_images_are_not_read(self, root):
        """Rewriting the text must leave stored image bytes alone, undecodable ones included."""
        features = Features({key: ROW_FEATURES[key] for key in ("messages", "images")})
        rows = [chat() | {"images": [{"bytes": b"no image", "path": None}]}]
        Dataset.from_list(rows, features=features).save_to_disk(root / "stored")
        dataset = load_data(root / "stored")
        assert dataset.with_format("arrow")[0]["images"].to_pylist()[0][0]["bytes"] == b"no image"

    @both
    def test_llava_with_stored_images(self, root, streaming):
        """As LLaVA-OneVision-Data: an image column, and rows without one."""
        rows = [llava("red.png"), llava(None, "no image"), llava("blue.png", "a <image> b"), llava("red.png", "none")]
        rows = [{**row, "image": row.get("image") and str(root / row["image"])} for row in rows]
        Dataset.from_list(rows).cast_column("image", Image()).to_parquet(root / "rows.parquet")
        rows = list(load_data(root / "rows.parquet", streaming=streaming, on_bad_row="skip"))
        assert [shape(row)[0][1] for row in rows] == [[{"red"}, "What is it?"], ["no image"], ["a", {"blue"}, "b"]]
        with pytest.raises(ValueError, match="row 4, `image`: 1 images but 0 <image>"):
            list(load_data(root / "rows.parquet", streaming=streaming))

    def test_parquet_of_paths(self, root):
        rows = [chat(id=f"r{n}") | {"images": [name]} for n, name in enumerate(["red.png", "lost.png", "blue.png"])]
        Dataset.from_list(rows).to_parquet(root / "rows.parquet")
        with pytest.raises(ValueError, match=r"row 2, `images\[0\]`: the image file .*lost.png does not exist"):
            load_data(root / "rows.parquet")
        dataset = load_data(root / "rows.parquet", on_bad_row="skip")
        assert dataset["id"] == ["r0", "r2"]
        assert [shape(row)[0][1][0] for row in dataset] == [{"red"}, {"blue"}]
        # paths in a column of images are relative to its file too, and not to where the process runs
        paths = [{"path": "red.png", "bytes": None}, {"path": None, "bytes": png("blue.png", root)}]
        for images in (paths[:1], paths):
            table = {"image": images, "caption": ["x"] * len(images)}
            features = Features({"image": Image(), "caption": Value("string")})
            table = Dataset.from_dict(table, features=features).with_format("arrow")[:]
            pq.write_table(table, root / "images.parquet")  # `to_parquet` would store the images
            if len(images) == 1:
                assert shape(load_data(root / "images.parquet")[0]) == caption_shape("red", "x")
            else:
                with pytest.raises(ValueError, match="row 1, `image`: is the path red.png among stored images"):
                    load_data(root / "images.parquet")
        Dataset.from_dict({"id": [1], "url": ["http://a/b.jpg"], "text": ["x"]}).to_parquet(root / "coyo.parquet")
        with pytest.raises(ValueError, match="Download the images that `url` names first"):
            load_data(root / "coyo.parquet")

    @both
    def test_image_folder(self, root, streaming):
        folder = root / "folder"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "red.png").write_bytes(png("red.png", root))
        (folder / "blue.png").write_bytes(png("blue.png", root))
        names = {"sub/red.png": "2024-01-02", "blue.png": "2024-01-03"}  # dates to `datasets`
        expected = [caption_shape("red", "2024-01-02"), caption_shape("blue", "2024-01-03")]
        write(folder / "metadata.jsonl", [{"file_name": name, "text": text} for name, text in names.items()])
        for path in (folder, folder / "metadata.jsonl"):
            assert [shape(row) for row in load_data(path, streaming=streaming)] == expected
        write(folder / "metadata.jsonl", [{"file_name": "blue.png", **chat()}])
        assert shape(next(iter(load_data(folder, streaming=streaming))))[0] == ("user", [{"blue"}, "what?"])
        (folder / "metadata.jsonl").unlink()
        lines = [f"{name},{text}" for name, text in names.items()]
        (folder / "metadata.csv").write_text("\n".join(["file_name,alt", *lines, "lost.png,gone"]))
        source = {"path": folder, "rename": {"alt": "text"}}
        with pytest.raises(ValueError, match=r"folder, row 3, `image`: the image file .*lost.png does not exist"):
            list(load_data(source, streaming=streaming))
        rows = load_data(source, streaming=streaming, on_bad_row="skip")
        assert [shape(row) for row in rows] == expected
        (folder / "metadata.csv").unlink()
        with pytest.raises(ValueError, match="no layout is known with the fields image"):
            load_data(folder, streaming=streaming)

    @both
    def test_tar(self, root, streaming):
        for shard, name in enumerate(("red.png", "blue.png")):
            members = []
            for key, image, text in ((f"{shard}0", name, "first"), (f"{shard}1", "green.png", "x")):
                info = json.dumps({"url": "u", "caption": text}).encode()
                members += [(f"{key}.png", png(image, root)), (f"{key}.txt", text.encode()), (f"{key}.json", info)]
            tar(root / f"0000{shard}.tar", members)
        rows = list(load_data(str(root / "*.tar"), streaming=streaming))
        pairs = [("red", "first"), ("green", "x"), ("blue", "first"), ("green", "x")]
        assert [shape(row) for row in rows] == [caption_shape(*pair) for pair in pairs]
        assert [row["id"] for row in rows] == ["00000.tar:00", "00000.tar:01", "00001.tar:10", "00001.tar:11"]

    @both
    def test_tar_as_found(self, root, streaming, caplog):
        """Upper-case names, samples of other kinds than the first, members missing from the first samples: where
        `datasets` 5.2 drops members without a word, or refuses the file."""
        blue = encoded(PILImage.new("RGB", (4, 4), (0, 0, 255)), "JPEG")
        members = [("a/0.PNG", png("red.png", root)), ("a/0.TXT", b"2024-01-02")]
        members += [("a/1.png", png("red.png", root)), ("a/2.txt", b"alone"), ("readme", b"x"), ("._3.txt", b"x")]
        for n in range(3, 7):
            members += [(f"a/{n}.png", png("green.png", root)), (f"a/{n}.json", b'{"caption": "g", "w": 3}')]
        members += [("a/7.jpg", blue), ("a/7.json", b'{"caption": "7", "w": 3.5, "extra": 1}')]
        members += [("a/8.png", png("red.png", root)), ("a/8.txt", b"\xff")]
        members += [("a/9.png", png("red.png", root)), ("a/9.json", b"{'caption'")]
        members += [("a/10.png", png("red.png", root)), ("a/10.txt", b"a film"), ("a/10.mp4", b"film")]
        path = tar(root / "0.tar", members)
        rows = list(load_data(path, streaming=streaming, on_bad_row="skip"))
        assert [row["id"] for row in rows] == [f"0.tar:a/{n}" for n in (0, 3, 4, 5, 6, 7)]
        assert [row["messages"][0]["content"][1]["text"] for row in rows] == ["2024-01-02", *"gggg", "7"]
        assert shape(rows[0]) == caption_shape("red", "2024-01-02")
        assert rows[-1]["images"][0].format == "JPEG" and rows[-1]["images"][0].getpixel((0, 0))[2] > 250
        for problem in ("1, `caption`: is missing", "2, `image`: there is no image", "8, `caption`: is missing or not",
                        "9, `json`: is not a JSON object", "10, `mp4`: is not read"):  # fmt: skip
            assert f"0.tar, row a/{problem}" in caplog.text
        table = list(load_table(path, streaming=streaming))
        assert table[7]["json"] == {"caption": "7", "w": 3.5, "extra": 1} and table[3]["json"]["w"] == 3
        tar(path, [("0.png", png("blue.png", root)), ("0.txt", b"new")])  # not what the cache holds of the old one
        assert shape(next(iter(load_data(path, streaming=streaming)))) == caption_shape("blue", "new")

    @both
    def test_damaged_tar(self, root, streaming):
        members = [(f"{n}.{k}", c) for n in range(9) for k, c in (("png", png("red.png", root)), ("txt", b"words"))]
        good = tar(root / "good.tar", members).read_bytes()
        whole = 1024 * len(members)
        for bad in (good[: whole - 20], good[: whole // 2 + 600], good[: whole // 2], good[:2048] + b"x" * 512, b"no"):
            (root / "bad.tar").write_bytes(bad)
            with pytest.raises(ValueError, match=r"bad.tar is damaged \(ReadError.*download it again"):
                list(load_data(root / "bad.tar", streaming=streaming))
        tar(root / "twice.tar", [("0.png", png("blue.png", root)), ("0.txt", b"a"), ("0.TXT", b"b")])
        with pytest.raises(ValueError, match="twice.tar: the sample 0 has two members txt"):
            list(load_data(root / "twice.tar", streaming=streaming))


class TestSources:
    def sources(self, root):
        return [
            {"path": write(root / "a.json", [llava(gpt=f"{n}") for n in range(20)])},
            {"path": write(root / "b.jsonl", [mmc4([f"{n}", "x"]) for n in range(60)])},
            {"path": write(root / "c.jsonl", [{"image": "red.png", "caption": f"{n}"} for n in range(40)])},
        ]

    def test_mixtures(self, root):
        a, b, c = self.sources(root)
        mixed = load_data([a["path"], b], seed=3)
        rows = [*load_data(a)["id"], *load_data(b)["id"]]
        assert sorted(mixed["id"]) == sorted(rows) and list(mixed["id"]) != rows
        assert list(load_data([a, b], seed=3)["id"]) == list(mixed["id"]) != list(load_data([a, b], seed=4)["id"])
        assert load_data(a)["id"] == [f"a.json:{n}" for n in range(1, 21)]
        assert all(load_data(source).features == ROW_FEATURES for source in (a, b, c))
        assert len(concatenate_datasets([load_data(a), load_data(c)])) == 60
        assert len(load_data(str(root / "[bx].jsonl"))) == 60

    def test_weights(self, root):
        a = write(root / "a.json", [llava(gpt=f"{n}") for n in range(400)])
        b = write(root / "b.jsonl", [mmc4([f"{n}", "x"]) for n in range(400)])
        ids = list(load_data([{"path": a, "weight": 3}, {"path": b, "weight": 1}])["id"])
        assert len(set(ids)) == 800  # no row is lost
        share = sum(row.startswith("a.json") for row in ids) / len(ids)
        assert abs(share - 0.75) < 5 * (0.75 * 0.25 / len(ids)) ** 0.5
        # rows are drawn at random, not in blocks
        assert 0.6 < sum(row.startswith("a.json") for row in ids[:200]) / 200 < 0.9

    def test_image_root(self, root, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        path = write(elsewhere / "data.json", [llava()])
        for source, argument in ((path, root), ({"path": path, "image_root": root}, "nowhere")):
            assert shape(load_data(source, image_root=argument)[0])[0][1][0] == {"red"}
        with pytest.raises(ValueError, match="does not exist.*image_root"):
            load_data(path)

    def test_rules(self, root):
        a, b, c = self.sources(root)
        rows = load_data([{**a, "loss_on": "text"}, b, {**c, "structure": False}])
        rules = {row["id"].split(":")[0]: (row["loss_on"], row["structure"]) for row in rows}
        assert rules == {"a.json": ("text", True), "b.jsonl": ("text", True), "c.jsonl": ("captions", False)}
        with pytest.raises(ValueError, match=r"b.jsonl, row 1, `messages`: no answer"):
            load_data({**b, "loss_on": "answers"})
        path = write(root / "d.jsonl", [llava(), llava(structure=0, loss_on="text")])  # of the record itself
        assert load_data(path)["structure"] == [True, False] and load_data(path)["loss_on"] == ["answers", "text"]
        assert load_data({"path": path, "structure": True})["structure"] == [True, True]

    def test_arguments(self, root):
        path = str(write(root / "a.json", [llava()]))
        for sources, message in [
            ([], "is empty"),
            ([{"file": path}], r"sources\[0\] has the keys file. It needs `path`"),
            ([path, {"path": path, "wieght": 1}], r"sources\[1\] has the keys path, wieght"),
            ([{"path": path, "weight": 1}, path], "every source a `weight`"),
            *(
                ([{"path": path, "weight": 1}, {"path": path, "weight": w}], "greater than 0")
                for w in (0, "1", np.nan)
            ),
            ({"path": path, "format": "csv"}, "`format` is 'csv'. Use one of auto, conversational, llava"),
            ({"path": path, "loss_on": "images"}, "`loss_on` is 'images'. Use one of answers, captions, text"),
            ({"path": path, "structure": "no"}, "`structure` is 'no'. Use one of True, False"),
            ({"path": path, "rename": "x"}, "`rename` is 'x'. Write it as"),
            (str(root / "red.png"), "what kind of file"),
        ]:
            with pytest.raises(ValueError, match=message):
                load_data(sources)
        with pytest.raises(ValueError, match="on_bad_row.*'ignore'"):
            load_data(path, on_bad_row="ignore")
        for lost in (str(root / "lost.json"), str(root / "lost"), "lost.jsonl", "a/lost.parquet", "a/b/c"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                load_data(lost)
        with pytest.raises(FileNotFoundError, match=r"no/dataset is no file or folder in .* and no Hub dataset"):
            load_data("no/dataset")

    def test_streaming(self, root, caplog):
        for source in self.sources(root):
            assert list(load_data(source, streaming=True)) == list(load_data(source))
            assert load_data(source, streaming=True).features == ROW_FEATURES
        path = write(root / "a.json", [llava(), llava("lost.png"), llava()])
        rows = load_data(path, streaming=True)  # reads when asked
        with pytest.raises(ValueError, match=r"a.json, row 2, `image`"):
            list(rows)
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            rows = load_data(path, streaming=True, on_bad_row="skip")
            assert "skipped" not in caplog.text
            assert len(list(itertools.islice(rows, 2))) == 2  # training stops when it has its steps
            assert "skipped 1 of 3 rows" in caplog.text

    def test_streamed_mixtures(self, root):
        sources = [{**source, "weight": weight} for source, weight in zip(self.sources(root), (1, 2, 1), strict=True)]
        ids = [row["id"] for row in load_data(sources, streaming=True)]
        assert len(set(ids)) == 120  # no row is lost
        assert ids == [row["id"] for row in load_data(sources, streaming=True)]
        assert 0.35 < sum(name.startswith("b") for name in ids) / len(ids) < 0.65
        turns = [row["id"] for row in load_data(self.sources(root), streaming=True)]
        assert len(turns) == 120 and turns[:4] == ["a.json:1", "b.jsonl:1", "c.jsonl:1", "a.json:2"]
        for n in range(4):
            write(root / f"s{n}.jsonl", [mmc4([f"{n}", "x"])])
        rows = load_data(str(root / "s*.jsonl"), streaming=True)
        assert rows.num_shards == 4
        assert [row["id"] for row in rows.shard(2, 1)] == ["s2.jsonl:1", "s3.jsonl:1"]


class TestChecks:
    @pytest.mark.parametrize(
        ("row", "field", "message"),
        [
            ({"messages": document("x")}, "messages", "no answer. Add an assistant turn"),
            ({"messages": document("x", None), "images": ["red.png"], "loss_on": "captions"}, "messages", "no caption"),
            ({"messages": document(None), "images": ["red.png"], "loss_on": "text"}, "messages", "no text"),
            ({"messages": document("x"), "loss_on": "all"}, "loss_on", "is 'all'. Use one of answers"),
            ({"messages": []}, "messages", "at least one message"),
            ({"messages": None}, "messages", "at least one message"),
            ({"messages": document("x", role="tool")}, "messages[0].role", "is 'tool'"),
            ({"messages": document()}, "messages[0].content", "is empty"),
            ({"messages": document("x", " ")}, "messages[0].content[1].text", "is empty"),
            ({"messages": document(None, role="system")}, "messages[0].content[0]", "system message"),
            ({"messages": [{"role": "user", "content": [{"type": "video", "text": ""}]}]}, "messages[0].content[0].type", "is 'video'"),
            ({"messages": document('[{"type": "image"}, {"type": "text", "text": "q"}]')}, "messages[0].content[0]", "JSON text of parts"),
            ({"messages": document(None, None, "x"), "images": ["red.png"]}, "images", "1 images but `messages` has 2"),
        ],
    )  # fmt: skip
    def test_problems(self, root, row, field, message):
        good = chat() | {"images": ["red.png"], "id": "good"}
        dataset = stored([good, row | {"id": "f.json:9"}, good], root)
        problem, *others = check_dataset(dataset).problems
        assert (problem.row, problem.field, problem.id) == (1, field, "f.json:9")
        assert message in problem.message and all(other.row == 1 for other in others)
        with pytest.raises(ValueError) as error:
            validate_rows(dataset, "train_dataset")
        assert "train_dataset cannot be used" in str(error.value)
        assert f"row 1 (f.json:9), `{field}`: " in str(error.value)

    def test_good_rows(self, root):
        rows = [
            chat() | {"images": ["red.png"]},
            {"messages": document(None, "caption"), "images": ["red.png"], "loss_on": "captions"},
            {"messages": document("only text"), "loss_on": "text"},
            chat(images=0),
        ]
        dataset = stored(rows, root)
        (root / "red.png").unlink()  # no image is looked at
        for good in (dataset, dataset.select([3, 1]), dataset.select([2, 3]).remove_columns(["images", "id"])):
            validate_rows(good)  # counts follow the selection
        row = {"messages": [{"role": "user", "content": "a red square"}], "loss_on": "captions"}
        row = Dataset.from_list([row | {"images": ["red.png"]}])
        validate_rows(row.cast_column("images", List(Image())))
        validate_rows(Dataset.from_list([strings("what?", "red")]).with_format("torch"))

    def test_first_few_and_total(self, root):
        rows = [chat(answer=None, id=f"r{n}") | {"images": ["red.png"]} for n in range(9)]
        with pytest.raises(ValueError) as error:
            validate_rows(stored([*rows, chat() | {"images": ["red.png"]}], root))
        assert "9 problems in 9 rows" in str(error.value)
        assert [f"row {n} (r{n})" in str(error.value) for n in range(9)] == [True] * 5 + [False] * 4
        assert "and 4 more" in str(error.value)
        with pytest.raises(ValueError, match="eval has no rows"):
            validate_rows(stored([chat(images=0)], root).select([]), "eval")
        with pytest.raises(ValueError, match="eval has no `messages` column"):
            validate_rows(Dataset.from_dict({"text": ["x"]}), "eval")

    @pytest.mark.parametrize(
        ("value", "expected"), [(False, False), (0, False), (1, True), (True, True), (None, True), ("false", None)]
    )
    def test_structure(self, value, expected):
        """0 and 1 are what pandas and CSV files make of booleans; a text that means nothing to Python is refused."""
        row = chat(images=0, structure=value)
        if expected is None:
            with pytest.raises(ValueError, match="`structure`: is 'false'. Use true or false"):
                validate_rows(Dataset.from_list([row]))
        else:
            validate_rows(Dataset.from_list([row]))
            assert conversation_row(row)["structure"] is expected

    @pytest.mark.parametrize("field", ["video", "audios"])
    def test_other_media(self, field):
        rows = Dataset.from_list([chat(images=0) | {field: ["x.mp4"]}, chat(images=0) | {field: None}])
        assert [(p.row, p.field) for p in check_dataset(rows).problems] == [(0, field)]
        with pytest.raises(ValueError, match=f"row 0, `{field}`: is not read"):
            validate_rows(rows)

    def test_damaged_by_datasets(self, root):
        """What `datasets.load_dataset` 5.2 makes of good files is refused, and why is said."""
        parts = chat(images=0)
        parts["messages"][1]["content"] = "now"
        files = [write(root / "a.jsonl", [strings("when?", "now")]), write(root / "b.jsonl", [parts])]
        rows = datasets.load_dataset("json", data_files=list(map(str, files)), split="train")
        with pytest.raises(ValueError, match=r"`messages\[0\].content`: is JSON text of parts, .*data.load_data"):
            validate_rows(rows)
        path = write(root / "c.jsonl", [strings("2024-01-02", "2024-01-02")])
        rows = datasets.load_dataset("json", data_files=str(path), split="train")
        with pytest.raises(ValueError, match=r"is datetime.*reads texts of JSON files so that look like dates"):
            validate_rows(rows)

    def test_slices(self, root):
        red, blue = (load_image(root / name) for name in ("red.png", "blue.png"))
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": document("a", None, "b")[0]["content"]},
        ]
        messages += document("c", None, role="assistant")
        assert row_slices({"messages": messages, "images": [red, blue]}) == ["a", red, "b", "c", blue]
        row = strings("what?", "red", "sure?")
        prepared = prepare_multimodal_messages(row["messages"], [red, blue])  # of TRL
        parts = [part for message in prepared for part in message["content"]]
        assert row_slices(row | {"images": [red, blue]}) == [part.get("image", part.get("text")) for part in parts]
        assert row_slices(row) == row_slices(row | {"images": None}) == ["what?", "red", "sure?"]
        bad = {"messages": document(None, None, "x"), "images": ["x.png"], "id": "x"}
        with pytest.raises(ValueError, match=r"row 7 \(x\), `images`: holds 1 images but `messages` has 2"):
            row_slices(bad, row_name(bad, 7))
        bad["images"] *= 2
        with pytest.raises(ValueError, match=r"row 7, images\[0\]: image file 'x.png' does not exist"):
            row_slices(bad, row_name({}, 7))

    def test_transforms(self, root):
        rows = stored([chat() | {"images": ["red.png"]}], root).with_transform(lambda batch: batch)
        for use in (validate_rows, undecoded, check_dataset, captions_by_image):
            with pytest.raises(ValueError, match=r"has a transform .* Apply it with `map`"):
                use(rows)

    def test_report(self, root):
        (root / "broken.png").write_bytes(b"not a picture")
        again = chat() | {"images": ["red.png"]}
        rows = [
            again,
            again,
            chat() | {"images": ["blue.png"]},
            {"messages": document("a", None, "b", None, "c"), "images": ["red.png", "blue.png"], "loss_on": "text"},
            {"messages": document("words"), "loss_on": "text"},
            {"messages": document(None, "x"), "images": ["green.png"], "loss_on": "captions"},
            chat() | {"images": ["broken.png"]},
            chat() | {"images": ["lost.png"]},
        ]
        report = check_dataset(stored(rows, root))
        assert report.rows == 8 and report.duplicates == 1 and not report.ok
        assert report.kinds == {"conversations": 3, "documents": 2, "captions": 1}
        assert (report.images, report.texts, report.text_only) == (6, 11, 1)
        assert (report.slices_min, report.slices_max) == (1, 5)
        assert report.slices_mean == pytest.approx(17 / 6)
        assert [(problem.row, problem.field) for problem in report.problems] == [(6, "images[0]"), (7, "images[0]")]
        assert "cannot be decoded" in report.problems[0].message and "does not exist" in report.problems[1].message
        assert "8 rows" in str(report) and "2 problems in 2 rows" in str(report)
        content = png("red.png", root)  # duplicates by bytes
        images = [[{"bytes": content, "path": None}], [{"bytes": content, "path": "b"}], [None]]
        rows = [
            {**chat(answer=answer), "loss_on": "answers", "structure": True, "id": "x", "images": image}
            for answer, image in zip(["yes", "yes", "null"], images, strict=True)
        ]
        report = check_dataset(Dataset.from_list(rows, features=ROW_FEATURES))
        assert report.duplicates == 1
        assert [(problem.row, problem.field) for problem in report.problems] == [(2, "images[0]")]

    def test_tokens(self, root):
        processor = SugarProcessor.from_processor(tiny.processor())
        rows = [
            chat() | {"images": ["red.png"]},
            chat(images=2) | {"images": ["red.png", "blue.png"]},
            chat(images=0),
            {"messages": document("see <image>"), "loss_on": "text"},
        ]
        dataset = stored(rows, root)
        lengths = [
            processor.apply_chat_template(
                fill_images(row["messages"], row["images"]), tokenize=True, return_dict=True
            )["input_ids"]
            for row in dataset.select(range(3))
        ]
        lengths = [len(ids[0]) for ids in lengths]
        report = check_dataset(dataset, processor, max_length=lengths[0] - 1)
        assert (report.tokens_min, report.tokens_max) == (lengths[2], lengths[1])
        assert [(p.row, p.field) for p in report.problems] == [(0, "messages"), (1, "messages"), (3, "messages")]
        assert f"{lengths[0]} tokens, more than max_length={lengths[0] - 1}" in report.problems[0].message
        assert check_dataset(dataset.select([0, 1, 2]), processor).ok
        processor.chat_template = "{{ raise_exception('no system') if messages|length > 1 }}"
        report = check_dataset(dataset.select([2]), processor)
        assert (
            "the chat template of this checkpoint refuses the conversation (no system)" in report.problems[0].message
        )
        with pytest.raises(ValueError, match="give the `processor`"):
            check_dataset(dataset, max_length=10)
        with pytest.raises(ValueError, match="no rows"):
            check_dataset(dataset.select([]))


class TestImages:
    """From the file to the pixels that the model sees: `load_data`, the check, and the processor."""

    @pytest.fixture(scope="class")
    def processor(self):
        return SugarProcessor.from_processor(tiny.processor())

    @pytest.mark.parametrize("name", ["exif.jpg", "grey16.png", "animated.gif"])
    def test_files(self, tmp_path, processor, name):
        """Every file shows a red square with one blue quarter at the top left."""
        expected = PILImage.new("RGB", (32, 32), (255, 0, 0))
        expected.paste((0, 0, 255), (0, 0, 16, 16))
        path = tmp_path / name
        if name == "exif.jpg":
            exif = PILImage.Exif()
            exif[0x0112] = 6  # to be turned by 90 degrees clockwise
            expected.transpose(PILImage.Transpose.ROTATE_90).save(path, exif=exif, quality=100, subsampling=0)
        elif name == "grey16.png":
            values = np.full((32, 32), 51400, dtype=np.uint16)
            values[:16, :16] = 256 * 7
            PILImage.fromarray(values).save(path)
            expected = PILImage.fromarray((values // 256).astype(np.uint8)).convert("RGB")
        else:
            expected.save(path, save_all=True, append_images=[PILImage.new("RGB", (32, 32), "green")], duration=10)
        row = load_data(write(tmp_path / "rows.json", [llava(path.name, gpt="yes", human="<image>\nwhat ?")]))
        assert check_dataset(row, processor).ok
        image = load_image(undecoded(row)[0]["images"][0])
        assert load_image(PILImage.open(path)).tobytes() == image.tobytes()
        pixels = processor.encode_conversations([fill_images(row[0]["messages"], [image])])["pixel_values"]
        assert image.mode == "RGB" and image.size == (32, 32)
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected)).max() <= 8  # JPEG
        assert (pixels - processor.image_processor(expected, return_tensors="pt")["pixel_values"]).abs().max() < 0.15

    def test_forms(self, root):
        path, image = root / "red.png", PILImage.new("RGB", (4, 4), COLOURS["red.png"])
        content = path.read_bytes()
        forms = [image, PILImage.open(path), path, str(path), content, {"bytes": content, "path": None}]
        forms += [{"bytes": None, "path": str(path)}, {"path": str(path)}, {"bytes": content}]
        for form in forms:
            loaded = load_image(form)
            assert loaded.mode == "RGB" and loaded.tobytes() == image.tobytes()
        assert load_image(image) is image
        (root / "broken.jpg").write_bytes(b"text")
        for form, message in [
            (root / "none.png", "image file .*none.png' does not exist.*Correct the path"),
            (root / "broken.jpg", "image file .*broken.jpg' cannot be decoded.*Replace the file or drop the row"),
            (b"text", "image of 4 bytes cannot be decoded"),
            ("https://example.org/a.jpg", "is a web address.*Download"),
            (None, "expected a PIL image.*got None"),
            ({"bytes": None, "path": None}, "expected a PIL image"),
            (np.zeros((2, 2, 3)), "got ndarray"),
        ]:
            with pytest.raises(ValueError, match=f"row 3: .*{message}"):
                load_image(form, "row 3")

    def test_modes(self):
        palette = PILImage.new("P", (2, 2), 1)
        palette.putpalette([0, 0, 0, 10, 20, 30])
        transparent = palette.copy()
        transparent.info["transparency"] = 1
        for image, pixel in [
            (PILImage.new("1", (2, 2), 1), (255, 255, 255)),
            (PILImage.new("L", (2, 2), 7), (7, 7, 7)),
            (PILImage.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
            (PILImage.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
            (PILImage.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
            (PILImage.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
            (palette, (10, 20, 30)),
            (transparent, (255, 255, 255)),
            (PILImage.fromarray(np.full((2, 2), 0x8040, dtype=np.uint16)), (0x80, 0x80, 0x80)),
            (PILImage.fromarray(np.full((2, 2), 100, dtype=np.uint16)), (0, 0, 0)),
            (PILImage.fromarray(np.full((2, 2), 0x8040, dtype=np.int32)), (0x80, 0x80, 0x80)),
            (PILImage.fromarray(np.full((2, 2), 100, dtype=np.int32)), (100, 100, 100)),
        ]:
            assert load_image(image).getpixel((0, 0)) == pixel, image.mode
        for bad in (np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32), np.zeros((2, 2), np.float32)):
            with pytest.raises(ValueError, match="scale them to 8 bits"):
                load_image(PILImage.fromarray(bad))

    @pytest.mark.parametrize("stored", [False, True])
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("zero.jpg", "0 bytes|cannot be decoded"),
            ("cut.jpg", "cannot be decoded .OSError: image file is truncated"),
            ("header.png", "cannot be decoded"),
            ("text.jpg", "cannot be decoded .UnidentifiedImageError"),
            ("bomb.png", "is too large: .*MAX_IMAGE_PIXELS"),
            ("large.png", "is too large: .*MAX_IMAGE_PIXELS"),
            ("float.tiff", "floating-point values"),
        ],
    )
    def test_unreadable(self, tmp_path, monkeypatch, name, message, stored):
        path = tmp_path / name
        noise = PILImage.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8))
        if name in ("bomb.png", "large.png"):
            # Pillow refuses more than twice its limit, and only warns of more than once
            monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 64 * 64 // (3 if name == "bomb.png" else 1) - 1)
            noise.save(path)
        elif name == "float.tiff":
            PILImage.fromarray(np.ones((8, 8), dtype=np.float32)).save(path)
        else:
            content = {
                "zero.jpg": b"",
                "cut.jpg": encoded(noise, "JPEG")[:-1000],
                "header.png": encoded(noise, "PNG")[:40],
                "text.jpg": b"<html>404</html>",
            }
            path.write_bytes(content[name])
        if stored:
            row = {"image": {"bytes": path.read_bytes(), "path": None}, "caption": "what ?"}
            features = Features({"image": Image(), "caption": Value("string")})
            Dataset.from_list([row], features=features).to_parquet(tmp_path / "rows.parquet")
            path = tmp_path / "rows.parquet"
        else:
            path = write(tmp_path / "rows.jsonl", [{"image": path.name, "caption": "what ?"}])
        report = check_dataset(load_data(path))
        (problem,) = report.problems
        assert (problem.field, problem.kind, problem.id) == ("images[0]", "image", f"{path.name}:1")
        assert re.search(message, problem.message)
        assert f"row 0 ({path.name}:1), `images[0]`: " in str(report) and "unreadable images: 1" in str(report)

    def test_stored_image(self, root):
        """Where `datasets` 5.2 stores the untouched file, or what it cannot write or read back."""

        def back(image):
            table = Dataset.from_dict({"image": [stored_image(image)]}, features=Features({"image": Image()}))
            return load_image(table[0]["image"])

        PILImage.new("RGB", (100, 50), "red").save(root / "wide.png")
        edited = PILImage.open(root / "wide.png")
        edited.thumbnail((20, 20))
        assert back(edited).size == (20, 10)
        frames = [PILImage.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
        frames[0].save(root / "film.gif", save_all=True, append_images=frames[1:])
        film = PILImage.open(root / "film.gif")
        film.seek(2)
        assert back(film).getpixel((0, 0)) == (0, 0, 255)
        for mode in ("YCbCr", "HSV", "P", "LA", "CMYK", "I;16", "1"):
            image = (
                PILImage.new("RGB", (4, 4), (0, 0, 255)).convert(mode)
                if mode != "I;16"
                else PILImage.new(mode, (4, 4), 1000)
            )
            assert np.array_equal(np.asarray(back(image)), np.asarray(load_image(image))), mode
        assert np.asarray(back(PILImage.new("I;16", (4, 4), 1000))).max() == 1000 >> 8
        with pytest.raises(ValueError, match="item 3: .*floating-point"):
            stored_image(PILImage.new("F", (4, 4)), "item 3")
        path = root / "red.png"
        for image in (path, str(path), {"path": str(path), "bytes": None}):
            assert stored_image(image) == {"bytes": None, "path": str(path)}
        for image in (path.read_bytes(), {"path": "x.png", "bytes": path.read_bytes()}):
            assert stored_image(image) == {"bytes": path.read_bytes(), "path": None}

    def test_captions_by_image(self, root):
        path = root / "dataset_coco.json"
        images = [karpathy("red.png"), karpathy("blue.png", sentences=["f"])]
        path.write_text(json.dumps({"images": images, "dataset": "coco"}))
        images, captions = captions_by_image(load_data(path))
        assert captions == [["a", "b"], ["f"]]
        assert [image.name for image in images] == ["red.png", "blue.png"]
        # stored images are told apart by their bytes, wherever their rows are
        rows = [
            {"image": png(name, root), "caption": text}
            for name, text in (("red.png", "1"), ("blue.png", "2"), ("red.png", "3"))
        ]
        Dataset.from_list(rows).to_parquet(root / "rows.parquet")
        images, captions = captions_by_image(load_data(root / "rows.parquet"))
        assert captions == [["1", "3"], ["2"]] and images[0].getpixel((0, 0)) == COLOURS["red.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.llava(max_positions=64).save_pretrained(path)
    tiny.processor().save_pretrained(path)
    return str(path)


class TestCheckCommand:
    def test_good(self, root, capsys, tmp_path_factory):
        path = write(root / "a.json", [llava(), llava(), llava(None, "words")])
        assert main(["check", str(path)]) == 0
        out = capsys.readouterr().out
        assert "3 rows (3 conversations; 1 without an image)" in out
        assert "1 rows repeat an earlier one" in out and "no problems" in out
        # every row once, whatever the weights, and settings of a source on the command line
        path = write(tmp_path_factory.mktemp("elsewhere") / "one.json", [llava(gpt="x")])
        source = f"{{path: {path}, image_root: {root}, weight: 9}}"
        other = f"{{path: {root / 'a.json'}, weight: 1}}"
        assert main(["check", "--train_data", source, other]) == 0
        assert "4 rows (" in capsys.readouterr().out
        assert main(["check", str(path), "--image_root", str(root)]) == 0
        assert main(["check", str(write(root / "a.json", [llava("lost.png")]))]) == 1
        assert "a.json, row 1, `image`: the image file" in capsys.readouterr().out
        with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
            main(["check", str(root / "nowhere.json")])

    def test_every_kind(self, root, capsys, model):
        (root / "broken.png").write_bytes(b"x")
        records = [
            llava(),
            llava("lost.png"),
            llava(gpt=" "),
            llava(None),
            llava("broken.png"),
            llava(gpt="long " * 100),
            llava(conversations=[{"from": "robot", "value": "x"}]),
        ]
        path = write(root / "a.json", records)
        assert main(["check", str(path), "--model_name_or_path", model]) == 1
        out = capsys.readouterr().out
        for line in (
            "unreadable images: 2",
            "count mismatches: 1",
            "empty texts: 1",
            "too long: 1",
            "malformed otherwise: 1",
            "the limit is 64",
            "6 problems in 6 rows",
            f"a.json:2, `image`: the image file {root / 'lost.png'} does not exist",
            "a.json:3, `conversations[1].value`: is empty",
        ):
            assert line in out
        assert main(["check", str(path), "--model_name_or_path", model, "--max_length", "4096"]) == 1
        assert "too long: 0" in capsys.readouterr().out


class TestTraining:
    """What training makes of `structure: false` and of rows that only show to be bad when they are used."""

    def config(self, path, **kwargs):
        settings = dict(per_device_train_batch_size=4, max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
        return SugarTrainingConfig(
            str(path / "run"), logging_steps=1, retrieval_dim=16, disable_tqdm=True, bf16=False, **settings, **kwargs
        )

    def test_rows_without_structure(self, root, model):
        whole = load_data(write(root / "a.json", [llava(gpt=f"answer {n}") for n in range(3)]))
        asked = []

        def embed(slices):
            asked.extend(slices)
            return torch.ones(len(slices), 8)

        collator = SugarCollator(SugarProcessor.from_pretrained(model), embed_slices=embed)
        examples = [dict(row) for row in whole]
        everything = collator(examples)
        asked.clear()
        examples[1]["structure"] = False
        batch = collator(examples)
        assert not any(item == "answer 1" for item in asked) and len(asked) == 6
        assert (batch["slice_modality"][1] == -1).all() and not batch["teacher_embeddings"][1].any()
        for kept in (0, 2):
            assert torch.equal(batch["slice_modality"][kept], everything["slice_modality"][kept])
        for name in ("input_ids", "labels", "slice_ids"):
            assert torch.equal(batch[name], everything[name])
        for example in examples:
            example["structure"] = False
        assert (collator(examples)["slice_modality"] == -1).all()
        with pytest.raises(ValueError, match="Row a.json:1, `structure`: is 'false'"):
            collator([examples[0] | {"structure": "false"}])

    def test_structure_loss_is_that_of_the_other_rows(self, root, model, tmp_path):
        a = {"path": write(root / "a.json", [llava(gpt=f"answer {n}") for n in range(2)])}
        b = {"path": write(root / "b.jsonl", [{"image": "blue.png", "caption": f"c{n}"} for n in range(2)])}
        teachers = {"cross": tiny.teachers(tmp_path)["cross"]}

        def structure_loss(*sources):
            args = self.config(tmp_path, teachers=teachers, positions_per_sample=9, teacher_mode="online")
            args.flip_captions = False
            rows = concatenate_datasets([load_data(source) for source in sources])
            trainer = SugarTrainer(model, args, train_dataset=rows)
            trainer.train()
            return trainer.state.log_history[0]["structure_loss"]

        assert structure_loss({**b, "structure": False}, a) == pytest.approx(structure_loss(a), rel=1e-4)

    @both
    def test_skip(self, root, model, streaming, caplog):
        (root / "broken.png").write_bytes(b"x")
        records = [llava(), llava("broken.png"), llava(gpt="long " * 100), llava(gpt="fine"), llava(gpt="no")]
        dataset = load_data(write(root / "a.json", records), streaming=streaming)
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            args = self.config(root, structure_weight=0.0, on_bad_row="skip")
            trainer = SugarTrainer(model, args, train_dataset=dataset)
            assert [row["id"] for row in trainer.train_dataset] == ["a.json:1", "a.json:4", "a.json:5"]
            trainer.train()
        assert "Skipped: Row a.json:2, images[0]: image file" in caplog.text
        assert "Row a.json:3" in caplog.text and "the limit is 64" in caplog.text
        assert re.search(r"[2-9] rows were skipped because of `on_bad_row='skip'`", caplog.text)
        if not streaming:
            with pytest.raises(ValueError, match="a.json:[23]"):
                SugarTrainer(model, self.config(root, structure_weight=0.0), train_dataset=dataset).train()
            with pytest.raises(ValueError, match="train_dataset: none of 1 rows can be used"):
                SugarTrainer(model, args, train_dataset=dataset.select([1]))
            with pytest.raises(ValueError, match="train_dataset has a transform"):
                SugarTrainer(model, args, train_dataset=dataset.with_transform(lambda batch: batch))


class TestDocumentation:
    def test_rows_of_the_page(self, root):
        """docs/data.md shows a record of each layout and the row that it becomes."""
        page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
        shown = re.findall(r"^\*\*(\w+)\.\*\*.*?```json\n(.*?)```\n```json\n(.*?)```", page, re.MULTILINE | re.DOTALL)
        assert sorted(name for name, _, _ in shown) == sorted(LAYOUTS)
        for name in ("crow.png", "sky.png"):
            (root / name).write_bytes(png("red.png", root))
        for name, record, expected in shown:
            path = root / f"{name}.json"
            path.write_text(record if LAYOUTS[name].records else f"[{record}]")
            row = undecoded(load_data(path))[0]
            row["images"] = [Path(image["path"]).name for image in row["images"]]
            assert {key: row[key] for key in ("messages", "images", "loss_on")} == json.loads(expected)
        table = page.split("| key | meaning |")[1].split("\n\n")[0]
        first = [line.split("|")[1] for line in table.splitlines()[2:]]
        assert sorted(re.findall(r"`(\w+)`", " ".join(first))) == sorted(_SOURCE_KEYS)


def test_clipart():
    seen = []
    for split, expected in {"train": (726, 187), "val": (149, 42), "test": (146, 41)}.items():
        sources = [CLIPART / f"llava_{split}.json", CLIPART / f"mmc4_{split}.jsonl"]
        assert tuple(len(load_data(source)) for source in sources) == expected
        seen += {image["path"] for row in undecoded(load_data(sources)) for image in row["images"]}
    assert sorted(seen) == sorted(str(path) for path in (CLIPART / "images").iterdir())  # none is in two splits
    assert len({Path(path).read_bytes() for path in seen}) == len(seen)
    report = check_dataset(load_data(sources))
    assert report.ok and report.duplicates == report.text_only == 0
