"""Answers as the gateway writes them: JSON, and streams of events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Send

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would collect the stream and hand it out in lumps.
    "x-accel-buffering": "no",
}
PING = b": ping\n\n"

_ENCODER = msgspec.json.Encoder()


def dumps(value: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return _ENCODER.encode(value)


def json_response(value: Any, status: int = 200) -> Response:
    return Response(dumps(value), status, media_type="application/json")


def event(value: dict[str, Any], name: str = "") -> bytes:
    """One event of a stream; `name` is its type where the endpoint has types."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + dumps(value) + b"\n\n"


async def send_json(send: Send, value: Any, headers: Mapping[str, str]) -> None:
    """A whole JSON answer with status 200."""
    body = dumps(value)
    await send_start(
        send, 200, {"content-type": "application/json", "content-length": str(len(body)), **headers}
    )  # fmt: skip
    await send_end(send, body)


async def send_start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def send_end(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})
