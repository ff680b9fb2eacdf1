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


def row(*parts, **columns):
    """Of one user message; other parts than texts are its images."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "text": None} for p in parts]
    images = [part for part in parts if not isinstance(part, str)]
    return {"messages": [{"role": "user", "content": content}], "images": images, **columns}


def filled(*parts):
    """A conversation of one user message with its images in it."""
    kinds = [("text" if isinstance(part, str) else "image", part) for part in parts]
    return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in kinds]}]


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
    rows = [{"loss_on": "answers", "structure": True, "generative": True, "id": None, **row} for row in rows]
    for row in rows:
        row["images"] = [str(root / name) for name in row.get("images", ())]
    return Dataset.from_list(rows, features=ROW_FEATURES)


def mmeb(folder, pictures):
    """Tasks of MMEB-V2 in parquet files as they are published, and the pictures; a task has the columns that it needs."""
    (folder / "MMEB" / "images").mkdir(parents=True)
    names = [f"images/{n}.jpg" for n in range(len(pictures))]
    for name, picture in zip(names, pictures):
        picture.save(folder / "MMEB" / name)
    classify, represent = "<|image_1|>\nIdentify the object.", "<|image_1|>\nRepresent the given image."
    tasks = {
        "VOC2007": [
            {"qry_inst": classify, "qry_text": "", "qry_img_path": names[n], "tgt_text": labels}
            for n, labels in enumerate((["bird", "car", "dog"], ["car", "bird", "dog"], ["dog", "dog", "bird"]))
        ],
        "MSCOCO_t2i": [
            {"qry_inst": "Find the picture.", "qry_text": f"a caption {n}", "tgt_text": ["", "", ""]}
            | {"tgt_inst": represent, "tgt_img_path": [names[(n + k) % 4] for k in range(3)]}
            for n in range(4)
        ],
        "EDIS": [
            {"qry_inst": "Find the news.", "qry_text": f"news {n}", "qry_img_path": "", "tgt_inst": represent}
            | {"tgt_text": [f"headline {n}", "headline", "another"], "tgt_img_path": [names[n], names[n], names[3]]}
            for n in range(2)
        ],
        "CIRR": [
            {"qry_inst": classify, "qry_text": "but red", "qry_img_path": names[0], "tgt_inst": represent}
            | {"tgt_text": ["", ""], "tgt_img_path": [names[1], names[2]]}
        ],
    }
    for task, rows in tasks.items():
        (folder / "instruct" / task).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(folder / "instruct" / task / "test-00000-of-00001.parquet")
    return {"path": str(folder / "instruct"), "image_root": str(folder / "MMEB"), "tasks": list(tasks)}


def wikihow_tiir(folder, pictures):
    """Queries, tutorials and judgements in lines of JSON; one tutorial belongs to no query, one is not a candidate."""
    folder.mkdir()
    for n, picture in enumerate(pictures):
        picture.save(folder / f"{n}.png")
    queries = [{"qid": f"q{n}", "data": [f"How do I do {n}?", f"{n}.png", "As here."]} for n in range(3)]
    tutorials = [{"id": n, "data": [f"Step {n}.", f"{n}.png", "", f"Step {n + 1}.", f"{n + 1}.png"]} for n in range(6)]
    judged = [{"qid": f"q{n}" if n < 3 else None, "did": n} for n in range(5)]
    files = {"queries": queries, "documents": tutorials, "qrels": judged}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {**{name: str(folder / f"{name}.jsonl") for name in files}, "image_root": str(folder)}
