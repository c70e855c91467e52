"""Entering a swarm with a token: what `shoal join` does before it is a member.

The token names the root by its fingerprint. A first connection fetches the root's certificate from anybody who has it;
the second one trusts that root alone, and only there, to an admin of that swarm, is the secret said. Whoever stands
between the two machines learns neither the secret nor gets a certificate.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from shoal.errors import PeerLost, ProtocolError, Refused, ShoalError, UsageError
from shoal.manifest.files import write_private
from shoal.net.home import Home, SwarmFile
from shoal.net.identity import (
    UNREADABLE,
    NodeIdentity,
    Role,
    Trust,
    certificate_request,
    new_key,
    peer_of_certificate,
    pem_of,
    swarm_of,
)
from shoal.net.transport import Address
from shoal.wire import enrolment
from shoal.wire.enrolment import Answer, AskRoot, Enrol, Enrolled, Question, Rejected, Root, Token

TIMEOUT_S = 10.0
_ASK_AGAIN = "Ask the swarm's admin for a new token (`shoal invite`)."


def join(token: str, role: Role, home: Home, name: str, *, timeout_s: float = TIMEOUT_S) -> NodeIdentity:
    """Use `token` to make this machine a node of its swarm, called `name` in `home`: key, certificate and swarm.json
    are written there. Blocks for some round trips.

    Raises UsageError (no token; the home is of another swarm), PeerLost (nobody answers), Refused (the token is not
    accepted, or the other side is not who the token says), ShoalError (the disk).
    """
    invite = Token.parse(token)
    if role == "admin":
        raise UsageError("No token makes an admin.", hint="`shoal init` makes a swarm with its admin.")
    address = Address.parse(invite.address)
    root_pem = _root(address, invite.root_sha256, timeout_s)
    with _refused_named("root"):
        swarm = swarm_of(root_pem)
    if home.exists and home.read().swarm != swarm:
        raise UsageError(
            f"{home.path} belongs to the swarm {home.read().swarm}, the token to {swarm}.",
            hint="Choose another directory with --swarm-dir.",
        )
    # The key is written before the token is spent: a full disk or a wrong directory costs no token.
    folder = home.node_dir(name)
    fresh = folder.with_name(f".{name}.new")
    key_pem = new_key()
    try:
        write_private(fresh / "node.key", key_pem)
        enrolled = _enrol(address, root_pem, Enrol(invite.secret, role, certificate_request(key_pem)), timeout_s)
        identity = _identity(enrolled, key_pem, root_pem, role)
        identity.save(fresh)
        _replace(folder, fresh)
        join_address = home.read().join if home.exists else ""
        home.write(SwarmFile(swarm, enrolled.seeds, join_address))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return identity


def _root(address: Address, expected_sha256: bytes, timeout_s: float) -> bytes:
    """The root's certificate (PEM), fetched from a side that is not trusted and checked against the token."""
    context = _context(ssl.CERT_NONE)
    with _connected(address, context, timeout_s) as tls:
        answer = _ask(tls, AskRoot(), timeout_s)
    if isinstance(answer, Rejected):
        raise _rejection(answer)
    if not isinstance(answer, Root) or not hmac.compare_digest(
        hashlib.sha256(answer.certificate).digest(), expected_sha256
    ):
        raise Refused(
            f"{address} is not the admin that made this token: its authority has another fingerprint.",
            hint="The swarm was made anew since, or somebody stands between you and the admin. " + _ASK_AGAIN,
        )
    with _refused_named("root"):
        return pem_of([answer.certificate])


def _enrol(address: Address, root_pem: bytes, request: Enrol, timeout_s: float) -> Enrolled:
    """Say the secret to an admin of the swarm with this root, and to nobody else."""
    context = _context(ssl.CERT_REQUIRED)
    context.load_verify_locations(cadata=root_pem.decode("ascii"))
    with _connected(address, context, timeout_s) as tls:
        der = tls.getpeercert(binary_form=True)
        peer = peer_of_certificate(der or b"")
        if peer.role != "admin" or peer.swarm != swarm_of(root_pem):
            raise Refused(f"{address} is a {peer.role} of the swarm and may not admit anybody.", hint=_ASK_AGAIN)
        answer = _ask(tls, request, timeout_s)
    if isinstance(answer, Enrolled):
        return answer
    if isinstance(answer, Rejected):
        raise _rejection(answer)
    raise ProtocolError(f"{address} answered a request for a certificate with something else.")


def _identity(enrolled: Enrolled, key_pem: bytes, root_pem: bytes, role: Role) -> NodeIdentity:
    """What the admin has issued, checked as if a stranger had: it must be for our key and the role we asked for."""
    credential = Trust(root_pem).credential(enrolled.chain, datetime.datetime.now(datetime.UTC))
    identity = NodeIdentity(credential.peer, key_pem, pem_of(enrolled.chain), root_pem)
    if credential.peer.role != role or not credential.verify(b"mine", identity.sign(b"mine")):
        raise Refused("The admin issued a certificate for another key or role.", hint=_ASK_AGAIN)
    for seed in enrolled.seeds:
        Address.parse(seed)
    return identity


def _replace(folder: Path, fresh: Path) -> None:
    """Put `fresh` where `folder` is; an identity of an earlier join goes."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _context(verify: ssl.VerifyMode) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = verify
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


@contextlib.contextmanager
def _connected(address: Address, context: ssl.SSLContext, timeout_s: float) -> Iterator[ssl.SSLSocket]:
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=timeout_s) as sock,
            context.wrap_socket(sock) as tls,
        ):
            yield tls
    except ssl.SSLCertVerificationError as error:
        raise Refused(
            f"The certificate at {address} is not accepted: {error.verify_message}.", hint=_ASK_AGAIN
        ) from error
    except OSError as error:
        raise PeerLost(
            f"Cannot reach the swarm's admin at {address}: {error.strerror or error}.",
            hint="Is `shoal admin` running there, and does a firewall let this machine through?",
            cause="unreachable",
        ) from error


def _ask(tls: ssl.SSLSocket, question: Question, timeout_s: float) -> Answer:
    deadline = time.monotonic() + timeout_s
    tls.sendall(enrolment.frame(question))
    size = enrolment.length(_exactly(tls, enrolment.LENGTH_BYTES, deadline))
    return enrolment.answer(_exactly(tls, size, deadline))


def _exactly(tls: ssl.SSLSocket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        # For the whole answer: a side that sends one byte now and then holds nobody up.
        tls.settimeout(max(0.001, deadline - time.monotonic()))
        more = tls.recv(size - len(data))
        if not more:
            raise PeerLost(
                "The swarm's admin closed the connection without an answer.",
                hint="It may have too many questions now: try again in a minute.",
            )
        data += more
    return data


def _rejection(answer: Rejected) -> ShoalError:
    return Refused(answer.message, hint=_ASK_AGAIN, retry_after_s=answer.retry_after_s or None)


@contextlib.contextmanager
def _refused_named(what: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise Refused(f"The {what} certificate of the swarm cannot be read: {error}", hint=_ASK_AGAIN) from error
