"""Which chain of servers a session takes: the one with the least expected time per token, found over block borders.

    time of a hop = half a round trip to get there
                  + blocks used x decode_ms_per_block                       (its own work)
                  + rows ahead x QUEUE_ROW_SHARE x blocks hosted x decode_ms_per_block    (waiting)

A server may be entered and left in the middle of its span. Because work grows evenly with the number of blocks, it
never pays to change servers at a border where neither the one span ends nor the other begins, so only those borders are
searched: the cost depends on the number of servers, not of blocks. (Unless the way through a third machine is shorter
than the direct one; a server is not used as a mere relay.)

Under a trust zone a server offers only those of its blocks that its labels allow, so a chain that breaks the zone is
never even considered, neither for a whole model nor for the few blocks that a lost server leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from shoal.errors import PolicyUnmet, SwarmIncomplete
from shoal.spec.ids import BlockRange
from shoal.swarm.estimates import Links
from shoal.swarm.trust import Zones, allowed, written
from shoal.wire.messages import Record

QUEUE_ROW_SHARE = 0.25
"""What one waiting row adds, as a share of a step: rows are computed together, and a batch of 8 takes far less than 8
times as long as one row."""
SESSION_ROWS = 0.5
"""Rows in the queue that one live session stands for on average: its row is at this server part of the time only, and
the queue length in a record is a snapshot, out of date on arrival."""
JITTER = 0.05
"""Measured speeds closer than this are no reason to prefer a server. Every search multiplies each server's time by a
random factor from [1, 1 + JITTER], so that equal replicas share the load."""


class Rng(Protocol):
    """The part of random.Random that decisions use."""

    def random(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Hop:
    """One server of a chain and the blocks it computes there (all or a part of what it hosts)."""

    node: str
    addresses: tuple[str, ...]
    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class Chain:
    """Servers in order; their ranges join without a gap. `expected_ms` is the expected time of one token."""

    hops: tuple[Hop, ...]
    expected_ms: float

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(hop.node for hop in self.hops)

    def explain(self) -> str:
        """The chain in words, for `shoal status --explain` and logs."""
        way = ", then ".join(f"{hop.node} for blocks {hop.blocks}" for hop in self.hops)
        return f"{way}: {self.expected_ms:.2f} ms expected per token"


@dataclass(frozen=True, slots=True)
class _Option:
    """A server's usable blocks, clipped to what is asked and what it may compute."""

    record: Record
    start: int
    end: int
    ms_per_block: float
    wait_ms: float


def route(
    records: Iterable[Record],
    model: str,
    num_blocks: int,
    *,
    rng: Rng,
    avoid: AbstractSet[str] = frozenset(),
    need_tokens: int = 0,
    start: int = 0,
    end: int | None = None,
    links: Links | None = None,
    source: str = "",
    target: str | None = None,
    zones: Sequence[Zones] = (),
) -> Chain | None:
    """The chain with the least expected latency for blocks `start` to `end` (default: all), or None when the servers
    that qualify do not cover them. `records` are live ones (`View.live`).

    A server qualifies when it is online, hosts this model, is not in `avoid` and has `need_tokens` cache tokens free;
    of its blocks those count that its labels allow under all `zones`. Labels are taken as the records say them: whoever
    let a record in has compared it with the node's certificate.
    `source` is the node the first hop gets its input from, `target` (default: source) the one that takes the output.
    """
    end = num_blocks if end is None else end
    links = links or Links()
    options = [
        option
        for record in sorted(records, key=lambda record: record.node)
        if (option := _option(record, model, start, end, avoid, need_tokens, rng, zones, num_blocks)) is not None
    ]
    # best[i] = (time until option i's output at its last block leaves i, border where i was entered, option before i).
    # Going through the borders in order, an option is entered where it starts or where another one ends.
    borders = sorted({start, *(o.start for o in options), *(o.end for o in options)} - {end})
    entered: dict[int, list[tuple[float, int, int | None]]] = {i: [] for i in range(len(options))}
    for border in borders:
        for i, option in enumerate(options):
            if not option.start <= border < option.end:
                continue
            arrivals: list[tuple[float, int | None]] = []
            if border == start:
                arrivals.append((links.rtt_ms(source, option.record.node) / 2, None))
            for j, before in enumerate(options):
                if j == i or not before.start < border <= before.end:
                    continue
                if border != before.end and border != option.start:
                    continue
                left = _leave(options, entered, j, border)
                if left is not None:
                    arrivals.append((left + links.rtt_ms(before.record.node, option.record.node) / 2, j))
            if arrivals:
                time_ms, before_index = min(arrivals, key=lambda arrival: arrival[0])
                entered[i].append((time_ms + option.wait_ms, border, before_index))
    target = source if target is None else target
    finals = [
        (left + links.rtt_ms(option.record.node, target) / 2, i)
        for i, option in enumerate(options)
        if option.end == end and (left := _leave(options, entered, i, end)) is not None
    ]
    if not finals:
        return None
    expected_ms, last = min(finals)
    return Chain(_walk_back(options, entered, last, end), expected_ms)


def coverage(records: Iterable[Record], model: str, num_blocks: int) -> list[tuple[BlockRange, int]]:
    """The blocks of a model in order, as ranges of equally many online servers that host them; 0 where nobody does."""
    servers = [0] * num_blocks
    for record in records:
        if record.state == "online" and record.span is not None and record.span.model == model:
            for block in range(record.span.start, min(record.span.end, num_blocks)):
                servers[block] += 1
    borders = [0, *(block for block in range(1, num_blocks) if servers[block] != servers[block - 1]), num_blocks]
    return [(BlockRange(start, end), servers[start]) for start, end in pairwise(borders)]


def missing_blocks(
    records: Iterable[Record], model: str, num_blocks: int, zones: Sequence[Zones] = ()
) -> list[BlockRange]:
    """The ranges of blocks that no online server hosts and may compute under `zones`."""
    covered = [False] * num_blocks
    for record in records:
        if record.state == "online" and record.span is not None and record.span.model == model:
            if (may := allowed(zones, record.labels, num_blocks)) is None:
                continue
            for block in range(max(record.span.start, may.start), min(record.span.end, may.end)):
                covered[block] = True
    missing = []
    begin = None
    for block, hosted in enumerate([*covered, True]):
        if not hosted and begin is None:
            begin = block
        elif hosted and begin is not None:
            missing.append(BlockRange(begin, block))
            begin = None
    return missing


def why_no_chain(
    records: Sequence[Record],
    model: str,
    num_blocks: int,
    *,
    avoid: AbstractSet[str] = frozenset(),
    shunned: AbstractSet[str] = frozenset(),
    retry_after_s: float | None = None,
    zones: Sequence[Zones] = (),
) -> SwarmIncomplete | PolicyUnmet | None:
    """What is missing when `route` found nothing: blocks that nobody hosts, that nobody hosts who may, whose servers
    are all in quarantine (`shunned`), or whose servers cannot be reached. None when every block is covered, so that
    something else is in the way."""
    name = model.partition("@")[0]
    if missing := missing_blocks(records, model, num_blocks):
        return SwarmIncomplete(
            f"No live server hosts blocks {', '.join(map(str, missing))} of {name}.",
            hint="Start a server for these blocks, or wait for one that restarts; `shoal status` shows who is here.",
            retry_after_s=retry_after_s,
        )
    trusted = [record for record in records if record.node not in shunned]
    wrong = missing_blocks(trusted, model, num_blocks, zones)
    if wrong and not missing_blocks(records, model, num_blocks, zones):
        return SwarmIncomplete(
            f"The servers of blocks {', '.join(map(str, wrong))} of {name} were found wrong and are in quarantine.",
            hint="Start another server for these blocks; `shoal status --explain` says who was found wrong.",
            retry_after_s=retry_after_s,
        )
    reachable = [record for record in trusted if record.node not in avoid]
    for candidates in (records, reachable):
        if unmet := policy_unmet(candidates, model, num_blocks, zones, retry_after_s=retry_after_s):
            return unmet
    if lost := missing_blocks(reachable, model, num_blocks, zones):
        return SwarmIncomplete(
            f"The servers of blocks {', '.join(map(str, lost))} of {name} cannot be reached or refused the session.",
            hint="They are tried again soon; a second replica of these blocks (--replicas 2) would take over at once.",
            retry_after_s=retry_after_s,
        )
    return None


def policy_unmet(
    records: Iterable[Record],
    model: str,
    num_blocks: int,
    zones: Sequence[Zones],
    *,
    retry_after_s: float | None = None,
) -> PolicyUnmet | None:
    """The refusal, when the live servers host every block but those that `zones` demand do not; else None. It names
    blocks and labels, never a node: the caller who is refused may not know who is in the swarm."""
    records = list(records)
    if not any(zones) or missing_blocks(records, model, num_blocks):
        return None
    forbidden = missing_blocks(records, model, num_blocks, zones)
    if not forbidden:
        return None
    return PolicyUnmet(
        f"The trust zone {written(zones)} cannot be met: no live server of blocks {', '.join(map(str, forbidden))} of "
        f"{model.partition('@')[0]} carries the labels it demands.",
        hint="Start a server with that label for these blocks; `shoal status --explain` shows who carries which.",
        retry_after_s=retry_after_s,
    )


def _option(
    record: Record,
    model: str,
    start: int,
    end: int,
    avoid: AbstractSet[str],
    need_tokens: int,
    rng: Rng,
    zones: Sequence[Zones],
    num_blocks: int,
) -> _Option | None:
    factor = 1.0 + JITTER * rng.random()  # drawn for every record, so that one more exclusion shifts no other's draw
    span = record.span
    if record.state != "online" or span is None or span.model != model or record.node in avoid:
        return None
    if record.cache_tokens_free < need_tokens:
        return None
    may = allowed(zones, record.labels, num_blocks) if zones else BlockRange(0, num_blocks)
    if may is None:
        return None
    first, last = max(span.start, start, may.start), min(span.end, end, may.end)
    if first >= last:
        return None
    ms_per_block = record.decode_ms_per_block * factor
    rows_ahead = record.queue_rows + SESSION_ROWS * record.sessions
    wait_ms = rows_ahead * QUEUE_ROW_SHARE * (span.end - span.start) * ms_per_block
    return _Option(record, first, last, ms_per_block, wait_ms)


def _leave(
    options: Sequence[_Option], entered: dict[int, list[tuple[float, int, int | None]]], i: int, border: int
) -> float | None:
    """Least time at which option i has finished the blocks below `border`; None when it cannot be reached before it."""
    times = [time + (border - at) * options[i].ms_per_block for time, at, _ in entered[i] if at < border]
    return min(times, default=None)


def _walk_back(
    options: Sequence[_Option], entered: dict[int, list[tuple[float, int, int | None]]], last: int, end: int
) -> tuple[Hop, ...]:
    hops: list[Hop] = []
    i: int | None = last
    border = end
    while i is not None:
        option = options[i]
        ways = [(time - at * option.ms_per_block, at, before) for time, at, before in entered[i] if at < border]
        _, at, before = min(ways, key=lambda way: way[0])
        hops.append(Hop(option.record.node, tuple(option.record.addresses), BlockRange(at, border)))
        i, border = before, at
    hops.reverse()
    return tuple(_without_returns(hops))


def _without_returns(hops: list[Hop]) -> list[Hop]:
    """A server that a chain leaves and comes back to (for the sake of a much faster one in between) keeps the session
    all the way: a session lives once on a server. (It may compute what lies in between as well: what a server may
    compute has no holes.)"""
    for i, hop in enumerate(hops):
        for j in range(len(hops) - 1, i, -1):
            if hops[j].node == hop.node:
                stay = Hop(hop.node, hop.addresses, BlockRange(hop.blocks.start, hops[j].blocks.end))
                return _without_returns([*hops[:i], stay, *hops[j + 1 :]])
    return hops
