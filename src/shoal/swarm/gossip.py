"""With whom a node talks about the registry, and how often.

Every round a node syncs with a few others over connections it keeps. In a small swarm all seeds are among them, so news
takes one round to everybody. In a large one each node could not be every seed's guest, so partners are drawn at random
from a few kept links that are slowly exchanged, and news spreads like a rumour: both sides of a sync end up with what
either knew, so of n nodes all know after about ln(n) * round_s / partners seconds.

The lease must outlast a renewal that is as late as it gets: renew_s, plus the time news takes to the last node. A dead
node is out of everybody's view lease_s after its last renewal, since records carry their age. Between these two lies
the choice of `pace`; what it costs is measured by `shoal bench gossip`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from shoal.swarm.view import View
from shoal.wire.messages import Record

_T = TypeVar("_T")


class Rng(Protocol):
    """The part of random.Random that decisions use."""

    def random(self) -> float: ...
    def sample(self, population: Sequence[_T], k: int) -> list[_T]: ...
    def choice(self, seq: Sequence[_T]) -> _T: ...
    def shuffle(self, x: list[Any]) -> None: ...


ROTATE_S = 20.0
"""One of the kept links is exchanged this often: a handshake costs both sides 8 ms, an old choice little."""
LONGEST_PAUSE_S = 60.0
"""A node that cannot be reached is tried again after 2, 4, 8 ... seconds, and at last this often: not every machine can
reach every other one."""
PROBE_NODES = 8
"""How many nodes of a large swarm, on average, look each round for a seed or for someone whose lease ran out. One is
enough to join two halves again after a partition, also when no seed lives."""
PROBE_SHARE = 0.2
"""The same as a share of the rounds of each node, in a small swarm."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, and with how many."""

    round_s: float
    renew_s: float
    """How often a node renews its lease."""
    load_s: float
    """How often changes of load alone are told at most."""
    lease_s: float
    partners: int
    """Nodes, other than seeds in a small swarm, with whom each round is done."""
    links: int
    """Connections kept to draw them from."""
    all_seeds: bool
    """Sync with every seed every round."""
    rtts: int
    """Round trips told in the record."""


SMALL = Pace(round_s=1.0, renew_s=1.0, load_s=0.4, lease_s=5.0, partners=1, links=4, all_seeds=True, rtts=32)
MIDDLE = Pace(round_s=1.0, renew_s=2.0, load_s=5.0, lease_s=8.0, partners=2, links=4, all_seeds=False, rtts=16)
LARGE = Pace(round_s=1.0, renew_s=2.5, load_s=10.0, lease_s=8.0, partners=2, links=4, all_seeds=False, rtts=4)


def pace(nodes: int) -> Pace:
    """For a swarm of so many live nodes. Nodes may disagree about the number: every choice works with every other."""
    return SMALL if nodes <= 32 else MIDDLE if nodes <= 256 else LARGE


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to sync with: a node, or whoever answers at a seed's address."""

    node: str
    """Empty for a seed: its address is all we know."""
    addresses: tuple[str, ...]

    @classmethod
    def seed(cls, address: str) -> Target:
        return cls("", (address,))

    @property
    def name(self) -> str:
        return self.node or self.addresses[0]


class Mesh:
    """The links that one node keeps for gossip, and whom it asks next. Pure: `round` takes time and chance."""

    def __init__(self, node: str, seeds: Sequence[str]) -> None:
        self._node = node
        self._seeds = [Target.seed(address) for address in dict.fromkeys(seeds)]
        self.pace = SMALL
        """As of the last round."""
        self._failed: dict[str, tuple[int, float]] = {}
        """node -> (how often in a row, not to be drawn before)."""
        self._kept: dict[str, Target] = {}
        self._rotate_at_s: float | None = None

    @property
    def kept(self) -> list[Target]:
        """Nodes whose links stay open between rounds."""
        return list(self._kept.values())

    def round(self, view: View, now: float, rng: Rng, *, measured: Collection[str] = ()) -> list[Target]:
        """Whom to sync with now. `measured`: nodes whose round trip is known; the others are met first."""
        live = view.count_live(now)
        self.pace = pace(live)
        self._choose(view, now, rng, measured)
        partners = rng.sample(self.kept, min(self.pace.partners, len(self._kept)))
        probing = min(PROBE_SHARE, PROBE_NODES / max(1, live))
        if self.pace.all_seeds or not partners:
            partners += self._seeds
        elif self._seeds and rng.random() < probing:
            partners.append(rng.choice(self._seeds))
        if rng.random() < probing and (lost := [record for record in view.lost(now) if self._can_ask(record)]):
            partners.append(_target(rng.choice(lost)))
        return partners

    def failed(self, node: str, now: float) -> None:
        """The link to it broke or could not be made: draw another one, and leave this one alone for a while."""
        self._kept.pop(node, None)
        count = self._failed.get(node, (0, 0.0))[0] + 1
        # 2 to the power of a thousand failures is no number any more.
        self._failed[node] = (count, now + min(LONGEST_PAUSE_S, 2.0 ** min(count, 16)))

    def _choose(self, view: View, now: float, rng: Rng, measured: Collection[str]) -> None:
        """Keep links to `Pace.links` living nodes, and exchange the oldest one now and then."""
        self._kept = {node: target for node, target in self._kept.items() if view.is_live(node, now)}
        if self._rotate_at_s is None:
            self._rotate_at_s = now + ROTATE_S * (1.0 + rng.random())  # not all nodes of a swarm at the same moment
        rotating = now >= self._rotate_at_s
        if len(self._kept) >= self.pace.links and not rotating:
            return
        for node, (_, until_s) in list(self._failed.items()):
            if now >= until_s + LONGEST_PAUSE_S:
                del self._failed[node]
        resting = {node for node, (_, until_s) in self._failed.items() if now < until_s}
        avoid = view.suspects(now) | self._kept.keys() | resting
        others = [record for record in view.live(now) if record.node not in avoid and self._can_ask(record)]
        if rotating:
            self._rotate_at_s = now + ROTATE_S
            if others and len(self._kept) >= self.pace.links:
                del self._kept[next(iter(self._kept))]
        rng.shuffle(others)
        others.sort(key=lambda record: record.node in measured)
        for record in others[: max(0, self.pace.links - len(self._kept))]:
            self._kept[record.node] = _target(record)

    def _can_ask(self, record: Record) -> bool:
        """Seeds are met as seeds; nodes without an address come to us."""
        addresses = record.addresses
        return (
            bool(addresses)
            and record.node != self._node
            and not any(seed.addresses[0] in addresses for seed in self._seeds)
        )


def _target(record: Record) -> Target:
    return Target(record.node, tuple(record.addresses))
