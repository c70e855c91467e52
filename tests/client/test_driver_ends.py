"""How generations end that do not end with their last token: bad orders, broken rows, slow readers, a closed driver."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from support.inprocess import GREEDY, InProcess
from support.networks import run

from shoal.compute.sampling import Sampler
from shoal.errors import Full, NotFinite, ShoalError, UsageError
from shoal.spec.sampling import Sampled
from shoal.wire.rows import Rows

PROMPT = [5, 9, 2, 77]


@pytest.mark.parametrize(("prompt", "count"), [([], 5), (PROMPT, 0)])
def test_nothing_to_continue_or_nothing_to_add_is_refused(model_dir: Path, prompt: list[int], count: int) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            with pytest.raises(UsageError):
                await swarm.tokens(prompt, count)
            assert len(swarm.driver.sessions) == 0

    run(scenario)


def test_closing_the_driver_tells_those_who_wait_for_a_token(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:  # without servers: the answer waits for some
            waiting = asyncio.create_task(swarm.tokens(PROMPT, 5))
            while len(swarm.driver.sessions) == 0:
                await asyncio.sleep(0)
            await swarm.driver.close()
            with pytest.raises(ShoalError, match="closed"):
                await waiting

    run(scenario)


def test_a_reader_that_takes_its_last_tokens_slowly_holds_no_cache(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            (node,) = await swarm.add("0:6")
            async with aclosing(swarm.driver.generate(PROMPT, GREEDY, max_tokens=10)) as items:
                await anext(items)
                while len(swarm.driver.sessions) > 0 or swarm.servers[node].sessions > 0:
                    await asyncio.sleep(0.01)
                assert len([item async for item in items]) == 10

    run(scenario)


@pytest.mark.parametrize(("value", "missing", "error"), [(np.nan, 0, NotFinite), (0.5, 1, RuntimeError)])
def test_a_broken_row_fails_its_own_generation_only(
    model_dir: Path, value: float, missing: int, error: type[Exception]
) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            driver = swarm.driver
            width = driver.facts.hidden_size
            good = Rows("f32", width, 1, np.full(width, 0.5, np.float32).tobytes())
            bad = Rows("f32", width - missing, 1, np.full(width - missing, value, np.float32).tobytes())
            samplers = [Sampler(GREEDY, vocab_size=driver.vocab_size) for _ in range(3)]
            first, broken, last = driver._choose([good, bad, good], samplers, [1, 2, 1])
            assert isinstance(broken, error)
            assert isinstance(first, tuple)
            assert isinstance(last, tuple)
            assert isinstance(first[0], Sampled)
            assert first[0] == last[0]
            assert bytes(first[1].data) == bytes(last[1].data)
            assert [sampler.drawn for sampler in samplers] == [1, 0, 1]

    run(scenario)


def test_servers_that_the_registry_calls_full_are_asked_and_say_when_to_come_back(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            (node,) = await swarm.add("0:6", cache_tokens=64)
            serving = swarm.servers[node].server._serving
            assert serving is not None
            assert serving.pool.reserve(b"another session.", 48)
            while any(record.cache_tokens_free >= 32 for record in swarm._seed.directory.live() if record.node == node):
                await asyncio.sleep(0.02)
            with pytest.raises(Full) as caught:
                await swarm.tokens(PROMPT, 50)
            assert caught.value.retry_after_s is not None

    run(scenario)
