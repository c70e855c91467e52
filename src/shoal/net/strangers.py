"""Those who have connected and not yet proved who they are: how many may wait, where, and who has to make room.

A connection that says nothing, or a byte a second, costs its owner nothing, so there may always be more of them than
places. Two rooms keep them from members:

    accepted --whole ClientHello has come--> handshake --certificate and Hello fit--> member
    waiting room: a socket and a timer       places: TLS state, and time of this process

Whoever dawdles in the waiting room never takes a place. When a room is full, the one who has been in it longest leaves
for the newcomer: a member passes both in a few round trips, so it is a dawdler.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from shoal.errors import Refused

MAX_WAITING = 1024
"""Sockets in the waiting room."""
MAX_HANDSHAKES = 64
STALLED_S = 1.0
"""Nobody loses a place before. Several round trips around the world, and a slow machine's arithmetic."""
MAX_HELLO_BYTES = 16 * 1024
"""Of a ClientHello; TLS itself allows no longer record. Real ones have 300 to 2,000 bytes."""
_RECORD_HEAD = 5
_HANDSHAKE_RECORD = 22


class WaitingRoom:
    """Holds accepted sockets until they have said enough to begin a handshake, then hands them on."""

    def __init__(self, on_ready: Callable[[socket.socket], None], *, patience_s: float) -> None:
        self._on_ready = on_ready
        self._patience_s = patience_s
        self._tasks: dict[asyncio.Task[None], None] = {}  # in the order in which they came

    def enter(self, sock: socket.socket) -> None:
        """Own the socket from here on."""
        if len(self._tasks) >= MAX_WAITING:
            longest = next(iter(self._tasks))
            del self._tasks[longest]
            longest.cancel()
        task = asyncio.create_task(self._wait(sock))
        self._tasks[task] = None
        task.add_done_callback(lambda task: self._tasks.pop(task, None))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                await client_hello(sock)
        except (Refused, TimeoutError, OSError):
            with suppress(OSError):
                sock.recv(MAX_HELLO_BYTES)  # what lies unread would make the end a reset, and puzzle honest strays
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            self._on_ready(sock)


async def client_hello(sock: socket.socket) -> None:
    """Wait until a whole ClientHello can be read from `sock`, reading none of it. Raises Refused for anything else."""
    size = _RECORD_HEAD
    while True:
        head = await _peek(sock, size)
        if len(head) < size:
            raise Refused("The other side hung up before it had said anything.")
        if size > _RECORD_HEAD:
            return
        length = int.from_bytes(head[3:5], "big")
        if head[0] != _HANDSHAKE_RECORD or not 0 < length <= MAX_HELLO_BYTES:
            raise Refused("The other side does not speak TLS.")
        size = _RECORD_HEAD + length


async def _peek(sock: socket.socket, size: int) -> bytes:
    """The first `size` bytes, once so many have come; fewer when the other side has hung up."""
    loop = asyncio.get_running_loop()
    # The kernel wakes us when so much is there, and not for each byte of those who drip.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
    readable = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock.fileno(), wake)
    try:
        await readable
    finally:
        loop.remove_reader(sock.fileno())
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    return sock.recv(size, socket.MSG_PEEK)


class Places:
    """Bounds how many handshakes run at once. Use `async with places:` in the task that shakes hands."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = MAX_HANDSHAKES if limit is None else limit
        self._taken: dict[asyncio.Task[object], float] = {}  # in the order in which they began
        self._left = asyncio.Event()

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._taken) >= self._limit:
            longest, since_s = next(iter(self._taken.items()))
            wait_s = since_s + STALLED_S - loop.time()
            if wait_s <= 0:
                del self._taken[longest]
                longest.cancel()
                continue
            self._left.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._left.wait()
        if (task := asyncio.current_task()) is not None:
            self._taken[task] = loop.time()

    async def __aexit__(self, *_: object) -> None:
        if (task := asyncio.current_task()) is not None:
            self._taken.pop(task, None)
        self._left.set()
