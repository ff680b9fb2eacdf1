"""The interfaces of `hf-sugar serve`."""

import asyncio
import base64
import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from ..inference import SugarEmbedder
from ..models.rows_sugar import fill_images
from ..retrieval import Hit, Index, SugarRAG
from .config import ServeArguments
from .guard import Guard, error_response
from .requests import (
    ChatRequest,
    EmbeddingRequest,
    Request,
    RerankRequest,
    SearchRequest,
    read_contents,
    read_messages,
)
from .worker import Answer, ModelWorker


def build_app(
    embedder: SugarEmbedder, name: str, args: ServeArguments, index: Index | None = None, reranker: Any = None
) -> FastAPI:
    """
    The server of a model, an ASGI application. Its `state.worker` owns the model from now on.

    Args:
        embedder ([`SugarEmbedder`]): What embeds; its model answers. Its `batch_size` is that of both.
        name (`str`): What requests call the model.
        args ([`ServeArguments`]): The limits.
        index ([`Index`], *optional*): With the same embedder, for `/v1/search` and for answers with retrieval.
        reranker (`Any`, *optional*):
            Has `score(pairs, names)` as [`SugarReranker`] does. Without one `/v1/rerank` scores by the cosine of the
            embeddings.
    """
    registry = CollectorRegistry()
    of = {"labelnames": ["kind"], "registry": registry}
    sizes = Histogram("hf_sugar_batch_size", "Computed together.", buckets=[1, 2, 4, 8, 16, 32, 64], **of)
    tokens = Counter("hf_sugar_tokens", "Tokens read and written.", **of)
    worker = ModelWorker(embedder, lambda kind, size: sizes.labels(kind).observe(size))
    Gauge("hf_sugar_waiting", "Inputs that wait.", registry=registry).set_function(lambda: len(worker.waiting))
    context, created = worker.generator.max_length, int(time.time())

    app = FastAPI(title=f"hf_sugar: {name}", openapi_url=None)
    app.state.worker = worker
    app.add_middleware(Guard, args=args, registry=registry)

    @app.exception_handler(HTTPException)
    async def refused(_: Any, error: HTTPException) -> Response:
        return error_response(error.status_code, SAID.get(error.detail, error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def misunderstood(_: Any, error: RequestValidationError) -> Response:
        return error_response(400, _sentence(error.errors()[0]))

    @app.exception_handler(ValueError)
    async def wrong(_: Any, error: ValueError) -> Response:
        return error_response(400, str(error))

    def usage(read: int, written: int = 0) -> dict[str, int]:
        tokens.labels("read").inc(read)
        tokens.labels("written").inc(written)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def check(request: Request, needs_index: bool = False) -> None:
        if request.model not in (None, name):
            raise HTTPException(404, f"There is no model {request.model[:100]!r} here; it is called {name!r}.")
        if needs_index and index is None:
            raise ValueError("This server has no index; it is started with `--index` to search or cite.")

    async def results(jobs: list[Future]) -> list[Any]:
        """What the model gives. Where one job fails, or nobody waits any more, those that wait are not begun."""
        futures = [asyncio.wrap_future(job) for job in jobs]
        try:
            return await asyncio.gather(*futures)
        except RuntimeError as error:
            raise HTTPException(503 if worker.stopping else 500, str(error)) from error
        finally:
            for future in futures:
                future.cancel()

    async def embed(items: list[Any], names: list[str], roles: list[str | None]) -> tuple[np.ndarray, int]:
        """Embeddings, and how many tokens the items have together."""
        found = await results([worker.embed(*each) for each in zip(items, names, roles, strict=True)])
        return np.stack([embedding for embedding, _ in found]), sum(length for _, length in found)

    def shown(hit: Hit) -> dict[str, Any]:
        row = index.documents[hit.index]
        parts = [part for message in fill_images(row["messages"], row["images"]) for part in message["content"]]
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        return {"index": hit.index, "score": hit.score, "slice": hit.slice, "id": hit.name, "text": text}

    @app.get("/health")
    async def health() -> Response:
        return error_response(503, "The server is stopping.") if worker.stopping else Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": created, "owned_by": "hf_sugar", "max_model_len": context}
        return {"object": "list", "data": [model]}

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingRequest) -> dict[str, Any]:
        check(request)
        size = request.dimensions or embedder.dim
        if size > embedder.dim:
            raise ValueError(f"`dimensions` is {size}; the embeddings have {embedder.dim}.")
        if request.messages:
            items = {"the conversation": await read_messages(request.messages, args)}
        else:
            contents = {f"input[{n}]": content for n, content in enumerate(request.input)}
            items = dict(zip(contents, await read_contents(contents, args)))
        vectors, length = await embed(list(items.values()), list(items), [request.input_type] * len(items))
        vectors = vectors[:, :size] / np.linalg.norm(vectors[:, :size], axis=1, keepdims=True)
        if request.encoding_format == "base64":
            coded = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        else:
            coded = vectors.tolist()
        data = [{"object": "embedding", "index": n, "embedding": each} for n, each in enumerate(coded)]
        return {"object": "list", "data": data, "model": name, "usage": usage(length)}

    @app.post("/v1/rerank")
    async def rerank(request: RerankRequest) -> dict[str, Any]:
        check(request)
        contents = {"query": request.query} | {f"documents[{n}]": each for n, each in enumerate(request.documents)}
        items = await read_contents(contents, args)
        if reranker is None:
            vectors, _ = await embed(items, list(contents), ["query"] + ["document"] * (len(items) - 1))
            scores = (vectors[1:] @ vectors[0]).tolist()
        else:
            pairs, names, scores = [(items[0], item) for item in items[1:]], list(contents)[1:], []
            for at in range(0, len(pairs), embedder.batch_size):  # one after the other: what else waits goes between
                batch = slice(at, at + embedder.batch_size)
                scores += (await results([worker.call(reranker.score, pairs[batch], names[batch])]))[0].tolist()
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[: request.top_n]
        return {"model": name, "results": [{"index": n, "relevance_score": scores[n]} for n in order]}

    @app.post("/v1/search")
    async def search(request: SearchRequest) -> dict[str, Any]:
        check(request, needs_index=True)
        items = await read_contents({"query": request.query}, args)
        [[hits]] = await results([worker.call(index.search, items, request.k)])
        return {"object": "list", "data": [shown(hit) for hit in hits], "model": name}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> Any:
        check(request, needs_index=request.retrieval is not None)
        longest = request.max_tokens or min(args.max_new_tokens, context // 2)
        if longest > args.max_new_tokens:
            raise ValueError(f"`max_tokens` is {longest}; answers have at most {args.max_new_tokens} here.")
        deadline = time.monotonic() + args.request_timeout
        row = await read_messages(request.messages, args)
        used, k = (index, request.retrieval.k) if request.retrieval else (None, 1)
        [prompt] = await results(
            [worker.call(SugarRAG(embedder.model, embedder.processor, used, k, longest).prompt, row)]
        )
        row = {"messages": prompt.messages, "images": prompt.images}
        sampling: dict[str, Any] = {"do_sample": request.temperature > 0}
        if request.temperature > 0:
            sampling |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        answer = Answer(row, longest, sampling, request.seed, request.stop, deadline)
        base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.retrieval:
            base |= {"citations": [shown(hit) for hit in prompt.citations], "note": prompt.note}
        if request.stream:
            return StreamingResponse(chunks(answer, base, request.stream_options.include_usage), media_type=SSE)
        try:
            await results([worker.answer(answer)])
        finally:
            answer.closed = True
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        spent = usage(answer.prompt_tokens, len(answer.tokens))
        return base | {"object": "chat.completion", "choices": [choice], "usage": spent}

    async def chunks(answer: Answer, base: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events."""

        def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
            choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
            return _event(base | {"object": "chat.completion.chunk", "choices": choices})

        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        answer.put = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        done = asyncio.wrap_future(worker.answer(answer))
        done.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            yield event({"role": "assistant", "content": ""})
            while (piece := await pieces.get()) is not None:
                yield event({"content": piece})
            if error := done.exception():
                yield f"data: {error_response(503, str(error)).body.decode()}\n\n"
            else:
                yield event({}, answer.finish_reason)
                spent = usage(answer.prompt_tokens, len(answer.tokens))
                if include_usage:
                    yield _event(base | {"object": "chat.completion.chunk", "choices": [], "usage": spent})
            yield "data: [DONE]\n\n"
        finally:
            answer.closed = True
            done.cancel()

    return app


SSE = "text/event-stream"
SAID = {  # in place of the words of FastAPI and Starlette
    "There was an error parsing the body": "The body is no JSON that can be read.",
    "Not Found": "There is nothing at this path.",
    "Method Not Allowed": "This path takes another method.",
}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _sentence(error: dict[str, Any]) -> str:
    """What is wrong with a request, with the name of the field."""
    if error["type"] == "json_invalid":
        return f"The body is not JSON: {error['ctx']['error']}, at character {error['loc'][-1]}."
    path = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in error["loc"][1:]).lstrip(".")
    if not path and isinstance(error["input"], bytes | None):
        return "The body has to be JSON, with the header `Content-Type: application/json`."
    said = {"missing": " is missing", "extra_forbidden": " is not supported"}.get(error["type"], error["msg"])
    said = re.sub("^(Input|List|String|Value) should", " has to", said.replace("Value error, ", ": "))
    said = said.replace(" after validation", "").replace(
        "a valid dictionary or object to extract fields from", "an object"
    )
    return f"{f'`{path}`' if path else 'The body'}{said}."


class Server(uvicorn.Server):
    """Told to stop, it lets what runs come to its end, for `shutdown_timeout` seconds; then answers end where they are."""

    def __init__(self, app: FastAPI, args: ServeArguments):
        super().__init__(uvicorn.Config(app, args.host, args.port, access_log=False, http="h11"))
        self.worker, self.timeout = app.state.worker, args.shutdown_timeout

    async def shutdown(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().call_later(self.timeout, self.worker.stop)
        await super().shutdown(sockets)
