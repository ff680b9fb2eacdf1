"""`hf-sugar serve`, over loopback: what clients get is what the library gives."""

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transformers import set_seed

from hf_sugar import SugarEmbedder, SugarGenerator, SugarIndex, SugarRAG, world
from hf_sugar.retrieval import SugarReranker


pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="the server needs the extra `serve`")
from loopback import (  # noqa: E402
    CHAT,
    EMBED,
    RERANK,
    SEARCH,
    TALK,
    asked,
    begin,
    events,
    model_and_processor,
    picture,
    send,
    serving,
    streamed,
    text,
)


@pytest.fixture(scope="module")
def pair():
    return model_and_processor()


@pytest.fixture(scope="module")
def rows():
    """Questions with their answers, and the questions alone about another picture."""
    facts = list(world.load_world("facts", "test", 6, seed=2))
    split = [{**row, "messages": row["messages"][:2], "images": row["images"][:1]} for row in facts]
    return split, [{"messages": row["messages"][2:3], "images": row["images"][1:]} for row in facts]


@pytest.fixture(scope="module")
def index(pair, rows):
    return SugarIndex.build(rows[0], SugarEmbedder(*pair))


@pytest.fixture(scope="module")
def served(pair, index):
    with serving(*pair, index, max_new_tokens=200) as server:
        yield server


def test_answers_are_those_of_generate(served, pair, rows):
    conversations = [*rows[1][:2], TALK]
    expected = SugarGenerator(*pair, max_new_tokens=24)(conversations)
    assert len(expected[-1]) > 60
    for row, truth in zip(conversations, expected):
        body = {"model": "tiny", "messages": asked(row), "max_tokens": 24}
        status, _, answer = send(served.port, CHAT, body)
        [choice] = answer["choices"]
        assert (status, choice["message"]["content"]) == (200, truth)
        assert choice["finish_reason"] == ("length" if answer["usage"]["completion_tokens"] == 24 else "stop")
        _, headers, content = send(served.port, CHAT, {**body, "stream": True})
        assert headers["Content-Type"].startswith("text/event-stream")
        assert streamed(content) == (truth, choice["finish_reason"])
    length = SugarGenerator(*pair).inputs([TALK])["input_ids"].shape[1]
    assert answer["usage"] == {"prompt_tokens": length, "completion_tokens": 24, "total_tokens": length + 24}
    body["stream_options"] = {"include_usage": True}
    _, _, content = send(served.port, CHAT, {**body, "stream": True})
    assert events(content)[-1]["usage"] == answer["usage"] and events(content)[-1]["choices"] == []


def test_an_answer_ends_before_a_stop(served, pair):
    [whole] = SugarGenerator(*pair, max_new_tokens=30)([TALK])
    for stop in ("top left", ["never said", " corner"]):
        first = min(whole.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in whole)
        body = {"messages": asked(TALK), "max_tokens": 30, "stop": stop}
        for stream in (False, True):
            _, _, content = send(served.port, CHAT, {**body, "stream": stream})
            choice = None if stream else content["choices"][0]
            found = streamed(content) if stream else (choice["message"]["content"], choice["finish_reason"])
            assert found == (whole[:first].strip(), "stop")


def test_sampling_follows_its_seed(served, pair):
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0}
    set_seed(1)
    [expected] = SugarGenerator(*pair, max_new_tokens=8, **settings)([TALK])
    body = {"messages": asked(TALK), "max_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    bodies = [{**body, "seed": 1}, {**body, "seed": 7}, {**body, "seed": 7}, body]  # in whatever company
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda body: send(served.port, CHAT, body)[2], bodies)
    texts = [answer["choices"][0]["message"]["content"] for answer in found]
    assert texts[0] == expected and texts[1] == texts[2] != texts[0]


def test_embeddings_are_those_of_embed(served, pair, rows):
    image = rows[0][0]["images"][0]
    items = ["a red circle", image, ["one", image, "two"]]
    expected = SugarEmbedder(*pair)(items)
    contents = ["a red circle", {"content": [picture(image)]}, {"content": [text("one"), picture(image), text("two")]}]

    def embedded(**body):
        status, _, answer = send(served.port, EMBED, {"model": "tiny", **body})
        assert status == 200 and [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
        return np.array([each["embedding"] for each in answer["data"]]), answer["usage"]["prompt_tokens"]

    vectors, tokens = embedded(input=contents)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert tokens == sum(int(pair[1].embed_inputs([item])["attention_mask"].sum()) for item in items)
    for given, truth in zip((*contents, contents[:1]), (*expected, expected[0])):
        np.testing.assert_allclose(embedded(input=given)[0], truth[None], atol=1e-5)
    [whole] = SugarEmbedder(*pair)([rows[0][0]])
    np.testing.assert_allclose(embedded(messages=asked(rows[0][0]))[0], whole[None], atol=1e-5)
    short = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(embedded(input=contents, dimensions=8)[0], short, atol=1e-5)
    _, _, answer = send(served.port, EMBED, {"input": contents, "encoding_format": "base64"})
    coded = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in answer["data"]]
    np.testing.assert_allclose(coded, expected, atol=1e-5)


def test_rerank_search_and_answers_with_retrieval(served, pair, rows, index):
    embed = SugarEmbedder(*pair)
    documents = ["a red circle", "a blue square", "cyan"]
    [query, *vectors] = embed(["a red square", *documents])
    cosines = np.array(vectors) @ query
    _, _, answer = send(served.port, RERANK, {"query": "a red square", "documents": documents, "top_n": 2})
    assert [r["index"] for r in answer["results"]] == list(np.argsort(-cosines)[:2])
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx(sorted(cosines)[:0:-1], abs=1e-5)

    question = rows[1][2]
    content = asked(question)[0]["content"]
    _, _, found = send(served.port, SEARCH, {"query": {"content": content}, "k": 3})
    [hits] = index.search([[question["images"][0], question["messages"][0]["content"][1]["text"]]], 3)
    assert [(h["index"], h["id"]) for h in found["data"]] == [(hit.index, hit.metadata["id"]) for hit in hits]
    assert [h["score"] for h in found["data"]] == pytest.approx([hit.score for hit in hits], abs=1e-5)

    rag = SugarRAG(*pair, index, k=2, max_new_tokens=20)
    prompt = rag.prompt(question)
    body = {"messages": asked(question), "retrieval": {"k": 2}, "max_tokens": 20}
    _, _, answer = send(served.port, CHAT, body)
    assert answer["choices"][0]["message"]["content"] == rag.answer(prompt)
    assert [c["index"] for c in answer["citations"]] == [hit.index for hit in prompt.citations]
    assert answer["citations"][0]["text"].endswith(
        rows[0][prompt.citations[0].index]["messages"][1]["content"][0]["text"]
    )
    _, _, content = send(served.port, CHAT, {**body, "stream": True})
    assert events(content)[0]["citations"] == answer["citations"]


def test_a_reranker_takes_the_place_of_the_cosine(pair):
    documents = [f"{color} {shape}" for color in ("red", "blue", "green", "cyan") for shape in ("star", "circle", "a")]
    with serving(*pair, reranker=SugarReranker(*pair)) as server:
        _, _, answer = send(server.port, RERANK, {"query": "q", "documents": documents})
        _, _, refused = send(server.port, RERANK, {"query": "q", "documents": [*documents, " "]})
        assert send(server.port, SEARCH, {"query": "q"})[0] == 400
    assert "documents[12] is empty" in refused["error"]["message"]
    truth = SugarReranker(*pair).rank("q", documents)  # more than a batch
    assert [result["index"] for result in answer["results"]] == [hit.index for hit in truth]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == pytest.approx([hit.score for hit in truth], abs=1e-5)


def test_requests_go_between_the_batches_of_a_reranker(pair):
    begun, pairs = threading.Event(), []

    class Slow:
        def score(self, batch, names):
            begun.set()
            time.sleep(0.1)
            pairs.extend(batch)
            return np.zeros(len(batch))

    with serving(*pair, reranker=Slow(), request_timeout=3) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(send, server.port, RERANK, {"query": "q", "documents": ["a"] * 2048})
        assert begun.wait(20)
        assert send(server.port, EMBED, {"input": "x"})[0] == 200
        assert not long.done()
        assert long.result()[0] == 503
        counted = len(pairs)
        time.sleep(0.5)
        assert len(pairs) <= counted + 8  # nobody waits for the rest


def test_instructions_of_queries_and_documents(served, pair, monkeypatch):
    embed = SugarEmbedder(*pair)
    [plain] = embed(["a red circle"])
    monkeypatch.setattr(pair[0].config, "query_instruction", "Find the picture: ")
    monkeypatch.setattr(pair[0].config, "document_instruction", "A picture: ")
    for role in (None, "query", "document"):
        _, _, answer = send(served.port, EMBED, {"input": "a red circle", "input_type": role})
        [expected] = embed(["a red circle"], role=role)
        np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-5)
        assert (role is None) == np.allclose(expected, plain, atol=1e-3)
    _, _, answer = send(served.port, RERANK, {"query": "a red circle", "documents": ["a star"]})
    [score] = embed(["a star"], role="document") @ embed(["a red circle"], role="query")[0]
    assert answer["results"][0]["relevance_score"] == pytest.approx(score, abs=1e-5)


def test_fifty_at_a_time(served, pair, rows):
    """None is lost and none is wrong, and they are computed together."""
    generate, embed = SugarGenerator(*pair, max_new_tokens=6), SugarEmbedder(*pair)
    work = []
    for n in range(50):
        row, image = rows[1][n % 6], rows[0][n % 5]["images"][0]
        if n % 2:
            work.append((EMBED, {"input": [f"circle {n}", {"content": [picture(image)]}]}, [f"circle {n}", image]))
        else:
            work.append((CHAT, {"messages": asked(row), "max_tokens": 6, "stream": n % 4 == 0}, row))
    answers = generate([item for _, _, item in work[::2]])
    truths = [embed(item) if n % 2 else answers[n // 2] for n, (_, _, item) in enumerate(work)]
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda each: send(served.port, *each[:2]), work))
    for n, ((status, _, answer), truth) in enumerate(zip(found, truths)):
        assert status == 200
        if n % 2:
            np.testing.assert_allclose([each["embedding"] for each in answer["data"]], truth, atol=1e-5)
        else:
            assert (streamed(answer)[0] if n % 4 == 0 else answer["choices"][0]["message"]["content"]) == truth
    metrics = dict(line.rsplit(" ", 1) for line in send(served.port, "/metrics")[2].splitlines() if line[0] != "#")
    for kind in ("embed", "answer"):
        name = f'hf_sugar_batch_size_%s{{kind="{kind}"}}'
        assert float(metrics[name % "sum"]) / float(metrics[name % "count"]) > 1.5
    assert float(metrics['hf_sugar_request_seconds_count{path="/v1/embeddings",status="200"}']) >= 25
    assert float(metrics["hf_sugar_waiting"]) == 0


@pytest.mark.extras
def test_the_stock_client(served, pair, rows):
    openai = pytest.importorskip("openai", reason="the client of OpenAI is in `test-extras`")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="-", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    question, image = rows[1][1], rows[0][0]["images"][0]
    [truth] = SugarGenerator(*pair, max_new_tokens=20)([question])
    ask = {"model": "tiny", "messages": asked(question), "max_tokens": 20}
    assert client.chat.completions.create(**ask).choices[0].message.content == truth
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == truth
    cited = client.chat.completions.create(**ask, extra_body={"retrieval": {"k": 1}})
    assert cited.citations[0]["id"] == rows[0][cited.citations[0]["index"]]["id"]
    expected = SugarEmbedder(*pair)(["a red circle", [image, "a star"]])
    items = ["a red circle", {"content": [picture(image), text("a star")]}]
    for form in ("float", "base64"):
        found = client.embeddings.create(model="tiny", input=items, encoding_format=form)
        vectors = [each.embedding for each in found.data]
        if form == "base64":
            vectors = [np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else v for v in vectors]
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(
        client.embeddings.create(model="tiny", input="a red circle").data[0].embedding, expected[0], atol=1e-5
    )
    with pytest.raises(openai.BadRequestError, match="at most 200"):
        client.chat.completions.create(**{**ask, "max_tokens": 999})
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.embeddings.create(model="other", input="x")


@pytest.mark.extras
def test_the_command_and_sigterm(pair, tmp_path):
    """The stream of a process that is told to stop ends cleanly, and so does the process."""
    model, processor = pair
    model.config.random_projector = False
    model.save_pretrained(tmp_path / "my-sugar")
    processor.save_pretrained(tmp_path / "my-sugar")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_sugar.cli.main", "serve", str(tmp_path / "my-sugar"), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "HF_SUGAR_API_KEY"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        while "startup complete" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        connection, stream, first = begin(port, max_tokens=100, model="my-sugar")
        process.send_signal(signal.SIGTERM)
        [truth] = SugarGenerator(*pair, max_new_tokens=100)([TALK])
        assert streamed((first + stream.read()).decode())[0] == truth
        connection.close()
        assert process.wait(30) in (0, -signal.SIGTERM)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    finally:
        process.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()
