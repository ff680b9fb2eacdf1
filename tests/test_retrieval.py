import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import faiss
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarIndex, SugarProcessor, SugarRAG
from hf_sugar.cli.main import main
from hf_sugar.data import load_data, load_image
from hf_sugar.evaluation import exact_match
from hf_sugar.retrieval import (
    Hit,
    LanceIndex,
    find_examples,
    find_files,
    question_slices,
    rag_generator,
    rag_messages,
    split_answer,
)
from hf_sugar.retrieval.documents import _blocks


def vectors(n, dim=16, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def letters(items):
    """Embeddings that depend on the text alone."""
    return np.concatenate([vectors(1, 8, seed=int.from_bytes(str(item).encode()[-4:], "big")) for item in items])


def message(role, *parts):
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def row(color, question, answer, **columns):
    messages = [message("user", None, question), message("assistant", answer)]
    return {"messages": messages, "images": [Image.new("RGB", (4, 4), color)], **columns}


TEXTS = [f"text {i:03}" for i in range(50)]


@pytest.fixture
def saved(tmp_path):
    SugarIndex.build(TEXTS, letters, fingerprint="m", directory=tmp_path / "index", shard_size=8)
    return tmp_path / "index"


def test_generating_and_training_load_no_index():
    code = "import sys; from hf_sugar import SugarTrainer, SugarGenerator; from hf_sugar.retrieval import SugarRAG; "
    code += "print([m for m in ('faiss', 'lancedb', 'gradio', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# search


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), dim=st.integers(2, 24), k=st.integers(1, 70), seed=st.integers(0, 10**6))
def test_search_equals_numpy(n, dim, k, seed):
    items, queries = vectors(n, dim, seed), vectors(5, dim, seed + 1)
    found = SugarIndex(items).search(queries, k)
    scores = queries.astype(np.float64) @ items.T
    for hits, row_scores in zip(found, scores, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(row_scores)[::-1][:k], atol=1e-5)
        np.testing.assert_allclose([row_scores[hit.index] for hit in hits], [hit.score for hit in hits], atol=1e-5)
        assert len({hit.index for hit in hits}) == len(hits) == min(k, n)


def test_what_is_refused(tmp_path):
    index = SugarIndex(vectors(3))
    for error, call in {
        "`items` is empty": lambda: SugarIndex.build([], letters),
        "`embeddings` is empty": lambda: SugarIndex(np.empty((0, 4), dtype=np.float32)),
        "2 `metadata` for 3 items": lambda: SugarIndex(vectors(3), metadata=[{}, {}]),
        r"`embeddings\[1\]` has norm 2": lambda: SugarIndex(vectors(3) * np.array([[1], [2], [1]])),
        r"`embeddings\[0\]` has norm nan": lambda: SugarIndex(np.full((1, 3), np.nan)),
        r"shape \(3,\)": lambda: SugarIndex(np.ones(3)),
        "1 embeddings for 2 items": lambda: SugarIndex.build(["a", "b"], lambda items: vectors(1)),
        "dimension 8 but the index has 16": lambda: index.search(vectors(1, 8)),
        r"`queries\[0\]` has norm": lambda: index.search(np.zeros((1, 16))),
        "`k` is 0": lambda: index.search(vectors(1), k=0),
        "no `embed` function": lambda: index.search(["text"]),
        "holds no documents": lambda: index.documents[0],
        "item 0 is empty": lambda: SugarIndex.build([" "], letters),
        "`by` is 'answer'": lambda: SugarIndex.build(["a"], letters, by="answer"),
        "needs a `SugarEmbedder`": lambda: SugarIndex.build(["a"], letters, every_slice=True),
        "item 0 has nothing to index by 'images'": lambda: SugarIndex.build(["q"], letters, by="images"),
        "`on_bad_row='drop'`": lambda: SugarIndex.build(["a"], letters, on_bad_row="drop"),
        "was built with another model, or": lambda: SugarIndex.load(tmp_path, "model@2"),
    }.items():
        SugarIndex(vectors(3), fingerprint="model@1").save(tmp_path)
        with pytest.raises(ValueError, match=error):
            call()
    index = SugarIndex.build(["a"], letters)
    for error, call in {
        "Put it in a list": lambda: index.search("text"),
        "item 1 is or holds float; give a text": lambda: SugarIndex.build(["a", 1.5], letters),
        "not JSON serializable": lambda: SugarIndex(vectors(1), [{"image": Image.new("RGB", (2, 2))}]),
    }.items():
        with pytest.raises(TypeError, match=error):
            call()
    with pytest.raises(FileNotFoundError, match="SugarIndex.save"):
        SugarIndex.load(tmp_path / "nothing")


@pytest.mark.parametrize("memory_map", [False, True])
def test_several_shards_equal_brute_force(saved, memory_map):
    index = SugarIndex.load(saved, "m", letters, memory_map=memory_map)
    assert len(index._matrices) == (7 if memory_map else 1)
    brute = SugarIndex(letters(TEXTS)).search(letters(["a", "b", "c"]), 20)
    found = index.search(["a", "b", "c"], 20)
    assert [[hit.index for hit in hits] for hits in found] == [[hit.index for hit in hits] for hits in brute]
    scores = [[[hit.score for hit in hits] for hits in result] for result in (found, brute)]
    np.testing.assert_allclose(*scores, atol=1e-6)
    assert found[0][0].metadata == {"text": TEXTS[found[0][0].index]}
    assert len(index.search(["a"], 99)[0]) == 50 and index.search([], 3) == []


@pytest.mark.parametrize("factory,options", [("HNSW16", "efSearch=64"), ("IVF4,PQ4x4", "nprobe=4")])
def test_approximate_indexes(tmp_path, factory, options):
    items = vectors(1000, 8)
    index = SugarIndex(items, factory=factory, search_options=options)
    before = index.search(items[:100], 10)
    assert np.mean([any(hit.index == n for hit in hits) for n, hits in enumerate(before)]) > 0.9
    index.save(tmp_path)
    for memory_map in (False, True):
        loaded = SugarIndex.load(tmp_path, memory_map=memory_map)
        assert loaded.search(items[:100], 10) == before
    loaded.delete([0])
    assert all(hit.index < 999 for hits in loaded.search(items[:50], 5) for hit in hits)


@pytest.mark.parametrize(
    "factory,options,error",
    [
        ("flat", None, "does not take `factory='flat'`.*could not parse"),
        ("IDMap,Flat", None, "without IDMap"),
        ("LSH", None, "does not take `factory='LSH'`"),
        ("IVF8,PQ3", None, "does not take `factory='IVF8,PQ3'` for embeddings of dimension 8"),
        ("IVF99,Flat", None, "cannot train 'IVF99,Flat' on 50 embeddings: it has 99 clusters"),
        ("IVF8,Flat", "nprob=3", "does not take `search_options='nprob=3'`"),
        ("IVF8,Flat", "nprobe=0", "has 'nprobe=0'; give"),
        ("HNSW8", "efSearch=x", "has 'efSearch=x'; give"),
        ("Flat", "nprobe=4", "does not take `search_options='nprobe=4'` for 'Flat'"),
    ],
)
def test_settings_are_refused_before_anything_is_written(tmp_path, factory, options, error):
    calls = []
    with pytest.raises(ValueError, match=error):
        SugarIndex.build(
            TEXTS, lambda x: calls.append(1) or letters(x), factory=factory, search_options=options, directory=tmp_path
        )
    assert len(calls) == (factory == "IVF8,PQ3") and not list(tmp_path.glob("shard*"))  # the dimension is not known
    if factory != "IVF8,PQ3":
        with pytest.raises(ValueError):
            SugarIndex(letters(TEXTS), factory=factory, search_options=options)


# changes and files


def test_save_and_load(tmp_path):
    index = SugarIndex(vectors(20), [{"path": f"ü{i}.png"} for i in range(20)], fingerprint="model@1")
    index.save(tmp_path / "deep" / "index")
    loaded = SugarIndex.load(tmp_path / "deep" / "index", "model@1", embed=lambda items: vectors(len(items), seed=5))
    np.testing.assert_array_equal(loaded.embeddings, index.embeddings)
    assert loaded.metadata == index.metadata
    assert loaded.search(["a", "b"], 3) == index.search(vectors(2, seed=5), 3)
    [file] = (tmp_path / "deep" / "index").glob("shard-*.arrow")
    stored = Dataset.from_file(str(file))  # of `datasets`
    np.testing.assert_array_equal(stored["embeddings"], index.embeddings)
    assert stored.column_names == loaded.dataset.column_names == ["embeddings", "slice", "metadata", "row", "images"]


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


def test_a_failed_add_changes_nothing(saved):
    index = SugarIndex.load(saved, "m", letters)
    before = sorted(saved.iterdir())
    calls = []

    def broken(items):
        calls.append(1)
        return letters(items) * (1 if len(calls) < 3 else 2)

    for embed, error in ((lambda items: vectors(len(items), 9), "dimension 9, the index 8"), (broken, "has norm 2")):
        index.embed = embed
        with pytest.raises(ValueError, match=error):
            index.add([f"new {i}" for i in range(24)], shard_size=8)
        assert len(index) == 50 and index.search(letters(["new 1"]), 1)[0][0].index < 50
        assert sorted(saved.iterdir()) == before  # nothing that a mended function would take for its own
    SugarIndex.load(saved, "m", letters).add(["new"])  # and nobody is kept out

    kind = SugarIndex.build([f"text {i}" for i in range(120)], letters, factory="NSG8")
    kind.search(["a"])
    kind.add(["new"])  # which this kind of FAISS index does not take
    assert kind.search(["new"], 1)[0][0].metadata == {"text": "new"}


def test_one_writer_at_a_time(saved):
    first, second, late = (SugarIndex.load(saved, "m", letters) for _ in range(3))
    calls = []
    second.embed = calls.append

    def embed(items):
        for write in (lambda: second.add(["b"]), lambda: second.save(saved)):
            with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on "):
                write()
        return letters(items)

    first.embed = embed
    first.add(["a"])
    assert not calls
    late.add(["b"])  # before the first is saved
    first.save(saved)
    for write in (lambda: late.add(["c"]), lambda: late.save(saved)):
        with pytest.raises(ValueError, match="was written by another process since it was loaded"):
            write()
    assert [entry["text"] for entry in SugarIndex.load(saved, "m").metadata] == [*TEXTS, "a"]


def test_threads_take_turns():
    index = SugarIndex.build(TEXTS, letters)
    searching, go_on = threading.Event(), threading.Event()
    nearest = index._nearest

    def paused(*args):
        found = nearest(*args)
        searching.set()
        go_on.wait(10)
        return found

    index._nearest = paused
    hits = []
    threads = [threading.Thread(target=lambda: hits.extend(index.search(letters([TEXTS[30]]), 1)[0]))]
    threads[0].start()
    searching.wait(10)
    threads.append(threading.Thread(target=lambda: index.delete([0])))
    threads[1].start()
    threads[1].join(0.1)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert hits[0].metadata == {"text": TEXTS[30]} and len(index) == 49


def test_an_interrupted_save_leaves_the_old_index(tmp_path, monkeypatch):
    old, new = SugarIndex(vectors(3), fingerprint="m"), SugarIndex(vectors(5, seed=1), fingerprint="m")
    old.save(tmp_path)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            new.save(tmp_path)
    np.testing.assert_array_equal(SugarIndex.load(tmp_path, "m").embeddings, old.embeddings)
    new.save(tmp_path)
    np.testing.assert_array_equal(SugarIndex.load(tmp_path, "m").embeddings, new.embeddings)
    assert len(list(tmp_path.iterdir())) == 3  # what the interrupted save left is gone


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
    assert len(list(saved.glob("shard-*"))) == 5
    # shards of another model, or of one that nothing identifies, are not taken over
    for n, fingerprint in enumerate(["m2", None, None], 2):
        SugarIndex.build(new, go_on, fingerprint=fingerprint, directory=saved, shard_size=8)
        assert len(embedded) == n * 40


def test_a_full_disk_leaves_the_old_index(saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(saved.iterdir())
    for target, name, error in (
        (pa.ipc, "new_stream", "cannot be written.*No space left.*make room"),
        (Path, "mkdir", "index cannot be written .No space left"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(OSError, match=error) as raised:
                SugarIndex.build(["x"], letters, fingerprint="m", directory=saved)
        assert raised.value.errno == errno.ENOSPC and sorted(saved.iterdir()) == before
    assert len(SugarIndex.load(saved, "m")) == 50


def test_damaged_files(saved):
    shard = sorted(saved.glob("shard-*"))[0]
    whole = shard.read_bytes()
    embedding = next(place for text in TEXTS if (place := whole.find(letters([text])[0].tobytes())) >= 0)
    flipped = whole[:embedding] + bytes([whole[embedding] ^ 1]) + whole[embedding + 1 :]
    for damage in (whole[: len(whole) // 2], b"", b"x" * 5000, flipped):
        shard.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{shard.name} is damaged.*Build the index again"):
            SugarIndex.load(saved, "m")
        calls = mock.Mock(wraps=letters)
        SugarIndex.build(TEXTS, calls, fingerprint="m", directory=saved, shard_size=8)
        assert calls.call_count == 1 and shard.read_bytes() == whole
    shard.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"{shard.name} does not hold what index.json says"):
        SugarIndex.load(saved, "m")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        SugarIndex.load(saved, "m")


def test_damaged_names_and_faiss_files(tmp_path):
    SugarIndex(vectors(50, 8), factory="HNSW8").save(tmp_path)
    names = tmp_path / "index.json"
    good = names.read_text()
    [graph] = tmp_path.glob("faiss-*")
    for text in ("", good[:50], "[]", "7", "\0", good.replace('"by"', '"bY"'), good.replace('"auto"', '"images"')):
        names.write_text(text)
        with pytest.raises(ValueError, match="index.json is damaged"):
            SugarIndex.load(tmp_path)
    names.write_text(json.dumps({**json.loads(good), "format_version": 3}))
    with pytest.raises(ValueError, match="format version 3"):
        SugarIndex.load(tmp_path)
    names.write_text(good)
    whole = graph.read_bytes()
    for damage in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        graph.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{graph.name} cannot be read"):
            SugarIndex.load(tmp_path)
    other = faiss.index_factory(8, "HNSW8", faiss.METRIC_L2)
    other.add(vectors(50, 8))
    faiss.write_index(other, str(graph))
    assert graph.stat().st_size == len(whole)
    with pytest.raises(
        ValueError, match=f"{graph.name} cannot be read .it holds other items, of another dimension or m"
    ):
        SugarIndex.load(tmp_path, memory_map=True)


def test_blocks_and_generators():
    index = SugarIndex.build((text for text in TEXTS), letters, shard_size=8)
    np.testing.assert_array_equal(index.embeddings, letters(TEXTS))
    for items in (TEXTS, iter(TEXTS)):
        assert list(_blocks(items, 20, rank=1, ranks=2)) == [(1, TEXTS[20:40])]
    assert [number for number, _ in _blocks(TEXTS, 8, rank=2, ranks=3)] == [2, 5]


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
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
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
    numbers = {hit.metadata["text"]: hit.index for hit in index.search(["a"], 24)[0]}
    embedded = []
    index.embed = lambda items: embedded.extend(items) or letters(items)
    index.add(TEXTS[20:], shard_size=7)  # other blocks, another order
    assert embedded == TEXTS[24:] and len(index) == 50  # what is there is not embedded again
    index = LanceIndex(str(tmp_path), letters, "m")
    brute = SugarIndex.build(TEXTS, letters).search(["a", "b"], 7)
    for hits, expected in zip(index.search(["a", "b"], 7), brute, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in expected], atol=1e-5)
        assert [hit.metadata for hit in hits] == [hit.metadata for hit in expected]
    best = index.search(["a"], 1)[0][0]
    index.delete([best.index])
    index.add(["new"])
    after = {hit.metadata["text"]: hit.index for hit in index.search(["a"], 99)[0]}
    assert len(index) == len(after) == 50 and best.metadata["text"] not in after
    assert all(after[text] == n for text, n in numbers.items() if text in after)
    assert after["new"] not in numbers.values() and index.documents[after["new"]]["messages"]
    with pytest.raises(IndexError, match=f"no document {best.index}"):
        index.delete([best.index])
    with pytest.raises(ValueError, match="was built with another model"):
        LanceIndex(str(tmp_path), letters, "other")
    with pytest.raises(ValueError, match="every_slice=False"):
        LanceIndex(str(tmp_path), embed, "m", every_slice=True)

    story = [["one", tiny.image(1), "two"], "bad <image>", ["three", tiny.image(2)]]
    stories = LanceIndex(str(tmp_path), embed, table="stories", every_slice=True)
    stories.add(story, on_bad_row="skip")
    assert len(stories) == 2 and len(stories.search(["a"], 9)[0]) == 5
    hit = stories.search([["three", tiny.image(2)]], 1)[0][0]
    assert hit.slice == 1 and len(stories.documents[hit.index]["images"]) == 1


# what is stored and embedded


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


def test_every_slice_is_found(embed):
    documents = [[f"one {i}", tiny.image(i), "a red circle", tiny.image(i + 9)][: 4 - i % 2] for i in range(6)]
    index = SugarIndex.build(documents, embed, every_slice=True, shard_size=4)
    assert len(index) == 6 and index.embeddings.shape == (21, 16)
    np.testing.assert_array_equal(
        np.transpose(index.origins)[:8], [*([0, s] for s in range(4)), [1, 0], [1, 1], [1, 2], [2, 0]]
    )
    for n, m in ((0, 3), (3, 1), (5, 2)):
        hit = index.search([documents[n][: m + 1]], 1)[0][0]
        assert (hit.index, hit.slice, hit.score) == (n, m, pytest.approx(1, abs=1e-5))


def test_an_index_opens_only_with_its_model(checkpoint, embed, tmp_path):
    path, _, processor = checkpoint
    SugarIndex.build(["a"], embed, directory=tmp_path)
    other = SugarForConditionalGeneration.from_pretrained(path / "full", dtype="bfloat16")
    assert len(SugarIndex.load(tmp_path, embed=SugarEmbedder(other, processor))) == 1
    with pytest.raises(ValueError, match="was built with another model"):
        SugarIndex.load(tmp_path, embed=SugarEmbedder(other, processor, project=False))
    with torch.no_grad():
        other.retrieval_projector.linear_1.weight.mul_(1.1)
    with pytest.raises(ValueError, match="built with another model, or"):
        SugarIndex.load(tmp_path, embed=SugarEmbedder(other, processor))


def test_bad_items_are_named_or_left_out(embed, tmp_path, caplog):
    (tmp_path / "damaged.png").write_bytes(b"no image")
    bad = {5: "an <image> in it", 27: "word " * 700, 33: tmp_path / "damaged.png", 34: tmp_path / "missing.png"}
    items = [bad.get(n, f"text {n}") for n in range(40)]
    for n in bad:
        alone = [item if m == n or m not in bad else "fine" for m, item in enumerate(items)]
        with pytest.raises(ValueError, match=f"^item {n}[:, ]"):
            SugarIndex.build(alone, embed, shard_size=16)
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
        turns = [{"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": f"star {i}"}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (path / "data.json").write_text(json.dumps(records))
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


def test_split_answer_and_question():
    conversation = row("red", "What colour?", "red", id="a")
    question, answer = split_answer(conversation)
    assert answer == "red"
    assert question == {"messages": conversation["messages"][:1], "images": conversation["images"], "id": "a"}
    assert len(conversation["messages"]) == 2
    assert split_answer(question) == (question, None)
    conversation["messages"].insert(0, message("system", "Be brief."))
    image, text = question_slices(conversation)
    assert image.getpixel((0, 0)) == (255, 0, 0) and text == "What colour?"
    conversation["messages"][-1] = message("assistant", "like", None, "this")
    conversation["images"] *= 2
    question, answer = split_answer(conversation)
    assert answer == "like this" and len(question["images"]) == 1
    with pytest.raises(ValueError, match="kb row 3.*1 image parts"):
        question_slices(conversation, "kb row 3")


def test_rag_messages_order():
    first, second = row("red", "q1", "a1"), row("green", "q2", "a2")
    second["messages"].insert(0, message("system", "of the example"))
    asked = [message("system", "asked"), message("user", None, "q3")]
    blue = Image.new("RGB", (4, 4), "blue")
    messages, images = rag_messages(asked, [blue], [first, second])
    flat = [(m["role"], m["content"][-1]["text"]) for m in messages]
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), ("user", "q3")]
    assert flat == [("system", "asked"), *turns]
    assert images == [first["images"][0], second["images"][0], blue]
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


def test_rag_generator(knowledge):
    def echo(conversations):
        return [
            " | ".join(m["content"][-1]["text"] for m in c["messages"]) + f" | {len(c['images'])}"
            for c in conversations
        ]

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

    test = [
        row((200, 10, 0), "What is this?", "A tomato", id="t:0"),
        row((0, 0, 90), "What is this?", "a lake", id="t:1"),
    ]
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
    answer = rag.answer(question)
    assert answer.text == expected.strip() and answer.prompt.citations == prompt.citations

    short = SugarRAG(embed.model, embed.processor, index, k=2, max_new_tokens=6, max_length=length + 5)
    cut = short.prompt(question)
    assert cut.citations == prompt.citations[:1] and cut.dropped == prompt.citations[1:]
    assert cut.note.startswith("1 of 2 examples left out")
    shorter = rag.generator.inputs([{"messages": cut.messages, "images": cut.images}])
    assert short.max_length >= shorter["input_ids"].shape[1] + 6
    with pytest.raises(ValueError, match="context holds 10. Shorten the question"):
        SugarRAG(embed.model, embed.processor, index, max_new_tokens=6, max_length=10).prompt(question)
    with pytest.raises(ValueError, match="last turn of the question is the assistant's"):
        rag.prompt(index.documents[0])
    asked = {**index.documents[1], "messages": index.documents[1]["messages"][:1]}
    assert "data.json:2" not in [hit.metadata["id"] for hit in rag.prompt(asked).citations]


# commands


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


@pytest.fixture(params=["full", "adapter on the Hub"])
def name(request, checkpoint):
    """What a user calls a trained model: a directory or a Hub id."""
    path, _, _ = checkpoint
    if request.param == "full":
        return str(path / "full")
    adapter = request.getfixturevalue("adapter")
    request.getfixturevalue("hub")
    HfApi().create_repo("me/llava", exist_ok=True)
    HfApi().upload_folder(repo_id="me/llava", folder_path=path / "llava")
    main(["push", str(adapter), "--repo_id", "me/cli-adapter", "--base_model", "me/llava"])
    return "me/cli-adapter"


def test_cli(name, corpus, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    index = ["--index", str(tmp_path / "index")]
    data = str(corpus / "data.json")
    main(["embed", name, data, "--output", str(tmp_path / "e.safetensors")])
    assert "4 documents, embeddings of shape (4, 16)" in capsys.readouterr().out
    written = load_file(tmp_path / "e.safetensors")
    main(["index", "--model_name_or_path", name, "--data", data, *index])
    main(["index", name, "--files", str(corpus), *index, "--add", "true"])
    assert "9 documents" in capsys.readouterr().out
    fingerprint = json.loads((tmp_path / "index" / "index.json").read_text())["fingerprint"]
    loaded = SugarIndex.load(tmp_path / "index", fingerprint)
    np.testing.assert_allclose(loaded.embeddings[:4], written["embeddings"], atol=1e-6)

    main(["search", name, str(corpus / "2.png"), "what is this?", *index, "--k", "2"])
    first = capsys.readouterr().out.splitlines()[0]
    assert "1.0000  data.json:3  [image] what is this? | star 2" in first
    main(["search", name, *index, "--k", "3", "--query", "a blue square", "--json", "true"])
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(hits) == 3 and hits[0]["metadata"] == {"path": str(corpus / "note.txt")}

    (tmp_path / "damaged.png").write_bytes(b"no image")
    (tmp_path / "chat.yaml").write_text(f"model_name_or_path: {name}\nmax_new_tokens: 4\nk: 2\n")
    typed = (
        f"/image {tmp_path}/damaged.png\n/image {corpus}/1.png\nwhat is this?\nand why?\n/image missing.png\n/help\n"
    )
    for extra, cited in (([], 0), (index, 2)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{typed}/clear\nhm\n/quit\nx\n"))
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
        assert capsys.readouterr().out.splitlines()[-1].startswith("3 documents")
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
