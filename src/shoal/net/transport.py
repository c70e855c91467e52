"""What a swarm asks of its network: listen, dial, and connections that send, receive and close.

`TlsTransport` (tls.py) and `MemoryTransport` (memory.py) keep the same promises; tests/contracts holds them to it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.errors import PeerLost, ProtocolError, Refused, UsageError
from shoal.net.connection import Conn, ConnSettings, ConnStatistics, Delivery, Heartbeat
from shoal.net.identity import Peer, Role
from shoal.wire.frames import Buffer

__all__ = [
    "Acceptor",
    "Address",
    "Body",
    "Conn",
    "ConnSettings",
    "ConnStatistics",
    "Delivery",
    "Heartbeat",
    "Listener",
    "OnConn",
    "Peer",
    "Role",
    "Transport",
    "answers",
]

Body = Buffer
"""One piece of a message's body."""
OnConn = Callable[[Conn], Awaitable[None]]
"""Handles one accepted connection; the connection is closed when it returns."""

_ADDRESS = re.compile(r"tcp://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


@dataclass(frozen=True)
class Address:
    """tcp://HOST:PORT, the host a name, an IPv4 address or an IPv6 address in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises UsageError for anything else."""
        match = _ADDRESS.fullmatch(text)
        if match is None or int(match[2]) > 65_535:
            raise UsageError(f"Cannot read the address {text!r}.", hint="Write tcp://HOST:PORT.")
        return cls(match[1].strip("[]"), int(match[2]))

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_wildcard(self) -> bool:
        """Every address of this machine: to listen on, not to tell others."""
        return self.host in ("0.0.0.0", "::")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def answers(address: Address, timeout_s: float = 1.0) -> bool:
    """Whether anybody listens there: for what is said to a person, not for decisions. Blocks up to timeout_s."""
    try:
        with socket.create_connection((address.host, address.port), timeout=timeout_s):
            return True
    except OSError:
        return False


class Listener(Protocol):
    """Accepts connections until it is closed."""

    @property
    def address(self) -> str:
        """Where others reach it, with the port that was really taken."""

    async def close(self) -> None:
        """Accept nothing more, cancel the handlers, close their connections. Raises what a handler died of."""


class Transport(Protocol):
    """One node's way to the others."""

    async def listen(self, address: str, on_conn: OnConn) -> Listener:
        """Serve `address`. Raises UsageError when it cannot be had."""

    async def dial(self, addresses: Sequence[str], *, expect_node: str | None = None, timeout_s: float = 5.0) -> Conn:
        """A greeted connection to the first address that answers. Raises PeerLost when none does, Refused when the
        other side does not let us in or is not `expect_node`."""

    def refuse(self, nodes: frozenset[str]) -> None:
        """Speak to none of these nodes any more: connections with them are cut now, new ones refused, in both
        directions. `nodes` replaces the nodes that were refused so far."""


MAX_CONNECTIONS = 1024
"""Of one listener, handshakes included."""
MAX_CONNECTIONS_PER_MEMBER = 16
"""A node needs two or three to another: a member with a certificate must not take the places of all others."""


class Acceptor:
    """Greets accepted connections and runs their handlers: the part of a listener that all transports share."""

    def __init__(self, on_conn: OnConn, *, max_connections: int = MAX_CONNECTIONS) -> None:
        self._on_conn = on_conn
        self._max_connections = max_connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: Counter[str] = Counter()
        """Greeted connections of each node."""
        self._first_failure: BaseException | None = None
        self._latest_failure: BaseException | None = None

    @property
    def is_full(self) -> bool:
        return len(self._tasks) >= self._max_connections

    def admit(self, connect: Awaitable[Conn]) -> None:
        """Own a connection from here on: finish `connect`, greet, handle, close."""
        self.spawn(self._run(connect))

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Own a task from here on: its failure is reported at once and raised by `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def close(self) -> None:
        """Cancel and await everything. Raises the first failure of a task; a lost or refused peer is none."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._first_failure is not None:
            raise self._first_failure

    async def _run(self, connect: Awaitable[Conn]) -> None:
        conn: Conn | None = None
        try:
            conn = await connect
            await conn.greeted()
            await self._handle(conn)
        except (PeerLost, Refused, ProtocolError):
            # A stranger turned away, a peer lost: how connections end. The handler has heard of it from receive().
            pass
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # Now and not when the task ends: a cancellation during the close below would hide it.
            self._report(error)
            raise
        finally:
            if conn is not None:
                await conn.close()

    async def _handle(self, conn: Conn) -> None:
        node = conn.peer.node
        if self._held[node] >= MAX_CONNECTIONS_PER_MEMBER:
            return
        self._held[node] += 1
        try:
            await self._on_conn(conn)
        finally:
            self._held[node] -= 1
            if not self._held[node]:
                del self._held[node]

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._report(error)

    def _report(self, error: BaseException) -> None:
        """Tell the loop's exception handler, once: a handler's failure passes here and again when its task ends."""
        if error is self._latest_failure:
            return
        self._latest_failure = error
        self._first_failure = self._first_failure or error
        asyncio.get_running_loop().call_exception_handler({"message": "a listener's task failed", "exception": error})
