"""The simulated network keeps the promises of a real one, and breaks like one."""

from __future__ import annotations

import pytest

from shoal.sim.links import SILENT_S, Body, End, LinkConfig, Network
from shoal.sim.machines import Machine
from shoal.sim.world import World
from shoal.wire import messages as msg


class Peer(Machine):
    """Keeps what it hears."""

    def __init__(self, world: World, network: Network, name: str) -> None:
        super().__init__(world, network, name)
        self.heard: list[int] = []
        self.lost: list[tuple[float, str]] = []
        self.ends: list[End] = []
        self.start()

    def accept(self, end: End) -> None:
        self.ends.append(end)
        end.on_frame = self._on_frame
        end.on_lost = lambda end, cause: self.lost.append((self.world.now, cause))

    def _on_frame(self, end: End, message: msg.Message, body: Body) -> None:
        assert isinstance(message, msg.Ping | msg.Step)
        self.heard.append(message.nonce if isinstance(message, msg.Ping) else body[0])


def pair(seed: int = 0, **links: float) -> tuple[World, Network, Peer, Peer]:
    """Two machines with a connection from the first to the second."""
    world = World(seed)
    network = Network(world, LinkConfig(**links))  # type: ignore[arg-type]
    a, b = Peer(world, network, "a"), Peer(world, network, "b")

    def connected(end: End | None) -> None:
        assert end is not None
        a.accept(end)

    network.dial(a, "b", connected)
    world.run_for(1.0)
    return world, network, a, b


def send(a: Peer, *numbers: int) -> None:
    for number in numbers:
        a.ends[-1].send(msg.Ping(number))


@pytest.mark.parametrize("seed", range(5))
def test_frames_of_one_connection_arrive_once_and_in_order_whatever_is_lost(seed: int) -> None:
    world, _, a, b = pair(seed, loss=0.3, duplicate=1.0)
    send(a, *range(50))
    world.run_for(60.0)
    assert b.heard == list(range(50))


def test_a_step_may_arrive_twice() -> None:
    world, _, a, b = pair(duplicate=1.0)
    a.ends[0].send(msg.Step([msg.StepItem(bytes(16), 0, 1)], msg.Tensor("f32", 1, 1)), (7,))
    world.run_for(1.0)
    assert b.heard == [7, 7]


def test_a_killed_process_resets_its_connections_at_once() -> None:
    world, _, a, b = pair()
    died_s = world.now
    b.kill()
    world.run_for(5.0)
    ((heard_s, cause),) = a.lost
    assert cause == "reset"
    assert heard_s - died_s < 0.1


@pytest.mark.parametrize("how", ["freeze", "power_off"])
def test_a_frozen_or_dark_machine_is_noticed_by_its_silence(how: str) -> None:
    world, _, a, b = pair()
    died_s = world.now
    if how == "freeze":
        b.freeze()
    else:
        b.kill(power_off=True)
    world.run_for(5.0)
    ((heard_s, cause),) = a.lost
    assert cause == "silent"
    assert SILENT_S <= heard_s - died_s <= SILENT_S + 0.6


def test_a_short_freeze_delays_and_loses_nothing() -> None:
    world, _, a, b = pair()
    b.freeze()
    send(a, 1, 2)
    world.run_for(1.0)
    assert b.heard == []
    b.thaw()
    world.run_for(1.0)
    assert b.heard == [1, 2]
    assert not a.lost


def test_a_machine_thawed_too_late_reads_what_came_before_the_connection_was_given_up() -> None:
    world, _, a, b = pair()
    b.freeze()
    send(a, 1)
    world.run_for(5.0)
    b.thaw()
    world.run_for(1.0)
    assert b.heard == [1]
    assert [cause for _, cause in b.lost] == ["closed"]


def test_a_one_way_partition_is_noticed_by_the_side_that_hears_nothing() -> None:
    world, network, a, b = pair()
    network.block("b", "a")
    send(a, 1)
    world.run_for(5.0)
    assert b.heard == [1], "the other direction works"
    assert [cause for _, cause in a.lost] == ["silent"]
    assert [cause for _, cause in b.lost] == ["closed"]


def test_a_short_partition_delays_what_was_sent_meanwhile() -> None:
    world, network, a, b = pair()
    network.block("a", "b")
    send(a, 1, 2, 3)
    world.run_for(1.5)
    assert b.heard == []
    network.unblock("a", "b")
    world.run_for(1.0)
    assert b.heard == [1, 2, 3]
    assert not a.lost + b.lost


def test_a_cut_connection_is_heard_of_on_both_sides() -> None:
    world, network, a, b = pair()
    network.cut(a.ends[0])
    world.run_for(1.0)
    assert [cause for _, cause in a.lost + b.lost] == ["reset", "reset"]


def test_a_polite_close_comes_after_everything_sent_before_it() -> None:
    world, _, a, b = pair(loss=0.3)
    send(a, 1, 2, 3)
    a.ends[0].close()
    world.run_for(30.0)
    assert b.heard == [1, 2, 3]
    assert [cause for _, cause in b.lost] == ["closed"]


@pytest.mark.parametrize("how", ["dead", "dark", "frozen", "blocked"])
def test_nobody_answers_a_dial(how: str) -> None:
    world, network, a, b = pair()
    answers: list[End | None] = []
    if how == "frozen":
        b.freeze()
    elif how == "blocked":
        network.block("b", "a")
    else:
        b.kill(power_off=how == "dark")
    network.dial(a, "b", answers.append)
    world.run_for(5.0)
    assert answers == [None]


def test_calls_of_a_dead_process_do_not_run_in_the_next_one() -> None:
    world, _, a, _ = pair()
    ran: list[str] = []
    a.after(1.0, lambda: ran.append("old"))
    a.kill()
    a.start()
    a.after(2.0, lambda: ran.append("new"))
    world.run_for(5.0)
    assert ran == ["new"]
