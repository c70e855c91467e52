"""The registry over connections: nodes hear of each other through the seed, and of those that went silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.networks import InMemory, identity, run
from support.records import record

from shoal.net.directory import Directory
from shoal.net.identity import NodeIdentity
from shoal.net.seed import Seed
from shoal.net.transport import Transport
from shoal.wire.messages import Assign, Message, Span


@asynccontextmanager
async def seeded() -> AsyncIterator[tuple[InMemory, Seed, str]]:
    """A network with a seed: (network, seed, its address)."""
    network, gateway = InMemory(), identity("gateway")
    seed = Seed(gateway)
    listener = await network.transport(gateway).listen("tcp://127.0.0.1:0", seed.on_conn)
    try:
        yield network, seed, listener.address
    finally:
        await listener.close()


@asynccontextmanager
async def joined(
    node: NodeIdentity, transport: Transport, address: str, heard: list[Message]
) -> AsyncIterator[Directory]:
    """A node that syncs with the seed."""
    directory = Directory(node)

    def on_message(sender: str, message: Message, body: memoryview) -> None:
        heard.append(message)

    rounds = asyncio.create_task(directory.rounds(transport, [address], on_message))
    try:
        yield directory
    finally:
        rounds.cancel()
        await asyncio.gather(rounds, return_exceptions=True)


def test_a_record_reaches_the_seed_at_once_and_other_nodes_through_it() -> None:
    async def scenario() -> None:
        async with seeded() as (network, seed, address):
            one, two = identity("server"), identity("server")
            async with (
                joined(one, network.transport(one), address, []) as first,
                joined(two, network.transport(two), address, []) as second,
            ):
                first.publish(record(one.peer.node, (0, 4)))
                await seed.wait_for(lambda records: len(records) == 1)
                second.publish(record(two.peer.node, (4, 8)))
                await seed.wait_for(lambda records: len(records) == 2)
                while len(second.live()) < 2:
                    await asyncio.sleep(0.005)
                first.update(state="draining")
                await seed.wait_for(lambda records: any(each.state == "draining" for each in records))

    run(scenario)


def test_the_seed_can_speak_to_a_node_that_joined_and_ignores_one_that_left() -> None:
    async def scenario() -> None:
        async with seeded() as (network, seed, address):
            heard: list[Message] = []
            server = identity("server")
            assign = Assign(Span("toy", 0, 4), "It is the only one.")
            async with joined(server, network.transport(server), address, heard) as directory:
                directory.publish(record(server.peer.node))
                await seed.wait_for(lambda records: len(records) == 1)
                seed.send(server.peer.node, assign)
                while not heard:
                    await asyncio.sleep(0.005)
            assert heard == [assign]
            seed.send(server.peer.node, assign)
            seed.send("nobody", assign)

    run(scenario)


def test_a_change_is_told_once_and_figures_of_load_are_none() -> None:
    async def scenario() -> None:
        changes: list[int] = []
        one, two = identity("server"), identity("server")
        directory = Directory(one, on_change=lambda: changes.append(1))
        other = Directory(two)
        for fields, told in (({}, 1), ({"queue_rows": 5}, 1), ({"state": "draining"}, 2)):
            if other.record is None:
                other.publish(record(two.peer.node, (0, 4)))
            else:
                other.update(**fields)
            waiting = [(directory, other, other.view.sync(0.0))]
            while waiting:
                receiver, sender, message = waiting.pop()
                answers = receiver.on_sync(message, sender.node)
                waiting += [(sender, receiver, answer) for answer in answers]
            assert len(changes) == told

    run(scenario)


def test_an_update_before_the_first_record_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nothing was published"):
        Directory(identity("server")).update(state="gone")
