"""Runs with a claim. Each takes a seed and returns a Report, or raises Wrong or Stuck.

safety     faults for ever: nothing wrong is ever emitted, nothing is emitted twice, every request ends
liveness   faults, then everything heals: every generation finishes in bounded time, nothing is left behind
failover   one loss with a spare at hand: one new plan, and a gap no longer than noticing and replaying take
gossip     registry views of many nodes converge, and converge again after a partition
bottleneck an idle server moves to the span that load made too thin; no session notices
registry   the same with joins, deaths, an old calendar, dead seeds and liars, and what it costs
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.sim.report import Report
from shoal.sim.scenarios import bottleneck, failover, generations, gossip, registry

SCENARIOS: dict[str, Callable[..., Report]] = {
    "safety": generations.safety,
    "liveness": generations.liveness,
    "failover": failover.one_loss,
    "gossip": gossip.converges,
    "bottleneck": bottleneck.relieved,
    "registry": registry.lifetime,
}


def run(scenario: str, seed: int, *, trace: list[str] | None = None) -> Report:
    """Run one seed of a scenario by name. Raises KeyError for an unknown one."""
    return SCENARIOS[scenario](seed, trace=trace)
