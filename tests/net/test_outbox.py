"""An outbox takes everything at once and keeps the order of each lane, however slow the other side reads."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.messages import SESSION, journal, step
from support.networks import FAST, InMemory, identity, run

from shoal.net.outbox import GOSSIP_WAITING, Outbox
from shoal.net.transport import Conn
from shoal.wire.messages import Journal, Opened, Step, Sync

SMALL = dataclasses.replace(FAST, send_queue_bytes=64 * 1024, receive_queue_bytes=64 * 1024)
JOURNAL_COPIES = 40
"""Of 256 KiB each: many times what the connection takes."""


@asynccontextmanager
async def server_to_gateway() -> AsyncIterator[tuple[Conn, Conn]]:
    """A server's connection to a gateway: (the server's end, the gateway's)."""
    network = InMemory()
    accepted: asyncio.Future[Conn] = asyncio.get_running_loop().create_future()

    async def hold(conn: Conn) -> None:
        accepted.set_result(conn)
        await asyncio.Event().wait()

    listener = await network.transport(identity("server"), SMALL).listen("tcp://127.0.0.1:0", hold)
    gateway = await network.transport(identity("gateway"), SMALL).dial([listener.address])
    try:
        yield await accepted, gateway
    finally:
        await gateway.close()
        await listener.close()


def test_a_full_journal_lane_holds_up_neither_the_sender_nor_a_step() -> None:
    async def scenario() -> None:
        async with server_to_gateway() as (server, gateway):
            outbox = Outbox(server)
            for position in range(JOURNAL_COPIES):
                outbox.put(*journal(128, position=128 * position, width=512))
            outbox.put(*step(1, position=7))
            outbox.put(Opened(SESSION, 1))
            kinds, positions = [], []
            while len(kinds) < JOURNAL_COPIES + 2:
                message, _ = await gateway.receive()
                kinds.append(type(message))
                if isinstance(message, Journal):
                    positions.append(message.items[0].position)
            assert max(kinds.index(Step), kinds.index(Opened)) < JOURNAL_COPIES // 4
            assert positions == [128 * number for number in range(JOURNAL_COPIES)]
            await outbox.close()

    run(scenario)


def test_after_a_loss_nothing_is_sent_nothing_raises_and_nothing_is_left_running() -> None:
    async def scenario() -> None:
        async with server_to_gateway() as (server, gateway):
            outbox = Outbox(server)
            for position in range(JOURNAL_COPIES):
                outbox.put(*journal(128, position=128 * position, width=512))
            gateway.abort()
            while server.is_open:
                await asyncio.sleep(0)
            outbox.put(*step(1))
            outbox.put(Opened(SESSION, 1))
            await outbox.close()

    run(scenario)


def test_closing_forgets_what_still_waits() -> None:
    async def scenario() -> None:
        async with server_to_gateway() as (server, gateway):
            outbox = Outbox(server)
            for position in range(JOURNAL_COPIES):
                outbox.put(*journal(128, position=128 * position, width=512))
            await outbox.close()
            await server.send(Opened(SESSION, 1))
            before = 0
            while not isinstance((await gateway.receive())[0], Opened):
                before += 1
            assert before < JOURNAL_COPIES // 2

    run(scenario)


def test_a_peer_that_asks_for_gossip_and_reads_none_fills_no_memory() -> None:
    async def scenario() -> None:
        async with server_to_gateway() as (server, gateway):
            outbox = Outbox(server)
            answer = Sync({number.to_bytes(8, "big"): (1, 1) for number in range(100)}, [], 0)
            for _ in range(6000):
                outbox.put(answer)
                await asyncio.sleep(0)
            assert sum(map(len, outbox._queues.values())) <= GOSSIP_WAITING
            # And what the other side has taken and not read is bounded in bytes, though none of it has a body.
            assert len(gateway._inbox) * 1000 < 4 * SMALL.receive_queue_bytes
            await outbox.close()

    run(scenario)
