"""The audit log of one swarm directory: who writes it, and against which root it is checked."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shoal.errors import PeerLost, Refused, ShoalError, UsageError
from shoal.manifest.chain import AuditLog, Check, Head
from shoal.net.directory import Signatures
from shoal.net.home import Home
from shoal.net.identity import Credential, NodeIdentity, Trust
from shoal.net.tls import TlsTransport
from shoal.wire.messages import Record, Sync

MEMBERS_ASKED = 64
"""How many members are asked what they remember."""
_RECORDS = msgspec.msgpack.Decoder(Record)


def audit_log(home: Home, identity: NodeIdentity, *, now: Callable[[], NodeIdentity] | None = None) -> AuditLog:
    """The log of this home, to be continued by `identity`; `now` is the same node as it was renewed so far. Raises
    AuditBroken when it is not what was written."""
    renewed = None if now is None else lambda: now().chain_der
    return AuditLog(home.path, identity.sign, identity.peer.node, identity.chain_der, renewed=renewed)


def own_nodes(home: Home) -> dict[str, str]:
    """The ids of the nodes that this home has keys of, and their names."""
    found: dict[str, str] = {}
    for path in sorted((home.path / "nodes").glob("*/node.pem")):
        found[home.node(path.parent.name).peer.node] = path.parent.name
    return found


def root_pem(home: Home, given: Path | None = None) -> bytes:
    """The root's certificate: in the file `given`, else the one in this home. Raises UsageError when there is none."""
    places = [given] if given else [home.ca_dir / "ca.pem", *sorted((home.path / "nodes").glob("*/ca.pem"))]
    for place in places:
        try:
            return place.read_bytes()
        except OSError:
            continue
    raise UsageError(
        f"There is no certificate of the swarm's root in {given or home.path}.", hint="Give it with --ca ca.pem."
    )


def certificates_of(root: bytes) -> Check:
    """Accepts the certificates that this root (PEM) has signed, as of the moment they were shown."""
    trust = Trust(root)

    def check(chain: Sequence[bytes], at: float, node: str) -> Credential:
        credential = trust.credential(chain, datetime.datetime.fromtimestamp(at, datetime.UTC))
        if credential.peer.node != node:
            raise Refused(f"These are the certificates of {credential.peer.node}.")
        return credential

    return check


@dataclass(frozen=True, slots=True)
class Told:
    """What one member of the swarm says about where a log of this home stood."""

    member: str
    node: str
    """The node of this home whose signed record it is."""
    head: Head


async def heads_told(home: Home, *, timeout_s: float = 3.0) -> list[Told]:
    """What the members of the swarm that can be reached remember of this home's log: the signed records of its nodes.

    Raises UsageError when this home has no certificate, PeerLost when no seed answers."""
    own = own_nodes(home)
    name = next((name for name in ("admin", *own.values()) if home.has_node(name)), None)
    if name is None:
        raise UsageError(f"{home.path} has no node's certificate.", hint="Run this on a machine of the swarm.")
    identity = home.node(name)
    transport, signatures = TlsTransport(identity), Signatures(identity)
    told: list[Told] = []
    asked: set[str] = set()
    failures: list[str] = []
    waiting: list[list[str]] = [[seed] for seed in home.read().seeds]
    while waiting and len(asked) < MEMBERS_ASKED:
        addresses = waiting.pop(0)
        try:
            async with asyncio.timeout(timeout_s):
                member, records = await _ask(transport, signatures, addresses)
        except (ShoalError, TimeoutError) as error:
            failures.append(str(error) or f"{addresses[0]} does not answer")
            continue
        if member in asked:
            continue
        asked.add(member)
        for record in records:
            if record.node in own and record.audit is not None:
                told.append(Told(member, record.node, Head(record.audit.seq, record.audit.hash)))
            if record.node not in asked and record.node != identity.peer.node and record.addresses:
                waiting.append(list(record.addresses))
    if not asked:
        raise PeerLost(
            f"No member of the swarm can be asked: {failures[0] if failures else 'this home knows no seed'}.",
            hint="Start the swarm, or verify without --swarm.",
        )
    return told


async def _ask(transport: TlsTransport, signatures: Signatures, addresses: Sequence[str]) -> tuple[str, list[Record]]:
    """(who answered, the records it has)."""
    conn = await transport.dial(list(addresses))
    try:
        await conn.send(Sync({}, [], answers=1))
        records: list[Record] = []
        while True:
            message, _ = await conn.receive()
            if not isinstance(message, Sync) or message.revocations is not None:
                continue
            for signed in message.records:
                writer = signatures.writer(signed.payload, signed.signature, signed.chain)
                record = None if writer is None else _record(signed.payload)
                if record is not None and writer is not None and record.node == writer.node:
                    records.append(record)
            return conn.peer.node, records
    finally:
        await conn.close()


def _record(payload: bytes) -> Record | None:
    """The record that somebody signed; None for whatever else it is."""
    try:
        return _RECORDS.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
