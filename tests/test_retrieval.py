import errno
import json
import os
import threading
from pathlib import Path
from unittest import mock

import faiss
import numpy as np
import pyarrow as pa
import pytest
from accelerate.utils import gather_object
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import in_two_processes

from hf_sugar import SugarIndex
from hf_sugar.retrieval import Hit, LanceIndex


def vectors(n, dim=16, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def letters(items):
    """Embeddings that depend on the text alone."""
    return np.concatenate([vectors(1, 8, seed=int.from_bytes(str(item).encode()[-4:], "big")) for item in items])


TEXTS = [f"text {i:03}" for i in range(50)]
DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def saved(tmp_path):
    SugarIndex.build(TEXTS, letters, fingerprint="m", directory=tmp_path / "index", shard_size=8)
    return tmp_path / "index"


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
    SugarIndex(vectors(3), fingerprint="model@1").save(tmp_path)
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
        "`rescore_multiplier` is nan": lambda: SugarIndex.build(["a"], letters, rescore_multiplier=np.nan),
        "`on_bad_row='drop'`": lambda: SugarIndex.build(["a"], letters, on_bad_row="drop"),
        "was built with another model": lambda: SugarIndex.load(tmp_path, fingerprint="model@2"),
    }.items():
        with pytest.raises(ValueError, match=error):
            call()
    index = SugarIndex.build(["a"], letters)
    for error, call in {
        "Put it in a list": lambda: index.search("text"),
        "`items` is a single str": lambda: SugarIndex.build("redcircle", letters),
        "`items` is a single dict": lambda: index.add({"messages": [{"role": "user", "content": "a"}]}),
        "item 1 is or holds float; give a text": lambda: SugarIndex.build(["a", 1.5], letters),
        "not JSON serializable": lambda: SugarIndex(vectors(1), [{"image": Image.new("RGB", (2, 2))}]),
    }.items():
        with pytest.raises(TypeError, match=error):
            call()
    with pytest.raises(FileNotFoundError, match="hf-sugar index"):
        SugarIndex.load(tmp_path / "nothing")


@pytest.mark.parametrize("memory_map", [False, True])
def test_several_shards_equal_brute_force(saved, memory_map):
    index = SugarIndex.load(saved, letters, fingerprint="m", memory_map=memory_map)
    assert len(index._matrices) == (7 if memory_map else 1)
    files = [Dataset.from_file(str(file))["embeddings"] for file in saved.glob("shard-*.arrow")]
    np.testing.assert_array_equal(np.unique(np.concatenate(files), axis=0), np.unique(letters(TEXTS), axis=0))
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


@pytest.mark.parametrize("factory,share", [("SQ8", 1 / 4), ("RaBitQ", 1 / 32)])
def test_quantized_indexes_compare_their_candidates_exactly(tmp_path, factory, share):
    """A byte or a bit of a dimension is searched; the embeddings are read from the disk."""
    items = vectors(600, 64)
    items += items[np.arange(600) % 30]  # clusters
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    cosines = items @ items.T - 2 * np.eye(600)
    near = np.argsort(-cosines, axis=1)[:, :10]
    recall = []
    for multiplier in (0, 4, 60):
        index = SugarIndex(items, factory=factory, rescore_multiplier=multiplier)
        hits = index.search(items, 11)
        found = [[hit.index for hit in row if hit.index != n] for n, row in enumerate(hits)]
        recall.append(np.mean([len(set(row) & set(best)) / 10 for row, best in zip(found, near)]))
        scores = [[items[n] @ items[hit.index] for hit in row] for n, row in enumerate(hits)]
        assert np.allclose([[hit.score for hit in row] for row in hits], scores, atol=1e-6) == (multiplier > 0)
        measured = index.measure(sample=600)
        assert measured["recall@10"] == pytest.approx(100 * recall[-1], abs=0.1)
        assert measured["exact_bytes"] == items.nbytes
        assert share < measured["bytes"] / items.nbytes < 2 * share + 0.02
    assert recall[0] < recall[1] <= recall[2] == 1
    index.save(tmp_path)
    loaded = SugarIndex.load(tmp_path, memory_map=True)
    assert loaded.search(items[:3], 11) == hits[:3] and "_matrices" not in vars(loaded)
    assert SugarIndex(items[:1]).measure() == {"bytes": 256, "exact_bytes": 256, "recall@0": 100.0}
    with pytest.raises(ValueError, match="`rescore_multiplier` is -1"):
        SugarIndex(items, rescore_multiplier=-1)


@pytest.mark.parametrize(
    "factory,options,error",
    [
        ("flat", None, "does not take `factory='flat'`.*could not parse.*Take one such as 'Flat', 'HNSW32'"),
        ("IDMap,Flat", None, "numbered by the index"),
        ("LSH", None, "does not take `factory='LSH'`"),
        ("IVF8,PQ3", None, "does not take `factory='IVF8,PQ3'`.* for embeddings of dimension 8"),
        ("IVF99,Flat", None, "cannot train the 99 clusters of 'IVF99,Flat' on 50 embeddings"),
        ("IVF8,Flat", "nprob=3", "with `search_options='nprob=3'`"),
        ("IVF8,Flat", "nprobe=0", "has 'nprobe=0'; give"),
        ("HNSW8", "efSearch=x", "with `search_options='efSearch=x'`"),
        ("HNSW8", "", "has ''; give"),
        ("Flat", "nprobe=4", "`factory='Flat'` with `search_options='nprobe=4'`"),
    ],
)
def test_settings_are_refused_before_anything_is_written(tmp_path, factory, options, error):
    calls = mock.Mock(wraps=letters)
    with pytest.raises(ValueError, match=error):
        SugarIndex.build(TEXTS, calls, factory=factory, search_options=options, directory=tmp_path)
    # of a function of the user's the dimension is not known before
    assert calls.call_count == (factory == "IVF8,PQ3") and not list(tmp_path.glob("shard*"))


# changes and files


def test_add_and_delete(saved):
    index = SugarIndex.load(saved, letters, fingerprint="m")
    written = {file.name for file in saved.glob("shard-*")}
    index.add(["new"], [{"name": "n"}])
    assert index.search(["new"], 1)[0][0] == Hit(50, pytest.approx(1), {"name": "n"})
    assert len(SugarIndex.load(saved, fingerprint="m")) == 50  # not before it is saved
    index.delete([3, 49])
    assert len(index) == 49 and index.search(["new"], 1)[0][0].index == 48
    assert index.search([TEXTS[4]], 1)[0][0].index == 3
    index.save(saved)
    assert SugarIndex.load(saved, fingerprint="m").metadata == index.metadata
    assert SugarIndex.load(saved, letters, fingerprint="m").search(TEXTS, 3) == index.search(TEXTS, 3)
    assert len(written & {file.name for file in saved.glob("*")}) == 5  # untouched shards stay as they are
    index.delete(range(49))
    for use in (lambda: index.search(["a"]), lambda: index.save(saved)):
        with pytest.raises(ValueError, match="The index is empty"):
            use()
    with pytest.raises(IndexError, match="no document 7; the index has 0"):
        index.delete([7])


def test_a_failed_add_changes_nothing(saved):
    index = SugarIndex.load(saved, letters, fingerprint="m")
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
    SugarIndex.load(saved, letters, fingerprint="m").add(["new"])  # and nobody is kept out

    kind = SugarIndex.build([f"text {i}" for i in range(120)], letters, factory="NSG8")
    kind.search(["a"])
    kind.add(["new"])  # which this kind of FAISS index does not take
    assert kind.search(["new"], 1)[0][0].metadata == {"text": "new"}


def test_one_writer_at_a_time(saved):
    first, second, late = (SugarIndex.load(saved, letters, fingerprint="m") for _ in range(3))
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
    assert [entry["text"] for entry in SugarIndex.load(saved, fingerprint="m").metadata] == [*TEXTS, "a"]


def test_threads_take_turns():
    index = SugarIndex.build(TEXTS, letters)
    nearest, deletion = index._nearest, threading.Thread(target=lambda: index.delete([0]))

    def interrupted(*args):
        found = nearest(*args)
        deletion.start()
        deletion.join(0.1)
        assert deletion.is_alive()
        return found

    index._nearest = interrupted
    assert index.search(letters([TEXTS[30]]), 1)[0][0].metadata == {"text": TEXTS[30]}
    deletion.join(10)
    assert len(index) == 49


@pytest.mark.parametrize(
    "target,name,error,says",
    [
        (os, "replace", KeyboardInterrupt(), "^$"),
        (pa.ipc, "new_stream", DISK_FULL, "cannot be written.*No space.*make room"),
        (Path, "mkdir", DISK_FULL, "index cannot be written .No space left"),
    ],
)
def test_a_failed_save_leaves_the_old_index(saved, monkeypatch, target, name, error, says):
    new = SugarIndex(vectors(5, seed=1), fingerprint="m")
    before = sorted(saved.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(target, name, mock.Mock(side_effect=error))
        with pytest.raises(type(error), match=says) as raised:
            new.save(saved)
    if isinstance(error, OSError):
        assert raised.value.errno == errno.ENOSPC and sorted(saved.iterdir()) == before
    np.testing.assert_array_equal(SugarIndex.load(saved, fingerprint="m").embeddings, letters(TEXTS))
    new.save(saved)
    np.testing.assert_array_equal(SugarIndex.load(saved, fingerprint="m").embeddings, new.embeddings)
    assert len(list(saved.iterdir())) == 3  # what was there before, and what a failure left, is gone


def test_an_interrupted_build_goes_on(saved):
    new, embedded = [f"other {i:03}" for i in range(40)], []

    def embed(items):
        if len(embedded) == 24 and not killed:
            killed.append(1)
            raise KeyboardInterrupt
        embedded.extend(items)
        return letters(items)

    killed = []
    settings = {"directory": saved, "shard_size": 8}
    with pytest.raises(KeyboardInterrupt):
        SugarIndex.build(new, embed, fingerprint="m", **settings)
    assert SugarIndex.load(saved, fingerprint="m").metadata == [{"text": text} for text in TEXTS]
    index = SugarIndex.build(new, embed, fingerprint="m", **settings)
    assert embedded == new  # nothing twice
    np.testing.assert_array_equal(index.embeddings, letters(new))
    assert len(list(saved.glob("shard-*"))) == 5
    # shards of another model, or of one that nothing identifies, are not taken over
    for n, fingerprint in enumerate(["m2", None, None], 2):
        SugarIndex.build(new, embed, fingerprint=fingerprint, **settings)
        assert len(embedded) == n * 40


def test_damaged_shards(saved):
    shard = sorted(saved.glob("shard-*"))[0]
    whole = shard.read_bytes()
    embedding = next(at for text in TEXTS if (at := whole.find(letters([text])[0].tobytes())) >= 0)
    flipped = whole[:embedding] + bytes([whole[embedding] ^ 1]) + whole[embedding + 1 :]
    for damage in (whole[: len(whole) // 2], b"", b"x" * 5000, flipped):
        shard.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{shard.name} cannot be read.*Build the index again"):
            SugarIndex.load(saved, fingerprint="m")
        calls = mock.Mock(wraps=letters)
        SugarIndex.build(TEXTS, calls, fingerprint="m", directory=saved, shard_size=8)
        assert calls.call_count == 1 and shard.read_bytes() == whole
    for memory_map in (False, True):
        shard.write_bytes(whole + b"\0")
        with pytest.raises(ValueError, match=f"{shard.name} cannot be read .its content is not what was written"):
            SugarIndex.load(saved, fingerprint="m", memory_map=memory_map)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        SugarIndex.load(saved, fingerprint="m")


def test_damaged_names_and_faiss_files(tmp_path):
    SugarIndex(vectors(50, 8), factory="HNSW8").save(tmp_path)
    names = tmp_path / "index.json"
    good = names.read_text()
    older = json.dumps({**json.loads(good), "format_version": 4})
    changed = (good[:50], good.replace('"by"', '"bY"'), good.replace('"auto"', '"images"'), older)
    for text in ("", "[]", "7", "\0", *changed):
        names.write_text(text)
        with pytest.raises(ValueError, match="index.json cannot be read .*" + "format version 4" * (text == older)):
            SugarIndex.load(tmp_path)
    names.write_text(good)
    [graph] = tmp_path.glob("faiss-*")
    whole = graph.read_bytes()
    other = faiss.index_factory(8, "HNSW8", faiss.METRIC_L2)
    other.add(vectors(50, 8))
    other = faiss.serialize_index(other).tobytes()
    assert len(other) == len(whole)
    for damage in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), other):
        graph.write_bytes(damage)
        for memory_map in (False, True):
            with pytest.raises(ValueError, match=f"{graph.name} cannot be read"):
                SugarIndex.load(tmp_path, memory_map=memory_map)


def share(directory):
    seen = []

    def embed(items):
        seen.extend(items)
        return letters(items)

    index = SugarIndex.build(TEXTS, embed, fingerprint="m", directory=directory, shard_size=8)
    return gather_object([[seen, index.metadata]])


@pytest.mark.extras
def test_two_processes_share_the_work(tmp_path):
    first, second = in_two_processes(tmp_path, "test_retrieval", "share", str(tmp_path / "index"))
    assert sorted(first[0] + second[0]) == TEXTS and len(first[0]) == 26
    assert first[1] == second[1] == [{"text": text} for text in TEXTS]
    np.testing.assert_array_equal(SugarIndex.load(tmp_path / "index", fingerprint="m").embeddings, letters(TEXTS))


@pytest.mark.extras
def test_lance_index(tmp_path):
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
        LanceIndex(str(tmp_path), letters, "m", every_slice=True)
