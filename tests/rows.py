"""Records of the layouts, files of them, and what a row shows: for the tests of data."""

import io
import itertools
import json
import tarfile
import zipfile

from datasets import Dataset
from PIL import Image

from hf_sugar.data import ROW_FEATURES


COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}


def write_pictures(folder):
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 4), colour).save(folder / name)
    return folder


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


def document(*parts, role="user"):
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return [{"role": role, "content": content}]


def karpathy(name="red.png", split="train", sentences=("a", "b"), **extra):
    sentences = [{"tokens": text.split(), "raw": text, "sentid": n} for n, text in enumerate(sentences)]
    return {"filepath": "", "filename": name, "imgid": 0, "split": split, "sentences": sentences, **extra}


def story(*steps, story="45530"):
    names = ("worker_arranged_photo_order", "photo_flickr_id", "original_text")
    return [[{**dict(zip(names, step)), "story_id": story, "text": f"{step[2]} ."}] for step in steps]


def write(path, records):
    """A JSON file: of an object, of a list, or of lines."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(records))
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


def shape(row):
    """Reading order of a row: texts, and images as the name of their colour."""
    names = {colour: name.removesuffix(".png") for name, colour in COLOURS.items()}
    images = iter(names[image.convert("RGB").getpixel((0, 0))] for image in row["images"])
    return [
        (message["role"], [part["text"] if part["type"] == "text" else {next(images)} for part in message["content"]])
        for message in row["messages"]
    ]


def caption(name, text):
    return [("user", [{name}, text])]


def stored(rows, root):
    rows = [{"loss_on": "answers", "structure": True, "id": None, **row} for row in rows]
    for row in rows:
        row["images"] = [str(root / name) for name in row.get("images", ())]
    return Dataset.from_list(rows, features=ROW_FEATURES)
