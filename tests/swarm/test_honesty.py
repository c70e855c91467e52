"""The decisions about servers' honesty: tolerance, draw, witnesses, verdict, reputation, and whom others name."""

from __future__ import annotations

import math
import random

import pytest
from support.records import MODEL, record

from shoal.spec.ids import BlockRange
from shoal.swarm import honesty
from shoal.swarm.honesty import Declared, Difference, Finding, Reputation, judge
from shoal.swarm.trust import Zones

FULL = Declared("float32")
HALF = Declared("bfloat16")
BLOCKS = BlockRange(0, 4)


def row(of_added: float, output: float = 1.0, added: float = 1.0) -> Difference:
    return Difference(of_added * added, output, added)


def caught(node: str) -> Finding:
    return Finding("caught", node, node)


def disputed(one: str, other: str) -> Finding:
    return Finding("disputed", one, None, ((one, other),))


@pytest.mark.parametrize(
    ("parties", "wire", "honest", "cheat"),
    [
        ([FULL, FULL], "f32", 1e-5, 0.008),
        ([FULL, FULL], "int8", 0.005, 0.05),
        ([HALF, HALF], "bf16", 0.015, 0.05),
        ([FULL, HALF], "int8", 0.02, 0.05),
        ([FULL, Declared("float32", "int8")], "f32", 0.02, 0.12),
        ([FULL, Declared("bfloat16", "nf4")], "f32", 0.2, 1.0),
    ],
)
def test_the_tolerance_is_that_of_the_coarser_declaration(
    parties: list[Declared], wire: honesty.WireType, honest: float, cheat: float
) -> None:
    within = honesty.tolerance(parties, wire)
    assert within.used(row(honest)) < 1.0 < within.used(row(cheat))
    assert within == honesty.tolerance(parties[::-1], wire)


def test_a_skipped_block_shows_although_the_output_is_much_larger_than_what_blocks_add() -> None:
    within = honesty.tolerance([HALF, HALF], "bf16")
    assert within.used(Difference(error=0.035, output=1.0, added=0.1)) > 1.0
    assert within.used(Difference(error=0.005, output=1.0, added=0.1)) < 1.0


def test_a_few_rows_may_be_wrong_and_numbers_that_are_not_finite_are() -> None:
    within = honesty.tolerance([FULL, FULL], "f32")
    good, bad = row(1e-6), row(0.5)
    assert honesty.compare([good] * 95 + [bad] * 5, within).same
    assert not honesty.compare([good] * 94 + [bad] * 6, within).same
    assert honesty.compare([good] * 9 + [bad], within).same
    assert not honesty.compare([good] * 8 + [bad] * 2, within).same
    assert within.used(Difference(math.inf, 0.0, 0.0)) == math.inf
    assert within.used(Difference(0.0, 0.0, 0.0)) == 0.0
    with pytest.raises(ValueError, match="no rows"):
        honesty.compare([], within)


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_every_server_of_a_chain_has_the_same_share_of_its_calls_checked(stages: int) -> None:
    rng = random.Random(1)
    calls = 40_000
    drawn = [honesty.draw(stages, 0.02, rng) for _ in range(calls)]
    for stage in range(stages):
        assert drawn.count(stage) / calls == pytest.approx(0.02, abs=0.003)
    assert honesty.draw(stages, 0.0, rng) is None


def test_a_witness_hosts_all_blocks_has_room_and_may_see_the_call() -> None:
    records = [
        record("checked", (0, 4)),
        record("same", (0, 4)),
        record("more", (0, 8)),
        record("less", (0, 3)),
        record("full", (0, 4), cache_tokens_free=10),
        record("leaving", (0, 4), state="draining"),
        record("trusted", (0, 4), labels=["hq"]),
    ]
    common = {"need_tokens": 50, "without": {"checked"}}
    found = honesty.witnesses(records, MODEL, BLOCKS, 8, **common)  # type: ignore[arg-type]
    assert [each.node for each in found] == ["more", "same", "trusted"]
    zone = [Zones.parse("first=1:hq")]
    found = honesty.witnesses(records, MODEL, BLOCKS, 8, zones=zone, **common)  # type: ignore[arg-type]
    assert [each.node for each in found] == ["trusted"]


def test_a_busy_server_is_no_witness_and_the_others_have_equal_chances() -> None:
    records = [record(name, (0, 4)) for name in ("a", "b", "c")] + [record("busy", (0, 4), queue_rows=100)]
    rng = random.Random(2)
    picked = [honesty.pick(records, rng) for _ in range(3000)]
    names = [each.node for each in picked if each is not None]
    assert {name: round(names.count(name) / 3000, 1) for name in "abc"} == {"a": 0.3, "b": 0.3, "c": 0.3}
    assert honesty.pick(records[3:], rng) is None


def test_the_odd_one_out_of_three_is_guilty() -> None:
    assert judge("a", "b", same=True).result == "agreed"
    assert judge("a", "b", "c", same=False, third_with_witness=True).guilty == "a"
    both = judge("a", "b", "c", same=False, third_with_checked=True, third_with_witness=True)
    assert (both.result, both.guilty, both.disputes) == ("unclear", None, ())


def test_a_witness_that_is_odd_gets_disputes_and_no_strike() -> None:
    found = judge("a", "b", "c", same=False, third_with_checked=True)
    assert (found.result, found.guilty, found.disputes) == ("witness", None, (("b", "a"), ("b", "c")))


def test_two_that_lie_alike_get_no_honest_witness_banned_and_are_found_by_others() -> None:
    honest, liars = ["w", "v"], ["x", "y"]
    for seed in range(200):
        rng, reputation = random.Random(seed), Reputation()
        banned: list[str] = []
        for call in range(1000):
            checked = rng.choice([node for node in honest + liars if node not in banned])
            others = [node for node in honest + liars if node != checked and node not in banned]
            if len(others) < 2 or banned:
                break
            witness, third = rng.sample(others, 2)
            if checked in honest and {witness, third} == set(liars):
                continue  # that they could frame somebody is another matter; here they lie as servers only
            alike = {frozenset(honest), frozenset(liars)}
            finding = judge(
                checked,
                witness,
                third,
                same=frozenset((checked, witness)) in alike,
                third_with_checked=frozenset((checked, third)) in alike,
                third_with_witness=frozenset((witness, third)) in alike,
            )
            banned += reputation.note(finding, float(call))
        assert set(banned) <= set(liars)


def test_what_cannot_be_decided_is_a_dispute() -> None:
    assert judge("a", "b", same=False).disputes == (("a", "b"),)
    assert len(judge("a", "b", "c", same=False).disputes) == 3
    heard = judge("a", "b", "c", same=False, third_with_witness=True, before="p", again_right=True)
    assert (heard.guilty, heard.disputes) == (None, (("a", "p"),))
    assert judge("a", "b", "c", same=False, third_with_witness=True, before="p").guilty == "a"


def test_two_strikes_are_quarantine_and_one_is_not() -> None:
    reputation = Reputation()
    assert reputation.note(caught("x"), 0.0) == []
    assert reputation.standing("x", 0.0).level == "suspected"
    assert reputation.note(caught("x"), 1.0) == ["x"]
    assert reputation.quarantined(2.0) == {"x"}
    assert reputation.told(2.0) == ["x"]
    assert reputation.note(caught("x"), 3.0) == []
    assert reputation.standing("x", 1.0).ends_in_s == honesty.QUARANTINE_S


def test_strikes_of_long_ago_are_forgotten() -> None:
    reputation = Reputation()
    reputation.note(caught("x"), 0.0)
    for _ in range(honesty.MEMORY):
        reputation.note(Finding("agreed", "x"), 0.0)
    assert reputation.note(caught("x"), 0.0) == []


def test_after_a_quarantine_one_strike_is_enough_and_the_next_one_is_longer() -> None:
    reputation = Reputation()
    reputation.note(caught("x"), 0.0)
    reputation.note(caught("x"), 0.0)
    later = honesty.QUARANTINE_S + 1.0
    assert reputation.quarantined(later) == frozenset()
    assert reputation.note(caught("x"), later) == ["x"]
    assert reputation.standing("x", later).ends_in_s == 2 * honesty.QUARANTINE_S
    for _ in range(12):
        later += honesty.LONGEST_S
        reputation.note(caught("x"), later)
    assert reputation.standing("x", later).ends_in_s == honesty.LONGEST_S


def test_one_liar_in_disputes_with_many_is_found_and_the_others_are_cleared() -> None:
    reputation = Reputation()
    assert reputation.note(disputed("a", "x"), 0.0) == []
    assert reputation.note(disputed("x", "b"), 1.0) == []
    assert reputation.note(disputed("c", "x"), 2.0) == ["x"]
    assert {reputation.standing(node, 3.0).level for node in "abc"} == {"clear"}


def test_disputes_with_the_same_partner_prove_nothing_however_many() -> None:
    reputation = Reputation()
    for at in range(200):
        assert reputation.note(disputed("a", "x"), float(at)) == []
    assert reputation.quarantined(200.0) == frozenset()


def test_old_disputes_do_not_count() -> None:
    reputation = Reputation()
    reputation.note(disputed("a", "x"), 0.0)
    reputation.note(disputed("b", "x"), 0.0)
    assert reputation.note(disputed("c", "x"), honesty.DISPUTE_MEMORY_S + 1.0) == []


def test_one_gateway_that_lies_bans_nobody() -> None:
    gateways = [record(f"g{i}", role="gateway") for i in range(3)]
    liar = record("liar", role="gateway", quarantined=["a", "b"])
    servers = [record(f"s{i}", (0, 4), quarantined=["a"]) for i in range(5)]
    assert honesty.named([liar, *gateways, *servers]) == frozenset()
    assert Reputation().avoid([liar, *gateways], "g0", 0.0) == frozenset()


def test_a_node_that_a_third_of_the_gateways_names_is_avoided() -> None:
    def gateways(naming: int, of: int) -> list[honesty.Record]:
        return [record(f"g{i}", role="gateway", quarantined=["x"] if i < naming else []) for i in range(of)]

    assert honesty.named(gateways(2, 6)) == {"x"}
    assert honesty.named(gateways(2, 7)) == frozenset()
    assert honesty.named(gateways(3, 7)) == {"x"}
    assert honesty.named(gateways(1, 1)) == frozenset()
    assert honesty.named(gateways(2, 2)) == {"x"}
    assert honesty.named(gateways(2, 2), "g0") == frozenset(), "what this gateway found is acted on anyway"


def test_no_gateway_names_more_nodes_than_a_record_holds_and_memory_is_bounded() -> None:
    reputation = Reputation()
    for i in range(honesty.MAX_NODES + 500):
        reputation.note(disputed(f"n{i}", "hub"), 0.0)
    for i in range(60):
        reputation.note(caught(f"bad{i}"), float(i))
        reputation.note(caught(f"bad{i}"), float(i))
    told = reputation.told(61.0)
    assert len(told) == honesty.MAX_TOLD
    assert "bad59" in told
    assert len(reputation._nodes) <= honesty.MAX_NODES
    assert len(reputation._nodes["hub"].partners) <= honesty.MAX_PARTNERS
