"""Admission while the swarm runs: takes joins, renews certificates, and tells who was removed.

It runs in any process whose home holds the issuing authority: `shoal admin`, or the gateway of `shoal up`. The commands
`shoal invite` and `shoal revoke` only write the admin's records; this looks at them once a second.

Nothing waits for it: when it dies, nobody can join and no certificate is renewed until it is back, and the sessions of
the swarm go on.
"""

from __future__ import annotations

import asyncio
import datetime
import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography import x509

from shoal.admin.joining import JoinListener
from shoal.admin.limits import Attempts
from shoal.admin.own import can_last_longer, reissued
from shoal.admin.store import AdminStore
from shoal.errors import Full, Refused, ShoalError, UsageError
from shoal.manifest.canonical import Json
from shoal.net.auditing import audit_log
from shoal.net.home import RENEW_ISSUER_BELOW, Home, SwarmFile
from shoal.net.identity import (
    NODE_LIFETIME,
    NodeIdentity,
    Peer,
    certify,
    ders_of,
    key_of_certificate,
    key_of_request,
    peer_of_pem,
)
from shoal.net.renewal import renewal_due
from shoal.net.transport import Address, Conn
from shoal.wire.enrolment import Answer, AskRoot, Enrol, Enrolled, Question, Rejected, Root
from shoal.wire.messages import Revocations, Signed

LOOK_EVERY_S = 1.0
ISSUER_EVERY_S = 60.0
NOT_ACCEPTED = "The token is not accepted: it is unknown, used up, expired, or for another role."
_TOO_OFTEN = "Too many tokens from this address were refused lately: wait a minute."
_NOT_NOW = "The admin cannot admit anybody now; its own log says why."
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class AlreadyAdmin(UsageError):
    """Another process is this swarm's admin now."""

    @classmethod
    def of(cls, home: Home) -> AlreadyAdmin:
        return cls(
            f"Another process takes the joins of the swarm in {home.path} already.",
            hint="One `shoal admin`, or one gateway on the admin's machine, is enough.",
        )


class AdminService:
    """Use as an async context manager: entering opens the join listener, leaving closes it."""

    def __init__(
        self,
        home: Home,
        *,
        listen: Address,
        advertise: str | None = None,
        seeds: Callable[[], Sequence[str]] = list,
        on_revoked: Callable[[Signed], object] = lambda signed: None,
        on_renewed: Callable[[NodeIdentity], None] = lambda admin: None,
        lifetime: datetime.timedelta = NODE_LIFETIME,
        failures: Attempts | None = None,
        connections: Attempts | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`advertise`: the host under which others reach this machine (default: the one listened on). `seeds`: where
        the swarm is met now, which new members are told. on_revoked(signed) gets every list of removed nodes to spread,
        the first one at the start; on_renewed(identity) that the admin's own certificate is a new one."""
        self.home = home
        self._listen = listen
        self._advertise = advertise
        self._seeds = seeds
        self._on_revoked = on_revoked
        self._on_renewed = on_renewed
        self._lifetime = lifetime
        self._failures = failures or Attempts(burst=10, every_s=6.0)
        self._connections = connections or Attempts(burst=60, every_s=0.5)
        self._renewals = Attempts(burst=10, every_s=10.0)
        self._clock = clock
        self._issuer = home.issuer()
        (self._root_der,) = ders_of(home.root_pem)
        self._admin = home.node("admin")
        self._context = self._admin.enrolment_context()
        self._store = AdminStore(home.admin_db)
        self._log_book = audit_log(home, self._admin)
        # SQLite waits for the disk: not on the loop that carries other people's sessions.
        self._records = ThreadPoolExecutor(1, thread_name_prefix="admin records")
        self._revoked_version = 0
        self._issuer_looked_at = self._reminded_at = 0.0
        self._lock: int | None = None
        self._listener: JoinListener | None = None
        self._looking: asyncio.Task[None] | None = None

    @property
    def join_address(self) -> str:
        """Where others reach the join listener."""
        if self._listener is None:
            raise RuntimeError("the service has not been entered")
        taken = self._listener.address
        return str(Address(self._advertise or taken.host, taken.port))

    @property
    def admin(self) -> NodeIdentity:
        """The admin's own identity, as renewed so far."""
        return self._admin

    async def __aenter__(self) -> AdminService:
        self._lock = _locked(self.home.path / "admin.lock")
        try:
            return await self._start()
        except BaseException:
            await self.__aexit__()
            raise

    async def _start(self) -> AdminService:
        await self._record(lambda: self._store.retell(now=self._clock()))
        await self._look()
        self._listener = await JoinListener.start(
            self._listen, lambda: self._context, self._answer, connections=self._connections
        )
        self._write_seeds()
        self._looking = asyncio.create_task(self._keep_looking())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._listener is not None:
            await self._listener.close()
        self._records.shutdown()
        self._store.close()
        if self._lock is not None:
            os.close(self._lock)

    # Joins

    async def _answer(self, question: Question, address: str) -> Answer:
        if isinstance(question, AskRoot):
            return Root(self._root_der)
        now = time.monotonic()
        wait_s = self._failures.wait_s(address, now)
        if wait_s > 0:
            return Rejected(_TOO_OFTEN, wait_s)
        try:
            return await self._enrol(question, address)
        except Refused as error:
            self._failures.charge(address, now)
            _log.warning("a token from %s was refused", address)
            return Rejected(str(error))
        except ShoalError as error:
            _log.error("nobody can join: %s", error)
            return Rejected(_NOT_NOW, 60.0)

    async def _enrol(self, asked: Enrol, address: str) -> Enrolled:
        """A certificate for the key of the request, with the role and the labels of the invite."""
        try:
            key = key_of_request(asked.request)
        except Refused:
            raise Refused(NOT_ACCEPTED) from None
        now = self._clock()
        # Before the token is spent: an authority that has expired costs no token.
        self._issuer.check_valid()
        invite = await self._record(lambda: self._store.redeem(asked.secret, asked.role, now=now))
        if invite is None:
            raise Refused(NOT_ACCEPTED)
        cert_pem = certify(self._issuer, invite.role, key, labels=invite.labels, lifetime=self._lifetime)
        peer = await self._remember(cert_pem)
        # No entry, no member: nobody comes in unseen.
        await self._audit("member.join", peer, address=address)
        _log.info("%s joined from %s", peer, address)
        return Enrolled(list(ders_of(cert_pem)), self._issuer.swarm, list(self._seeds()))

    # Renewals

    async def renew(self, conn: Conn) -> list[bytes]:
        """A new certificate (a chain of DER) for the node at the other end: same key, role and labels. Raises Refused
        for a removed node or an expired certificate, Full when it asks too often."""
        peer, now = conn.peer, self._clock()
        ends = x509.load_der_x509_certificate(conn.certificate).not_valid_after_utc.timestamp()
        if ends < now:
            raise Refused("The certificate of this connection has expired meanwhile.")
        wait_s = self._renewals.wait_s(peer.node, time.monotonic())
        if wait_s > 0:
            raise Full("Certificates are renewed too often.", retry_after_s=wait_s)
        self._renewals.charge(peer.node, time.monotonic())
        if await self._record(lambda: self._store.is_revoked(peer.node)):
            raise Refused("This node was removed from the swarm.")
        key = key_of_certificate(conn.certificate)
        cert_pem = certify(self._issuer, peer.role, key, labels=peer.labels, lifetime=self._lifetime)
        await self._remember(cert_pem)
        try:
            await self._audit("member.renew", peer)
        except ShoalError as error:
            # It gives nobody a right that is new; a broken log must not wither the swarm.
            _log.error("a renewal is not in the audit log: %s", error)
        _log.info("the certificate of %s was renewed", peer)
        return list(ders_of(cert_pem))

    async def renew_own(self, identity: NodeIdentity) -> NodeIdentity:
        """`identity` with a new certificate: for a node that runs in the same process as the issuing authority."""
        identity = reissued(self._issuer, identity, lifetime=self._lifetime)
        await self._remember(identity.cert_pem)
        return identity

    # The look at the records, once a second

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._look()
            except (ShoalError, OSError) as error:
                _log.error("%s", error)

    async def _look(self) -> None:
        now = self._clock()
        try:
            await self._stay_valid(now)
        finally:
            # Whatever keeps the admin from renewing itself (a full disk, say) must keep nobody in.
            await self._tell_revocations()

    async def _stay_valid(self, now: float) -> None:
        if now >= self._issuer_looked_at + ISSUER_EVERY_S or now < self._issuer_looked_at:
            self._issuer_looked_at = now
            if self.home.renew_issuer(datetime.datetime.fromtimestamp(now, datetime.UTC)):
                _log.info("the root has signed the issuing authority anew")
            self._issuer = self.home.issuer()
            self._remind(now)
            if self._listener is not None:
                self._write_seeds()
        if now >= renewal_due(self._admin) and can_last_longer(self._issuer, self._admin):
            self._admin = await self.renew_own(self._admin)
            self._context = self._admin.enrolment_context()
            self.home.save_node("admin", self._admin)
            self._log_book = audit_log(self.home, self._admin)
            self._on_renewed(self._admin)
            await self._record(lambda: self._store.retell(now=now))

    async def _tell_revocations(self) -> None:
        version, nodes = await self._record(self._store.revocations)
        if version > self._revoked_version:
            self._revoked_version = version
            self._on_revoked(self._signed(Revocations(version, list(nodes))))

    def _signed(self, revocations: Revocations) -> Signed:
        payload = msgspec.msgpack.encode(revocations)
        return Signed(payload, self._admin.sign(payload), list(self._admin.chain_der))

    def _remind(self, now: float) -> None:
        """Say once a day that the root is needed soon."""
        left_s = self._issuer.not_after.timestamp() - now
        if left_s < RENEW_ISSUER_BELOW.total_seconds() and now >= self._reminded_at + 86_400:
            self._reminded_at = now
            _log.warning(
                "the issuing authority ends in %.0f days: put the root's key back into %s for a minute",
                left_s / 86_400,
                self.home.ca_dir,
            )

    def _write_seeds(self) -> None:
        """So that the swarm is found again when this process starts anew, perhaps at another address."""
        file = SwarmFile(self._issuer.swarm, list(self._seeds()), self.join_address)
        if file != self.home.read():
            self.home.write(file)

    async def _remember(self, cert_pem: bytes) -> Peer:
        """Note an issued certificate; whom it is of."""
        peer, until = peer_of_pem(cert_pem), x509.load_pem_x509_certificate(cert_pem).not_valid_after_utc.timestamp()
        await self._record(lambda: self._store.certified(peer, until, now=self._clock()))
        return peer

    async def _audit(self, kind: str, peer: Peer, **fields: str) -> None:
        """Write an entry of the home's audit log; it is on the disk afterwards."""
        entry: dict[str, Json] = {"labels": list(peer.labels), "node": peer.node, "role": peer.role, **fields}
        await self._record(lambda: self._log_book.append(kind, **entry))

    async def _record(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._records, work)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock on `path` until it is closed, also by the end of the process. Raises
    AlreadyAdmin when another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise AlreadyAdmin.of(Home(path.parent)) from None
    return descriptor
