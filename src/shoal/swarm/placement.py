"""Which machine hosts which blocks.

What a placement promises, in this order:
1. It fits: weights and a stated amount of cache, in the memory each machine offers.
2. Nothing is split that fits on one machine: every cut adds a network hop to every token. So it uses as few stages as
   the memory allows, unless the caller fixes their number.
3. Of all ways to do that, the slowest stage is as fast as possible (it bounds the tokens per second of the swarm); of
   those, the sum of all stages is least (it is the time of one token).

Machines are put into teams of as many as there are replicas, like with like, because a stage is as slow as its slowest
replica. Stages take teams in that order, which a dynamic program over legal cuts then searches completely. Where every
cut is legal and blocks have one size, no other order of the teams could do better: only the sizes of the spans matter,
and any sizes can stand in any order. With uneven blocks or few legal cuts it is a good order, not a proven best one.

Under a trust zone nobody gets a block that its labels do not allow (swarm/trust.py). Machines of like labels make up
the teams, and the order is: those for the beginning, some that may compute everything, those for the middle, the others
that may compute everything, those for the end. Every division of the ones that may compute everything is tried (up to
2^6 of them; beyond that one for each number).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.errors import NotEnoughRoom, PolicyUnmet, UsageError
from shoal.spec.ids import BlockRange
from shoal.swarm.trust import Zones, allowed, written

GIB = 1024**3
HOP_MS = 1.0
"""What one more stage adds to a token, assumed for a local network; only breaks ties between equal stages."""
DIVISIONS = 6
"""Of at most this many teams that may compute everything, every division into two parts is tried."""


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """What one machine can do, measured by its probe, and what it gives."""

    node: str
    decode_ms_per_block: float
    memory_bytes: int
    prefill_ms_per_block_token: float = 0.0
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What a model asks of whoever hosts it."""

    block_bytes: tuple[int, ...]
    """Weights of each block."""
    kv_bytes_per_block_token: int = 0
    cache_tokens: int = 0
    """Tokens of all sessions together that every server must have cache for."""
    legal_cuts: tuple[int, ...] | None = None
    """Borders at which this family may be cut (block numbers, without 0 and the end); None: all of them."""

    @property
    def num_blocks(self) -> int:
        return len(self.block_bytes)

    def span_bytes(self, start: int, end: int) -> int:
        """Memory of a server that hosts these blocks."""
        return sum(self.block_bytes[start:end]) + (end - start) * self.kv_bytes_per_block_token * self.cache_tokens

    def borders(self) -> list[int]:
        """All places where a span may begin or end, in order, 0 and the end included."""
        n = self.num_blocks
        cuts = range(1, n) if self.legal_cuts is None else self.legal_cuts
        return sorted({0, n, *(cut for cut in cuts if 0 < cut < n)})


@dataclass(frozen=True, slots=True)
class Assignment:
    """One machine hosts these blocks; `reason` says in words why."""

    node: str
    blocks: BlockRange
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision for all machines. `idle` maps machines without blocks to the reason."""

    assignments: tuple[Assignment, ...]
    idle: tuple[tuple[str, str], ...]
    slowest_stage_ms: float
    """Time of the slowest stage for one row: its inverse bounds the steps per second."""
    token_ms: float
    """Sum over the stages: the time of one token without the network."""

    @property
    def spans(self) -> list[BlockRange]:
        return sorted({assignment.blocks for assignment in self.assignments})

    def explain(self) -> list[str]:
        """One line per machine and one for the whole, for `shoal status --explain`."""
        stages, stage_ms = len(self.spans), self.slowest_stage_ms
        lines = [f"{stages} {_plural('stage', stages)}; the slowest takes {stage_ms:.2f} ms per step, "
                 f"a token {self.token_ms:.2f} ms without the network"]  # fmt: skip
        lines += [f"{a.node} hosts blocks {a.blocks}: {a.reason}" for a in self.assignments]
        lines += [f"{node} hosts nothing: {reason}" for node, reason in self.idle]
        return lines


@dataclass(frozen=True, slots=True)
class _Team:
    """Machines that host the same span: as fast as the slowest, as large as the smallest."""

    members: tuple[NodeOffer, ...]
    may: BlockRange
    """The blocks that the labels of all its members allow."""

    @property
    def ms_per_block(self) -> float:
        return max(member.decode_ms_per_block for member in self.members)

    @property
    def memory_bytes(self) -> int:
        return min(member.memory_bytes for member in self.members)


def place(
    needs: ModelNeeds,
    offers: Sequence[NodeOffer],
    *,
    stages: int | None = None,
    replicas: int = 1,
    zones: Sequence[Zones] = (),
) -> Placement:
    """Decide who hosts what. With `stages` given, exactly so many spans with `replicas` machines each; else as few
    stages as fit, and machines left over become further replicas.

    Raises NotEnoughRoom with figures when the machines are too few or too small, PolicyUnmet when they would do but for
    `zones`, UsageError for numbers that make no sense (no machines, more stages than the model can be cut into)."""
    borders = needs.borders()
    _check(needs, offers, stages, replicas, borders)
    teams = _teams(needs, offers, replicas, zones)
    least = stages or 1
    most = stages or min(len(teams), len(borders) - 1)
    for count in range(least, most + 1):
        if (spans := _best(needs, _orders(needs, teams), borders, count)) is not None:
            return _finish(needs, offers, spans, fixed=stages is not None, replicas=replicas, zones=zones)
    if any(zones):
        place(needs, offers, stages=stages, replicas=replicas)  # raises when the labels are not what is in the way
        raise PolicyUnmet(
            f"These machines could host the model, but not under the trust zone {written(zones)}: those with the labels"
            " it demands are too few or too small, or the model cannot be cut where the zone ends.",
            hint="Give more machines the label, or more memory to those that have it.",
        )
    raise _no_room(needs, offers, teams, borders, stages, replicas)


def _check(
    needs: ModelNeeds, offers: Sequence[NodeOffer], stages: int | None, replicas: int, borders: Sequence[int]
) -> None:
    if replicas < 1 or (stages is not None and stages < 1):
        raise UsageError(f"{stages} stages with {replicas} replicas make no swarm.", hint="Both must be at least 1.")
    if len({offer.node for offer in offers}) != len(offers):
        raise UsageError("One machine was offered twice.", hint="Give every machine once.")
    if stages is not None and stages > len(borders) - 1:
        cuts = "" if needs.legal_cuts is None else " at the borders its family allows"
        raise UsageError(
            f"A model of {needs.num_blocks} blocks can be cut into at most {len(borders) - 1} spans{cuts}, "
            f"{stages} were asked for.",
            hint=f"Use --servers {len(borders) - 1} or fewer; more machines can serve as replicas (--replicas).",
        )
    wanted = (stages or 1) * replicas
    if len(offers) < wanted:
        raise NotEnoughRoom(
            f"{stages or 1} {_plural('span', stages or 1)} with {replicas} {_plural('replica', replicas)} each need "
            f"{wanted} machines, {len(offers)} offer themselves.",
            hint=f"Add {wanted - len(offers)} machines or ask for fewer replicas.",
        )


def _teams(needs: ModelNeeds, offers: Sequence[NodeOffer], replicas: int, zones: Sequence[Zones] = ()) -> list[_Team]:
    """Groups of `replicas` machines that may compute the same blocks: first those with room for everything, the
    fastest first, then by room. The last few, when the number does not divide evenly, are left over; what different
    labels leave over makes up teams that may compute what all members may."""
    total = needs.span_bytes(0, needs.num_blocks)
    alike: dict[BlockRange, list[NodeOffer]] = {}
    for offer in sorted(offers, key=lambda o: (-min(o.memory_bytes, total), o.decode_ms_per_block, o.node)):
        if (may := allowed(zones, offer.labels, needs.num_blocks)) is not None:
            alike.setdefault(may, []).append(offer)
    teams: list[_Team] = []
    rest: list[NodeOffer] = []
    for may, group in sorted(alike.items()):
        whole = len(group) - len(group) % replicas
        teams += [_Team(tuple(group[at : at + replicas]), may) for at in range(0, whole, replicas)]
        rest += group[whole:]
    for at in range(0, len(rest) - replicas + 1, replicas):
        mixed = rest[at : at + replicas]
        ranges = [may for o in mixed if (may := allowed(zones, o.labels, needs.num_blocks)) is not None]
        start, end = max(may.start for may in ranges), min(may.end for may in ranges)
        if start < end:
            teams.append(_Team(tuple(mixed), BlockRange(start, end)))
    return teams


def _orders(needs: ModelNeeds, teams: Sequence[_Team]) -> list[list[_Team]]:
    """The orders in which stages may take the teams; one when all may compute everything."""
    n = needs.num_blocks
    free = [team for team in teams if team.may == BlockRange(0, n)]
    if len(free) == len(teams):
        return [list(teams)]
    begins = [team for team in teams if team.may.start == 0 and team.may.end < n]
    middles = [team for team in teams if team.may.start > 0 and team.may.end < n]
    ends = [team for team in teams if team.may.start > 0 and team.may.end == n]
    if len(free) <= DIVISIONS:
        early = [{i for i in range(len(free)) if chosen >> i & 1} for chosen in range(1 << len(free))]
    else:
        early = [set(range(count)) for count in range(len(free) + 1)]
    return [
        [
            *begins,
            *(team for i, team in enumerate(free) if i in chosen),
            *middles,
            *(team for i, team in enumerate(free) if i not in chosen),
            *ends,
        ]
        for chosen in early
    ]


def _best(
    needs: ModelNeeds, orders: Sequence[Sequence[_Team]], borders: Sequence[int], count: int
) -> list[tuple[_Team, BlockRange]] | None:
    """`count` stages with the least time of the slowest, of those with the least sum; None when nothing fits."""
    best: tuple[float, float, list[tuple[_Team, BlockRange]]] | None = None
    for teams in orders:
        slowest = _search(needs, teams, borders, count, limit_ms=None)
        if slowest is None or (best is not None and slowest[0] > best[0]):
            continue
        limit_ms = slowest[0]
        total = _search(needs, teams, borders, count, limit_ms=limit_ms)
        assert total is not None  # the first search found stages within this very limit
        if best is None or (limit_ms, total[0]) < best[:2]:
            best = (limit_ms, total[0], total[1])
    return None if best is None else best[2]


def _search(
    needs: ModelNeeds, teams: Sequence[_Team], borders: Sequence[int], count: int, limit_ms: float | None
) -> tuple[float, list[tuple[_Team, BlockRange]]] | None:
    """Dynamic program over (stages made, border reached), taking or leaving the teams one by one. Without a limit the
    cost is the slowest stage; with one it is the sum, over stages within the limit. (Two passes, because "slowest, then
    sum" in one pass is not optimal: a part that is worse for itself may be better for the whole.)"""
    bytes_to = [needs.span_bytes(0, border) for border in borders]
    last = len(borders) - 1
    # reached[s][b] = (cost, stages as a linked list (team, range, rest))
    reached: list[dict[int, tuple[float, _Stages]]] = [{} for _ in range(count + 1)]
    reached[0][0] = (0.0, None)
    for team in teams:
        memory, speed = team.memory_bytes, team.ms_per_block
        for made in range(count - 1, -1, -1):
            for at, (cost, stages) in list(reached[made].items()):
                if borders[at] < team.may.start:
                    continue
                for to in range(at + 1, last + 1):
                    stage_ms = (borders[to] - borders[at]) * speed
                    if borders[to] > team.may.end:
                        break
                    if bytes_to[to] - bytes_to[at] > memory or (limit_ms is not None and stage_ms > limit_ms):
                        break
                    new = max(cost, stage_ms) if limit_ms is None else cost + stage_ms + HOP_MS
                    known = reached[made + 1].get(to)
                    if known is None or new < known[0]:
                        reached[made + 1][to] = (new, (team, BlockRange(borders[at], borders[to]), stages))
    if last not in reached[count]:
        return None
    cost, linked = reached[count][last]
    spans: list[tuple[_Team, BlockRange]] = []
    while linked is not None:
        team, blocks, linked = linked
        spans.append((team, blocks))
    spans.reverse()
    return cost, spans


_Stages = tuple[_Team, BlockRange, "_Stages"] | None


def _finish(
    needs: ModelNeeds,
    offers: Sequence[NodeOffer],
    spans: list[tuple[_Team, BlockRange]],
    *,
    fixed: bool,
    replicas: int,
    zones: Sequence[Zones],
) -> Placement:
    assignments: list[Assignment] = []
    rate: dict[BlockRange, float] = {}
    """Steps per millisecond that the hosts of a span manage together."""
    for team, blocks in spans:
        for member in team.members:
            assignments.append(Assignment(member.node, blocks, _reason(needs, member, blocks, len(spans), fixed)))
        rate[blocks] = sum(1 / (len(blocks) * max(m.decode_ms_per_block, 1e-9)) for m in team.members)
    idle: list[tuple[str, str]] = []
    taken = {assignment.node for assignment in assignments}
    for offer in sorted(offers, key=lambda offer: (offer.decode_ms_per_block, offer.node)):
        if offer.node in taken:
            continue
        if fixed:
            idle.append((offer.node, f"{len(spans)} spans with {replicas} replicas were asked for, and all are hosted"))
            continue
        may = allowed(zones, offer.labels, needs.num_blocks)
        permitted = [blocks for blocks in rate if may is not None and blocks in may]
        if not permitted:
            idle.append((offer.node, f"its labels allow none of the spans under the trust zone {written(zones)}"))
            continue
        fitting = [blocks for blocks in permitted if needs.span_bytes(blocks.start, blocks.end) <= offer.memory_bytes]
        if not fitting:
            least = min(needs.span_bytes(blocks.start, blocks.end) for blocks in permitted)
            idle.append((offer.node, f"the smallest span needs {_gib(least)}, it offers {_gib(offer.memory_bytes)}"))
            continue
        weakest = min(fitting, key=lambda blocks: (rate[blocks], blocks))
        rate[weakest] += 1 / (len(weakest) * max(offer.decode_ms_per_block, 1e-9))
        reason = "one more replica of the span that was slowest with the machines so far"
        assignments.append(Assignment(offer.node, weakest, reason))
    assignments.sort(key=lambda assignment: (assignment.blocks, assignment.node))
    times = [len(blocks) * team.ms_per_block for team, blocks in spans]
    return Placement(tuple(assignments), tuple(idle), max(times), sum(times))


def _reason(needs: ModelNeeds, member: NodeOffer, blocks: BlockRange, stages: int, fixed: bool) -> str:
    need, offer = _gib(needs.span_bytes(blocks.start, blocks.end)), _gib(member.memory_bytes)
    room = f"needs {need} of the {offer} it offers"
    speed = f"{member.decode_ms_per_block:.2f} ms per block"
    if stages == 1:
        return f"the whole model fits here, so nothing is split; {room}, {speed}"
    fewer = "no machine has room" if stages == 2 else f"{stages - 1} machines have no room"
    why = f"{stages} spans were asked for" if fixed else f"{fewer} for all blocks"
    return f"{why}; {len(blocks)} of {needs.num_blocks} blocks balance the stages at {speed}; {room}"


def _no_room(
    needs: ModelNeeds,
    offers: Sequence[NodeOffer],
    teams: Sequence[_Team],
    borders: Sequence[int],
    stages: int | None,
    replicas: int,
) -> NotEnoughRoom:
    n = needs.num_blocks
    need = needs.span_bytes(0, n)
    best = sorted((team.memory_bytes for team in teams), reverse=True)[: stages or len(teams)]
    offered = sum(best)
    copies = f" ({replicas} times)" if replicas > 1 else ""
    if need > offered:
        return NotEnoughRoom(
            f"Not enough room: blocks 0-{n - 1} need {_gib(need)}{copies}, these machines offer {_gib(offered)}.",
            hint=f"Add machines with {_gib(need - offered)} together, lower the cache ({needs.cache_tokens} tokens), "
            "or ask for fewer replicas.",
        )
    start, end = max(pairwise(borders), key=lambda part: needs.span_bytes(*part))
    largest = max(offer.memory_bytes for offer in offers)
    return NotEnoughRoom(
        f"Not enough room: blocks 0-{n - 1} need {_gib(need)}{copies} and these machines offer {_gib(offered)}, but "
        f"spans do not divide that way. The largest inseparable one, blocks {start}-{end - 1}, needs "
        f"{_gib(needs.span_bytes(start, end))}; the largest machine offers {_gib(largest)}.",
        hint="Give one machine more memory, or allow more spans (--servers).",
    )


def _gib(size: float) -> str:
    if size < GIB / 10:
        return f"{size / 1024**2:.1f} MiB"
    return f"{size / GIB:.1f} GiB"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
