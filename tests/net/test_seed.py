"""The registry seed speaks to each node over the right connection."""

from __future__ import annotations

import asyncio

from support.networks import OverTls, identity, run

from shoal.net.directory import Directory
from shoal.net.seed import Seed
from shoal.wire.messages import Assign, Span


def test_a_command_that_looks_in_beside_a_server_of_its_machine_leaves_that_server_s_connection_alone() -> None:
    async def scenario() -> None:
        network = OverTls()
        admin, server = identity("gateway"), identity("server")
        seed = Seed(admin)
        listener = await network.transport(admin).listen("tcp://127.0.0.1:0", seed.on_conn)
        first = await network.transport(server).dial([listener.address])
        second = await network.transport(server).dial([listener.address])
        for conn in (first, second):
            await conn.send(Directory(server).view.sync(0.0))
            await conn.receive()
        await second.close()
        order = Assign(Span("demo", 0, 4), "the seed says so")

        async def until_sent() -> None:
            while True:  # the seed hears of the end a moment later
                seed.send(server.peer.node, order)
                try:
                    async with asyncio.timeout(0.05):
                        assert (await first.receive())[0] == order
                        return
                except TimeoutError:
                    continue

        await until_sent()
        await first.close()
        await listener.close()
        await network.close()

    run(scenario)
