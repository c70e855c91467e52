"""What one node believes about all the others: a copy of every record, merged by gossip, aged on its own clock.

Theory of operation. Each node writes exactly one record, its own, signs it, and numbers it with (incarnation, version):
the incarnation grows with every start of the process and every new certificate, the version with every change and every
renewal of the lease. Of two records about one node the one with the higher number wins, so merging is commutative,
associative and idempotent, and copies converge whatever the network loses, repeats or reorders. No agreement is needed,
because nobody else may write, and nobody else can: a record that its own node has not signed is dropped, counted, and
never passed on.

    unknown --merge--> live --lease without growth--> expired --forget_s--> unknown
                        ^  |                               |
                        |  +--state "gone" heard--> gone --+   (gone is a record like any other, it is just never live)
                        +---------a higher number----------+
    any of them --its node is revoked--> refused for good

A lease is renewed by a Beat, which carries nothing but the record's old and new number. Whoever has the record takes
the new number for it; the record itself is sent again only when it has changed.

An expired record is kept for `forget_s`, and passed on to nobody but its own writer, so that a late copy of it is
recognised as old news and does not bring a dead node back. Clocks are never compared between machines: a record carries
its age, and the lease runs from that moment on the clock of whoever received it. So it ends everywhere at about the
same time, however many hands a record went through.

Suspicion is separate and private: after a broken connection a node avoids its peer at once, and asks nobody.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from shoal.wire.messages import MAX_META_BYTES, AuditHead, Beat, Record, Revocations, Signed, Sync

Number = tuple[int, int]
"""(incarnation, version)"""
Refusal = Literal["malformed", "oversized", "unproven", "forged", "overclaimed", "revoked", "flood"]
"""Why a record or a revocation list was not taken in. unproven: it came without certificates, and none are known;
forged: certificates or signature do not hold; overclaimed: another node, role or label than its certificate says;
flood: the rest of a message that held too many of the others."""

FORGET_S = 600.0
"""How long a dead node's number is remembered. Far longer than a lease (seconds), so that a copy which sat behind a
partition is still recognised as old."""
MAX_NODES = 2000
"""Records of more nodes than this are not taken in, so the digest always fits into one frame."""
MAX_LEASE_S = 30.0
"""A lease counts for no longer, whatever its writer says."""
MAX_RECORD_BYTES = 4096
MAX_CHAIN_BYTES = 8192
MAX_NODE_CHARS = 32
"""A node id is a key fingerprint (spec.ids.NodeId)."""
MAX_REFUSED = 8
"""After so many bad records the rest of a message is not looked at: every check of a signature costs a tenth of a
millisecond, and honest nodes pass nothing on that they have not checked."""
MAX_SHORTENING = 0.5
"""The age of a record comes from whoever passed it on and is not signed. It shortens a lease by this share at most, so
that a liar cannot make a living node flicker."""

_DIGEST_ENTRY_BYTES = 10 + 1 + 9 + 9
_SIGNED_BYTES = 24
"""What msgpack adds to the parts of a Signed, at most."""
_SYNC_BYTES = MAX_META_BYTES - 64
_MAX_COUNT = 2**53
_NEVER: Number = (-1, -1)

_ENCODER = msgspec.msgpack.Encoder()
_RECORDS = msgspec.msgpack.Decoder(Record)
_BEATS = msgspec.msgpack.Decoder(Beat)
_REVOCATIONS = msgspec.msgpack.Decoder(Revocations)
_NEWS = (Record, Beat)
_GREW_AT_S = operator.attrgetter("grew_at_s")
_DAMAGED = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class Writer(Protocol):
    """What a certificate proves about the node that holds it (net.identity.Peer)."""

    @property
    def node(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def labels(self) -> Sequence[str]: ...


class Keys(Protocol):
    """A node's own key, and how it checks what others signed."""

    @property
    def chain(self) -> Sequence[bytes]:
        """Certificates of the own key, DER, the node's first."""

    def sign(self, payload: bytes) -> bytes:
        """The own signature over `payload`."""

    def writer(self, payload: bytes, signature: bytes, chain: Sequence[bytes]) -> Writer | None:
        """Who signed `payload`, according to `chain`; None when the signature or the chain does not hold now."""


@dataclass(slots=True)
class _Entry:
    record: Record
    signed: Signed
    """Without chain and age."""
    beat: Signed | None
    """The latest renewal of its lease; None when the record is newer."""
    chain: tuple[bytes, ...]
    key: bytes
    grew_at_s: float
    """Own clock, when (incarnation, version) last grew; earlier by the age with which it came."""
    dies_at_s: float
    """When its lease ends; never, for the own record."""
    number: Number


def digest_key(node: str) -> bytes:
    """How a digest names a node: 8 bytes instead of 33."""
    return hashlib.sha256(node.encode()).digest()[:8]


class View:
    """The registry as seen by `self_node`. Pure: every method that depends on the time takes `now` (seconds, own
    monotonic clock), and signatures are made and checked by `keys`."""

    def __init__(self, self_node: str, keys: Keys, *, forget_s: float = FORGET_S, max_nodes: int = MAX_NODES) -> None:
        self.self_node = self_node
        self.keys = keys
        self.changes = 0
        """Grows when a node comes, goes or starts anew, or changes its state, span or labels; renewals do not count."""
        self.refused: Counter[Refusal] = Counter()
        """What was not taken in, by cause. Duplicates and old news are no refusals: gossip is full of them."""
        self.revoked: frozenset[str] = frozenset()
        self.revoked_version = 0
        self.revocations: Signed | None = None
        """The list that `revoked` comes from, as its admin signed it."""
        self.rolled_back: dict[str, tuple[AuditHead, AuditHead]] = {}
        """Nodes whose audit log lost entries that they had announced: (where it had been, where it was then). Kept for
        as long as the node is known here; the first time counts."""
        self._audit_heads: dict[str, AuditHead] = {}
        """The furthest end of each node's audit log that was announced."""
        self._forget_s = forget_s
        self._max_nodes = max_nodes
        self._entries: dict[str, _Entry] = {}
        self._numbers: dict[bytes, Number] = {}
        """The digest, kept up to date."""
        self._revoked_keys: frozenset[bytes] = frozenset()
        self._suspects: dict[str, tuple[float, int]] = {}
        """node -> (avoid until, incarnation that failed us)."""
        self._next_sweep_s = 0.0

    # -- writing ----------------------------------------------------------------------------------------------------

    def put(self, record: Record, now: float) -> Record:
        """Sign and publish this node's own record and return it as published: its number is raised when it would not be
        higher than the last one, or than one that others still hold from an earlier life of this node.

        Raises ValueError for a record about another node: those only ever come in through `merge`."""
        if record.node != self.self_node:
            raise ValueError(f"{self.self_node} may not write the record of {record.node}")
        entry = self._entries.get(self.self_node)
        if entry is not None and (record.incarnation, record.version) <= entry.number:
            record = msgspec.structs.replace(record, incarnation=entry.number[0], version=entry.number[1] + 1)
        payload = _ENCODER.encode(record)
        if len(payload) > MAX_RECORD_BYTES or len(record.node) > MAX_NODE_CHARS:
            raise ValueError(f"the record of {record.node} is larger than {MAX_RECORD_BYTES} bytes or its id too long")
        self._store(record, Signed(payload, self.keys.sign(payload)), tuple(self.keys.chain), now, now)
        return record

    def renew(self, now: float) -> None:
        """A new lease for this node's own record, which has not changed. Raises LookupError before the first `put`."""
        entry = self._entries[self.self_node]
        incarnation, version = entry.number
        payload = _ENCODER.encode(Beat(self.self_node, incarnation, entry.record.version, version + 1))
        entry.beat = Signed(payload, self.keys.sign(payload))
        self._grow(entry, (incarnation, version + 1), now)

    def merge(self, records: Iterable[Signed], now: float, beats: Iterable[Signed] = ()) -> list[str]:
        """Take in records and renewals heard from others; returns the nodes of which there was news. What this node
        signed in an earlier life makes us publish a higher number (see `put`)."""
        self._sweep(now)
        changed = []
        refused = 0
        for signed, take in itertools.chain(
            zip(records, itertools.repeat(self._take)), zip(beats, itertools.repeat(self._take_beat))
        ):
            if refused == MAX_REFUSED:
                self.refused["flood"] += 1
                break
            outcome = take(signed, now)
            if isinstance(outcome, _NEWS):
                changed.append(outcome.node)
            elif outcome is not None:
                self.refused[outcome] += 1
                refused += 1
        return changed

    def revoke(self, signed: Signed, *, anew: bool = False) -> bool:
        """Take in a revocation list when an admin signed it and it is newer than the one we have; whether it was. With
        `anew` it may also be the same one signed anew: the certificate of the admin who signed it ends some day."""
        try:
            told = _REVOCATIONS.decode(signed.payload)
        except _DAMAGED:
            self.refused["malformed"] += 1
            return False
        if told.version < self.revoked_version + (not anew):
            return False
        writer = self.keys.writer(signed.payload, signed.signature, signed.chain)
        if writer is None or writer.role != "admin" or writer.node in self.revoked:
            self.refused["forged" if writer is None else "overclaimed"] += 1
            return False
        self.revoked, self.revoked_version, self.revocations = frozenset(told.nodes), told.version, signed
        self._revoked_keys = frozenset(map(digest_key, self.revoked))
        for node in self.revoked & self._entries.keys() - {self.self_node}:
            self._forget(node)
            self.changes += 1
        return True

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

    def is_live(self, node: str, now: float) -> bool:
        """Whether `node` would be among `live`."""
        entry = self._entries.get(node)
        return entry is not None and now < entry.dies_at_s and entry.record.state != "gone"

    def count_live(self, now: float) -> int:
        """How many records `live` would have."""
        return sum(now < entry.dies_at_s and entry.record.state != "gone" for entry in self._entries.values())

    def live(self, now: float) -> list[Record]:
        """Records whose lease has not run out and that have not said "gone", in the order of node ids. Suspected nodes
        are included; see `suspects`."""
        return [
            entry.record
            for _, entry in sorted(self._entries.items())
            if entry.record.state != "gone" and now < entry.dies_at_s
        ]

    def lost(self, now: float) -> list[Record]:
        """Records whose lease ran out without a farewell: their nodes may be dead, or behind a partition."""
        return [
            entry.record
            for _, entry in sorted(self._entries.items())
            if entry.record.state != "gone" and now >= entry.dies_at_s
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

    def digest(self) -> dict[bytes, Number]:
        """The number of every record kept, the expired included: nobody needs to send us those."""
        return dict(self._numbers)

    def newer_than(
        self, digest: Mapping[bytes, Number], now: float, *, peer: str = "", room: int = _SYNC_BYTES
    ) -> tuple[list[Signed], list[Signed], bool]:
        """Records and beats that the writer of `digest` lacks, those that have waited longest first, as many as fit
        into `room` bytes (one at least); and whether there are more.

        Expired records are not spread any further; "gone" ones are, until their lease has run out. Only `peer`, the
        writer of the digest, is shown its own record in any case: when its calendar went back, it learns from it which
        number it must exceed."""
        lacking = [
            entry
            for entry in self._entries.values()
            if (theirs := digest.get(entry.key, _NEVER)) != entry.number
            and entry.number > theirs
            and (now < entry.dies_at_s or entry.record.node == peer)
        ]
        lacking.sort(key=_GREW_AT_S)
        records: list[Signed] = []
        beats: list[Signed] = []
        for entry in lacking:
            incarnation, version = digest.get(entry.key, _NEVER)
            same = incarnation == entry.record.incarnation
            record = None
            if not same or version < entry.record.version:
                record = _aged(entry.signed, () if same else entry.chain, entry, now)
            beat = None if entry.beat is None else _aged(entry.beat, (), entry, now)
            room -= (_bytes(record) if record is not None else 0) + (_bytes(beat) if beat is not None else 0)
            if room < 0 and (records or beats):
                return records, beats, True
            if record is not None:
                records.append(record)
            if beat is not None:
                beats.append(beat)
        return records, beats, False

    def sync(self, now: float, *, tell: bool = False) -> Sync:
        """The first message of a round: what we know, asking for what we lack. With `tell` the own record goes along:
        it has just changed, and need not wait to be asked for."""
        own = self._entries.get(self.self_node) if tell else None
        records = [] if own is None else [_aged(own.signed, own.chain, own, now)]
        return Sync(self.digest(), records, answers=2, revoked_version=self.revoked_version)

    def told(self) -> Sync:
        """The revocation list alone, asking for nothing."""
        return Sync({}, [], 0, revocations=self.revocations, revoked_version=self.revoked_version)

    def on_sync(self, message: Sync, peer: str, now: float) -> list[Sync]:
        """Take in a Sync of `peer` and answer it when it asks for an answer. A round is mostly three messages: `sync`,
        an answer with what the first side lacks, and, when the answering side lacks something too, a last one with
        that. A revocation list travels beside them, and where a message could not hold all, the next round follows."""
        changed = self.merge(message.records, now, message.beats)
        if message.revocations is not None:
            self.revoke(message.revocations)
        answers = []
        if message.answers:
            if message.revoked_version < self.revoked_version:
                answers.append(self.told())
            asks = message.answers == 2 and (
                message.revoked_version > self.revoked_version or self._lacks(message.digest)
            )
            digest = self.digest() if asks else {}
            room = _SYNC_BYTES - _DIGEST_ENTRY_BYTES * len(digest)
            records, beats, more = self.newer_than(message.digest, now, peer=peer, room=room)
            answers.append(
                Sync(digest, records, int(asks), revoked_version=self.revoked_version, more=more, beats=beats)
            )
        if message.more and changed:
            answers.append(self.sync(now))
        return answers

    # -- inside -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _decode_record(payload: bytes) -> Record:
        return _RECORDS.decode(payload)

    @staticmethod
    def _decode_beat(payload: bytes) -> Beat:
        return _BEATS.decode(payload)

    def _take(self, signed: Signed, now: float) -> Record | Refusal | None:
        """The record when it was news, why it was refused, or None for old news."""
        if len(signed.payload) > MAX_RECORD_BYTES or sum(map(len, signed.chain)) > MAX_CHAIN_BYTES:
            return "oversized"
        try:
            record = self._decode_record(signed.payload)
        except _DAMAGED:
            return "malformed"
        if len(record.node) > MAX_NODE_CHARS:
            return "oversized"
        entry = self._entries.get(record.node)
        number = (record.incarnation, record.version)
        # Before the signature is checked: most of what is refused here is old news, and a check costs 0.1 ms.
        if entry is not None and number <= entry.number:
            return None
        if record.node in self.revoked:
            return "revoked"
        chain = tuple(signed.chain) or (entry.chain if entry is not None else ())
        if not chain:
            return "unproven"
        writer = self.keys.writer(signed.payload, signed.signature, chain)
        if writer is None:
            return "forged"
        if (writer.node, writer.role) != (record.node, record.role) or not set(record.labels) <= set(writer.labels):
            return "overclaimed"
        if record.node == self.self_node:
            self._outnumber(number, now)
            return None
        if entry is None and len(self._entries) >= self._max_nodes and not self._make_room(now):
            return None
        self._store(record, Signed(signed.payload, signed.signature), chain, _grew_at_s(signed, record, now), now)
        return record

    def _take_beat(self, signed: Signed, now: float) -> Beat | Refusal | None:
        """The same for a renewal."""
        try:
            beat = self._decode_beat(signed.payload)
        except _DAMAGED:
            return "malformed"
        entry = self._entries.get(beat.node)
        number = (beat.incarnation, beat.version)
        if entry is None or number <= entry.number:
            return None
        own = beat.node == self.self_node
        if not own and (beat.incarnation, beat.base) != (entry.record.incarnation, entry.record.version):
            return None  # of a record that we lack: our next digest asks for both
        writer = self.keys.writer(signed.payload, signed.signature, entry.chain)
        if writer is None or writer.node != beat.node:
            return "forged"
        if own:
            self._outnumber(number, now)
            return None
        if now >= entry.dies_at_s:
            self.changes += 1
        entry.beat = Signed(signed.payload, signed.signature)
        self._grow(entry, number, _grew_at_s(signed, entry.record, now))
        return beat

    def _store(self, record: Record, signed: Signed, chain: tuple[bytes, ...], grew_at_s: float, now: float) -> None:
        old = self._entries.get(record.node)
        if old is None or now >= old.dies_at_s or _shape(old.record) != _shape(record):
            self.changes += 1
        key = old.key if old is not None else digest_key(record.node)
        number = (record.incarnation, record.version)
        entry = self._entries[record.node] = _Entry(record, signed, None, chain, key, 0.0, 0.0, number)
        self._grow(entry, number, grew_at_s)
        self._compare_audit(record)

    def _grow(self, entry: _Entry, number: Number, grew_at_s: float) -> None:
        """A new number, and a new lease with it."""
        entry.grew_at_s = grew_at_s
        entry.dies_at_s = math.inf if entry.record.node == self.self_node else grew_at_s + _lease_s(entry.record)
        entry.number = self._numbers[entry.key] = number

    def _compare_audit(self, record: Record) -> None:
        """A log only grows, and its writer's records come in their order, so an earlier end is a lost one."""
        head, furthest = record.audit, self._audit_heads.get(record.node)
        if head is None:
            return
        if furthest is None or head.seq > furthest.seq:
            self._audit_heads[record.node] = head
        elif head != furthest:
            self.rolled_back.setdefault(record.node, (furthest, head))

    def _forget(self, node: str) -> None:
        del self._numbers[self._entries.pop(node).key]
        self._audit_heads.pop(node, None)
        self.rolled_back.pop(node, None)

    def _outnumber(self, number: Number, now: float) -> None:
        """Others hold a record from an earlier life of this node (its calendar went back, say): publish a higher
        number, or nobody would ever believe us again."""
        own = self._entries.get(self.self_node)
        if own is not None and own.number < number and number[0] < _MAX_COUNT:
            self.put(msgspec.structs.replace(own.record, incarnation=number[0] + 1, version=0), now)

    def _lacks(self, digest: Mapping[bytes, Number]) -> bool:
        numbers, revoked = self._numbers, self._revoked_keys
        return any(number > numbers.get(key, _NEVER) and key not in revoked for key, number in digest.items())

    def _make_room(self, now: float) -> bool:
        """Forget the node that has been dead for longest; whether there was one."""
        dead = [entry for entry in self._entries.values() if now >= entry.dies_at_s]
        if dead:
            self._forget(min(dead, key=lambda entry: (entry.dies_at_s, entry.record.node)).record.node)
        return bool(dead)

    def _sweep(self, now: float) -> None:
        """Forget what has been dead for long. Once in a while is enough: it only bounds memory."""
        if now < self._next_sweep_s:
            return
        self._next_sweep_s = now + self._forget_s / 16
        for node, entry in list(self._entries.items()):
            if now >= entry.dies_at_s + self._forget_s:
                self._forget(node)
        self.suspects(now)


def _lease_s(record: Record) -> float:
    return min(record.lease_s, MAX_LEASE_S)


def _grew_at_s(signed: Signed, record: Record, now: float) -> float:
    """When the record grew, according to the age with which it came."""
    return now - min(signed.age_ms / 1e3, MAX_SHORTENING * _lease_s(record))


def _aged(signed: Signed, chain: Sequence[bytes], entry: _Entry, now: float) -> Signed:
    return Signed(signed.payload, signed.signature, list(chain), round(1e3 * max(0.0, now - entry.grew_at_s)))


def _bytes(signed: Signed) -> int:
    return len(signed.payload) + len(signed.signature) + sum(map(len, signed.chain)) + _SIGNED_BYTES


def _shape(record: Record) -> tuple[object, ...]:
    """What of a record matters to those who wait for servers: not every renewal of a lease is a change."""
    return (record.state, record.span, record.labels, record.incarnation)
