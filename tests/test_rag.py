"""Documents, answers and commands, with a model."""

import io
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw
from rows import llava, write
from safetensors.numpy import load_file
from test_retrieval import letters

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarIndex, SugarProcessor, SugarRAG
from hf_sugar.cli.main import main
from hf_sugar.data import load_data, load_image
from hf_sugar.evaluation import exact_match
from hf_sugar.retrieval import find_files
from hf_sugar.retrieval.rag import find_examples, question_slices, rag_generator, split_answer


def message(role, *parts):
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def row(color, question, answer, **columns):
    messages = [message("user", None, question), message("assistant", answer)]
    return {"messages": messages, "images": [Image.new("RGB", (4, 4), color)], **columns}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("retrieval")
    model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16, random_projector=False)
    processor = SugarProcessor.from_processor(tiny.processor())
    model.save_pretrained(path / "full")
    processor.save_pretrained(path / "full")
    return path, model.eval(), processor


@pytest.fixture(scope="module")
def embed(checkpoint):
    return SugarEmbedder(checkpoint[1], checkpoint[2], batch_size=4)


def test_every_slice_is_found(embed):
    documents = [[f"one {i}", tiny.image(i), "a red circle", tiny.image(i + 9)][: 4 - i % 2] for i in range(6)]
    index = SugarIndex.build(documents, embed, every_slice=True, shard_size=4)
    assert len(index) == 6 and index.embeddings.shape == (21, 16)
    assert np.transpose(index.origins)[:8].tolist() == [*([0, s] for s in range(4)), [1, 0], [1, 1], [1, 2], [2, 0]]
    for n, m in ((0, 3), (3, 1), (5, 2)):
        hit = index.search([documents[n][: m + 1]], 1)[0][0]
        assert (hit.index, hit.slice, hit.score) == (n, m, pytest.approx(1, abs=1e-5))


def test_an_index_opens_only_with_its_model(checkpoint, embed, tmp_path):
    path, _, processor = checkpoint
    SugarIndex.build(["a"], embed, directory=tmp_path)
    other = SugarForConditionalGeneration.from_pretrained(path / "full", dtype="bfloat16")
    assert len(SugarIndex.load(tmp_path, embed=SugarEmbedder(other, processor))) == 1
    with pytest.raises(ValueError, match="was built with the defaults, not `pooling=slice`, `project=False`"):
        SugarIndex.load(tmp_path, embed=SugarEmbedder(other, processor, project=False))
    with torch.no_grad():
        other.retrieval_projector.linear_1.weight.mul_(1.1)
    with pytest.raises(ValueError, match="was built with another model"):
        SugarIndex.load(tmp_path, embed=SugarEmbedder(other, processor))


def test_bad_items_are_named_or_left_out(embed, tmp_path, caplog):
    (tmp_path / "damaged.png").write_bytes(b"no image")
    bad = {5: "an <image> in it", 27: "word " * 700, 33: tmp_path / "damaged.png", 34: tmp_path / "missing.png"}
    items = [bad.get(n, f"text {n}") for n in range(40)]
    with pytest.raises(ValueError, match="^item 27 "):
        SugarIndex.build(["fine"] * 27 + items[27:], embed, shard_size=16)
    numbers, settings = [{"n": n} for n in range(40)], {"shard_size": 16, "on_bad_row": "skip"}
    index = SugarIndex.build(items, embed, numbers, directory=tmp_path / "i", **settings)
    assert [entry["n"] for entry in index.metadata] == [n for n in range(40) if n not in bad]
    assert [any(f"Left out: item {n}" in m for m in caplog.messages) for n in bad] == [True] * 4
    assert index.search(["text 39"], 1)[0][0].metadata == {"n": 39}
    rows = [row("red", "What?", "a", id="x"), {**row("red", "What?", "a", id="y"), "images": []}]
    with pytest.raises(ValueError, match=r"row 1 \(y\), `images`"):
        SugarIndex.build(rows, letters)


def test_pictures_are_stored_as_they_are_seen(embed, tmp_path):
    tiny.image(0).save(tmp_path / "a.png")
    frames = [tiny.image(n) for n in range(3)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    edited, later = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "a.tiff")
    ImageDraw.Draw(edited).rectangle((0, 0, 9, 9), "red")
    later.seek(2)
    deep = Image.fromarray(np.asarray(tiny.image(3))[..., 0].astype(np.uint16) << 8)
    pictures = [edited, later, deep, tiny.image(4).convert("YCbCr"), tiny.image(5).convert("HSV"), tmp_path / "a.png"]
    SugarIndex.build(pictures, embed, directory=tmp_path / "index")
    index = SugarIndex.load(tmp_path / "index", embed=embed)
    for n, picture in enumerate(pictures):
        [stored] = index.documents[n]["images"]
        np.testing.assert_array_equal(load_image(stored), load_image(picture))
        assert index.search([load_image(stored)], 1)[0][0].index == n
    np.testing.assert_array_equal(load_image(index.documents[1]["images"][0]), frames[2])
    assert index.documents[5]["images"] == [{"bytes": None, "path": str(tmp_path / "a.png")}]

    state = os.stat(tmp_path / "a.png")
    tiny.image(9).save(tmp_path / "a.png")  # replaced under its name
    os.utime(tmp_path / "a.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    again = SugarIndex.build(pictures, embed, directory=tmp_path / "index")
    np.testing.assert_allclose(again.embeddings[5], embed([tiny.image(9)])[0], atol=1e-5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four answered questions with images in the layout of LLaVA."""
    path = tmp_path_factory.mktemp("corpus")
    records = []
    for i in range(4):
        tiny.image(i).save(path / f"{i}.png")
        records.append(llava(f"{i}.png", "<image>\nwhat is this?", f"star {i}"))
    write(path / "data.json", records)
    (path / "note.txt").write_text("a blue square")
    return path


def test_rows_are_indexed_by_what_is_asked_for(corpus, embed, tmp_path):
    rows = load_data(str(corpus / "data.json"))
    index = SugarIndex.build(rows, embed, directory=tmp_path)
    assert index.metadata[2] == {"id": "data.json:3"}
    document = SugarIndex.load(tmp_path, embed=embed).documents[2]
    assert document["messages"] == rows[2]["messages"]
    np.testing.assert_array_equal(question_slices(document)[0], tiny.image(2))
    for by, item in {
        "question": [tiny.image(2), "what is this?"],
        "images": tiny.image(2),
        "document": dict(rows[2]),
        "texts": ["what is this?", "star 2"],
    }.items():
        np.testing.assert_allclose(SugarIndex.build(rows, embed, by=by).embeddings[2], embed([item])[0], atol=1e-5)

    files = find_files([corpus])
    assert [file.name for file in files] == ["0.png", "1.png", "2.png", "3.png", "note.txt"]
    found = SugarIndex.build(files, embed)
    assert found.search(["a blue square"], 1)[0][0].metadata == {"path": str(corpus / "note.txt")}
    assert found.search([corpus / "3.png"], 1)[0][0].metadata == {"path": str(corpus / "3.png")}
    assert found.search([str(corpus / "3.png")], 1)[0][0].score < 0.999  # a text
    with pytest.raises(FileNotFoundError, match="names no image or text file"):
        find_files([corpus / "*.mp3"])


# answers


@pytest.fixture
def knowledge():
    rows = [
        row("red", "What is this?", "a tomato", id="kb:0"),
        row("blue", "What is this?", "the sea", id="kb:1"),
        row("green", "What is this?", "a leaf"),
    ]

    def embed(items):
        colors = np.array([item[0].getpixel((0, 0)) for item in items], dtype=np.float32) + 1
        return colors / np.linalg.norm(colors, axis=1, keepdims=True)

    return rows, SugarIndex.build(rows, embed, by="question", fingerprint="colors")


def test_rag_generator(knowledge):
    def echo(conversations):
        said = [[message["content"][-1]["text"] for message in c["messages"]] for c in conversations]
        return [" | ".join([*texts, str(len(c["images"]))]) for texts, c in zip(said, conversations)]

    rows, index = knowledge
    query = row((10, 20, 200), "And this?", "", id="test:0")
    query["messages"].pop()
    assert rag_generator(echo, index)([query]) == ["What is this? | the sea | And this? | 2"]
    # the most similar one stands next to the question
    follow_up = {**query, "messages": [*query["messages"], message("assistant", "blue"), message("user", "why?")]}
    assert rag_generator(echo, index, k=2)([follow_up, query]) == [
        "What is this? | a leaf | What is this? | the sea | And this? | blue | why? | 3",
        "What is this? | a leaf | What is this? | the sea | And this? | 3",
    ]

    def copy_the_example(conversations):
        return [c["messages"][-2]["content"][0]["text"] for c in conversations]

    test = [row((200, 10, 0), "What is this?", "A tomato"), row((0, 0, 90), "What is this?", "a lake")]
    assert exact_match(rag_generator(copy_the_example, index), test)["exact_match"].value == 50


def test_a_row_is_known_by_its_content(knowledge):
    rows, index = knowledge
    index.add([{**rows[1], "id": f"copy:{n}"} for n in range(9)])

    def found(query, k):
        return [hit.index for hit in find_examples(index, [query], k)[0]]

    # the same question about the same picture is never its example, whatever it is called
    for name in ("kb:1", "test.json:1"):
        query = {**split_answer(rows[1])[0], "id": name}
        assert found(query, 1) == [2] and sorted(found(query, 3)) == [0, 2]
    # another question or picture is, whatever it is called
    assert found(row("blue", "What is that?", "", id="kb:1"), 1)[0] in (1, *range(3, 12))
    assert found(row((0, 0, 254), "What is this?", "", id="kb:1"), 1)[0] in (1, *range(3, 12))
    # a user's own question has no id
    assert len(found({**rows[1], "id": None}, 4)) == 4


def test_rag(corpus, embed):
    index = SugarIndex.build(load_data(str(corpus / "data.json")), embed)
    rag = SugarRAG(embed.model, embed.processor, index, k=2, max_new_tokens=6)
    question = [tiny.image(1), "what is this?"]
    prompt = rag.prompt(question)
    assert prompt.citations[0].metadata == {"id": "data.json:2"} and len(prompt.citations) == 2
    assert prompt.dropped == [] and prompt.note is None
    turns = [(m["role"], m["content"][-1]["text"]) for m in prompt.messages]
    assert turns[2:] == [("user", "what is this?"), ("assistant", "star 1"), ("user", "what is this?")]

    inputs = rag.generator.inputs([{"messages": prompt.messages, "images": prompt.images}])
    length = inputs["input_ids"].shape[1]
    assert inputs["pixel_values"].shape[0] == 3
    expected = embed.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, length:]
    expected = embed.processor.decode(expected, skip_special_tokens=True)
    assert "".join(rag.stream(prompt)) == expected
    assert rag.answer(question) == expected.strip()

    short = SugarRAG(embed.model, embed.processor, index, k=2, max_new_tokens=6, max_length=length + 5)
    cut = short.prompt(question)
    assert cut.citations == prompt.citations[:1] and cut.dropped == prompt.citations[1:]
    assert cut.note.startswith("1 of 2 examples left out")
    shorter = rag.generator.inputs([{"messages": cut.messages, "images": cut.images}])
    assert short.max_length >= shorter["input_ids"].shape[1] + 6
    with pytest.raises(ValueError, match="`rerank` is 1 and `k` 2"):
        SugarRAG(embed.model, embed.processor, index, k=2, rerank=1)
    with pytest.raises(ValueError, match="`k` is 0"):
        SugarRAG(embed.model, embed.processor, index, k=0)
    with pytest.raises(ValueError, match="context holds 10"):
        SugarRAG(embed.model, embed.processor, index, max_new_tokens=6, max_length=10).prompt(question)
    with pytest.raises(ValueError, match="last turn of the question is the assistant's"):
        rag.prompt(index.documents[0])
    asked = {**index.documents[1], "messages": index.documents[1]["messages"][:1]}
    assert "data.json:2" not in [hit.metadata["id"] for hit in rag.prompt(asked).citations]


# commands


def test_cli(checkpoint, corpus, tmp_path, capsys, monkeypatch):
    name, data, index = str(checkpoint[0] / "full"), str(corpus / "data.json"), ["--index", str(tmp_path / "index")]
    main(["embed", name, data, "--output", str(tmp_path / "e.safetensors")])
    assert "4 documents, embeddings of shape (4, 16)" in capsys.readouterr().out
    written = load_file(tmp_path / "e.safetensors")
    main(["index", "--model_name_or_path", name, "--data", data, *index])
    main(["index", name, "--files", str(corpus), *index, "--add", "true"])
    assert "9 documents" in capsys.readouterr().out
    fingerprint = json.loads((tmp_path / "index" / "index.json").read_text())["fingerprint"]
    loaded = SugarIndex.load(tmp_path / "index", fingerprint=fingerprint)
    np.testing.assert_allclose(loaded.embeddings[:4], written["embeddings"], atol=1e-6)

    main(["search", name, str(corpus / "2.png"), "what is this?", *index, "--k", "2"])
    first = capsys.readouterr().out.splitlines()[0]
    assert "1.0000  data.json:3  [image] what is this? | star 2" in first
    main(["search", name, *index, "--k", "3", "--query", "a blue square", "--json", "true"])
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(hits) == 3 and hits[0]["metadata"] == {"path": str(corpus / "note.txt")}

    short = ["--index", str(tmp_path / "short")]
    main(["index", name, "--files", str(corpus), *short, "--truncate_dim", "5", "--factory", "SQ8"])
    assert "\n5 dimensions; 0.00 MB are searched" in capsys.readouterr().out
    main(["search", name, "a blue square", *short])  # by the length of the index
    assert len(capsys.readouterr().out.splitlines()) == 5
    with pytest.raises(ValueError, match="was built with `truncate_dim=5`, not `truncate_dim=4`"):
        main(["search", name, "a blue square", *short, "--truncate_dim", "4"])
    with monkeypatch.context() as other:  # a process that does not write the index
        other.setattr("hf_sugar.cli.index.distributed_state", lambda: SimpleNamespace(is_main_process=False))
        main(["index", name, "--files", str(corpus), *short, "--truncate_dim", "5", "--factory", "SQ8"])
    assert capsys.readouterr().out == ""

    (tmp_path / "damaged.png").write_bytes(b"no image")
    (tmp_path / "chat.yaml").write_text(f"model_name_or_path: {name}\nmax_new_tokens: 4\nk: 2\n")
    typed = [f"/image {tmp_path}/damaged.png", f"/image {corpus}/1.png", "what is this?", "and why?"]
    typed += ["/image missing.png", "/help", "/clear", "hm", "/quit", "x"]
    for extra, cited in (([], 0), (index, 2)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
        main(["chat", "--config", str(tmp_path / "chat.yaml"), *extra])
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("[")]
        assert len(lines) == 3 * cited and len(said.out.splitlines()) == 3  # a damaged picture spoils no question
        assert not cited or lines[0] == "[1] 1.0000 data.json:2  [image] what is this? | star 1"
        assert "damaged.png' cannot be decoded" in said.err
        assert "'missing.png' does not exist" in said.err and "/clear begins anew" in said.err


def test_cli_errors(checkpoint, corpus, tmp_path, capsys):
    model, data, bad = str(checkpoint[0] / "full"), str(corpus / "data.json"), str(corpus / "bad.json")
    records = json.loads((corpus / "data.json").read_text())
    records[1]["conversations"][0]["value"] = "<image>\n" + "word " * 700
    (corpus / "bad.json").write_text(json.dumps(records))
    for command, written in (("index", ["--index", f"{tmp_path}/i"]), ("embed", ["--output", f"{tmp_path}/e"])):
        main([command, model, bad, *written, "--on_bad_row", "skip"])
        assert "\n3 documents" in "\n" + capsys.readouterr().out
    for error, argv in {
        "`query` is not set": f"search {model}",
        "Set one of `data`": f"index {model}",
        "`model_name_or_path` is not set": "chat",
        r"row 1 \(bad.json:2\) has \d+ tokens": f"index {model} {bad} --index {tmp_path}/new",
        "`by` is 'images', but the index in": f"index {model} {data} --index {tmp_path}/i --add true --by images",
        "is the directory": f"embed {model} {data} --output {tmp_path}",
    }.items():
        with pytest.raises(ValueError, match=error):
            main(argv.split())
