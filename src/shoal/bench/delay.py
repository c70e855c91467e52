"""A relay that stands for a long way: what goes through it arrives later, in both directions, and no slower."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

from shoal.net.transport import Address

_READ_BYTES = 65_536
_MAX_WAITING = 1024
"""Pieces on their way in one direction; a sender that is faster than its reader waits."""


class Delay:
    """Accepts at `address` and passes on to `target`, half of `rtt_ms` later in each direction. Async context
    manager."""

    def __init__(self, target: Address, rtt_ms: float) -> None:
        self.address = ""
        self._target = target
        self._one_way_s = rtt_ms / 2e3
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Delay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward = await asyncio.open_connection(self._target.host, self._target.port)
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, onward[1]), (onward[0], writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        waiting: deque[tuple[float, bytes]] = deque()
        news, room = asyncio.Event(), asyncio.Event()

        async def deliver() -> None:
            while True:
                while not waiting:
                    news.clear()
                    await news.wait()
                due, data = waiting.popleft()
                room.set()
                if (left := due - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                if not data:
                    return
                sink.write(data)
                await sink.drain()

        delivering = asyncio.create_task(deliver())
        with contextlib.suppress(OSError):
            try:
                data = b"."
                while data:
                    data = await source.read(_READ_BYTES)
                    while len(waiting) >= _MAX_WAITING:
                        room.clear()
                        await room.wait()
                    waiting.append((time.monotonic() + self._one_way_s, data))
                    news.set()
                await delivering
            finally:
                delivering.cancel()
                sink.close()
