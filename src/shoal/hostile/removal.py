"""A member is removed: how long until every connection it has, in either direction, is cut."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from shoal.errors import ShoalError
from shoal.net.identity import Authority, NodeIdentity, create_ca, create_issuer, issue_node
from shoal.net.seed import Seed
from shoal.net.tls import TlsTransport
from shoal.net.transport import Conn

NODES = 6
PATIENCE_S = 30.0
"""Far beyond the promise: what takes so long never happens."""


@dataclass(frozen=True, slots=True)
class Node:
    """A member of a swarm over loopback, with a port of its own."""

    identity: NodeIdentity
    seed: Seed
    transport: TlsTransport
    address: str

    @property
    def name(self) -> str:
        return self.identity.peer.node


@contextlib.asynccontextmanager
async def node(issuer: Authority, seeds: list[str]) -> AsyncIterator[Node]:
    """A node that listens, is in the registry and makes rounds."""
    identity = issue_node(issuer, "server")
    seed = Seed(identity)
    transport = TlsTransport(identity)
    listener = await transport.listen("tcp://127.0.0.1:0", seed.on_conn)
    seed.announce([listener.address])
    rounds = asyncio.create_task(seed.directory.rounds(transport, seeds))
    try:
        yield Node(identity, seed, transport, listener.address)
    finally:
        rounds.cancel()
        await asyncio.gather(rounds, return_exceptions=True)
        await listener.close()


async def removal_s(count: int = NODES) -> float:
    """Seconds from the admin's word at one node to the end of the last connection of the removed one.

    Raises ShoalError when it is still let in somewhere after that, or when it takes longer than PATIENCE_S.
    """
    root = create_ca("removal")
    issuer = create_issuer(root)
    admin = issue_node(issuer, "admin")
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(node(issuer, []))
        others = [await stack.enter_async_context(node(issuer, [first.address])) for _ in range(count - 2)]
        removed = await stack.enter_async_context(node(issuer, [first.address]))
        group = [first, *others]
        await _until(lambda: all(len(each.seed.directory.live()) == count for each in group))
        conns: list[Conn] = [await each.transport.dial([removed.address]) for each in group]
        conns += [await removed.transport.dial([each.address]) for each in group]
        began = time.perf_counter()
        if not first.seed.directory.revoke_as(admin, 1, [removed.name]):
            raise ShoalError("The admin's list was not taken.")
        await _until(lambda: not any(conn.is_open for conn in conns))
        took_s = time.perf_counter() - began
        for each in group:
            if await _let_in(removed, each):
                raise ShoalError(f"{each.name} lets the removed node in again.")
        return took_s


async def _let_in(removed: Node, at: Node) -> bool:
    try:
        conn = await removed.transport.dial([at.address])
    except ShoalError:
        return False
    conn.abort()
    return True


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)
