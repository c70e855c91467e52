"""Drive a swarm from Python, without HTTP: the blocks are on servers, the embedding, the head and the choice are here.

    .venv/bin/python examples/python_client.py

Starts two servers with half of the demo model each, joins them as a client with a certificate of its own, and continues
three prompts at once. Being next to the head it can look at every choice: tokens the model was unsure of are shown with
the runner-up.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import httpx
import torch

from shoal.admin.own import own_node
from shoal.cli.up import demo_model
from shoal.client.driver import Driver, DriverConfig
from shoal.client.served import load_tokenizer
from shoal.compute.facts import describe
from shoal.compute.head import HeadEngine
from shoal.compute.split import build_ends
from shoal.launch.local import LocalSwarm, SwarmPlan
from shoal.net.directory import Directory
from shoal.net.home import Home
from shoal.net.tls import TlsTransport
from shoal.net.worker import Worker
from shoal.spec.sampling import SamplingParams
from shoal.swarm.routing import missing_blocks

PROMPTS = ("This function returns", "In SQLite, a", "The database server")
MAX_TOKENS = 24
UNSURE = 0.25
"""Probability below which a choice is worth a second look."""


async def main() -> None:
    torch.set_num_threads(1)
    model_dir = demo_model()
    async with AsyncExitStack() as stack:
        print("Starting 2 servers with half of the demo model each ...", flush=True)
        swarm = await stack.enter_async_context(LocalSwarm(SwarmPlan(model_dir, "shoal-demo", servers=2)))
        driver = await join(stack, swarm, model_dir)
        tokenizer = load_tokenizer(model_dir)

        # Three generations at once: on every server their rows share one batch.
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        answers = await asyncio.gather(*(continue_(driver, prompt) for prompt in prompts))
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            print(f"\n> {prompt}{tokenizer.decode([token for token, _, _ in answer])}")
            for token, chance, (other, other_chance) in answer:
                if chance < UNSURE:
                    words = [repr(tokenizer.decode([each])) for each in (token, other)]
                    print(f"    unsure: {words[0]} ({chance:.0%}) or {words[1]} ({other_chance:.0%})")

        statistics = driver.statistics()
        print(f"\n{statistics['tokens']} tokens in {statistics['sessions']} sessions; round trip to each server:")
        for node, rtt_ms in statistics["rtt_ms"].items():
            print(f"  {node[:8]}  {rtt_ms:.2f} ms")


async def join(stack: AsyncExitStack, swarm: LocalSwarm, model_dir: Path) -> Driver:
    """Become a client of the swarm: a certificate, a copy of the registry, and the two ends of the model."""
    # Whoever can read the authority's key can let nodes in. Here that is us: we started the swarm. On another machine,
    # shoal.net.enrol.join does it with a token.
    identity = own_node(Home(swarm.swarm_dir), "example", "client")
    transport = TlsTransport(identity)
    directory = Directory(identity, on_change=lambda: driver.view_changed())
    facts = describe(model_dir)
    worker = Worker("head", lambda: torch.set_num_threads(1))
    stack.callback(worker.close)
    driver = Driver(
        facts,
        HeadEngine(build_ends(model_dir, dtype=torch.float32)),
        node=identity.peer.node,
        transport=transport,
        directory=directory,
        config=DriverConfig(wire="f32"),
        worker=worker,
    )
    driver.start()
    stack.push_async_callback(driver.close)
    # Any node answers gossip: one server is enough to hear of all of them.
    gossip = asyncio.create_task(directory.rounds(transport, [await swarm_address(swarm)]))
    stack.callback(gossip.cancel)
    async with asyncio.timeout(10):
        while missing_blocks(directory.live(), facts.name, facts.num_blocks):
            await asyncio.sleep(0.05)
    return driver


async def swarm_address(swarm: LocalSwarm) -> str:
    """Where some node of the swarm listens for others, e.g. "tcp://127.0.0.1:40393"."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {swarm.key}"}, trust_env=False) as http:
        status = (await http.get(f"{swarm.api}/shoal/status")).json()
    return str(status["servers"][0]["addresses"][0])


async def continue_(driver: Driver, prompt: list[int]) -> list[tuple[int, float, tuple[int, float]]]:
    """Greedy continuation: (token, its probability, (the runner-up, its probability)) for every step."""
    greedy = SamplingParams(temperature=0.0, logprobs=2)
    answer = []
    async with aclosing(driver.generate(prompt, greedy, max_tokens=MAX_TOKENS)) as steps:
        async for step in steps:
            if step is None:  # admitted: every server has reserved its cache
                continue
            other, other_logprob = next(top for top in step.top if top[0] != step.token)
            assert step.logprob is not None
            answer.append((step.token, math.exp(step.logprob), (other, math.exp(other_logprob))))
    return answer


if __name__ == "__main__":
    asyncio.run(main())
