"""Frames from bytes and bytes from frames, without a socket: bytes in, frames out.

A message travels as one frame or, when its body is longer than FRAGMENT_BYTES, as several. Both sides can compute
where a body is cut, so the header carries no fragment length and a peer cannot choose silly ones:

    offset  size  field
    0       2     magic        0x4853 ("SH" on the wire)
    2       1     version      PROTOCOL_VERSION
    3       1     kind         tag of the message in the metadata
    4       1     flags        bit 0: continuation of the body that is open on this stream; all others zero
    5       3     reserved     zero
    8       4     stream       0 control, 1 urgent, 2 bulk, 3 journal
    12      4     seq          number of the message on its stream, from 0, modulo 2^32
    16      4     meta_len     bytes of metadata behind this header; zero in a continuation
    20      8     body_len     bytes of the whole body; repeated in every continuation
    28      4     deadline_ms  time the sender still gives this message, 0 for none; repeated likewise

All integers are little-endian. Behind header and metadata come min(FRAGMENT_BYTES, rest of the body) body bytes.

Small frames overtake large bodies because the writer picks the next fragment by lane, and every lane is a stream of
its own. The reader therefore has at most one open body per stream, each in one buffer allocated once, after the size
was checked against the budget and the metadata were accepted.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from shoal.errors import ProtocolError, Refused, ShoalError
from shoal.wire.messages import MAX_BODY_BYTES, MAX_META_BYTES, PROTOCOL_VERSION

MAGIC = 0x4853
FRAGMENT_BYTES = 64 * 1024
"""At 100 Mbit/s a fragment holds the line for 5 ms; smaller ones would cost more in headers and TLS records."""
CONTINUATION = 0x01

_HEADER = struct.Struct("<HBBB3sIIIQI")
HEADER_BYTES = _HEADER.size
_PREFIX = struct.Struct("<HB")
_NO_BODY = memoryview(b"")

Buffer: TypeAlias = bytes | bytearray | memoryview
T = TypeVar("T")


class Lane(IntEnum):
    """Which stream a message takes. Lower numbers go first; order is kept within a lane, not between lanes."""

    CONTROL = 0
    URGENT = 1
    BULK = 2
    JOURNAL = 3


@dataclass(frozen=True)
class Limits:
    """What one connection may cost the receiver.

    `max_body_bytes` bounds a single body. Four streams may each have one open, so a connection holds at most four
    times this, and only as fast as bytes really arrive (the buffers are allocated but not touched).
    """

    max_meta_bytes: int = MAX_META_BYTES
    max_body_bytes: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        if not 0 < self.max_meta_bytes <= MAX_META_BYTES or not 0 <= self.max_body_bytes <= MAX_BODY_BYTES:
            raise ValueError(f"limits exceed the protocol's own: {self}")


class Frame(NamedTuple, Generic[T]):
    """A complete message: what `describe` made of the metadata, and the body in one contiguous buffer."""

    message: T
    body: memoryview
    lane: Lane
    deadline_ms: int
    meta_bytes: int


class _Header(NamedTuple):
    magic: int
    version: int
    kind: int
    flags: int
    reserved: bytes
    stream: int
    seq: int
    meta_len: int
    body_len: int
    deadline_ms: int


@dataclass(slots=True)
class _OpenBody(Generic[T]):
    """A message whose body has not arrived completely."""

    header: _Header
    message: T
    buffer: memoryview
    filled: int = 0


class FrameReader(Generic[T]):
    """Turns received bytes into frames. `feed` may be given any cut of the byte stream.

    `describe(kind, meta, body_len)` decodes and checks the metadata; it runs before the body is allocated and raises
    ProtocolError for what it does not accept. After any error the stream has no frame border left, so the reader
    repeats that error for ever.
    """

    def __init__(self, describe: Callable[[int, bytes, int], T], limits: Limits | None = None) -> None:
        self._describe = describe
        self._limits = limits or Limits()
        self._head = bytearray()
        self._head_wanted = _PREFIX.size
        self._header: _Header | None = None
        self._open: dict[int, _OpenBody[T]] = {}
        self._next_seq = [0] * len(Lane)
        self._filling: _OpenBody[T] | None = None
        self._fragment_left = 0
        self._error: ShoalError | None = None

    def feed(self, data: Buffer) -> list[Frame[T]]:
        """Frames completed by `data`. Raises ProtocolError, or Refused for another protocol version."""
        if self._error is not None:
            raise self._error
        frames: list[Frame[T]] = []
        try:
            self._consume(memoryview(data), frames)
        except ShoalError as error:
            self._error = error
            self._open.clear()
            self._filling = None
            raise
        return frames

    def _consume(self, data: memoryview, frames: list[Frame[T]]) -> None:
        at = 0
        while at < len(data):
            if self._filling is not None:
                at += self._fill(self._filling, data[at : at + self._fragment_left], frames)
                continue
            taken = data[at : at + self._head_wanted - len(self._head)]
            self._head += taken
            at += len(taken)
            if len(self._head) == self._head_wanted:
                self._advance_head(frames)

    def _advance_head(self, frames: list[Frame[T]]) -> None:
        """The head grows in three steps, so that a stranger is turned away after three bytes."""
        if self._head_wanted == _PREFIX.size:
            _check_prefix(*_PREFIX.unpack(self._head))
            self._head_wanted = HEADER_BYTES
            return
        if self._header is None:
            self._header = _Header._make(_HEADER.unpack(self._head))
            self._check_header(self._header)
            self._head_wanted = HEADER_BYTES + self._header.meta_len
            if self._header.meta_len:
                return
        header, meta = self._header, bytes(self._head[HEADER_BYTES:])
        self._header = None
        self._head.clear()
        self._head_wanted = _PREFIX.size
        body = self._open[header.stream] if header.flags & CONTINUATION else self._begin(header, meta)
        self._fragment_left = min(FRAGMENT_BYTES, header.body_len - body.filled)
        if self._fragment_left:
            self._filling = body
        else:
            self._finish(body, frames)

    def _check_header(self, header: _Header) -> None:
        if header.flags & ~CONTINUATION or header.reserved != b"\0\0\0":
            raise ProtocolError("A frame sets flags or reserved bytes that this protocol version does not know.")
        if header.stream >= len(Lane):
            raise ProtocolError(f"A frame names stream {header.stream}; there are {len(Lane)}.")
        if header.body_len > self._limits.max_body_bytes:
            raise ProtocolError(
                f"A frame announces a body of {header.body_len} bytes; "
                f"this connection accepts {self._limits.max_body_bytes}.",
            )
        if header.seq != self._next_seq[header.stream]:
            raise ProtocolError(
                f"Stream {header.stream} skips from message {self._next_seq[header.stream]} to {header.seq}."
            )
        open_body = self._open.get(header.stream)
        if header.flags & CONTINUATION:
            if open_body is None:
                raise ProtocolError(f"Stream {header.stream} continues a body that was never begun.")
            same = header._replace(flags=0, meta_len=open_body.header.meta_len) == open_body.header
            if header.meta_len or not same:
                raise ProtocolError(f"Stream {header.stream} continues another message than the one it began.")
        elif open_body is not None:
            raise ProtocolError(f"Stream {header.stream} begins a message before the last one was complete.")
        elif not 0 < header.meta_len <= self._limits.max_meta_bytes:
            raise ProtocolError(
                f"A frame announces {header.meta_len} bytes of metadata; allowed are 1 to "
                f"{self._limits.max_meta_bytes}.",
            )

    def _begin(self, header: _Header, meta: bytes) -> _OpenBody[T]:
        message = self._describe(header.kind, meta, header.body_len)
        # np.empty, not bytearray: zeroing 64 MiB would stall the network loop, and untouched pages cost nothing.
        buffer = np.empty(header.body_len, np.uint8).data if header.body_len else _NO_BODY
        body = _OpenBody(header, message, buffer)
        self._open[header.stream] = body
        return body

    def _fill(self, body: _OpenBody[T], data: memoryview, frames: list[Frame[T]]) -> int:
        body.buffer[body.filled : body.filled + len(data)] = data
        body.filled += len(data)
        self._fragment_left -= len(data)
        if self._fragment_left == 0:
            self._filling = None
            if body.filled == body.header.body_len:
                self._finish(body, frames)
        return len(data)

    def _finish(self, body: _OpenBody[T], frames: list[Frame[T]]) -> None:
        stream = body.header.stream
        del self._open[stream]
        self._next_seq[stream] = (self._next_seq[stream] + 1) % 2**32
        frames.append(Frame(body.message, body.buffer, Lane(stream), body.header.deadline_ms, body.header.meta_len))


def _check_prefix(magic: int, version: int) -> None:
    if magic != MAGIC:
        raise ProtocolError("The peer does not speak the shoal protocol (wrong first bytes).")
    if version != PROTOCOL_VERSION:
        raise Refused(
            f"The peer speaks protocol version {version}, this side speaks version {PROTOCOL_VERSION}.",
            hint="Run the same shoal release on every machine of the swarm.",
        )


@dataclass(slots=True)
class _Outgoing:
    kind: int
    meta: bytes
    body: deque[memoryview]
    body_len: int
    deadline_ms: int
    order_keys: Sequence[bytes]
    seq: int = -1
    sent: int = 0


@dataclass(slots=True)
class _LaneQueue:
    messages: deque[_Outgoing] = field(default_factory=deque)
    queued_bytes: int = 0
    next_seq: int = 0


class FrameWriter:
    """Queues messages by lane and hands out the next frame to write.

    Control goes first, then urgent, then bulk and journal in turns. After URGENT_BURST urgent frames in a row one
    waiting bulk frame goes, so a busy decode cannot starve the journal.

    `order_keys` (session ids) name what must stay in order between URGENT and BULK: an urgent message joins the bulk
    lane while a bulk message with a common key still waits there.
    """

    URGENT_BURST = 16

    def __init__(self) -> None:
        self._lanes = [_LaneQueue() for _ in Lane]
        self._bulk_keys: Counter[bytes] = Counter()
        self._urgent_in_a_row = 0
        self._last_slow = Lane.JOURNAL

    def __bool__(self) -> bool:
        """True when a frame waits."""
        return any(lane.messages for lane in self._lanes)

    def queued_bytes(self, lane: Lane) -> int:
        return self._lanes[lane].queued_bytes

    def queued_messages(self, lane: Lane) -> int:
        return len(self._lanes[lane].messages)

    def push(
        self,
        kind: int,
        meta: bytes,
        body: Iterable[Buffer] = (),
        *,
        lane: Lane = Lane.CONTROL,
        deadline_ms: int = 0,
        order_keys: Sequence[bytes] = (),
    ) -> None:
        """Queue one message. The buffers of `body` are not copied here and must not change afterwards."""
        if not 0 < len(meta) <= MAX_META_BYTES:
            raise ValueError(f"metadata of {len(meta)} bytes; allowed are 1 to {MAX_META_BYTES}")
        if not 0 <= deadline_ms < 2**32:
            raise ValueError(f"deadline of {deadline_ms} ms; allowed are 0 to {2**32 - 1}")
        parts = deque(part for part in (memoryview(buffer).cast("B") for buffer in body) if len(part))
        body_len = sum(map(len, parts))
        if body_len > MAX_BODY_BYTES:
            raise ValueError(f"body of {body_len} bytes; allowed are {MAX_BODY_BYTES}")
        if lane is Lane.URGENT and self._bulk_keys and any(key in self._bulk_keys for key in order_keys):
            lane = Lane.BULK
        if lane is Lane.BULK:
            self._bulk_keys.update(order_keys)
        queue = self._lanes[lane]
        queue.messages.append(_Outgoing(kind, meta, parts, body_len, deadline_ms, order_keys))
        queue.queued_bytes += len(meta) + body_len

    def next_frame(self) -> list[Buffer] | None:
        """Buffers of the next frame in order (header, metadata, body), or None when nothing waits."""
        lane = self._choose()
        if lane is None:
            return None
        queue = self._lanes[lane]
        message = queue.messages[0]
        first = message.seq < 0
        if first:
            message.seq = queue.next_seq
            queue.next_seq = (queue.next_seq + 1) % 2**32
        meta = message.meta if first else b""
        size = min(FRAGMENT_BYTES, message.body_len - message.sent)
        header = _HEADER.pack(
            MAGIC,
            PROTOCOL_VERSION,
            message.kind,
            0 if first else CONTINUATION,
            b"\0\0\0",
            lane,
            message.seq,
            len(meta),
            message.body_len,
            message.deadline_ms,
        )
        buffers: list[Buffer] = [header, meta, *_take(message.body, size)]
        message.sent += size
        queue.queued_bytes -= len(meta) + size
        if message.sent == message.body_len:
            queue.messages.popleft()
            if lane is Lane.BULK:
                self._forget(message.order_keys)
        return buffers

    def _choose(self) -> Lane | None:
        if self._lanes[Lane.CONTROL].messages:
            return Lane.CONTROL
        other = Lane.BULK if self._last_slow is Lane.JOURNAL else Lane.JOURNAL
        slow = next((lane for lane in (other, self._last_slow) if self._lanes[lane].messages), None)
        if self._lanes[Lane.URGENT].messages and (slow is None or self._urgent_in_a_row < self.URGENT_BURST):
            self._urgent_in_a_row += 1
            return Lane.URGENT
        self._urgent_in_a_row = 0
        if slow is not None:
            self._last_slow = slow
        return slow

    def _forget(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._bulk_keys[key] -= 1
            if not self._bulk_keys[key]:
                del self._bulk_keys[key]


def _take(parts: deque[memoryview], size: int) -> list[memoryview]:
    """Remove the first `size` bytes from `parts` without copying."""
    taken = []
    while size:
        part = parts.popleft()
        if len(part) > size:
            parts.appendleft(part[size:])
            part = part[:size]
        taken.append(part)
        size -= len(part)
    return taken
