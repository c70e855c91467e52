"""Ask a private swarm a question with the OpenAI client, and watch the answer come.

    .venv/bin/python examples/ask.py
    .venv/bin/python examples/ask.py "What is SQLite?" --servers 2

Starts a gateway and the servers on this machine with the demo model, streams one answer, says which servers it went
through, and stops everything.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import httpx
from openai import AsyncOpenAI

from shoal.cli.up import demo_model
from shoal.launch.local import LocalSwarm, SwarmPlan


async def main(question: str, servers: int) -> None:
    print(f"Starting {servers} servers, each with a part of the demo model ...", flush=True)
    start = time.monotonic()
    async with LocalSwarm(SwarmPlan(demo_model(), "shoal-demo", servers=servers)) as swarm:
        print(f"Ready after {time.monotonic() - start:.1f} s.\n\n> {question}\n", flush=True)
        await ask(swarm, question)
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {swarm.key}"}, trust_env=False) as http:
            status = (await http.get(f"{swarm.api}/shoal/status")).json()
        print("\nEvery word of it went through")
        for server in swarm.servers:
            print(f"  blocks {server.blocks:<5} on server {server.id[:8]}, process {server.pid}")
        print(f"{status['driver']['tokens']} tokens, {status['driver']['running']} sessions still open.")


async def ask(swarm: LocalSwarm, question: str) -> None:
    """Stream one answer to the terminal, a token at a time."""
    async with AsyncOpenAI(base_url=swarm.api, api_key=swarm.key) as client:
        stream = await client.chat.completions.create(
            model=swarm.plan.model_name,
            messages=[{"role": "user", "content": question}],
            max_tokens=80,
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="Who are you?")
    parser.add_argument("--servers", type=int, default=3)
    options = parser.parse_args()
    asyncio.run(main(options.question, options.servers))
