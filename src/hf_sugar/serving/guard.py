"""What every request meets before it is looked at: the key, the limits, the clock."""

import asyncio
import functools
import hmac
import logging
import re
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Histogram
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ServeArguments


logger = logging.getLogger(__name__)

BODIES = 16  # of the largest size, kept at a time
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the form that clients of OpenAI read, in one line."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": " ".join(message.split()), "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


class Guard:
    """Middleware of every path; the key and the limits are of those under `/v1/`. A request that its client has left is
    cancelled."""

    def __init__(self, app: ASGIApp, args: ServeArguments, registry: CollectorRegistry):
        self.app, self.args, self.taken, self.kept = app, args, 0, 0
        labels = ["path", "status"]
        self.seconds = Histogram("hf_sugar_request_seconds", "Seconds of a request.", labels, registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, headers = time.monotonic(), None, dict(scope["headers"])

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check_host(headers)
            if not scope["path"].startswith("/v1/"):
                return await self.app(scope, receive, sent)
            self._check(headers)
            self.taken, body = self.taken + 1, []
            try:
                if await self._read(body, receive):
                    await self._run(scope, body[0], receive, sent, lambda: status is not None)
            finally:
                self.taken, self.kept = self.taken - 1, self.kept - sum(map(len, body))
        except HTTPException as error:
            await error_response(error.status_code, error.detail, error.headers)(scope, receive, sent)
        except Exception:
            logger.exception("%s failed.", scope["path"])
            if status is None:
                await error_response(500, "The server failed; its log says why.")(scope, receive, sent)
        finally:
            path = scope["path"] if "route" in scope else "other"  # clients make up no labels
            self.seconds.labels(path, status or "left").observe(time.monotonic() - start)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        name = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1"))
        # a web page whose name leads to this machine would otherwise be let in by its visitor
        if not self.args.api_key and self.args.host in LOOPBACK and name not in LOOPBACK:
            raise HTTPException(403, f"The host {name[:100]!r} is not this machine; set an API key to be called so.")

    def _check(self, headers: dict[bytes, bytes]) -> None:
        key = self.args.api_key
        if key and not hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + key.encode()):
            raise HTTPException(401, "The API key is missing or wrong.", {"WWW-Authenticate": "Bearer"})
        if self.taken >= self.args.max_requests:
            raise HTTPException(429, f"{self.taken} requests are at work or wait; come again.", {"Retry-After": "1"})

    async def _read(self, body: list[bytes], receive: Receive) -> bool:
        """Fill `body` with one piece, the whole; false if the client has gone. Of one that is too large some more is read
        and dropped, or the client would not come to read why."""
        size, limit = 0, self.args.max_body
        try:
            async with asyncio.timeout(self.args.body_timeout):
                while size <= 4 * limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size <= limit and self.kept + len(piece) <= BODIES * limit:
                        body.append(piece)
                        self.kept += len(piece)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise HTTPException(408, f"The body did not come within {self.args.body_timeout:g} seconds.") from None
        if size > limit:
            raise HTTPException(413, f"The body is larger than {limit} bytes; send fewer or smaller pictures.")
        body[:] = [b"".join(body)]
        if len(body[0]) < size:
            raise HTTPException(429, "Other requests have sent too much; come again.", {"Retry-After": "1"})
        return True

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send, begun: Callable[[], bool]) -> None:
        waiting: list[Message] = [{"type": "http.request", "body": body}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await asyncio.Future()

        task = asyncio.ensure_future(self.app(scope, replay, send))
        gone = asyncio.ensure_future(receive())  # nothing is left to come but the end of the connection
        try:
            wait = functools.partial(asyncio.wait, {task, gone}, return_when=asyncio.FIRST_COMPLETED)
            done, _ = await wait(timeout=self.args.request_timeout)
            if not done and not begun():
                late = f"The request took longer than {self.args.request_timeout:g} seconds; ask for less at a time."
                raise HTTPException(503, late, {"Retry-After": "10"})
            if not done:  # a stream, whose answer ends at its own time
                await wait()
            if task.done():
                task.result()
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
