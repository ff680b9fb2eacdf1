"""A server of `hf-sugar serve` in a thread, and what a plain client sends it."""

import base64
import functools
import http.client
import io
import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

from hf_sugar import SugarEmbedder, SugarForConditionalGeneration, SugarProcessor, world
from hf_sugar.serving.config import ServeArguments
from hf_sugar.serving.server import Server, build_app


CHAT, EMBED, RERANK, SEARCH = "/v1/chat/completions", "/v1/embeddings", "/v1/rerank", "/v1/search"


@functools.cache
def model_and_processor():
    """They know the world, but for the projector."""
    model = SugarForConditionalGeneration.from_backbone(world.checkpoint("llava"), retrieval_dim=32).float().eval()
    return model, SugarProcessor.from_pretrained(world.checkpoint("llava"))


@contextmanager
def serving(model, processor, index=None, reranker=None, **settings):
    """A server in a thread of this process."""
    args = ServeArguments(port=0, **settings)
    server = Server(build_app(SugarEmbedder(model, processor, 8), "tiny", args, index, reranker), args)
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
