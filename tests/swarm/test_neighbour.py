"""A borrowed machine is given back at once and taken again late."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.swarm.neighbour import Neighbour, NeighbourConfig, Sample

CONFIG = NeighbourConfig(busy=0.25, quiet=0.12, busy_for_s=3.0, present_s=10.0, quiet_for_s=60.0)


def working(**first: float) -> Neighbour:
    neighbour = Neighbour(CONFIG)
    assert neighbour.sample(Sample(0.01, **first), 0.0)
    return neighbour


def test_a_quiet_machine_is_used_from_the_first_look_on() -> None:
    assert Neighbour(CONFIG).sample(Sample(0.02), 0.0)
    assert Neighbour(CONFIG).sample(Sample(0.02, input_idle_s=61.0), 0.0)
    assert not Neighbour(CONFIG).sample(Sample(0.02, input_idle_s=59.0), 0.0)
    assert not Neighbour(CONFIG).sample(Sample(0.5), 0.0)


def test_a_short_burst_is_no_work_and_a_longer_one_is() -> None:
    neighbour = working()
    assert neighbour.sample(Sample(0.9), 1.0)
    assert neighbour.sample(Sample(0.1), 2.0)
    for now in (3.0, 4.0, 5.0):
        assert neighbour.sample(Sample(0.9), now)
    assert not neighbour.sample(Sample(0.9), 6.0)
    assert neighbour.reason == "other programs use 90% of this machine's processors"


def test_hands_on_the_machine_count_at_once() -> None:
    neighbour = working(input_idle_s=100.0)
    assert not neighbour.sample(Sample(0.0, input_idle_s=0.5), 1.0)
    assert "keyboard" in neighbour.reason


def test_it_comes_back_only_after_a_whole_quiet_time() -> None:
    neighbour = working()
    for now in range(1, 6):
        neighbour.sample(Sample(0.9), float(now))
    assert not neighbour.working
    assert not neighbour.sample(Sample(0.05), 60.0)
    assert not neighbour.sample(Sample(0.2), 62.0), "not work, but not quiet either"
    assert not neighbour.sample(Sample(0.05), 121.0)
    assert neighbour.sample(Sample(0.05), 122.0)
    assert neighbour.reason == "nobody else uses this machine"


def test_input_in_the_pause_prolongs_it() -> None:
    neighbour = working(input_idle_s=100.0)
    assert not neighbour.sample(Sample(0.0, input_idle_s=1.0), 10.0)
    assert not neighbour.sample(Sample(0.0, input_idle_s=59.0), 69.5)
    assert neighbour.sample(Sample(0.0, input_idle_s=61.0), 71.0)


@given(st.lists(st.floats(0.13, 0.24), max_size=200), st.booleans())
def test_what_is_neither_quiet_nor_busy_changes_nothing(loads: list[float], works: bool) -> None:
    neighbour = Neighbour(CONFIG)
    neighbour.sample(Sample(0.0 if works else 0.5), 0.0)
    assert [neighbour.sample(Sample(load), now + 1.0) for now, load in enumerate(loads)] == [works] * len(loads)
