"""The registry view: who wins, who is alive, and that copies converge."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import record
from support.signing import revocations, signed, toy_view

from shoal.sim.keys import ToyKeys
from shoal.swarm.view import FORGET_S, MAX_LEASE_S, MAX_NODES, MAX_REFUSED, View, digest_key
from shoal.wire.messages import MAX_META_BYTES, AuditHead, Beat, Record, Signed, Sync


def nodes(records: list[Record]) -> list[str]:
    return [item.node for item in records]


def told(view: View, digest: dict[bytes, tuple[int, int]], now: float, **options: Any) -> list[str]:
    """The nodes whose records `view` would send to the writer of `digest`."""
    return [
        msgspec.msgpack.decode(item.payload, type=Record).node for item in view.newer_than(digest, now, **options)[0]
    ]


def exchange(opener: View, answerer: View, now: float, messages: list[Sync] | None = None) -> None:
    """One round, to its end."""
    waiting = [(opener, answerer, opener.sync(now))]
    while waiting:
        sender, receiver, message = waiting.pop(0)
        if messages is not None:
            messages.append(message)
        waiting += [(receiver, sender, answer) for answer in receiver.on_sync(message, sender.self_node, now)]


def test_the_highest_number_wins_in_any_order() -> None:
    old = record("b", version=1, sessions=1)
    new = record("b", version=2, sessions=2)
    restarted = record("b", incarnation=2, version=0, sessions=3)
    view = toy_view("a")
    assert view.merge([signed(restarted), signed(new), signed(old)], now=0.0) == ["b"]
    assert view.get("b") == restarted


def test_an_audit_log_that_goes_back_is_remembered_also_across_a_restart() -> None:
    def at(seq: int, fill: bytes, **fields: Any) -> Signed:
        return signed(record("b", audit=AuditHead(seq, fill * 32), **fields))

    view = toy_view("a")
    view.merge([at(5, b"x", version=1)], now=0.0)
    view.merge([at(9, b"y", version=2)], now=1.0)
    view.merge([signed(record("b", incarnation=2, version=0))], now=2.0)  # it starts anew, and has not looked yet
    assert view.rolled_back == {}
    view.merge([at(5, b"x", incarnation=2, version=1)], now=3.0)
    view.merge([at(10, b"z", incarnation=2, version=2)], now=4.0)
    assert view.rolled_back == {"b": (AuditHead(9, b"y" * 32), AuditHead(5, b"x" * 32))}


def test_a_record_dies_one_lease_after_its_number_last_grew() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", version=1, lease_s=10.0))], now=0.0)
    view.merge([signed(record("b", version=1, lease_s=10.0))], now=9.0)  # the same again: no growth, no new lease
    assert nodes(view.live(9.9)) == ["b"]
    assert nodes(view.live(10.0)) == []
    assert nodes(view.lost(10.0)) == ["b"]
    view.merge([signed(record("b", version=2, lease_s=10.0))], now=11.0)
    assert nodes(view.live(20.9)) == ["b"]


def test_a_lease_ends_everywhere_at_the_same_time_however_many_hands_the_record_went_through() -> None:
    views = [toy_view(f"n{i}") for i in range(5)]
    views[0].merge([signed(record("b", lease_s=10.0))], now=0.0)
    for at, (giver, taker) in enumerate(pairwise(views), start=1):
        exchange(taker, giver, now=float(at))
    for view in views:
        assert nodes(view.live(9.9)) == ["b"]
        assert nodes(view.live(10.0)) == []


def test_a_lie_about_the_age_of_a_record_shortens_its_lease_by_half_at_most() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", lease_s=10.0), age_s=10_000.0)], now=0.0)
    assert nodes(view.live(4.9)) == ["b"]
    assert nodes(view.live(5.0)) == []


def test_no_lease_is_longer_than_the_swarm_allows() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", lease_s=3600.0))], now=0.0)
    assert nodes(view.live(MAX_LEASE_S)) == []


def test_a_late_copy_does_not_bring_a_dead_node_back() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", lease_s=10.0))], now=0.0)
    assert view.merge([signed(record("b", lease_s=10.0))], now=100.0) == []
    assert nodes(view.live(100.0)) == []


def test_gone_is_never_live_and_beats_the_records_before_it() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", version=5, state="gone"))], now=0.0)
    view.merge([signed(record("b", version=4))], now=0.0)
    assert nodes(view.live(0.0)) == []
    assert nodes(view.lost(100.0)) == [], "it said goodbye: nobody looks for it"
    assert told(view, {}, 0.0) == ["b"], "the farewell is passed on while its lease lasts"


# -- what is not taken in -------------------------------------------------------------------------------------------


def forgeries() -> dict[str, tuple[Signed, str]]:
    """What a member could pass on about node "b", and the cause under which it is counted."""
    mine = record("b", version=9)
    keys = ToyKeys("b")
    honest = keys.seal(mine)
    return {
        "another payload under an honest signature": (
            Signed(msgspec.msgpack.encode(record("b", version=10)), honest.signature, honest.chain),
            "forged",
        ),
        "a signature of another node": (
            Signed(honest.payload, ToyKeys("mallory").sign(honest.payload), honest.chain),
            "forged",
        ),
        "signed well, by another node": (ToyKeys("mallory").seal(mine), "overclaimed"),
        "another role than the certificate's": (ToyKeys("b", "client").seal(mine), "overclaimed"),
        "a label the certificate does not grant": (
            ToyKeys("b", labels=()).seal(record("b", labels=["trusted"])),
            "overclaimed",
        ),
        "another swarm's member": (ToyKeys("b", swarm="other").seal(mine), "forged"),
        "no certificates": (keys.seal(mine, chain=False), "unproven"),
        "no record at all": (Signed(b"\xc1", b"x", honest.chain), "malformed"),
        "a record of a later release": (
            Signed(msgspec.msgpack.encode([*msgspec.msgpack.decode(honest.payload), "new field"]), b"x", honest.chain),
            "malformed",
        ),
        "a record that is too long": (keys.seal(record("b", labels=["x" * 256] * 16)), "oversized"),
        "certificates that are too long": (Signed(honest.payload, honest.signature, [b"x" * 4096] * 3), "oversized"),
        "a node's name that is too long": (signed(record("c" * 40)), "oversized"),
    }


@pytest.mark.parametrize("what", forgeries())
def test_a_record_that_its_node_did_not_write_is_dropped_counted_and_never_passed_on(what: str) -> None:
    bad, cause = forgeries()[what]
    view = toy_view("a")
    assert view.merge([bad], now=0.0) == []
    assert dict(view.refused) == {cause: 1}
    assert (len(view), told(view, {}, 0.0), view.digest()) == (0, [], {})


@pytest.mark.parametrize("what", forgeries())
def test_a_forged_record_does_not_displace_the_honest_one_nor_those_beside_it(what: str) -> None:
    view = toy_view("a")
    honest = record("b", version=1)
    view.merge([signed(honest)], now=0.0)
    bad, _ = forgeries()[what]
    if what == "no certificates":
        return  # of a node whose certificates are known this is how records come
    assert view.merge([bad, signed(record("d"))], now=1.0) == ["d"]
    assert view.get("b") == honest


def test_a_record_may_come_without_certificates_once_they_are_known() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", version=1))], now=0.0)
    assert view.merge([signed(record("b", version=2), chain=False)], now=1.0) == ["b"]
    assert view.refused.total() == 0


def test_certificates_travel_with_the_first_record_of_an_incarnation_only() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", incarnation=3, version=7))], now=0.0)
    key = digest_key("b")
    for known, with_chain in (({}, True), ({key: (2, 9)}, True), ({key: (3, 6)}, False)):
        (sent,), _, _ = view.newer_than(known, 0.0)
        assert bool(sent.chain) == with_chain


def test_old_news_costs_no_check_of_a_signature() -> None:
    view = toy_view("a")
    keys = view.keys
    assert isinstance(keys, ToyKeys)
    view.merge([signed(record("b", version=5))], now=0.0)
    assert keys.checks == 1
    view.merge([signed(record("b", version=version)) for version in range(6)], now=0.0)
    assert keys.checks == 1
    assert view.refused.total() == 0, "repetitions are no misdeed"


def test_a_message_full_of_forgeries_costs_few_checks() -> None:
    view = toy_view("a")
    bad = forgeries()["a signature of another node"][0]
    view.merge([bad] * 500, now=0.0)
    assert isinstance(view.keys, ToyKeys)
    assert view.keys.checks == MAX_REFUSED
    assert view.refused == {"forged": MAX_REFUSED, "flood": 1}


# -- renewals -------------------------------------------------------------------------------------------------------


def beating(count: int, *, lease_s: float = 5.0) -> View:
    """Node "b", which renewed the lease of its record `count` times, a second apart."""
    view = toy_view("b")
    view.put(record("b", incarnation=1, version=1, lease_s=lease_s), now=0.0)
    for at in range(1, count + 1):
        view.renew(float(at))
    return view


def test_a_beat_renews_the_lease_of_a_record_that_is_known_and_costs_a_fifth_of_it() -> None:
    view, writer = toy_view("a"), beating(0)
    exchange(view, writer, now=0.0)
    writer.renew(4.0)
    messages: list[Sync] = []
    exchange(view, writer, now=4.0, messages=messages)
    assert nodes(view.live(8.9)) == ["b"]
    assert nodes(view.live(9.0)) == []
    assert all(not message.records for message in messages)
    ((beat,),) = [message.beats for message in messages if message.beats]
    assert len(msgspec.msgpack.encode(beat)) < 150
    assert view.changes == 1, "a renewal is no change"


def test_a_newcomer_gets_the_record_and_the_beat_behind_it() -> None:
    view, writer = toy_view("a"), beating(30)
    exchange(view, writer, now=30.0)
    assert nodes(view.live(34.9)) == ["b"]
    assert view.digest() == writer.digest() == {digest_key("b"): (1, 31)}


def test_a_new_record_has_a_higher_number_than_all_beats_of_the_last_one() -> None:
    view, writer = toy_view("a"), beating(7)
    exchange(view, writer, now=7.0)
    writer.put(record("b", incarnation=1, version=2, sessions=9), now=7.5)
    exchange(view, writer, now=8.0)
    assert view.live(8.0)[0].sessions == 9
    assert view.digest() == {digest_key("b"): (1, 9)}


def test_beats_of_others_and_of_records_that_are_not_known_change_nothing() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", version=4, lease_s=5.0))], now=0.0)
    false = ToyKeys("mallory").seal(Beat("b", 1, 4, 5))
    damaged = Signed(ToyKeys("b").seal(Beat("b", 1, 4, 5)).payload, b"x")
    assert view.merge([], 1.0, [false, damaged, Signed(b"\xc1", b"x")]) == []
    assert view.refused == {"forged": 2, "malformed": 1}
    of_another_record = ToyKeys("b").seal(Beat("b", 1, 3, 9))
    of_nobody = ToyKeys("c").seal(Beat("c", 1, 1, 2))
    assert view.merge([], 1.0, [of_another_record, of_nobody]) == []
    assert nodes(view.live(5.0)) == []


def test_an_earlier_life_is_outnumbered_by_its_beats_too() -> None:
    view = toy_view("b")
    view.put(record("b", incarnation=1, version=3), now=0.0)
    view.merge([], 0.0, [ToyKeys("b").seal(Beat("b", 1, 1, 40))])
    own = view.get("b")
    assert own is not None
    assert (own.incarnation, own.version) > (1, 40)


def test_there_is_nothing_to_renew_before_the_first_record() -> None:
    with pytest.raises(KeyError):
        toy_view("a").renew(0.0)


# -- revocation -----------------------------------------------------------------------------------------------------


def test_a_revoked_node_is_forgotten_at_once_and_its_records_are_refused() -> None:
    view = toy_view("a")
    view.merge([signed(record("b")), signed(record("c"))], now=0.0)
    assert view.revoke(revocations(1, ["b"]))
    assert nodes(view.live(0.0)) == ["c"]
    assert view.merge([signed(record("b", version=2))], now=0.0) == []
    assert view.refused == {"revoked": 1}
    view.on_sync(Sync({digest_key("b"): (9, 9)}, [], 2), "c", 0.0)
    assert view.on_sync(Sync({digest_key("b"): (9, 9)}, [], 2), "c", 0.0)[-1].answers == 0, "nobody is asked for it"


def test_only_an_admin_revokes_and_the_highest_version_wins() -> None:
    view = toy_view("a")
    assert not view.revoke(revocations(5, ["b"], role="server"))
    forged = revocations(5, ["b"])
    assert not view.revoke(Signed(forged.payload, b"x", forged.chain))
    assert not view.revoke(Signed(b"\xc1", b"x", forged.chain))
    assert view.refused == {"overclaimed": 1, "forged": 1, "malformed": 1}
    assert view.revoke(revocations(5, ["b"]))
    assert not view.revoke(revocations(4, []))
    assert view.revoked == {"b"}
    assert view.revoke(revocations(6, []))
    assert view.revoked == set()


def test_an_admin_that_was_revoked_revokes_nobody() -> None:
    view = toy_view("a")
    assert view.revoke(revocations(1, ["boss"], by="chief"))
    assert not view.revoke(revocations(2, ["b"], by="boss"))


@pytest.mark.parametrize("informed_opens", [True, False])
def test_a_revocation_list_goes_to_the_side_that_lacks_it(informed_opens: bool) -> None:
    informed, other = toy_view("a"), toy_view("b")
    informed.revoke(revocations(3, ["x"]))
    messages: list[Sync] = []
    sides = (informed, other) if informed_opens else (other, informed)
    exchange(*sides, now=0.0, messages=messages)
    assert other.revoked == {"x"}
    again: list[Sync] = []
    exchange(*sides, now=0.0, messages=again)
    assert all(message.revocations is None for message in again), "once is enough"


# -- a node's own record --------------------------------------------------------------------------------------------


def test_nobody_else_writes_a_nodes_own_record() -> None:
    view = toy_view("a")
    mine = view.put(record("a", version=3, sessions=7), now=0.0)
    false = ToyKeys("mallory").seal(record("a", incarnation=9, version=9, sessions=99))
    view.merge([false], now=0.0)
    assert view.get("a") == mine
    with pytest.raises(ValueError, match="may not write"):
        view.put(record("b"), now=0.0)


def test_a_number_that_a_peer_only_claims_is_not_outnumbered() -> None:
    """Or a liar could use up the numbers of a node."""
    view = toy_view("a")
    mine = view.put(record("a"), now=0.0)
    view.on_sync(Sync(digest={digest_key("a"): (2**53 - 1, 0)}, records=[], answers=2), "mallory", now=0.0)
    assert view.get("a") == mine


def test_put_raises_the_number_when_a_restarted_node_comes_back_with_a_lower_one() -> None:
    view = toy_view("a")
    view.put(record("a", incarnation=1, version=0), now=0.0)
    view.merge([signed(record("a", incarnation=5, version=2))], now=0.0)
    again = view.put(record("a", incarnation=1, version=1), now=1.0)
    assert (again.incarnation, again.version) > (5, 2)


def test_a_node_that_comes_back_with_a_lower_number_is_heard_even_where_its_old_record_has_expired() -> None:
    other, back = toy_view("a"), toy_view("b")
    other.put(record("a"), now=0.0)
    other.merge([signed(record("b", incarnation=7, version=9, lease_s=1.0))], now=0.0)
    back.put(record("b", incarnation=3, version=0), now=50.0)
    for _ in range(2):  # one round to learn of the old number, one to tell the new one
        exchange(back, other, now=50.0)
    assert nodes(other.live(50.0)) == ["a", "b"]


def test_an_expired_record_is_shown_to_its_own_node_only() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", lease_s=1.0))], now=0.0)
    assert told(view, {}, 50.0, peer="c") == []
    assert told(view, {}, 50.0, peer="b") == ["b"]


def test_the_last_number_there_is_cannot_be_outnumbered() -> None:
    view = toy_view("a")
    view.put(record("a"), now=0.0)
    view.merge([signed(record("a", incarnation=2**53, version=0))], now=0.0)
    assert view.digest() == {digest_key("a"): (1, 1)}


def test_an_own_record_outlives_its_lease_and_is_counted_alive() -> None:
    view = toy_view("a")
    view.put(record("a", lease_s=1.0), now=0.0)
    assert nodes(view.live(100.0)) == ["a"]


def test_suspicion_is_lifted_by_time_or_by_a_new_start_but_not_by_hearsay() -> None:
    view = toy_view("a")
    view.merge([signed(record("b", version=1)), signed(record("c", version=1))], now=0.0)
    view.suspect("b", now=0.0, for_s=5.0)
    view.suspect("c", now=0.0, for_s=5.0)
    view.merge([signed(record("b", version=2))], now=1.0)
    assert view.suspects(1.0) == {"b", "c"}
    view.merge([signed(record("c", incarnation=2, version=0))], now=2.0)
    assert view.suspects(2.0) == {"b"}
    assert view.suspects(5.0) == frozenset()
    assert nodes(view.live(1.0)) == ["b", "c"], "suspects stay visible; whoever routes avoids them"


def test_memory_is_bounded_in_time_and_in_number() -> None:
    view = toy_view("a", max_nodes=10)
    view.merge([signed(record(f"n{i}", lease_s=1.0)) for i in range(50)], now=0.0)
    assert len(view) == 10
    assert view.merge([signed(record("new"))], now=0.5) == [], "nobody alive is pushed out"
    assert view.merge([signed(record("new"))], now=2.0) == ["new"], "the dead make room"
    assert len(view) == len(view.digest()) == 10
    view.merge([], now=2.0 * FORGET_S)
    assert (len(view), view.digest()) == (0, {})


def test_a_record_that_is_too_long_is_not_published() -> None:
    with pytest.raises(ValueError, match="larger than"):
        toy_view("a").put(record("a", labels=["x" * 256] * 16), now=0.0)


def test_every_sync_fits_into_a_frame_and_one_round_brings_a_newcomer_everything() -> None:
    ours, theirs = toy_view("0" * 32), toy_view("1" * 32)
    big = 2**40  # numbers larger than they get in practice
    ours.put(record("0" * 32), 0.0)
    theirs.put(record("1" * 32), 0.0)
    for i in range(2, MAX_NODES):
        one = record(f"{i:032x}", (0, 4), incarnation=big, version=big, addresses=["192.168.100.100:12345"])
        ours.merge([signed(one)], now=0.0)
    assert len(ours) == MAX_NODES - 1
    messages: list[Sync] = []
    exchange(theirs, ours, 0.0, messages)
    assert len(theirs) == len(ours) == MAX_NODES
    assert max(len(msgspec.msgpack.encode(message)) for message in messages) < MAX_META_BYTES
    assert len(messages) < 200


def test_a_peer_that_promises_more_and_brings_nothing_is_not_asked_again() -> None:
    view = toy_view("a")
    more = Sync({}, [signed(record("b"))], 0, more=True)
    assert [answer.answers for answer in view.on_sync(more, "b", 0.0)] == [2]
    assert view.on_sync(more, "b", 0.0) == []


def test_a_change_is_counted_once_and_a_renewed_lease_is_none() -> None:
    view = toy_view("a")
    counts = []
    for fields in ({}, {}, {"queue_rows": 5}, {"state": "draining"}):
        view.merge([signed(record("b", version=len(counts) + 1, lease_s=10.0, **fields))], now=0.0)
        counts.append(view.changes)
    assert counts == [1, 1, 1, 2]
    view.merge([signed(record("b", version=9, state="draining"))], now=99.0)
    assert view.changes == 3, "it was taken for dead in between"


# -- convergence ----------------------------------------------------------------------------------------------------

numbers = st.tuples(st.integers(0, 3), st.integers(0, 3))
names = st.sampled_from(["b", "c", "d"])


def written(node: str, number: tuple[int, int]) -> Record:
    """The one record with this number: a node writes each number once."""
    sessions = sum(map(ord, node)) * 100 + number[0] * 10 + number[1]
    return record(node, incarnation=number[0], version=number[1], sessions=sessions)


batches = st.lists(st.builds(written, names, numbers), max_size=12)


def state(view: View) -> dict[str, Record | None]:
    return {node: view.get(node) for node in "bcd" if view.get(node) is not None}


@given(batches, batches, batches)
def test_merge_is_commutative_associative_and_idempotent(
    one: list[Record], two: list[Record], three: list[Record]
) -> None:
    def after(*parts: list[Record]) -> dict[str, Record | None]:
        view = toy_view("a")
        for part in parts:
            view.merge(map(signed, part), now=0.0)
        return state(view)

    assert after(one, two) == after(two, one)
    assert after(one, two, three) == after(three, one, two) == after([*two, *three], one)
    assert after(one, one) == after(one)
    assert after(one, two, one) == after(one, two)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 7), st.floats(0.0, 0.7))
def test_views_converge_under_loss_duplication_and_reordering(seed: int, count: int, loss: float) -> None:
    rng = random.Random(seed)
    views = [toy_view(f"n{i}") for i in range(count)]
    in_flight: list[tuple[int, int, Sync]] = []

    def settle(loss: float) -> None:
        while in_flight:
            source, to, message = in_flight.pop(rng.randrange(len(in_flight)))  # any order
            if rng.random() < loss:
                continue
            if rng.random() < 0.2 and len(in_flight) < 50:
                in_flight.append((source, to, message))  # once more
            for answer in views[to].on_sync(message, f"n{source}", 0.0):
                astray = rng.random() < 0.3 and loss > 0.0
                in_flight.append((to, rng.randrange(count) if astray else source, answer))

    for step in range(30):
        who = rng.randrange(count)
        if step % 2 and views[who].get(f"n{who}") is not None:
            views[who].renew(0.0)
        else:
            views[who].put(record(f"n{who}", incarnation=1, version=step, sessions=step), 0.0)
        in_flight.append((who, rng.randrange(count), views[who].sync(0.0)))
        if step % 3 == 0:
            settle(loss)
    # The network is well again: rounds between neighbours, all answers delivered.
    for _ in range(count):
        for i in range(count):
            messages: list[Sync] = []
            exchange(views[i], views[(i + 1) % count], 0.0, messages)
            assert len(messages) <= 3, "a round ends after three messages"
    for view in views:
        for name in [f"n{i}" for i in range(count)]:
            assert view.get(name) == views[0].get(name)
        assert view.digest() == views[0].digest()
