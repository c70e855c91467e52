"""Figures from measurements."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.swarm.estimates import MAX_LINKS, Links, Speed, Window


def test_the_initial_value_stands_until_something_was_measured() -> None:
    window = Window(5.0)
    assert window.median() == 5.0
    window.add(1.0)
    assert window.median() == 1.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=100), st.floats(0.01, 1.0))
def test_a_quantile_is_a_value_of_the_window_with_that_share_below_it(values: list[float], q: float) -> None:
    window = Window(0.0, size=32)
    for value in values:
        window.add(value)
    kept = values[-32:]
    answer = window.quantile(q)
    assert answer in kept
    assert sum(value <= answer for value in kept) >= q * len(kept)
    assert sum(value < answer for value in kept) < q * len(kept)


def test_the_median_of_an_odd_window_is_the_median() -> None:
    window = Window(0.0)
    values = [5.0, 1.0, 9.0, 3.0, 7.0]
    for value in values:
        window.add(value)
    assert window.median() == statistics.median(values)


def test_one_slow_step_in_many_does_not_move_the_speed() -> None:
    speed = Speed(1.0, 0.1)
    for _ in range(10):
        speed.measured(rows=1, blocks=4, took_ms=8.0)
    speed.measured(rows=1, blocks=4, took_ms=8000.0)
    assert speed.decode_ms_per_block == 2.0


def test_small_batches_tell_decode_speed_large_ones_prefill_speed_and_those_between_neither() -> None:
    speed = Speed(1.0, 0.1)
    speed.measured(rows=8, blocks=2, took_ms=6.0)
    speed.measured(rows=30, blocks=2, took_ms=1e9)
    speed.measured(rows=100, blocks=2, took_ms=40.0)
    assert speed.decode_ms_per_block == 3.0
    assert speed.prefill_ms_per_block_token == 0.2
    with pytest.raises(ValueError, match="rows and blocks"):
        speed.measured(rows=0, blocks=1, took_ms=1.0)


def test_a_link_is_the_same_both_ways_and_unmeasured_ones_take_the_default() -> None:
    links = Links(default_rtt_ms=2.0)
    links.measured("b", "a", 10.0)
    assert links.rtt_ms("a", "b") == links.rtt_ms("b", "a") == 10.0
    assert links.rtt_ms("a", "c") == 2.0
    assert links.rtt_ms("a", "a") == 0.0


def test_the_link_table_forgets_what_was_measured_longest_ago() -> None:
    links = Links(default_rtt_ms=0.0)
    for i in range(MAX_LINKS + 1):
        links.measured("a", f"n{i}", 1.0)
    assert links.rtt_ms("a", "n0") == 0.0
    assert links.rtt_ms("a", "n1") == 1.0
