"""Small networks for tests: the same interface over memory and over TLS, with a hand on every link.

A TLS link runs through a relay of our own, so that it can be cut or frozen without touching either node.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any, Protocol

import uvloop

from shoal.net.connection import Conn, ConnSettings
from shoal.net.identity import (
    Authority,
    NodeIdentity,
    Peer,
    Role,
    create_ca,
    create_issuer,
    issue_node,
    peer_of_certificate,
)
from shoal.net.memory import MemoryNetwork, MemoryTransport
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address, Heartbeat, Listener, Transport

SCENARIO_TIMEOUT_S = 30
"""A scenario that hangs fails instead of stopping the suite."""
FAST = ConnSettings(heartbeat=Heartbeat(ping_after_s=0.05, silent_after_s=0.4), greeting_timeout_s=5.0)


def authority(name: str = "demo") -> Authority:
    """The same authority for the same name, all through a test run."""
    return _authority(name)


def issuer(name: str = "demo") -> Authority:
    """The issuing authority below `authority(name)`."""
    return _issuer(name)


def identity(role: Role, swarm: str = "demo", *, labels: Sequence[str] = ()) -> NodeIdentity:
    return issue_node(issuer(swarm), role, labels=labels)


def claiming(node: NodeIdentity, /, **claims: Any) -> NodeIdentity:
    """`node` with its real certificate, but saying something else in its Hello."""
    return dataclasses.replace(node, peer=dataclasses.replace(node.peer, **claims))


class Network(Protocol):
    """What the contract tests need."""

    def transport(self, node: NodeIdentity, settings: ConnSettings = FAST) -> Transport: ...

    async def reach(self, listener: Listener) -> str:
        """An address of `listener` whose connections can be cut and frozen."""

    def cut(self) -> None: ...

    def freeze(self) -> None: ...

    async def close(self) -> None: ...


class InMemory:
    def __init__(self) -> None:
        self._network = MemoryNetwork()

    def transport(self, node: NodeIdentity, settings: ConnSettings = FAST) -> Transport:
        return MemoryTransport(self._network, certified(node), settings, says=node.peer)

    async def reach(self, listener: Listener) -> str:
        return listener.address

    def cut(self) -> None:
        for link in self._network.links:
            link.cut()

    def freeze(self) -> None:
        for link in self._network.links:
            link.freeze()

    async def close(self) -> None:
        pass


class OverTls:
    def __init__(self) -> None:
        self._relays: list[Relay] = []

    def transport(self, node: NodeIdentity, settings: ConnSettings = FAST) -> Transport:
        return TlsTransport(node, settings)

    async def reach(self, listener: Listener) -> str:
        relay = Relay(Address.parse(listener.address))
        self._relays.append(relay)
        return await relay.start()

    def cut(self) -> None:
        for relay in self._relays:
            relay.cut()

    def freeze(self) -> None:
        for relay in self._relays:
            relay.frozen = True

    async def close(self) -> None:
        for relay in self._relays:
            await relay.close()


class Relay:
    """Passes TCP bytes on, keeps a copy of them, and stops when told to."""

    def __init__(self, target: Address) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self.frozen = False
        self.seen = bytearray()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection(self._target.host, self._target.port)
        self._writers += [writer, onward[1]]
        for pump in (self._pump(reader, onward[1]), self._pump(onward[0], writer)):
            task = asyncio.ensure_future(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.seen += data
                if self.frozen:
                    continue
                writer.write(data)
                await writer.drain()
        if not self.frozen:
            writer.close()

    def cut(self, connection: int | None = None) -> None:
        """Cut one connection, counted from 0 in the order in which they came, or all."""
        both_ends = self._writers if connection is None else self._writers[2 * connection : 2 * connection + 2]
        for writer in both_ends:
            writer.transport.abort()

    async def close(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*self._pumps)


def run(scenario: Callable[[], Awaitable[None]], *, fast_loop: bool = False) -> None:
    """Run a scenario on a fresh loop. Fails when it hangs, when it leaves a task behind, or when a callback failed."""

    async def bounded() -> None:
        complaints: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
        async with asyncio.timeout(SCENARIO_TIMEOUT_S):
            await scenario()
        orphans = asyncio.all_tasks() - {asyncio.current_task()}
        assert not orphans, f"left behind: {orphans}"
        assert not complaints, complaints

    if fast_loop:
        uvloop.run(bounded())
    else:
        asyncio.run(bounded())


async def collect(conn: Conn, count: int) -> list[Any]:
    """The next `count` messages."""
    return [(await conn.receive())[0] for _ in range(count)]


@cache
def _authority(name: str) -> Authority:
    return create_ca(name)


@cache
def _issuer(name: str) -> Authority:
    return create_issuer(authority(name))


def certified(node: NodeIdentity) -> Peer:
    """What the certificate of `node` says, whatever the node itself claims."""
    return peer_of_certificate(node.chain_der[0])
