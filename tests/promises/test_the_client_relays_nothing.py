"""Outputs go straight from server to server. The client feeds the first server and hears from the last one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.driven import Driven
from support.reference import Reference

from shoal.wire.messages import Message, Step

pytestmark = pytest.mark.slow

PROMPT = "The interpreter reads the file"
TOKENS = 40
SPANS = ("0:3", "3:6", "6:8")


def fed(sent: list[tuple[str, Message]]) -> dict[str, list[int]]:
    """The positions in the steps that were sent to each node, in order."""
    found: dict[str, list[int]] = {}
    for node, message in sent:
        if isinstance(message, Step):
            for item in message.items:
                found.setdefault(node, []).extend(range(item.position, item.position + item.rows))
    return found


def test_between_three_servers(tmp_path: Path, reference: Reference) -> None:
    async def scenario() -> None:
        async with Driven(tmp_path) as swarm:
            first, second, third = [await swarm.add(blocks) for blocks in SPANS]
            prompt = reference.prompt(PROMPT)
            tokens = await swarm.generate(prompt, TOKENS)

            assert tuple(tokens) == reference.greedy(PROMPT, TOKENS)
            rows = list(range(len(prompt) + TOKENS - 1))  # nothing is predicted from the last token
            assert fed(swarm.wire.sent) == {first: rows}
            assert fed(swarm.wires[first].sent) == {second: rows}
            assert fed(swarm.wires[second].sent) == {third: rows}
            assert fed(swarm.wires[third].sent) == {}

    asyncio.run(scenario())
