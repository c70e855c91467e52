"""Records and revocation lists as toy nodes sign them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.sim.keys import ToyKeys
from shoal.swarm.view import View
from shoal.wire.messages import Record, Revocations, Signed


def signed(record: Record, *, age_s: float = 0.0, chain: bool = True) -> Signed:
    """`record` as its own node would send it."""
    return ToyKeys(record.node, record.role, tuple(record.labels)).seal(record, age_s=age_s, chain=chain)


def revocations(version: int, nodes: Sequence[str], *, by: str = "boss", role: str = "admin") -> Signed:
    """A revocation list as the node `by` would send it."""
    return ToyKeys(by, role).seal(Revocations(version, list(nodes)))


def toy_view(node: str, **settings: Any) -> View:
    return View(node, ToyKeys(node), **settings)
