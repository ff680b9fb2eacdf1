"""`hf-sugar serve`, over loopback: what clients get is what the library gives, whatever else they send is refused."""

import asyncio
import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image
from transformers import set_seed

from hf_sugar import (
    SugarEmbedder,
    SugarForConditionalGeneration,
    SugarGenerator,
    SugarIndex,
    SugarProcessor,
    SugarRAG,
    world,
)
from hf_sugar.serving.config import ServeArguments


pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="the server needs the extra `serve`")
from hf_sugar.serving import fetch as fetching  # noqa: E402
from hf_sugar.serving.server import Server, build_app  # noqa: E402


CHAT, EMBED, RERANK, SEARCH = "/v1/chat/completions", "/v1/embeddings", "/v1/rerank", "/v1/search"


@contextmanager
def serving(model, processor, index=None, reranker=None, **settings):
    """A server in a thread of this process."""
    args = ServeArguments(port=0, **settings)
    server = Server(build_app(model, processor, "tiny", args, index, 8, reranker), args)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield SimpleNamespace(
            port=server.servers[0].sockets[0].getsockname()[1], server=server, thread=thread, worker=server.worker
        )
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def pair():
    model = SugarForConditionalGeneration.from_backbone(world.checkpoint("llava"), retrieval_dim=32).float().eval()
    return model, SugarProcessor.from_pretrained(world.checkpoint("llava"))


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
    limits = {"max_body_mb": 0.3, "max_pixels": 10_000, "max_new_tokens": 200, "body_timeout": 1}
    with serving(*pair, index, **limits) as server:
        yield server


def send(port, path, body=None, method=None, **headers):
    """Status, headers and content of the answer."""
    body = json.dumps(body).encode() if isinstance(body, dict | list) else body
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = "json" in response.headers.get("Content-Type", "")
    return response.status, response.headers, json.loads(content) if is_json else content.decode()


def data_url(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def picture(image):
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def text(words):
    return {"type": "text", "text": words}


def asked(row):
    """The messages of a row as a client sends them."""
    images = iter(row["images"])
    parts = [
        [picture(next(images)) if p["type"] == "image" else text(p["text"]) for p in m["content"]]
        for m in row["messages"]
    ]
    return [{"role": message["role"], "content": content} for message, content in zip(row["messages"], parts)]


TALK = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Describe it."}]}], "images": []}


def events(content):
    """The chunks of a stream, which ends as it should."""
    *lines, last, rest = content.split("\n\n")
    assert last == "data: [DONE]" and rest == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def streamed(content):
    """Text and reason of the end."""
    choices = [chunk["choices"][0] for chunk in events(content)]
    return "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]


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
    hits = [SimpleNamespace(index=1, score=0.9), SimpleNamespace(index=0, score=0.2)]
    seen = []
    reranker = SimpleNamespace(rank=lambda query, documents: seen.append((query, documents)) or hits)
    with serving(*pair, reranker=reranker) as server:
        _, _, answer = send(server.port, RERANK, {"query": "q", "documents": ["a", "b"]})
        assert send(server.port, SEARCH, {"query": "q"})[0] == 400
    assert answer["results"] == [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.2}]
    assert seen == [([text("q")], [[text("a")], [text("b")]])]


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


def large_png(size):
    return data_url(Image.new("1", (size, size)))


def cut_png():
    image = data_url(tiny.image(0, 60, 60)).partition(",")[2]
    return base64.b64encode(base64.b64decode(image)[:2000]).decode()


def eps():
    return base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n").decode()


def user(content, **more):
    return {"messages": [{"role": "user", "content": content}], **more}


def image_url(url):
    return user([{"type": "image_url", "image_url": {"url": url}}, text("what?")])


HOSTILE = [
    # bodies
    (CHAT, b"", 400, "has to be JSON"),
    (CHAT, b'{"messages": [', 400, "not JSON"),
    (CHAT, b"\xff\xfe\x00", 400, "JSON|parsing"),
    (CHAT, b"[" * 100_000, 400, "JSON|parsing"),
    (CHAT, b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "parsing|JSON"),
    (CHAT, [], 400, "the body"),
    (CHAT, b"null", 400, "JSON"),
    (CHAT, {"messages": "x" * 400_000}, 413, "larger than 300000 bytes"),
    (EMBED, {"input": ["x"] * 2049}, 400, "`input`.*2048"),
    # types and values
    (CHAT, {}, 400, "`messages`"),
    (CHAT, {"messages": []}, 400, "`messages`"),
    (CHAT, {"messages": "hello"}, 400, "`messages`"),
    (CHAT, {"messages": [3]}, 400, r"`messages\[0\]`"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, r"`messages\[0\].role`"),
    (CHAT, user(""), 400, r"messages\[0\].content.*empty"),
    (CHAT, user([]), 400, r"`messages\[0\].content`"),
    (CHAT, user(7), 400, r"`messages\[0\].content`"),
    (
        CHAT,
        user([{"type": "video_url", "video_url": {"url": "x"}}]),
        400,
        r"`messages\[0\].content\[0\].*not supported|type",
    ),
    (CHAT, user([{"type": "text"}]), 400, "a part of the type 'text'"),
    (CHAT, user([{"type": "text", "text": 1}]), 400, r"content\[0\].text`"),
    (CHAT, user("\ud800"), 400, "surrogate"),
    (CHAT, user("hello <image>"), 400, "image"),
    (CHAT, {"messages": [{"role": "assistant", "content": "hello"}]}, 400, "assistant"),
    (
        CHAT,
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": large_png(9)}]}]},
        400,
        "system",
    ),
    (CHAT, user("x", model="gpt-4"), 404, "'gpt-4'"),
    (CHAT, user("x", max_tokens=0), 400, "`max_tokens`"),
    (CHAT, user("x", max_tokens=-1), 400, "`max_tokens`"),
    (CHAT, user("x", max_tokens="5"), 400, "`max_tokens`"),
    (CHAT, user("x", max_tokens=10**30), 400, "`max_tokens`"),
    (CHAT, user("x", max_tokens=201), 400, "at most 200"),
    (CHAT, user("circle " * 3000), 400, "tokens"),
    (CHAT, user("x", temperature=-1), 400, "`temperature`"),
    (CHAT, b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', 400, "`temperature`"),
    (CHAT, user("x", top_p=0), 400, "`top_p`"),
    (CHAT, user("x", seed=2**64), 400, "`seed`"),
    (CHAT, user("x", stop=[""]), 400, r"`stop\[0\]`"),
    (CHAT, user("x", stop=["a"] * 17), 400, "`stop`"),
    (CHAT, user("x", stream="yes"), 400, "`stream`"),
    (CHAT, user("x", n=2), 400, "`n`"),
    (CHAT, user("x", tools=[]), 400, "`tools` is not supported"),
    (CHAT, user("x", retrieval={"k": 0}), 400, "`retrieval.k`"),
    (EMBED, {}, 400, "`input` or `messages`"),
    (EMBED, {"input": []}, 400, "`input` or `messages`"),
    (EMBED, {"input": ""}, 400, r"input\[0\] is empty"),
    (EMBED, {"input": [1, 2, 3]}, 400, r"`input\[0\]`.*tokens"),
    (EMBED, {"input": "x", "dimensions": 33}, 400, "`dimensions` is 33"),
    (EMBED, {"input": "x", "dimensions": 0}, 400, "`dimensions`"),
    (EMBED, {"input": "x", "encoding_format": "hex"}, 400, "`encoding_format`"),
    (EMBED, {"input": ["fine", "circle " * 3000]}, 400, r"input\[1\].*tokens"),
    (RERANK, {"query": "x", "documents": []}, 400, "`documents`"),
    (RERANK, {"query": "x", "documents": ["a"], "top_n": 0}, 400, "`top_n`"),
    (RERANK, {"query": "x", "documents": ["a", " "]}, 400, r"documents\[1\] is empty"),
    (SEARCH, {"query": "x", "k": 10**9}, 400, "`k`"),
    # pictures: too large, damaged, of formats that start programs, and addresses that are not opened
    (CHAT, image_url(large_png(101)), 400, "more than 10000 pixels"),
    (
        CHAT,
        user([picture(tiny.image(0, 80, 80)), picture(tiny.image(1, 80, 80)), text("?")]),
        400,
        "more than 10000 pixels",
    ),
    (CHAT, image_url(large_png(15_000)), 400, "more than 10000 pixels"),
    (CHAT, image_url(cut_png()), 400, r"images\[0\].*cannot be decoded"),
    (CHAT, image_url("data:image/png;base64,"), 400, "damaged"),
    (CHAT, image_url("data:image/png;base64,####"), 400, "neither base64 nor"),
    (CHAT, image_url("data:image/png,abc"), 400, "neither base64 nor"),
    (CHAT, image_url(base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()), 400, "none of PNG"),
    (CHAT, image_url(eps()), 400, "none of PNG"),
    (CHAT, image_url("/etc/hostname"), 400, r"content\[0\]"),
    (CHAT, image_url("file:///etc/hostname"), 400, "neither base64 nor"),
    (CHAT, image_url("../../../etc/passwd"), 400, "neither base64 nor"),
    (CHAT, image_url("ftp://127.0.0.1/a.png"), 400, "neither base64 nor"),
    (CHAT, image_url("http://127.0.0.1:1/a.png"), 400, "is not fetched"),
    (
        EMBED,
        {"input": {"content": [{"type": "image_url", "image_url": "HTTPS://example.com/a.png"}]}},
        400,
        "is not fetched",
    ),
    # paths and methods
    ("/v1/../../etc/passwd", {}, 404, "Not Found"),
    ("/v1/%2e%2e/%2e%2e/etc/passwd", {}, 404, "Not Found"),
    ("/v1/completions", user("x"), 404, "Not Found"),
    (EMBED, None, 405, "Method Not Allowed"),
]


@pytest.mark.parametrize("path,body,status,message", HOSTILE)
def test_what_is_refused_is_said(served, path, body, status, message):
    found, headers, answer = send(served.port, path, body)
    assert found == status, answer
    said = answer["error"]["message"]
    assert re.search(message, said), said
    assert len(said) < 400 and "\n" not in said and "Traceback" not in said
    assert answer["error"]["type"] == "invalid_request_error"


def test_the_server_goes_on(served):
    """After all of the above, with one model and nothing left behind."""
    assert len(HOSTILE) >= 40
    assert send(served.port, "/health")[::2] == (200, "")
    assert send(served.port, "/v1/models")[2]["data"][0]["id"] == "tiny"
    assert send(served.port, EMBED, {"input": "a red circle"})[0] == 200
    metrics = send(served.port, "/metrics")[2]
    assert 'path="other",status="404"' in metrics and "passwd" not in metrics and 'status="500"' not in metrics


@pytest.mark.parametrize(
    "content_type,sent", [("text/plain", b"{}"), ("application/x-www-form-urlencoded", b"input=x"), ("", b"{}")]
)
def test_forms_of_web_pages_are_refused(served, content_type, sent):
    status, _, answer = send(served.port, EMBED, sent, Content_Type=content_type)
    assert status == 400 and "application/json" in answer["error"]["message"]


def raw(port, head, *pieces, pause=0.0):
    """What comes back for bytes that are written one after the other."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head)
        for piece in pieces:
            time.sleep(pause)
            connection.sendall(piece)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_slow_and_false_bodies(served):
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost:1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    start = time.monotonic()
    answer = raw(served.port, head + b"Content-Length: 100\r\n\r\n", *[b"x"] * 3, pause=0.2)
    assert b" 408 " in answer and b"within 1 seconds" in answer and time.monotonic() - start < 10
    assert b" 400 " in raw(served.port, head + b"Content-Length: many\r\n\r\n")
    assert b" 400 " in raw(served.port, head + b"X: " + b"y" * 100_000 + b"\r\n\r\n")
    assert b" 400 " in raw(served.port, b"no request at all\r\n\r\n")
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert b" 413 " in raw(served.port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 8, b"0\r\n\r\n")
    assert send(served.port, EMBED, {"input": "a red circle"})[0] == 200


def test_key_and_host(pair):
    with serving(*pair, api_key="geheim-\u00fc") as server:
        for header in (
            {},
            {"Authorization": "Bearer geheim"},
            {"Authorization": "Basic geheim"},
            {"Authorization": b"\xff"},
        ):
            status, _, answer = send(server.port, EMBED, {"input": "x"}, **header)
            assert status == 401 and "API key" in answer["error"]["message"]
        key = "Bearer geheim-\u00fc".encode()
        assert send(server.port, EMBED, {"input": "x"}, Authorization=key, Host="sugar.example")[0] == 200
        assert send(server.port, "/health")[0] == 200
    with serving(*pair) as server:
        # a name that a web page made lead to this machine
        status, _, answer = send(server.port, EMBED, {"input": "x"}, Host="pages.example:8000")
        assert status == 403 and "'pages.example'" in answer["error"]["message"]
        assert send(server.port, EMBED, {"input": "x"}, Host="localhost")[0] == 200


@pytest.fixture
def endless(pair, monkeypatch):
    """Answers go on until something else ends them."""
    monkeypatch.setattr(pair[0].generation_config, "eos_token_id", None)


def begin(port, **settings):
    """A stream, of which the first chunk with a text was read."""
    response = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"messages": asked(TALK), "stream": True, **settings}
    response.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    stream = response.getresponse()
    assert stream.status == 200
    first = b"".join(stream.readline() for _ in range(4))
    assert b'"content": "' in first
    return response, stream, first


def test_limits_of_queue_and_time(pair, endless):
    with serving(*pair, max_requests=1, request_timeout=1.5) as server:
        connection, stream, first = begin(server.port, max_tokens=900)
        status, headers, answer = send(server.port, EMBED, {"input": "x"})
        assert (status, headers["Retry-After"]) == (429, "1") and "come again" in answer["error"]["message"]
        said, reason = streamed((first + stream.read()).decode())
        assert reason == "length" and len(said) > 20
        connection.close()
        status, headers, answer = send(server.port, CHAT, {"messages": asked(TALK), "max_tokens": 900})
        assert status == 503 and "longer than 1.5 seconds" in answer["error"]["message"] and headers["Retry-After"]
        assert send(server.port, EMBED, {"input": "x"})[0] == 200


def test_an_answer_that_nobody_reads_ends(pair, endless):
    with serving(*pair) as server:
        for stream in (True, False):
            if stream:
                connection, response, _ = begin(server.port, max_tokens=900)
                response.close()
            else:
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                body = json.dumps({"messages": asked(TALK), "max_tokens": 900})
                connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
                time.sleep(0.5)
            connection.sock.close() if connection.sock else connection.close()
            start = time.monotonic()
            assert send(server.port, EMBED, {"input": "x"})[0] == 200
            assert time.monotonic() - start < 5  # 900 tokens take longer


def test_a_stop_lets_the_stream_end(pair, endless):
    with serving(*pair, shutdown_timeout=0.5) as server:
        connection, stream, first = begin(server.port, max_tokens=900)
        server.server.should_exit = True  # what SIGTERM does
        said, reason = streamed((first + stream.read()).decode())
        assert reason == "length" and len(said) > 20
        server.thread.join(10)
        assert not server.thread.is_alive()


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        status, headers, body = self.server.pages[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def pictures():
    server = HTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    png = base64.b64decode(data_url(tiny.image(0)).partition(",")[2])
    port = server.server_port
    server.pages = {
        "/a.png": (200, {"Content-Type": "image/png"}, png),
        "/moved": (302, {"Location": "/a.png"}, b""),
        "/inside": (302, {"Location": f"http://127.0.0.2:{port}/a.png"}, b""),
        "/file": (302, {"Location": "file:///etc/hostname"}, b""),
        "/round": (302, {"Location": "/round"}, b""),
        "/none": (404, {}, b""),
    }
    yield port, png
    server.shutdown()


@pytest.mark.parametrize(
    "url,message",
    [
        ("http://{}/a.png", None),
        ("http://{}/moved", None),
        ("http://{}/a.png", "larger than 100 bytes"),
        ("http://{}/inside", "leads to a private address"),
        ("http://{}/file", "cannot be fetched"),
        ("http://{}/round", "redirects more than 3 times"),
        ("http://{}/none", "status 404"),
        ("https://{}/a.png", "cannot be fetched"),
        ("http://nowhere.example/a.png", "cannot be fetched"),
        ("http://mixed.example/a.png", "leads to a private address"),
    ],
)
def test_pictures_from_the_web(pictures, monkeypatch, url, message):
    """With 127.0.0.1 in the place of a public address."""
    port, png = pictures
    times = 1 if url.endswith("{}/a.png") else 4  # that the name is looked up: once for each connection
    names = {"pictures.example": [["127.0.0.1"]] * times, "mixed.example": [["127.0.0.1", "10.0.0.1"]]}

    def resolve(host, port, *args, **kwargs):
        if host not in names and not host[0].isdigit():
            raise socket.gaierror("unknown")
        found = names[host].pop(0) if names.get(host) else ["10.0.0.1"] if host in names else [host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    address = url.format(f"pictures.example:{port}")
    max_bytes = 100 if message == "larger than 100 bytes" else 10_000
    if message is None:
        assert asyncio.run(fetching.fetch(address, max_bytes, 30)) == png
    else:
        with pytest.raises(ValueError, match=message):
            asyncio.run(fetching.fetch(address, max_bytes, 30))


@pytest.mark.parametrize(
    "address,public",
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        *[
            (address, False)
            for address in "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1".split()
        ],
        *[
            (address, False)
            for address in "0.0.0.0 224.0.0.1 255.255.255.255 :: ::1 fe80::1%eth0 fd00::1 ff02::1".split()
        ],
        *[(address, False) for address in "::ffff:127.0.0.1 ::ffff:8.8.8.8 64:ff9b::7f00:1 2002:7f00:1::".split()],
    ],
)
def test_which_addresses_are_public(address, public):
    assert fetching.is_public(address) is public


def test_private_addresses_are_never_fetched(pair, pictures):
    port, _ = pictures
    with serving(*pair, allow_urls=True) as server:
        for host in (
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            f"[::1]:{port}",
            f"2130706433:{port}",
            f"u@127.0.0.1:{port}",
        ):
            status, _, answer = send(server.port, CHAT, image_url(f"http://{host}/a.png"))
            assert status == 400 and "private address" in answer["error"]["message"], answer


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
    model.save_pretrained(tmp_path / "my-sugar")
    processor.save_pretrained(tmp_path / "my-sugar")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_sugar.cli.main", "serve", str(tmp_path / "my-sugar"), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_SUGAR_API_KEY": ""})
    try:
        while "running on" not in (tmp_path / "log").read_text():
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
