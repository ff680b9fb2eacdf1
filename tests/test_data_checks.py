import logging
import re
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from datasets import Dataset, Features, Image, List
from rows import chat, document, llava, png, stored, strings, write, write_pictures
from trl.data_utils import prepare_multimodal_messages

from hf_sugar import SugarProcessor
from hf_sugar.cli.main import main
from hf_sugar.data import (
    ROW_FEATURES,
    captions_by_image,
    check_dataset,
    load_data,
    load_image,
    row_name,
    row_slices,
    validate_rows,
)
from hf_sugar.data.images import undecoded
from hf_sugar.models.rows_sugar import conversation_row, fill_images
from hf_sugar.training.collator import SugarCollator


datasets.disable_progress_bars()

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
both = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture
def root(tmp_path):
    return write_pictures(tmp_path)


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

    def test_listing(self, root):
        rows = [chat(answer=None, id=f"r{n}") | {"images": ["red.png"]} for n in range(9)]
        with pytest.raises(ValueError) as error:
            validate_rows(stored([*rows, chat() | {"images": ["red.png"]}], root))
        assert "9 problems in 9 rows" in str(error.value) and "and 4 more" in str(error.value)
        assert [f"row {n} (r{n})" in str(error.value) for n in range(9)] == [True] * 5 + [False] * 4
        with pytest.raises(ValueError, match="eval has no rows"):
            validate_rows(stored([chat(images=0)], root).select([]), "eval")
        with pytest.raises(ValueError, match="eval has no `messages` column"):
            validate_rows(Dataset.from_dict({"text": ["x"]}), "eval")
        rows = stored([chat() | {"images": ["red.png"]}], root).with_transform(lambda batch: batch)
        for use in (validate_rows, undecoded, check_dataset, captions_by_image):
            with pytest.raises(ValueError, match=r"has a transform .* Apply it with `map`"):
                use(rows)

    def test_structure(self):
        """0 and 1 are what pandas and CSV files make of booleans; a text that means nothing to Python is refused."""
        for value, expected in [(False, False), (0, False), (1, True), (True, True), (None, True)]:
            row = chat(images=0, structure=value)
            validate_rows(Dataset.from_list([row]))
            assert conversation_row(row)["structure"] is expected
        with pytest.raises(ValueError, match="`structure`: is 'false'. Use true or false"):
            validate_rows(Dataset.from_list([chat(images=0, structure="false")]))

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
        mixed = [write(root / "a.jsonl", [strings("when?", "now")]), write(root / "b.jsonl", [parts])]
        dates = [write(root / "c.jsonl", [strings("2024-01-02", "2024-01-02")])]
        for files, message in (
            (mixed, r"`messages\[0\].content`: is JSON text of parts, .*"),
            (dates, "is datetime.*"),
        ):
            rows = datasets.load_dataset("json", data_files=list(map(str, files)), split="train")
            with pytest.raises(ValueError, match=message + "data.load_data"):
                validate_rows(rows)

    def test_slices(self, root):
        red, blue = (load_image(root / name) for name in ("red.png", "blue.png"))
        messages = [{"role": "system", "content": "Be brief."}, *document("a", None, "b")]
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

    def test_report(self, root):
        (root / "broken.png").write_bytes(b"not a picture")
        again = chat() | {"images": ["red.png"]}
        rows = [again, again, *(chat() | {"images": [name]} for name in ("blue.png", "broken.png", "lost.png"))]
        rows += [
            {"messages": document("a", None, "b", None, "c"), "images": ["red.png", "blue.png"], "loss_on": "text"},
            {"messages": document("words"), "loss_on": "text"},
            {"messages": document(None, "x"), "images": ["green.png"], "loss_on": "captions"},
        ]
        report = check_dataset(stored(rows, root))
        assert report.rows == 8 and report.duplicates == 1 and not report.ok
        assert report.kinds == {"conversations": 3, "documents": 2, "captions": 1}
        assert (report.images, report.texts, report.text_only) == (6, 11, 1)
        assert report.slices == [3, 3, 3, 5, 1, 2]
        assert [(problem.row, problem.field) for problem in report.problems] == [(3, "images[0]"), (4, "images[0]")]
        assert "cannot be decoded" in report.problems[0].message and "does not exist" in report.problems[1].message
        for line in ("8 rows (3 conv", "slices a row: 1 to 5, 2.8 on average", "2 problems in 2 rows"):
            assert line in str(report)
        content = png("red.png", root)  # duplicates by bytes
        images = [[{"bytes": content, "path": None}], [{"bytes": content, "path": "b"}], [None]]
        rows = [{**chat(answer=answer), "images": image} for answer, image in zip(["yes", "yes", "null"], images)]
        features = Features({name: ROW_FEATURES[name] for name in ("messages", "images")})
        report = check_dataset(Dataset.from_list(rows, features=features))
        assert report.duplicates == 1
        assert [(problem.row, problem.field) for problem in report.problems] == [(2, "images[0]")]

    def test_tokens(self, root):
        processor = SugarProcessor.from_processor(tiny.processor())
        rows = [chat() | {"images": ["red.png"]}, chat(images=2) | {"images": ["red.png", "blue.png"]}, chat(images=0)]
        good = stored(rows, root)
        dataset = stored([*rows, {"messages": document("see <image>"), "loss_on": "text"}], root)
        filled = [fill_images(row["messages"], row["images"]) for row in good]
        ids = [processor.apply_chat_template(m, tokenize=True, return_dict=True)["input_ids"][0] for m in filled]
        lengths = list(map(len, ids))
        report = check_dataset(dataset, processor, max_length=lengths[0] - 1)
        assert report.tokens == lengths
        assert [(p.row, p.field) for p in report.problems] == [(0, "messages"), (1, "messages"), (3, "messages")]
        assert f"{lengths[0]} tokens, more than max_length={lengths[0] - 1}" in report.problems[0].message
        assert check_dataset(good, processor).ok
        processor.chat_template = "{{ raise_exception('no system') if messages|length > 1 }}"
        report = check_dataset(good.select([2]), processor)
        assert "chat template refuses the conversation (no system)" in report.problems[0].message
        with pytest.raises(ValueError, match="give the `processor`"):
            check_dataset(dataset, max_length=10)
        with pytest.raises(ValueError, match="no rows"):
            check_dataset(dataset.select([]))


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
        with pytest.raises(ValueError, match="a.json holds no rows"):
            main(["check", str(write(root / "a.json", []))])

    def test_every_kind(self, root, capsys, model):
        (root / "broken.png").write_bytes(b"x")
        records = [llava(), llava("lost.png"), llava(gpt=" "), llava(None), llava("broken.png")]
        records += [llava(gpt="long " * 100), llava(conversations=[{"from": "robot", "value": "x"}])]
        path = write(root / "a.json", records)
        assert main(["check", str(path), "--model_name_or_path", model]) == 1
        out = capsys.readouterr().out
        for line in (
            "7 rows (2 conversations; 0 without an image)",
            "unreadable images: 2",
            "count mismatches: 1",
            "empty texts: 1",
            "too long: 1",
            "malformed otherwise: 1",
            "the limit is 64",
            "6 problems in 6 rows",
            f"a.json:2, `image`: the image file {root / 'lost.png'} does not exist",
        ):
            assert line in out
        assert main(["check", str(path), "--model_name_or_path", model, "--max_length", "4096"]) == 1
        assert "too long: 0" in capsys.readouterr().out


class TestTraining:
    """What training makes of `structure: false` and of rows that only show to be bad when they are used."""

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

    def test_rows_without_generative_loss(self, root, model):
        examples = [dict(row) for row in load_data(write(root / "a.json", [llava(), llava(gpt="not learnt")]))]
        collator = SugarCollator(SugarProcessor.from_pretrained(model), embed_slices=lambda s: torch.ones(len(s), 8))
        everything = collator(examples)
        examples[1]["generative"] = False
        batch = collator(examples)
        assert torch.equal(batch["labels"][0], everything["labels"][0]) and (batch["labels"][1] == -100).all()
        assert all(torch.equal(batch[name], everything[name]) for name in batch if name != "labels")
        with pytest.raises(ValueError, match="`structure`: is false, and `generative` too, so that nothing is learnt"):
            collator([examples[1] | {"structure": False}])

    @both
    def test_skip(self, root, model, make, streaming, caplog):
        (root / "broken.png").write_bytes(b"x")
        records = [llava(), llava("broken.png"), llava(gpt="long " * 100), llava(gpt="fine"), llava(gpt="no")]
        dataset = load_data(write(root / "a.json", records), streaming=streaming)
        settings = {"model": model, "structure_weight": 0.0, "max_steps": 1}
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            trainer = make(dataset, on_bad_row="skip", **settings)
            assert [row["id"] for row in trainer.train_dataset] == ["a.json:1", "a.json:4", "a.json:5"]
            trainer.train()
        assert "Skipped: Row a.json:2, images[0]: image file" in caplog.text
        assert "Row a.json:3" in caplog.text and "the limit is 64" in caplog.text
        assert re.search(r"[2-9] rows were skipped because of `on_bad_row='skip'`", caplog.text)
        if not streaming:
            with pytest.raises(ValueError, match="a.json:[23]"):
                make(dataset, **settings).train()
            with pytest.raises(ValueError, match="train_dataset: none of 1 rows can be used"):
                make(dataset.select([1]), on_bad_row="skip", **settings)
