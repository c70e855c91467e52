"""What one node believes about all the others: a copy of every record, merged by gossip, aged on its own clock.

Theory of operation. Each node writes exactly one record, its own, and numbers it with (incarnation, version): the
incarnation grows with every start of the process, the version with every change and every renewal of the lease. Of two
records about one node the one with the higher number wins, so merging is commutative, associative and idempotent, and
copies converge whatever the network loses, repeats or reorders. No agreement is needed, because nobody else may write.

    unknown --merge--> live --lease_s without growth--> expired --forget_s--> unknown
                        ^  |                               |
                        |  +--state "gone" heard--> gone --+   (gone is a record like any other, it is just never live)
                        +---------a higher number----------+

An expired record is kept for `forget_s`, and never sent on, so that a late copy of it is recognised as old news and
does not bring a dead node back. Clocks are never compared between machines: a lease runs from the moment *this* node
saw the number grow.

Suspicion is separate and private: after a broken connection a node avoids its peer at once, and asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from shoal.wire.messages import MAX_META_BYTES, Record, Sync

Number = tuple[int, int]
"""(incarnation, version)"""

FORGET_S = 600.0
"""How long a dead node's number is remembered. Far longer than a lease (seconds), so that a copy which sat behind a
partition is still recognised as old."""
MAX_NODES = 1000
"""Records of more nodes than this are not taken in: a member that invents names cannot fill our memory, and the digest
always fits into one frame."""
MAX_RECORD_BYTES = 4096
MAX_NODE_CHARS = 32
"""A node id is a key fingerprint (spec.ids.NodeId)."""
SYNC_BYTES = MAX_META_BYTES - MAX_RECORD_BYTES
"""Room for the digest and the records of one Sync. At least one record always goes along; whatever does not fit goes
with the next Sync, because the digests show that it is still missing."""

_NUMBER_BYTES = 24
_RECORD_BYTES = 160
"""Generous size of a number in a digest, and of a record without its texts, in msgpack."""
_MAX_COUNT = 2**53


@dataclass(slots=True)
class _Entry:
    record: Record
    grew_at_s: float
    """Own clock, when (incarnation, version) last grew."""

    @property
    def number(self) -> Number:
        return (self.record.incarnation, self.record.version)

    def dies_at_s(self) -> float:
        return self.grew_at_s + self.record.lease_s


class View:
    """The registry as seen by `self_node`. Pure: every method that depends on the time takes `now` (seconds, own
    monotonic clock)."""

    def __init__(self, self_node: str, *, forget_s: float = FORGET_S, max_nodes: int = MAX_NODES) -> None:
        self.self_node = self_node
        self._forget_s = forget_s
        self._max_nodes = max_nodes
        self._entries: dict[str, _Entry] = {}
        self._suspects: dict[str, tuple[float, int]] = {}
        """node -> (avoid until, incarnation that failed us)."""
        self._next_sweep_s = 0.0

    # -- writing ----------------------------------------------------------------------------------------------------

    def put(self, record: Record, now: float) -> Record:
        """Publish this node's own record and return it as published: its number is raised when it would not be higher
        than the last one, or than one that others still hold from an earlier life of this node.

        Raises ValueError for a record about another node: those only ever come in through `merge`."""
        if record.node != self.self_node:
            raise ValueError(f"{self.self_node} may not write the record of {record.node}")
        if not _fits(record):
            raise ValueError(f"the record of {record.node} is larger than {MAX_RECORD_BYTES} bytes or its id too long")
        entry = self._entries.get(self.self_node)
        if entry is not None and (record.incarnation, record.version) <= entry.number:
            record = msgspec.structs.replace(record, incarnation=entry.number[0], version=entry.number[1] + 1)
        self._entries[self.self_node] = _Entry(record, now)
        return record

    def merge(self, records: Iterable[Record], now: float) -> list[str]:
        """Take in records heard from others; returns the nodes whose record changed. What others say about this node is
        never believed; a number higher than our own makes us publish a higher one (see `put`)."""
        self._sweep(now)
        changed = []
        for record in records:
            number = (record.incarnation, record.version)
            if record.node == self.self_node:
                self._outnumber(number, now)
                continue
            entry = self._entries.get(record.node)
            if entry is None and (len(self._entries) >= self._max_nodes or not _fits(record)):
                continue
            if entry is None or (number > entry.number and _fits(record)):
                self._entries[record.node] = _Entry(record, now)
                changed.append(record.node)
        return changed

    def suspect(self, node: str, now: float, for_s: float) -> None:
        """Avoid `node` for `for_s` seconds, or until it has started anew. News about it that came through others do not
        lift the suspicion: they do not prove that *we* can reach it."""
        entry = self._entries.get(node)
        until_s = max(now + for_s, self._suspects.get(node, (0.0, 0))[0])
        self._suspects[node] = (until_s, entry.number[0] if entry is not None else -1)

    # -- reading ----------------------------------------------------------------------------------------------------

    def get(self, node: str) -> Record | None:
        """The newest record of `node`, dead or alive."""
        entry = self._entries.get(node)
        return entry.record if entry is not None else None

    def live(self, now: float) -> list[Record]:
        """Records whose lease has not run out and that have not said "gone", in the order of node ids. Suspected nodes
        are included; see `suspects`."""
        return [
            entry.record
            for _, entry in sorted(self._entries.items())
            if entry.record.state != "gone" and self._spreads(entry, now)
        ]

    def suspects(self, now: float) -> frozenset[str]:
        """Nodes to avoid now."""
        for node, (until_s, incarnation) in list(self._suspects.items()):
            entry = self._entries.get(node)
            if now >= until_s or (entry is not None and entry.number[0] > incarnation >= 0):
                del self._suspects[node]
        return frozenset(self._suspects)

    def __len__(self) -> int:
        """How many records are kept, the dead ones included."""
        return len(self._entries)

    # -- gossip -----------------------------------------------------------------------------------------------------

    def digest(self) -> dict[str, Number]:
        """The number of every record kept. The expired are included: a node that started anew with a lower number (its
        calendar went back) finds its old one there, and outnumbers it."""
        return {node: entry.number for node, entry in self._entries.items()}

    def newer_than(self, digest: Mapping[str, Number], now: float) -> list[Record]:
        """Records that the writer of `digest` lacks, those that have waited longest first, as many as one Sync carries.
        Expired records are not spread any further; "gone" ones are, until their lease has run out."""
        lacking = [
            entry
            for node, entry in self._entries.items()
            if self._spreads(entry, now) and entry.number > digest.get(node, (-1, -1))
        ]
        lacking.sort(key=lambda entry: (entry.grew_at_s, entry.record.node))
        room = SYNC_BYTES - sum(len(node) + _NUMBER_BYTES for node in self._entries)
        chosen: list[Record] = []
        for entry in lacking:
            room -= _rough_bytes(entry.record)
            if room < 0 and chosen:
                break
            chosen.append(entry.record)
        return chosen

    def sync(self) -> Sync:
        """The first message of a round: what we know, asking for what we lack."""
        return Sync(digest=self.digest(), records=[], answers=2)

    def on_sync(self, message: Sync, now: float) -> Sync | None:
        """Take in a Sync and answer it when it asks for an answer. A round is at most three messages: `sync`, an answer
        with what the first side lacks, and, when the answering side lacks something too, a last one with that."""
        self.merge(message.records, now)
        self._outnumber(message.digest.get(self.self_node, (-1, -1)), now)
        if message.answers == 0:
            return None
        lack = any(number > self._number(node) for node, number in message.digest.items())
        records = self.newer_than(message.digest, now)
        return Sync(digest=self.digest(), records=records, answers=message.answers - 1 if lack else 0)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _outnumber(self, number: Number, now: float) -> None:
        """Others hold a record from an earlier life of this node (its clock went back, say): publish a higher number,
        or nobody would ever believe us again."""
        own = self._entries.get(self.self_node)
        if own is not None and own.number < number and number[0] < _MAX_COUNT:
            own.record = msgspec.structs.replace(own.record, incarnation=number[0] + 1, version=0)
            own.grew_at_s = now

    def _spreads(self, entry: _Entry, now: float) -> bool:
        return entry.record.node == self.self_node or now < entry.dies_at_s()

    def _number(self, node: str) -> Number:
        entry = self._entries.get(node)
        return entry.number if entry is not None else (-1, -1)

    def _sweep(self, now: float) -> None:
        """Forget what has been dead for long. Once in a while is enough: it only bounds memory."""
        if now < self._next_sweep_s:
            return
        self._next_sweep_s = now + self._forget_s / 16
        for node, entry in list(self._entries.items()):
            if node != self.self_node and now >= entry.dies_at_s() + self._forget_s:
                del self._entries[node]
        self.suspects(now)


def _fits(record: Record) -> bool:
    return len(record.node) <= MAX_NODE_CHARS and _rough_bytes(record) <= MAX_RECORD_BYTES


def _rough_bytes(record: Record) -> int:
    texts = [record.node, record.serves, record.reason, *record.addresses, *record.labels]
    if record.span is not None:
        texts.append(record.span.model)
    return _RECORD_BYTES + sum(len(text.encode()) + 3 for text in texts)
