"""`hf-sugar serve`, over loopback: what it refuses, and how it ends what takes too long."""

import asyncio
import base64
import http.client
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import tiny
from PIL import Image


pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="the server needs the extra `serve`")
from fastapi import Response  # noqa: E402
from loopback import (  # noqa: E402
    CHAT,
    EMBED,
    RERANK,
    SEARCH,
    TALK,
    asked,
    begin,
    data_url,
    model_and_processor,
    picture,
    send,
    serving,
    streamed,
    text,
)
from prometheus_client import CollectorRegistry  # noqa: E402

from hf_sugar.cli.main import main  # noqa: E402
from hf_sugar.serving import fetch as fetching  # noqa: E402
from hf_sugar.serving import requests  # noqa: E402
from hf_sugar.serving.config import ServeArguments  # noqa: E402
from hf_sugar.serving.guard import Guard  # noqa: E402


@pytest.fixture(scope="module")
def pair():
    return model_and_processor()


@pytest.fixture(scope="module")
def served(pair):
    with serving(*pair, max_body_mb=0.3, max_pixels=10_000, max_new_tokens=200, body_timeout=1) as server:
        yield server


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
    (CHAT, b"\xff\xfe\x00", 400, "JSON"),
    (CHAT, b"[" * 100_000, 400, "JSON"),
    (CHAT, b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "JSON"),
    (CHAT, [], 400, "The body has to be an object"),
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
    (CHAT, user("hello <image>"), 400, "contains '<image>', a special token"),
    (CHAT, user("hello </s>"), 400, "contains '</s>', a special token"),
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
    (
        EMBED,
        {"input": [{"content": [picture(tiny.image(n, 80, 80))]} for n in range(2)]},
        400,
        r"`input\[1\]\[0\]`.*more than 10000 pixels",
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
    ("/v1/../../etc/passwd", {}, 404, "nothing at this path"),
    ("/v1/%2e%2e/%2e%2e/etc/passwd", {}, 404, "nothing at this path"),
    ("/v1/completions", user("x"), 404, "nothing at this path"),
    (EMBED, None, 405, "another method"),
]


@pytest.mark.parametrize("path,body,status,message", HOSTILE)
def test_what_is_refused_is_said(served, path, body, status, message):
    found, headers, answer = send(served.port, path, body)
    assert found == status, answer
    said = answer["error"]["message"]
    assert re.search(message, said), said
    assert len(said) < 400 and said[-1] == "." and not re.search("\n|Traceback|should|validation", said)
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
        for path, body in ((EMBED, {"input": "x"}), ("/metrics", None), ("/health", None), ("/", None)):
            status, _, answer = send(server.port, path, body, Host="pages.example:8000")
            assert status == 403 and "'pages.example'" in answer["error"]["message"]
        assert [send(server.port, path)[0] for path in ("/metrics", "/openapi.json", "/docs")] == [200, 404, 404]
        assert send(server.port, EMBED, {"input": "x"}, Host="localhost")[0] == 200


def test_an_empty_key_is_no_wish_for_an_open_server(monkeypatch):
    with pytest.raises(ValueError, match="API key is empty"):
        main(["serve", "no-such-model", "--api_key", ""])
    monkeypatch.setenv("HF_SUGAR_API_KEY", "\n")
    with pytest.raises(ValueError, match="API key is empty. Set .* or unset"):
        main(["serve", "no-such-model", "--host", "0.0.0.0"])


def test_bodies_have_a_limit_together():
    async def statuses():
        guard = Guard(Response(), ServeArguments(max_body_mb=0.3), CollectorRegistry())
        scope = {"type": "http", "path": EMBED, "headers": [(b"host", b"localhost")], "method": "POST"}

        async def post(*sizes, whole=True):
            bodies = [{"type": "http.request", "body": b"x" * n, "more_body": True} for n in sizes]
            bodies[-1]["more_body"], found = not whole, []

            async def receive():
                return bodies.pop(0) if bodies else await asyncio.Future()

            async def send(message):
                found.append(message.get("status"))

            await guard(scope, receive, send)
            return found[0]

        slow = [asyncio.create_task(post(200_000, 90_000, whole=False)) for _ in range(16)]
        await asyncio.sleep(0.1)
        found = [await post(200_000), await post(100_000, 50_000, 50_000), await post(160_000)]
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return [*found, await post(200_000)]

    assert asyncio.run(statuses()) == [429, 429, 200, 200]  # 16 times 0.3 MB, less 16 times 0.29 MB, is 0.16 MB


@pytest.fixture
def endless(pair, monkeypatch):
    """Answers go on until something else ends them."""
    monkeypatch.setattr(pair[0].generation_config, "eos_token_id", None)


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


@pytest.mark.parametrize("name, value", [("port", 2**16), ("max_requests", 0), ("max_body_mb", float("nan"))])
def test_limits_that_cannot_be_meant(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}"):
        ServeArguments(**{name: value})


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(served):
    with pytest.raises(OSError, match=f"127.0.0.1, port {served.port}: .*in use. Set another `port`"):
        main(["serve", "no-such-model", "--port", str(served.port)])


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


def test_pictures_from_the_web_have_a_limit_together(monkeypatch):
    png, allowed = base64.b64decode(data_url(tiny.image(0)).partition(",")[2]), []

    async def fetch(url, max_bytes, timeout):
        allowed.append(max_bytes)
        return png

    monkeypatch.setattr(requests, "fetch", fetch)
    parts = [requests.Part(type="image_url", image_url="https://pictures.example/a.png")] * 2
    limits = ServeArguments(allow_urls=True, max_body_mb=0.1)
    asyncio.run(requests.read_contents({"input[0]": parts, "input[1]": parts}, limits))
    assert allowed == [100_000 - n * len(png) for n in range(4)]


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
        *[(address, False) for address in "::127.0.0.1 ::ffff:0:7f00:1 fec0::1 64:ff9b:1::1 2001:0:7f00:1::".split()],
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
