"""One connection to one peer: greeting, heartbeats, lanes, backpressure. The same code runs over TLS and in memory.

    greeting --Hello fits the certificate--> open --close(), loss, silence, broken protocol--> ended
        \\--wrong swarm, role, node, version, or no Hello in time--> ended (Refused)

There is no task in here. Bytes come in through asyncio's protocol callbacks and go out from `send`, from the same
callbacks and from one timer, so nothing can be orphaned, and an error always ends up in `receive` and `send`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from shoal.errors import Full, PeerLost, ProtocolError, Refused, ShoalError
from shoal.net.identity import Peer
from shoal.wire import codec
from shoal.wire.frames import HEADER_BYTES, Buffer, Frame, FrameReader, FrameWriter, Lane, Limits
from shoal.wire.messages import PROTOCOL_VERSION, Fault, Hello, Message, Ping, Pong

_WRITES_PER_TURN = 4
"""Fragments written before other callbacks get their turn: 256 KiB cost about 1 ms with TLS."""
_SCRATCH_BYTES = 256 * 1024
_MAX_CONTROL_MESSAGES = 4096
"""Control frames never wait; a peer that leaves this many unread does not read at all."""
_FINAL_FAULTS = frozenset({ProtocolError.code, Refused.code})


@dataclass(frozen=True)
class Heartbeat:
    """A peer that was not heard for `ping_after_s` is pinged; not heard for `silent_after_s`, it is lost."""

    ping_after_s: float = 0.5
    silent_after_s: float = 2.0


@dataclass(frozen=True)
class ConnSettings:
    """Bounds of one connection."""

    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    limits: Limits = field(default_factory=Limits)
    greeting_timeout_s: float = 5.0
    """From the accepted socket to the other side's Hello."""
    close_timeout_s: float = 1.0
    """How long `close` waits for control and urgent frames to leave, and then for the peer to hang up."""
    send_queue_bytes: int = 4 * 1024 * 1024
    """`send` waits while this much is queued on the message's lane."""
    receive_queue_bytes: int = 32 * 1024 * 1024
    """Reading pauses while the application leaves this much (or `receive_queue_messages`) unreceived."""
    receive_queue_messages: int = 4096


class Delivery(NamedTuple):
    """A received message. `body` is writable and belongs to the receiver."""

    message: Message
    body: memoryview
    expires_at: float | None
    """When the sender's deadline passes, on this loop's clock (`loop.time()`); None for no deadline."""
    size: int
    """Bytes of metadata and body."""


class ConnStatistics(NamedTuple):
    """Since the connection was made. Bytes are before encryption."""

    frames_sent: int
    bytes_sent: int
    messages_received: int
    bytes_received: int
    send_queue_bytes: int
    receive_queue_bytes: int
    rtt_s: float | None
    """Round trip of the latest ping; None before the first was answered."""


class Conn:
    """A greeted connection. Made by a Transport; one coroutine may receive, any number may send."""

    def __init__(
        self,
        me: Peer,
        settings: ConnSettings,
        *,
        dialed: bool,
        expect_node: str | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._me = me
        self._settings = settings
        self._dialed = dialed
        self._expect_node = expect_node
        self.certificate = b""
        """The other side's own certificate (DER), once TLS has checked it; empty in memory."""
        self._proven: Peer | None = None
        self._peer: Peer | None = None
        self._hello_seen = False
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader(self._describe, settings.limits)
        self._writer = FrameWriter()
        self._write_paused = False
        self._pump_scheduled = False
        self._waiting_senders: dict[Lane, deque[asyncio.Future[None]]] = {lane: deque() for lane in Lane}
        self._inbox: deque[Delivery] = deque()
        self._inbox_bytes = 0
        self._read_paused = False
        self._receiver: asyncio.Future[None] | None = None
        self._error: ShoalError | None = None
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._ticked_at = self._heard_at = self._loop.time()
        self._pinged_at: float | None = None
        self._nonce = 0
        self._frames_sent = self._bytes_sent = self._messages_received = self._bytes_received = 0
        self._rtt_s: float | None = None

    def __repr__(self) -> str:
        state = "greeting" if self._peer is None else "open" if self._error is None else "ended"
        return f"<Conn to {self._peer or 'unknown peer'}: {state}>"

    # What the application uses

    @property
    def peer(self) -> Peer:
        """Who the other side is: certificate and Hello agree on it."""
        if self._peer is None:
            raise RuntimeError("the connection has not been greeted yet")
        return self._peer

    @property
    def proven(self) -> Peer | None:
        """Whom the other side's certificate belongs to; None until TLS has checked it. It may not be greeted yet."""
        return self._proven

    @property
    def is_open(self) -> bool:
        return self._peer is not None and self._error is None

    @property
    def rtt_s(self) -> float | None:
        """Round trip of the latest ping. Pings are sent on greeting and in pauses, so traffic does not distort it."""
        return self._rtt_s

    async def send(self, message: Message, body: Iterable[Buffer] | Buffer = (), *, deadline_ms: int = 0) -> None:
        """Queue a message, waiting while its lane is full. Control messages never wait.

        `body`: one buffer or several that follow each other; they must not change afterwards. `deadline_ms`: the
        time the receiver has before nobody wants the answer any more, 0 for no deadline. Raises PeerLost (or what
        ended the connection), ValueError for a message that this protocol cannot carry.
        """
        lane = codec.lane(message)
        while self._error is None and self._is_full(lane):
            room = self._loop.create_future()
            self._waiting_senders[lane].append(room)
            try:
                await room
            except asyncio.CancelledError:
                self._wake_senders()
                raise
        try:
            self._send(message, body, lane, deadline_ms)
        finally:
            self._wake_senders()

    def send_nowait(self, message: Message, body: Iterable[Buffer] | Buffer = (), *, deadline_ms: int = 0) -> None:
        """`send` without waiting: raises Full while the message's lane is full."""
        lane = codec.lane(message)
        if self._error is None and self._is_full(lane):
            raise Full(f"The connection to {self._peer} has {self._writer.queued_bytes(lane)} bytes waiting.")
        self._send(message, body, lane, deadline_ms)

    def _send(self, message: Message, body: Iterable[Buffer] | Buffer, lane: Lane, deadline_ms: int) -> None:
        if self._error is not None:
            raise _again(self._error)
        if self._peer is None:
            raise RuntimeError("the connection has not been greeted yet")
        kind, meta = codec.encode(message)
        parts = [body] if isinstance(body, bytes | bytearray | memoryview) else list(body)
        size = sum(memoryview(part).nbytes for part in parts)
        if size != codec.body_bytes(message):
            raise ValueError(f"{type(message).__name__} needs a body of {codec.body_bytes(message)} bytes, got {size}")
        self._writer.push(kind, meta, parts, lane=lane, deadline_ms=deadline_ms, order_keys=codec.order_keys(message))
        self._after_push()

    async def receive(self) -> tuple[Message, memoryview]:
        """The next message and its body. Raises what ended the connection, after everything that came before it:
        PeerLost (closed, reset, silent), ProtocolError or Refused (the peer broke the protocol)."""
        delivery = await self.receive_delivery()
        return delivery.message, delivery.body

    async def receive_delivery(self) -> Delivery:
        """`receive`, with the deadline."""
        while not self._inbox:
            if self._error is not None:
                raise _again(self._error)
            if self._receiver is not None:
                raise RuntimeError("two coroutines receive from one connection")
            self._receiver = self._loop.create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None
        delivery = self._inbox.popleft()
        self._inbox_bytes -= delivery.size
        if self._read_paused and self._inbox_room() > 0.5:
            self._resume_reading()
        return delivery

    async def close(self) -> None:
        """Send what waits on the control and urgent lanes, hang up, and wait until the connection is gone, all
        within a bound. Calling it again, or after a loss, only waits."""
        self._end(PeerLost("This side closed the connection."))
        await asyncio.wait([self._gone], timeout=2 * self._settings.close_timeout_s)
        if not self._gone.done():
            self._cut_stream()
            await asyncio.wait([self._gone], timeout=self._settings.close_timeout_s)

    def abort(self, reason: str = "This side cut the connection.") -> None:
        """Cut the connection at once, sending nothing more. `reason` is what `receive` and `send` raise here."""
        self._end(PeerLost(reason), flush=False)

    def statistics(self) -> ConnStatistics:
        return ConnStatistics(
            frames_sent=self._frames_sent,
            bytes_sent=self._bytes_sent,
            messages_received=self._messages_received,
            bytes_received=self._bytes_received,
            send_queue_bytes=sum(self._writer.queued_bytes(lane) for lane in Lane),
            receive_queue_bytes=self._inbox_bytes,
            rtt_s=self._rtt_s,
        )

    # Greeting

    async def greeted(self) -> None:
        """Wait until both Hellos were exchanged. Raises Refused, PeerLost or ProtocolError."""
        try:
            async with asyncio.timeout(self._settings.greeting_timeout_s):
                await asyncio.shield(self._greeted)
        except TimeoutError:
            self._end(PeerLost(f"No Hello came within {self._settings.greeting_timeout_s:g} s."))
            raise _again(self._error or PeerLost("No Hello came.")) from None

    def made(self, transport: asyncio.Transport, proven: Peer) -> None:
        """The byte stream stands, and its certificate proved who the other side is."""
        self._transport = transport
        self._proven = proven
        self._heard_at = self._ticked_at = self._loop.time()
        self._timer = self._loop.call_later(self._tick_s, self._tick)
        if proven.swarm != self._me.swarm:
            self._refuse(f"This is swarm {self._me.swarm}, the certificate is of swarm {proven.swarm}.")
        elif self._expect_node is not None and proven.node != self._expect_node:
            self._refuse(f"Node {self._expect_node} was expected at this address; {proven.node} answered.")
        elif self._dialed:
            self._say_hello()

    def refused_by_transport(self, transport: asyncio.Transport, error: ShoalError) -> None:
        """The byte stream stands, but its certificate proves nothing we accept."""
        self._transport = transport
        self._fail(error)

    def _say_hello(self) -> None:
        self._push_control(Hello(PROTOCOL_VERSION, self._me.swarm, self._me.node, self._me.role))

    def _on_hello(self, hello: Hello) -> None:
        proven = self._proven
        assert proven is not None
        if hello.protocol != PROTOCOL_VERSION:
            self._refuse(f"The peer speaks protocol version {hello.protocol}, this side speaks {PROTOCOL_VERSION}.")
        elif hello.swarm != proven.swarm:
            self._refuse(f"The peer wants swarm {hello.swarm}; this is swarm {proven.swarm}.")
        elif (hello.node, hello.role) != (proven.node, proven.role):
            self._refuse(f"The peer says it is {hello.role} {hello.node}; its certificate says {proven.uri}.")
        else:
            # The listener answers only now, so a dialer that hears a Hello knows that it was accepted.
            if not self._dialed:
                self._say_hello()
            self._peer = proven
            self._ping()
            if not self._greeted.done():
                self._greeted.set_result(None)

    def _refuse(self, reason: str) -> None:
        self._fail(Refused(reason))

    # Bytes in

    def feed(self, data: memoryview) -> None:
        """Bytes from the peer."""
        if self._error is not None:
            return
        self._heard_at = self._loop.time()
        self._bytes_received += len(data)
        try:
            frames = self._reader.feed(data)
        except ShoalError as error:
            self._fail(error)
            return
        for frame in frames:
            if self._error is None:
                self._on_frame(frame)

    def _describe(self, kind: int, meta: bytes, body_len: int) -> Message:
        """Decode metadata; runs before the body is allocated."""
        message = codec.decode(kind, meta, body_len)
        # Counted here and not when Hello is handled: what follows it may be in the same read.
        if isinstance(message, Hello) == self._hello_seen and not isinstance(message, Fault):
            raise ProtocolError("The first message, and only the first, must be Hello.")
        self._hello_seen = True
        if self._proven is not None and type(message) not in codec.MAY_SEND[self._proven.role]:
            raise ProtocolError(f"A {self._proven.role} may not send {type(message).__name__}.")
        return message

    def _on_frame(self, frame: Frame[Message]) -> None:
        message = frame.message
        self._messages_received += 1
        if isinstance(message, Ping):
            self._push_control(Pong(message.nonce))
        elif isinstance(message, Pong):
            if self._pinged_at is not None and message.nonce == self._nonce:
                self._rtt_s = time.monotonic() - self._pinged_at
                self._pinged_at = None
        elif isinstance(message, Fault) and (self._peer is None or message.code in _FINAL_FAULTS):
            self._on_final_fault(message)
        elif isinstance(message, Hello):
            self._on_hello(message)
        else:
            expires_at = self._loop.time() + frame.deadline_ms / 1000 if frame.deadline_ms else None
            self._deliver(Delivery(message, frame.body, expires_at, frame.meta_bytes + len(frame.body)))

    def _on_final_fault(self, fault: Fault) -> None:
        if self._peer is None:
            self._end(Refused(f"The other side refused the connection: {fault.message}"), flush=False)
        else:
            self._end(PeerLost(f"{self._peer} ended the connection: {fault.message}"), flush=False)

    def _deliver(self, delivery: Delivery) -> None:
        self._inbox.append(delivery)
        self._inbox_bytes += delivery.size
        if not self._read_paused and self._inbox_room() <= 0:
            self._pause_reading()
        self._wake_receiver()

    def _inbox_room(self) -> float:
        """Share of the receive queue that is free."""
        used_bytes = self._inbox_bytes / self._settings.receive_queue_bytes
        return 1 - max(used_bytes, len(self._inbox) / self._settings.receive_queue_messages)

    def _pause_reading(self) -> None:
        # The peer still hears our pings, so it knows that we live; we cannot hear it and must not call it silent.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._read_paused = True

    def _resume_reading(self) -> None:
        self._read_paused = False
        self._heard_at = self._loop.time()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # Bytes out

    def _push_control(self, message: Message) -> None:
        kind, meta = codec.encode(message)
        self._writer.push(kind, meta)
        self._after_push()

    def _after_push(self) -> None:
        if self._writer.queued_messages(Lane.CONTROL) > _MAX_CONTROL_MESSAGES:
            self._end(PeerLost(f"{self._peer} does not read what it is sent.", cause="silent"), flush=False)
        elif not self._pump_scheduled:
            self._pump()

    def _pump(self) -> None:
        """Write what may be written. Stops when the transport is full (resume_writing continues) and, after a few
        fragments, to let other connections have their turn."""
        self._pump_scheduled = False
        for _ in range(_WRITES_PER_TURN):
            if self._write_paused or self._transport is None or self._transport.is_closing():
                return
            buffers = self._writer.next_frame()
            if buffers is None:
                return
            data = b"".join(buffers)
            self._frames_sent += 1
            self._bytes_sent += len(data)
            self._transport.write(data)
            self._wake_senders()
            if self._error is not None and not self._flushing():
                self._transport.close()
        if self._writer:
            self._pump_scheduled = True
            self._loop.call_soon(self._pump)

    def set_write_paused(self, paused: bool) -> None:
        """The transport's own buffer is full, or has drained."""
        self._write_paused = paused
        if not paused and not self._pump_scheduled:
            self._pump()

    def _is_full(self, lane: Lane) -> bool:
        return lane is not Lane.CONTROL and self._writer.queued_bytes(lane) >= self._settings.send_queue_bytes

    def _wake_senders(self) -> None:
        """Let one sender of every lane with room go on; it wakes the next when it has pushed, failed or given up."""
        if not any(self._waiting_senders.values()):
            return
        for lane, waiting in self._waiting_senders.items():
            while waiting and (self._error is not None or not self._is_full(lane)):
                future = waiting.popleft()
                if not future.done():
                    future.set_result(None)
                    if self._error is None:
                        break

    # Heartbeat

    @property
    def _tick_s(self) -> float:
        heartbeat = self._settings.heartbeat
        return min(heartbeat.ping_after_s, heartbeat.silent_after_s) / 2

    def _tick(self) -> None:
        now = self._loop.time()
        late_s = now - self._ticked_at - 2 * self._tick_s
        if late_s > 0:
            # This process itself stood still; what the peer sent meanwhile is still to be read.
            self._heard_at = min(now, self._heard_at + late_s + self._tick_s)
        self._ticked_at = now
        self._timer = self._loop.call_later(self._tick_s, self._tick)
        silent_s = now - self._heard_at
        if silent_s >= self._settings.heartbeat.silent_after_s and not self._read_paused:
            self._end(
                PeerLost(f"{self._peer or 'The peer'} was silent for {silent_s:.1f} s.", cause="silent"), flush=False
            )
        elif self._peer is not None and silent_s >= self._settings.heartbeat.ping_after_s:
            self._ping()

    def _ping(self) -> None:
        self._nonce += 1
        # Not loop.time(): uvloop's stands still within an iteration and counts whole milliseconds.
        self._pinged_at = time.monotonic()
        self._push_control(Ping(self._nonce))

    # The end

    def lost(self, error: Exception | None) -> None:
        """The byte stream is gone."""
        if self._dialed and self._proven is not None and self._peer is None and not isinstance(error, ssl.SSLError):
            # asyncio's listeners close without sending TLS's alert, so this is all a refused dialer gets to see.
            reason: ShoalError = Refused(
                "The other side closed the connection before its Hello: most likely it does not accept this node's "
                "certificate.",
                hint="Does this node belong to that swarm, and has its certificate not expired?",
            )
        else:
            reason = _reason_of_loss(error, self._peer)
        self._end(reason, flush=False)
        if self._timer is not None:
            self._timer.cancel()
        if not self._gone.done():
            self._gone.set_result(None)

    def _fail(self, error: ShoalError) -> None:
        """The peer broke the rules: tell it and hang up."""
        if self._error is None:
            kind, meta = codec.encode(Fault(error.code, str(error)[:1024]))
            self._writer.push(kind, meta)
            self._end(error)

    def _end(self, error: ShoalError, *, flush: bool = True) -> None:
        """Stop for good with `error`, the first of which stays. With `flush`, control and urgent frames still go
        out within close_timeout_s; without, or when nothing can be written any more, the stream is cut."""
        if self._error is not None:
            return
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        if not self._greeted.done():
            self._greeted.set_exception(_again(error))
            self._greeted.exception()  # marks it as seen: a dial that timed out no longer waits for it
        self._wake_receiver()
        self._wake_senders()
        if self._transport is None:
            return
        if not flush:
            self._cut_stream()
            return
        self._timer = self._loop.call_later(self._settings.close_timeout_s, self._cut_stream)
        self._pump()
        if not self._flushing():
            self._transport.close()

    def _flushing(self) -> bool:
        """Do frames that close() should still send wait?"""
        return bool(self._writer.queued_messages(Lane.CONTROL) or self._writer.queued_messages(Lane.URGENT))

    def _cut_stream(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _wake_receiver(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)


class ConnProtocol(asyncio.BufferedProtocol):
    """asyncio's callbacks, forwarded to a Conn. `prove` tells from a fresh transport who the other side is."""

    def __init__(self, conn: Conn, prove: Callable[[asyncio.BaseTransport], Peer]) -> None:
        self.conn = conn
        self._prove = prove
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's TLS transport has all of asyncio.Transport but does not inherit from it.
        transport = cast(asyncio.Transport, transport)
        # Little may sit behind us in buffers: what is handed over can no longer be overtaken.
        transport.set_write_buffer_limits(high=2 * (HEADER_BYTES + 64 * 1024))
        try:
            proven = self._prove(transport)
        except ShoalError as error:
            self.conn.refused_by_transport(transport, error)
        else:
            self.conn.made(transport, proven)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        self.conn.feed(self._scratch[:nbytes])

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.conn.set_write_paused(True)

    def resume_writing(self) -> None:
        self.conn.set_write_paused(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self.conn.lost(exc)


def _reason_of_loss(error: Exception | None, peer: Peer | None) -> ShoalError:
    who = str(peer) if peer is not None else "the other side"
    if isinstance(error, ssl.SSLError):
        # With TLS 1.3 this is how a dialer learns that its certificate was not accepted.
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return Refused(
            f"TLS with {who} failed: {reason}.",
            hint="Does this node belong to that swarm, and has its certificate not expired?",
        )
    if error is None:
        return PeerLost(f"The connection was closed by {who}.")
    return PeerLost(f"The connection to {who} broke: {error}.", cause="reset")


def _again(error: ShoalError) -> ShoalError:
    """A copy to raise: one exception raised from several coroutines would mix up their tracebacks."""
    if isinstance(error, PeerLost):
        return PeerLost(str(error), hint=error.hint, cause=error.cause)
    return type(error)(str(error), hint=error.hint, retry_after_s=error.retry_after_s)
