import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from safetensors.numpy import load_file

from hf_sugar.cli.main import main
from hf_sugar.data import load_data
from hf_sugar.evaluation import exact_match
from hf_sugar.models import SugarForConditionalGeneration, SugarProcessor
from hf_sugar.retrieval import (
    RAG,
    Hit,
    LanceIndex,
    SugarEmbedder,
    SugarIndex,
    find_examples,
    find_files,
    question_slices,
    rag_generator,
    rag_messages,
    split_answer,
)
from hf_sugar.world import write_world


def vectors(n, dim=16, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def message(role, *parts):
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def row(color, question, answer, **columns):
    messages = [message("user", None, question), message("assistant", answer)]
    return {"messages": messages, "images": [Image.new("RGB", (4, 4), color)], **columns}


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), dim=st.integers(2, 24), k=st.integers(1, 70), seed=st.integers(0, 10**6))
def test_search_equals_numpy(n, dim, k, seed):
    items, queries = vectors(n, dim, seed), vectors(5, dim, seed + 1)
    found = SugarIndex(items).search(queries, k)
    scores = queries.astype(np.float64) @ items.T
    for hits, row_scores in zip(found, scores, strict=True):
        assert len(hits) == min(k, n)
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row_scores)[::-1][:k], atol=1e-5)
        np.testing.assert_allclose([row_scores[hit.index] for hit in hits], [hit.score for hit in hits], atol=1e-5)
        assert len({hit.index for hit in hits}) == len(hits)


def test_build_and_search_by_items():
    table = dict(zip(["a", "b", "c", "query"], [[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], strict=True))

    def embed(items):
        return np.array([table[item] for item in items], dtype=np.float32)

    index = SugarIndex.build(["a", "b", "c"], embed, metadata=[{"name": name} for name in "abc"])
    assert len(index) == 3 and index.dim == 2
    [hits] = index.search(["query"], k=2)
    assert [hit.metadata["name"] for hit in hits] == ["b", "c"]
    assert hits[0] == Hit(1, pytest.approx(0.96), {"name": "b"})
    [hits] = index.search(["query"], k=50)
    assert [hit.index for hit in hits] == [1, 2, 0]


def test_index_errors():
    with pytest.raises(ValueError, match="`items` is empty"):
        SugarIndex.build([], lambda items: vectors(0))
    with pytest.raises(ValueError, match="`embeddings` is empty"):
        SugarIndex(np.empty((0, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="2 `metadata` for 3 items"):
        SugarIndex(vectors(3), metadata=[{}, {}])
    with pytest.raises(ValueError, match=r"`embeddings\[1\]` has norm 2"):
        SugarIndex(vectors(3) * np.array([[1], [2], [1]]))
    with pytest.raises(ValueError, match=r"`embeddings\[0\]` has norm nan"):
        SugarIndex(np.full((1, 3), np.nan))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        SugarIndex(np.ones(3))
    index = SugarIndex(vectors(3))
    with pytest.raises(ValueError, match="dimension 8 but the index has 16"):
        index.search(vectors(1, 8))
    with pytest.raises(ValueError, match=r"`queries\[0\]` has norm"):
        index.search(np.zeros((1, 16)))
    with pytest.raises(ValueError, match="`k` is 0"):
        index.search(vectors(1), k=0)
    with pytest.raises(ValueError, match="no `embed` function"):
        index.search(["text"])
    for single in ("text", Image.new("RGB", (2, 2))):
        with pytest.raises(TypeError, match="Put it in a list"):
            index.search(single)


def test_save_and_load(tmp_path):
    index = SugarIndex(vectors(20), [{"path": f"ü{i}.png"} for i in range(20)], fingerprint="model@1")
    index.save(tmp_path / "deep" / "index")
    loaded = SugarIndex.load(tmp_path / "deep" / "index", "model@1", embed=lambda items: vectors(len(items), seed=5))
    np.testing.assert_array_equal(loaded.embeddings, index.embeddings)
    assert loaded.metadata == index.metadata
    assert loaded.search(["a", "b"], 3) == index.search(vectors(2, seed=5), 3)


def test_load_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="SugarIndex.save"):
        SugarIndex.load(tmp_path, "model@1")
    SugarIndex(vectors(3), fingerprint="model@1").save(tmp_path)
    with pytest.raises(ValueError, match="'model@1', not 'model@2'"):
        SugarIndex.load(tmp_path, "model@2")
    content = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**content, "format_version": 9}))
    with pytest.raises(ValueError, match="format version 9"):
        SugarIndex.load(tmp_path, "model@1")


def test_an_interrupted_save_leaves_the_old_index(tmp_path, monkeypatch):
    old = SugarIndex(vectors(3), fingerprint="m")
    old.save(tmp_path)
    new = SugarIndex(vectors(5, seed=1), fingerprint="m")

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            new.save(tmp_path)
    np.testing.assert_array_equal(SugarIndex.load(tmp_path, "m").embeddings, old.embeddings)

    new.save(tmp_path)
    np.testing.assert_array_equal(SugarIndex.load(tmp_path, "m").embeddings, new.embeddings)
    assert len(list(tmp_path.iterdir())) == 2  # what the interrupted save left is gone

    with pytest.raises(TypeError, match="not JSON serializable"):
        SugarIndex(vectors(1), [{"image": Image.new("RGB", (2, 2))}]).save(tmp_path)
    assert len(SugarIndex.load(tmp_path, "m")) == 5


def test_split_answer():
    conversation = row("red", "What colour?", "red", id="a")
    question, answer = split_answer(conversation)
    assert answer == "red"
    assert question == {"messages": conversation["messages"][:1], "images": conversation["images"], "id": "a"}
    assert len(conversation["messages"]) == 2
    assert split_answer(question) == (question, None)
    conversation["messages"][-1] = message("assistant", "like", None, "this")
    conversation["images"] *= 2
    question, answer = split_answer(conversation)
    assert answer == "like this" and len(question["images"]) == 1


def test_question_slices_leave_answers_and_system_out():
    conversation = row("red", "What colour?", "red")
    conversation["messages"].insert(0, message("system", "Be brief."))
    image, text = question_slices(conversation)
    assert image.getpixel((0, 0)) == (255, 0, 0) and text == "What colour?"
    conversation["messages"][-1] = message("assistant", "like this", None)
    conversation["images"] *= 2
    with pytest.raises(ValueError, match="kb row 3, `images`: holds 2 images"):
        question_slices(conversation, "kb row 3")


def test_rag_messages_order():
    first, second = row("red", "q1", "a1"), row("green", "q2", "a2")
    second["messages"].insert(0, message("system", "of the example"))
    own = [message("system", "own"), message("user", None, "q3")]
    blue = Image.new("RGB", (4, 4), "blue")
    messages, images = rag_messages(own, [blue], [first, second])
    flat = [(m["role"], m["content"][-1]["text"]) for m in messages]
    assert flat == [
        ("system", "own"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "q3"),
    ]
    assert images == [first["images"][0], second["images"][0], blue]
    assert own == [message("system", "own"), message("user", None, "q3")]
    # a text as content has its images in front
    plain = {"messages": [{"role": "user", "content": "q"}], "images": [blue]}
    messages, images = rag_messages([{"role": "user", "content": "q4"}], [], [plain])
    assert [len(m["content"]) for m in messages] == [2, 1] and images == [blue]


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


def echo(conversations):
    """Answers with all that the conversation holds."""
    return [
        " | ".join(m["content"][-1]["text"] for m in c["messages"]) + f" | {len(c['images'])}" for c in conversations
    ]


def test_rag_generator(knowledge):
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


def test_a_row_is_never_its_own_example(knowledge):
    rows, index = knowledge
    for k, expected in ((1, {0, 2}), (3, {0, 2})):
        [hits] = find_examples(index, [rows[1]], k)
        assert {hit.index for hit in hits} <= expected and len(hits) == min(k, 2)


def test_rag_generator_in_exact_match(knowledge):
    rows, index = knowledge

    def copy_the_example(conversations):
        return [c["messages"][-2]["content"][0]["text"] for c in conversations]

    test = [
        row((200, 10, 0), "What is this?", "A tomato", id="t:0"),
        row((0, 0, 90), "What is this?", "a lake", id="t:1"),
    ]
    results = exact_match(rag_generator(copy_the_example, index), test)
    assert results["exact_match"].value == 50
    assert results["misses"] == [{"row": "row 1 (t:1)", "expected": "a lake", "generated": "the sea"}]


def letters(items):
    """Embeddings that depend on the item alone."""
    return np.concatenate([vectors(1, 8, seed=int.from_bytes(str(item).encode()[-4:], "big")) for item in items])


TEXTS = [f"text {i:03}" for i in range(50)]


@pytest.fixture
def saved(tmp_path):
    SugarIndex.build(TEXTS, letters, fingerprint="m", directory=tmp_path / "index", shard_size=8)
    return tmp_path / "index"


@pytest.mark.parametrize("memory_map", [False, True])
def test_several_shards_equal_brute_force(saved, memory_map):
    index = SugarIndex.load(saved, "m", letters, memory_map=memory_map)
    assert len(index._matrices) == (7 if memory_map else 1)
    queries = letters(["a", "b", "c"])
    brute = SugarIndex(letters(TEXTS)).search(queries, 20)
    found = index.search(["a", "b", "c"], 20)
    assert [[hit.index for hit in hits] for hits in found] == [[hit.index for hit in hits] for hits in brute]
    scores = [[[hit.score for hit in hits] for hits in result] for result in (found, brute)]
    np.testing.assert_allclose(*scores, atol=1e-6)
    assert found[0][0].metadata == {"text": TEXTS[found[0][0].index]}
    assert len(index.search(["a"], 99)[0]) == 50


@pytest.mark.parametrize("factory,options", [("HNSW16", "efSearch=64"), ("IVF4,PQ4x4", "nprobe=4")])
def test_approximate_indexes(tmp_path, factory, options):
    items = vectors(1000, 8)
    index = SugarIndex(items, factory=factory, search_options=options)
    before = index.search(items[:100], 10)
    near = np.mean([any(hit.index == n for hit in hits) for n, hits in enumerate(before)])
    assert near > 0.9
    index.save(tmp_path)
    for memory_map in (False, True):
        loaded = SugarIndex.load(tmp_path, "", memory_map=memory_map)
        assert loaded.search(items[:100], 10) == before
    loaded.delete([0])
    assert all(hit.index < 999 for hits in loaded.search(items[:50], 5) for hit in hits)
    with pytest.raises(ValueError, match="FAISS cannot train 'IVF64,Flat' on 20 embeddings"):
        SugarIndex(vectors(20, 8), factory="IVF64,Flat").search(items[:1])


def test_add_and_delete(saved):
    index = SugarIndex.load(saved, "m", letters)
    written = {file.name for file in saved.glob("shard-*")}
    index.add(["new"], [{"name": "n"}])
    assert index.search(["new"], 1)[0][0] == Hit(50, pytest.approx(1), {"name": "n"})
    assert len(SugarIndex.load(saved, "m")) == 50  # not before it is saved
    index.delete([3, 49])
    assert len(index) == 49 and index.search(["new"], 1)[0][0].index == 48
    assert index.search([TEXTS[4]], 1)[0][0].index == 3
    index.save(saved)
    assert SugarIndex.load(saved, "m").metadata == index.metadata
    assert SugarIndex.load(saved, "m", letters).search(TEXTS, 3) == index.search(TEXTS, 3)
    assert len(written & {file.name for file in saved.glob("*")}) == 5  # untouched shards stay as they are
    index.delete(range(49))
    for use in (lambda: index.search(["a"]), lambda: index.save(saved)):
        with pytest.raises(ValueError, match="The index is empty"):
            use()
    with pytest.raises(IndexError, match="no document 7; the index has 0"):
        index.delete([7])


def test_an_interrupted_build_goes_on(saved):
    embedded = []

    def killed(items):
        if len(embedded) == 24:
            raise KeyboardInterrupt
        embedded.extend(items)
        return letters(items)

    def go_on(items):
        embedded.extend(items)
        return letters(items)

    new = [f"other {i:03}" for i in range(40)]
    with pytest.raises(KeyboardInterrupt):
        SugarIndex.build(new, killed, fingerprint="m", directory=saved, shard_size=8)
    assert SugarIndex.load(saved, "m").metadata == [{"text": text} for text in TEXTS]
    index = SugarIndex.build(new, go_on, fingerprint="m", directory=saved, shard_size=8)
    assert embedded == new  # nothing twice
    np.testing.assert_array_equal(index.embeddings, letters(new))
    assert len(list(saved.iterdir())) == 6
    # another model's shards are not taken over
    SugarIndex.build(new, go_on, fingerprint="m2", directory=saved, shard_size=8)
    assert len(embedded) == 80


def test_a_full_disk_leaves_the_old_index(saved, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(file.name for file in saved.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "new_file", full)
        with pytest.raises(OSError, match="cannot be written.*No space left.*make room") as error:
            SugarIndex.build(["x"], letters, fingerprint="m", directory=saved)
    assert error.value.errno == errno.ENOSPC
    assert sorted(file.name for file in saved.iterdir()) == before
    assert len(SugarIndex.load(saved, "m")) == 50


def test_damaged_files(saved):
    shard = sorted(saved.glob("shard-*"))[0]
    whole = shard.read_bytes()
    embedding = next(place for text in TEXTS if (place := whole.find(letters([text])[0].tobytes())) >= 0)
    flipped = whole[:embedding] + bytes([whole[embedding] ^ 1]) + whole[embedding + 1 :]
    for damage in (whole[: len(whole) // 2], b"", b"x" * 5000, flipped):
        shard.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{shard.name} cannot be read.*Delete this file"):
            SugarIndex.load(saved, "m")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        SugarIndex.load(saved, "m")
    calls = []
    SugarIndex.build(
        TEXTS, lambda items: calls.append(1) or letters(items), fingerprint="m", directory=saved, shard_size=8
    )
    assert len(calls) == 1 and shard.read_bytes() == whole
    other = next(file for file in saved.glob("shard-*") if file.stat().st_size != len(whole))  # of 2 documents
    shard.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="does not hold what index.json says"):
        SugarIndex.load(saved, "m")


def test_wrong_items():
    index = SugarIndex.build(["a"], letters)
    with pytest.raises(TypeError, match=r"`queries\[1\]` is a int"):
        index.search(["a", 3])
    with pytest.raises(TypeError, match="item 1 is or holds float; give a text"):
        SugarIndex.build(["a", 1.5], letters)
    with pytest.raises(ValueError, match="item 0 is empty"):
        SugarIndex.build([" "], letters)
    with pytest.raises(ValueError, match="`by` is 'answer'"):
        SugarIndex.build(["a"], letters, by="answer")
    with pytest.raises(ValueError, match="needs a `SugarEmbedder`"):
        SugarIndex.build(["a"], letters, every_slice=True)
    with pytest.raises(ValueError, match="holds no documents"):
        SugarIndex(vectors(2)).documents[0]
    with pytest.raises(ValueError, match="item 0 has nothing to index by 'images'"):
        SugarIndex.build([{"messages": [message("user", "q")], "images": []}], letters, by="images")


def test_generators_and_ranks(tmp_path, monkeypatch):
    from hf_sugar.retrieval.documents import blocks

    index = SugarIndex.build((text for text in TEXTS), letters, shard_size=8)
    np.testing.assert_array_equal(index.embeddings, letters(TEXTS))
    for items in (TEXTS, iter(TEXTS)):
        assert list(blocks(items, 20, rank=1, ranks=2)) == [(1, TEXTS[20:40])]
    assert [number for number, _ in blocks(TEXTS, 8, rank=2, ranks=3)] == [2, 5]


RANKS = """
import sys, json
from hf_sugar.distributed import distributed_state
from test_retrieval import TEXTS, letters
from hf_sugar.retrieval import SugarIndex
seen = []
index = SugarIndex.build(TEXTS, lambda x: seen.extend(x) or letters(x), fingerprint="m", directory=sys.argv[1], shard_size=8)
open(f"{sys.argv[1]}/../rank{distributed_state().process_index}.json", "w").write(json.dumps([seen, index.metadata]))
"""


@pytest.mark.extras
def test_two_processes_share_the_work(tmp_path):
    (tmp_path / "run.py").write_text(RANKS)
    # what `accelerate launch` starts for several processes of one machine
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "run.py"), str(tmp_path / "index")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.path.dirname(__file__),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    subprocess.run([sys.executable, *command], check=True, env=environment, timeout=250)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(ranks[0][0] + ranks[1][0]) == TEXTS and len(ranks[0][0]) == 26
    assert ranks[0][1] == ranks[1][1] == [{"text": text} for text in TEXTS]
    np.testing.assert_array_equal(SugarIndex.load(tmp_path / "index", "m").embeddings, letters(TEXTS))


@pytest.mark.extras
def test_lance_index(tmp_path, embed):
    pytest.importorskip("lancedb")
    index = LanceIndex(str(tmp_path), letters, "m")
    with pytest.raises(ValueError, match="The index is empty"):
        index.search(["a"])
    index.add(TEXTS[:24], shard_size=8)
    embedded = []
    index.embed = lambda items: embedded.extend(items) or letters(items)
    index.add(TEXTS, shard_size=8)
    assert embedded == TEXTS[24:] and len(index) == 50  # what is there is not embedded again
    index = LanceIndex(str(tmp_path), letters, "m")
    brute = SugarIndex.build(TEXTS, letters).search(["a", "b"], 7)
    for hits, expected in zip(index.search(["a", "b"], 7), brute, strict=True):
        assert [hit.index for hit in hits] == [hit.index for hit in expected]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in expected], atol=1e-5)
        assert [hit.metadata for hit in hits] == [hit.metadata for hit in expected]
    index.delete([brute[0][0].index])
    assert len(index) == 49 and index.search(["a"], 1)[0][0].index == brute[0][1].index
    with pytest.raises(ValueError, match="'m', not 'other'"):
        LanceIndex(str(tmp_path), letters, "other")
    with pytest.raises(ValueError, match="every_slice=False"):
        LanceIndex(str(tmp_path), embed, "m", every_slice=True)

    story = [["one", tiny.image(1), "two"], ["three", tiny.image(2)]]
    places = LanceIndex(str(tmp_path), embed, table="places", every_slice=True)
    places.add(story)
    assert len(places) == 2 and len(places.search(["a"], 9)[0]) == 5
    assert places.search([["three", tiny.image(2)]], 1)[0][0].slice == 1
    assert len(places.document(1)["images"]) == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("retrieval")
    model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16)
    processor = SugarProcessor.from_processor(tiny.processor())
    model.save_pretrained(path / "full")
    processor.save_pretrained(path / "full")
    return path, model.eval(), processor


@pytest.fixture(scope="module")
def embed(checkpoint):
    return SugarEmbedder(checkpoint[1], checkpoint[2], batch_size=4)


def test_every_slice_is_the_prefix_embedded_apart(embed):
    documents = [[f"one {i}", tiny.image(i), "a red circle", tiny.image(i + 9)][: 4 - i % 2] for i in range(6)]
    index = SugarIndex.build(documents, embed, every_slice=True, shard_size=4)
    prefixes = [document[: n + 1] for document in documents for n in range(len(document))]
    np.testing.assert_allclose(index.embeddings, embed(prefixes), atol=1e-5)
    assert len(index) == 6 and index.embeddings.shape == (21, 16)
    for n, m in ((0, 3), (3, 1), (5, 2)):
        hit = index.search([documents[n][: m + 1]], 1)[0][0]
        assert (hit.index, hit.slice, hit.score) == (n, m, pytest.approx(1, abs=1e-5))


def test_fingerprint(checkpoint, embed, tmp_path):
    path, _, processor = checkpoint
    SugarIndex.build(["a"], embed, directory=tmp_path)
    for dtype in ("float32", "bfloat16"):
        again = SugarForConditionalGeneration.from_pretrained(path / "full", dtype=dtype)
        assert SugarEmbedder(again, processor).fingerprint == embed.fingerprint
    with torch.no_grad():
        again.retrieval_projector.linear_1.weight.mul_(1.1)
    other = SugarEmbedder(again, processor)
    with pytest.raises(ValueError, match=f"{embed.fingerprint}', not '{other.fingerprint}'"):
        SugarIndex.load(tmp_path, embed=other)
    assert len(SugarIndex.load(tmp_path, embed=embed)) == 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four answered questions with images in the layout of LLaVA."""
    path = tmp_path_factory.mktemp("corpus")
    records = []
    for i in range(4):
        tiny.image(i).save(path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": f"star {i}"}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (path / "data.json").write_text(json.dumps(records))
    (path / "note.txt").write_text("a blue square")
    return path


def test_rows_are_indexed_by_what_is_asked_for(corpus, embed, tmp_path):
    rows = load_data(str(corpus / "data.json"))
    index = SugarIndex.build(rows, embed, directory=tmp_path)
    question = [tiny.image(2), "what is this?"]
    np.testing.assert_allclose(index.embeddings[2], embed([question])[0], atol=1e-5)
    assert index.metadata[2] == {"id": "data.json:3"}
    document = SugarIndex.load(tmp_path, embed=embed).documents[2]
    assert document["messages"] == rows[2]["messages"]
    np.testing.assert_array_equal(question_slices(document)[0], tiny.image(2))
    by_image = SugarIndex.build(rows, embed, by="images")
    np.testing.assert_allclose(by_image.embeddings[2], embed([tiny.image(2)])[0], atol=1e-5)
    whole = SugarIndex.build(rows, embed, by="document")
    np.testing.assert_allclose(whole.embeddings[2], embed([dict(rows[2])])[0], atol=1e-5)
    texts = SugarIndex.build(rows, embed, by="texts")
    np.testing.assert_allclose(texts.embeddings[2], embed([["what is this?", "star 2"]])[0], atol=1e-5)

    files = find_files([corpus])
    assert [file.name for file in files] == ["0.png", "1.png", "2.png", "3.png", "note.txt"]
    found = SugarIndex.build(files, embed)
    assert found.search(["a blue square"], 1)[0][0].metadata == {"path": str(corpus / "note.txt")}
    assert found.search([tiny.image(3)], 1)[0][0].metadata == {"path": str(corpus / "3.png")}
    with pytest.raises(FileNotFoundError, match="names no image or text file"):
        find_files([corpus / "*.mp3"])


def test_rag(corpus, embed):
    index = SugarIndex.build(load_data(str(corpus / "data.json")), embed)
    rag = RAG(embed.model, embed.processor, index, k=2, max_new_tokens=6)
    question = [tiny.image(1), "what is this?"]
    prompt = rag.prompt(question)
    assert prompt.citations[0].metadata == {"id": "data.json:2"} and len(prompt.citations) == 2
    assert prompt.dropped == [] and prompt.note is None
    turns = [(m["role"], m["content"][-1]["text"]) for m in prompt.messages]
    assert turns[2:] == [("user", "what is this?"), ("assistant", "star 1"), ("user", "what is this?")]

    inputs = rag.generator.inputs([{"messages": prompt.messages, "images": prompt.images}])
    assert inputs["pixel_values"].shape[0] == 3
    expected = embed.model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = embed.processor.batch_decode(expected, skip_special_tokens=True)[0]
    assert "".join(rag.stream(prompt)) == expected
    answer = rag.answer(question)
    assert answer.text == expected.strip() and answer.prompt.citations == prompt.citations

    length = inputs["input_ids"].shape[1]
    short = RAG(embed.model, embed.processor, index, k=2, max_new_tokens=6, max_length=length + 5)
    cut = short.prompt(question)
    assert cut.citations == prompt.citations[:1] and cut.dropped == prompt.citations[1:]
    assert cut.note.startswith("1 of 2 examples left out")
    shorter = rag.generator.inputs([{"messages": cut.messages, "images": cut.images}])
    assert short.max_length >= shorter["input_ids"].shape[1] + 6
    with pytest.raises(ValueError, match="context holds 10. Shorten the question"):
        RAG(embed.model, embed.processor, index, max_new_tokens=6, max_length=10).prompt(question)
    with pytest.raises(ValueError, match="last turn of the question is the assistant's"):
        rag.prompt(index.documents[0])
    own = {**index.documents[1], "messages": index.documents[1]["messages"][:1]}
    assert "data.json:2" not in [hit.metadata["id"] for hit in rag.prompt(own).citations]


@pytest.fixture(scope="module")
def adapter(checkpoint, corpus):
    """An adapter directory as the trainer writes it."""
    from hf_sugar import SugarTrainer, SugarTrainingConfig

    path, _, _ = checkpoint
    tiny.llava().save_pretrained(path / "llava")
    tiny.processor().save_pretrained(path / "llava")
    args = SugarTrainingConfig(
        output_dir=str(path / "adapter"), structure_weight=0, retrieval_dim=16, max_steps=1, bf16=False, use_cpu=True
    )
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    rows = load_data(str(corpus / "data.json"))
    SugarTrainer(model=str(path / "llava"), args=args, train_dataset=rows, peft_config=lora).save_model()
    return path / "adapter"


@pytest.fixture(params=["full", "adapter", "full on the Hub", "adapter on the Hub"])
def name(request, checkpoint):
    """What a user calls a trained model: a directory or a Hub id."""
    kind, _, on_the_hub = request.param.partition(" ")
    directory = request.getfixturevalue("adapter") if kind == "adapter" else checkpoint[0] / "full"
    if not on_the_hub:
        return str(directory)
    request.getfixturevalue("hub")
    base = []
    if kind == "adapter":
        HfApi().create_repo("me/llava", exist_ok=True)
        HfApi().upload_folder(repo_id="me/llava", folder_path=checkpoint[0] / "llava")
        base = ["--base_model", "me/llava"]
    main(["push", str(directory), "--repo_id", f"me/cli-{kind}", *base])
    return f"me/cli-{kind}"


def test_cli(name, corpus, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    model = ["--model_name_or_path", name]
    index = ["--index", str(tmp_path / "index")]
    data = ["--data", str(corpus / "data.json")]
    main(["embed", *model, *data, "--output", str(tmp_path / "e.safetensors")])
    assert "4 documents, embeddings of shape (4, 16)" in capsys.readouterr().out
    written = load_file(tmp_path / "e.safetensors")
    main(["index", *model, *data, *index])
    main(["index", *model, "--files", str(corpus), *index, "--add", "true"])
    assert "9 documents" in capsys.readouterr().out
    fingerprint = json.loads((tmp_path / "index" / "index.json").read_text())["fingerprint"]
    np.testing.assert_allclose(SugarIndex.load(tmp_path / "index", fingerprint).embeddings[:4], written["embeddings"])

    main(["search", *model, *index, "--k", "2", "--query", str(corpus / "2.png"), "what is this?"])
    first = capsys.readouterr().out.splitlines()[0]
    assert "1.0000  data.json:3  [image] what is this? | star 2" in first
    main(["search", *model, *index, "--k", "3", "--query", "a blue square", "--json", "true"])
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(hits) == 3 and hits[0]["metadata"] == {"path": str(corpus / "note.txt")}

    (tmp_path / "chat.yaml").write_text(f"model_name_or_path: {name}\nmax_new_tokens: 4\nk: 2\n")
    typed = f"/image {corpus}/1.png\nwhat is this?\nand why?\n/image missing.png\n/help\n/clear\nhm\n/quit\nx\n"
    for extra, cited in (([], False), (index, True)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        main(["chat", "--config", str(tmp_path / "chat.yaml"), *extra])
        said = capsys.readouterr()
        assert ("[2]" in said.err) == cited and ("data.json:2" in said.err) == cited
        assert "'missing.png' does not exist" in said.err and "/clear begins anew" in said.err

    benchmark = {"rag": {"questions": str(corpus / "data.json"), "knowledge": str(corpus / "data.json")}}
    evaluation = ["--benchmarks", json.dumps(benchmark), "--max_new_tokens", "4", "--output_dir", str(tmp_path)]
    main(["evaluate", *model, "--image_text_data", str(corpus / "data.json"), *evaluation])
    table = capsys.readouterr().out
    assert "| image_to_text_recall@1 |" in table and "| rag/knowledge_rows | 4 |" in table


@pytest.mark.parametrize("place", ["clip art", "world"])
def test_cli_on_real_files(place, checkpoint, tmp_path, capsys, monkeypatch):
    if place == "clip art":
        data = Path(__file__).parents[1] / "examples" / "clipart" / "llava_val.json"
    else:
        data = write_world(tmp_path, {"conversations": {"test": 20}})["conversations"]["test"]
    rows = load_data(str(data))
    rows[3]["images"][0].save(tmp_path / "query.png")
    question = rows[3]["messages"][0]["content"][1]["text"]
    common = ["--model_name_or_path", str(checkpoint[0] / "full"), "--index", str(tmp_path / "index")]
    main(["index", *common, "--data", str(data)])
    assert f"{len(rows)} documents" in capsys.readouterr().out
    main(["search", *common, "--query", str(tmp_path / "query.png"), question, "--json", "true"])
    best = json.loads(capsys.readouterr().out.splitlines()[0])
    assert best["metadata"] == {"id": rows[3]["id"]} and best["score"] == pytest.approx(1, abs=1e-4)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {tmp_path / 'query.png'}\n{question}\n"))
    main(["chat", *common, "--max_new_tokens", "4"])
    assert rows[3]["id"] in capsys.readouterr().err


def test_cli_errors(checkpoint):
    model = ["--model_name_or_path", str(checkpoint[0] / "full")]
    with pytest.raises(ValueError, match="`query` is not set"):
        main(["search", *model])
    with pytest.raises(ValueError, match="Set one of `data`"):
        main(["index", *model])
    with pytest.raises(ValueError, match="`model_name_or_path` is not set"):
        main(["chat"])
