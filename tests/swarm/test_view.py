"""The registry view: who wins, who is alive, and that copies converge."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import record

from shoal.swarm.view import FORGET_S, MAX_NODES, SYNC_BYTES, View
from shoal.wire.messages import MAX_META_BYTES, Record, Sync


def nodes(records: list[Record]) -> list[str]:
    return [item.node for item in records]


def test_the_highest_number_wins_in_any_order() -> None:
    old = record("b", version=1, sessions=1)
    new = record("b", version=2, sessions=2)
    restarted = record("b", incarnation=2, version=0, sessions=3)
    view = View("a")
    assert view.merge([restarted, new, old], now=0.0) == ["b"]
    assert view.get("b") == restarted


def test_a_record_dies_one_lease_after_its_number_last_grew() -> None:
    view = View("a")
    view.merge([record("b", version=1, lease_s=10.0)], now=0.0)
    view.merge([record("b", version=1, lease_s=10.0)], now=9.0)  # the same again: no growth, no new lease
    assert nodes(view.live(9.9)) == ["b"]
    assert nodes(view.live(10.0)) == []
    view.merge([record("b", version=2, lease_s=10.0)], now=11.0)
    assert nodes(view.live(20.9)) == ["b"]


def test_a_late_copy_does_not_bring_a_dead_node_back() -> None:
    view = View("a")
    view.merge([record("b", lease_s=10.0)], now=0.0)
    assert view.merge([record("b", lease_s=10.0)], now=100.0) == []
    assert nodes(view.live(100.0)) == []


def test_gone_is_never_live_and_beats_the_records_before_it() -> None:
    view = View("a")
    view.merge([record("b", version=5, state="gone")], now=0.0)
    view.merge([record("b", version=4)], now=0.0)
    assert nodes(view.live(0.0)) == []
    assert nodes(view.newer_than({}, 0.0)) == ["b"], "the farewell is passed on while its lease lasts"


def test_nobody_else_writes_a_nodes_own_record() -> None:
    view = View("a")
    mine = view.put(record("a", version=3, sessions=7), now=0.0)
    view.merge([record("a", incarnation=9, version=9, sessions=99)], now=0.0)
    own = view.get("a")
    assert own is not None
    assert own.sessions == mine.sessions
    assert (own.incarnation, own.version) > (9, 9), "the false record is outnumbered, so that others drop it"
    with pytest.raises(ValueError, match="may not write"):
        view.put(record("b"), now=0.0)


def test_put_raises_the_number_when_a_restarted_node_comes_back_with_a_lower_one() -> None:
    view = View("a")
    view.put(record("a", incarnation=1, version=0), now=0.0)
    view.on_sync(Sync(digest={"a": (5, 2)}, records=[], answers=2), now=0.0)
    again = view.put(record("a", incarnation=1, version=1), now=1.0)
    assert (again.incarnation, again.version) > (5, 2)


def test_a_node_that_comes_back_with_a_lower_number_is_heard_even_where_its_old_record_has_expired() -> None:
    other, back = View("a"), View("b")
    other.put(record("a"), now=0.0)
    other.merge([record("b", incarnation=7, version=9, lease_s=1.0)], now=0.0)
    back.put(record("b", incarnation=3, version=0), now=50.0)
    for _ in range(2):  # one round to learn of the old number, one to tell the new one
        message: Sync | None = back.sync()
        sides = [other, back]
        while message is not None:
            message = sides[0].on_sync(message, now=50.0)
            sides.reverse()
    assert nodes(other.live(50.0)) == ["a", "b"]


def test_a_number_that_cannot_be_outnumbered_is_ignored() -> None:
    view = View("a")
    view.put(record("a"), now=0.0)
    view.on_sync(Sync(digest={"a": (2**53, 0)}, records=[], answers=2), now=0.0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(view.sync().digest), type=dict[str, tuple[int, int]])["a"] == (
        1,
        1,
    )


def test_an_own_record_outlives_its_lease_and_is_counted_alive() -> None:
    view = View("a")
    view.put(record("a", lease_s=1.0), now=0.0)
    assert nodes(view.live(100.0)) == ["a"]


def test_suspicion_is_lifted_by_time_or_by_a_new_start_but_not_by_hearsay() -> None:
    view = View("a")
    view.merge([record("b", version=1), record("c", version=1)], now=0.0)
    view.suspect("b", now=0.0, for_s=5.0)
    view.suspect("c", now=0.0, for_s=5.0)
    view.merge([record("b", version=2)], now=1.0)
    assert view.suspects(1.0) == {"b", "c"}
    view.merge([record("c", incarnation=2, version=0)], now=2.0)
    assert view.suspects(2.0) == {"b"}
    assert view.suspects(5.0) == frozenset()
    assert nodes(view.live(1.0)) == ["b", "c"], "suspects stay visible; whoever routes avoids them"


def test_memory_is_bounded_in_time_and_in_number() -> None:
    view = View("a", max_nodes=10)
    view.merge([record(f"n{i}", lease_s=1.0) for i in range(50)], now=0.0)
    assert len(view) == 10
    view.merge([], now=2.0 * FORGET_S)
    assert len(view) == 0


def test_oversized_records_and_names_are_not_taken_in() -> None:
    view = View("a")
    view.merge([record("b", labels=["x" * 256] * 16), record("c" * 40)], now=0.0)
    assert len(view) == 0
    with pytest.raises(ValueError, match="larger than"):
        view.put(record("a", labels=["x" * 256] * 16), now=0.0)


def test_every_sync_fits_into_a_frame_and_all_records_arrive_in_the_end() -> None:
    ours, theirs = View("0" * 32), View("1" * 32)
    big = 2**40  # numbers as large as they get in practice (milliseconds since 1970)
    full = [
        record(f"{i:032x}", (0, 4), incarnation=big, version=big, addresses=["192.168.100.100:12345"])
        for i in range(2, MAX_NODES)
    ]
    ours.put(record("0" * 32), 0.0)
    theirs.put(record("1" * 32), 0.0)
    ours.merge(full, now=0.0)
    rounds = 0
    while len(theirs) < len(ours):
        rounds += 1
        assert rounds < 200
        message: Sync | None = theirs.sync()
        sides = [ours, theirs]
        while message is not None:
            assert len(msgspec.msgpack.encode(message)) < MAX_META_BYTES
            message = sides[0].on_sync(message, 0.0)
            sides.reverse()
    assert SYNC_BYTES < MAX_META_BYTES


# -- convergence ----------------------------------------------------------------------------------------------------

numbers = st.tuples(st.integers(0, 3), st.integers(0, 3))
names = st.sampled_from(["b", "c", "d"])


def written(node: str, number: tuple[int, int]) -> Record:
    """The one record with this number: a node writes each number once."""
    sessions = sum(map(ord, node)) * 100 + number[0] * 10 + number[1]
    return record(node, incarnation=number[0], version=number[1], sessions=sessions)


batches = st.lists(st.builds(written, names, numbers), max_size=12)


def state(view: View) -> dict[str, Record | None]:
    return {node: view.get(node) for node in view.digest()}


@given(batches, batches, batches)
def test_merge_is_commutative_associative_and_idempotent(
    one: list[Record], two: list[Record], three: list[Record]
) -> None:
    def after(*parts: list[Record]) -> dict[str, Record | None]:
        view = View("a")
        for part in parts:
            view.merge(part, now=0.0)
        return state(view)

    assert after(one, two) == after(two, one)
    assert after(one, two, three) == after(three, one, two) == after([*two, *three], one)
    assert after(one, one) == after(one)
    assert after(one, two, one) == after(one, two)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 7), st.floats(0.0, 0.7))
def test_views_converge_under_loss_duplication_and_reordering(seed: int, count: int, loss: float) -> None:
    rng = random.Random(seed)
    views = [View(f"n{i}") for i in range(count)]
    in_flight: list[tuple[int, Sync]] = []

    def settle(loss: float) -> None:
        while in_flight:
            to, message = in_flight.pop(rng.randrange(len(in_flight)))  # any order
            if rng.random() < loss:
                continue
            if rng.random() < 0.2 and len(in_flight) < 50:
                in_flight.append((to, message))  # once more
            answer = views[to].on_sync(message, 0.0)
            if answer is not None:
                sender = int(rng.random() < 0.5 or loss == 0.0)  # sometimes the answer goes astray
                in_flight.append(((to + 1) % count if not sender else rng.randrange(count), answer))

    for step in range(30):
        who = rng.randrange(count)
        views[who].put(record(f"n{who}", incarnation=1, version=step, sessions=step), 0.0)
        in_flight.append((rng.randrange(count), views[who].sync()))
        if step % 3 == 0:
            settle(loss)
    # The network is well again: rounds between neighbours, both answers delivered.
    for _ in range(count):
        for i in range(count):
            message: Sync | None = views[i].sync()
            sides = [views[(i + 1) % count], views[i]]
            for _ in range(3):
                message = sides[0].on_sync(message, 0.0) if message is not None else None
                sides.reverse()
            assert message is None, "a round ends after three messages"
    assert all(state(view) == state(views[0]) for view in views)
    for view in views:
        own = view.get(view.self_node)
        assert own is None or views[0].get(view.self_node) == own
