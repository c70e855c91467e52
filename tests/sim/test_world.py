"""The virtual clock and its queue."""

from __future__ import annotations

import pytest

from shoal.sim.world import Stuck, World


def test_calls_run_in_the_order_of_time_and_then_of_scheduling() -> None:
    world = World(0)
    seen: list[str] = []
    world.after(2.0, lambda: seen.append("late"))
    world.after(1.0, lambda: seen.append("first"))
    world.after(1.0, lambda: seen.append("second"))
    world.run_for(1.5)
    assert seen == ["first", "second"]
    assert world.now == 1.5
    world.run_for(1.0)
    assert seen == ["first", "second", "late"]


def test_waiting_for_what_nothing_can_bring_about_is_a_deadlock_at_once() -> None:
    world = World(0)

    def gossip() -> None:
        world.after(1.0, gossip, background=True)

    gossip()
    world.after(3.0, lambda: None)
    with pytest.raises(Stuck, match=r"deadlock at 3\.000 s: .* the answer came"):
        world.run_until(lambda: False, limit_s=1e9, what="the answer came")


def test_waiting_ends_at_its_limit() -> None:
    world = World(0)

    def tick() -> None:
        world.after(1.0, tick)

    tick()
    with pytest.raises(Stuck, match="after 10 virtual seconds"):
        world.run_until(lambda: False, limit_s=10.0, what="the answer came")


@pytest.mark.parametrize("delay_s", [0.0, 1e-9])
def test_a_loop_that_does_not_let_time_pass_fails_instead_of_hanging(delay_s: float) -> None:
    world = World(0)

    def again() -> None:
        world.after(delay_s, again)

    again()
    with pytest.raises(Stuck, match="a loop"):
        world.run_for(1.0)


def test_nothing_is_scheduled_into_the_past() -> None:
    with pytest.raises(ValueError, match="into the past"):
        World(0).after(-0.1, lambda: None)
