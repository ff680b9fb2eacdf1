"""Reranking, late interaction and instructions, each against what it is defined as."""

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, List, Value
from tiny_runs import FEATURES, caption, image_part, rows, text_part

from hf_sugar import SugarConfig, SugarEmbedder, SugarForConditionalGeneration, SugarIndex, SugarProcessor, SugarRAG
from hf_sugar.data import load_data
from hf_sugar.evaluation import EvaluationData, best_hits, image_text_retrieval
from hf_sugar.evaluation.metrics import recall_at_k
from hf_sugar.evaluation.tasks import image_text_pairs
from hf_sugar.retrieval import RERANK_PROMPT, LanceIndex, SugarReranker, rerank_rows
from hf_sugar.retrieval.rag import find_examples
from hf_sugar.retrieval.storage import stored_truncate_dim


@pytest.fixture(scope="module")
def model():
    model = SugarForConditionalGeneration.from_vlm(tiny.llava(), retrieval_dim=16)
    return model.eval(), SugarProcessor.from_processor(tiny.processor())


@pytest.fixture(scope="module")
def embed(model):
    return SugarEmbedder(*model, batch_size=4)


@pytest.fixture
def config(model):
    """That of the model, as it was before afterwards."""
    config, before = model[0].config, vars(model[0].config).copy()
    yield config
    vars(config).update(before)


def documents(n=8):
    return [[f"one {i}", tiny.image(i), "a red circle", tiny.image(i + 9)][: 4 - i % 3] for i in range(n)]


def probability(model, processor, content, images):
    """Of "yes" by the stock model, of one pair that is not padded, from the tokens that both answers share."""
    tokens = []
    for word in ("yes", "no"):
        turns = [("user", content), ("assistant", [text_part(word)])]
        text = processor.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
        inputs = processor(text=[text], images=images or None, return_tensors="pt")
        tokens.append(inputs["input_ids"][0].tolist())
    place = next(n for n, (yes, no) in enumerate(zip(*tokens, strict=False)) if yes != no)
    inputs = {
        **inputs,
        "input_ids": inputs["input_ids"][:, :place],
        "attention_mask": torch.ones(1, place, dtype=torch.long),
    }
    with torch.no_grad():
        logits = model.vlm(
            **{k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in inputs}
        ).logits
    return float(logits[0, -1, [tokens[0][place], tokens[1][place]]].softmax(0)[0])


@pytest.fixture
def asked(config):
    """A model that was taught to answer."""
    config.rerank_prompt = RERANK_PROMPT
    return config


def likelihood(model, processor, content, images, query):
    """Of a query at the end of a turn, by the stock model: the geometric mean over its tokens, of one pair that is not padded."""
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    ids = inputs["input_ids"][0]
    count = int((ids == processor.image_token_id).sum()) // max(len(images), 1)
    text = text.replace("<image>", "<image>" * count)
    read = processor.tokenizer(text, return_offsets_mapping=True)
    assert read["input_ids"] == ids.tolist()
    start = text.rindex(query)
    at = torch.tensor([n for n, (a, b) in enumerate(read["offset_mapping"]) if b > start and a < start + len(query)])
    assert processor.decode(ids[at]).strip() == query
    with torch.no_grad():
        logits = model.vlm(
            **{k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")}
        ).logits
    return float(logits[0].log_softmax(-1)[at - 1, ids[at]].mean().exp())


def test_likelihood_of_the_query_against_the_stock_model(model):
    images, query = [tiny.image(n) for n in range(3)], "a red circle"
    given = [images[0], "a blue square", [images[1], "what is this?", images[2]], "star " * 40]
    parts = [[image_part()], [text_part("a blue square")]]
    parts += [[image_part(), text_part("what is this?"), image_part()], [text_part(("star " * 40).strip())]]
    shown = [images[:1], [], images[1:], []]
    expected = [
        likelihood(*model, [*document, text_part(query)], pictures, query)
        for document, pictures in zip(parts, shown, strict=True)
    ]
    scores = SugarReranker(*model, batch_size=3).score([(query, document) for document in given])
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert len(set(expected)) == 4
    hits = SugarReranker(*model).rank(query, given)
    assert [hit.index for hit in hits] == np.argsort(expected)[::-1].tolist()
    with pytest.raises(ValueError, match="the query has an image, which has no likelihood. Ask in words"):
        SugarReranker(*model).rank([images[0], "what?"], given)


@pytest.mark.parametrize("prompt", [RERANK_PROMPT, "{document} Is it {query} ?"])
def test_scores_against_the_stock_model(model, config, prompt):
    config.rerank_prompt = prompt
    images = [tiny.image(n) for n in range(3)]
    given = [images[0], "a blue square", [images[1], "what is this?", images[2]], "star " * 40]
    parts = [[image_part()], [text_part("a blue square")]]
    parts += [[image_part(), text_part("what is this?"), image_part()], [text_part(("star " * 40).strip())]]
    shown, expected = [images[:1], [], images[1:], []], []
    for document, pictures in zip(parts, shown, strict=True):
        if prompt.startswith("Query"):
            content = [text_part("Query: a red circle Document:"), *document]
            content.append(text_part("Does the document match the query? Answer yes or no."))
        else:
            content = [*document, text_part("Is it a red circle ?")]
        for n in range(len(content) - 1, 0, -1):  # neighbouring texts are one
            if content[n]["type"] == content[n - 1]["type"] == "text":
                content[n - 1 : n + 1] = [text_part(f"{content[n - 1]['text']} {content[n]['text']}")]
        expected.append(probability(*model, content, pictures))
    reranker = SugarReranker(*model, batch_size=3)
    hits = reranker.rank("a red circle", given)
    assert [hit.index for hit in hits] == np.argsort(expected)[::-1].tolist() and len(set(expected)) == 4
    np.testing.assert_allclose([hit.score for hit in hits], sorted(expected, reverse=True), atol=1e-6)
    assert reranker.rank("a red circle", []) == []


def test_the_prompt_is_in_the_checkpoint(model, config, tmp_path):
    config.rerank_prompt = "{query} {document} Well?"
    model[0].save_pretrained(tmp_path)
    loaded = SugarForConditionalGeneration.from_pretrained(tmp_path, query_instruction="find it").config
    assert (loaded.rerank_prompt, loaded.query_instruction) == ("{query} {document} Well?", "find it")
    with pytest.raises(ValueError, match="needs {query} and {document}, once each"):
        SugarConfig(rerank_prompt="Well, {query}?")


def test_what_cannot_be_reranked(model, embed, tmp_path):
    reranker, texts = SugarReranker(*model), ["a", "b"]
    with pytest.raises(TypeError, match="`documents` is a single str. Put it in a list"):
        reranker.rank("a", "b")
    for bad, message in (
        ("word " * 700, "^document 1 has .* the limit is"),
        (tmp_path / "no.png", "^document 1: the file"),
    ):
        with pytest.raises(ValueError, match=message):
            reranker.rank("a", ["b", bad])
    index, every = SugarIndex.build(texts, embed), SugarIndex.build(texts, embed, every_slice=True)
    plain = SugarIndex(np.eye(2, 16, dtype=np.float32), embed=lambda items: np.eye(2, 16, dtype=np.float32))
    for at, queries, settings, message in (
        (index, ["a"], {"rerank": 1}, "`rerank` is 1 and `k` 2"),
        (index, embed(["a"]), {"rerank": 5}, "need queries that are not embedded"),
        (index, ["a"], {"late": True}, "build it with `every_slice=True`"),
        (plain, ["a"], {"rerank": 5}, "and a `SugarEmbedder`"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            at.search(queries, 2, **settings)
    assert every.search([], 2, late=True, rerank=2) == []
    long = SugarIndex.build(["word " * 95], embed)
    with pytest.raises(ValueError, match="^document 0 of the index has .* lower `rerank`.* smaller documents"):
        long.search(["word " * 20], 1, rerank=1)


def test_a_search_whose_first_hits_are_reranked(model, embed, asked):
    queries, items = ["a red", [tiny.image(3), "what?"]], documents()
    for settings in ({}, {"every_slice": True}):
        index = SugarIndex.build(items, embed, **settings)
        found = index.search(queries, 3, rerank=5)
        for query, hits, first in zip(queries, found, index.search(queries, 5), strict=True):
            given = [items[hit.index][: None if hit.slice is None else hit.slice + 1] for hit in first]
            wanted = [(first[hit.index].index, hit.score) for hit in SugarReranker(*model).rank(query, given)[:3]]
            assert [hit.index for hit in hits] == [number for number, _ in wanted]
            np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in wanted], atol=1e-6)


def test_answers_draw_on_what_is_reranked(model, embed, asked):
    answer = {"role": "assistant", "content": [text_part("star")]}
    asked = [[{"role": "user", "content": [image_part(), text_part(f"what is {i}?")]}] for i in range(8)]
    rows = [{"messages": [*turns, answer], "images": [tiny.image(i)]} for i, turns in enumerate(asked)]
    index = SugarIndex.build(rows, embed, by="question")
    question = {"messages": asked[0], "images": [tiny.image(9)], "id": "x"}
    [hits] = find_examples(index, [question], 2, rerank=6)
    candidates = [hit.index for hit in index.search([[tiny.image(9), "what is 0?"]], 6)[0]]
    ranked = SugarReranker(*model).rank(
        [tiny.image(9), "what is 0?"], [[tiny.image(n), f"what is {n}?"] for n in candidates]
    )
    assert [hit.index for hit in hits] == [candidates[hit.index] for hit in ranked[:2]]
    rag = SugarRAG(*model, index, k=2, rerank=6, max_new_tokens=4)
    assert [hit.index for hit in rag.prompt(question).citations] == [hit.index for hit in hits]


def test_rows_that_teach_reranking():
    captions = [[{"role": "user", "content": [image_part(), text_part(f"text {i}")]}] for i in range(2)]
    columns = {"images": [[tiny.image(i)] for i in range(2)], "loss_on": ["captions"] * 2, "id": ["a", "b"]}
    data = Dataset.from_dict({"messages": captions, **columns}, features=FEATURES)
    with pytest.raises(ValueError, match="no column `negatives`. Mine them first"):
        rerank_rows(data)
    mined = data.add_column("negatives", [["x", "y"], []], feature=List(Value("string")))
    prompt, image = "{query} or {document} ?", None
    for count, expected in (
        (1, [(0, [image, "or text 0 ?"], "yes"), (0, [image, "or x ?"], "no"), (1, ["text 1 or", image, "?"], "yes")]),
        (2, [(0, [image, "or text 0 ?"], "yes"), *((0, [image, f"or {t} ?"], "no") for t in "xy"), None]),
    ):
        rows = rerank_rows(mined, prompt, count)
        assert rows["structure"][:] == [False] * len(rows) and rows["loss_on"][:] == ["answers"] * len(rows)
        for row, wanted in zip(rows, expected, strict=True):
            if wanted is None:
                continue
            content, reply = (message["content"] for message in row["messages"])
            assert ([part["text"] for part in content], reply[0]["text"]) == wanted[1:]
            np.testing.assert_array_equal(row["images"][0], tiny.image(wanted[0]))
    # rows with `positives` are never turned round
    given = {"positives": [["p", "q"]] * 2, "negatives": [["x", "y", "z"]] * 2}
    rows = data
    for name, values in given.items():
        rows = rows.add_column(name, values, feature=List(Value("string")))
    texts = [[part["text"] for part in row["messages"][0]["content"]] for row in rerank_rows(rows, prompt)]
    assert texts == [[image, f"text {i} or {item} ?"] for i in range(2) for item in "pqxy"]


def maxsim(query, document):
    return sum(max(float(np.dot(q, d)) for d in document) for q in query)


def queries_and_scores(embed, items):
    queries = [["a red", tiny.image(3), "b"], "one 2", tiny.image(4)]
    vectors = embed.every_slice(items)
    return queries, np.array([[maxsim(query, v) for v in vectors] for query in embed.every_slice(queries)])


def check_late(index, queries, expected, number=lambda hit: hit.index):
    for hits, scores in zip(index.search(queries, 3, late=True), expected, strict=True):
        assert [number(hit) for hit in hits] == np.argsort(-scores)[:3].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:3], atol=1e-6)
        assert all(hit.slice is None for hit in hits)


def test_late_interaction(embed, tmp_path):
    items = documents(9)
    queries, expected = queries_and_scores(embed, items)
    SugarIndex.build(items, embed, every_slice=True, shard_size=2, directory=tmp_path)
    for settings in ({}, {"memory_map": True}):
        check_late(SugarIndex.load(tmp_path, embed=embed, **settings), queries, expected)
    assert len(SugarIndex.load(tmp_path, embed=embed).search(queries, 50, late=True)[0]) == 9


@pytest.mark.extras
def test_late_interaction_of_other_libraries(embed, tmp_path):
    util = pytest.importorskip("sentence_transformers.util", reason="needs sentence-transformers")
    pytest.importorskip("lancedb", reason="needs lancedb")
    items = documents(9)
    queries, expected = queries_and_scores(embed, items)
    theirs = util.maxsim(*([torch.from_numpy(v) for v in embed.every_slice(each)] for each in (queries, items)))
    np.testing.assert_allclose(theirs, expected, atol=1e-6)
    index = LanceIndex(str(tmp_path), embed, every_slice=True)
    index.add(items, [{"n": n} for n in range(9)])
    check_late(index, queries, expected, lambda hit: hit.metadata["n"])
    assert len(index.search(queries, 50, late=True)[0]) == 9


def said(instruction, *parts):
    content = [image_part() if not isinstance(part, str) else text_part(part) for part in parts]
    messages = [{"role": "system", "content": [text_part(instruction)]}, {"role": "user", "content": content}]
    return {"messages": messages, "images": [part for part in parts if not isinstance(part, str)]}


def test_instructions(model, config, embed, tmp_path):
    items = ["a", [tiny.image(0), "b"], tiny.image(1)]
    before, parts = embed(items), [["a"], items[1], [tiny.image(1)]]
    for role in ("query", "document"):
        np.testing.assert_array_equal(embed(items, role), before)
    plain = SugarIndex.build(items, embed, directory=tmp_path)
    config.query_instruction, config.document_instruction = "find it ", "a document"
    for role, instruction in (("query", "find it"), ("document", "a document")):
        expected = embed([said(instruction, *each) for each in parts])
        np.testing.assert_allclose(embed(items, role), expected, atol=1e-6)
        given = model[1].embed_inputs(items, instruction=instruction)
        np.testing.assert_allclose(model[0].embed(**given).detach(), expected, atol=1e-5)
        assert np.abs(expected - before).max() > 1e-3
    np.testing.assert_array_equal(embed(items), before)
    both = said("find it", "b")["messages"]
    both[0]["content"].append(text_part("Be kind."))
    system = [{"role": "system", "content": [text_part("Be kind.")]}, both[1]]
    found, expected = embed([{"messages": system}], "query"), embed([{"messages": both}])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="`role` is 'passage'; use 'query' or 'document'"):
        embed(items, role="passage")

    told = SugarEmbedder(*model)
    index = SugarIndex.build(items, told)
    np.testing.assert_allclose(index.embeddings, embed(items, "document"), atol=1e-6)
    scores = embed(["b"], "query") @ embed(items, "document").T
    np.testing.assert_allclose([hit.score for hit in index.search(["b"], 3)[0]], np.sort(scores[0])[::-1], atol=1e-5)
    with pytest.raises(ValueError, match="built with the defaults, not `document_instruction=a document`"):
        SugarIndex.load(tmp_path, embed=told)
    assert len(plain) == len(SugarIndex.load(tmp_path, embed=embed)) and stored_truncate_dim(tmp_path) is None
    short = SugarEmbedder(*model, truncate_dim=5)
    SugarIndex.build(items, short, directory=tmp_path / "short")
    assert stored_truncate_dim(tmp_path / "short") == 5
    with pytest.raises(ValueError, match="built with `truncate_dim=5`, `document_instruction=a document`, not"):
        SugarIndex.load(tmp_path / "short", embed=told)

    images, texts = [tiny.image(n) for n in range(12)], [f"text {n}" for n in range(12)]
    results = image_text_retrieval(told, images, texts)
    for name, queries, candidates in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        scores = embed(queries, "query") @ embed(candidates, "document").T
        for k, hits in recall_at_k(scores, list(range(12)), (1, 5, 10)).items():
            assert results[f"{name}_recall@{k}"].value == pytest.approx(100 * np.mean(hits)), name

    rows([caption], 12).to_parquet(tmp_path / "captions.parquet")
    images, texts = image_text_pairs(load_data(str(tmp_path / "captions.parquet")))
    told, data = SugarEmbedder(*model), EvaluationData(str(tmp_path / "captions.parquet"))
    scores = embed([images[0]], "query") @ embed(texts, "document").T
    best = np.argsort(-scores[0], kind="stable").tolist()
    assert best_hits(told, data, "train", 12)[1]["hits"] == [texts[n] for n in best]
