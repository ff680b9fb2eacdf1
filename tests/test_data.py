import gzip
import io
import json
import logging
import re
import zipfile
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from hf_sugar import SugarProcessor
from hf_sugar.data import (
    ROW_FEATURES,
    check_dataset,
    check_rows_structure,
    load_data,
    read_llava_json,
    read_mmc4,
    validate_rows,
)
from hf_sugar.data.readers import _BadRow, _llava_row, _mmc4_row


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
            dataset = read_llava_json(write(root / name, records))
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
        dataset = read_llava_json(write(root / "data.json", [llava()]))
        assert dataset.with_format("arrow")[0]["images"].to_pylist() == [
            [{"bytes": None, "path": str(root / "red.png")}]
        ]

    def test_image_root(self, root, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        path = write(elsewhere / "data.json", [llava()])
        assert shape(read_llava_json(path, root)[0])[0][1][0] == {"red"}
        with pytest.raises(ValueError, match="does not exist.*image_root"):
            read_llava_json(path)

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
            (mmc4(), "conversations", "The layouts that are read"),
            (["list"], "record", "is a list, not an object"),
        ],
    )
    def test_malformed(self, root, bad, field, message):
        for name in ("data.json", "data.jsonl"):
            path = write(root / name, [llava(), bad, llava()])
            with pytest.raises(ValueError) as error:
                read_llava_json(path)
            assert str(error.value).startswith(f"{path}, row 2, `{field}`: ")
            assert message in str(error.value)
            assert "on_bad_row='skip'" in str(error.value)
            assert read_llava_json(path, on_bad_row="skip")["id"] == [f"{name}:1", f"{name}:3"]

    def test_invalid_json(self, root):
        path = root / "data.jsonl"
        path.write_text(json.dumps(llava()) + "\n\n{'id': 1}\n" + json.dumps(llava()) + "\n")
        with pytest.raises(ValueError, match=r"data\.jsonl, row 3, `line`: is not valid JSON"):
            read_llava_json(path)
        assert read_llava_json(path, on_bad_row="skip")["id"] == ["data.jsonl:1", "data.jsonl:4"]
        (root / "cut.json").write_text(json.dumps([llava(), llava()])[:-20])
        with pytest.raises(ValueError, match=r"cut\.json is not valid JSON.*Repair"):
            read_llava_json(root / "cut.json", on_bad_row="skip")

    def test_skip_reports(self, root, caplog):
        records = [llava(), *(llava(f"lost{n}.png") for n in range(7)), llava()]
        path = write(root / "data.json", records)
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            assert len(read_llava_json(path, on_bad_row="skip")) == 2
        (record,) = caplog.records
        assert "skipped 7 of 9 rows" in record.getMessage()
        assert [f"lost{n}.png" in record.getMessage() for n in range(7)] == [True] * 5 + [False] * 2

    def test_nothing_left(self, root):
        with pytest.raises(ValueError, match=r"none of 1 rows is left.\n.*row 1, `image`"):
            read_llava_json(write(root / "data.json", [llava("lost.png")]), on_bad_row="skip")
        with pytest.raises(ValueError, match="none of 0 rows"):
            read_llava_json(write(root / "empty.jsonl", []))
        with pytest.raises(ValueError, match="on_bad_row.*'ignore'"):
            read_llava_json(root / "data.json", on_bad_row="ignore")
        with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
            read_llava_json(root / "nowhere.json")

    def test_many_rows(self, root):
        dataset = read_llava_json(write(root / "data.jsonl", [llava(gpt=f"answer {n}") for n in range(20_001)]))
        assert len(dataset) == 20_001
        assert [dataset[n]["messages"][1]["content"][0]["text"] for n in (0, 9_999, 10_000, 20_000)] == [
            "answer 0", "answer 9999", "answer 10000", "answer 20000",
        ]  # fmt: skip

    @settings(max_examples=50, deadline=None)
    @given(pieces=st.lists(st.text(alphabet="ab c\n", max_size=4), min_size=1, max_size=5))
    def test_placeholders_keep_their_place(self, tmp_path_factory, pieces):
        folder = tmp_path_factory.getbasetemp()
        images = [f"{n}.png" for n in range(len(pieces) - 1)]
        for image in images:
            (folder / image).touch()
        value = "<image>".join(pieces)
        if not value.strip():
            with pytest.raises(_BadRow):
                _llava_row(llava(images, value), str(folder))
            return
        row = _llava_row(llava(images, value), str(folder))
        expected = [piece.strip() for piece in re.split("(<image>)", value) if piece.strip()]
        parts = row["messages"][0]["content"]
        assert ["<image>" if part["type"] == "image" else part["text"] for part in parts] == expected
        assert row["images"] == [str(folder / image) for image in images]


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
    def test_every_image_before_its_sentence(self, tmp_path_factory, data):
        folder = tmp_path_factory.getbasetemp()
        sentences = [f"s{n}" for n in range(data.draw(st.integers(1, 5)))]
        matched = data.draw(st.lists(st.integers(0, len(sentences) - 1), max_size=6))
        for n in range(len(matched)):
            (folder / f"{n}.png").touch()
        row = _mmc4_row(mmc4(sentences, [(f"{n}.png", index) for n, index in enumerate(matched)]), str(folder))
        order, images = [], iter(Path(path).stem for path in row["images"])
        for part in row["messages"][0]["content"]:
            order.append(part["text"] or int(next(images)))
        expected = []
        for s, sentence in enumerate(sentences):
            expected += [n for n, index in enumerate(matched) if index == s] + [sentence]
        assert order == expected

    @pytest.mark.parametrize(
        ("bad", "field", "message"),
        [
            (mmc4(images=[("red.png", 0), ("red.png", 2)]), "image_info[1].matched_text_index", "is 2, but `text_list` has 2"),
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
            (llava(), "text_list", "The layouts that are read"),
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
        with pytest.raises(ValueError, match=r"d\.jsonl: the first record has the fields caption, url") as error:
            load_data(path)
        assert all(name in str(error.value) for name in ("llava", "mmc4", "conversational", "text_list", "messages"))

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

    def test_folder_of_json(self, root):
        """`datasets` reads mixed contents as JSON columns, and lists that are all empty as nulls."""
        folder = root / "folder"
        folder.mkdir()
        rows = [
            chat(images=0),
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ]
        write(folder / "train.jsonl", [row | {"images": []} for row in rows])
        dataset = load_data(folder)
        assert dataset.features == ROW_FEATURES
        assert [shape(row)[1] for row in dataset] == [("assistant", ["yes"]), ("assistant", ["b"])]

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
            ({"path": path, "format": "coco"}, "is 'coco'. Use one of auto, llava"),
            ({"path": str(root / "red.png"), "format": "llava"}, "is read from .json"),
            (str(root / "red.png"), "what kind of file"),
        ]:
            with pytest.raises(ValueError, match=message):
                load_data(sources)
        for lost in (str(root / "lost.json"), str(root / "lost"), "lost.jsonl", "a/lost.parquet", "a/b/c"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                load_data(lost)
        with pytest.raises(ValueError, match="no `messages` column but text"):
            Dataset.from_dict({"text": ["x"]}).to_parquet(root / "other.parquet")
            load_data(root / "other.parquet")
        with pytest.raises(ValueError, match="`images` column is not a list"):
            row = chat() | {"images": str(root / "red.png")}
            features = Features({"messages": ROW_FEATURES["messages"], "images": Image()})
            Dataset.from_list([row], features=features).to_parquet(root / "single.parquet")
            load_data(root / "single.parquet")


def stored(rows, root):
    rows = [{"loss_on": "answers", "id": None, **row} for row in rows]
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
            ({"messages": document(None, None, "x"), "images": ["red.png"]}, "images", "1 images but `messages` has 2"),
        ],
    )  # fmt: skip
    def test_problems(self, root, row, field, message):
        good = chat() | {"images": ["red.png"], "id": "good"}
        dataset = stored([good, row | {"id": "f.json:9"}, good], root)
        problem = check_rows_structure(dataset)[0]
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
        assert check_rows_structure(dataset) == []
        validate_rows(dataset)
        assert check_rows_structure(dataset.select([3, 1])) == []  # counts follow the selection
        assert check_rows_structure(dataset.select([2, 3]).remove_columns(["images", "id"])) == []

    def test_structure_needs_no_image(self, root):
        dataset = stored([chat() | {"images": ["red.png"]}], root)
        (root / "red.png").unlink()
        validate_rows(dataset)

    def test_strings(self):
        messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
        dataset = Dataset.from_list([{"messages": messages}])
        assert check_rows_structure(dataset) == []
        assert check_dataset(dataset).slices_max == 2

    def test_string_caption(self, root):
        row = {"messages": [{"role": "user", "content": "a red square"}], "loss_on": "captions"}
        dataset = Dataset.from_list([row | {"images": [str(root / "red.png")]}])
        assert check_rows_structure(dataset.cast_column("images", List(Image()))) == []

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
        structure = check_dataset(dataset, decode=False)
        assert structure.ok and structure.kinds["conversations"] == 5 and "no problems" in str(structure)

    def test_duplicates_by_bytes(self, root):
        buffer = io.BytesIO()
        PILImage.new("RGB", (4, 4)).save(buffer, "PNG")
        images = [[{"bytes": buffer.getvalue(), "path": None}], [{"bytes": buffer.getvalue(), "path": "b"}], [None]]
        rows = [
            {**chat(answer=answer), "loss_on": "answers", "id": "x", "images": image}
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
        with pytest.raises(ValueError, match="leave `decode`"):
            check_dataset(dataset, tiny_processor(), decode=False)
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
