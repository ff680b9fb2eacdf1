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
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from hf_sugar import SugarProcessor, SugarTrainer, SugarTrainingConfig
from hf_sugar.cli.main import main
from hf_sugar.data import (
    ROW_FEATURES,
    captions_by_image,
    check_dataset,
    load_data,
    load_image,
    load_table,
    validate_rows,
)
from hf_sugar.data.images import undecoded
from hf_sugar.data.layouts import LAYOUTS, BadRow
from hf_sugar.data.load import _SOURCE_KEYS
from hf_sugar.models.rows_sugar import conversation_row, fill_images
from hf_sugar.training.collator import SugarCollator


CLIPART = Path(__file__).parent.parent / "examples" / "clipart"
COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}


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
    return {
        "url": "u",
        "text_list": list(texts),
        "image_info": [
            {"image_name": n, "raw_url": "", "matched_text_index": i, "matched_sim": 0.3} for n, i in images
        ],
    }


def chat(images=1, answer="yes", **extra):
    content = [{"type": "image", "text": None}] * images + [{"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages, **extra}


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def shape(row):
    """Reading order of a row: texts, and images as the name of their colour."""
    names = {colour: name.removesuffix(".png") for name, colour in COLOURS.items()}
    images = iter(names[image.convert("RGB").getpixel((0, 0))] for image in row["images"])
    return [
        (message["role"], [part["text"] if part["type"] == "text" else {next(images)} for part in message["content"]])
        for message in row["messages"]
    ]


def read_llava(path, root=None, **kwargs):
    return load_data({"path": path, "format": "llava", "image_root": root}, **kwargs)


def read_mmc4(path, **kwargs):
    return load_data({"path": path, "format": "mmc4"}, **kwargs)


class TestLlava:
    def test_layout(self, root):
        records = [
            llava(),
            llava(["green.png", "blue.png"], "Compare <image> with <image>, please."),
            llava(None, "  No picture. "),
            {
                "id": "multi",
                "image": ["red.png", "blue.png"],
                "conversations": [
                    {"from": "system", "value": "Be short."},
                    {"from": "human", "value": "What?\n<image>"},
                    {"from": "gpt", "value": "Red."},
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": "Blue."},
                ],
            },
            llava(["green.png", "red.png"], "<image><image>\nTwo."),
        ]
        for name in ("data.json", "data.jsonl"):
            dataset = read_llava(write(root / name, records))
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

    def test_images_stay_paths(self, root):
        dataset = read_llava(write(root / "data.json", [llava()]))
        assert dataset.with_format("arrow")[0]["images"].to_pylist() == [
            [{"bytes": None, "path": str(root / "red.png")}]
        ]

    def test_image_root(self, root, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        path = write(elsewhere / "data.json", [llava()])
        assert shape(read_llava(path, root)[0])[0][1][0] == {"red"}
        with pytest.raises(ValueError, match="does not exist.*image_root"):
            read_llava(path)

    def test_compressed(self, root):
        text = "".join(json.dumps(llava(gpt=f"answer {n}")) + "\n" for n in range(3))
        with gzip.open(root / "data.jsonl.gz", "wt") as file:
            file.write(text)
        with zipfile.ZipFile(root / "data.zip", "w") as archive:
            archive.writestr("a.jsonl", text)
            archive.writestr("b.json", json.dumps([llava(gpt="answer 3")]))
            archive.writestr("notes.txt", "no data")
        assert load_data(root / "data.jsonl.gz").remove_columns("id")["messages"] == [
            row["messages"] for row in load_data(root / "data.zip") if row["id"].startswith("a.jsonl")
        ]
        assert load_data(root / "data.zip")["id"] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.json:1"]

    @pytest.mark.parametrize(
        ("bad", "field", "message"),
        [
            (llava("lost.png"), "image", "lost.png does not exist"),
            (llava(["red.png", "lost.png"], "<image><image>"), "image[1]", "lost.png does not exist"),
            (llava(["red.png", "blue.png"]), "image", "2 images but 1 <image> placeholders"),
            (llava("red.png", "no placeholder"), "image", "1 images but 0 <image> placeholders"),
            (llava(None), "image", "0 images but 1 <image> placeholders"),
            (llava(""), "image", "is '', not a path"),
            (llava(7), "image", "is 7, not a path"),
            (llava(gpt="  "), "conversations[1].value", "is empty"),
            (llava(human=None), "conversations[0].value", "is None, not a string"),
            (llava(gpt="see <image>"), "conversations[1].value", "only a human turn"),
            (
                llava(conversations=[{"from": "bot", "value": "hi"}]),
                "conversations[0].from",
                "is 'bot'. Use one of human",
            ),
            (llava(conversations=["hi"]), "conversations[0].from", "is None"),
            (llava(conversations=[{"from": "human", "value": "<image>"}]), "conversations", "no gpt turn"),
            (llava(conversations=[]), "conversations", "is missing, empty or not a list"),
            (mmc4(), "conversations", "is missing, empty or not a list. Write {"),
            (["list"], "record", "is a list, not an object"),
        ],
    )
    def test_malformed(self, root, bad, field, message):
        for name in ("data.json", "data.jsonl"):
            path = write(root / name, [llava(), bad, llava()])
            with pytest.raises(ValueError) as error:
                read_llava(path)
            assert str(error.value).startswith(f"{path}, row 2, `{field}`: ")
            assert message in str(error.value)
            assert "on_bad_row='skip'" in str(error.value)
            assert read_llava(path, on_bad_row="skip")["id"] == [f"{name}:1", f"{name}:3"]

    def test_invalid_json(self, root):
        path = root / "data.jsonl"
        path.write_text(json.dumps(llava()) + "\n\n{'id': 1}\n" + json.dumps(llava()) + "\n")
        with pytest.raises(ValueError, match=r"data\.jsonl, row 3, `line`: is not valid JSON"):
            read_llava(path)
        assert read_llava(path, on_bad_row="skip")["id"] == ["data.jsonl:1", "data.jsonl:4"]
        (root / "cut.json").write_text(json.dumps([llava(), llava()])[:-20])
        with pytest.raises(ValueError, match=r"cut\.json is not valid JSON.*Repair"):
            read_llava(root / "cut.json", on_bad_row="skip")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_half_a_surrogate_pair(self, root, streaming):
        """JSON can name characters that no text has; documents of the web do."""
        system = {"role": "system", "content": "x\ud83d"}
        bad = [
            (llava(), llava(gpt="x\ud83d"), "conversations[1].value"),
            (llava(), llava("\ud83d.png"), "image"),
            (mmc4(), mmc4(["one", "\udc00"]), "text_list[1]"),
            (chat(0), {"messages": [system, *chat(0)["messages"]]}, "messages[0].content[0].text"),
            (chat(0), chat(0, id="\ud83d"), "id"),
        ]
        for good, record, field in bad:
            path = write(root / "a.jsonl", [good, record])
            with pytest.raises(
                ValueError, match=re.escape(f"a.jsonl, row 2, `{field}`: has half of a surrogate pair")
            ):
                list(load_data(path, streaming=streaming))
            assert len(list(load_data(path, streaming=streaming, on_bad_row="skip"))) == 1
        path = write(root / "a.jsonl", [llava(gpt="\U0001f600")])  # a whole pair in the file
        assert [row["messages"][1]["content"][0]["text"] for row in load_data(path)] == ["\U0001f600"]

    def test_skip_reports(self, root, caplog):
        records = [llava(), *(llava(f"lost{n}.png") for n in range(7)), llava()]
        path = write(root / "data.json", records)
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            assert len(read_llava(path, on_bad_row="skip")) == 2
        (record,) = caplog.records
        assert "skipped 7 of 9 rows" in record.getMessage()
        assert [f"lost{n}.png" in record.getMessage() for n in range(7)] == [True] * 5 + [False] * 2

    def test_nothing_left(self, root):
        with pytest.raises(ValueError, match=r"none of 1 rows is left.\n.*row 1, `image`"):
            read_llava(write(root / "data.json", [llava("lost.png")]), on_bad_row="skip")
        with pytest.raises(ValueError, match="none of 0 rows"):
            read_llava(write(root / "empty.jsonl", []))
        with pytest.raises(ValueError, match="on_bad_row.*'ignore'"):
            read_llava(root / "data.json", on_bad_row="ignore")
        with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
            read_llava(root / "nowhere.json")

    def test_many_rows(self, root):
        dataset = read_llava(write(root / "data.jsonl", [llava(gpt=f"answer {n}") for n in range(20_001)]))
        assert len(dataset) == 20_001
        assert [dataset[n]["messages"][1]["content"][0]["text"] for n in (0, 9_999, 10_000, 20_000)] == [
            "answer 0", "answer 9999", "answer 10000", "answer 20000",
        ]  # fmt: skip

    @settings(max_examples=50, deadline=None)
    @given(pieces=st.lists(st.text(alphabet="ab c\n", max_size=4), min_size=1, max_size=5))
    def test_placeholders_keep_their_place(self, pieces):
        images = [f"{n}.png" for n in range(len(pieces) - 1)]
        value = "<image>".join(pieces)
        if not value.strip():
            with pytest.raises(BadRow):
                LAYOUTS["llava"].rows(llava(images, value))
            return
        (row,) = LAYOUTS["llava"].rows(llava(images, value))
        expected = [piece.strip() for piece in re.split("(<image>)", value) if piece.strip()]
        parts = row["messages"][0]["content"]
        assert ["<image>" if part["type"] == "image" else part["text"] for part in parts] == expected
        assert [image for _, image in row["images"]] == images


class TestMMC4:
    def test_interleaving(self, root):
        images = [("blue.png", 2), ("red.png", 0), ("green.png", 2)]
        dataset = read_mmc4(write(root / "docs.jsonl", [mmc4(["a", " b ", "c"], images), mmc4(["alone"], [])]))
        assert [shape(row) for row in dataset] == [
            [("user", [{"red"}, "a", "b", {"blue"}, {"green"}, "c"])],
            [("user", ["alone"])],
        ]
        assert dataset["loss_on"] == ["text", "text"]
        assert dataset["id"] == ["docs.jsonl:1", "docs.jsonl:2"]
        assert dataset.features == ROW_FEATURES

    @settings(max_examples=50, deadline=None)
    @given(data=st.data())
    def test_every_image_before_its_sentence(self, data):
        sentences = [f"s{n}" for n in range(data.draw(st.integers(1, 5)))]
        matched = data.draw(st.lists(st.integers(0, len(sentences) - 1), max_size=6))
        (row,) = LAYOUTS["mmc4"].rows(mmc4(sentences, [(n, index) for n, index in enumerate(matched)]))
        order, images = [], iter(image for _, image in row["images"])
        for part in row["messages"][0]["content"]:
            order.append(part["text"] or next(images))
        expected = []
        for s, sentence in enumerate(sentences):
            expected += [n for n, index in enumerate(matched) if index == s] + [sentence]
        assert order == expected

    @pytest.mark.parametrize(
        ("bad", "field", "message"),
        [
            (mmc4(images=[("red.png", 0), ("red.png", 2)]), "image_info[1].matched_text_index", "is 2. Every image needs the index of the sentence it belongs to, from 0 to 1"),
            (mmc4(images=[("red.png", -1)]), "image_info[0].matched_text_index", "is -1"),
            (mmc4(images=[("red.png", None)]), "image_info[0].matched_text_index", "match the images first"),
            (mmc4(images=[("red.png", 1.0)]), "image_info[0].matched_text_index", "is 1.0"),
            ({"text_list": ["a"], "image_info": [{"image_name": "red.png"}]}, "image_info[0].matched_text_index", "is None"),
            ({"text_list": ["a"], "image_info": ["red.png"]}, "image_info[0]", "is not an object"),
            (mmc4(images=[("lost.png", 0)]), "image_info[0].image_name", "lost.png does not exist"),
            (mmc4(["a", ""]), "text_list[1]", "is empty"),
            (mmc4(["a", 3]), "text_list[1]", "is 3, not a string"),
            (mmc4([], []), "text_list", "is missing, empty"),
            ({"text_list": ["a"]}, "image_info", "is missing"),
            (llava(), "text_list", "is missing, empty or not a list. Write {"),
        ],
    )  # fmt: skip
    def test_malformed(self, root, bad, field, message):
        path = write(root / "docs.jsonl", [mmc4(), bad])
        with pytest.raises(ValueError) as error:
            read_mmc4(path)
        assert str(error.value).startswith(f"{path}, row 2, `{field}`: ")
        assert message in str(error.value)
        assert len(read_mmc4(path, on_bad_row="skip")) == 1


class TestLoadData:
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

    def test_auto_reads_one_record_of_a_long_line(self, root):
        path = write(root / "a.json", [llava(gpt="long " * 300_000), llava()])
        assert "\n" not in path.read_text() and path.stat().st_size > 1 << 20
        assert len(load_data(path)) == 2

    def test_conversational_json(self, root):
        rows = [
            chat(images=2, answer=None, loss_on="text", id="mine") | {"images": ["red.png", "blue.png"]},
            # contents as strings: the images stand before the first user text, as in TRL
            {
                "messages": [
                    {"role": "system", "content": "Short."},
                    {"role": "user", "content": "what?"},
                    {"role": "assistant", "content": "red"},
                    {"role": "user", "content": "sure?"},
                    {"role": "assistant", "content": "yes"},
                ],
                "images": ["red.png"],
            },
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ]
        for name in ("data.json", "data.jsonl"):
            dataset = load_data(write(root / name, rows))
            assert dataset.features == ROW_FEATURES
            assert dataset["id"] == ["mine", f"{name}:2", f"{name}:3"]
            assert dataset["loss_on"] == ["text", "answers", "answers"]
            assert [shape(row) for row in dataset] == [
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

    def test_conversational_stored(self, root):
        rows = [chat() | {"images": [root / name]} for name in ("red.png", "blue.png")]
        for row in rows:
            row["images"] = [PILImage.open(row["images"][0])]
        part = {"index": Value("int64"), "type": Value("string"), "text": Value("string")}
        messages = List({"content": List(part), "role": Value("string")})  # other order, one key more
        for row in rows:
            for message in row["messages"]:
                message["content"] = [{"index": 0, **part} for part in message["content"]]
        stored = Dataset.from_list(rows, features=Features({"messages": messages, "images": List(Image())}))
        stored.save_to_disk(root / "one")
        DatasetDict({"train": stored, "test": stored.select([1])}).save_to_disk(root / "dict")
        stored.to_parquet(root / "rows.parquet")
        expected = [[("user", [{c}, "what?"]), ("assistant", ["yes"])] for c in ("red", "blue")]
        for path in (root / "one", root / "dict", root / "rows.parquet"):
            dataset = load_data(path)
            assert dataset.features == ROW_FEATURES
            assert [shape(row) for row in dataset] == expected
            assert dataset["id"] == [f"{path.name}:1", f"{path.name}:2"]
            assert set(dataset["loss_on"]) == {"answers"}
        assert [shape(row) for row in load_data(root / "dict", split="test")] == expected[1:]
        assert [shape(row) for row in load_data({"path": root / "dict", "split": "test"})] == expected[1:]
        with pytest.raises(ValueError, match="no split 'dev', but train, test"):
            load_data(root / "dict", split="dev")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_folder_of_json(self, root, streaming):
        """Values as they are written, where `datasets` 5.2 gives JSON text for the contents of the second file, dates
        for those of the test split, and 3 for 3.5."""
        folder = root / "folder"
        folder.mkdir()
        strings = {"messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": '"now"'}], "w": 3}
        parts = chat() | {"images": ["red.png"]}
        parts["messages"][1]["content"] = "a"
        dates = {"messages": [{"role": role, "content": "2024-01-02"} for role in ("user", "assistant")], "w": 3.5}
        write(folder / "train-0.jsonl", [strings])
        write(folder / "train-1.json", [parts, strings | {"w": 3.5}])
        write(folder / "test.jsonl", [dates])
        (folder / "red.png").write_bytes(png("red.png", root))  # of more kinds of files than one
        said = [("user", ["3"]), ("assistant", ['"now"'])]
        rows = list(load_data(folder, streaming=streaming))
        assert [shape(row) for row in rows] == [said, [("user", [{"red"}, "what?"]), ("assistant", ["a"])], said]
        assert [row["id"] for row in rows] == ["train-0.jsonl:1", "train-1.json:1", "train-1.json:2"]
        (row,) = load_data(folder, "test", streaming=streaming)
        assert shape(row) == [("user", ["2024-01-02"]), ("assistant", ["2024-01-02"])]
        with pytest.raises(ValueError, match="no split 'dev', but train, test"):
            load_data(folder, "dev", streaming=streaming)
        table = list(load_table(folder, streaming=streaming))
        assert [row["messages"][1]["content"] for row in table] == ['"now"', "a", '"now"']
        assert [row["messages"][0]["content"] for row in table] == ["3", parts["messages"][0]["content"], "3"]
        assert [row.get("w") for row in table] == [3, None, 3.5]
        write(folder / "test.jsonl", ["text"])
        with pytest.raises(ValueError, match="test.jsonl, row 1 is a str, not an object"):
            list(load_table(folder, "test", streaming=streaming))

    def test_parquet_of_paths(self, root):
        rows = [chat(id=f"r{n}") | {"images": [name]} for n, name in enumerate(["red.png", "lost.png", "blue.png"])]
        Dataset.from_list(rows).to_parquet(root / "rows.parquet")
        with pytest.raises(ValueError, match=r"row 2, `images\[0\]`: the image file .*lost.png does not exist"):
            load_data(root / "rows.parquet")
        dataset = load_data(root / "rows.parquet", on_bad_row="skip")
        assert dataset["id"] == ["r0", "r2"]
        assert [shape(row)[0][1][0] for row in dataset] == [{"red"}, {"blue"}]

    def test_conversational_bad_rows(self, root, caplog):
        images = [str(root / "red.png")]
        rows = [chat() | {"images": images}, chat(answer=None) | {"images": images}, chat() | {"images": []}]
        features = Features({key: ROW_FEATURES[key] for key in ("messages", "images")})
        Dataset.from_list(rows, features=features).save_to_disk(root / "stored")
        for path in (write(root / "rows.jsonl", rows), root / "stored"):
            with pytest.raises(ValueError, match=rf"{path.name}, row 2, `messages`: no answer.*loss_on='text'"):
                load_data(path)
            caplog.clear()
            with caplog.at_level(logging.WARNING, "hf_sugar"):
                dataset = load_data(path, on_bad_row="skip")
            assert dataset["id"] == [f"{path.name}:1"]
            assert "skipped 2 of 3 rows" in caplog.text
            assert "row 3, `images`: holds 0 images but `messages` has 1 image parts" in caplog.text

    def test_stored_images_are_not_read(self, root):
        """Rewriting the text must leave stored image bytes alone, undecodable ones included."""
        features = Features({key: ROW_FEATURES[key] for key in ("messages", "images")})
        Dataset.from_list(
            [chat() | {"images": [{"bytes": b"no image", "path": None}]}], features=features
        ).save_to_disk(root / "stored")
        dataset = load_data(root / "stored")
        assert dataset.with_format("arrow")[0]["images"].to_pylist()[0][0]["bytes"] == b"no image"

    def test_same_schema_mixes(self, root):
        parts = [
            load_data(write(root / "a.json", [llava(None, "text only")])),
            load_data(write(root / "b.jsonl", [mmc4()])),
            load_data(write(root / "c.jsonl", [chat(images=0)])),
        ]
        assert all(part.features == ROW_FEATURES for part in parts)
        assert len(concatenate_datasets(parts)) == 3

    def test_concatenation(self, root):
        a = write(root / "a.json", [llava(gpt=f"{n}") for n in range(30)])
        b = write(root / "b.jsonl", [mmc4([f"{n}", "x"]) for n in range(20)])
        mixed = load_data([a, {"path": str(b)}], seed=3)
        both = [*load_data(a)["id"], *load_data(b)["id"]]
        assert sorted(mixed["id"]) == sorted(both) and list(mixed["id"]) != both
        assert list(load_data([a, b], seed=3)["id"]) == list(mixed["id"])
        assert list(load_data([a, b], seed=4)["id"]) != list(mixed["id"])
        assert list(load_data(a)["id"]) == [f"a.json:{n}" for n in range(1, 31)]

    def test_weights(self, root):
        a = write(root / "a.json", [llava(gpt=f"{n}") for n in range(400)])
        b = write(root / "b.jsonl", [mmc4([f"{n}", "x"]) for n in range(400)])
        mixed = load_data([{"path": a, "weight": 3}, {"path": b, "weight": 1}])
        ids = list(mixed["id"])
        assert len(set(ids)) == 800  # no row is lost
        share = sum(row.startswith("a.json") for row in ids) / len(ids)
        assert abs(share - 0.75) < 5 * (0.75 * 0.25 / len(ids)) ** 0.5
        # rows are drawn at random, not in blocks
        assert 0.6 < sum(row.startswith("a.json") for row in ids[:200]) / 200 < 0.9

    def test_arguments(self, root):
        path = str(write(root / "a.json", [llava()]))
        for sources, message in [
            ([], "is empty"),
            ([{"file": path}], r"sources\[0\] has the keys file. It needs `path`"),
            ([path, {"path": path, "wieght": 1}], r"sources\[1\] has the keys path, wieght"),
            ([{"path": path, "weight": 1}, path], "every source a `weight`"),
            ([{"path": path, "weight": 1}, {"path": path, "weight": 0}], "greater than 0"),
            ({"path": path, "format": "csv"}, "`format` is 'csv'. Use one of auto, conversational, llava"),
            ({"path": path, "loss_on": "images"}, "`loss_on` is 'images'. Use one of answers, captions, text"),
            ({"path": path, "structure": "no"}, "`structure` is 'no'. Use one of True, False"),
            (str(root / "red.png"), "what kind of file"),
        ]:
            with pytest.raises(ValueError, match=message):
                load_data(sources)
        for lost in (str(root / "lost.json"), str(root / "lost"), "lost.jsonl", "a/lost.parquet", "a/b/c"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                load_data(lost)
        with pytest.raises(ValueError, match="no layout is known with the fields text"):
            Dataset.from_dict({"text": ["x"]}).to_parquet(root / "other.parquet")
            load_data(root / "other.parquet")
        with pytest.raises(ValueError, match="row 1, `images`: is not a list"):
            row = chat() | {"images": str(root / "red.png")}
            features = Features({"messages": ROW_FEATURES["messages"], "images": Image()})
            Dataset.from_list([row], features=features).to_parquet(root / "single.parquet")
            load_data(root / "single.parquet")


def png(name, root):
    return (root / name).read_bytes()


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


def caption_shape(name, text):
    return [("user", [{name}, text])]


class TestShards:
    """Multimodal C4 comes as zip archives of one JSON lines file each."""

    def documents(self, prefix, faces):
        records = [mmc4([f"{prefix} {n}", "end"], [("red.png", 1)]) for n in range(2)]
        for record in records:
            record["could_have_url_duplicate"] = 0
            record["similarity_matrix"] = [[0.2, 0.3]]
            record["image_info"][0]["face_detections"] = faces
        return records

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("name", "faces"), [("docs_no_face_shard_{}_v2", None), ("docs_shard_{}_v2", {"faces": 1})]
    )
    def test_shards(self, root, streaming, name, faces):
        (root / "images").mkdir()
        (root / "red.png").rename(root / "images" / "red.png")
        for n in (1, 0, 10):
            member = name.format(n) + ".jsonl"
            archive(root / f"{member}.zip", {member: self.documents(f"shard {n}", faces)})
        source = {"path": root / name.format("*"), "image_root": root / "images"}
        with pytest.raises(FileNotFoundError):
            load_data(source)  # without the suffix it is no file
        source["path"] = f"{source['path']}.jsonl.zip"
        rows = list(load_data(source, streaming=streaming))
        assert [row["id"] for row in rows] == [f"{name.format(n)}.jsonl:{k}" for n in (0, 10, 1) for k in (1, 2)]
        assert shape(rows[4]) == [("user", ["shard 1 0", {"red"}, "end"])]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_damaged(self, root, streaming):
        text = [mmc4([f"sentence {n} {'x' * 50}", "end"]) for n in range(200)]
        path = archive(root / "docs.jsonl.zip", {"docs.jsonl": text})
        good = path.read_bytes()
        for bad, message in [
            (good[: len(good) // 2], "is damaged .BadZipFile"),
            (good[:400] + bytes([good[400] ^ 255]) + good[401:], r"docs.jsonl is damaged \((BadZipFile|error)"),
            (b"", "is damaged .BadZipFile"),
        ]:
            path.write_bytes(bad)
            for on_bad_row in ("error", "skip"):
                with pytest.raises(ValueError, match=message) as error:
                    list(load_data({"path": path, "format": "mmc4"}, streaming=streaming, on_bad_row=on_bad_row))
                assert str(path) in str(error.value) and "download it again" in str(error.value)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("readme.txt", "x")
        with pytest.raises(ValueError, match="no .json or .jsonl file"):
            load_data(path)

    def test_damaged_text(self, root):
        with gzip.open(root / "docs.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(mmc4([f"{n}", "x"])) + "\n" for n in range(500)))
        cut = (root / "docs.jsonl.gz").read_bytes()[:-200]
        (root / "docs.jsonl.gz").write_bytes(cut)
        (root / "latin.jsonl").write_bytes(json.dumps(mmc4(["caf@", "x"])).encode().replace(b"@", b"\xe9") + b"\n")
        for name, cause in (("docs.jsonl.gz", "EOFError"), ("latin.jsonl", "UnicodeDecodeError")):
            with pytest.raises(ValueError, match=f"{name} is damaged .{cause}"):
                load_data(root / name)


def karpathy(name="red.png", split="train", sentences=("a", "b", "c", "d", "e"), **extra):
    return {
        "filepath": "val2014",
        "sentids": list(range(len(sentences))),
        "filename": name,
        "imgid": 0,
        "split": split,
        "sentences": [
            {"tokens": text.split(), "raw": text, "imgid": 0, "sentid": n} for n, text in enumerate(sentences)
        ],
        "cocoid": 391895,
        **extra,
    }


class TestCoco:
    def write(self, root, images):
        folder = root / "val2014"
        folder.mkdir(exist_ok=True)
        for name in COLOURS:
            (folder / name).write_bytes(png(name, root))
        (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
        return root / "dataset_coco.json"

    @pytest.mark.parametrize("streaming", [False, True])
    def test_splits(self, root, streaming):
        images = [
            karpathy("red.png", "test", ["r1", "r2"]),
            karpathy("green.png", "train", [" g1 "]),
            karpathy("blue.png", "restval", ["b1"]),
            karpathy("green.png", "val", ["g2"]),
        ]
        path = self.write(root, images)
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
        assert len(load_data({"path": path, "split": "test"})) == 2
        with pytest.raises(ValueError, match="no image is of the split 'dev', but of restval, test, train, val"):
            list(load_data(path, "dev", streaming=streaming))

    def test_flickr_and_tables(self, root):
        """The same layout without `filepath`, and as a table with plain strings."""
        record = karpathy("red.png", "train", ["one", "two"])
        del record["filepath"], record["cocoid"]
        (root / "dataset_flickr30k.json").write_text(json.dumps({"images": [record], "dataset": "flickr30k"}))
        rows = load_data(root / "dataset_flickr30k.json")
        assert [shape(row) for row in rows] == [caption_shape("red", "one"), caption_shape("red", "two")]
        features = Features({"image": Image(), "sentences": List(Value("string"))})
        table = [
            {"image": str(root / "red.png"), "sentences": ["a", "b"]},
            {"image": str(root / "blue.png"), "sentences": ["c"]},
        ]
        Dataset.from_list(table, features=features).to_parquet(root / "rows.parquet")
        expected = [caption_shape("red", "a"), caption_shape("red", "b"), caption_shape("blue", "c")]
        for streaming in (False, True):
            rows = list(load_data(root / "rows.parquet", streaming=streaming))
            assert [shape(row) for row in rows] == expected
            assert [row["id"] for row in rows] == ["rows.parquet:1.1", "rows.parquet:1.2", "rows.parquet:2"]

    @pytest.mark.parametrize(
        ("bad", "field", "message"),
        [
            (karpathy("lost.png"), "filename", "val2014/lost.png does not exist"),
            (karpathy(None), "filename", "no image"),
            (karpathy(sentences=[]), "sentences", "is missing, empty"),
            (karpathy(sentences=["a", "  "]), "sentences[1].raw", "is empty"),
            (karpathy(sentences=["a"]) | {"sentences": [{"tokens": ["a"]}]}, "sentences[0].raw", "is None, not a string"),
            (karpathy(split=None), "split", "is None, not a string"),
            ("image.jpg", "record", "is a str, not an object"),
            (7, "record", "is a int, not an object"),
        ],
    )  # fmt: skip
    def test_malformed(self, root, bad, field, message):
        path = self.write(root, [karpathy(), bad])
        with pytest.raises(ValueError) as error:
            load_data(path)
        assert str(error.value).startswith(f"{path}, row 2, `{field}`: ") and message in str(error.value)
        assert len(load_data(path, on_bad_row="skip")) == 5

    def test_malformed_file(self, root):
        path = root / "dataset_coco.json"
        for text, message in [
            ('{"images": [], "dataset": "coco"}', "`images` is missing, empty"),
            ('{"images": 3, "dataset": "coco"}', "`images` is missing, empty"),
            ('{"images": [{"split": "train"}', "not valid JSON"),
        ]:
            path.write_text(text)
            with pytest.raises(ValueError, match=message):
                load_data({"path": path, "format": "coco"}, on_bad_row="skip")

    def test_captions_by_image(self, root):
        path = self.write(root, [karpathy("red.png"), karpathy("blue.png", sentences=["f"])])
        images, captions = captions_by_image(load_data(path))
        assert captions == [["a", "b", "c", "d", "e"], ["f"]]
        assert [image.name for image in images] == ["red.png", "blue.png"]
        # stored images are told apart by their bytes, wherever their rows are
        rows = [
            {"image": png(name, root), "caption": text}
            for name, text in (("red.png", "1"), ("blue.png", "2"), ("red.png", "3"))
        ]
        Dataset.from_list(rows).to_parquet(root / "rows.parquet")
        images, captions = captions_by_image(load_data(root / "rows.parquet"))
        assert captions == [["1", "3"], ["2"]] and images[0].getpixel((0, 0)) == COLOURS["red.png"]


def story(*steps, story="45530", text="original_text"):
    return [
        [
            {
                "original_text": f"{sentence}!",
                "album_id": "44277",
                "photo_flickr_id": photo,
                "setting": "first-2-pick-and-tell",
                "worker_id": "W",
                "story_id": story,
                "tier": "story-in-sequence",
                "worker_arranged_photo_order": place,
                "text": f"{sentence} !",
                "storylet_id": "227650",
            }
        ]
        for place, photo, sentence in steps
    ]


class TestVist:
    def write(self, root, annotations):
        for number, name in (("1741642", "red.png"), ("1741640", "blue.png")):
            (root / f"{number}.png").write_bytes(png(name, root))
        data = {"images": [{"id": "1741642"}], "info": {}, "albums": [], "type": "sis", "annotations": annotations}
        (root / "train.story-in-sequence.json").write_text(json.dumps(data))
        return root / "train.story-in-sequence.json"

    @pytest.mark.parametrize("streaming", [False, True])
    def test_stories(self, root, streaming):
        first = story((1, "1741640", "then"), (0, "1741642", "once"))
        second = story((0, "1741642", "other"), story="9")
        path = self.write(root, [first[0], second[0], first[1]])
        rows = list(load_data(path, streaming=streaming))
        assert [shape(row) for row in rows] == [
            [("user", [{"red"}, "once!", {"blue"}, "then!"])],
            [("user", [{"red"}, "other!"])],
        ]
        assert [(row["loss_on"], row["id"]) for row in rows] == [("text", f"{path.name}:{n}") for n in (1, 2)]

    def test_tokenized_text(self, root):
        annotations = story((0, "1741642", "once"))
        del annotations[0][0]["original_text"]
        assert shape(load_data(self.write(root, annotations))[0]) == [("user", [{"red"}, "once !"])]

    @pytest.mark.parametrize(
        ("bad", "field", "message"),
        [
            (story((0, "404", "x")), "annotations[1].photo_flickr_id", "404 does not exist"),
            (story((0, None, "x")), "annotations[1].photo_flickr_id", "no image"),
            (story((0, "1741642", "x"), (0, "1741640", "y")), "annotations[2].worker_arranged_photo_order", "need different"),
            (story((None, "1741642", "x")), "annotations[1].worker_arranged_photo_order", "is None"),
            (story(("0", "1741642", "x")), "annotations[1].worker_arranged_photo_order", "is '0'"),
            (story((0, "1741642", "x"), (2, "1741640", "y")), "annotations[1].story_id", "only the steps 0, 2 are there"),
            ([[{"story_id": "7", "worker_arranged_photo_order": 0, "photo_flickr_id": "1741642"}]], "annotations[1].text", "is None"),
            ([[{"photo_flickr_id": "1741642"}]], "annotations[1]", "with a `story_id`"),
            ([[]], "annotations[1]", "is not a list of one step"),
            (["x"], "annotations[1]", "is not a list of one step"),
        ],
    )  # fmt: skip
    def test_malformed(self, root, bad, field, message):
        path = self.write(root, [*story((0, "1741642", "good"), story="1"), *bad])
        with pytest.raises(ValueError) as error:
            load_data(path)
        assert str(error.value).startswith(f"{path}, row 2, `{field}`: ") and message in str(error.value)
        assert len(load_data(path, on_bad_row="skip")) == 1

    def test_malformed_file(self, root):
        path = self.write(root, {})
        with pytest.raises(ValueError, match="`annotations` is missing, empty"):
            load_data(path)


class TestWinoground:
    def table(self, root, rows):
        features = Features({"id": Value("int32"), "image_0": Image(), "image_1": Image(), "caption_0": Value("string"),
                             "caption_1": Value("string"), "tag": Value("string")})  # fmt: skip
        rows = [
            {**row, **{k: row[k] and str(root / row[k]) for k in ("image_0", "image_1")}, "id": n, "tag": "Object"}
            for n, row in enumerate(rows)
        ]
        Dataset.from_list(rows, features=features).to_parquet(root / "test.parquet")
        return root / "test.parquet"

    @pytest.mark.parametrize("streaming", [False, True])
    def test_layout(self, root, streaming):
        rows = [
            {"image_0": "red.png", "image_1": "blue.png", "caption_0": "red on blue", "caption_1": "blue on red"},
            {"image_0": "green.png", "image_1": "red.png", "caption_0": "g", "caption_1": "r"},
        ]
        rows = list(load_data(self.table(root, rows), streaming=streaming))
        pairs = [("red", "red on blue"), ("blue", "blue on red"), ("green", "g"), ("red", "r")]
        assert [shape(row) for row in rows] == [caption_shape(*pair) for pair in pairs]
        assert [row["id"] for row in rows] == [f"test.parquet:{n}.{k}" for n in (1, 2) for k in (1, 2)]

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("bad", "field", "message"),
        [
            ({"image_1": None}, "image_1", "no image"),
            ({"caption_0": None}, "caption_0", "is None"),
            ({"caption_1": ""}, "caption_1", "is empty"),
        ],
    )
    def test_malformed(self, root, bad, field, message, streaming):
        good = {"image_0": "red.png", "image_1": "blue.png", "caption_0": "a", "caption_1": "b"}
        path = self.table(root, [good, good | bad, good])
        with pytest.raises(ValueError) as error:
            list(load_data(path, streaming=streaming))
        assert str(error.value).startswith(f"{path}, row 2, `{field}`: ") and message in str(error.value)
        kept = [row["id"] for row in load_data(path, streaming=streaming, on_bad_row="skip")]
        assert kept == [f"test.parquet:{n}.{k}" for n in (1, 3) for k in (1, 2)]


class TestCaptions:
    """COYO and its like: parquet with images in it, WebDataset shards, folders of images with metadata."""

    def sample(self, root, key, name, caption):
        yield f"{key}.png", png(name, root)
        if caption is not None:
            yield f"{key}.txt", caption.encode()
        yield f"{key}.json", json.dumps({"url": "u", "caption": caption, "key": key}).encode()

    @pytest.mark.parametrize("streaming", [False, True])
    def test_webdataset(self, root, streaming):
        for shard, name in enumerate(("red.png", "blue.png")):
            members = [
                *self.sample(root, f"{shard}0", name, "first"),
                *self.sample(root, f"{shard}1", "green.png", "x"),
            ]
            tar(root / f"0000{shard}.tar", members)
        rows = list(load_data(str(root / "*.tar"), streaming=streaming))
        assert [shape(row) for row in rows] == [
            caption_shape(*pair) for pair in (("red", "first"), ("green", "x"), ("blue", "first"), ("green", "x"))
        ]
        assert [row["id"] for row in rows] == ["00000.tar:00", "00000.tar:01", "00001.tar:10", "00001.tar:11"]
        assert {row["loss_on"] for row in rows} == {"captions"}

    def test_webdataset_json_captions(self, root):
        path = tar(root / "0.tar", [("0.png", png("red.png", root)), ("0.json", b'{"caption": "from json"}')])
        assert shape(load_data(path)[0]) == caption_shape("red", "from json")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_webdataset_malformed(self, root, streaming, caplog):
        samples = [self.sample(root, f"{n}", "red.png", f"c{n}") for n in range(6)]
        members = [member for sample in samples for member in sample]
        members += [("6.txt", b"no image"), *self.sample(root, "7", "red.png", None), ("8.png", png("red.png", root)),
                    ("8.txt", b" "), *self.sample(root, "9", "blue.png", "last")]  # fmt: skip
        path = tar(root / "0.tar", members)
        with pytest.raises(ValueError, match="0.tar, row 6, `image`: there is no image"):
            list(load_data(path, streaming=streaming))
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            rows = list(load_data(path, streaming=streaming, on_bad_row="skip"))
        assert [row["id"] for row in rows] == [f"0.tar:{n}" for n in (0, 1, 2, 3, 4, 5, 9)]
        assert shape(rows[-1]) == caption_shape("blue", "last")
        assert "skipped 3 of 10 rows" in caplog.text
        assert "row 7, `caption`: is missing" in caplog.text and "row 8, `txt`: is empty" in caplog.text
        (root / "cut.tar").write_bytes(path.read_bytes()[:-20000])
        (root / "not.tar").write_bytes(b"nothing")
        for name in ("cut.tar", "not.tar"):
            with pytest.raises(ValueError, match=rf"{name} is damaged.*download it again"):
                list(load_data(root / name, streaming=streaming))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_webdataset_as_found(self, root, streaming, caplog):
        """Upper-case names, samples of other kinds than the first, members missing from the first samples: where
        `datasets` 5.2 drops members without a word, or refuses the file."""
        (root / "blue.jpg").write_bytes(jpeg(PILImage.new("RGB", (4, 4), (0, 0, 255))))
        members = [("a/0.PNG", png("red.png", root)), ("a/0.TXT", b"2024-01-02")]
        members += [("a/1.png", png("red.png", root)), ("a/2.txt", b"alone"), ("readme", b"x"), ("._3.txt", b"x")]
        for n in range(3, 7):
            members += [(f"a/{n}.png", png("green.png", root)), (f"a/{n}.json", b'{"caption": "g", "w": 3}')]
        members += [("a/7.jpg", png("blue.jpg", root)), ("a/7.json", b'{"caption": "7", "w": 3.5, "extra": 1}')]
        members += [("a/8.png", png("red.png", root)), ("a/8.txt", b"\xff")]
        members += [("a/9.png", png("red.png", root)), ("a/9.json", b"{'caption'")]
        path = tar(root / "0.tar", members)
        rows = list(load_data(path, streaming=streaming, on_bad_row="skip"))
        assert [row["id"] for row in rows] == [f"0.tar:a/{n}" for n in (0, 3, 4, 5, 6, 7)]
        assert [row["messages"][0]["content"][1]["text"] for row in rows] == ["2024-01-02", *"gggg", "7"]
        assert shape(rows[0]) == caption_shape("red", "2024-01-02")
        assert rows[-1]["images"][0].format == "JPEG" and rows[-1]["images"][0].getpixel((0, 0))[2] > 250
        for problem in ("1, `caption`: is missing", "2, `image`: there is no image", "8, `caption`: is missing or not",
                        "9, `json`: is not a JSON object"):  # fmt: skip
            assert f"0.tar, row a/{problem}" in caplog.text
        table = list(load_table(path, streaming=streaming))
        assert table[7]["json"] == {"caption": "7", "w": 3.5, "extra": 1} and table[3]["json"]["w"] == 3
        tar(path, [("0.png", png("blue.png", root)), ("0.txt", b"new")])  # not what the cache holds of the old one
        assert shape(next(iter(load_data(path, streaming=streaming)))) == caption_shape("blue", "new")
        tar(path, [("0.png", png("blue.png", root)), ("0.txt", b"a"), ("0.TXT", b"b")])
        with pytest.raises(ValueError, match="0.tar: the sample 0 has two members txt"):
            list(load_data(path, streaming=streaming))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_parquet_of_bytes(self, root, streaming, caplog):
        """As img2dataset writes it: plain binary, and nothing where the download failed."""
        rows = [("red.png", "a"), (None, "b"), ("blue.png", "c"), ("green.png", None)]
        table = {"key": ["0", "1", "2", "3"], "jpg": [name and png(name, root) for name, _ in rows]}
        Dataset.from_dict({**table, "caption": [text for _, text in rows]}).to_parquet(root / "0.parquet")
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            rows = list(load_data(root / "0.parquet", streaming=streaming, on_bad_row="skip"))
        assert [shape(row) for row in rows] == [caption_shape("red", "a"), caption_shape("blue", "c")]
        assert "skipped 2 of 4 rows" in caplog.text

    def test_urls(self, root):
        Dataset.from_dict({"id": [1], "url": ["http://a/b.jpg"], "text": ["x"]}).to_parquet(root / "coyo.parquet")
        with pytest.raises(ValueError, match="Download the images that `url` names first"):
            load_data(root / "coyo.parquet")
        with pytest.raises(ValueError, match="row 1, `image`: http://a/b.jpg is a web address"):
            load_data({"path": root / "coyo.parquet", "rename": {"url": "image"}})

    @pytest.mark.parametrize("streaming", [False, True])
    def test_image_folder(self, root, streaming):
        folder = root / "folder"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "red.png").write_bytes(png("red.png", root))
        (folder / "blue.png").write_bytes(png("blue.png", root))
        names = {"sub/red.png": "a red one", "blue.png": "a blue one"}
        expected = [caption_shape("red", "a red one"), caption_shape("blue", "a blue one")]
        write(folder / "metadata.jsonl", [{"file_name": name, "text": text} for name, text in names.items()])
        assert [shape(row) for row in load_data(folder, streaming=streaming)] == expected
        assert [shape(row) for row in load_data(folder / "metadata.jsonl", streaming=streaming)] == expected
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

    def test_image_folder_of_conversations(self, root):
        folder = root / "folder"
        folder.mkdir()
        (folder / "red.png").write_bytes(png("red.png", root))
        write(folder / "metadata.jsonl", [{"file_name": "red.png", **chat()}])
        assert shape(load_data(folder)[0]) == [("user", [{"red"}, "what?"]), ("assistant", ["yes"])]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_llava_with_stored_images(self, root, streaming):
        """As LLaVA-OneVision-Data: an image column, and rows without one."""
        rows = [llava("red.png"), llava(None, "no image"), llava("blue.png", "a <image> b"), llava("red.png", "none")]
        rows = [{**row, "image": row.get("image") and str(root / row["image"])} for row in rows]
        Dataset.from_list(rows).cast_column("image", Image()).to_parquet(root / "rows.parquet")
        rows = list(load_data(root / "rows.parquet", streaming=streaming, on_bad_row="skip"))
        assert [shape(row)[0][1] for row in rows] == [[{"red"}, "What is it?"], ["no image"], ["a", {"blue"}, "b"]]
        with pytest.raises(ValueError, match="row 4, `image`: 1 images but 0 <image>"):
            list(load_data(root / "rows.parquet", streaming=streaming))

    @pytest.mark.parametrize(
        ("bad", "field", "message"),
        [
            ({"image": "lost.png", "caption": "x"}, "image", "lost.png does not exist"),
            ({"image": 3, "caption": "x"}, "image", "is 3, not a path"),
            ({"image": "red.png"}, "caption", "is missing"),
            ({"image": "red.png", "caption": ["x", 3]}, "caption[1]", "is 3, not a string"),
            ({"image": "red.png", "caption": []}, "caption", "is an empty list"),
            ({"image": "red.png", "caption": "\n"}, "caption", "is empty"),
            ({"caption": "x"}, "image", "no image"),
            ({"image": "https://a/b.png", "caption": "x"}, "image", "is a web address"),
        ],
    )
    def test_malformed(self, root, bad, field, message):
        path = write(root / "rows.jsonl", [{"image": "red.png", "caption": ["x", "y"]}, bad])
        with pytest.raises(ValueError) as error:
            load_data(path)
        assert str(error.value).startswith(f"{path}, row 2, `{field}`: ") and message in str(error.value)
        assert load_data(path, on_bad_row="skip")["id"] == ["rows.jsonl:1.1", "rows.jsonl:1.2"]

    def test_damaged_parquet(self, root):
        Dataset.from_dict({"image": [png("red.png", root)], "text": ["x"]}).to_parquet(root / "rows.parquet")
        (root / "rows.parquet").write_bytes((root / "rows.parquet").read_bytes()[:-30])
        with pytest.raises(ValueError, match=r"rows.parquet cannot be read \(Arrow"):
            load_data(root / "rows.parquet")


class TestSourceRules:
    def sources(self, root):
        return [
            {"path": write(root / "a.json", [llava(gpt=f"{n}") for n in range(20)])},
            {"path": write(root / "b.jsonl", [mmc4([f"{n}", "x"]) for n in range(60)])},
            {"path": write(root / "c.jsonl", [{"image": "red.png", "caption": f"{n}"} for n in range(40)])},
        ]

    def test_rules(self, root):
        a, b, c = self.sources(root)
        rows = load_data([{**a, "loss_on": "text"}, b, {**c, "structure": False}])
        rules = {row["id"].split(":")[0]: (row["loss_on"], row["structure"]) for row in rows}
        assert rules == {"a.json": ("text", True), "b.jsonl": ("text", True), "c.jsonl": ("captions", False)}
        with pytest.raises(ValueError, match=r"b.jsonl, row 1, `messages`: no answer"):
            load_data({**b, "loss_on": "answers"})
        path = write(root / "d.jsonl", [chat(images=0), chat(images=0, structure=False)])
        assert load_data(path)["structure"] == [True, False]
        assert load_data({"path": path, "structure": True})["structure"] == [True, True]

    def test_streaming_is_the_same(self, root):
        for source in self.sources(root):
            assert list(load_data(source, streaming=True)) == list(load_data(source))
            assert load_data(source, streaming=True).features == ROW_FEATURES

    def test_streaming_reads_when_asked(self, root, caplog):
        path = write(root / "a.json", [llava(), llava("lost.png"), llava()])
        rows = load_data(path, streaming=True)
        with pytest.raises(ValueError, match=r"a.json, row 2, `image`"):
            list(rows)
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            rows = load_data(path, streaming=True, on_bad_row="skip")
            assert "skipped" not in caplog.text
            assert [row["id"] for row in rows] == ["a.json:1", "a.json:3"]
            assert "skipped 1 of 3 rows" in caplog.text
            caplog.clear()
            assert len(list(itertools.islice(rows, 2))) == 2  # training stops when it has its steps
            assert "skipped 1 of 3 rows" in caplog.text

    def test_streaming_mixture(self, root):
        sources = [{**source, "weight": weight} for source, weight in zip(self.sources(root), (1, 2, 1), strict=True)]
        ids = [row["id"] for row in load_data(sources, streaming=True)]
        assert len(set(ids)) == 120  # no row is lost
        assert ids == [row["id"] for row in load_data(sources, streaming=True)]
        assert 0.35 < sum(name.startswith("b") for name in ids) / len(ids) < 0.65
        turns = [row["id"] for row in load_data(self.sources(root), streaming=True)]
        assert len(turns) == 120 and turns[:4] == ["a.json:1", "b.jsonl:1", "c.jsonl:1", "a.json:2"]

    def test_streamed_shards_are_divided(self, root):
        for n in range(4):
            write(root / f"s{n}.jsonl", [mmc4([f"{n}", "x"])])
        rows = load_data(str(root / "s*.jsonl"), streaming=True)
        assert rows.num_shards == 4
        assert [row["id"] for row in rows.shard(2, 1)] == ["s2.jsonl:1", "s3.jsonl:1"]

    def test_globs(self, root):
        self.sources(root)
        assert len(load_data(str(root / "[bx].jsonl"))) == 60
        with pytest.raises(FileNotFoundError, match="finds no file"):
            load_data(str(root / "*.jsonl.gz"))


def stored(rows, root):
    rows = [{"loss_on": "answers", "structure": True, "id": None, **row} for row in rows]
    for row in rows:
        row["images"] = [str(root / name) for name in row.get("images", ())]
    return Dataset.from_list(rows, features=ROW_FEATURES)


def document(*parts, role="user"):
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return [{"role": role, "content": content}]


class TestChecks:
    @pytest.mark.parametrize(
        ("row", "field", "message"),
        [
            ({"messages": document("x")}, "messages", "no answer. Add an assistant turn"),
            ({"messages": document("x", None), "images": ["red.png"], "loss_on": "captions"}, "messages", "no caption"),
            ({"messages": document(None), "images": ["red.png"], "loss_on": "text"}, "messages", "no text"),
            ({"messages": document("x"), "loss_on": "all"}, "loss_on", "is 'all'. Use one of answers"),
            ({"messages": []}, "messages", "at least one message"),
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
        problem = check_dataset(dataset).problems[0]
        assert (problem.row, problem.field, problem.id) == (1, field, "f.json:9")
        assert message in problem.message
        with pytest.raises(ValueError) as error:
            validate_rows(dataset, "train_dataset")
        assert "train_dataset cannot be used" in str(error.value)
        assert f"row 1 (f.json:9), `{field}`: " in str(error.value)
        assert [p.row for p in check_dataset(dataset).problems] == [1] * len(check_dataset(dataset).problems)

    def test_good_rows(self, root):
        rows = [
            chat() | {"images": ["red.png"]},
            {"messages": document(None, "caption"), "images": ["red.png"], "loss_on": "captions"},
            {"messages": document("only text"), "loss_on": "text"},
            chat(images=0),
        ]
        dataset = stored(rows, root)
        for good in (dataset, dataset.select([3, 1]), dataset.select([2, 3]).remove_columns(["images", "id"])):
            validate_rows(good)  # counts follow the selection

    def test_structure_needs_no_image(self, root):
        dataset = stored([chat() | {"images": ["red.png"]}], root)
        (root / "red.png").unlink()
        validate_rows(dataset)

    def test_strings(self):
        messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
        dataset = Dataset.from_list([{"messages": messages}])
        validate_rows(dataset)
        assert check_dataset(dataset).slices_max == 2

    @pytest.mark.parametrize(
        ("value", "expected"), [(False, False), (0, False), (1, True), (True, True), (None, True), ("false", None)]
    )
    def test_structure(self, root, value, expected):
        """0 and 1 are what pandas and CSV files make of booleans; a text that means nothing to Python is refused."""
        row = chat(images=0, structure=value)
        path = write(root / "a.jsonl", [row])
        if expected is None:
            for read in (lambda: validate_rows(Dataset.from_list([row])), lambda: load_data(path)):
                with pytest.raises(ValueError, match="`structure`: is 'false'. Use true or false"):
                    read()
        else:
            validate_rows(Dataset.from_list([row]))
            assert conversation_row(row)["structure"] is load_data(path)[0]["structure"] is expected

    @pytest.mark.parametrize("field", ["video", "videos", "audio", "audios"])
    def test_other_media(self, root, field):
        path = write(root / "a.jsonl", [llava(), llava(None, human="what?") | {field: "x.mp4"}])
        with pytest.raises(ValueError, match=f"a.jsonl, row 2, `{field}`: is not read"):
            load_data(path)
        assert len(load_data(path, on_bad_row="skip")) == 1
        rows = Dataset.from_list([chat(images=0) | {field: ["x.mp4"]}, chat(images=0) | {field: None}])
        assert [(p.row, p.field) for p in check_dataset(rows).problems] == [(0, field)]
        with pytest.raises(ValueError, match=f"row 0, `{field}`: is not read"):
            validate_rows(rows)

    def test_damaged_by_datasets(self, root):
        texts = {"messages": [{"role": "user", "content": "when?"}, {"role": "assistant", "content": "now"}]}
        parts = chat(images=0)
        parts["messages"][1]["content"] = "now"
        a, b = write(root / "a.jsonl", [texts]), write(root / "b.jsonl", [parts])
        rows = datasets.load_dataset("json", data_files=[str(a), str(b)], split="train")
        with pytest.raises(
            ValueError, match=r"`messages\[0\].content`: is JSON text of parts, .*hf_sugar.data.load_data"
        ):
            validate_rows(rows)
        for message in texts["messages"]:
            message["content"] = "2024-01-02"
        rows = datasets.load_dataset("json", data_files=str(write(root / "c.jsonl", [texts])), split="train")
        with pytest.raises(ValueError, match=r"is datetime.*reads texts of JSON files so that look like dates"):
            validate_rows(rows)

    def test_string_caption(self, root):
        row = {"messages": [{"role": "user", "content": "a red square"}], "loss_on": "captions"}
        dataset = Dataset.from_list([row | {"images": [str(root / "red.png")]}])
        validate_rows(dataset.cast_column("images", List(Image())))

    def test_first_few_and_total(self, root):
        rows = [chat(answer=None, id=f"r{n}") | {"images": ["red.png"]} for n in range(9)]
        with pytest.raises(ValueError) as error:
            validate_rows(stored([*rows, chat() | {"images": ["red.png"]}], root))
        assert "9 problems in 9 rows" in str(error.value)
        assert [f"row {n} (r{n})" in str(error.value) for n in range(9)] == [True] * 5 + [False] * 4
        assert "and 4 more" in str(error.value)
        with pytest.raises(ValueError, match="eval has no rows"):
            validate_rows(stored([chat(images=0)], root).select([]), "eval")
        with pytest.raises(ValueError, match="no `messages` column"):
            validate_rows(Dataset.from_dict({"text": ["x"]}))

    def test_report(self, root):
        (root / "broken.png").write_bytes(b"not a picture")
        twin = chat() | {"images": ["red.png"]}
        rows = [
            twin,
            twin,
            chat() | {"images": ["blue.png"]},
            {"messages": document("a", None, "b", None, "c"), "images": ["red.png", "blue.png"], "loss_on": "text"},
            {"messages": document("words"), "loss_on": "text"},
            {"messages": document(None, "x"), "images": ["green.png"], "loss_on": "captions"},
            chat() | {"images": ["broken.png"]},
            chat() | {"images": ["lost.png"]},
        ]
        dataset = stored(rows, root)
        report = check_dataset(dataset)
        assert report.rows == 8 and report.duplicates == 1 and not report.ok
        assert report.kinds == {"conversations": 3, "documents": 2, "captions": 1}
        assert (report.images, report.texts, report.text_only) == (6, 11, 1)
        assert (report.slices_min, report.slices_max) == (1, 5)
        assert report.slices_mean == pytest.approx(17 / 6)
        assert [(problem.row, problem.field) for problem in report.problems] == [(6, "images[0]"), (7, "images[0]")]
        assert "cannot be decoded" in report.problems[0].message and "does not exist" in report.problems[1].message
        assert "8 rows" in str(report) and "2 problems in 2 rows" in str(report)

    def test_duplicates_by_bytes(self, root):
        buffer = io.BytesIO()
        PILImage.new("RGB", (4, 4)).save(buffer, "PNG")
        images = [[{"bytes": buffer.getvalue(), "path": None}], [{"bytes": buffer.getvalue(), "path": "b"}], [None]]
        rows = [
            {**chat(answer=answer), "loss_on": "answers", "structure": True, "id": "x", "images": image}
            for answer, image in zip(["yes", "yes", "null"], images, strict=True)
        ]
        report = check_dataset(Dataset.from_list(rows, features=ROW_FEATURES))
        assert report.duplicates == 1
        assert [(problem.row, problem.field) for problem in report.problems] == [(2, "images[0]")]

    def test_tokens(self, root):
        processor = SugarProcessor.from_processor(tiny_processor())
        rows = [
            chat() | {"images": ["red.png"]},
            chat(images=2) | {"images": ["red.png", "blue.png"]},
            chat(images=0),
            {"messages": document("see <image>"), "loss_on": "text"},
        ]
        dataset = stored(rows, root)
        report = check_dataset(dataset, processor, max_length=20)
        # each image is 16 tokens; the template writes "user what ? assistant yes"
        assert report.tokens_max == 32 + 5
        assert [(problem.row, problem.field) for problem in report.problems] == [
            (0, "messages"),
            (1, "messages"),
            (3, "messages"),
        ]
        assert "21 tokens, more than max_length=20" in report.problems[0].message
        assert check_dataset(dataset.select([0, 1, 2]), processor).ok

    def test_arguments(self, root):
        dataset = stored([chat() | {"images": ["red.png"]}], root)
        with pytest.raises(ValueError, match="give the `processor`"):
            check_dataset(dataset, max_length=10)
        with pytest.raises(ValueError, match="no rows"):
            check_dataset(dataset.select([]))


def tiny_processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = ["<unk>", "<image>", "user", "assistant", "what", "?", "yes"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", additional_special_tokens=["<image>"]
    )
    template = (
        "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] }} {% endfor %}{% endfor %}"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def jpeg(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **kwargs)
    return buffer.getvalue()


class TestImages:
    """From the file to the pixels that the model sees: `load_data`, the check, and the processor."""

    @pytest.fixture
    def processor(self):
        return SugarProcessor.from_processor(tiny_processor())

    def through(self, path, processor):
        row = load_data(write(path.parent / "rows.json", [llava(path.name, gpt="yes", human="<image>\nwhat ?")]))
        report = check_dataset(row, processor)
        image = load_image(undecoded(row)[0]["images"][0])
        messages = fill_images(row[0]["messages"], [image], "row")
        return report, image, processor.encode_conversations([messages])["pixel_values"]

    @pytest.mark.parametrize(
        "name",
        ["exif.jpg", "palette.png", "palette.gif", "alpha.png", "grey16.png", "cmyk.jpg", "animated.gif", "one.png"],
    )
    def test_modes(self, tmp_path, processor, name):
        """Every file shows a red square with one blue quarter at the top left."""
        expected = PILImage.new("RGB", (32, 32), (255, 0, 0))
        expected.paste((0, 0, 255), (0, 0, 16, 16))
        path = tmp_path / name
        if name == "exif.jpg":
            exif = PILImage.Exif()
            exif[0x0112] = 6  # to be turned by 90 degrees clockwise
            expected.transpose(PILImage.Transpose.ROTATE_90).save(path, exif=exif, quality=100, subsampling=0)
        elif name.startswith("palette"):
            expected.convert("P", palette=PILImage.Palette.ADAPTIVE).save(path)
        elif name == "alpha.png":
            # the red is what white shows through: half of it is transparent
            layer = expected.convert("RGBA")
            layer.paste((255, 0, 0, 0), (16, 16, 32, 32))
            layer.save(path)
            expected.paste("white", (16, 16, 32, 32))
        elif name == "grey16.png":
            values = np.full((32, 32), 51400, dtype=np.uint16)
            values[:16, :16] = 256 * 7
            PILImage.fromarray(values).save(path)
            expected = PILImage.fromarray((values // 256).astype(np.uint8)).convert("RGB")
        elif name == "cmyk.jpg":
            expected.convert("CMYK").save(path, quality=100, subsampling=0)
        elif name == "animated.gif":
            expected.save(path, save_all=True, append_images=[PILImage.new("RGB", (32, 32), "green")], duration=10)
        else:
            expected = expected.convert("1").convert("RGB")
            expected.convert("1").save(path)
        report, image, pixels = self.through(path, processor)
        assert report.ok and image.mode == "RGB" and image.size == (32, 32)
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected)).max() <= 8  # JPEG
        assert (pixels - processor.image_processor(expected, return_tensors="pt")["pixel_values"]).abs().max() < 0.15

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
    def test_unreadable(self, tmp_path, processor, monkeypatch, name, message, stored):
        path = tmp_path / name
        noise = PILImage.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8))
        if name in ("bomb.png", "large.png"):
            # Pillow refuses more than twice its limit, and only warns of more than once
            monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 64 * 64 // (3 if name == "bomb.png" else 1) - 1)
            noise.save(path)
        elif name == "float.tiff":
            PILImage.fromarray(np.ones((8, 8), dtype=np.float32)).save(path)
        else:
            noise.save(tmp_path / "whole.png")
            content = {
                "zero.jpg": b"",
                "cut.jpg": jpeg(noise)[:-1000],
                "header.png": (tmp_path / "whole.png").read_bytes()[:40],
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
        report = check_dataset(load_data(path), processor)
        (problem,) = report.problems
        assert (problem.field, problem.kind, problem.id) == ("images[0]", "image", f"{path.name}:1")
        assert re.search(message, problem.message)
        assert f"row 0 ({path.name}:1), `images[0]`: " in str(report) and "unreadable images: 1" in str(report)


class TestCheckCommand:
    def test_good(self, root, capsys):
        path = write(root / "a.json", [llava(), llava(), llava(None, "words")])
        assert main(["check", str(path)]) == 0
        out = capsys.readouterr().out
        assert "3 rows (3 conversations; 1 without an image)" in out
        assert "1 rows repeat an earlier one" in out and "no problems" in out
        assert main(["check", "--train_data", str(path)]) == 0

    def test_every_kind(self, root, capsys, tmp_path):
        model = tmp_path / "model"
        tiny.llava(max_positions=64).save_pretrained(model)
        tiny.processor().save_pretrained(model)
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
        assert main(["check", str(path), "--model_name_or_path", str(model)]) == 1
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
        assert main(["check", str(path), "--model_name_or_path", str(model), "--max_length", "4096"]) == 1
        assert "too long: 0" in capsys.readouterr().out

    def test_weights_repeat_no_row(self, root, capsys, tmp_path):
        many = write(root / "many.json", [llava(gpt=f"{n}") for n in range(9)])
        sources = [{"path": str(many), "weight": 1}, {"path": str(write(root / "one.json", [llava()])), "weight": 9}]
        (tmp_path / "check.yaml").write_text(json.dumps({"train_data": sources}))
        assert main(["check", "--config", str(tmp_path / "check.yaml")]) == 0
        out = capsys.readouterr().out
        assert "10 rows (" in out and "0 rows repeat an earlier one" in out

    def test_nothing_to_read(self, root, capsys):
        assert main(["check", str(write(root / "a.json", [llava("lost.png")]))]) == 1
        assert "a.json, row 1, `image`: the image file" in capsys.readouterr().out
        assert main(["check", str(root / "nowhere.json")]) == 1
        assert "nowhere.json does not exist" in capsys.readouterr().out


class TestTraining:
    """What training makes of `structure: false` and of rows that only show to be bad when they are used."""

    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("model")
        tiny.llava(max_positions=64).save_pretrained(path)
        tiny.processor().save_pretrained(path)
        return str(path)

    def config(self, path, **kwargs):
        settings = dict(per_device_train_batch_size=4, max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
        return SugarTrainingConfig(
            str(path / "run"), logging_steps=1, retrieval_dim=16, disable_tqdm=True, bf16=False, **settings, **kwargs
        )

    def test_rows_without_structure(self, root, model):
        path = write(root / "a.json", [llava(gpt=f"answer {n}") for n in range(3)])
        whole = load_data(path)
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

    def test_structure_loss_is_that_of_the_other_rows(self, root, model, tmp_path):
        a = {"path": write(root / "a.json", [llava(gpt=f"answer {n}") for n in range(2)])}
        b = {"path": write(root / "b.jsonl", [{"image": "blue.png", "caption": f"c{n}"} for n in range(2)])}
        teachers = {"cross": tiny.teachers(tmp_path)["cross"]}

        def structure_loss(*sources, **kwargs):
            args = self.config(tmp_path, teachers=teachers, positions_per_sample=9, teacher_mode="online")
            args.max_steps, args.flip_captions = 1, False
            rows = concatenate_datasets([load_data(source) for source in sources])
            trainer = SugarTrainer(model, args, train_dataset=rows)
            trainer.train()
            return trainer.state.log_history[0]["structure_loss"]

        both, alone = structure_loss(a, b), structure_loss(a)
        assert structure_loss(a, {**b, "structure": False}) == pytest.approx(alone, rel=1e-4)
        assert structure_loss({**b, "structure": False}, a) == pytest.approx(alone, rel=1e-4)
        assert abs(both - alone) > 1e-3
        assert structure_loss({**a, "structure": False}, {**b, "structure": False}) == 0

    @pytest.mark.parametrize("streaming", [False, True])
    def test_skip(self, root, model, streaming, caplog):
        (root / "broken.png").write_bytes(b"x")
        records = [llava(), llava("broken.png"), llava(gpt="long " * 100), llava(gpt="fine"), llava(gpt="no")]
        path = write(root / "a.json", records)
        dataset = load_data(path, streaming=streaming)
        with pytest.raises(ValueError, match="a.json:[23]"):
            SugarTrainer(model, self.config(root, structure_weight=0.0), train_dataset=dataset).train()
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            args = self.config(root, structure_weight=0.0, on_bad_row="skip")
            args.max_steps = 1
            trainer = SugarTrainer(model, args, train_dataset=dataset)
            assert [row["id"] for row in trainer.train_dataset] == ["a.json:1", "a.json:4", "a.json:5"]
            trainer.train()
        assert "Skipped: Row a.json:2, images[0]: image file" in caplog.text
        assert "Row a.json:3" in caplog.text and "the limit is 64" in caplog.text
        assert re.search(r"[2-9] rows were skipped because of `on_bad_row='skip'`", caplog.text)

    def test_nothing_left(self, root, model):
        (root / "broken.png").write_bytes(b"x")
        dataset = load_data(write(root / "a.json", [llava("broken.png")]))
        with pytest.raises(ValueError, match="train_dataset: none of 1 rows can be used"):
            SugarTrainer(model, self.config(root, on_bad_row="skip"), train_dataset=dataset)
        with pytest.raises(ValueError, match="`on_bad_row` is 'ignore'"):
            self.config(root, on_bad_row="ignore")


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

    def test_keys_of_the_page(self):
        page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
        table = page.split("| key | meaning |")[1].split("\n\n")[0]
        first = [line.split("|")[1] for line in table.splitlines()[2:]]
        assert sorted(re.findall(r"`(\w+)`", " ".join(first))) == sorted(_SOURCE_KEYS)


class TestClipart:
    def test_reads_completely(self):
        rows, seen = {}, {}
        for split in ("train", "val", "test"):
            source = [CLIPART / f"llava_{split}.json", CLIPART / f"mmc4_{split}.jsonl"]
            conversations, documents = load_data(source[0]), load_data(source[1])
            report = check_dataset(load_data(source))
            assert report.ok and report.duplicates == 0 and report.text_only == 0
            assert report.kinds == {"conversations": len(conversations), "documents": len(documents)}
            rows[split] = (len(conversations), len(documents))
            paths = [
                [image["path"] for image in row["images"].to_pylist()[0]]
                for dataset in (conversations, documents)
                for row in dataset.with_format("arrow").iter(1)
            ]
            seen[split] = {path for names in paths for path in names}
            assert len(seen[split]) == len(conversations)
        assert rows == {"train": (726, 187), "val": (149, 42), "test": (146, 41)}
        everything = [path for names in seen.values() for path in names]
        assert sorted(everything) == sorted(str(path) for path in (CLIPART / "images").iterdir())
        assert len({Path(path).read_bytes() for path in everything}) == len(everything)  # no drawing in two splits
        assert PILImage.open(everything[0]).size == (96, 96)

    def test_size(self):
        assert sum(path.stat().st_size for path in CLIPART.rglob("*") if path.is_file()) < 3_000_000


datasets.disable_progress_bars()
