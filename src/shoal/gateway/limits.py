"""Bounds on what strangers may ask of the gateway: bytes, time, requests at once, host names."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.gateway.errors import RequestError, error_response

FAREWELL_S = 1.0
"""So long a client may take to hear that its answer was broken off."""
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]@/]*)(?::[0-9]{1,5})?")
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, slots=True)
class Limits:
    """Every default is meant for one gateway of a small organisation."""

    body_bytes: int = 4 * 1024 * 1024
    """Largest request body. A context of a million tokens is about this long as text."""
    body_timeout_s: float = 30.0
    """A body must have arrived whole by then."""
    head_timeout_s: float = 10.0
    """The request line and headers must have arrived by then; so long may a connection say nothing at first."""
    idle_timeout_s: float = 5.0
    """An answered connection is closed after so long without another request."""
    send_timeout_s: float = 60.0
    """A client that takes nothing of its answer for so long is treated as gone."""
    requests: int = 256
    """Requests for generation at once; one more gets 429."""
    connections: int = 1024
    """Open connections; one more is closed unanswered."""
    default_chat_tokens: int = 1024
    """Answer length where a chat names none. Room is reserved for the whole answer on every server, so an unnamed
    length must not mean the whole context."""
    ping_s: float = 10.0
    """A waiting stream says so this often; proxies give up on silent connections after 30 s or more."""
    shutdown_s: float = 30.0
    """Running answers may take so long to end when the gateway stops."""
    kept_answer_s: float = 3600.0
    """So long the answer to a request with an idempotency key is kept for a retry."""
    kept_answer_bytes: int = 4 * 1024 * 1024
    """An answer that is longer is sent, but not kept."""
    kept_answers_bytes: int = 64 * 1024 * 1024
    """Room for all kept answers; one API key may fill a quarter of it. The oldest go first."""


class BodyTooLarge(RequestError):
    """More bytes than the limit, declared or sent."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than {limit_bytes} bytes.", code="body_too_large", status=413)


class ClientGone(Exception):
    """The client closed the connection, or reads no more, before its answer was complete. Nobody is left to be told."""


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The request body, never holding more than `limits.body_bytes` of it.

    Raises RequestError: 413 too large (from the declared length before reading, else while reading, so chunked bodies
    are bounded too), 408 too slow, 415 compressed. Raises ClientGone when the connection ends first.
    """
    headers = Headers(scope=scope)
    if headers.get("content-encoding", "identity") != "identity":
        raise RequestError("Compressed request bodies are not taken.", code="unsupported_encoding", status=415)
    declared = headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared) > limits.body_bytes:
        raise BodyTooLarge(limits.body_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                if len(body) + len(message.get("body", b"")) > limits.body_bytes:
                    raise BodyTooLarge(limits.body_bytes)
                body += message.get("body", b"")
                more = message.get("more_body", False)
    except TimeoutError as error:
        raise RequestError(
            f"The request body did not arrive within {limits.body_timeout_s:g} s.", code="body_timeout", status=408
        ) from error
    return bytes(body)


def patient(send: Send, limits: Limits) -> Send:
    """`send` that raises ClientGone when the client takes nothing for `limits.send_timeout_s`."""

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(limits.send_timeout_s):
                await send(message)
        except TimeoutError as error:
            raise ClientGone from error

    return send_in_time


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it the moment the client closes its connection: ClientGone. Raises what `work` raises."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnection(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Gate:
    """Counts the requests that are being answered and turns away what would be one too many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Raises RequestError (429) when `limit` requests are inside."""
        if self._inside >= self._limit:
            raise RequestError(
                f"The gateway is answering {self._limit} requests, as many as it takes at once.",
                code="too_many_requests",
                status=429,
                retry_after_s=1.0,
                headers={
                    "x-ratelimit-limit-requests": str(self._limit),
                    "x-ratelimit-remaining-requests": "0",
                    "x-ratelimit-reset-requests": "1s",
                },
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


class HostCheck:
    """Refuses a Host header that is not ours.

    A web page can point its own name at 127.0.0.1 (DNS rebinding) and then read a local service as its own origin;
    the name in the Host header gives it away.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = LOOPBACK_NAMES | {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _host_name(scope) not in self._hosts:
            refusal = RequestError("The Host header names another service.", code="host_not_allowed", status=403)
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _host_name(scope: Scope) -> str:
    """The Host header without its port, in lower case; empty when there is none, or when it is more than that."""
    match = _HOST.fullmatch(Headers(scope=scope).get("host", "").lower())
    return match[1] if match else ""
