"""The number of threads follows what steps really take."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from shoal.swarm.threads import ThreadConfig, ThreadTuner

CONFIG = ThreadConfig(steps=16, pause_steps=64)
Cost = Callable[[int], float]
"""Milliseconds of a step with so many threads."""


def memory_bound(limit: int) -> Cost:
    """Faster up to `limit` threads, from there on slightly slower with each."""
    return lambda threads: 8.0 / min(threads, limit) + 0.2 * max(0, threads - limit)


def spinning(threads: int) -> float:
    """Somebody else has the other processors: threads wait for each other."""
    return 8.0 * threads


def run(tuner: ThreadTuner, cost: Cost, steps: int, *, noise: float = 0.0, rows: int = 1) -> list[int]:
    """The number of threads of each step."""
    rng = random.Random(steps)
    used = []
    for _ in range(steps):
        used.append(tuner.count)
        took_ms = cost(tuner.count) * (1 + noise * rng.random()) * (10 if noise and rng.random() < 0.05 else 1)
        tuner.measured(rows=rows, blocks=1, took_ms=took_ms * (1 if rows == 1 else rows))
    return used


@pytest.mark.parametrize("limit", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_it_climbs_to_the_best_number(limit: int, noise: float) -> None:
    tuner = ThreadTuner(16, config=CONFIG)
    run(tuner, memory_bound(limit), 1000, noise=noise)
    used = run(tuner, memory_bound(limit), 1000, noise=noise)
    cost = memory_bound(limit)
    assert cost(max(set(used), key=used.count)) <= 1.15 * cost(limit)


def test_it_never_leaves_the_bounds_and_one_processor_is_never_tuned() -> None:
    tuner = ThreadTuner(3, config=CONFIG)
    assert set(run(tuner, lambda threads: 8.0 / threads, 2000)) <= {1, 2, 3}
    assert tuner.count == 3
    assert set(run(ThreadTuner(1, config=CONFIG), memory_bound(4), 500)) == {1}


def test_trials_get_rare_while_nothing_changes() -> None:
    tuner = ThreadTuner(8, config=CONFIG)
    run(tuner, memory_bound(4), 2000)
    used = run(tuner, memory_bound(4), 8000)
    assert sum(threads != 4 for threads in used) < 0.02 * len(used)
    assert tuner.settled


def test_a_neighbour_who_takes_the_processors_is_noticed_soon_and_leaving_again_too() -> None:
    tuner = ThreadTuner(8, config=CONFIG)
    run(tuner, memory_bound(4), 3000)
    used = run(tuner, spinning, 200)
    assert used[-1] == 1
    wasted = sum(spinning(threads) for threads in used) / (spinning(1) * len(used))
    assert wasted < 2.0, "the way down costs less than a second run on one thread"
    used = run(tuner, memory_bound(4), 9000)
    assert used[-1] == 4


def test_a_trial_that_goes_badly_is_short() -> None:
    tuner = ThreadTuner(2, config=CONFIG)
    used = run(tuner, spinning, 300)
    assert used.count(2) <= 2 * (CONFIG.steps // 4)


def test_prompts_count_as_well_and_batches_in_between_do_not() -> None:
    tuner = ThreadTuner(8, config=CONFIG)
    run(tuner, memory_bound(4), 1500, rows=256)
    assert tuner.count == 4
    between = ThreadTuner(8, config=CONFIG)
    assert set(run(between, memory_bound(4), 1000, rows=32)) == {1}
