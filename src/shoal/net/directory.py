"""Keeps a node's view of the swarm fresh by talking to others: push-pull gossip on the swarm's own port.

Every node signs its own record and renews its lease. `rounds` syncs with others over a few connections that it keeps.
The decisions (what wins, what is dead, whom to ask) are in swarm/view.py and swarm/gossip.py.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import random
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from shoal.errors import Refused
from shoal.net.identity import Credential, NodeIdentity, Peer, Trust
from shoal.net.link import Link
from shoal.net.transport import Transport
from shoal.swarm import gossip
from shoal.swarm.view import View
from shoal.wire.messages import Message, Record, Revocations, Signed, Sync

log = logging.getLogger("shoal.net")

LEASE_S = gossip.SMALL.lease_s
"""What a record is made with; in a larger swarm `publish` writes another one."""

REFUSALS = 3
"""Refused this often in a row, by every seed, a node is no part of the swarm. Not once: a seed that is just being
stopped may hang up before its greeting, which looks the same."""
IDLE_LINK_S = 5.0
"""A link that is no longer wanted stays for this long after it was made: the answer may be under way."""
RTT_MEMORY_S = 600.0
"""How long a measured round trip is told after its connection was given up."""
WARN_EVERY_S = 60.0
"""Whoever brings bad records brings many."""
_CREDENTIALS = 4096
_LOAD_FIELDS = frozenset(
    {
        *("decode_ms_per_block", "prefill_ms_per_block_token", "cache_tokens_free", "queue_rows", "sessions"),
        *("wire_error", "busy", "threads", "audit", "rtts"),
    }
)
"""Fields that change all the time: they are told every `Pace.load_s` at most. A change of any other is told at once."""


class Signatures:
    """Signs with a node's key, and checks what others signed against the swarm's root (see swarm.view.Keys)."""

    def __init__(self, identity: NodeIdentity) -> None:
        self._identity = identity
        self._trust = Trust(identity.ca_pem)
        self._credentials: dict[tuple[bytes, ...], Credential] = {}
        """Chains that were checked. What a certificate proves does not change, only its end comes."""

    @property
    def identity(self) -> NodeIdentity:
        return self._identity

    @property
    def chain(self) -> Sequence[bytes]:
        return self._identity.chain_der

    def sign(self, payload: bytes) -> bytes:
        return self._identity.sign(payload)

    def writer(self, payload: bytes, signature: bytes, chain: Sequence[bytes]) -> Peer | None:
        """Who signed `payload`, when certificates and signature hold."""
        credential = self._credential(tuple(chain))
        return credential.peer if credential is not None and credential.verify(payload, signature) else None

    def _credential(self, chain: tuple[bytes, ...]) -> Credential | None:
        known = self._credentials.get(chain)
        now = datetime.datetime.now(datetime.UTC)
        if known is not None and now.timestamp() < known.not_after:
            return known
        try:
            credential = self._trust.credential(chain, now)
        except Refused:
            return None
        if len(self._credentials) >= _CREDENTIALS:
            del self._credentials[next(iter(self._credentials))]
        self._credentials[chain] = credential
        return credential


class Directory:
    """The registry copy of one node. `record` is this node's own (None for nodes that only look)."""

    def __init__(
        self,
        identity: NodeIdentity,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_revoked: Callable[[frozenset[str]], None] = lambda nodes: None,
    ) -> None:
        """`on_change` is called when a node comes, goes, or changes its state or span; `on_revoked` with all nodes that
        are revoked when the list has changed, after the transport of `rounds` has cut them off."""
        self.node = identity.peer.node
        self.view = View(self.node, Signatures(identity))
        self.record: Record | None = None
        self.rtts_ms: dict[str, float] = {}
        """Latest measured round trip to each node, also of connections given up lately."""
        self._measured_at_s: dict[str, float] = {}
        self._on_change = on_change
        self._on_revoked = on_revoked
        self.pace = gossip.SMALL
        """How often this node speaks: as of the last round, from the number of nodes that lived."""
        self._transport: Transport | None = None
        self._refused = 0
        """Refusals that a warning was written about."""
        self._warned_at_s = -WARN_EVERY_S
        self._wake = asyncio.Event()
        """A round begins when it is set, and not only when its time has come."""
        self._push = False
        """The next round brings the own record along unasked."""
        self._waiting: dict[str, object] = {}
        """Fields of the own record that wait for the next renewal."""
        self._told_at_s = 0.0
        """When the own record was signed last."""
        self._renewed_at_s = 0.0
        """The same, or when its lease was renewed last."""
        # Only partners of gossip are drawn with it; nothing secret hangs on it.
        self._rng = random.Random(secrets.randbits(64))

    @staticmethod
    def incarnation() -> int:
        """Grows with every start of the process, without a file to keep it in. Whole seconds, because every digest
        carries it for every node; a second start within one is heard of and outnumbered."""
        return int(time.time())

    def publish(self, record: Record) -> None:
        """Set this node's own record; others hear of it at once."""
        self._put(record)
        self._push = True
        self._wake.set()

    def update(self, **fields: object) -> None:
        """Publish the own record with some fields changed: at once, or, when only figures of load did, as soon as it is
        their turn."""
        if self.record is None:
            raise ValueError("nothing was published yet")
        changed = {name: value for name, value in fields.items() if getattr(self.record, name) != value}
        for name in fields.keys() - changed.keys():
            self._waiting.pop(name, None)  # as it was told, after a detour
        self._waiting.update(changed)
        urgent = bool(changed.keys() - _LOAD_FIELDS)
        if urgent or (changed and self._load_is_due()):
            self._tell()
            self._push |= urgent
            self._wake.set()

    def renewed(self, identity: NodeIdentity) -> None:
        """Sign with a renewed certificate of this node from now on."""
        if identity.peer.node != self.node:
            raise ValueError(f"{identity} is another node than {self.node}")
        self.view.keys = Signatures(identity)
        if self.record is not None:
            # A higher incarnation makes everybody take the new certificate along with the record.
            incarnation = max(Directory.incarnation(), self.record.incarnation + 1)
            labels = list(identity.peer.labels)
            self.publish(msgspec.structs.replace(self.record, incarnation=incarnation, version=0, labels=labels))

    def live(self) -> list[Record]:
        return self.view.live(time.monotonic())

    def measured(self, node: str, rtt_ms: float) -> None:
        """A connection of this node measured its round trip to `node`; the record tells others."""
        self.rtts_ms[node] = rtt_ms
        self._measured_at_s[node] = time.monotonic()

    def revoke(self, signed: Signed) -> bool:
        """Take in a revocation list; whether it was newer than ours and an admin's."""
        before = self.view.changes
        if not self.view.revoke(signed):
            return False
        self._cut_off()
        if self.view.changes != before:
            self._on_change()
        return True

    def revoke_as(self, admin: NodeIdentity, version: int, nodes: Sequence[str]) -> bool:
        """Sign a revocation list as `admin`, act on it and pass it on; whether it was news. Version 0 is no list."""
        if version == 0:
            return False
        payload = msgspec.msgpack.encode(Revocations(version, sorted(nodes)))
        signed = Signed(payload, admin.sign(payload), list(admin.chain_der))
        if version == self.view.revoked_version:
            self.view.revoke(signed, anew=True)
            return False
        return self.revoke(signed)

    def on_sync(self, message: Sync, peer: str) -> list[Sync]:
        """Merge what `peer` sent; the answers to send back."""
        before = self.view.changes, self.view.revoked_version
        known = len(self.view.rolled_back)
        answers = self.view.on_sync(message, peer, time.monotonic())
        self._warn_of_refusals(peer)
        if len(self.view.rolled_back) > known:
            self._warn_of_rollback()
        own = self.view.get(self.node)
        if self.record is not None and own is not None and own is not self.record:
            self.record = own  # an earlier life of ours was heard of, and outnumbered
            self._push = True
            self._wake.set()
        if self.view.revoked_version != before[1]:
            self._cut_off()
        if self.view.changes != before[0]:
            self._on_change()
        return answers

    def _warn_of_refusals(self, peer: str) -> None:
        refused = self.view.refused
        now = time.monotonic()
        if refused.total() > self._refused and now >= self._warned_at_s + WARN_EVERY_S:
            causes = ", ".join(f"{cause} {count}" for cause, count in sorted(refused.items()))
            log.warning("records were refused, the latest brought by %s; so far: %s", peer[:8], causes)
            self._refused, self._warned_at_s = refused.total(), now

    def _warn_of_rollback(self) -> None:
        node, (was, now) = list(self.view.rolled_back.items())[-1]
        log.warning(
            "the audit log of %s was rolled back or replaced: it was at entry %d (%s), then at %d (%s)",
            *(node, was.seq, was.hash.hex()[:16], now.seq, now.hash.hex()[:16]),
        )

    def _cut_off(self) -> None:
        if self._transport is not None:
            self._transport.refuse(self.view.revoked)
        self._on_revoked(self.view.revoked)

    def _put(self, record: Record) -> None:
        now = time.monotonic()
        self.record = self.view.put(record, now)
        self._told_at_s = self._renewed_at_s = now

    def _tell(self) -> None:
        """Publish the own record with what has changed, and a new lease."""
        assert self.record is not None
        fields, self._waiting = self._waiting, {}
        fields |= {"lease_s": self.pace.lease_s, "rtts": self._rtts(self.pace.rtts)}
        self._put(msgspec.structs.replace(self.record, **fields))

    def _renew(self) -> None:
        """A new lease, and the record anew when others should know what has changed."""
        assert self.record is not None
        told = dict(self.record.rtts)
        if (
            self.record.lease_s != self.pace.lease_s
            or (self._waiting and self._load_is_due())
            or any(_differ(rtt_ms, told.get(node)) for node, rtt_ms in self._rtts(self.pace.rtts))
        ):
            self._tell()
        else:
            self._renewed_at_s = time.monotonic()
            self.view.renew(self._renewed_at_s)

    def _load_is_due(self) -> bool:
        return time.monotonic() - self._told_at_s >= self.pace.load_s

    def _rtts(self, count: int) -> list[tuple[str, float]]:
        """The shortest round trips that were measured lately."""
        horizon = time.monotonic() - RTT_MEMORY_S
        for node in [node for node, at_s in self._measured_at_s.items() if at_s < horizon]:
            del self._measured_at_s[node], self.rtts_ms[node]
        nearest = sorted(self.rtts_ms.items(), key=lambda item: (item[1], item[0]))[:count]
        return sorted((node, round(rtt_ms, 2)) for node, rtt_ms in nearest)

    async def rounds(
        self,
        transport: Transport,
        seeds: Sequence[str] = (),
        on_message: Callable[[str, Message, memoryview], None] = lambda node, message, body: None,
    ) -> None:
        """Sync with others for ever, beginning at the seeds (addresses "tcp://host:port"), and renew the own lease. A
        lost seed is dialled again each round, since nothing else depends on it.

        Messages other than Sync that a seed sends (Assign) go to on_message(seed, message, body). Raises Refused when
        no seed lets this node in: its certificate or its protocol version is not theirs.
        """
        self._transport = transport
        transport.refuse(self.view.revoked)
        rounds = _Rounds(self, transport, seeds, on_message)
        try:
            while True:
                rounds.check_admitted()
                self._wake.clear()
                push, self._push = self._push, False
                rounds.sync(tell=push)
                await self._until_next_round()
        finally:
            await rounds.close()

    async def _until_next_round(self) -> None:
        pace = self.pace
        try:
            async with asyncio.timeout(pace.round_s * self._rng.uniform(0.9, 1.1)):
                await self._wake.wait()
        except TimeoutError:
            # A little early rather than a whole round late.
            due_s = self._renewed_at_s + pace.renew_s - 0.5 * pace.round_s
            if self.record is not None and time.monotonic() > due_s:
                self._renew()


def _differ(rtt_ms: float, told_ms: float | None) -> bool:
    """Is it worth a new record?"""
    return told_ms is None or abs(rtt_ms - told_ms) > max(1.0, 0.3 * told_ms)


class _Rounds:
    """The links of a Directory while it makes rounds."""

    def __init__(
        self,
        directory: Directory,
        transport: Transport,
        seeds: Sequence[str],
        on_message: Callable[[str, Message, memoryview], None],
    ) -> None:
        self._directory = directory
        self._transport = transport
        self._seeds = list(dict.fromkeys(seeds))
        self._on_message = on_message
        self._mesh = gossip.Mesh(directory.node, self._seeds)
        self._links: dict[str, Link] = {}
        self._targets: dict[str, gossip.Target] = {}
        self._made_at_s: dict[str, float] = {}
        self._refusals: dict[str, list[str]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def check_admitted(self) -> None:
        """Raises Refused when no seed lets us in."""
        refusals = [self._refusals.get(seed, []) for seed in self._seeds]
        if refusals and all(len(texts) >= REFUSALS for texts in refusals):
            raise Refused(
                f"This node is not let into the swarm at {', '.join(self._seeds)}: {refusals[0][-1]}",
                hint="Its certificate must be of that swarm, and its version of shoal the same.",
            )

    def sync(self, *, tell: bool) -> None:
        """Begin one round, and hang up on whom the mesh keeps no longer. With `tell` the own record goes along."""
        directory = self._directory
        self._measure()
        partners = self._mesh.round(
            directory.view, time.monotonic(), directory._rng, measured=directory._measured_at_s.keys()
        )
        directory.pace = self._mesh.pace
        keep = {target.name for target in (*partners, *self._mesh.kept)}
        now = time.monotonic()
        for name in self._links.keys() - keep:
            if not self._links[name].lost and now < self._made_at_s[name] + IDLE_LINK_S:
                continue
            del self._made_at_s[name]
            self._targets.pop(name, None)
            task = asyncio.create_task(self._links.pop(name).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        opening = directory.view.sync(time.monotonic(), tell=tell)
        for target in partners:
            self._link(target).send(opening)
        for target in self._mesh.kept:
            self._link(target)  # dialled before its turn comes: its round trip is known, and its first sync is not late

    async def close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links.values()), *self._closing)

    def _link(self, target: gossip.Target) -> Link:
        link = self._links.get(target.name)
        if link is None or link.lost:
            self._targets[target.name] = target
            self._made_at_s[target.name] = time.monotonic()
            link = self._links[target.name] = Link(
                self._transport,
                target.name,
                target.addresses,
                on_message=self._heard,
                on_lost=self._lost,
                expect_node=bool(target.node),
            )
        return link

    def _measure(self) -> None:
        for link in self._links.values():
            if link.peer is not None and link.rtt_s is not None and not link.lost:
                self._directory.measured(link.peer.node, link.rtt_s * 1e3)

    def _heard(self, name: str, message: Message, body: memoryview) -> None:
        self._refusals.pop(name, None)
        link = self._links.get(name)
        if isinstance(message, Sync):
            if link is not None and link.peer is not None:
                before = self._directory.view.revoked_version
                for answer in self._directory.on_sync(message, link.peer.node):
                    link.send(answer)
                if self._directory.view.revoked_version != before:
                    self._pass_on_revocations(name)
        elif name in self._seeds:
            self._on_message(name, message, body)

    def _pass_on_revocations(self, source: str) -> None:
        """Not with the next round: a node that was thrown out may do harm meanwhile."""
        told = self._directory.view.told()
        for name, link in self._links.items():
            if name != source:
                link.send(told)

    def _lost(self, name: str, cause: str, text: str) -> None:
        if cause == Refused.code and name in self._seeds:
            self._refusals.setdefault(name, []).append(text)
        target = self._targets.pop(name, None)
        if target is not None:
            self._mesh.failed(target.node, time.monotonic())
