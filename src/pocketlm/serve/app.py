"""The routes: an ASGI application over one Service.

Nothing but JSON is taken under `/v1`, so that a page of another site cannot post here without
asking the browser first, and on loopback only hosts of that name, so that it cannot rename itself.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pocketlm.core.errors import PocketLMError
from pocketlm.serve.requests import BadRequest, ChatRequest, CompletionRequest, Request, parse
from pocketlm.serve.responses import Shape, error_json
from pocketlm.serve.scheduler import Ask, Busy, Chance, End, Event, Piece, Ticket
from pocketlm.serve.service import Service

log = logging.getLogger("pocketlm.serve")
GRACE = 10.0  # seconds that answers have left when the server is told to stop
BODY_SECONDS = 30.0  # that a request may take to arrive
LOOPBACK = ["localhost", "127.0.0.1", "[::1]", "::1"]
POLICY = (  # the page's own script and style, this server, nothing else
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(service: Service, *, api_key: str | None = None, loopback: bool = True) -> Starlette:
    """The application.

    Args:
        service: The model. The application closes its scheduler when it goes down.
        api_key: What clients must bring as a bearer token; None: nothing.
        loopback: Whether only requests to this machine's own name are taken.

    Returns:
        An ASGI application.
    """
    routes = _Routes(service, api_key)
    middleware = []
    if loopback:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK))
    return Starlette(
        routes=[
            Route("/", _page),
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/chat/completions", partial(routes.complete, ChatRequest), methods=["POST"]),
            Route("/v1/completions", partial(routes.complete, CompletionRequest), methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={
            BadRequest: _failure,
            PocketLMError: _failure,
            HTTPException: _http_failure,
            Exception: _failure,
        },
        lifespan=routes.lifespan,
    )


class _Routes:
    def __init__(self, service: Service, api_key: str | None) -> None:
        self._service, self._api_key = service, api_key
        self._tokenizing = ThreadPoolExecutor(1, "pocketlm-tokenizer")

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._service.scheduler.close, GRACE)
        self._tokenizing.shutdown()

    async def health(self, http: HttpRequest) -> Response:
        scheduler = self._service.scheduler
        state = {"running": scheduler.running, "waiting": scheduler.waiting}
        if not scheduler.alive:
            return JSONResponse({"status": "down", **state}, 503)
        return JSONResponse({"status": "ok", **state})

    async def models(self, http: HttpRequest) -> Response:
        self._check_key(http)
        one = {
            "id": self._service.name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "pocketlm",
            "max_model_len": self._service.limits.positions,
        }
        return JSONResponse({"object": "list", "data": [one]})

    async def complete(self, kind: type[Request], http: HttpRequest) -> Response:
        self._check_key(http)
        request = parse(kind, await self._body(http))
        asking = partial(self._service.asks, request)
        asks = await asyncio.get_running_loop().run_in_executor(self._tokenizing, asking)
        shape = Shape(request, asks, self._service.name, self._service.token_text)
        answers = _Answers(self._service, asks)
        if request.stream:
            stream = _stream(answers, shape, wants_usage=request.wants_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers=_UNCACHED)
        whole = asyncio.ensure_future(_whole(answers, shape))
        gone = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            return JSONResponse(whole.result())
        finally:
            answers.cancel()
            whole.cancel()
            gone.cancel()

    def _check_key(self, http: HttpRequest) -> None:
        if self._api_key is None:
            return
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode(), self._api_key.encode()
        ):
            raise BadRequest("the API key is missing or wrong.", code="invalid_api_key", status=401)

    async def _body(self, http: HttpRequest) -> bytes:
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest("send Content-Type: application/json.", status=415)
        most = self._service.limits.body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > most:
                        raise BadRequest(f"the request is larger than {most:,} bytes.", status=413)
        except TimeoutError:
            raise BadRequest("the request came too slowly.", status=408) from None
        return bytes(body)


_UNCACHED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class _Answers:
    """The events of some asks, as they come, in the event loop.

    Args:
        service: Whose scheduler is asked.
        asks: What.

    Raises:
        Busy: If not all of them find a place in the queue.
    """

    def __init__(self, service: Service, asks: Sequence[Ask]) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self.count = len(asks)

        def tell(index: int, event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it those who listened
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            for index, ask in enumerate(asks):
                self._tickets.append(service.scheduler.submit(ask, partial(tell, index)))
        except Busy:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Frees the rows of what is still under way."""
        for ticket in self._tickets:
            ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Piece | End]]:
        """Index and event, until all have ended.

        Raises:
            PocketLMError: If one failed; the others are cancelled.
        """
        left = self.count
        try:
            while left:
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, End)
                yield index, event
        finally:
            self.cancel()


async def _whole(answers: _Answers, shape: Shape) -> dict[str, Any]:
    texts = [""] * answers.count
    chances: list[list[Chance]] = [[] for _ in texts]
    ends = [End("length", 0)] * answers.count
    async for index, event in answers.events():
        if isinstance(event, End):
            ends[index] = event
        else:
            texts[index] += event.text
            chances[index] += event.chances
    return shape.whole(texts, chances, ends)


async def _stream(answers: _Answers, shape: Shape, *, wants_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first of them is one more event."""
    ends = [End("length", 0)] * answers.count
    try:
        for index in range(answers.count):
            if (opening := shape.opening(index)) is not None:
                yield _event(opening)
        async for index, event in answers.events():
            if isinstance(event, End):
                ends[index] = event
                yield _event(shape.closing(index, event))
            else:
                yield _event(shape.piece(index, event.text, event.chances))
        if wants_usage:
            yield _event(shape.counts(ends))
    except Exception as error:
        log.warning("an answer failed: %s", error)
        yield _event(error_json(error)[1])
    finally:
        answers.cancel()
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _page(http: HttpRequest) -> Response:
    text = files("pocketlm.serve").joinpath("page.html").read_text("utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, **_UNCACHED})


async def _failure(http: HttpRequest, error: Exception) -> Response:
    status, body = error_json(error)
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(body, status, headers=headers)


async def _http_failure(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    bad = BadRequest(f"{http.method} {http.url.path}: {error.detail}.", status=error.status_code)
    status, body = error_json(bad)
    return JSONResponse(body, status, headers=error.headers)
