import gzip
import itertools
import json
import logging
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from rows import (
    archive,
    caption,
    chat,
    karpathy,
    llava,
    mmc4,
    png,
    shape,
    stored,
    story,
    strings,
    write,
    write_pictures,
)

from hf_sugar.data import (
    ROW_FEATURES,
    load_data,
)
from hf_sugar.data.images import undecoded
from hf_sugar.data.layouts import LAYOUTS
from hf_sugar.data.load import _SOURCE_KEYS


datasets.disable_progress_bars()

both = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture
def root(tmp_path):
    return write_pictures(tmp_path)


class TestLayouts:
    """Beyond the record of each on docs/data.md."""

    def test_rows_of_the_page(self, root):
        """docs/data.md shows a record of each layout and the row that it becomes, and the keys of a source."""
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

    def test_llava(self, root):
        speakers = ["system", "human", "gpt", "human", "gpt"]
        turns = zip(speakers, ["Be short.", "What?\n<image>", "Red.", "<image>", "Blue."])
        records = [
            llava(["green.png", "blue.png"], "Compare <image> with <image>, please."),
            llava(None, "  No picture. "),
            llava(["red.png", "blue.png"], conversations=[{"from": r, "value": v} for r, v in turns]),
        ]
        dataset, answer = load_data(write(root / "data.json", records)), ("assistant", ["A colour."])
        messages = [("system", ["Be short."]), ("user", ["What?", {"red"}]), ("assistant", ["Red."])]
        assert [shape(row) for row in dataset] == [
            [("user", ["Compare", {"green"}, "with", {"blue"}, ", please."]), answer],
            [("user", ["No picture."]), answer],
            [*messages, ("user", [{"blue"}]), ("assistant", ["Blue."])],
        ]
        assert set(dataset["loss_on"]) == {"answers"} and dataset["id"] == [f"data.json:{n}" for n in (1, 2, 3)]
        assert dataset.features == ROW_FEATURES
        paths = undecoded(dataset)[2]["images"]  # images stay paths
        assert paths == [{"bytes": None, "path": str(root / colour)} for colour in ("red.png", "blue.png")]

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
        first = [("user", [{"red"}, "shard 1", "b", {"blue"}, {"green"}, "c"])]
        assert [shape(row) for row in rows[2:4]] == [first, [("user", ["alone"])]]
        assert {row["loss_on"] for row in rows} == {"text"}

    @both
    def test_coco(self, root, streaming):
        images = [("red.png", "test", ["r1", "r2"]), ("green.png", "train", [" g1 "])]
        images += [("blue.png", "restval", ["b1"]), ("green.png", "val", ["g2"])]
        images = [karpathy(*image) for image in images]
        path = write(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
        for split, expected in [
            ("train", [("green", "g1"), ("blue", "b1")]),
            ("restval", [("blue", "b1")]),
            ("val", [("green", "g2")]),
            ("validation", [("green", "g2")]),
            ("test", [("red", "r1"), ("red", "r2")]),
        ]:
            rows = list(load_data(path, split, streaming=streaming))
            assert [shape(row) for row in rows] == [caption(*pair) for pair in expected]
        assert [row["id"] for row in rows] == ["dataset_coco.json:1.1", "dataset_coco.json:1.2"]
        assert len(list(load_data({"path": path, "split": "test"}, streaming=streaming))) == 2
        with pytest.raises(ValueError, match="no image is of the split 'dev', but of restval, test, train, val"):
            list(load_data(path, "dev", streaming=streaming))

    @both
    def test_vist(self, root, streaming):
        for number, name in (("1741642", "red.png"), ("1741640", "blue.png")):
            (root / f"{number}.png").write_bytes(png(name, root))
        first = story((1, "1741640", "then!"), (0, "1741642", "once!"))
        second = story((0, "1741642", "other"), story="9")
        del second[0][0]["original_text"]
        path = write(root / "train.json", {"images": [], "annotations": [first[0], second[0], first[1]]})
        rows = list(load_data(path, streaming=streaming))
        assert [shape(row)[0][1] for row in rows] == [[{"red"}, "once!", {"blue"}, "then!"], [{"red"}, "other ."]]
        assert [(row["loss_on"], row["id"]) for row in rows] == [("text", "train.json:1"), ("text", "train.json:2")]

    @both
    def test_winoground(self, root, streaming):
        names = ("image_0", "image_1", "caption_0", "caption_1")
        features = Features({**dict.fromkeys(names[:2], Image()), **dict.fromkeys(names[2:], Value("string"))})
        rows = [
            ("red", "blue", "r", "b"),
            ("green", None, "g", "r"),
            ("red", "green", "x", ""),
            ("green", "red", "g", "r"),
        ]
        rows = [(a and str(root / f"{a}.png"), b and str(root / f"{b}.png"), *texts) for a, b, *texts in rows]
        path = root / "test.parquet"
        Dataset.from_list([dict(zip(names, row)) for row in rows], features=features).to_parquet(path)
        with pytest.raises(ValueError, match="test.parquet, row 2, `image_1`: there is no image"):
            list(load_data(path, streaming=streaming))
        problems = []
        rows = list(load_data(path, streaming=streaming, on_bad_row="skip", bad_rows=problems))
        # several rows of a record, in its order
        pairs = [("red", "r"), ("blue", "b"), ("green", "g"), ("red", "r")]
        assert [shape(row) for row in rows] == [caption(*pair) for pair in pairs]
        assert [row["id"] for row in rows] == [f"test.parquet:{n}.{k}" for n in (1, 4) for k in (1, 2)]
        assert [(p.id, p.field) for p in problems] == [("test.parquet:2", "image_1"), ("test.parquet:3", "caption_1")]

    def test_conversational(self, root):
        rows = [
            chat(images=2, answer=None, loss_on="text", id="mine") | {"images": ["red.png", "blue.png"]},
            # contents as strings: the images stand before the first user text, as in TRL
            strings("what?", "red", "sure?", "yes", images=["red.png"]),
            strings("a", "b", structure=0),
        ]
        rows[1]["messages"].insert(0, {"role": "system", "content": "Short."})
        dataset = load_data(write(root / "data.json", rows))
        assert dataset.features == ROW_FEATURES
        assert dataset["id"] == ["mine", "data.json:2", "data.json:3"]
        assert dataset["loss_on"] == ["text", "answers", "answers"]
        assert dataset["structure"] == [True, True, False]
        turns = [("user", [{"red"}, "what?"]), ("assistant", ["red"]), ("user", ["sure?"]), ("assistant", ["yes"])]
        assert [shape(row) for row in dataset] == [
            [("user", [{"red"}, {"blue"}, "what?"])],
            [("system", ["Short."]), *turns],
            [("user", ["a"]), ("assistant", ["b"])],
        ]

    @both
    def test_positives_and_negatives(self, root, streaming, caplog):
        pairs = [{"image": "red.png", "caption": "red", "negatives": ["blue"], "positives": []}]
        pairs += [{"image": "blue.png", "caption": "blue"}, {"image": "blue.png", "caption": "x", "negatives": "red"}]
        plain = chat(answer=None, loss_on="text") | {"images": ["red.png"]}
        sources = [write(root / "a.json", pairs), write(root / "b.json", [plain, plain | {"positives": ["late"]}])]
        with caplog.at_level("WARNING"):
            rows = list(load_data([str(path) for path in sources], streaming=streaming, on_bad_row="skip"))
        rows = {row["id"]: (row["positives"], row["negatives"]) for row in rows}
        assert rows == {"a.json:1": ([], ["blue"]), "a.json:2": (None, None), "b.json:1": (None, None)}
        assert "row 3, `negatives`: is 'red', not a list of texts" in caplog.text
        assert "row 2, `positives`: is not in the first record" in caplog.text
        table = stored([chat() | {"images": ["red.png"]}], root).rename_column("messages", "conversations")
        table.add_column(
            "negatives", [[{"bytes": png("blue.png", root), "path": None}]], feature=List(Image())
        ).to_parquet(root / "c.parquet")
        with pytest.raises(ValueError, match="`negatives` is no list of texts"):
            load_data(root / "c.parquet", streaming=streaming)
        table.add_column("negatives", [["blue"]]).to_parquet(root / "d.parquet")
        [row] = load_data({"path": root / "d.parquet", "rename": {"conversations": "messages"}}, streaming=streaming)
        assert row["negatives"] == ["blue"] and row["images"][0].size == (4, 4)

    def test_auto(self, root):
        path = write(root / "d.jsonl", [{"caption": "x", "url": "y"}])
        with pytest.raises(ValueError, match=r"d\.jsonl, first record: no layout .* the fields caption, url") as error:
            load_data(path)
        assert all(f" {name}: " in str(error.value) for name in LAYOUTS) and "\n" not in str(error.value)
        path = write(root / "a.json", [llava(gpt="long " * 300_000), llava()])  # one line
        assert len(load_data(path)) == 2
        path.write_text(json.dumps([llava(), llava()], indent=2))
        assert len(load_data(path)) == 2
        for nothing in ("[]", "", "[\n]\n"):
            path.write_text(nothing)
            with pytest.raises(ValueError, match="a.json holds no rows"):
                load_data(path)
        with pytest.raises(ValueError, match="e.jsonl: the first record is not a JSON object"):
            load_data(write(root / "e.jsonl", ["text"]))


GOOD = {
    "llava": llava(),
    "mmc4": mmc4(),
    "coco": karpathy(),
    "vist": story((0, "red.png", "good"), story="1")[0],
    "captions": {"image": "red.png", "caption": ["x", "y"]},
    "conversational": strings("a", "b"),
}
BAD = [
    ("llava", llava("lost.png"), "image", "lost.png does not exist"),
    ("llava", llava(["red.png", "blue.png"]), "image", "2 images but 1 <image> placeholders"),
    ("llava", llava(None), "image", "0 images but 1 <image> placeholders"),
    ("llava", llava(""), "image", "is '', not a path"),
    ("llava", llava(gpt="  "), "conversations[1].value", "is empty"),
    ("llava", llava(gpt="see <image>"), "conversations[1].value", "only a human turn"),
    ("llava", llava(conversations=[{"from": "bot", "value": "hi"}]), "conversations[0].from", "is 'bot'. Use one of human"),
    ("llava", llava(conversations=[{"from": "human", "value": "<image>"}]), "messages", "no answer. Add an assistant turn"),
    ("llava", llava(conversations=[]), "conversations", "is missing, empty or not a list"),
    ("llava", ["list"], "record", "is a list, not an object"),
    ("llava", llava(structure="false"), "structure", "is 'false'. Use true or false"),
    ("llava", llava(loss_on="images"), "loss_on", "is 'images'. Use one of answers"),
    ("llava", llava(gpt="x\ud83d"), "record", "has half of a surrogate pair after"),
    ("llava", llava("\ud83d.png"), "record", "has half of a surrogate pair"),
    *(("llava", llava(None, "what?") | {name: "x.mp4"}, name, "is not read") for name in ("video", "videos", "audio")),
    ("mmc4", mmc4(images=[("red.png", 0), ("red.png", 2)]), "image_info[1].matched_text_index", "is 2. Every image needs the index of the sentence it belongs to, from 0 to 1"),
    ("mmc4", mmc4(images=[("red.png", 1.0)]), "image_info[0].matched_text_index", "is 1.0"),
    ("mmc4", {"text_list": ["a"], "image_info": [{"image_name": "red.png"}]}, "image_info[0].matched_text_index", "is None"),
    ("mmc4", {"text_list": ["a"], "image_info": ["red.png"]}, "image_info[0]", "is not an object"),
    ("mmc4", mmc4(["a", ""]), "text_list[1]", "is empty"),
    ("mmc4", {"text_list": ["a"]}, "image_info", "is missing"),
    ("coco", karpathy(None), "filename", "no image"),
    ("coco", karpathy(sentences=[]), "sentences", "is missing, empty"),
    ("coco", karpathy() | {"sentences": [{"tokens": ["a"]}]}, "sentences[0].raw", "is None, not a string"),
    ("coco", karpathy(split=None), "split", "is None, not a string"),
    ("vist", story((0, "404", "x")), "annotations[1].photo_flickr_id", "404 does not exist"),
    ("vist", story((0, "red.png", "x"), (0, "red.png", "y")), "annotations[2].worker_arranged_photo_order", "need different"),
    ("vist", story((0, "red.png", "x"), (2, "red.png", "y")), "annotations[1].story_id", "only the steps 0, 2 are there"),
    ("vist", [[{"photo_flickr_id": "red.png"}]], "annotations[1]", "with a `story_id`"),
    ("captions", {"image": "red.png"}, "caption", "is missing"),
    ("captions", {"image": "red.png", "caption": ["x", 3]}, "caption[1]", "is 3, not a string"),
    ("captions", {"image": "red.png", "caption": []}, "caption", "is an empty list"),
    ("captions", {"caption": "x"}, "image", "no image"),
    ("captions", {"image": "https://a/b.png", "caption": "x"}, "image", "is a web address"),
    *(
        (
            "conversational",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", name: "blue.png"}]},
                    {"role": "assistant", "content": "blue"},
                ],
                "images": ["red.png"],
            },
            f"messages[0].content[0].{name}",
            "is not read. Put the image into `images`",
        )
        for name in ("image", "url", "path")
    ),
    ("llava", llava(conversations=[{"from": "human", "value": "hi", "loss": False}]), "conversations[0].loss", "is not read. Remove it"),
    *(
        ("conversational", {"messages": [*strings("hi")["messages"], {"role": "assistant", "content": "yo", **field}]}, f"messages[1].{[*field][0]}", "is not read. Remove it")
        for field in ({"weight": 0}, {"loss": False}, {"tool_calls": [{"name": "look"}]}, {"thinking": "hm"})
    ),
    ("conversational", chat(answer=None), "images", "holds 0 images but `messages` has 1 image parts"),
    ("conversational", chat(images=0, answer=None), "messages", "no answer. Add an assistant turn, or set loss_on='text'"),
    ("conversational", chat() | {"images": "red.png"}, "images", "is not a list"),
    ("conversational", strings("a", "b", id="\ud83d"), "record", "has half of a surrogate pair"),
    ("conversational", {"messages": None}, "messages", "is not a list with at least one message"),
]  # fmt: skip


class TestBadRows:
    @pytest.mark.parametrize(("layout", "bad", "field", "message"), BAD)
    def test_malformed(self, root, layout, bad, field, message):
        good = GOOD[layout]
        for name in ("data.json", "data.jsonl"):
            records = [good, bad, good]
            if layout in ("coco", "vist"):  # one object
                name = "data.json"
                whole = {"annotations": [good, *bad]} if layout == "vist" else {"dataset": "coco"}
                records = {"images": records, **whole}
            path = write(root / name, records)
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
        lines = "".join(json.dumps(mmc4([f"{n}", "x"])) + "\n" for n in range(500)).encode()
        zipped = archive(root / "docs.zip", {"docs.jsonl": [mmc4([f"{n} {'x' * 50}", "end"]) for n in range(200)]})
        zipped = zipped.read_bytes()
        Dataset.from_dict({"image": [png("red.png", root)], "text": ["x"]}).to_parquet(root / "rows.parquet")
        for name, content, message in [
            ("cut.json", json.dumps([llava(), llava()])[:-20].encode(), "is not valid JSON.*Repair"),
            ("docs.jsonl.gz", gzip.compress(lines)[:-200], "cannot be read .EOFError"),
            (
                "latin.jsonl",
                json.dumps(mmc4(["caf@"])).encode().replace(b"@", b"\xe9"),
                "cannot be read .UnicodeDecodeE",
            ),
            ("none.zip", archive(root / "none.zip", {"readme.txt": []}).read_bytes(), "no .json or .jsonl file"),
            ("cut.zip", zipped[: len(zipped) // 2], "cannot be read .BadZipFile.*download it again"),
            ("docs.zip", zipped[:400] + bytes([zipped[400] ^ 255]) + zipped[401:], r"cannot be read \((BadZip|error)"),
            ("rows.parquet", (root / "rows.parquet").read_bytes()[:-30], r"cannot be read \(Arrow"),
            ("coco.json", b'{"images": [], "dataset": "coco"}', ": `images` is missing, empty"),
            ("vist.json", b'{"images": [], "annotations": {}}', ": `annotations` is missing, empty"),
        ]:
            (root / name).write_bytes(content)
            for streaming in (False, True):
                with pytest.raises(ValueError, match=f"{name}.*{message}"):
                    list(load_data(root / name, on_bad_row="skip", streaming=streaming))

    @both
    def test_skip_reports(self, root, caplog, streaming):
        path = write(root / "data.json", [llava(), *(llava(f"lost{n}.png") for n in range(7)), llava()])
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            rows = load_data(path, on_bad_row="skip", streaming=streaming)  # a stream reads when asked
            assert not (streaming and caplog.records)
            assert len(list(itertools.islice(rows, 2))) == 2  # training stops when it has its steps
        (record,) = caplog.records
        assert "skipped 7 of 9 rows" in record.getMessage()
        assert [f"lost{n}.png" in record.getMessage() for n in range(7)] == [True] * 5 + [False] * 2
        if not streaming:
            with pytest.raises(ValueError, match=r"none of 1 rows is left.\n.*row 1, `image`"):
                load_data(write(root / "data.json", [llava("lost.png")]), on_bad_row="skip")
            with pytest.raises(ValueError, match="holds no rows"):
                load_data({"path": write(root / "empty.jsonl", []), "format": "llava"})


class TestSources:
    def sources(self, root):
        return [
            {"path": write(root / "a.json", [llava(gpt=f"{n}") for n in range(20)])},
            {"path": write(root / "b.jsonl", [mmc4([f"{n}", "x"]) for n in range(60)])},
            {"path": write(root / "c.jsonl", [{"image": "red.png", "caption": f"{n}"} for n in range(40)])},
        ]

    @both
    def test_mixtures(self, root, streaming):
        sources = self.sources(root)
        single = [load_data(source, streaming=streaming) for source in sources]
        assert all(rows.features == ROW_FEATURES for rows in single)
        ids = [row["id"] for rows in single for row in rows]
        mixed = [row["id"] for row in load_data(sources, seed=3, streaming=streaming)]
        assert sorted(mixed) == sorted(ids) and mixed != ids
        if streaming:
            assert mixed[:4] == ["a.json:1", "b.jsonl:1", "c.jsonl:1", "a.json:2"]
            assert [list(rows) for rows in single] == [list(load_data(source)) for source in sources]
        else:
            assert mixed == list(load_data(sources, seed=3)["id"]) != list(load_data(sources, seed=4)["id"])
        weighted = [{**source, "weight": weight} for source, weight in zip(sources, (1, 2, 1), strict=True)]
        mixed = [row["id"] for row in load_data(weighted, streaming=streaming)]
        assert mixed == [row["id"] for row in load_data(weighted, streaming=streaming)]
        assert set(mixed) == set(ids)  # no row is lost
        for drawn in (mixed, mixed[: len(mixed) // 2]):  # at random, not in blocks
            share = sum(name.startswith("b") for name in drawn) / len(drawn)
            assert abs(share - 0.5) < 4 * (0.25 / len(drawn)) ** 0.5

    def test_shards(self, root):
        for n in range(4):
            write(root / f"s{n}.jsonl", [mmc4([f"{n}", "x"])])
        assert len(load_data(str(root / "[rs]?.jsonl"))) == 4
        rows = load_data(str(root / "s*.jsonl"), streaming=True)
        assert rows.num_shards == 4
        assert [row["id"] for row in rows.shard(2, 1)] == ["s2.jsonl:1", "s3.jsonl:1"]

    def test_settings(self, root, tmp_path_factory):
        a, b, c = self.sources(root)
        rows = load_data([{**a, "loss_on": "text"}, b, {**c, "structure": False}])
        rules = {row["id"].split(":")[0]: (row["loss_on"], row["structure"]) for row in rows}
        assert rules == {"a.json": ("text", True), "b.jsonl": ("text", True), "c.jsonl": ("captions", False)}
        with pytest.raises(ValueError, match=r"b.jsonl, row 1, `messages`: no answer"):
            load_data({**b, "loss_on": "answers"})
        path = write(root / "d.jsonl", [llava(), llava(structure=0, loss_on="text")])  # of the record itself
        assert load_data(path)["structure"] == [True, False] and load_data(path)["loss_on"] == ["answers", "text"]
        assert load_data({"path": path, "structure": True})["structure"] == [True, True]
        rows = load_data([{**a, "weight": 3, "generative": False}, {**b, "weight": 1}])
        assert {row["id"].split(":")[0]: row["generative"] for row in rows} == {"a.json": False, "b.jsonl": True}
        path = write(tmp_path_factory.mktemp("elsewhere") / "data.json", [llava()])
        for source, argument in ((path, root), ({"path": path, "image_root": root}, "nowhere")):
            assert shape(load_data(source, image_root=argument)[0])[0][1][0] == {"red"}

    def test_refused(self, root):
        path = str(write(root / "a.json", [llava()]))
        vist = str(write(root / "vist.json", {"images": [], "annotations": story((0, "red.png", "x"))}))
        Dataset.from_list([chat()]).save_to_disk(root / "saved")
        for sources, message in [
            ([], "is empty"),
            ([{"image_root": path}], "source 1 has no `path`"),
            ([path, {"path": path, "wieght": 1}], "a.json: a source has no key `wieght`. Did you mean `weight`"),
            ({"path": path, "file": 1}, "a.json: a source has no key `file`. There are path, image_root"),
            ([{"path": path, "weight": 1}, path], "every source a `weight`"),
            *(([{"path": path, "weight": 1}, {"path": path, "weight": w}], "greater than 0") for w in (0, "1", np.nan)),
            ({"path": path, "format": "csv"}, "`format` is 'csv'. Use one of auto, conversational, llava"),
            ({"path": path, "loss_on": "images"}, "`loss_on` is 'images'. Use one of answers, captions, text"),
            ({"path": path, "structure": "no"}, "`structure` is 'no'. Use one of True, False"),
            ({"path": path, "rename": "x"}, "`rename` is 'x'. Write it as"),
            ({"path": path, "rename": {"alt": "id"}}, "`rename` is of a field 'alt', which no row has"),
            *(({"path": path, key: "v1"}, f"a.json: `{key}` would have no effect") for key in ("name", "revision")),
            ({"path": str(root), "revision": "v1"}, "`revision` would have no effect"),
            ({"path": path, "split": "test"}, "a.json: `split` would have no effect: a file of llava has none"),
            ({"path": vist, "split": "test"}, "vist.json: `split` would have no effect: a file of vist has none"),
            ({"path": "a.parquet", "split": "test"}, "a.parquet: `split` would have no effect"),
            ({"path": str(root / "saved"), "split": "test"}, "saved: `split` would have no effect"),
            (str(root / "red.png"), "what kind of file"),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=message):
                load_data(sources)
        with pytest.raises(ValueError, match="on_bad_row.*'ignore'"):
            load_data(path, on_bad_row="ignore")
        for lost in (str(root / "lost.json"), str(root / "lost"), "lost.jsonl", "a/lost.parquet", "a/b/c"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                load_data(lost)
        with pytest.raises(FileNotFoundError, match=r"no/dataset is no file or folder in .* and no Hub dataset"):
            load_data("no/dataset")
