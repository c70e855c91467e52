"""The registry seed: the node that others ask first, and that can speak to each of those that are connected to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from shoal.errors import ShoalError
from shoal.net.directory import LEASE_S, Directory
from shoal.net.identity import NodeIdentity
from shoal.net.transport import Conn
from shoal.wire.messages import Fault, Message, Record, Renew, Renewed, Sync


class Seed:
    """Takes the gossip of every node that connects. Losing it loses no session and no registry: all others go on
    telling each other what they know, and it is filled again within a second of its return."""

    def __init__(self, identity: NodeIdentity) -> None:
        self.directory = Directory(identity, on_change=self._changed, on_revoked=self._revoked)
        self._identity = identity
        self.on_change: Callable[[], None] = lambda: None
        self._news = asyncio.Event()
        self.renew: Callable[[Conn], Awaitable[list[bytes]]] | None = None
        """Makes a new certificate (a chain of DER) for the node at the other end; None where no issuer is kept."""
        self._conns: dict[str, list[Conn]] = {}
        """A node may have several: gossip over one, a renewal of its certificate over another."""

    def _changed(self) -> None:
        self._news.set()
        self.on_change()

    def _revoked(self, nodes: frozenset[str]) -> None:
        told = self.directory.view.told()
        for node in list(self._conns):
            self.send(node, told)

    async def on_conn(self, conn: Conn) -> None:
        """Handle one accepted connection until it ends."""
        node = conn.peer.node
        try:
            while True:
                message, _ = await conn.receive()
                if isinstance(message, Sync):
                    if conn not in self._conns.get(node, ()):
                        self._conns.setdefault(node, []).append(conn)
                    for answer in self.directory.on_sync(message, node):
                        await conn.send(answer)
                elif isinstance(message, Renew):
                    await conn.send(await self._renewed(conn))
        finally:
            if conn in (conns := self._conns.get(node, [])):
                conns.remove(conn)
            if not conns:
                self._conns.pop(node, None)

    async def _renewed(self, conn: Conn) -> Message:
        if self.renew is None:
            return Fault("unavailable", "This node keeps no issuing authority; ask the swarm's admin.")
        try:
            return Renewed(await self.renew(conn))
        except ShoalError as error:
            return Fault(error.code, str(error)[:1024], error.retry_after_s)

    def announce(self, addresses: Sequence[str]) -> None:
        """Publish a record of this node, so that others find it without having been told its address."""
        peer = self._identity.peer
        self.directory.publish(
            Record(
                node=peer.node,
                incarnation=Directory.incarnation(),
                version=0,
                lease_s=LEASE_S,
                role=peer.role,
                state="online",
                addresses=list(addresses),
                span=None,
                pid=os.getpid(),
                dtype="float32",
                decode_ms_per_block=0.0,
                prefill_ms_per_block_token=0.0,
                memory_bytes=0,
                cache_tokens_free=0,
                cache_tokens_total=0,
                queue_rows=0,
                sessions=0,
                labels=list(peer.labels),
            )
        )

    def send(self, node: str, message: Message) -> None:
        """To a connected node; to one that has left, nothing is sent, and its lease will tell."""
        if conns := self._conns.get(node):
            with suppress(ShoalError):
                conns[-1].send_nowait(message)

    async def wait_for(self, ready: Callable[[list[Record]], bool]) -> list[Record]:
        """The live records, as soon as they satisfy `ready`."""
        while not ready(records := self.directory.live()):
            self._news.clear()
            await self._news.wait()
        return records
