"""Messages <-> metadata of a frame, and the rules that need to know what a message means.

The frame's kind byte is the message's tag. A decoded message was checked in full: types, ranges (which
no NaN passes), unknown fields, and that the body announced by the frame is exactly as long as its tensor says.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from shoal.errors import ProtocolError
from shoal.wire.frames import FRAGMENT_BYTES, Lane
from shoal.wire.messages import (
    MAX_META_BYTES,
    Assign,
    Close,
    Denied,
    Drain,
    Draining,
    Fault,
    Gone,
    Hello,
    Journal,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Relink,
    Relinked,
    Renew,
    Renewed,
    Result,
    Step,
    Sync,
)
from shoal.wire.tensors import body_bytes as tensor_bytes

Rows = Step | Result | Journal
"""The messages that have a body: rows of activations."""

_ENCODER = msgspec.msgpack.Encoder()
KINDS: dict[int, type[Any]] = {cls.__struct_config__.tag: cls for cls in get_args(Message)}
_KIND_OF: dict[type[Any], int] = {cls: kind for kind, cls in KINDS.items()}
_DECODERS: dict[int, msgspec.msgpack.Decoder[Any]] = {kind: msgspec.msgpack.Decoder(cls) for kind, cls in KINDS.items()}

_ANYONE = frozenset[type[Any]]({Hello, Ping, Pong, Fault, Sync, Renew})
MAY_SEND: dict[str, frozenset[type[Any]]] = {
    "server": _ANYONE | {Opened, Denied, Step, Result, Journal, Relinked, Gone, Draining},
    "client": _ANYONE | {Open, Step, Relink, Close},
    "gateway": _ANYONE | {Open, Step, Relink, Close, Assign, Renewed},
    "admin": _ANYONE | {Assign, Drain, Renewed},
}
"""Which messages a role may send; the role is the one in the sender's certificate."""


def encode(message: Message) -> tuple[int, bytes]:
    """(kind, metadata). Raises ValueError for a message that exceeds MAX_META_BYTES: send it in parts."""
    meta = _ENCODER.encode(message)
    if len(meta) > MAX_META_BYTES:
        raise ValueError(f"{type(message).__name__} takes {len(meta)} bytes; a frame has room for {MAX_META_BYTES}")
    return _KIND_OF[type(message)], meta


def decode(kind: int, meta: bytes, body_len: int) -> Message:
    """The message of a frame whose body will be `body_len` bytes long. Raises ProtocolError."""
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise ProtocolError(f"The peer sent a message of unknown kind {kind}.")
    try:
        message: Message = decoder.decode(meta)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"The peer sent a malformed {KINDS[kind].__name__}: {error}") from error
    if body_len != body_bytes(message):
        raise ProtocolError(
            f"The peer sent a {KINDS[kind].__name__} with a body of {body_len} bytes; "
            f"its tensor takes {body_bytes(message)}.",
        )
    if isinstance(message, Rows) and sum(item.rows for item in message.items) != message.tensor.rows:
        raise ProtocolError(f"The peer sent a {KINDS[kind].__name__} whose items do not add up to its tensor's rows.")
    return message


def body_bytes(message: Message) -> int:
    """How long the body of this message is."""
    return tensor_bytes(message.tensor) if isinstance(message, Rows) else 0


def lane(message: Message) -> Lane:
    """Which stream a message takes.

    Decode rows and everything that fits one fragment are urgent: a person waits for them. Journals are on nobody's
    critical path, and a Sync may be long and can wait.
    """
    if isinstance(message, Step | Result):
        decode_only = message.tensor.rows == len(message.items)
        return Lane.URGENT if decode_only or body_bytes(message) <= FRAGMENT_BYTES else Lane.BULK
    return Lane.JOURNAL if isinstance(message, Journal | Sync) else Lane.CONTROL


def order_keys(message: Message) -> tuple[bytes, ...]:
    """Sessions whose messages must not overtake each other between the urgent and the bulk lane."""
    return tuple(item.session for item in message.items) if isinstance(message, Step | Result) else ()
