"""Sends without waiting: what a connection cannot take at once is kept, in order, until it can.

One queue for each lane of the connection (wire/frames.py): a journal copy that waits for a slow reader must not hold up
the next step behind it. What may wait is bounded by the steps that sessions have under way. Gossip has no such bound,
since a peer may ask for more and read nothing; it may be lost, because the next round says it again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from shoal.errors import Full, ShoalError
from shoal.net.transport import Body, Conn
from shoal.wire import codec
from shoal.wire.frames import Lane
from shoal.wire.messages import Message, Sync

GOSSIP_WAITING = 16
"""Behind so many messages no Sync waits for its lane."""


class Outbox:
    """Messages to the other end of one connection."""

    def __init__(self, conn: Conn) -> None:
        self._conn = conn
        self._queues: dict[Lane, deque[tuple[Message, Sequence[Body]]]] = {}
        self._drains: dict[Lane, asyncio.Task[None]] = {}

    def put(self, message: Message, body: Sequence[Body] = ()) -> None:
        """Send now, or as soon as the lane has room. After a loss nothing happens: whoever receives from the connection
        hears of it."""
        lane = codec.lane(message)
        queue = self._queues.setdefault(lane, deque())
        if not queue:
            try:
                self._conn.send_nowait(message, body)
                return
            except Full:
                pass
            except ShoalError:
                return
        if isinstance(message, Sync) and len(queue) >= GOSSIP_WAITING:
            return
        queue.append((message, body))
        if lane not in self._drains:
            self._drains[lane] = asyncio.create_task(self._drain(lane, queue), name=f"outbox {lane.name}")

    async def _drain(self, lane: Lane, queue: deque[tuple[Message, Sequence[Body]]]) -> None:
        try:
            with suppress(ShoalError):  # as in put
                while queue:
                    await self._conn.send(*queue[0])
                    queue.popleft()  # after sending, so that later messages queue behind it until then
        finally:
            del self._drains[lane]

    async def close(self) -> None:
        """Forget what still waits."""
        tasks = list(self._drains.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
