"""Hundreds of seeds of the real decisions under faults, and planted bugs that these runs must find.

A failure names scenario and seed: `python -m shoal.sim SCENARIO --seed N --trace` shows what happened.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shoal.sim.scenarios import gossip, run
from shoal.sim.world import Stuck, Wrong
from shoal.swarm.journal import Log
from shoal.swarm.serving import Serving
from shoal.swarm.session import Session, Tell
from shoal.swarm.view import View
from shoal.wire import messages as msg

SEEDS = range(105)
KEPT = {
    "safety": (),
    "liveness": (8, 34, 48, 52, 93, 108),
    "failover": (46, 59, 94, 242),
}
"""Seeds that once failed. What a seed does changes with the scenario, so the bugs they found are also planted below, or
have a test in tests/swarm."""


def replay(scenario: str, seed: int) -> None:
    try:
        run(scenario, seed)
    except (Wrong, Stuck) as error:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
        error.add_note(f"commit {commit.stdout.strip()}: python -m shoal.sim {scenario} --seed {seed} --trace")
        raise


@pytest.mark.parametrize("seed", sorted({*SEEDS, *KEPT["safety"]}))
def test_faults_without_end_cause_no_wrong_output(seed: int) -> None:
    replay("safety", seed)


@pytest.mark.parametrize("seed", sorted({*SEEDS, *KEPT["liveness"]}))
def test_after_healing_every_generation_finishes_and_nothing_is_left_behind(seed: int) -> None:
    replay("liveness", seed)


@pytest.mark.parametrize("seed", sorted({*range(40), *KEPT["failover"]}))
def test_one_loss_with_a_spare_at_hand_costs_one_new_plan_and_a_short_gap(seed: int) -> None:
    replay("failover", seed)


@pytest.mark.parametrize("seed", range(10))
def test_views_of_eight_nodes_converge_and_heal_after_a_partition(seed: int) -> None:
    replay("gossip", seed)


@pytest.mark.parametrize("seed", range(12))
def test_an_idle_server_moves_to_the_bottleneck_within_a_minute_and_no_session_dies(seed: int) -> None:
    report = run("bottleneck", seed)
    assert report.figures["moved_after_s"] <= 60.0


def test_views_of_a_hundred_nodes_converge() -> None:
    report = gossip.converges(1, num_nodes=100)
    assert report.figures["nodes"] == 100


@pytest.mark.parametrize("scenario", ["safety", "liveness", "failover", "gossip"])
def test_a_seed_replays_bit_for_bit_and_another_seed_does_not(scenario: str) -> None:
    first, again, other = ([], [], [])  # type: tuple[list[str], list[str], list[str]]
    run(scenario, 3, trace=first)
    run(scenario, 3, trace=again)
    run(scenario, 4, trace=other)
    assert first == again
    assert len(first) > 10
    assert first != other


def test_the_runs_are_rough_enough_to_mean_something() -> None:
    """Recoveries, replays, duplicates and every kind of fault do happen in the seeds above."""
    reports = [run("liveness", seed) for seed in range(25)]
    kinds = {kind for report in reports for kind in report.faults}
    assert kinds == {"kill", "power_off", "freeze", "freeze_driver", "slow", "cut", "block", "isolate", "drain"}
    assert sum(report.figures["recoveries"] for report in reports) > 50
    assert sum(report.figures["replayed_rows"] for report in reports) > 1000
    assert sum(report.figures["duplicates"] for report in reports) > 1000


# -- planted bugs ---------------------------------------------------------------------------------------------------


def lost_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal forgets the first row that is asked for."""
    original = Log.since
    monkeypatch.setattr(Log, "since", lambda log, position: original(log, position + 1 if position else 0))


def trust_in_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is still replaying is taken to have computed what the journal holds (found by seed 8)."""

    def trusting(session: Session, after: Any) -> int:
        log = session._logs.get(session._blocks.end if after is None else after.hop.blocks.end, Log())
        return log.end

    monkeypatch.setattr(Session, "_processed_by", trusting)


def forgotten_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server keeps the sessions of a driver whose connection ended."""
    monkeypatch.setattr(Serving, "on_driver_lost", lambda serving, driver, now: [])


def linked_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A survivor is linked to a new server that may not have opened yet (found by failover seed 46)."""
    original = Session._open

    def eager(session: Session, stages: list[Any], now: float) -> list[Any]:
        actions = original(session, stages, now)
        for stage, after in pairwise(session._stages):
            if stage.relinking:
                stage.asked = True
                hop = msg.Hop(after.node, list(after.hop.addresses))
                actions.append(Tell(stage.node, stage.hop.addresses, msg.Relink(session.id, session._epoch, hop)))
        return actions

    monkeypatch.setattr(Session, "_open", eager)


def restarted_nodes_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that comes back with a lower number never learns of it (found by seed 34)."""
    monkeypatch.setattr(View, "_outnumber", lambda view, number, now: None)


@pytest.mark.parametrize(
    ("plant", "scenario", "seeds"),
    [
        (lost_rows, "failover", range(4)),
        (trust_in_the_journal, "failover", range(8)),
        (linked_too_early, "failover", range(205, 216)),
        (forgotten_sessions, "liveness", range(8)),
        (restarted_nodes_unheard, "liveness", range(28, 36)),
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], scenario: str, seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in seeds:
        replay(scenario, seed)  # without the bug these seeds are clean
    plant(monkeypatch)
    with pytest.raises((Wrong, Stuck)):  # noqa: PT012 - any of the seeds may find it
        for seed in seeds:
            run(scenario, seed)
