"""A link sends in order from the moment it is made, and reports its loss once and never after it was closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from support.messages import SESSION, step
from support.networks import InMemory, identity, run

from shoal.net.link import Link
from shoal.net.transport import Conn, Transport
from shoal.wire.messages import Close, Message, Opened, Step


@dataclass
class Heard:
    """What a link's owner was told."""

    messages: list[tuple[str, Message]] = field(default_factory=list)
    losses: list[tuple[str, str]] = field(default_factory=list)

    def on_message(self, node: str, message: Message, body: memoryview) -> None:
        self.messages.append((node, message))

    def on_lost(self, node: str, cause: str, text: str) -> None:
        self.losses.append((node, cause))


@dataclass
class Place:
    """A server that keeps what it hears, and the transport of a gateway that can dial it."""

    network: InMemory
    node: str
    address: str
    gateway: Transport
    conns: asyncio.Queue[Conn]

    def link(self, heard: Heard, *, node: str | None = None, address: str | None = None) -> Link:
        return Link(
            self.gateway,
            node or self.node,
            [address or self.address],
            on_message=heard.on_message,
            on_lost=heard.on_lost,
            dial_timeout_s=1.0,
        )


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    network, server = InMemory(), identity("server")
    conns: asyncio.Queue[Conn] = asyncio.Queue()

    async def hold(conn: Conn) -> None:
        conns.put_nowait(conn)
        await asyncio.Event().wait()

    listener = await network.transport(server).listen("tcp://127.0.0.1:0", hold)
    try:
        yield Place(network, server.peer.node, listener.address, network.transport(identity("gateway")), conns)
    finally:
        await listener.close()


async def until(ready: Sequence[object]) -> None:
    while not ready:
        await asyncio.sleep(0.005)


def test_what_is_sent_before_the_link_is_up_arrives_first_and_in_order() -> None:
    async def scenario() -> None:
        async with place() as there:
            heard = Heard()
            link = there.link(heard)
            for position in range(3):
                link.send(*step(1, position=position))
            conn = await there.conns.get()
            for position in range(3, 6):
                link.send(*step(1, position=position))
            positions = []
            for _ in range(6):
                message, _ = await conn.receive()
                assert isinstance(message, Step)
                positions.append(message.items[0].position)
            assert positions == list(range(6))
            await conn.send(Opened(SESSION, 1))
            await until(heard.messages)
            assert heard.messages == [(there.node, Opened(SESSION, 1))]
            await link.close()

    run(scenario)


@pytest.mark.parametrize(("how", "cause"), [("cut", "reset"), ("freeze", "silent"), ("hang up", "closed")])
def test_a_loss_is_reported_once_with_its_cause(how: str, cause: str) -> None:
    async def scenario() -> None:
        async with place() as there:
            heard = Heard()
            link = there.link(heard)
            conn = await there.conns.get()
            if how == "hang up":
                await conn.close()
            elif how == "cut":
                there.network.cut()
            else:
                there.network.freeze()
            await until(heard.losses)
            assert link.lost
            link.send(Close([SESSION]))
            await link.close()
            await asyncio.sleep(0.05)
            assert heard.losses == [(there.node, cause)]

    run(scenario)


def test_nobody_at_the_address_is_a_loss_and_what_was_sent_is_forgotten() -> None:
    async def scenario() -> None:
        async with place() as there:
            heard = Heard()
            link = there.link(heard, address="tcp://127.0.0.1:9")
            link.send(Close([SESSION]))
            await until(heard.losses)
            assert heard.losses == [(there.node, "unreachable")]
            await link.close()

    run(scenario)


def test_another_node_at_the_address_is_a_loss() -> None:
    async def scenario() -> None:
        async with place() as there:
            heard = Heard()
            link = there.link(heard, node="0" * 32)
            await until(heard.losses)
            assert heard.losses == [("0" * 32, "refused")]
            await link.close()

    run(scenario)


def test_a_link_that_its_owner_closes_is_no_loss() -> None:
    async def scenario() -> None:
        async with place() as there:
            for early in (True, False):
                heard = Heard()
                link = there.link(heard)
                if not early:
                    await there.conns.get()
                await link.close()
                await asyncio.sleep(0.05)
                assert heard.losses == []

    run(scenario)
