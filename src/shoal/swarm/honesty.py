"""Whether a server's answers are right: which calls are compared, how much may differ, and what follows from it.

A member can compute something else than it says: with coarser weights, without some blocks, with old rows. Nobody can
tell from one answer. So a small share of calls is computed again, afterwards, on another server of the same blocks:

    a call begins --drawn--> its outputs are kept --it ends--> another server gets the same inputs (the witness)
        the same within the tolerance: nothing              else a third one decides who is odd
    odd once: a strike;  two strikes within the last MEMORY checks: quarantine, and other gateways are told

The checked server learns nothing: it is drawn on our side, nothing about the call differs, and the comparison is made
when its answer is in our hands. The witness may guess what it is asked for; lying there only brings the third one in.

What cannot be decided is a dispute between two nodes (no third server hosts the blocks; or a server in the middle of a
chain says right when we ask it directly, so that the one before it may have pushed other rows than it showed us). One
dispute proves nothing. A node with disputes against *several* others is the one they have in common.

Nothing here is about one bad number: machines, kernels and precisions differ. How much they may is told by what both
servers declare in their signed records, and by the format in which the rows travelled.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

from shoal.spec.ids import BlockRange
from shoal.swarm.routing import Rng
from shoal.swarm.trust import Zones, permits
from shoal.wire.messages import Record, WireType

Result = Literal["agreed", "caught", "witness", "disputed", "unclear"]
"""What a comparison came to. caught: the checked server was odd; witness: the second one was; unclear: the third server
agrees with both, so they are on the border of the tolerance."""
Level = Literal["clear", "suspected", "quarantined"]

WRONG_SHARE = 0.05
"""Share of rows that may be out of tolerance. In a mixture of experts, rounding sends some rows to another expert."""
MIN_ROWS = 8
"""Calls with fewer rows to compare are not worth a judgement."""
STRIKE = 3
DISPUTE = 2
KNOWN_WRONG = 6
"""Points against a node: two strikes, or disputes with three others, or a strike and two disputes, are enough."""
MEMORY = 100
"""Strikes count among so many latest checks of a node."""
DISPUTE_MEMORY_S = 86_400.0
QUARANTINE_S = 4 * 3600.0
LONGEST_S = 64 * 3600.0
"""Every further quarantine of a node is twice as long, up to this."""
MAX_NODES = 2000
MAX_PARTNERS = 64
MAX_TOLD = 32
"""As many nodes as a record can name (wire.messages.Record.quarantined)."""
NAMED_AT_LEAST = 2
NAMED_SHARE = 1 / 3
"""A node is avoided on the word of others when this share of the gateways names it, and never fewer than two."""
BUSY_ROWS = 16
"""A server with more rows in its queue is not given a replay."""


# --- how much may differ ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Declared:
    """How a server says it computes, in its signed record."""

    dtype: str
    weights: str = "native"

    @classmethod
    def of(cls, record: Record) -> Declared:
        return cls(record.dtype, record.weights)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A row may differ by of_added * |what the blocks added| + of_output * |output| (Euclidean norms). Errors of
    computing grow with the first, errors of rounding and of the wire with the second, which in deep blocks is much
    larger: relative to the output alone a skipped block would nearly disappear there."""

    of_added: float
    of_output: float

    def used(self, difference: Difference) -> float:
        """The difference as a share of what is allowed; above 1 it is too large."""
        allowed = self.of_added * difference.added + self.of_output * difference.output
        if allowed > 0.0:
            return difference.error / allowed
        return 0.0 if difference.error == 0.0 else math.inf


@dataclass(frozen=True, slots=True)
class Difference:
    """One row, as two servers gave it: |a - b|, and of the two |output| and |output - input| the smaller ones (nobody
    gets more room by exaggerating)."""

    error: float
    output: float
    added: float


_COMPUTING = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.025, "float16": 0.025}
_ROUNDING = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.005, "float16": 0.005}
_WEIGHTS = {"native": 0.0, "int8": 0.04, "nf4": 0.4}
_TRAVELLING: dict[WireType, float] = {"f32": 0.0, "bf16": 0.003, "int8": 0.01}
"""Measured honest noise is 1e-6 for float32, up to 1.5 % of what was added for bfloat16 (32 blocks: 1.7 %), 0.1 % of
the output for int8 on the wire in float32; undeclared int8 weights are 0.8 % and more, 4-bit ones 12 % and more. The
table is in docs/concepts/honesty.md; `shoal bench security` measures it again."""


def tolerance(parties: Iterable[Declared], wire: WireType) -> Tolerance:
    """What two servers that are both honest may differ by: that of the less precise one. A precision that is not known
    here counts as the coarsest type."""
    parties = list(parties)
    return Tolerance(
        max(max(_COMPUTING.get(each.dtype, 0.025), _WEIGHTS.get(each.weights, 0.0)) for each in parties),
        max(_ROUNDING.get(each.dtype, 0.005) for each in parties) + _TRAVELLING[wire],
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two servers' outputs of the same rows."""

    rows: int
    wrong: int
    """Rows out of tolerance."""
    median: float
    """Of the middle row, the difference as a share of what is allowed."""

    @property
    def same(self) -> bool:
        return self.wrong <= max(1, int(WRONG_SHARE * self.rows))


def compare(differences: Iterable[Difference], within: Tolerance) -> Comparison:
    """All rows of a check. Raises ValueError for none."""
    used = sorted(map(within.used, differences))
    if not used:
        raise ValueError("no rows to compare")
    return Comparison(len(used), sum(share > 1.0 for share in used), used[len(used) // 2])


# --- whom to check, and with whose help ------------------------------------------------------------------------------


def draw(stages: int, rate: float, rng: Rng) -> int | None:
    """Which stage of a call is checked: each with probability `rate`, so that every server has that share of its calls
    checked, whatever the length of its chains. At most one a call."""
    drawn = [stage for stage in range(stages) if rng.random() < rate]
    return drawn[int(rng.random() * len(drawn))] if drawn else None


def witnesses(
    records: Iterable[Record],
    model: str,
    blocks: BlockRange,
    num_blocks: int,
    *,
    need_tokens: int,
    without: AbstractSet[str],
    zones: Sequence[Zones] = (),
) -> list[Record]:
    """Servers that could compute `blocks` again: they host all of them, may see their inputs under the call's `zones`,
    have room, and are not among `without`."""
    return [
        record
        for record in sorted(records, key=lambda record: record.node)
        if record.state == "online"
        and record.node not in without
        and record.span is not None
        and record.span.model == model
        and blocks in BlockRange(record.span.start, record.span.end)
        and record.cache_tokens_free >= need_tokens
        and permits(zones, record.labels, blocks, num_blocks)
    ]


def pick(candidates: Sequence[Record], rng: Rng) -> Record | None:
    """One of those that are not busy, with equal chances: a server must not be able to make itself the witness."""
    free = [record for record in candidates if record.queue_rows <= BUSY_ROWS]
    return free[int(rng.random() * len(free))] if free else None


# --- what follows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """How a check ended. `guilty` has been shown to be wrong; `disputes` are pairs of whom one is."""

    result: Result
    checked: str
    guilty: str | None = None
    disputes: tuple[tuple[str, str], ...] = ()
    reason: str = ""


def judge(
    checked: str,
    witness: str,
    third: str | None = None,
    *,
    same: bool,
    third_with_checked: bool = False,
    third_with_witness: bool = False,
    before: str | None = None,
    again_right: bool = False,
) -> Finding:
    """Who is odd. `same`: checked server and witness agree; third_with_...: with whom the third server agrees (None: no
    third hosts the blocks). `before` is the server that pushed the checked one its inputs, None when we fed it;
    `again_right`: the checked server, fed by us with the inputs we were shown, gave the others' answer."""
    if same:
        return Finding("agreed", checked)
    if third is None:
        reason = f"{checked} and {witness} differ, and no third server hosts these blocks"
        return Finding("disputed", checked, None, ((checked, witness),), reason)
    if third_with_checked and third_with_witness:
        return Finding("unclear", checked)
    if third_with_checked:
        # No strike: two that lie alike must not get those banned that witness against them.
        pairs = ((witness, checked), (witness, third))
        return Finding("witness", checked, None, pairs, f"{checked} and {third} agree, {witness} does not")
    if not third_with_witness:
        all_pairs = ((checked, witness), (checked, third), (witness, third))
        return Finding("disputed", checked, None, all_pairs, f"{checked}, {witness} and {third} all differ")
    if before is not None and again_right:
        reason = f"{checked} gave a wrong answer to what {before} pushed, and a right one to what {before} showed"
        return Finding("disputed", checked, None, ((checked, before),), reason)
    return Finding("caught", checked, checked, (), f"{witness} and {third} agree against it")


@dataclass(slots=True)
class _Node:
    checks: deque[bool] = field(default_factory=lambda: deque(maxlen=MEMORY))
    """The latest checks and replays of this node, True: it was wrong."""
    partners: dict[str, float] = field(default_factory=dict)
    """Whom it had a dispute with, and when last."""
    until: float = -1e18
    """End of its quarantine."""
    times: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """What this gateway thinks of a node, for people."""

    level: Level
    checks: int
    strikes: int
    disputes: int
    ends_in_s: float
    reason: str


class Reputation:
    """What one gateway has found out about servers, by node id: a node that restarts keeps its name. In memory only; a
    gateway that restarts starts anew, and the audit log keeps what it had found."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()
        """Checks by result, and those that came to nothing by cause."""
        self._nodes: dict[str, _Node] = {}

    def note(self, finding: Finding, now: float) -> list[str]:
        """Take in how a check ended; the nodes that are in quarantine because of it, newly."""
        self.results[finding.result] += 1
        if finding.result == "agreed":
            self._node(finding.checked).checks.append(False)
            return []
        touched: list[str] = []
        if finding.guilty is not None:
            self._node(finding.guilty).checks.append(True)
            touched.append(finding.guilty)
        for one, other in finding.disputes:
            for node, partner in ((one, other), (other, one)):
                partners = self._node(node).partners
                partners[partner] = now
                while len(partners) > MAX_PARTNERS:
                    del partners[min(partners, key=partners.__getitem__)]
                touched.append(node)
        condemned = [node for node in dict.fromkeys(touched) if self._guilt(node, now) >= KNOWN_WRONG]
        if len(condemned) > 1:
            # Of several that disputes point at, the one with the most against it; it may be what the others have.
            condemned = [max(condemned, key=lambda node: (self._guilt(node, now), node))]
        return [node for node in condemned if self._quarantine(node, finding.reason, now)]

    def count(self, cause: str) -> None:
        """A check came to nothing."""
        self.results[cause] += 1

    def quarantined(self, now: float) -> frozenset[str]:
        """Nodes that this gateway found wrong and gives nothing to now."""
        return frozenset(node for node, state in self._nodes.items() if now < state.until)

    def told(self, now: float) -> list[str]:
        """Those of them that this gateway's record names; the latest, when there are too many."""
        nodes = sorted(self.quarantined(now), key=lambda node: self._nodes[node].until)
        return sorted(nodes[-MAX_TOLD:])

    def avoid(self, records: Iterable[Record], self_node: str, now: float) -> frozenset[str]:
        """Nodes to route around: those found wrong here, and those that enough other gateways name."""
        return self.quarantined(now) | named(records, self_node)

    def standing(self, node: str, now: float) -> Standing:
        state = self._nodes.get(node) or _Node()
        strikes, disputes = sum(state.checks), len(self._partners(node, now))
        quarantined = now < state.until
        level: Level = "quarantined" if quarantined else "suspected" if strikes or disputes else "clear"
        ends_in_s = max(0.0, state.until - now) if quarantined else 0.0
        return Standing(level, len(state.checks), strikes, disputes, ends_in_s, state.reason if quarantined else "")

    def _node(self, node: str) -> _Node:
        state = self._nodes.get(node)
        if state is None:
            while len(self._nodes) >= MAX_NODES:
                # The least known goes first, in the order of their coming.
                del self._nodes[min(self._nodes, key=lambda known: (self._nodes[known].until, self._strikes(known)))]
            state = self._nodes[node] = _Node()
        return state

    def _strikes(self, node: str) -> int:
        state = self._nodes[node]
        return sum(state.checks) + len(state.partners)

    def _partners(self, node: str, now: float) -> list[str]:
        """With whom a node has open disputes. A partner that was found wrong since was the liar in theirs."""
        state = self._nodes.get(node)
        if state is None:
            return []
        return [
            partner
            for partner, at in state.partners.items()
            if now - at <= DISPUTE_MEMORY_S and not (partner in self._nodes and self._nodes[partner].times)
        ]

    def _guilt(self, node: str, now: float) -> int:
        state = self._nodes.get(node)
        return 0 if state is None else STRIKE * sum(state.checks) + DISPUTE * len(self._partners(node, now))

    def _quarantine(self, node: str, reason: str, now: float) -> bool:
        state = self._nodes[node]
        if now < state.until:
            return False
        state.until = now + min(LONGEST_S, QUARANTINE_S * 2**state.times)
        state.times += 1
        state.reason = reason
        # Afterwards it starts with one strike: another one sends it back.
        state.checks.clear()
        state.checks.append(True)
        state.partners.clear()
        return True


def named(records: Iterable[Record], self_node: str = "") -> frozenset[str]:
    """Nodes that enough gateways name in their records: a third of them, two at least. One gateway that lies can
    therefore ban nobody, and neither can a node that is no gateway (roles are proven by certificates)."""
    gateways = [record for record in records if record.role == "gateway"]
    votes = Counter(
        node for gateway in gateways if gateway.node != self_node for node in set(gateway.quarantined) - {gateway.node}
    )
    needed = max(NAMED_AT_LEAST, -(-len(gateways) // round(1 / NAMED_SHARE)))
    return frozenset(node for node, count in votes.items() if count >= needed)


def uncompared(spans: Mapping[BlockRange, int]) -> list[BlockRange]:
    """Blocks, given as ranges with their numbers of servers, whose only server nobody can be compared with."""
    return [blocks for blocks, servers in spans.items() if servers == 1]
