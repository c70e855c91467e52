"""Which blocks a server takes that was given none, and when it should leave them for others.

Every server decides for itself, and all of them decide alike: the functions here look at the registry only, at the very
records that all others see too, and name *one* next step for the whole swarm. A server that finds another one named
does nothing. So two servers do not jump to the same place, and nobody has to be asked.

    joining   those who join at the same time choose in the order of their ids, each knowing what the ones before chose
    moving    next_move() names the one server whose move helps most; ties go to the smaller id
    labels    nobody leaves blocks that then have no server with one of its labels: a trust zone may demand it
    settling  a Rebalancer waits until the same move was right for a while, and rests after its own

What a placement is worth is its *throughput*: how many steps a second all servers manage together when sessions are
shared out as well as can be. Every session goes through every block, so demand is the same for all blocks, and the
blocks that are hosted too thinly bound the whole. Whether anybody demands that much is measured: no server moves unless
the hosts of the busiest blocks have hardly a pause.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from shoal.errors import ModelError, NotEnoughRoom
from shoal.spec.ids import BlockRange
from shoal.spec.units import show_bytes
from shoal.swarm.placement import ModelNeeds
from shoal.wire.messages import Record

MAX_MOVERS = 8
"""Servers that are tried as the one to move; the idle ones first. All servers compute this once a second."""
IDLE = 0.1
"""Busy for less than this share of its time: such a server moves before others. (Not the least busy one: loads waver,
and the servers must agree for a while on who it is.)"""
MAX_REASON = 256
"""What fits into a record."""
NEAR = 1.15
"""Of placements whose throughput is this close to the best, the one with the fewest new borders wins: where spans
overlap in many ways, tokens take more hops."""
_LIKE = 1.02
"""Throughputs closer than this are equal: figures measured on two machines do not decide between them."""


@dataclass(frozen=True, slots=True)
class BalanceConfig:
    """When a server that works gives up its place for a better one."""

    gain: float = 1.2
    """The swarm's throughput must grow by more than this factor: a move costs a load, and every session of the mover a
    replay."""
    hot: float = 0.7
    """Share of time that the hosts of the busiest blocks compute. Below it nobody waits long."""
    mover_busy: float = 0.6
    """Nobody leaves who is needed where it is."""
    settle_s: float = 8.0
    """A move to the same blocks must be the right one for this long without a break. Loads are means over about ten
    seconds."""
    named_s: float = 3.0
    """The same server must be the one to move for this long: others may see the latest figures a round later."""
    settle_missing_s: float = 5.0
    """The same when blocks are hosted by nobody: a server that restarts gets the time to come back."""
    rest_s: float = 60.0
    """A server that moved stays at least this long, unless blocks are missing."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Blocks for a server that has none, and why these."""

    blocks: BlockRange
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """`node` should leave what it hosts and host `blocks`. `gain` is the factor in throughput, infinite when the swarm
    is incomplete without it."""

    node: str
    blocks: BlockRange
    gain: float
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one move to make now, if any; `text` says in words why, or why none."""

    move: Move | None
    text: str


@dataclass(frozen=True, slots=True)
class _Host:
    """A server and what it hosts, or is about to."""

    node: str
    blocks: BlockRange
    ms_per_block: float
    busy: float
    memory_bytes: int = 0
    free: bool = False
    """It may leave its blocks: nobody gave them to it."""
    labels: tuple[str, ...] = ()


# --- what a placement is worth -------------------------------------------------------------------------------------


def throughput(hosts: Iterable[tuple[BlockRange, float]], num_blocks: int, *, above: float = 0.0) -> float:
    """Steps per millisecond that hosts (blocks, ms per block) manage together, sessions shared out in the best way; 0
    when a block has no host, and when it is not more than `above` (which is found out sooner).

    Each host has one millisecond of work to give per millisecond, to any of its blocks. For a rate to be possible every
    block must get its share: going through the blocks in order, the hosts whose spans end first give first, because the
    others can still give later."""
    power: dict[BlockRange, float] = {}
    for blocks, ms in hosts:
        power[blocks] = power.get(blocks, 0.0) + 1 / max(ms, 1e-9)
    regions = _regions(power, num_blocks)
    if not all(spans for _, spans in regions):
        return 0.0
    high = min(sum(power.values()) / num_blocks, *(sum(power[s] for s in spans) / size for size, spans in regions))
    if _possible(high, power, regions):
        return high if high > above else 0.0
    if above > 0 and (high <= above or not _possible(above, power, regions)):
        return 0.0
    low = above
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if _possible(middle, power, regions) else (low, middle)
    return low


def _regions(power: Iterable[BlockRange], num_blocks: int) -> list[tuple[int, list[BlockRange]]]:
    """(blocks, spans that cover them) between neighbouring borders, in order; spans that end first come first."""
    spans = sorted(power, key=lambda span: (span.end, span.start))
    borders = sorted({0, num_blocks, *(s.start for s in spans), *(min(s.end, num_blocks) for s in spans)})
    return [
        (end - start, [span for span in spans if span.start <= start and end <= span.end])
        for start, end in pairwise(borders)
    ]


def _possible(rate: float, power: dict[BlockRange, float], regions: Sequence[tuple[int, list[BlockRange]]]) -> bool:
    left = dict(power)
    for size, spans in regions:
        need = rate * size * (1 - 1e-9)
        for span in spans:
            given = min(need, left[span])
            left[span] -= given
            need -= given
        if need > 0:
            return False
    return True


def _worth(hosts: Iterable[_Host], num_blocks: int, *, above: float = 0.0) -> float:
    return throughput(((host.blocks, host.ms_per_block) for host in hosts), num_blocks, above=above)


def _covered(hosts: Iterable[_Host]) -> set[int]:
    return {block for host in hosts for block in range(host.blocks.start, host.blocks.end)}


# --- joining -------------------------------------------------------------------------------------------------------


def _vouched(hosts: Iterable[_Host]) -> set[tuple[str, int]]:
    """(label, block) of every block that is hosted with that label."""
    return {
        (label, block) for host in hosts for label in host.labels for block in range(host.blocks.start, host.blocks.end)
    }


def choose(records: Iterable[Record], node: str, model: str, needs: ModelNeeds) -> Choice:
    """Blocks for `node`, whose own record is among `records` (live ones). Others that join the same model and have a
    smaller id choose before it.

    Raises NotEnoughRoom with figures when not one piece of the model fits into what the node offers."""
    records = list(records)
    hosts = _hosts(records, model, states=("online", "loading"))
    joining = [r for r in records if r.serves == model and r.span is None and r.state == "joining"]
    for record in sorted(joining, key=lambda record: record.node):
        if record.node != node and record.node > node:
            continue
        found = _best_span(record, needs, hosts)
        if record.node == node:
            if found is None:
                raise _no_room(needs, record.memory_bytes)
            return found
        if found is not None:
            hosts.append(_Host(record.node, found.blocks, record.decode_ms_per_block, 0.0))
    raise ValueError(f"{node} is not among those that join {model}")


def name_in_use(model: str, records: Iterable[Record]) -> str | None:
    """The name under which servers host what is called `model` (name@hash) here, whatever its directory is called;
    None when nobody does."""
    known = _models_named_in(records)
    if model in known:
        return model
    contents = model.partition("@")[2]
    return min((other for other in known if other.partition("@")[2] == contents), default=None)


def _models_named_in(records: Iterable[Record]) -> set[str]:
    names: set[str] = set()
    for record in records:
        if record.span is not None:
            names.add(record.span.model)
        if record.serves:
            names.add(record.serves)
    return names


def known_as(model: str, records: Iterable[Record]) -> str:
    """The name by which the swarm knows the model that is called `model` (name@hash) here: the directory's name may
    differ from machine to machine, what is in it may not.

    Raises ModelError when the swarm serves a model of this name with other contents."""
    records = list(records)
    if (found := name_in_use(model, records)) is not None:
        return found
    name = model.partition("@")[0]
    known = sorted(_models_named_in(records))
    namesakes = [other for other in known if other.partition("@")[0] == name]
    if namesakes:
        raise ModelError(
            f"The {name} of this machine is not that of the swarm: {model} here, {', '.join(namesakes)} there.",
            hint="Copy the model directory from a machine of the swarm: config.json and the weights must be the same.",
        )
    return model


def fitting_blocks(needs: ModelNeeds, memory_bytes: int) -> int:
    """The most consecutive blocks, between borders where the model may be cut, that fit into `memory_bytes`."""
    return max((len(span) for span in _windows(needs, memory_bytes)), default=0)


def check_room(needs: ModelNeeds, blocks: BlockRange | None, memory_bytes: int) -> None:
    """Raises NotEnoughRoom, with how many blocks would fit, when `blocks` (None: any piece) do not."""
    most = fitting_blocks(needs, memory_bytes)
    if most == 0:
        raise _no_room(needs, memory_bytes)
    if blocks is not None and (need := needs.span_bytes(blocks.start, blocks.end)) > memory_bytes:
        raise NotEnoughRoom(
            f"Not enough room: blocks {blocks} need {show_bytes(need)} with cache for {needs.cache_tokens} tokens;"
            f" this machine offers {show_bytes(memory_bytes)}, which is room for {most} blocks.",
            hint="Choose fewer blocks (or leave --blocks away), less cache (--cache-tokens), or offer more (--memory).",
        )


def _best_span(record: Record, needs: ModelNeeds, hosts: Sequence[_Host]) -> Choice | None:
    """The span with which the swarm covers most, then manages most. While blocks are missing nothing is managed at
    all: then what is hosted should be much, and not piled up."""
    num_blocks = needs.num_blocks
    covered = _covered(hosts)
    before = _worth(hosts, num_blocks)
    spans = {host.blocks for host in hosts}
    options: list[_Option] = []
    for blocks in _targets(needs, record.memory_bytes, spans, covered):
        covers = len(covered | set(range(blocks.start, blocks.end)))
        mine = _Host(record.node, blocks, record.decode_ms_per_block, 0.0)
        worth = _worth([*hosts, mine], num_blocks) if covers == num_blocks else 0.0
        options.append(_Option(mine, blocks, covers, worth, _new_borders(blocks, spans, num_blocks)))
    if not options:
        return None
    best = _best(options)
    blocks, worth = best.blocks, best.worth
    missing = len(set(range(blocks.start, blocks.end)) - covered)
    room = (
        f"needs {show_bytes(needs.span_bytes(blocks.start, blocks.end))} of {show_bytes(record.memory_bytes)} offered"
    )
    if len(blocks) == num_blocks:
        why = "the whole model fits here, so nothing is split"
    elif missing:
        why = f"{missing} of these {len(blocks)} blocks had no server"
    else:
        why = f"the swarm manages up to {worth / before:.1f} times as much with one more server there"
    return Choice(blocks, f"{why}; {room}"[:MAX_REASON])


def _targets(
    needs: ModelNeeds, memory_bytes: int, spans: Iterable[BlockRange], covered: set[int], *, everywhere: bool = True
) -> list[BlockRange]:
    """Spans worth trying: those that others host, those without a host, and the largest that fits at each border of the
    model, or (not `everywhere`) at each border of a span."""
    spans = set(spans)
    known = {border for span in spans for border in (span.start, span.end)}
    fits = {span for span in spans if needs.span_bytes(span.start, span.end) <= memory_bytes}
    windows = _windows(needs, memory_bytes)
    gaps = _gaps(needs, covered)
    parts = {
        BlockRange(max(gap.start, window.start), min(gap.end, window.end))
        for gap in gaps
        for window in windows
        if window.start < gap.end and gap.start < window.end
    }
    windows = [span for span in windows if everywhere or known & {span.start, span.end}]
    return sorted({*fits, *windows, *(part for part in parts if _legal(needs, part))})


def _windows(needs: ModelNeeds, memory_bytes: int) -> list[BlockRange]:
    """For every border the longest span that begins there, and the longest that ends there, and fits."""
    borders = needs.borders()
    found = set()
    for at, border in enumerate(borders):
        after = [to for to in borders[at + 1 :] if needs.span_bytes(border, to) <= memory_bytes]
        if after:
            found.add(BlockRange(border, max(after)))
        before = [start for start in borders[:at] if needs.span_bytes(start, border) <= memory_bytes]
        if before:
            found.add(BlockRange(min(before), border))
    return sorted(found)


def _gaps(needs: ModelNeeds, covered: set[int]) -> list[BlockRange]:
    """Runs of blocks without a host, widened to where the model may be cut."""
    borders = needs.borders()
    gaps: list[BlockRange] = []
    for start, end in pairwise(borders):
        if all(block in covered for block in range(start, end)):
            continue
        if gaps and gaps[-1].end == start:
            gaps[-1] = BlockRange(gaps[-1].start, end)
        else:
            gaps.append(BlockRange(start, end))
    return gaps


def _legal(needs: ModelNeeds, blocks: BlockRange) -> bool:
    borders = needs.borders()
    return blocks.start in borders and blocks.end in borders


def _new_borders(blocks: BlockRange, spans: Iterable[BlockRange], num_blocks: int) -> int:
    known = {0, num_blocks, *(border for span in spans for border in (span.start, span.end))}
    return (blocks.start not in known) + (blocks.end not in known)


@dataclass(frozen=True, slots=True)
class _Option:
    """One server at one place, and what the swarm would be like."""

    host: _Host
    blocks: BlockRange
    covers: int
    worth: float
    new_borders: int


def _best(options: Sequence[_Option]) -> _Option:
    """The option that covers most, then is worth most; among those nearly as good the simplest. The first of equals."""
    covers = max(option.covers for option in options)
    options = [option for option in options if option.covers == covers]
    most = max(option.worth for option in options)
    options = [option for option in options if option.worth * NEAR >= most]
    return max(
        options,
        key=lambda option: (-option.new_borders, _step(option.worth), option.host.busy < IDLE, len(option.blocks)),
    )


def _step(worth: float) -> int:
    """Throughput in steps of two per cent."""
    return math.floor(math.log(worth) / math.log(_LIKE)) if worth > 0 else 0


def _no_room(needs: ModelNeeds, memory_bytes: int) -> NotEnoughRoom:
    borders = needs.borders()
    pieces = [(needs.span_bytes(a, b), a, b) for a, b in pairwise(borders)]
    least, start, end = min(pieces)
    need, offer = show_bytes(least), show_bytes(memory_bytes)
    return NotEnoughRoom(
        f"Not enough room: the smallest piece of this model, blocks {start}:{end}, needs {need} with cache for"
        f" {needs.cache_tokens} tokens; this machine offers {offer}, so none of the {needs.num_blocks} blocks fits.",
        hint="Offer more memory (--memory), or use a machine that has more.",
    )


# --- moving --------------------------------------------------------------------------------------------------------


def next_move(records: Iterable[Record], model: str, needs: ModelNeeds, config: BalanceConfig | None = None) -> Verdict:
    """The one move that all servers of `model` agree on now, from the live `records`; see the module's text."""
    config = config or BalanceConfig()
    records = list(records)
    hosts = _hosts(records, model, states=("online", "loading"))
    missing = [gap for gap in _gaps(needs, _covered(hosts)) if hosts]
    joining = [r for r in records if r.serves == model and r.state == "joining"]
    if missing:
        holes = ", ".join(map(str, missing))
        if joining:
            return Verdict(None, f"blocks {holes} have no server yet; {_names(joining)} is about to choose")
        move = _best_move(hosts, needs, config, f"blocks {holes} had no server")
        return Verdict(move, move.reason if move else f"blocks {holes} have no server, and none can be spared for them")
    if not hosts:
        return Verdict(None, "no server hosts anything")
    changing = joining + [r for r in records if _of(r, model) and r.state in ("loading", "draining")]
    if changing:
        return Verdict(None, f"waiting until {_names(changing)} has finished changing its place")
    blocks, busy = _busiest(hosts, needs.num_blocks)
    if busy < config.hot:
        return Verdict(None, f"nobody needs to move: the busiest blocks, {blocks}, are in use {busy:.0%} of the time")
    move = _best_move(hosts, needs, config, f"blocks {blocks} were the bottleneck, busy {busy:.0%} of the time")
    if move is None:
        text = f"blocks {blocks} are busy {busy:.0%} of the time, but no move gains more than {config.gain - 1:.0%}"
        return Verdict(None, text)
    return Verdict(move, move.reason)


class Rebalancer:
    """One server's patience. Ask `consider` about once a second, and report with `moved` that a move was made."""

    def __init__(self, node: str, config: BalanceConfig | None = None) -> None:
        self.node = node
        self.config = config or BalanceConfig()
        self._blocks: BlockRange | None = None
        self._blocks_since = 0.0
        self._mover = ""
        self._mover_since = 0.0
        self._rest_until = -1e18

    def consider(self, records: Iterable[Record], model: str, needs: ModelNeeds, now: float) -> Move | None:
        """The move that this server should make now, if any."""
        config = self.config
        move = next_move(records, model, needs, config).move
        if move is None:
            self._blocks, self._mover = None, ""
            return None
        if move.blocks != self._blocks:
            self._blocks, self._blocks_since = move.blocks, now
        if move.node != self._mover:
            self._mover, self._mover_since = move.node, now
        urgent = move.gain == math.inf
        settled = now - self._blocks_since >= (config.settle_missing_s if urgent else config.settle_s)
        if move.node != self.node or not settled or now - self._mover_since < config.named_s:
            return None
        return move if urgent or now >= self._rest_until else None

    def moved(self, now: float) -> None:
        """It has moved, or tried to and stayed: no other move for a while."""
        self._blocks, self._mover = None, ""
        self._rest_until = now + self.config.rest_s


def _best_move(hosts: Sequence[_Host], needs: ModelNeeds, config: BalanceConfig, because: str) -> Move | None:
    num_blocks = needs.num_blocks
    covered = _covered(hosts)
    worth = _worth(hosts, num_blocks)
    vouched = _vouched(hosts)
    whole = len(covered) == num_blocks
    options: list[_Option] = []
    spares: list[_Option] = []
    """Those that would take a label away from a block: a gateway's trust zone may demand it there. Only for blocks that
    have no server at all."""
    movers = [
        at
        for at, host in enumerate(hosts)
        if host.free and not (whole and host.busy > config.mover_busy) and not _has_twin(hosts, at)
    ]
    for at in sorted(sorted(movers, key=lambda at: hosts[at].busy >= IDLE)[:MAX_MOVERS]):
        host = hosts[at]
        others = [*hosts[:at], *hosts[at + 1 :]]
        spans = {other.blocks for other in others}
        left = _covered(others)
        for target in _targets(needs, host.memory_bytes, {*spans, host.blocks}, left, everywhere=False):
            covers = left | set(range(target.start, target.end))
            if target == host.blocks or not covers >= covered or (len(covers) == len(covered) and not whole):
                continue
            after = _worth([*others, replace(host, blocks=target)], num_blocks, above=config.gain * worth)
            if not whole or after > config.gain * worth:
                new = _new_borders(target, spans, num_blocks)
                keeps = _vouched([*others, replace(host, blocks=target)]) >= vouched
                (options if keeps else spares).append(_Option(host, target, len(covers), after, new))
    if not options and not whole:
        options = spares
    if not options:
        return None
    # Hosts come in the order of their ids and targets in that of their blocks, so of equals all name the same.
    best = _best(options)
    gain = best.worth / worth if whole else math.inf
    what = f"the swarm manages up to {gain:.1f} times as much with this server there" if whole else "it could be spared"
    return Move(best.host.node, best.blocks, gain, f"{because}; {what}"[:MAX_REASON])


def _has_twin(hosts: Sequence[_Host], at: int) -> bool:
    """Whether an earlier host is the same in all that decides, so that trying this one as well changes nothing."""
    own = replace(hosts[at], node="")
    return any(replace(host, node="") == own for host in hosts[:at])


def _busiest(hosts: Sequence[_Host], num_blocks: int) -> tuple[BlockRange, float]:
    """The blocks whose hosts have the least pause, and the share of time they compute, by their power."""
    power: dict[BlockRange, float] = {}
    load: dict[BlockRange, float] = {}
    for host in hosts:
        strength = 1 / max(host.ms_per_block, 1e-9)
        power[host.blocks] = power.get(host.blocks, 0.0) + strength
        load[host.blocks] = load.get(host.blocks, 0.0) + strength * min(host.busy, 1.0)
    best: tuple[float, BlockRange] | None = None
    at = 0
    for size, spans in _regions(power, num_blocks):
        busy = sum(load[span] for span in spans) / sum(power[span] for span in spans)
        if best is None or busy > best[0] + 1e-9:
            best = (busy, BlockRange(at, at + size))
        at += size
    assert best is not None  # a model has blocks
    return best[1], best[0]


def _hosts(records: Iterable[Record], model: str, states: tuple[str, ...]) -> list[_Host]:
    return [
        _Host(
            record.node,
            BlockRange(record.span.start, record.span.end),
            record.decode_ms_per_block,
            record.busy,
            record.memory_bytes,
            record.serves == model and record.state == "online",
            tuple(record.labels),
        )
        for record in sorted(records, key=lambda record: record.node)
        if record.role == "server"
        and record.span is not None
        and record.span.model == model
        and record.span.start < record.span.end
        and record.state in states
    ]


def _of(record: Record, model: str) -> bool:
    return record.role == "server" and (
        record.serves == model or (record.span is not None and record.span.model == model)
    )


def _names(records: Sequence[Record]) -> str:
    return ", ".join(record.node for record in records[:3])
