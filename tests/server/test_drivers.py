"""Which connection of a node carries its sessions."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.inprocess import InProcess
from support.networks import certified, identity, run

from shoal.compute.families import random_model
from shoal.errors import PeerLost
from shoal.net.memory import MemoryTransport
from shoal.net.transport import Conn
from shoal.wire import messages as msg

GOSSIP = msg.Sync(digest={}, records=[], answers=2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_model("llama", seed=3).save_pretrained(path)
    return path


async def opened(conn: Conn, number: int, model: str) -> None:
    """Open a session over `conn` and hear that it is open."""
    session = bytes([number]) * 16
    await conn.send(msg.Open(session, 1, model, 0, 6, 1, 8, "f32", None))
    answer, _ = await conn.receive()
    assert answer == msg.Opened(session, 1)


def test_gossip_over_a_second_connection_ends_no_session_but_a_second_driver_connection_does(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            (node,) = await swarm.add("0:6")
            record = swarm._seed.directory.view.get(node)
            assert record is not None
            assert record.span is not None
            transport = MemoryTransport(swarm._network, certified(identity("client")))
            driving = await transport.dial(record.addresses)
            await opened(driving, 1, record.span.model)

            gossiping = await transport.dial(record.addresses)
            await gossiping.send(GOSSIP)
            answer, _ = await gossiping.receive()
            assert isinstance(answer, msg.Sync)
            assert swarm.servers[node].sessions == 1

            again = await transport.dial(record.addresses)
            await opened(again, 2, record.span.model)
            assert swarm.servers[node].sessions == 1  # that of the connection given up is gone

            await driving.send(msg.Open(bytes([3]) * 16, 1, record.span.model, 0, 6, 1, 8, "f32", None))
            with pytest.raises(PeerLost):
                await driving.receive()
            assert swarm.servers[node].sessions == 1
            for conn in (gossiping, again):
                await conn.close()
            while swarm.servers[node].sessions:
                await asyncio.sleep(0.01)

    run(scenario)
