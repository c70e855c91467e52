"""Which chain a session takes, checked against a search that tries everything."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import MODEL, record

from shoal.errors import SwarmIncomplete
from shoal.spec.ids import BlockRange
from shoal.swarm import routing
from shoal.swarm.estimates import Links
from shoal.swarm.routing import Chain, missing_blocks, route, why_no_chain
from shoal.wire.messages import Record


class Calm:
    """No chance at all: the jitter is zero."""

    def random(self) -> float:
        return 0.0


def covers(chain: Chain, start: int, end: int) -> bool:
    ranges = [hop.blocks for hop in chain.hops]
    joined = all(one.end == two.start for one, two in pairwise(ranges))
    return joined and ranges[0].start == start and ranges[-1].end == end


def test_one_server_with_everything_is_better_than_two_with_halves() -> None:
    records = [record("a", (0, 8)), record("b", (0, 4)), record("c", (4, 8))]
    chain = route(records, MODEL, 8, rng=Calm())
    assert chain is not None
    assert [(hop.node, hop.blocks) for hop in chain.hops] == [("a", BlockRange(0, 8))]
    assert chain.hops[0].addresses == ("a:1",)


def test_a_fast_server_is_entered_and_left_in_the_middle_of_anothers_span() -> None:
    records = [
        record("slow1", (0, 6), decode_ms_per_block=9.0),
        record("fast", (2, 7)),
        record("slow2", (4, 9), decode_ms_per_block=9.0),
    ]
    chain = route(records, MODEL, 9, rng=Calm())
    assert chain is not None
    assert [(hop.node, hop.blocks) for hop in chain.hops] == [
        ("slow1", BlockRange(0, 2)),
        ("fast", BlockRange(2, 7)),
        ("slow2", BlockRange(7, 9)),
    ]


def test_queues_links_and_missing_room_are_taken_into_account() -> None:
    def first(**fields: object) -> str:
        records = [record("a", (0, 4), **fields), record("b", (0, 4))]
        chain = route(records, MODEL, 4, rng=Calm(), need_tokens=100, links=links, source="me")
        assert chain is not None
        return chain.hops[0].node

    links = Links(1.0)
    assert first() == "a"
    assert first(queue_rows=3) == "b"
    assert first(sessions=8) == "b"
    assert first(cache_tokens_free=99) == "b"
    assert first(state="draining") == "b"
    links.measured("me", "a", 50.0)
    assert first() == "b"


def test_avoided_nodes_other_models_and_clients_are_left_out() -> None:
    records = [record("a", (0, 4)), record("b", None), record("c", (0, 4))]
    chain = route(records, MODEL, 4, rng=Calm(), avoid={"a"})
    assert chain is not None
    assert chain.nodes == ("c",)
    assert route(records, "another", 4, rng=Calm()) is None


def test_equal_replicas_share_the_load() -> None:
    rng = random.Random(1)
    records = [record("a", (0, 4)), record("b", (0, 4))]
    firsts = [chain.nodes[0] for _ in range(200) if (chain := route(records, MODEL, 4, rng=rng)) is not None]
    assert 60 < firsts.count("a") < 140


def test_a_lost_span_is_routed_for_itself() -> None:
    records = [record("a", (0, 5)), record("b", (3, 8)), record("c", (5, 8))]
    chain = route(records, MODEL, 8, rng=Calm(), start=4, end=8, avoid={"b"})
    assert chain is not None
    assert [(hop.node, hop.blocks) for hop in chain.hops] == [("a", BlockRange(4, 5)), ("c", BlockRange(5, 8))]


def test_a_server_is_used_once_even_when_leaving_and_coming_back_looks_faster() -> None:
    records = [record("slow", (0, 9), decode_ms_per_block=100.0), record("fast", (3, 6), decode_ms_per_block=0.1)]
    chain = route(records, MODEL, 9, rng=Calm())
    assert chain is not None
    assert [(hop.node, hop.blocks) for hop in chain.hops] == [("slow", BlockRange(0, 9))]


def test_missing_blocks_are_named() -> None:
    records = [record("a", (0, 3)), record("b", (5, 6)), record("c", (2, 4), state="loading")]
    assert missing_blocks(records, MODEL, 8) == [BlockRange(3, 5), BlockRange(6, 8)]
    assert missing_blocks([record("a", (0, 8))], MODEL, 8) == []
    error = why_no_chain(records, MODEL, 8)
    assert isinstance(error, SwarmIncomplete)
    assert "3:5, 6:8" in str(error)


def test_servers_that_cannot_be_reached_are_told_from_missing_ones() -> None:
    records = [record("a", (0, 4), cache_tokens_free=10)]
    assert why_no_chain(records, MODEL, 4) is None
    unreachable = why_no_chain(records, MODEL, 4, avoid={"a"})
    assert isinstance(unreachable, SwarmIncomplete)
    assert "cannot be reached" in str(unreachable)


def test_a_chain_explains_itself() -> None:
    chain = route([record("a", (0, 2)), record("b", (2, 4))], MODEL, 4, rng=Calm())
    assert chain is not None
    assert chain.explain() == "a for blocks 0:2, then b for blocks 2:4: 5.50 ms expected per token"


# -- against a search that tries everything --------------------------------------------------------------------------

BLOCKS = 6


def best_by_trying(records: list[Record], links: Links) -> float | None:
    """Least time over all chains, servers entered and left at any border, none used twice."""

    def go(at: int, before: str, used: frozenset[str]) -> float | None:
        if at == BLOCKS:
            return links.rtt_ms(before, "me") / 2
        found = []
        for item in records:
            span = item.span
            assert span is not None
            if item.node in used or not span.start <= at < span.end:
                continue
            wait = (item.queue_rows + routing.SESSION_ROWS * item.sessions) * routing.QUEUE_ROW_SHARE
            wait_ms = wait * (span.end - span.start) * item.decode_ms_per_block
            for to in range(at + 1, span.end + 1):
                rest = go(to, item.node, used | {item.node})
                if rest is not None:
                    work_ms = (to - at) * item.decode_ms_per_block
                    found.append(links.rtt_ms(before, item.node) / 2 + wait_ms + work_ms + rest)
        return min(found, default=None)

    return go(0, "me", frozenset())


spans = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)).map(lambda p: (p[0], min(BLOCKS, p[0] + p[1])))
servers = st.tuples(spans, st.sampled_from([1.0, 2.0, 3.0]), st.integers(0, 2))


@settings(max_examples=150)
@given(st.lists(servers, min_size=1, max_size=4), st.lists(st.sampled_from([0.5, 2.0]), min_size=5, max_size=5))
def test_no_chain_is_faster_than_the_one_chosen(
    drawn: list[tuple[tuple[int, int], float, int]], distances: list[float]
) -> None:
    records = [
        record(f"n{i}", span, decode_ms_per_block=speed, queue_rows=rows) for i, (span, speed, rows) in enumerate(drawn)
    ]
    links = Links(1.0)
    ends = ["me", *(item.node for item in records)]
    for a, b in combinations(range(len(ends)), 2):
        # Distances to a common centre: no detour is shorter than the direct way.
        links.measured(ends[a], ends[b], distances[a] + distances[b])
    chain = route(records, MODEL, BLOCKS, rng=Calm(), links=links, source="me")
    best = best_by_trying(records, links)
    if best is None:
        assert chain is None
        return
    assert chain is not None
    assert covers(chain, 0, BLOCKS)
    assert len(set(chain.nodes)) == len(chain.nodes)
    # <=: the search may also have found a way that visits a server twice; see the test above.
    assert chain.expected_ms <= best + 1e-9


@given(st.lists(servers, max_size=6), st.integers(0, BLOCKS - 1), st.integers(0, 2**32))
def test_a_chain_exists_exactly_when_no_block_is_missing(
    drawn: list[tuple[tuple[int, int], float, int]], start: int, seed: int
) -> None:
    records = [record(f"n{i}", span) for i, (span, _, _) in enumerate(drawn)]
    missing = [block for part in missing_blocks(records, MODEL, BLOCKS) for block in range(part.start, part.end)]
    chain = route(records, MODEL, BLOCKS, rng=random.Random(seed), start=start)
    assert (chain is None) == any(block >= start for block in missing)
    if chain is not None:
        assert covers(chain, start, BLOCKS)
