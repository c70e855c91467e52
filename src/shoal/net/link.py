"""An outgoing link: dials when made, sends in order, hears what comes back, and reports its end exactly once.

Servers push to the next server over one, drivers speak to servers over one. `send` never blocks, so a slow or frozen
peer cannot hold up the loop that computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.errors import PeerLost, ShoalError
from shoal.net.outbox import Outbox
from shoal.net.transport import Body, Conn, Peer, Transport
from shoal.wire.messages import Message

OnMessage = Callable[[str, Message, memoryview], None]
"""on_message(node, message, body)"""
OnLost = Callable[[str, str, str], None]
"""on_lost(node, cause, text): cause is one word (see PeerLost), text is for people."""


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
        self.lost = False
        self._transport = transport
        self._addresses = tuple(addresses)
        self._expect_node = node if expect_node else None
        self._on_message = on_message
        self._on_lost = on_lost
        self._dial_timeout_s = dial_timeout_s
        self._early: list[tuple[Message, Sequence[Body]]] = []
        self._conn: Conn | None = None
        self._outbox: Outbox | None = None
        self._task = asyncio.create_task(self._run(), name=f"link to {node}")

    def send(self, message: Message, body: Sequence[Body] = ()) -> None:
        """Send, or keep until the link is up. After the loss nothing is sent; the owner was told."""
        if self.lost:
            return
        if self._outbox is not None:
            self._outbox.put(message, body)
        else:
            self._early.append((message, body))

    @property
    def peer(self) -> Peer | None:
        """Who is at the other end; None before the link is up."""
        return None if self._conn is None else self._conn.peer

    @property
    def rtt_s(self) -> float | None:
        """Round trip measured by the connection's own pings; None before the first."""
        return None if self._conn is None else self._conn.rtt_s

    async def close(self) -> None:
        """Hang up after what the connection has taken; on_lost is not called."""
        self.lost = True
        if self._conn is not None:
            await self._conn.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loss: ShoalError = PeerLost("The link broke.")
        try:
            self._conn = await self._transport.dial(
                self._addresses, expect_node=self._expect_node, timeout_s=self._dial_timeout_s
            )
            self._outbox = Outbox(self._conn)
            for message, body in self._early:
                self._outbox.put(message, body)
            self._early.clear()
            while True:
                message, view = await self._conn.receive()
                self._on_message(self.node, message, view)
        except ShoalError as error:
            loss = error
        finally:
            if self._conn is not None:
                self._conn.abort()
            if self._outbox is not None:
                await self._outbox.close()
            if not self.lost:
                self.lost = True
                self._on_lost(self.node, loss.cause if isinstance(loss, PeerLost) else loss.code, str(loss))
