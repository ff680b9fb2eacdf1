import gzip
import io
import json
import logging
import re
import zipfile

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from rows import COLOURS, caption, chat, karpathy, llava, png, shape, strings, tar, write, write_pictures

from hf_sugar import SugarProcessor
from hf_sugar.data import (
    ROW_FEATURES,
    captions_by_image,
    check_dataset,
    load_data,
    load_image,
    load_table,
    stored_image,
)
from hf_sugar.data.files import _files
from hf_sugar.data.images import undecoded
from hf_sugar.models.rows_sugar import fill_images


datasets.disable_progress_bars()

both = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture
def root(tmp_path):
    return write_pictures(tmp_path)


def encoded(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


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

    def test_keys_of_a_table(self, root):
        """A key that would have no effect is refused, as by `load_data`."""
        path = str(write(root / "pairs.json", [{"caption_0": "a"}]))
        for key, message in (
            ("split", "`split` would have no effect: a file has none"),
            ("revision", "`revision` would have no effect"),
            ("splt", "a source has no key `splt`. Did you mean `split`"),
            ("weight", "a source has no key `weight`. There are path, split, name, revision"),
        ):
            with pytest.raises(ValueError, match=f"pairs.json: {message}"):
                load_table({"path": path, key: "test"})
        assert load_table({"path": path}, "test")["caption_0"] == ["a"]

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

    @both
    def test_stored_images(self, root, streaming, caplog):
        """As LLaVA-OneVision-Data: an image column, and rows without one; and as img2dataset writes them: plain binary, and
        nothing where the download failed. Other binary columns are no images."""
        rows = [llava("red.png"), llava(None, "no image"), llava("blue.png", "a <image> b"), llava("red.png", "none")]
        rows = [{"hash": b"x", **row, "image": row.get("image") and str(root / row["image"])} for row in rows]
        Dataset.from_list(rows).cast_column("image", Image()).to_parquet(root / "rows.parquet")
        rows = list(load_data(root / "rows.parquet", streaming=streaming, on_bad_row="skip"))
        assert [shape(row)[0][1] for row in rows] == [[{"red"}, "What is it?"], ["no image"], ["a", {"blue"}, "b"]]
        with pytest.raises(ValueError, match="row 4, `image`: 1 images but 0 <image>"):
            list(load_data(root / "rows.parquet", streaming=streaming))
        rows = [("red.png", ["a", "b"]), (None, ["b"]), ("blue.png", ["c"]), ("green.png", None)]
        table = {"key": ["0", "1", "2", "3"], "picture": [name and png(name, root) for name, _ in rows]}
        Dataset.from_dict({**table, "caption": [texts for _, texts in rows]}).to_parquet(root / "0.parquet")
        source = {"path": root / "0.parquet", "rename": {"picture": "jpg"}}
        with caplog.at_level(logging.WARNING, "hf_sugar"):
            rows = list(load_data(source, streaming=streaming, on_bad_row="skip"))
        assert [shape(row) for row in rows] == [caption("red", "a"), caption("red", "b"), caption("blue", "c")]
        assert "skipped 2 of 4 rows" in caplog.text
        # rewriting the text leaves the bytes alone, undecodable ones included
        features = Features({key: ROW_FEATURES[key] for key in ("messages", "images")})
        rows = [chat() | {"images": [{"bytes": b"no image", "path": None}]}]
        Dataset.from_list(rows, features=features).save_to_disk(root / "stored")
        (row,) = undecoded(load_data(root / "stored", streaming=streaming))
        assert row["images"][0]["bytes"] == b"no image"

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
            rows = load_data(root / "images.parquet")
            assert [shape(row) for row in rows] == [caption("red", "x"), caption("blue", "x")][: len(images)]
        images = Dataset.from_dict({"image": [{"path": None, "bytes": None}, paths[1]], "caption": ["x"] * 2})
        pq.write_table(images.cast(features).with_format("arrow")[:], root / "images.parquet")
        (row,) = load_data(root / "images.parquet", on_bad_row="skip")
        assert shape(row) == caption("blue", "x")
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
        expected = [caption("red", "2024-01-02"), caption("blue", "2024-01-03")]
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
        assert shape(rows[0]) == caption("red", "2024-01-02")
        assert rows[-1]["images"][0].format == "JPEG" and rows[-1]["images"][0].getpixel((0, 0))[2] > 250
        for problem in ("1, `caption`: is missing", "2, `image`: there is no image", "8, `caption`: is missing or cannot be decoded",
                        "9, `caption`: is missing or cannot be decoded", "10, `mp4`: is not read"):  # fmt: skip
            assert f"0.tar, row a/{problem}" in caplog.text
        table = list(load_table(path, streaming=streaming))
        assert table[7]["json"] == {"caption": "7", "w": 3.5, "extra": 1} and table[3]["json"]["w"] == 3
        tar(path, [("0.png", png("blue.png", root)), ("0.txt", b"new")])  # not what the cache holds of the old one
        assert shape(next(iter(load_data(path, streaming=streaming)))) == caption("blue", "new")

    @both
    def test_damaged_tar(self, root, streaming):
        members = [(f"{n}.{k}", c) for n in range(9) for k, c in (("png", png("red.png", root)), ("txt", b"words"))]
        good = tar(root / "good.tar", members).read_bytes()
        whole = 1024 * len(members)
        for bad in (good[: whole - 20], good[: whole // 2 + 600], good[: whole // 2], good[:2048] + b"x" * 512, b"no"):
            (root / "bad.tar").write_bytes(bad)
            with pytest.raises(ValueError, match=r"bad.tar cannot be read \(ReadError.*download it again"):
                list(load_data(root / "bad.tar", streaming=streaming))
        tar(root / "none.tar", [])
        with pytest.raises(ValueError, match="none.tar holds no rows"):
            load_data(root / "none.tar")
        tar(root / "twice.tar", [("0.png", png("blue.png", root)), ("0.txt", b"a"), ("0.TXT", b"b")])
        with pytest.raises(ValueError, match="twice.tar: the sample 0 has two members txt"):
            list(load_data(root / "twice.tar", streaming=streaming))


class TestImages:
    @pytest.mark.parametrize("name", ["exif.jpg", "grey16.png", "animated.gif"])
    def test_files(self, tmp_path, name):
        """From the file to the pixels that the model sees. Every file shows a red square with one blue quarter."""
        processor = SugarProcessor.from_processor(tiny.processor())
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
        plain = [
            ("1", 1, 255),
            ("L", 7, 7),
            ("RGBA", (0, 0, 0, 51), 204),
            ("LA", (0, 0), 255),
            ("CMYK", (0,) * 4, 255),
        ]
        deep = [(np.uint16, 0x8040, 0x80), (np.uint16, 100, 0), (np.int32, 0x8040, 0x80), (np.int32, 100, 100)]
        for image, pixel in [
            *((PILImage.new(mode, (2, 2), colour), (grey,) * 3) for mode, colour, grey in plain),
            *((PILImage.fromarray(np.full((2, 2), value, dtype=kind)), (grey,) * 3) for kind, value, grey in deep),
            (PILImage.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
            (palette, (10, 20, 30)),
            (transparent, (255, 255, 255)),
        ]:
            assert load_image(image).getpixel((0, 0)) == pixel, image.mode
        big_endian = PILImage.frombytes("I;16B", (2, 1), np.array([100, 65280], ">u2").tobytes())
        assert np.asarray(load_image(big_endian))[0].tolist() == [[0] * 3, [255] * 3]
        for mode in ("YCbCr", "HSV", "RGBX"):
            found = np.asarray(load_image(tiny.image(1).convert(mode))).astype(int)
            assert np.abs(found - np.asarray(tiny.image(1))).max() <= 6, mode
        for bad in (np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32), np.zeros((2, 2), np.float32)):
            with pytest.raises(ValueError, match="scale them to 8 bits"):
                load_image(PILImage.fromarray(bad))

    @pytest.mark.parametrize("stored", [False, True])
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("zero.jpg", "0 bytes|cannot be decoded"),
            ("cut.jpg", "cannot be decoded .OSError: image file is truncated"),
            ("text.jpg", "cannot be decoded .UnidentifiedImageError"),
            ("bomb.png", "is too large: .*MAX_IMAGE_PIXELS"),
            ("large.png", "is too large: .*MAX_IMAGE_PIXELS"),
        ],
    )
    def test_unreadable(self, tmp_path, monkeypatch, name, message, stored):
        noise = PILImage.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8))
        # Pillow refuses more than twice its limit, and only warns of more than once
        limit = {"bomb.png": 64 * 64 // 3, "large.png": 64 * 64 - 1}.get(name, 64 * 64)
        monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", limit)
        content = {"zero.jpg": b"", "cut.jpg": encoded(noise, "JPEG")[:-1000], "text.jpg": b"<html>404</html>"}
        content = content.get(name, encoded(noise, "PNG"))
        if stored:
            row = {"image": {"bytes": content, "path": None}, "caption": "what ?"}
            features = Features({"image": Image(), "caption": Value("string")})
            path = tmp_path / "rows.parquet"
            Dataset.from_list([row], features=features).to_parquet(path)
        else:
            (tmp_path / name).write_bytes(content)
            path = write(tmp_path / "rows.jsonl", [{"image": name, "caption": "what ?"}])
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
        for mode in ("YCbCr", "HSV", "P", "LA", "CMYK", "1"):
            image = frames[2].convert(mode)
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
        records = [karpathy("red.png"), karpathy("blue.png", sentences=["f"])]
        images, captions = captions_by_image(load_data(write(root / "a.json", {"images": records, "dataset": "coco"})))
        assert captions == [["a", "b"], ["f"]] and [image.name for image in images] == ["red.png", "blue.png"]
        # stored images are told apart by their bytes, wherever their rows are
        pairs = [("red.png", "1"), ("blue.png", "2"), ("red.png", "3")]
        rows = [{"image": png(name, root), "caption": text} for name, text in pairs]
        Dataset.from_list(rows).to_parquet(root / "rows.parquet")
        images, captions = captions_by_image(load_data(root / "rows.parquet"))
        assert captions == [["1", "3"], ["2"]] and images[0].getpixel((0, 0)) == COLOURS["red.png"]


def test_patterns_of_files_on_the_hub(monkeypatch):
    """fsspec reads them by their whole names."""
    found = ["datasets/me/rows/0.parquet"]
    monkeypatch.setattr("huggingface_hub.HfFileSystem.glob", lambda self, path: found)
    assert _files("hf://datasets/me/rows/*.parquet") == ["hf://datasets/me/rows/0.parquet"]
    found.clear()
    with pytest.raises(FileNotFoundError, match=r"rows/\*.parquet finds no file. Correct the `path`.$"):
        load_data("hf://datasets/me/rows/*.parquet")
