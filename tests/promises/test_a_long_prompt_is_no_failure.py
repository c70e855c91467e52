"""A server that computes for ten seconds, five times as long as a silent one is given, still answers pings."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from support.driven import Driven
from support.reference import Reference
from support.slow_server import LONG_ROWS, PREFILL_S

from shoal.net.transport import Heartbeat
from shoal.wire.messages import Open

pytestmark = pytest.mark.slow

PROMPT = "The interpreter reads the file. " * 20
TOKENS = 5


def test_of_the_server_that_works_on_it(tmp_path: Path, reference: Reference) -> None:
    async def scenario() -> None:
        async with Driven(tmp_path) as swarm:
            chain = [
                await swarm.add_process("0:4"),
                await swarm.add_process("4:8", "support.slow_server"),
            ]
            prompt = reference.prompt(PROMPT)
            assert LONG_ROWS < len(prompt) < 256, "one step, and one that the slow server takes for long"

            began = time.monotonic()
            generating = asyncio.create_task(swarm.generate(prompt, TOKENS))
            # A spare server that could take over if the driver gave the slow one up.
            spare = await swarm.add_process("4:8")
            tokens = await generating

            assert time.monotonic() - began > PREFILL_S > 4 * Heartbeat().silent_after_s, "it was slow indeed"
            assert tuple(tokens) == reference.greedy(PROMPT, TOKENS)
            assert swarm.recovered == []
            opened = [node for node, message in swarm.wire.sent if isinstance(message, Open)]
            assert sorted(opened) == sorted(chain), "nobody was asked to take over"
            assert spare not in opened

    asyncio.run(scenario())
