import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_sugar.evaluation import exact_match
from hf_sugar.retrieval import (
    Hit,
    SugarIndex,
    answer_with_retrieval,
    question_slices,
    rag_generator,
    rag_messages,
    split_answer,
)


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
    with pytest.raises(ValueError, match="kb row 3: 1 image parts"):
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
    assert rag_messages(own, [blue], []) == (own, [blue])


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

    return rows, embed, SugarIndex.build([question_slices(row) for row in rows], embed)


def echo(conversations):
    """Answers with all that the conversation holds."""
    return [
        " | ".join(m["content"][-1]["text"] for m in c["messages"]) + f" | {len(c['images'])}" for c in conversations
    ]


def test_answer_with_retrieval(knowledge):
    rows, embed, index = knowledge
    query = row((10, 20, 200), "And this?", "secret", id="test:0")
    answer, used = answer_with_retrieval(echo, index, embed, query, rows)
    assert answer == "What is this? | the sea | And this? | 2"
    assert used == ["kb:1"]

    # the most similar one stands next to the question, and is named first
    answer, used = answer_with_retrieval(echo, index, embed, query, rows, k=2)
    assert answer == "What is this? | a leaf | What is this? | the sea | And this? | 3"
    assert used == ["kb:1", 2]

    without_answer = {**query, "messages": query["messages"][:1]}
    assert answer_with_retrieval(echo, index, embed, without_answer, rows, k=2) == (answer, used)
    follow_up = {**query, "messages": [*query["messages"], message("user", "why?")]}
    answer, _ = answer_with_retrieval(echo, index, embed, follow_up, rows)
    assert answer == "What is this? | the sea | And this? | secret | why? | 2"


def test_a_row_is_never_its_own_example(knowledge):
    rows, embed, index = knowledge
    _, used = answer_with_retrieval(echo, index, embed, rows[1], rows)
    assert used in (["kb:0"], [2])
    _, used = answer_with_retrieval(echo, index, embed, rows[1], rows, k=3)
    assert sorted(map(str, used)) == ["2", "kb:0"]


def test_rag_generator_in_exact_match(knowledge):
    rows, embed, index = knowledge

    def copy_the_example(conversations):
        return [c["messages"][-2]["content"][0]["text"] for c in conversations]

    test = [
        row((200, 10, 0), "What is this?", "A tomato", id="t:0"),
        row((0, 0, 90), "What is this?", "a lake", id="t:1"),
    ]
    results = exact_match(rag_generator(copy_the_example, index, embed, rows), test)
    assert results["exact_match"].value == 50
    assert results["misses"] == [{"row": "row 1 (t:1)", "expected": "a lake", "generated": "the sea"}]
    with pytest.raises(ValueError, match="3 items but `rows` has 2"):
        answer_with_retrieval(echo, index, embed, test[0], rows[:2])
