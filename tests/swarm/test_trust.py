"""What a policy in writing demands, and that no plan or re-plan breaks it.

The checks below read the policy's text themselves, block by block; they share no code with swarm/trust.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from support.records import MODEL, record

from shoal.errors import PolicyUnmet, SwarmIncomplete, UsageError
from shoal.spec.ids import BlockRange
from shoal.swarm.routing import Hop, policy_unmet, route, why_no_chain
from shoal.swarm.session import Action, Feed, Live, Session, SessionConfig, Tell
from shoal.swarm.trust import Zones, allowed, ends_lack, permits, written
from shoal.wire import messages as msg
from shoal.wire.messages import Record


@pytest.mark.parametrize(
    "text", ["", "all=trusted", "embedding=hq", "first=2:trusted", "embedding=a,first=1:b-c,last=3:d,all=e"]
)
def test_a_policy_is_written_as_it_was_read(text: str) -> None:
    assert str(Zones.parse(text)) == text
    assert bool(Zones.parse(text)) == bool(text)


@pytest.mark.parametrize(
    "text",
    [
        *("trusted", "all", "all=", "all=Trusted", "all=a b", "all=" + "x" * 33, "all=a,all=b", "middle=2:a"),
        *(
            "first=trusted",
            "first=0:a",
            "first=-1:a",
            "first=1:",
            "first=1:a:b",
            "first=100000:a",
            "first=1:a,first=2:a",
        ),
        "all=a" + "," * 300,
    ],
)
def test_what_cannot_be_read_is_no_policy(text: str) -> None:
    with pytest.raises(UsageError, match="polic"):
        Zones.parse(text)


def test_a_node_may_compute_what_every_policy_leaves_it() -> None:
    ends = Zones.parse("first=2:hq,last=1:hq")
    assert ends.allowed([], 8) == [BlockRange(2, 7)]
    assert ends.allowed(["hq"], 8) == [BlockRange(0, 8)]
    assert ends.allowed([], 3) == []
    assert Zones.parse("first=9:hq").allowed([], 8) == []
    assert Zones.parse("all=hq").allowed(["partner"], 8) == []
    assert allowed([ends, Zones.parse("first=4:bank")], ["hq"], 8) == BlockRange(4, 8)
    assert allowed([ends, Zones.parse("last=6:bank")], [], 8) is None
    assert permits([ends], [], BlockRange(3, 7), 8)
    assert not permits([ends], [], BlockRange(3, 8), 8)
    assert not permits([Zones.parse("all=hq")], [], BlockRange(3, 4), 8)


def test_the_gateway_itself_needs_the_label_of_the_embedding_and_of_all() -> None:
    assert ends_lack([Zones.parse("embedding=hq"), Zones.parse("all=bank")], ["hq"]) == ["bank"]
    assert ends_lack([Zones.parse("first=2:hq")], []) == []
    assert written([Zones(), Zones.parse("all=a"), Zones.parse("first=1:b")]) == "all=a and first=1:b"


def test_a_refusal_names_the_blocks_and_the_policy_but_no_node() -> None:
    records = [record("aaaa", (0, 4)), record("bbbb", (2, 8), labels=["hq"])]
    error = why_no_chain(records, MODEL, 8, zones=[Zones.parse("first=3:hq")])
    assert isinstance(error, PolicyUnmet)
    assert (error.code, error.exit_code, error.http_status) == ("policy_unmet", 3, 503)
    assert "first=3:hq" in str(error)
    assert "0:2" in str(error)
    assert "aaaa" not in f"{error} {error.hint}"
    assert why_no_chain(records, MODEL, 8, zones=[Zones.parse("last=3:hq")]) is None
    # What nobody hosts at all is no matter of trust.
    assert isinstance(why_no_chain(records[:1], MODEL, 8, zones=[Zones.parse("all=hq")]), SwarmIncomplete)


def test_a_server_without_the_label_is_entered_and_left_where_the_zone_begins_and_ends() -> None:
    records = [
        record("fast", (0, 8)),
        record("first", (0, 3), labels=["hq"], decode_ms_per_block=9.0),
        record("last", (5, 8), labels=["hq"], decode_ms_per_block=9.0),
    ]
    chain = route(records, MODEL, 8, rng=random.Random(0), zones=[Zones.parse("first=2:hq,last=1:hq")])
    assert chain is not None
    assert [(hop.node, str(hop.blocks)) for hop in chain.hops] == [("first", "0:2"), ("fast", "2:7"), ("last", "7:8")]


# -- every plan of many random fleets ----------------------------------------------------------------------------------

LABELS = ("hq", "bank", "x")
CONFIG = SessionConfig(patience_s=10.0, avoid_s=5.0, max_replans=8)


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


@dataclass
class Fleet:
    num_blocks: int
    records: list[Record]
    policies: list[str]

    def breaks(self, node: str, start: int, end: int) -> bool:
        labels = next(set(each.labels) for each in self.records if each.node == node)
        return any(not demanded(self.policies, block, self.num_blocks) <= labels for block in range(start, end))

    def can(self, block: int, *, anyone: bool = False) -> bool:
        """Some server may compute this block."""
        for each in self.records:
            span = each.span
            if span is None or each.state != "online" or not span.start <= block < span.end:
                continue
            if anyone or demanded(self.policies, block, self.num_blocks) <= set(each.labels):
                return True
        return False


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
        labels = [label for label in LABELS if rng.random() < likely]
        state = "draining" if rng.random() < 0.05 else "online"
        speed = rng.choice((0.1, 1.0, 5.0))
        records.append(
            record(f"n{number}", (start, end), labels=labels, state=state, decode_ms_per_block=speed, queue_rows=number)
        )
    return Fleet(num_blocks, records, policies)


def asked_of_servers(fleet: Fleet, rng: random.Random, zones: Sequence[Zones]) -> Iterator[tuple[str, int, int]]:
    """(node, start, end) of everything a session has servers open, while servers are lost, leave or refuse."""
    gone: set[str] = set()

    def plan(blocks: BlockRange, avoid: frozenset[str], need_tokens: int, now: float) -> Sequence[Hop] | None:
        live = [each for each in fleet.records if each.node not in gone]
        chain = route(
            live,
            MODEL,
            fleet.num_blocks,
            rng=rng,
            avoid=avoid,
            start=blocks.start,
            end=blocks.end,
            zones=zones,
        )
        return None if chain is None else chain.hops

    session = Session(
        bytes(16), model=MODEL, num_blocks=fleet.num_blocks, max_tokens=8, wire="f32", plan=plan, config=CONFIG
    )
    now = 0.0
    actions: list[Action] = [*session.start(now), *session.feed(2, (0, 1), now)]
    for _ in range(12):
        opened = []
        for action in actions:
            if isinstance(action, Tell) and isinstance(action.message, msg.Open):
                opened.append((action.node, action.message))
                yield action.node, action.message.start, action.message.end
                assert session.chain  # nobody is asked for a chain that is not there
            elif isinstance(action, Feed):
                assert any(hop.node == action.node for hop in session.chain)
        now += 0.1
        hops = session.chain
        if session.ended or not hops:
            return
        hop = rng.choice(hops)
        chance = rng.random()
        if opened and chance < 0.8:
            actions = []
            for node, message in opened:
                actions += session.on_message(node, msg.Opened(bytes(16), message.epoch), now)
            for node, message in [(each.node, each.message) for each in actions if isinstance(each, Tell)]:
                if isinstance(message, msg.Relink):
                    actions += session.on_message(node, msg.Relinked(bytes(16), message.epoch, 0), now)
            if any(isinstance(each, Live) for each in actions):
                item = msg.StepItem(bytes(16), 0, 2, fleet.num_blocks)
                actions += session.on_result(session.chain[-1].node, item, (0, 1), now)
        elif chance < 0.85:
            gone.add(hop.node)
            actions = session.on_peer_lost(hop.node, "reset", now)
        elif chance < 0.93:
            actions = session.on_message(
                hop.node, msg.Gone([bytes(16)], rng.choice(("draining", "next_lost")), ""), now
            )
        else:
            now += 6.0
            gone -= {next(iter(gone), "")}
            actions = [*session.on_timer(now), *session.on_view_changed(now)]


def check_fleets(seeds: range) -> tuple[int, int]:
    """(plans made, fleets refused) over one random fleet per seed."""
    plans = refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        fleet = random_fleet(rng)
        zones = [Zones.parse(policy) for policy in fleet.policies]
        for node, start, end in asked_of_servers(fleet, rng, zones):
            plans += 1
            assert not fleet.breaks(node, start, end), f"seed {seed}: {node} was asked for {start}:{end}"
        # A refusal is right as well: it says no exactly when some block has no machine that may compute it.
        chain = route(fleet.records, MODEL, fleet.num_blocks, rng=rng, zones=zones)
        possible = all(fleet.can(block) for block in range(fleet.num_blocks))
        assert (chain is not None) == possible, f"seed {seed}"
        for hop in chain.hops if chain is not None else ():
            assert not fleet.breaks(hop.node, hop.blocks.start, hop.blocks.end), f"seed {seed}: {hop}"
        hosted = all(fleet.can(block, anyone=True) for block in range(fleet.num_blocks))
        unmet = policy_unmet(fleet.records, MODEL, fleet.num_blocks, zones)
        assert (unmet is not None) == (hosted and not possible), f"seed {seed}"
        refused += unmet is not None
    return plans, refused


def test_no_plan_or_replan_breaks_a_zone_in_two_thousand_fleets() -> None:
    plans, refused = check_fleets(range(2_000))
    assert plans > 2_000
    assert refused > 200


@pytest.mark.slow
def test_no_plan_or_replan_breaks_a_zone_in_a_hundred_thousand_fleets() -> None:
    plans, refused = check_fleets(range(100_000))
    assert plans > 100_000
    assert refused > 10_000
