"""Steps in any order, cut anyhow, any number of times: a server computes every position once, and in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.spec.ids import BlockRange
from shoal.swarm.serving import Emit, Serving, ServingConfig, Work
from shoal.wire import messages as msg

SESSION = bytes(16)
ROWS = 24
"""Rows of the session; row i is the number i."""
CONFIG = ServingConfig(model="toy", blocks=BlockRange(0, 8), cache_tokens=256, prefill_rows=8)


def opened(start: int = 2, **fields: int) -> Serving:
    serving = Serving(CONFIG)
    serving.on_open("driver", msg.Open(SESSION, 1, "toy", start, 8, 1, ROWS, "f32", None, **fields), 0.0)
    return serving


def step(position: int, rows: int, block: int = 2) -> tuple[msg.StepItem, tuple[int, ...]]:
    return msg.StepItem(SESSION, position, rows, block), tuple(range(position, position + rows))


pieces = st.tuples(st.integers(0, ROWS - 1), st.integers(1, 8)).map(lambda p: (p[0], min(p[1], ROWS - p[0])))


@settings(max_examples=200)
@given(st.lists(pieces, max_size=30), st.lists(st.booleans(), min_size=60, max_size=60))
def test_every_position_is_computed_once_and_in_order(arrivals: list[tuple[int, int]], pauses: list[bool]) -> None:
    serving = opened()
    # Whatever came before, in the end each row comes by itself: nothing may be missing.
    arrivals = arrivals + [(at, 1) for at in range(ROWS)]
    computed: list[int] = []
    results: list[int] = []
    under_way: list[Work] = []

    def turn() -> bool:
        """Finish the batch under way and begin the next one."""
        nonlocal under_way
        if under_way:
            for action in serving.on_computed(under_way, [work.payload for work in under_way], 0.0):
                assert isinstance(action, Emit)
                assert all(item.block == 8 for item, _ in action.items), "outputs are inputs of the next block"
                results.extend(row for _, payload in action.items for row in payload)
        under_way = serving.next_batch(0.0)
        computed.extend(row for work in under_way for row in work.payload)
        return bool(under_way)

    for (position, rows), pause in zip(arrivals, [*pauses, *[False] * len(arrivals)], strict=False):
        assert serving.on_steps([step(position, rows)], 0.0) == []
        if not pause:  # else more arrives while the batch is computed, or before it begins
            turn()
    while turn():
        pass
    assert computed == list(range(ROWS))
    assert results == computed
    assert serving.position(SESSION) == ROWS


def test_rows_of_another_block_are_not_taken() -> None:
    serving = opened(start=2)
    serving.on_steps([step(0, 1, block=5)], 0.0)
    assert serving.next_batch(0.0) == []
    assert serving.counters.unknown == 1


def test_a_longer_step_replaces_a_shorter_one_that_waits_at_the_same_position() -> None:
    serving = opened()
    serving.on_steps([step(3, 1), step(3, 4), step(0, 3)], 0.0)
    computed = []
    while works := serving.next_batch(0.0):
        computed += [row for work in works for row in work.payload]
        serving.on_computed(works, [work.payload for work in works], 0.0)
    assert computed == [0, 1, 2, 3, 4, 5, 6]


def test_a_session_opened_anew_ignores_the_batch_of_its_earlier_life() -> None:
    serving = opened()
    serving.on_steps([step(0, 4)], 0.0)
    works = serving.next_batch(0.0)
    serving.on_open("driver", msg.Open(SESSION, 2, "toy", 2, 8, 1, ROWS, "f32", None), 0.0)
    assert serving.on_computed(works, [work.payload for work in works], 0.0) == []
    assert serving.position(SESSION) == 0
