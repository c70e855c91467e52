"""An outgoing link: dials when first used, sends in order, hears what comes back, and reports its end exactly once.

Servers push to the next server over one, drivers speak to servers over one. `send` never blocks, so a slow or frozen
peer cannot hold up the loop that computes; what may queue is bounded by the steps that sessions have under way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from shoal.errors import Full, ShoalError
from shoal.net.transport import Body, Conn, Transport
from shoal.wire.messages import Message

OnMessage = Callable[[str, Message, memoryview], None]
"""on_message(node, message, body)"""
OnLost = Callable[[str, str], None]
"""on_lost(node, cause)"""


class Link:
    """One connection to `node`, made by us. Once lost it stays lost: the owner makes a new Link."""

    def __init__(
        self,
        transport: Transport,
        node: str,
        addresses: Sequence[str],
        *,
        on_message: OnMessage,
        on_lost: OnLost,
        expect_node: bool = True,
        dial_timeout_s: float = 3.0,
    ) -> None:
        """`node` names the link in callbacks; with expect_node the peer's certificate must carry that very id."""
        self.node = node
        self._expect_node = node if expect_node else None
        self.lost = False
        self._transport = transport
        self._addresses = tuple(addresses)
        self._on_message = on_message
        self._on_lost = on_lost
        self._dial_timeout_s = dial_timeout_s
        self._queue: deque[tuple[Message, Sequence[Body]]] = deque()
        self._filled = asyncio.Event()
        self._conn: Conn | None = None
        self._task = asyncio.create_task(self._run(), name=f"link to {node}")

    def send(self, message: Message, body: Sequence[Body] = ()) -> None:
        """Send, or queue while the link is not up or its connection is full. After the loss nothing is sent; the
        owner was told."""
        if self.lost:
            return
        if self._conn is not None and not self._queue:
            try:
                self._conn.send_nowait(message, body)
                return
            except Full:
                pass  # waits in the queue
            except ShoalError:
                return  # the reader meets the same loss and reports it
        self._queue.append((message, body))
        self._filled.set()

    @property
    def rtt_s(self) -> float | None:
        """Round trip measured by the connection's own pings; None before the first."""
        return None if self._conn is None else self._conn.rtt_s

    async def close(self) -> None:
        """Send what is queued (briefly), then end without calling on_lost."""
        self.lost = True
        if self._conn is not None:
            with suppress(ShoalError, TimeoutError):
                async with asyncio.timeout(0.5):
                    while self._queue:
                        await self._conn.send(*self._queue.popleft())
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        cause = "closed"
        try:
            self._conn = await self._transport.dial(
                self._addresses, expect_node=self._expect_node, timeout_s=self._dial_timeout_s
            )
            cause = await self._serve(self._conn)
        except ShoalError as error:
            cause = str(error)
        finally:
            if self._conn is not None:
                self._conn.abort()
            if not self.lost:
                self.lost = True
                self._queue.clear()
                self._on_lost(self.node, cause)

    async def _serve(self, conn: Conn) -> str:
        """Read and write until one of the two fails; returns why."""
        cause = "closed"
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._read(conn))
                both.create_task(self._write(conn))
        except* ShoalError as errors:
            cause = str(errors.exceptions[0])
        return cause

    async def _read(self, conn: Conn) -> None:
        while True:
            message, body = await conn.receive()
            self._on_message(self.node, message, body)

    async def _write(self, conn: Conn) -> None:
        while True:
            while self._queue:
                await conn.send(*self._queue[0])
                self._queue.popleft()  # after sending: until then later messages must queue behind it
            self._filled.clear()
            await self._filled.wait()
