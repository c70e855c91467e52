"""A registry's life in simulated swarms: what the benchmark measures holds for many seeds; planted bugs are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from shoal.bench.gossip import Prices, figures
from shoal.sim.keys import Member, ToyKeys
from shoal.sim.scenarios.registry import lifetime
from shoal.sim.world import Wrong
from shoal.swarm import gossip
from shoal.swarm.view import View

FREE = Prices(0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(12))
def test_joins_and_deaths_are_known_in_time_in_a_small_swarm_whatever_liars_say(seed: int) -> None:
    """The run itself fails when a lie is believed, or when a living node is missing from a view in quiet times."""
    missed = [str(figure) for figure in figures(lifetime(seed).figures, FREE) if not figure.ok]
    assert not missed


@pytest.mark.slow
def test_joins_and_deaths_are_known_in_time_in_a_swarm_of_a_hundred() -> None:
    missed = [str(figure) for figure in figures(lifetime(0, num_nodes=100).figures, FREE) if not figure.ok]
    assert not missed


def test_paces_change_with_size_and_every_lease_outlasts_two_late_renewals() -> None:
    paces = [gossip.pace(nodes) for nodes in (1, 8, 32, 33, 256, 257, 2000)]
    assert [pace.all_seeds for pace in paces] == [True] * 3 + [False] * 4
    for pace in paces:
        assert 2 * (pace.renew_s + 0.5 * pace.round_s) < pace.lease_s < 10.0


# -- planted bugs ---------------------------------------------------------------------------------------------------


def credulous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures are not checked."""
    monkeypatch.setattr(
        ToyKeys, "writer", lambda keys, payload, signature, chain: _member(chain) if chain else keys.member
    )


def _member(chain: Sequence[bytes]) -> Member:
    return msgspec.msgpack.decode(chain[0].rstrip(b"\xc0"), type=Member)


def resigned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for those who were lost."""
    monkeypatch.setattr(View, "lost", lambda view, now: [])


def humble(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node does not outnumber its own earlier life."""
    monkeypatch.setattr(View, "_outnumber", lambda view, number, now: None)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dead are forgotten at once, so a replayed record is news."""
    original = View._sweep

    def sweep(view: Any, now: float) -> None:
        view._forget_s = view._next_sweep_s = 0.0
        original(view, now)

    monkeypatch.setattr(View, "_sweep", sweep)


@pytest.mark.parametrize("plant", [credulous, resigned, humble, forgetful])
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Wrong):  # noqa: PT012 - any of the seeds may find it
        for seed in range(4):
            lifetime(seed)
