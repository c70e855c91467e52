"""Kill a server in the middle of an answer, and compare the words with those of an answer that nobody disturbed.

    .venv/bin/python examples/kill_a_server.py

Two servers for each half of the demo model. The same prompt is continued twice; the second time the server that holds
the upper half of this very answer gets SIGKILL. Exit code 1 when the words differ.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import httpx
from openai import AsyncOpenAI

from shoal.cli.up import demo_model
from shoal.launch.local import LocalSwarm, RunningServer, SwarmPlan

PROMPT = "When a Python program"
MAX_TOKENS = 300
KILL_AFTER = 100
"""Tokens into the answer."""


@dataclass
class Answer:
    tokens: list[str] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between a token and the next."""
        return [(after - before) * 1e3 for before, after in pairwise(self.arrived)]


async def main() -> int:
    print("Starting 4 servers: 2 for each half of the demo model ...", flush=True)
    # exact: a row's fp32 numbers do not depend on the rows that happen to be computed beside it.
    plan = SwarmPlan(demo_model(), "shoal-demo", servers=2, replicas=2, exact=True)
    async with (
        LocalSwarm(plan) as swarm,
        AsyncOpenAI(base_url=swarm.api, api_key=swarm.key) as client,
        httpx.AsyncClient(headers={"Authorization": f"Bearer {swarm.key}"}, trust_env=False) as http,
    ):
        undisturbed = await answer(client)
        print(f"\nUndisturbed: {''.join(undisturbed.tokens[:30])!r} ... {len(undisturbed.tokens)} tokens\n", flush=True)
        killed: list[RunningServer] = []

        async def kill_one() -> None:
            killed.append(await server_in_use(swarm, http))
            os.kill(killed[0].pid, signal.SIGKILL)
            print(f"  *** server {killed[0].id[:8]} (blocks {killed[0].blocks}) killed ***", flush=True)

        disturbed = await answer(client, beside=kill_one)
        status = (await http.get(f"{swarm.api}/shoal/status")).json()
    return report(undisturbed, disturbed, status["driver"])


async def answer(client: AsyncOpenAI, *, beside: Callable[[], Awaitable[None]] | None = None) -> Answer:
    """Continue the prompt greedily, one chunk per token; once KILL_AFTER tokens have come, run `beside` beside it."""
    result = Answer()
    task: asyncio.Future[None] | None = None
    stream = await client.completions.create(
        model="shoal-demo",
        prompt=PROMPT,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        result.tokens.append(chunk.choices[0].text)
        result.arrived.append(time.monotonic())
        if beside is not None and len(result.tokens) == KILL_AFTER:
            task = asyncio.ensure_future(beside())
    if task is not None:
        await task
    return result


async def server_in_use(swarm: LocalSwarm, http: httpx.AsyncClient) -> RunningServer:
    """The server that holds the upper half of the running answer. Servers report their sessions twice a second."""
    upper = {server.id: server for server in swarm.servers if not server.blocks.startswith("0:")}
    while True:
        status = (await http.get(f"{swarm.api}/shoal/status")).json()
        if not status["driver"]["running"]:
            raise SystemExit("The answer ended before a server could be killed.")
        for record in status["servers"]:
            if record["id"] in upper and record["sessions"]:
                return upper[record["id"]]
        await asyncio.sleep(0.02)


def report(undisturbed: Answer, disturbed: Answer, driver: dict[str, object]) -> int:
    same = disturbed.tokens == undisturbed.tokens
    print(f"\nWith the kill: {len(disturbed.tokens)} tokens, lost servers replaced: {driver['failovers']}")
    print(f"  the words are {'the same' if same else 'NOT the same'}")
    print(f"  {driver['replayed_rows']} positions were computed again on the other server")
    print(f"  a token usually came after {median(disturbed.gaps_ms):.0f} ms; the longest gap was", end=" ")
    print(f"{max(disturbed.gaps_ms):.0f} ms (undisturbed: {max(undisturbed.gaps_ms):.0f} ms)")
    return 0 if same and driver["failovers"] else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
