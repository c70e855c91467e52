"""Generations that are held to something: what is allowed next is asked for, waited for, and survives lost servers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.inprocess import GREEDY, InProcess
from support.networks import run

from shoal.errors import ShoalError
from shoal.spec.sampling import Constraint, Sampled

PROMPT = [5, 9, 2, 77]
VOCAB = 128


def mask_of(tokens: list[int]) -> bytes:
    bits = np.zeros(1024, dtype=bool)
    bits[tokens] = True
    return np.packbits(bits, bitorder="little").tobytes()


class Counting:
    """Allows 10, then 11, then 12 ... With `hold`, every step is ready only when the test says so."""

    def __init__(self, *, hold: bool = False, breaks_at: int = 10**6) -> None:
        self.place = 0
        self._hold = hold
        self._breaks_at = breaks_at
        self.waiting: list[Callable[[], None]] = []

    def ready(self, then: Callable[[], None]) -> bool:
        if self._hold:
            self.waiting.append(then)
        return not self._hold

    def mask(self) -> bytes:
        if self.place == self._breaks_at:
            raise ShoalError("the grammar cannot go on")
        return mask_of([10 + self.place])

    def accept(self, token: int) -> None:
        assert token == 10 + self.place
        self.place += 1


async def tokens_of(swarm: InProcess, constraint: Constraint | None, count: int, seed: int | None = None) -> list[int]:
    params = GREEDY if seed is None else dataclasses.replace(GREEDY, temperature=1.0, seed=seed)
    items = swarm.driver.generate(PROMPT, params, max_tokens=count, constraint=constraint)
    return [item.token async for item in items if item is not None]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_constraint_decides_beside_generations_without_one(model_dir: Path, seed: int | None) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:3", "3:6")
            alone = await tokens_of(swarm, None, 20, seed)
            together = await asyncio.gather(*(tokens_of(swarm, each, 20, seed) for each in (None, Counting(), None)))
            assert together == [alone, list(range(10, 30)), alone]

    run(scenario)


def test_nobody_waits_for_another_ones_constraint(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:3", "3:6")
            slow = Counting(hold=True)
            held = asyncio.create_task(tokens_of(swarm, slow, 3))
            while not slow.waiting:
                await asyncio.sleep(0.001)
            assert len(await tokens_of(swarm, None, 20)) == 20
            assert slow.place == 0
            for step in range(3):
                while len(slow.waiting) <= step:
                    await asyncio.sleep(0.001)
                await asyncio.to_thread(slow.waiting[step])  # from another thread, as a real one does
            assert await held == [10, 11, 12]

    run(scenario)


def test_a_lost_server_in_the_middle_changes_nothing_that_is_held_to_something(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:3", "3:6", "3:6")
            seen: list[Sampled] = []
            items = swarm.driver.generate(PROMPT, GREEDY, max_tokens=20, constraint=Counting())
            async for item in items:
                if item is not None:
                    seen.append(item)
                if len(seen) == 10 and not swarm.recovered:
                    swarm.unplug(swarm.driver.chain_in_use()[1])
            assert [item.token for item in seen] == list(range(10, 30))
            assert len(swarm.recovered) == 1

    run(scenario)


def test_a_constraint_that_cannot_go_on_ends_its_own_generation(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:6")

            async def broken() -> None:
                with pytest.raises(ShoalError, match="cannot go on"):
                    await tokens_of(swarm, Counting(breaks_at=5), 20)

            _, whole = await asyncio.gather(broken(), tokens_of(swarm, None, 20))
            assert len(whole) == 20
            assert len(swarm.driver.sessions) == 0

    run(scenario)


def test_a_generation_that_is_given_up_while_it_waits_leaves_nothing(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:6")
            slow = Counting(hold=True)
            held = asyncio.create_task(tokens_of(swarm, slow, 3))
            while not slow.waiting:
                await asyncio.sleep(0.001)
            held.cancel()
            await asyncio.gather(held, return_exceptions=True)
            slow.waiting[0]()
            assert len(await tokens_of(swarm, None, 5)) == 5
            assert slow.place == 0
            assert len(swarm.driver.sessions) == 0

    run(scenario)
