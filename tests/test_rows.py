"""Rows taken apart into slices, and images in every form."""

import numpy as np
import pytest
from PIL import Image

from hf_sugar.data import load_image, row_name, row_slices


def picture(seed: int, width: int = 20, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def test_row_slices_in_reading_order():
    a, b = picture(0), picture(1)
    image = {"type": "image", "text": None}
    sample = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "first"}, image, {"type": "text", "text": "second"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "third"}, image]},
        ],
        "images": [a, b],
    }
    assert row_slices(sample) == ["first", a, "second", "third", b]
    strings = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "again"},
        ],
        "images": [a, b],
    }
    assert row_slices(strings) == [a, b, "question", "answer", "again"]
    assert row_slices({"messages": strings["messages"]}) == ["question", "answer", "again"]
    assert row_slices({"messages": strings["messages"], "images": None}) == ["question", "answer", "again"]


def test_string_content_agrees_with_trl():
    from trl.data_utils import prepare_multimodal_messages

    images = [picture(0), picture(1)]
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "again"},
    ]
    prepared = prepare_multimodal_messages(messages, images)
    expected = [part["image"] if part["type"] == "image" else part["text"] for m in prepared for part in m["content"]]
    assert row_slices({"messages": messages, "images": images}) == expected


@pytest.mark.parametrize(
    ("messages", "images", "match"),
    [
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            [],
            r"row 7 \(x\), `images`: holds 0 images but `messages` has 1",
        ),
        (
            [{"role": "user", "content": "q"}, {"role": "human", "content": "a"}],
            [],
            r"`messages\[1\].role`: is 'human'",
        ),
        ([{"content": "q"}], [], "role`: is None"),
        ([{"role": "user", "content": [{"type": "video"}]}], [], r"`messages\[0\].content\[0\].type`: is 'video'"),
        ([{"role": "user", "content": [{"type": "text", "text": " \n"}]}], [], r"content\[0\].text`: is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], [], "is empty"),
        ([{"role": "user", "content": ""}], [], "content`: is empty"),
        ([{"role": "assistant", "content": "a"}], ["x.png"], "holds 1 images but `messages` has 0"),
        (
            [{"role": "user", "content": "q"}],
            ["x.png"],
            r"row 7 \(x\), images\[0\]: image file 'x.png' does not exist",
        ),
    ],
)
def test_row_errors_name_the_place(messages, images, match):
    sample = {"messages": messages, "images": images, "id": "x"}
    with pytest.raises(ValueError, match=match):
        row_slices(sample, row_name(sample, 7))


def test_row_name():
    assert row_name({"id": "a.json:3"}, 5) == "row 5 (a.json:3)"
    assert row_name({}, 5) == row_name({"id": None}, 5) == "row 5"


def test_load_image_takes_every_form(tmp_path):
    image = picture(0)
    path = tmp_path / "a.png"
    image.save(path)
    content = path.read_bytes()
    forms = [image, Image.open(path), path, str(path), content, {"bytes": content, "path": None}]
    forms += [{"bytes": None, "path": str(path)}, {"path": str(path)}, {"bytes": content}]
    for form in forms:
        loaded = load_image(form)
        assert loaded.mode == "RGB" and loaded.tobytes() == image.tobytes()
    assert load_image(image) is image


@pytest.mark.parametrize("form", ["path", "opened"])
def test_load_image_applies_the_exif_orientation(tmp_path, form):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / "a.png"
    picture(0, 20, 24).save(path, exif=exif)
    loaded = load_image(path if form == "path" else Image.open(path))
    assert loaded.size == (24, 20)
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(picture(0, 20, 24)), -1))


def test_load_image_modes(tmp_path):
    def pixel(image):
        loaded = load_image(image)
        assert loaded.mode == "RGB"
        return loaded.getpixel((0, 0))

    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert pixel(Image.new("L", (2, 2), 7)) == (7, 7, 7)
    assert pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 255))) == (255, 0, 0)
    assert pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 51))) == (204, 204, 204)
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    assert pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(palette) == (10, 20, 30)
    palette.info["transparency"] = 1
    assert pixel(palette) == (255, 255, 255)
    # 16 bits, in memory and through a file
    grey = Image.fromarray(np.full((2, 2), 0x8040, dtype=np.uint16))
    grey.save(tmp_path / "grey.png")
    assert pixel(grey) == pixel(tmp_path / "grey.png") == (0x80, 0x80, 0x80)
    assert pixel(Image.fromarray(np.full((2, 2), 100, dtype=np.uint16))) == (0, 0, 0)
    assert pixel(Image.fromarray(np.full((2, 2), 0x8040, dtype=np.int32))) == (0x80, 0x80, 0x80)
    assert pixel(Image.fromarray(np.full((2, 2), 100, dtype=np.int32))) == (100, 100, 100)
    for bad in (
        np.full((2, 2), 70000, dtype=np.int32),
        np.full((2, 2), -1, dtype=np.int32),
        np.zeros((2, 2), np.float32),
    ):
        with pytest.raises(ValueError, match="scale them to 8 bits"):
            load_image(Image.fromarray(bad))


def test_load_image_errors_name_the_place_and_the_remedy(tmp_path, monkeypatch):
    broken, cut, good = tmp_path / "broken.jpg", tmp_path / "cut.png", tmp_path / "good.png"
    broken.write_bytes(b"text")
    picture(0, 100, 100).save(good)
    cut.write_bytes(good.read_bytes()[:5000])
    for image, match in [
        (tmp_path / "none.png", r"row 3: image file .*none.png' does not exist.*Correct the path"),
        (broken, r"row 3: image file .*broken.jpg' cannot be decoded.*Replace the file or drop the row"),
        (cut, r"row 3: image file .*cut.png' cannot be decoded"),
        (Image.open(cut), "row 3: image of mode RGB .* cannot be decoded"),
        (b"text", "row 3: image of 4 bytes cannot be decoded"),
        ("https://example.org/a.jpg", "row 3: .* is a web address.*Download"),
        (None, "row 3: expected a PIL image.*got None"),
        ({"bytes": None, "path": None}, "row 3: expected a PIL image"),
        (np.zeros((2, 2, 3)), "row 3: .*got ndarray"),
    ]:
        with pytest.raises(ValueError, match=match):
            load_image(image, "row 3")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"row 3: .*good.png' is too large.*MAX_IMAGE_PIXELS"):
        load_image(good, "row 3")
