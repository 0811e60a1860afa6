"""The OpenAI-compatible server: routes, limits, metrics, and a drain that lets running answers finish.

    /v1/completions  /v1/chat/completions  /v1/models  /health  /metrics

What a request may hold is in `protocol.py`, what decodes in `batching.py`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qat.errors import UserError, problem
from qat.progress import say
from qat.serve.batching import Draining, Event, QueueFull, Sequence, Service
from qat.serve.generate import TextModel
from qat.serve.protocol import Reply, Request, RequestError, parse

RETRY_AFTER = {"Retry-After": "1"}
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)


@dataclass(frozen=True)
class Limits:
    """What a server takes: waiting sequences, bytes and seconds of a body, seconds of a drain; the key it asks for."""

    queue: int = 64
    body_bytes: int = 2**20
    drain_seconds: float = 30.0
    api_key: str | None = None
    body_seconds: float = 30.0


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("qat_requests", "Requests by path and status", ["path", "status"], **own)
        self.finished = Counter("qat_answers", "Answers by how they ended", ["finish"], **own)
        self.prompt_tokens = Counter("qat_prompt_tokens", "Prompt tokens of requests taken", **own)
        self.answer_tokens = Counter("qat_answer_tokens", "Tokens generated", **own)
        self.first = Histogram(
            "qat_first_token_seconds", "From request to first token", buckets=FIRST_TOKEN_BUCKETS, **own
        )
        self.each = Histogram("qat_token_seconds", "Between two tokens", buckets=TOKEN_BUCKETS, **own)
        Gauge("qat_queue_length", "Sequences that wait for a slot", **own).set_function(lambda: service.waiting)
        Gauge("qat_active_slots", "Sequences in slots", **own).set_function(lambda: service.active)
        Gauge("qat_slots", "Sequences that can decode at a time", **own).set(service.runner.slots)


class Answer:
    """A submitted request on the side of the event loop: its events, and the metrics they move."""

    def __init__(self, service: Service, metrics: Metrics, request: Request):
        self._service, self._metrics = service, metrics
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._last = time.monotonic()
        self.tokens = 0
        self.sequence: Sequence = service.submit(request.prompt, request.sampling, self._hear)
        metrics.prompt_tokens.inc(len(request.prompt))

    def _hear(self, event: Event) -> None:
        """From the service's thread."""
        if event.token is not None:
            now = time.monotonic()
            (self._metrics.each if self.tokens else self._metrics.first).observe(now - self._last)
            self._last = now
            self.tokens += 1
            self._metrics.answer_tokens.inc()
        if event.finish:
            self._metrics.finished.labels(event.finish).inc()
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """Every event up to the last; leaving early cancels the sequence.

        Raises:
            RequestError: the answer could not be computed, or the server gave it up.
        """
        try:
            while True:
                event = await self._events.get()
                if event.finish == "error":
                    raise RequestError(500, f"answer: must be computable, got {event.error}. See the server's log.")
                if event.finish == "cancelled":
                    raise RequestError(503, "server: must run on, got a shutdown. Send the request again.")
                yield event
                if event.finish:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the sequence if it runs."""
        self._service.cancel(self.sequence)


def make_app(model: TextModel, service: Service, limits: Limits) -> Starlette:
    """The web application; `service` runs already."""
    metrics = Metrics(service)

    async def chat(http: HttpRequest) -> Response:
        return await _answer(http, True)

    async def complete(http: HttpRequest) -> Response:
        return await _answer(http, False)

    async def _answer(http: HttpRequest, is_chat: bool) -> Response:
        if service.is_draining:
            raise Draining
        _check_key(http, limits.api_key)
        body = await _body(http, limits)
        positions = service.runner.positions
        request = await asyncio.to_thread(parse, body, is_chat, model.name, model.tokenizer, positions)
        try:
            answer = Answer(service, metrics, request)
        except UserError as error:
            code = "context_length_exceeded" if str(error).startswith("context") else None
            raise RequestError(400, str(error), "messages" if is_chat else "prompt", code) from None
        reply = Reply(request, model.name)
        if request.is_streamed:
            return StreamingResponse(_server_sent(answer, reply), media_type="text/event-stream")
        return await _whole(http, answer, reply)

    async def models(http: HttpRequest) -> Response:
        _check_key(http, limits.api_key)
        one = {"id": model.name, "object": "model", "created": started, "owned_by": "qat"}
        return JSONResponse({"object": "list", "data": [one | {"max_model_len": service.runner.positions}]})

    async def health(http: HttpRequest) -> Response:
        if service.is_draining or not service.is_alive:
            return JSONResponse({"status": "draining" if service.is_alive else "dead"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics_text(http: HttpRequest) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    started = int(time.time())
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/metrics", metrics_text),
    ]
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(ERRORS, _error))
    paths = {route.path for route in routes}

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        """The application with its statuses counted; paths that are not served are one."""
        path = scope.get("path") if scope.get("path") in paths else "other"

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await app(scope, receive, sent if scope["type"] == "http" else send)

    return counted  # type: ignore[return-value]


ERRORS: tuple[Any, ...] = (RequestError, QueueFull, Draining, ClientDisconnect, HTTPException, Exception)


async def _error(http: HttpRequest, error: Exception) -> Response:
    """The error object of whatever went wrong."""
    headers = {}
    if isinstance(error, QueueFull):
        headers = RETRY_AFTER
        error = RequestError(429, "server: must have room in its queue, got as many requests as wait. Try again soon.")
    elif isinstance(error, Draining):
        headers = RETRY_AFTER
        error = RequestError(503, "server: must run on, got a shutdown. Send the request to another server.")
    elif isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        message = f"{http.method} {http.url.path[:100]}: must be a path and method that are served, got {error.detail}."
        error = RequestError(error.status_code, f"{message} See /v1/models.")
    elif isinstance(error, ClientDisconnect):
        error = RequestError(400, "client: must stay connected, got a closed connection. Send the request again.")
    elif not isinstance(error, RequestError):
        # Starlette raises it again afterwards, so that it stands in the log with its traceback
        error = RequestError(500, f"server: must not fail, got {type(error).__name__}. See the server's log.")
    return JSONResponse(error.body(), error.status, headers)


def _check_key(http: HttpRequest, key: str | None) -> None:
    given = http.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
        raise RequestError(401, "api key: must be that of this server, got another. Send it as a Bearer token.")


async def _body(http: HttpRequest, limits: Limits) -> bytes:
    """The bytes of a request; a body too large is refused before all of it has come, one too slow is given up."""
    held, most = bytearray(), limits.body_bytes
    refusal = RequestError(413, f"body: must have at most {most} bytes, got more. Send a shorter prompt.")
    length = http.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise refusal
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in http.stream():
                held += chunk
                if len(held) > most:
                    raise refusal
    except TimeoutError:
        message = f"body: must come within {limits.body_seconds:g} s, got a part of it. Send the request again."
        raise RequestError(408, message) from None
    return bytes(held)


async def _whole(http: HttpRequest, answer: Answer, reply: Reply) -> Response:
    """The answer in one piece; a client that leaves cancels it."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        answer.cancel()

    watcher = asyncio.create_task(watch())
    text = ""
    try:
        async for event in answer.events():
            text += event.text
    finally:
        watcher.cancel()
    return JSONResponse(reply.whole(text, str(event.finish), answer.tokens))


async def _server_sent(answer: Answer, reply: Reply) -> AsyncIterator[str]:
    """The answer as server-sent events; an error after the first one is an event as well."""

    def line(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    events = answer.events()
    try:
        if reply.request.is_chat:
            yield line(reply.chunk("", is_first=True))
        async for event in events:
            if event.text:
                yield line(reply.chunk(event.text))
        yield line(reply.chunk("", str(event.finish)))
        if reply.request.has_usage:
            yield line(reply.last_chunk(answer.tokens))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield line(error.body())
    finally:
        answer.cancel()


class _DrainingServer(uvicorn.Server):
    """A signal lets running answers finish while new ones get 503; a second one ends the process."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float):
        super().__init__(config)
        self._service, self._seconds = service, seconds
        self._tasks: list[asyncio.Task[None]] = []
        self._is_told = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        # uvicorn raises signals that it has seen again when it is done; this one is answered, so the exit code is 0
        is_second, self._is_told = self._is_told, True
        if self._loop is None:
            self.should_exit = self.force_exit = True
        elif is_second:
            say(f"{signal.Signals(sig).name}: stopping now")
            self._loop.call_soon_threadsafe(self._stop)
        else:
            say(f"{signal.Signals(sig).name}: finishing what runs, at most {self._seconds:.0f} s")
            self._loop.call_soon_threadsafe(lambda: self._tasks.append(asyncio.ensure_future(self._drain())))

    def _stop(self) -> None:
        # the thread that drains has to end before the process can
        self._service.cancel_all()
        self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        if not await asyncio.to_thread(self._service.drain, self._seconds):
            say("drain: answers were cancelled")
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Raises UserError when it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        fix = "Name another with --host and --port (0 takes any that is free)."
        raise UserError(problem(f"{host}:{port}", "must be an address that is free", error, fix)) from None


def run_server(model: TextModel, sock: socket.socket, limits: Limits) -> None:
    """Serve on a bound socket until a signal comes."""
    service = Service(model.runner, model.tokenizer, model.ends, limits.queue)
    config = uvicorn.Config(
        make_app(model, service, limits),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    host, port = sock.getsockname()[:2]
    say(f"{model.name}: http://{host}:{port}/v1 ({model.runner.slots} slots of {model.runner.positions} tokens)")
    try:
        _DrainingServer(config, service, limits.drain_seconds).run([sock])
    finally:
        service.close()
