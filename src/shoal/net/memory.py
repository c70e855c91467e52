"""The in-process twin of the TLS transport: same connections, same frames, no sockets.

Bytes really pass through frames and codec; only encryption is missing. A MemoryNetwork joins the transports of one
event loop, and its links can be cut (both sides lose the connection) or frozen (bytes are held, both sides hear
nothing), which is how tests take a machine away.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from shoal.errors import PeerLost, Refused, ShoalError, UsageError
from shoal.net.connection import Conn, ConnProtocol, ConnSettings
from shoal.net.identity import Peer
from shoal.net.transport import Acceptor, Address, OnConn


class MemoryNetwork:
    """Joins the memory transports of one event loop."""

    def __init__(self) -> None:
        self._links: list[MemoryLink] = []
        self._listeners: dict[str, MemoryListener] = {}
        self._next_port = 40_000

    @property
    def links(self) -> list[MemoryLink]:
        """Links that stand, oldest first."""
        self._links = [link for link in self._links if link.stands]
        return list(self._links)

    def add_link(self, link: MemoryLink) -> None:
        self._links = [*self.links, link]

    def links_of(self, node: str) -> list[MemoryLink]:
        """Links that `node` is an end of, oldest first."""
        return [link for link in self.links if node in link.nodes]

    def listener_at(self, address: str) -> MemoryListener | None:
        return self._listeners.get(address)

    def add(self, address: str, listener: MemoryListener) -> str:
        """Register a listener and return its address, with a port when it asked for port 0."""
        wanted = Address.parse(address)
        if wanted.port == 0:
            wanted = Address(wanted.host, self._next_port)
            self._next_port += 1
        if str(wanted) in self._listeners:
            raise UsageError(f"{wanted} is in use.", hint="Choose another port, or 0 for any free one.")
        self._listeners[str(wanted)] = listener
        return str(wanted)

    def remove(self, address: str) -> None:
        self._listeners.pop(address, None)


class MemoryTransport:
    """One node's access to a MemoryNetwork. `peer` plays the part of the certificate; `says` is what the node's Hello
    claims, for tests of nodes that lie."""

    def __init__(
        self, network: MemoryNetwork, peer: Peer, settings: ConnSettings | None = None, *, says: Peer | None = None
    ) -> None:
        self._network = network
        self.peer = peer
        self._says = says or peer
        self._settings = settings or ConnSettings()
        self._refused: frozenset[str] = frozenset()

    def refuse(self, nodes: frozenset[str]) -> None:
        """See Transport.refuse."""
        self._refused = nodes
        for link in self._network.links_of(self.peer.node):
            if not nodes.isdisjoint(set(link.nodes) - {self.peer.node}):
                link.cut()

    def prove(self, peer: Peer) -> Peer:
        """What the TLS transport does with the other side's certificate."""
        if peer.node in self._refused:
            raise Refused(f"{peer} was removed from the swarm.")
        return peer

    async def listen(self, address: str, on_conn: OnConn) -> MemoryListener:
        """See Transport.listen."""
        return MemoryListener(self._network, address, self, self._says, self._settings, on_conn)

    async def dial(self, addresses: Sequence[str], *, expect_node: str | None = None, timeout_s: float = 5.0) -> Conn:
        """See Transport.dial."""
        for address in addresses:
            listener = self._network.listener_at(address)
            if listener is None:
                continue
            conn = Conn(self._says, self._settings, dialed=True, expect_node=expect_node)
            listener.connect(conn, self)
            try:
                async with asyncio.timeout(timeout_s):
                    await conn.greeted()
            except (TimeoutError, ShoalError) as error:
                await conn.close()
                if isinstance(error, Refused):
                    raise
                continue
            return conn
        raise PeerLost(
            f"Nobody answers at {', '.join(addresses)}.", hint="Is the other node running?", cause="unreachable"
        )


class MemoryListener:
    """See Listener."""

    def __init__(
        self,
        network: MemoryNetwork,
        address: str,
        transport: MemoryTransport,
        says: Peer,
        settings: ConnSettings,
        on_conn: OnConn,
    ) -> None:
        self._network = network
        self._transport = transport
        self._says = says
        self._settings = settings
        self._acceptor = Acceptor(on_conn)
        self._address = network.add(address, self)

    @property
    def address(self) -> str:
        return self._address

    def connect(self, dialer: Conn, dialing: MemoryTransport) -> None:
        """Join `dialer` to a new connection on this side."""
        accepted = Conn(self._says, self._settings, dialed=False)
        self._network.add_link(MemoryLink((dialer, dialing), (accepted, self._transport)))
        self._acceptor.admit(_ready(accepted))

    async def close(self) -> None:
        self._network.remove(self._address)
        await self._acceptor.close()


async def _ready(conn: Conn) -> Conn:
    return conn


class MemoryLink:
    """Two ends of a byte stream, and the hand that can cut or freeze it."""

    def __init__(self, dialer: tuple[Conn, MemoryTransport], accepted: tuple[Conn, MemoryTransport]) -> None:
        self.nodes = (dialer[1].peer.node, accepted[1].peer.node)
        self._ends = (_MemoryEnd(self), _MemoryEnd(self))
        self._frozen = False
        self._ends[0].join(self._ends[1], ConnProtocol(dialer[0], lambda _: dialer[1].prove(accepted[1].peer)))
        self._ends[1].join(self._ends[0], ConnProtocol(accepted[0], lambda _: accepted[1].prove(dialer[1].peer)))

    @property
    def frozen(self) -> bool:
        return self._frozen

    @property
    def stands(self) -> bool:
        """False once both ends have lost it."""
        return not all(end.lost for end in self._ends)

    def cut(self) -> None:
        """Both sides lose the connection at once, as by a TCP reset."""
        for end in self._ends:
            end.lose(ConnectionResetError("connection reset"))

    def freeze(self) -> None:
        """Bytes are held from now on, in both directions, as by a frozen machine or an unplugged cable."""
        self._frozen = True

    def thaw(self) -> None:
        """Held bytes flow again."""
        self._frozen = False
        for end in self._ends:
            end.deliver_soon()


class _MemoryEnd(asyncio.Transport):
    """asyncio's transport interface over a queue to the other end."""

    def __init__(self, link: MemoryLink) -> None:
        super().__init__()
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._other: _MemoryEnd
        self._protocol: asyncio.BufferedProtocol
        self._arriving: deque[memoryview] = deque()
        self._arriving_bytes = 0
        self._high_bytes = 64 * 1024
        self._writer_paused = False
        self._reading = True
        self._scheduled = False
        self._eof_after_queue = False
        self._closing = False
        self.lost = False

    def join(self, other: _MemoryEnd, protocol: asyncio.BufferedProtocol) -> None:
        self._other = other
        self._protocol = protocol
        self._loop.call_soon(protocol.connection_made, self)

    def write(self, data: Any) -> None:
        if self._closing or self._other.lost:
            return
        other = self._other
        other._arriving.append(memoryview(bytes(data)))
        other._arriving_bytes += len(data)
        other.deliver_soon()
        if other._arriving_bytes > self._high_bytes and not self._writer_paused:
            self._writer_paused = True
            self._protocol.pause_writing()

    def deliver_soon(self) -> None:
        if not self._scheduled and not self.lost:
            self._scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        """Hand one write's worth to the protocol, so that many links share the loop fairly."""
        self._scheduled = False
        if self.lost or self._link.frozen or not self._reading:
            return
        if self._arriving:
            buffer = memoryview(self._protocol.get_buffer(-1))
            data = self._arriving.popleft()
            taken = min(len(buffer), len(data))
            buffer[:taken] = data[:taken]
            if taken < len(data):
                self._arriving.appendleft(data[taken:])
            self._arriving_bytes -= taken
            self._protocol.buffer_updated(taken)
            self._other._on_drained(self._arriving_bytes)
        if self._arriving:
            self.deliver_soon()
        elif self._eof_after_queue:
            self.close()

    def _on_drained(self, waiting_bytes: int) -> None:
        if self._writer_paused and waiting_bytes <= self._high_bytes // 4 and not self.lost:
            self._writer_paused = False
            self._protocol.resume_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = high if high is not None else 64 * 1024

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self.deliver_soon()

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """End the stream behind what was written; the other end reads that first."""
        if not self._closing:
            self._closing = True
            self._other._eof_after_queue = True
            self._other.deliver_soon()
            self._loop.call_soon(self.lose, None)

    def abort(self) -> None:
        self.close()

    def lose(self, error: Exception | None) -> None:
        """This end is gone, for the reason `error` (None: closed)."""
        if not self.lost:
            self.lost = self._closing = True
            self._arriving.clear()
            self._protocol.connection_lost(error)
