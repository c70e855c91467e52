"""With whom a node syncs: decided from its view, the time and chance alone."""

from __future__ import annotations

import random
from itertools import pairwise

from support.records import record
from support.signing import signed, toy_view

from shoal.swarm import gossip
from shoal.swarm.gossip import LONGEST_PAUSE_S, ROTATE_S, Mesh
from shoal.swarm.view import View

SEED = "tcp://seed:1"


def view_of(*nodes: str, now: float = 0.0, lease_s: float = 30.0) -> View:
    view = toy_view("me")
    view.merge([signed(record(node, lease_s=lease_s)) for node in nodes], now)
    return view


def names(mesh: Mesh, view: View, now: float = 0.0, seed: int = 0) -> set[str]:
    return {target.name for target in mesh.round(view, now, random.Random(seed))}


def test_in_a_small_swarm_every_seed_is_asked_every_round_and_one_node_besides() -> None:
    mesh = Mesh("me", [SEED, "tcp://seed:2"])
    view = view_of("a", "b", "c", "d", "e", "f")
    for second in range(10):
        asked = names(mesh, view, float(second), second)
        assert {SEED, "tcp://seed:2"} < asked
        assert len(asked) == 3
    assert len(mesh.kept) == 4


def test_in_a_large_swarm_seeds_are_seldom_asked() -> None:
    mesh = Mesh("me", [SEED])
    view = view_of(*(f"n{i}" for i in range(500)))
    rounds = [names(mesh, view, second / 100, second) for second in range(500)]
    assert mesh.pace == gossip.LARGE
    assert all(len(asked - {SEED}) == 2 for asked in rounds)
    assert 0 < sum(SEED in asked for asked in rounds) < 50


def test_a_node_that_knows_nobody_asks_its_seeds_and_one_without_seeds_waits_for_others() -> None:
    assert names(Mesh("me", [SEED]), view_of()) == {SEED}
    assert names(Mesh("me", []), view_of()) == set()


def test_a_seed_is_not_met_a_second_time_under_its_name() -> None:
    view = toy_view("me")
    view.merge([signed(record("seed", role="gateway", addresses=[SEED])), signed(record("mute", addresses=[]))], 0.0)
    assert names(Mesh("me", [SEED]), view) == {SEED}


def test_nodes_whose_round_trip_is_unknown_are_met_first() -> None:
    mesh = Mesh("me", [])
    view = view_of(*"abcdefgh")
    mesh.round(view, 0.0, random.Random(1), measured={"a", "b", "c", "d", "e"})
    assert {"f", "g", "h"} < {target.node for target in mesh.kept}


def test_links_are_exchanged_one_at_a_time_and_the_dead_at_once() -> None:
    mesh = Mesh("me", [])
    view = view_of(*"abcdefgh")
    names(mesh, view, 0.0)
    first = {target.node for target in mesh.kept}
    names(mesh, view, 2 * ROTATE_S + 0.1 - 20.0)
    assert {target.node for target in mesh.kept} == first
    alive = view_of(*"abcdefgh", now=2 * ROTATE_S)
    names(mesh, alive, 2 * ROTATE_S)
    assert len(first & {target.node for target in mesh.kept}) == 3
    gone = toy_view("me")
    gone.merge([signed(record(node)) for node in "xyz"], 2 * ROTATE_S)
    names(mesh, gone, 2 * ROTATE_S)
    assert {target.node for target in mesh.kept} == {"x", "y", "z"}


def test_a_node_that_cannot_be_reached_is_tried_less_and_less_often() -> None:
    mesh = Mesh("me", [])
    view = view_of("a")
    tried = []
    for tenth in range(10 * 290):
        now = tenth / 10
        if tenth % 100 == 0:
            view = view_of("a", now=now)
        if names(mesh, view, now, tenth):
            tried.append(now)
            mesh.failed("a", now)
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert [round(pause) for pause in pauses] == [2, 4, 8, 16, 32, 60, 60, 60]
    assert max(pauses) < LONGEST_PAUSE_S + 0.2


def test_a_seed_may_be_away_for_hours() -> None:
    mesh = Mesh("me", [SEED])
    view = view_of()
    for second in range(3 * 3600):
        assert names(mesh, view, float(second)) == {SEED}
        mesh.failed("", float(second))


def test_those_whose_lease_ran_out_are_looked_for_now_and_then() -> None:
    mesh = Mesh("me", [])
    view = view_of("a", lease_s=1.0)
    asked = [names(mesh, view, 10.0, seed) for seed in range(200)]
    assert 20 < sum(bool(each) for each in asked) < 60
