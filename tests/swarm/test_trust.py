"""What a policy in writing demands, and that no plan or re-plan breaks it.

The judgement over random fleets (hostile/fleets.py) reads the policy's text itself, block by block; it shares no code
with swarm/trust.py.
"""

from __future__ import annotations

import random

import pytest
from support.records import MODEL, record

from shoal.errors import PolicyUnmet, SwarmIncomplete, UsageError
from shoal.hostile.fleets import check_fleets
from shoal.spec.ids import BlockRange
from shoal.swarm import routing
from shoal.swarm.routing import route, why_no_chain
from shoal.swarm.trust import Zones, allowed, ends_lack, permits, written


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


def test_no_plan_or_replan_breaks_a_zone_in_two_thousand_fleets() -> None:
    found = check_fleets(range(2_000))
    assert found.wrong == []
    assert found.asked > 2_000
    assert found.refused > 200


@pytest.mark.long
def test_no_plan_or_replan_breaks_a_zone_in_a_hundred_thousand_fleets() -> None:
    found = check_fleets(range(100_000))
    assert found.wrong == []
    assert found.asked > 100_000
    assert found.refused > 10_000


def test_the_fleets_would_show_a_planner_that_heeds_only_the_first_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "allowed", lambda zones, labels, blocks: allowed(zones[:1], labels, blocks))
    assert any("was asked for blocks" in wrong for wrong in check_fleets(range(200)).wrong)
