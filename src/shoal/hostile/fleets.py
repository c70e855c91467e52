"""Random fleets under random trust zones: is anybody ever asked for blocks that its labels do not allow?

Sessions are opened on each fleet, and servers are lost, leave, refuse and come back, so that plans are made for whole
models and for the few blocks that a lost server leaves. What a policy demands is read here from its text, block by
block; nothing of swarm/trust.py is used for the judgement.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from shoal.spec.ids import BlockRange
from shoal.swarm.routing import Hop, policy_unmet, route
from shoal.swarm.session import Action, Live, Session, SessionConfig, Tell
from shoal.swarm.trust import Zones
from shoal.wire import messages as msg
from shoal.wire.messages import Record, Span

MODEL = "toy"
LABELS = ("hq", "bank", "x")
EVENTS = 12
"""What happens to one session at most."""
_CONFIG = SessionConfig(patience_s=10.0, avoid_s=5.0, max_replans=8)
_ID = bytes(16)


@dataclass
class Found:
    """What was seen in all fleets."""

    fleets: int = 0
    asked: int = 0
    """How often a server was asked to open a session."""
    refused: int = 0
    """Fleets on which the zones cannot be met, though every block is hosted."""
    wrong: list[str] = field(default_factory=list)
    """Every broken zone, and every refusal that was not called for; with the seed of its fleet."""


@dataclass(frozen=True)
class Fleet:
    """Servers of a model, and the policies that a request has to meet, as people write them."""

    num_blocks: int
    records: list[Record]
    policies: list[str]

    def breaks(self, node: str, start: int, end: int) -> bool:
        """Whether this node lacks a label for one of these blocks."""
        labels = next(set(each.labels) for each in self.records if each.node == node)
        return any(not demanded(self.policies, block, self.num_blocks) <= labels for block in range(start, end))

    def can(self, block: int, *, anyone: bool = False) -> bool:
        """Whether some server hosts this block, and may compute it (`anyone`: or may not)."""
        for each in self.records:
            span = each.span
            if span is None or each.state != "online" or not span.start <= block < span.end:
                continue
            if anyone or demanded(self.policies, block, self.num_blocks) <= set(each.labels):
                return True
        return False


def demanded(policies: Sequence[str], block: int, num_blocks: int) -> set[str]:
    """The labels that a machine needs for one block, read from the policies' text."""
    needed = set()
    for policy in policies:
        for demand in policy.split(","):
            what, _, value = demand.partition("=")
            if what == "all":
                needed.add(value)
            if what == "first" and block < int(value.split(":")[0]):
                needed.add(value.split(":")[1])
            if what == "last" and block >= num_blocks - int(value.split(":")[0]):
                needed.add(value.split(":")[1])
    return needed


def check_fleets(seeds: Iterable[int]) -> Found:
    """One random fleet for each seed."""
    found = Found()
    for seed in seeds:
        rng = random.Random(seed)
        fleet = random_fleet(rng)
        zones = [Zones.parse(policy) for policy in fleet.policies]
        found.fleets += 1
        for node, start, end in _asked_of_servers(fleet, rng, zones):
            found.asked += 1
            if fleet.breaks(node, start, end):
                found.wrong.append(f"seed {seed}: {node} was asked for blocks {start}:{end}")
        # Refusing is right exactly when some block has no machine that may compute it.
        chain = route(fleet.records, MODEL, fleet.num_blocks, rng=rng, zones=zones)
        possible = all(fleet.can(block) for block in range(fleet.num_blocks))
        hosted = all(fleet.can(block, anyone=True) for block in range(fleet.num_blocks))
        unmet = policy_unmet(fleet.records, MODEL, fleet.num_blocks, zones)
        if (chain is not None) != possible or (unmet is not None) != (hosted and not possible):
            found.wrong.append(f"seed {seed}: a chain exists: {possible}, but {chain} and {unmet}")
        found.refused += unmet is not None
    return found


def random_policy(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.1:
        return f"all={rng.choice(LABELS)}"
    parts = []
    if kind < 0.7:
        parts.append(f"first={rng.randint(1, 3)}:{rng.choice(LABELS)}")
    if kind > 0.4:
        parts.append(f"last={rng.randint(1, 3)}:{rng.choice(LABELS)}")
    return ",".join(parts)


def random_fleet(rng: random.Random) -> Fleet:
    num_blocks = rng.randint(1, 6)
    policies = [random_policy(rng) for _ in range(rng.choice((1, 1, 2)))]
    records = []
    likely = rng.choice((0.3, 0.6, 0.9))
    for number in range(rng.randint(1, 7)):
        start = rng.choice((0, rng.randrange(num_blocks)))
        end = rng.choice((num_blocks, rng.randint(start + 1, num_blocks)))
        records.append(
            Record(
                node=f"n{number}",
                incarnation=1,
                version=1,
                lease_s=10.0,
                role="server",
                state="draining" if rng.random() < 0.05 else "online",
                addresses=[f"n{number}:1"],
                span=Span(MODEL, start, end),
                pid=1,
                dtype="float32",
                decode_ms_per_block=rng.choice((0.1, 1.0, 5.0)),
                prefill_ms_per_block_token=0.1,
                memory_bytes=2**30,
                cache_tokens_free=10_000,
                cache_tokens_total=10_000,
                queue_rows=number,
                sessions=0,
                labels=[label for label in LABELS if rng.random() < likely],
            )
        )
    return Fleet(num_blocks, records, policies)


def _asked_of_servers(fleet: Fleet, rng: random.Random, zones: Sequence[Zones]) -> Iterator[tuple[str, int, int]]:
    """(node, start, end) of everything that a session asks servers to open."""
    gone: set[str] = set()

    def plan(blocks: BlockRange, avoid: frozenset[str], need_tokens: int, now: float) -> Sequence[Hop] | None:
        live = [each for each in fleet.records if each.node not in gone]
        chain = route(
            live, MODEL, fleet.num_blocks, rng=rng, avoid=avoid, start=blocks.start, end=blocks.end, zones=zones
        )
        return None if chain is None else chain.hops

    session = Session(
        _ID, model=MODEL, num_blocks=fleet.num_blocks, max_tokens=8, wire="f32", plan=plan, config=_CONFIG
    )
    now = 0.0
    actions: list[Action] = [*session.start(now), *session.feed(2, (0, 1), now)]
    for _ in range(EVENTS):
        told = [(action.node, action.message) for action in actions if isinstance(action, Tell)]
        opened = [(node, message) for node, message in told if isinstance(message, msg.Open)]
        for node, message in opened:
            yield node, message.start, message.end
        if session.ended or not session.chain:
            return
        now += 0.1
        hop = rng.choice(session.chain)
        chance = rng.random()
        if opened and chance < 0.8:
            actions = _answered(session, opened, fleet.num_blocks, now)
        elif chance < 0.85:
            gone.add(hop.node)
            actions = session.on_peer_lost(hop.node, "reset", now)
        elif chance < 0.93:
            code = rng.choice(("draining", "next_lost"))
            actions = session.on_message(hop.node, msg.Gone([_ID], code, ""), now)
        else:
            now += 6.0
            gone -= {next(iter(gone), "")}
            actions = [*session.on_timer(now), *session.on_view_changed(now)]


def _answered(session: Session, opened: Sequence[tuple[str, msg.Open]], num_blocks: int, now: float) -> list[Action]:
    """The servers open, the survivors relink, and the first result comes back."""
    actions: list[Action] = []
    for node, message in opened:
        actions += session.on_message(node, msg.Opened(_ID, message.epoch), now)
    for action in list(actions):
        if isinstance(action, Tell) and isinstance(action.message, msg.Relink):
            actions += session.on_message(action.node, msg.Relinked(_ID, action.message.epoch, 0), now)
    if any(isinstance(action, Live) for action in actions):
        item = msg.StepItem(_ID, 0, 2, num_blocks)
        actions += session.on_result(session.chain[-1].node, item, (0, 1), now)
    return actions
