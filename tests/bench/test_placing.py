"""Real processes: sessions take the near replica, and an idle server comes to the help of the bottleneck."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from support.swarm import DEMO

from shoal.bench import placing
from shoal.bench.delay import Delay
from shoal.net.transport import Address


def test_the_relay_delays_both_ways_and_changes_nothing() -> None:
    async def scenario() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(100_000):
                writer.write(data)
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with Delay(Address("127.0.0.1", server.sockets[0].getsockname()[1]), 40.0) as way:
            address = Address.parse(way.address)
            reader, writer = await asyncio.open_connection(address.host, address.port)
            sent = bytes(range(256)) * 2000
            began = time.monotonic()
            writer.write(sent)
            got = await reader.readexactly(len(sent))
            took_s = time.monotonic() - began
            writer.close()
        server.close()
        assert got == sent
        assert took_s >= 0.04

    asyncio.run(scenario())


@pytest.mark.long
def test_sessions_take_the_near_replica(tmp_path: Path) -> None:
    (figure,) = asyncio.run(placing.near(tmp_path, DEMO))
    assert figure.ok, figure


@pytest.mark.long
def test_an_idle_server_moves_to_the_bottleneck_and_no_session_dies(tmp_path: Path) -> None:
    moved, whole = asyncio.run(placing.relieved(tmp_path, DEMO))
    assert moved.value <= 3 * moved.reach, moved  # the bar itself is the benchmark's: CI machines are shared
    assert whole.ok, whole
