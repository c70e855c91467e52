"""Who hosts what, checked against a search that tries every placement."""

from __future__ import annotations

import random
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import NotEnoughRoom, PolicyUnmet, UsageError
from shoal.spec.ids import BlockRange
from shoal.swarm.placement import GIB, ModelNeeds, NodeOffer, place
from shoal.swarm.trust import Zones


def offers(*machines: tuple[float, int]) -> list[NodeOffer]:
    """(ms per block, memory in bytes) of each; they are called a, b, c ..."""
    return [NodeOffer(chr(ord("a") + i), speed, memory) for i, (speed, memory) in enumerate(machines)]


def needs(count: int, block_bytes: int = 1, **fields: object) -> ModelNeeds:
    return ModelNeeds((block_bytes,) * count, **fields)  # type: ignore[arg-type]


def hosted(placement: object) -> dict[str, str]:
    return {item.node: str(item.blocks) for item in placement.assignments}  # type: ignore[attr-defined]


def test_nothing_is_split_that_fits_on_one_machine() -> None:
    placement = place(needs(8), offers((5.0, 8), (1.0, 4), (1.0, 4)))
    assert hosted(placement) == {"a": "0:8"}
    assert "so nothing is split" in placement.assignments[0].reason
    assert {node for node, _ in placement.idle} == {"b", "c"}


def test_a_fixed_number_of_equal_servers_gets_equal_spans_with_their_replicas() -> None:
    placement = place(needs(12), offers(*[(1.0, 100)] * 6), stages=3, replicas=2)
    assert [str(span) for span in placement.spans] == ["0:4", "4:8", "8:12"]
    assert sorted(hosted(placement).values()) == ["0:4"] * 2 + ["4:8"] * 2 + ["8:12"] * 2


def test_a_machine_twice_as_fast_gets_twice_the_blocks() -> None:
    placement = place(needs(12), offers((1.0, 100), (2.0, 100)), stages=2)
    assert {node: len(BlockRange.parse(span)) for node, span in hosted(placement).items()} == {"a": 8, "b": 4}
    assert placement.slowest_stage_ms == 8.0


def test_cache_counts_as_memory() -> None:
    model = needs(4, block_bytes=10, kv_bytes_per_block_token=1, cache_tokens=10)
    assert len(place(model, offers((1.0, 80), (1.0, 80))).spans) == 1
    assert len(place(model, offers((1.0, 79), (1.0, 79))).spans) == 2


def test_only_legal_cuts_are_used() -> None:
    placement = place(needs(10, legal_cuts=(3, 9)), offers((1.0, 100), (1.0, 100)), stages=2)
    assert [str(span) for span in placement.spans] == ["0:3", "3:10"]
    with pytest.raises(UsageError, match="at most 3 spans at the borders its family allows, 4 were asked for"):
        place(needs(10, legal_cuts=(3, 9)), offers(*[(1.0, 100)] * 4), stages=4)


def test_machines_left_over_strengthen_the_slowest_span() -> None:
    placement = place(needs(4), offers((1.0, 2), (1.0, 2), (1.0, 2)))
    assert len(placement.spans) == 2
    assert not placement.idle
    assert any("one more replica" in item.reason for item in placement.assignments)


def test_not_enough_room_says_how_much_is_needed_and_how_much_is_there() -> None:
    model = needs(40, block_bytes=int(21.4 * GIB / 40))
    with pytest.raises(NotEnoughRoom) as caught:
        place(model, offers((1.0, int(10.1 * GIB)), (1.0, 5 * GIB)))
    assert str(caught.value) == "Not enough room: blocks 0-39 need 21.4 GiB, these machines offer 15.1 GiB."
    assert "Add machines with 6.3 GiB" in caught.value.hint


def test_room_that_does_not_divide_is_explained() -> None:
    with pytest.raises(NotEnoughRoom, match=r"largest inseparable one, blocks 0-3, needs 4\.0 GiB; .* offers 3\.0 GiB"):
        place(needs(5, block_bytes=GIB, legal_cuts=(4,)), offers((1.0, 3 * GIB), (1.0, 3 * GIB)))


def test_too_few_machines_and_senseless_numbers_are_refused() -> None:
    with pytest.raises(NotEnoughRoom, match="3 spans with 2 replicas each need 6 machines, 5 offer themselves"):
        place(needs(12), offers(*[(1.0, 100)] * 5), stages=3, replicas=2)
    with pytest.raises(UsageError, match="make no swarm"):
        place(needs(12), offers((1.0, 100)), stages=0)
    with pytest.raises(UsageError, match="offered twice"):
        place(needs(12), offers((1.0, 100)) * 2)


def test_every_machine_has_a_line_of_explanation() -> None:
    placement = place(needs(4, block_bytes=GIB), offers((1.0, 2 * GIB), (1.5, 2 * GIB), (9.0, GIB // 2)))
    lines = placement.explain()
    assert lines[0] == "2 stages; the slowest takes 3.00 ms per step, a token 5.00 ms without the network"
    assert "a hosts blocks" in lines[1]
    assert "no machine has room for all blocks" in lines[1]
    assert lines[3] == "c hosts nothing: the smallest span needs 2.0 GiB, it offers 0.5 GiB"


# -- against a search that tries everything --------------------------------------------------------------------------


def best_by_trying(count: int, machines: list[NodeOffer], stages: int) -> tuple[float, float] | None:
    """Least (slowest stage, sum of stages) over all cuts and all orders of machines."""
    found = []
    for cuts in combinations(range(1, count), stages - 1):
        borders = [0, *cuts, count]
        sizes = [two - one for one, two in pairwise(borders)]
        for chosen in permutations(machines, stages):
            if all(size <= offer.memory_bytes for size, offer in zip(sizes, chosen, strict=True)):
                times = [size * offer.decode_ms_per_block for size, offer in zip(sizes, chosen, strict=True)]
                found.append((max(times), sum(times)))
    return min(found, default=None)


machine = st.tuples(st.sampled_from([1.0, 1.5, 2.0, 4.0]), st.integers(1, 7))


@settings(max_examples=150)
@given(st.integers(2, 7), st.lists(machine, min_size=1, max_size=4), st.integers(1, 4))
def test_no_placement_with_that_many_stages_is_better(count: int, drawn: list[tuple[float, int]], stages: int) -> None:
    machines = offers(*drawn)
    if stages > min(count, len(machines)):
        return
    best = best_by_trying(count, machines, stages)
    if best is None:
        with pytest.raises(NotEnoughRoom):
            place(needs(count), machines, stages=stages)
        return
    placement = place(needs(count), machines, stages=stages)
    assert (placement.slowest_stage_ms, placement.token_ms) == pytest.approx(best)


@given(st.integers(1, 8), st.lists(machine, min_size=1, max_size=6), st.integers(1, 2))
def test_whatever_is_placed_fits_covers_everything_and_has_its_replicas(
    count: int, drawn: list[tuple[float, int]], replicas: int
) -> None:
    machines = offers(*drawn)
    try:
        placement = place(needs(count), machines, replicas=replicas)
    except NotEnoughRoom:
        return
    memory = {offer.node: offer.memory_bytes for offer in machines}
    assert all(len(item.blocks) <= memory[item.node] for item in placement.assignments)
    assert len({item.node for item in placement.assignments}) + len(placement.idle) == len(machines)
    for block in range(count):
        assert sum(block in item.blocks for item in placement.assignments) >= replicas


# -- trust zones ------------------------------------------------------------------------------------------------------


def labelled(*machines: tuple[float, int, str]) -> list[NodeOffer]:
    """(ms per block, memory, label or nothing) of each; they are called a, b, c ..."""
    return [
        NodeOffer(chr(ord("a") + i), speed, memory, labels=(label,) if label else ())
        for i, (speed, memory, label) in enumerate(machines)
    ]


ENDS = (Zones.parse("first=2:hq,last=1:hq"),)


def test_labelled_machines_get_the_blocks_that_a_zone_demands_for_them() -> None:
    machines = labelled((1.0, 100, ""), (1.0, 100, "hq"), (1.0, 100, "hq"))
    placement = place(needs(9), machines, stages=3, zones=ENDS)
    assert hosted(placement) == {"a": "3:6", "b": "0:3", "c": "6:9"}


def test_a_machine_that_may_compute_nothing_useful_hosts_nothing_and_is_told_why() -> None:
    placement = place(needs(4), labelled((1.0, 100, ""), (2.0, 100, "hq")), zones=(Zones.parse("all=hq"),))
    assert hosted(placement) == {"b": "0:4"}
    assert placement.idle == (("a", "its labels allow none of the spans under the trust zone all=hq"),)


def test_replicas_of_a_span_that_a_zone_covers_all_carry_its_label() -> None:
    machines = labelled((1.0, 100, ""), (1.0, 100, "hq"), (1.0, 100, ""), (1.0, 100, "hq"))
    placement = place(needs(8), machines, stages=2, replicas=2, zones=(Zones.parse("first=2:hq"),))
    assert hosted(placement) == {"b": "0:4", "d": "0:4", "a": "4:8", "c": "4:8"}


def test_a_zone_that_no_placement_meets_is_refused_as_such_and_too_little_room_as_that() -> None:
    machines = labelled((1.0, 100, ""), (1.0, 100, ""))
    with pytest.raises(PolicyUnmet, match="not under the trust zone first=2:hq"):
        place(needs(8), machines, zones=(Zones.parse("first=2:hq"),))
    with pytest.raises(NotEnoughRoom):
        place(needs(300), machines, zones=(Zones.parse("first=2:hq"),))
    # One labelled machine cannot hold both ends when a third machine must stand between them.
    with pytest.raises(PolicyUnmet):
        place(needs(8), labelled((1.0, 4, "hq"), (1.0, 8, "")), stages=2, zones=ENDS)


def test_no_placement_of_five_hundred_fleets_breaks_its_zone_and_none_that_fits_is_refused() -> None:
    """The search tries every order of the machines and every cut; all machines differ, so no order is like another."""
    refused = 0
    for seed in range(500):
        rng = random.Random(seed)
        count, stages = rng.randint(2, 5), rng.randint(1, 3)
        policy = rng.choice(("all=hq", "first=1:hq", "last=2:hq", "first=2:hq,last=1:hq", "first=1:hq,last=1:x"))
        machines = [
            NodeOffer(
                f"n{i}",
                rng.choice((1.0, 2.0)),
                rng.randint(1, 5),
                labels=tuple(rng.sample(("hq", "x"), rng.randint(0, 2))),
            )
            for i in range(rng.randint(stages, 4))
        ]
        possible = any(
            all(
                end - start <= machine.memory_bytes
                and all(
                    label in machine.labels for block in range(start, end) for label in wanted(policy, block, count)
                )
                for machine, (start, end) in zip(chosen, pairwise((0, *cuts, count)), strict=True)
            )
            for chosen in permutations(machines, stages)
            for cuts in combinations(range(1, count), stages - 1)
        )
        try:
            placement = place(needs(count), machines, stages=stages, zones=(Zones.parse(policy),))
        except (PolicyUnmet, NotEnoughRoom, UsageError):
            assert not possible, f"seed {seed}"
            refused += 1
            continue
        assert possible, f"seed {seed}"
        for item in placement.assignments:
            labels = next(machine.labels for machine in machines if machine.node == item.node)
            for block in range(item.blocks.start, item.blocks.end):
                assert all(label in labels for label in wanted(policy, block, count)), f"seed {seed}"
    assert 50 < refused < 450


def wanted(policy: str, block: int, count: int) -> list[str]:
    """The labels that a policy's text demands for one block."""
    found = []
    for demand in policy.split(","):
        what, _, value = demand.partition("=")
        number, _, label = value.rpartition(":")
        if (
            what == "all"
            or (what == "first" and block < int(number))
            or (what == "last" and block >= count - int(number))
        ):
            found.append(label)
    return found
