"""The toy model shows every mistake a replay can make."""

from __future__ import annotations

import pytest

from shoal.sim import toy

ROWS = [toy.embed(token) for token in (5, 6, 7, 8)]


def test_stages_one_after_the_other_compute_what_one_machine_computes() -> None:
    whole = toy.Cache(0, 6).run(ROWS)
    first, second = toy.Cache(0, 2), toy.Cache(2, 6)
    in_parts = [second.run(first.run(part)) for part in (ROWS[:1], ROWS[1:3], ROWS[3:])]
    assert tuple(row for part in in_parts for row in part) == whole


@pytest.mark.parametrize(
    "history",
    [ROWS[1:3], [ROWS[0], ROWS[0], *ROWS[1:3]], [ROWS[1], ROWS[0], ROWS[2]], [ROWS[0] + 1, *ROWS[1:3]]],
    ids=["a row left out", "a row twice", "rows exchanged", "a row changed"],
)
def test_a_wrong_replay_changes_every_output_after_it(history: list[int]) -> None:
    right, wrong = toy.Cache(0, 3), toy.Cache(0, 3)
    right.run(ROWS[:3])
    wrong.run(history)
    assert right.run(ROWS[3:]) != wrong.run(ROWS[3:])
    assert right.run(ROWS) != wrong.run(ROWS)


def test_generation_is_greedy_and_every_token_depends_on_the_prompt() -> None:
    tokens, outputs = toy.generate([1, 2, 3], 4, 5)
    assert len(tokens) == 5
    assert len(outputs) == 7
    assert tokens == [toy.pick(output) for output in outputs[2:]]
    assert toy.generate([1, 2, 4], 4, 5)[0] != tokens
