"""One connection is reset in the middle of an answer; both machines at its ends are well, and go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.driven import Driven
from support.reference import Reference

pytestmark = pytest.mark.slow

PROMPT = "The interpreter reads the file"
TOKENS = 80


@pytest.mark.parametrize(
    ("stage", "connection", "causes"),
    [
        pytest.param(0, 0, {"closed", "reset"}, id="driver to the first server"),
        pytest.param(1, 0, {"closed", "reset"}, id="driver to the last server"),
        pytest.param(1, 1, {"link"}, id="server to server"),
    ],
)
def test_of_an_answer_under_way(
    tmp_path: Path, reference: Reference, stage: int, connection: int, causes: set[str]
) -> None:
    async def scenario() -> None:
        async with Driven(tmp_path) as swarm:
            for blocks in ("0:4", "4:8", "0:4", "4:8"):
                await swarm.add(blocks, relayed=True)
            chains: list[list[str]] = []

            def cut(produced: int) -> None:
                if chain := swarm.driver.chain_in_use():  # none any more once the last token was chosen
                    chains.append(chain)
                if produced == TOKENS // 2:
                    relay = swarm.wires[chains[-1][stage]].relay
                    assert relay is not None
                    relay.cut(connection)

            tokens = await swarm.generate(reference.prompt(PROMPT), TOKENS, at=cut)

            assert tuple(tokens) == reference.greedy(PROMPT, TOKENS)
            (recovered,) = swarm.recovered
            assert recovered.cause in causes
            assert recovered.gone == (chains[0][stage],)
            assert chains[-1][stage] != chains[0][stage]
            assert chains[-1][1 - stage] == chains[0][1 - stage], "the other server keeps its place and its cache"

    asyncio.run(scenario())
