"""Keeps a node's view of the swarm fresh by talking to others: push-pull gossip on the swarm's own port.

Every node writes its own record and renews its lease; `rounds` syncs with the seeds once a second and at once after
a change. The decisions (what wins, what is dead) are in swarm/view.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from shoal.errors import Refused
from shoal.net.link import Link
from shoal.net.transport import Transport
from shoal.swarm.view import View
from shoal.wire.messages import Message, Record, Sync

ROUND_S = 1.0
LEASE_S = 5.0
"""Five rounds: a node is gone from the registry five seconds after its last word. Routing does not wait for that."""

REFUSALS = 3
"""Refused this often in a row, by every seed, a node is no part of the swarm. Not once: a seed that is just being
stopped may hang up before its greeting, which looks the same."""


class Directory:
    """The registry copy of one node. `record` is this node's own (None for nodes that only look)."""

    def __init__(self, node: str, *, on_change: Callable[[], None] = lambda: None) -> None:
        self.view = View(node)
        self.record: Record | None = None
        self._on_change = on_change
        self._changed = asyncio.Event()

    @staticmethod
    def incarnation() -> int:
        """Grows with every start of the process, without a file to keep it in."""
        return time.time_ns() // 1_000_000

    def publish(self, record: Record) -> None:
        """Set this node's own record; seeds hear of it at once."""
        self.record = self.view.put(record, time.monotonic())
        self._changed.set()

    def update(self, **fields: object) -> None:
        """Publish the own record with some fields changed."""
        if self.record is None:
            raise ValueError("nothing was published yet")
        self.publish(msgspec.structs.replace(self.record, version=self.record.version + 1, **fields))

    def live(self) -> list[Record]:
        return self.view.live(time.monotonic())

    def on_sync(self, message: Sync) -> Sync | None:
        """Merge what a peer sent; the answer to send back, if any."""
        now = time.monotonic()
        before = self._shape(now)
        answer = self.view.on_sync(message, now)
        if self._shape(now) != before:
            self._on_change()
        return answer

    def _shape(self, now: float) -> dict[str, tuple[str, object, object]]:
        """What of the registry matters to those who wait for servers: not every renewal of a lease is a change."""
        return {record.node: (record.state, record.span, record.labels) for record in self.view.live(now)}

    async def rounds(self, transport: Transport, seeds: Sequence[str], on_message: Callable[..., None]) -> None:
        """Sync with every seed (an address "tcp://host:port") for ever; a lost seed is dialled again each round, since
        nothing else depends on it.

        Messages other than Sync that a seed sends (Assign) go to on_message(node, message, body). Raises Refused when
        no seed lets this node in: its certificate or its protocol version is not theirs.
        """
        links: dict[str, Link] = {}
        refused: dict[str, list[str]] = {}

        def lost(node: str, cause: str, text: str) -> None:
            if cause == Refused.code:
                refused.setdefault(node, []).append(text)

        def heard(node: str, message: Message, body: memoryview) -> None:
            refused.pop(node, None)
            if isinstance(message, Sync):
                answer = self.on_sync(message)
                if answer is not None:
                    links[node].send(answer)
            else:
                on_message(node, message, body)

        try:
            while True:
                if seeds and all(len(refused.get(seed, ())) >= REFUSALS for seed in seeds):
                    raise Refused(
                        f"This node is not let into the swarm at {', '.join(seeds)}: {refused[seeds[0]][-1]}",
                        hint="Its certificate must be of that swarm, and its version of shoal the same.",
                    )
                for seed in seeds:
                    link = links.get(seed)
                    if link is None or link.lost:
                        link = links[seed] = Link(
                            transport, seed, [seed], on_message=heard, on_lost=lost, expect_node=False
                        )
                    link.send(self.view.sync())
                self._changed.clear()
                try:
                    async with asyncio.timeout(ROUND_S):
                        await self._changed.wait()
                except TimeoutError:
                    if self.record is not None:
                        self.update()
        finally:
            for link in links.values():
                await link.close()
