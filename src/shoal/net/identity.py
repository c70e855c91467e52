"""Who is who: one certificate authority per swarm, one short-lived certificate per node.

A node is named by its key: the node id is the fingerprint of its public key, so it can be neither chosen nor taken
over. What a certificate proves is in one URI: shoal://SWARM/ROLE/NODE. The swarm's id ends with the fingerprint of the
authority's key, so two swarms of the same name are still two swarms.

P-256 rather than Ed25519: both work with ssl, and companies' own authorities and hardware keys speak P-256.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shoal.errors import Refused, ShoalError, UsageError
from shoal.spec.ids import NodeId

Role = Literal["server", "client", "gateway", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

NODE_LIFETIME = datetime.timedelta(days=7)
AUTHORITY_LIFETIME = datetime.timedelta(days=3650)
_CLOCK_SKEW = datetime.timedelta(minutes=5)
"""Certificates are valid from this long before they were made: the clocks of a swarm's machines differ."""

_SWARM_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,22}[a-z0-9])?")
_URI = re.compile(r"shoal://([a-z0-9-]{1,80})/(server|client|gateway|admin)/([0-9a-f]{32})")


@dataclass(frozen=True)
class Peer:
    """What a node's certificate proves."""

    node: NodeId
    role: Role
    swarm: str

    @property
    def uri(self) -> str:
        return f"shoal://{self.swarm}/{self.role}/{self.node}"

    @classmethod
    def from_uri(cls, uri: str) -> Peer:
        """Read shoal://SWARM/ROLE/NODE. Raises Refused for anything else."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise Refused("The certificate names no shoal node (its URI is not shoal://SWARM/ROLE/NODE).")
        role = next(role for role in ROLES if role == match[2])
        return cls(node=NodeId(match[3]), role=role, swarm=match[1])

    def __str__(self) -> str:
        return f"{self.role} {self.node[:8]}"


@dataclass(frozen=True)
class Authority:
    """The swarm's certificate authority. Whoever holds `key_pem` decides who is a member."""

    swarm: str
    key_pem: bytes
    cert_pem: bytes

    def __repr__(self) -> str:
        return f"Authority(swarm={self.swarm!r})"

    def save(self, directory: Path) -> None:
        """Write ca.key (0600) and ca.pem. Raises ShoalError when the disk does not take them."""
        _write_private(directory / "ca.key", self.key_pem)
        _write_private(directory / "ca.pem", self.cert_pem)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Read what `save` wrote. Raises UsageError when it is missing, damaged or readable by others."""
        key_pem, cert_pem = _read_private(directory / "ca.key"), _read(directory / "ca.pem")
        with _damage_named(directory):
            name = x509.load_pem_x509_certificate(cert_pem).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            return cls(swarm=str(name[0].value), key_pem=key_pem, cert_pem=cert_pem)


@dataclass(frozen=True)
class NodeIdentity:
    """A node's key and certificate, and the authority it trusts."""

    peer: Peer
    key_pem: bytes
    cert_pem: bytes
    ca_pem: bytes

    def __repr__(self) -> str:
        return f"NodeIdentity({self.peer.uri})"

    def save(self, directory: Path) -> None:
        """Write node.key (0600), node.pem and ca.pem. Raises ShoalError when the disk does not take them."""
        _write_private(directory / "node.key", self.key_pem)
        _write_private(directory / "node.pem", self.cert_pem)
        _write_private(directory / "ca.pem", self.ca_pem)

    @classmethod
    def load(cls, directory: Path) -> NodeIdentity:
        """Read what `save` wrote. Raises UsageError when it is missing, damaged or readable by others."""
        key_pem = _read_private(directory / "node.key")
        cert_pem, ca_pem = _read(directory / "node.pem"), _read(directory / "ca.pem")
        with _damage_named(directory):
            cert = x509.load_pem_x509_certificate(cert_pem)
            names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            return cls(Peer.from_uri(uris[0] if uris else ""), key_pem, cert_pem, ca_pem)

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 only; demands a certificate of this swarm's authority from every client."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        # A resumed session would outlive the check of the certificate's end date.
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """TLS 1.3 only; trusts this swarm's authority and nothing else. Host names mean nothing here: the caller
        checks the node's URI."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        # Python 3.13's default; set here so that every version judges a certificate alike.
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=self.ca_pem.decode("ascii"))
        # ssl reads keys from files only; the directory is 0700 and gone a moment later.
        with tempfile.TemporaryDirectory(prefix="shoal-") as directory:
            chain = Path(directory) / "chain.pem"
            _write_private(chain, self.key_pem + self.cert_pem)
            context.load_cert_chain(chain)
        return context


def create_ca(swarm_name: str) -> Authority:
    """Make the authority of a new swarm. The swarm's id is NAME-FINGERPRINT of the authority's key."""
    if _SWARM_NAME.fullmatch(swarm_name) is None:
        raise UsageError(
            f"{swarm_name!r} cannot name a swarm.",
            hint="Use 1 to 24 lower-case letters, digits and hyphens, not a hyphen first or last.",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    swarm = f"{swarm_name}-{_fingerprint(key.public_key())}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, swarm)])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    cert = (
        _builder(key.public_key(), subject=name, issuer=name, lifetime=AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(swarm, _key_pem(key), cert.public_bytes(serialization.Encoding.PEM))


def issue_node(ca: Authority, role: Role, *, lifetime: datetime.timedelta = NODE_LIFETIME) -> NodeIdentity:
    """Make a key and let `ca` certify it for `role`."""
    key = ec.generate_private_key(ec.SECP256R1())
    peer = Peer(node=_fingerprint(key.public_key()), role=role, swarm=ca.swarm)
    cert_pem = _certify(ca, peer, key.public_key(), lifetime)
    return NodeIdentity(peer, _key_pem(key), cert_pem, ca.cert_pem)


def peer_of_certificate(der: bytes) -> Peer:
    """Whom a certificate that TLS has verified belongs to. Raises Refused unless it names exactly one shoal node and
    the node id is the fingerprint of the certified key."""
    cert = x509.load_der_x509_certificate(der)
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise Refused("The certificate names no shoal node (it has no URI).") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise Refused(f"The certificate has {len(uris)} URIs; a node's certificate has one.")
    peer = Peer.from_uri(uris[0])
    key = cert.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or peer.node != _fingerprint(key):
        raise Refused("The certificate's node id is not the fingerprint of its key.")
    return peer


def _certify(ca: Authority, peer: Peer, public_key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta) -> bytes:
    ca_key = serialization.load_pem_private_key(ca.key_pem, password=None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise UsageError("The authority's key is not a P-256 key.")
    ca_cert = x509.load_pem_x509_certificate(ca.cert_pem)
    identifier = ca_cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer.node)])
    cert = (
        _builder(public_key, subject=subject, issuer=ca_cert.subject, lifetime=lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(peer.uri)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return cert.public_bytes(serialization.Encoding.PEM)


def _builder(
    public_key: ec.EllipticCurvePublicKey, *, subject: x509.Name, issuer: x509.Name, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    # A lifetime below zero makes a certificate that has expired already (tests need one); its start lies before it.
    start = now + min(lifetime, datetime.timedelta(0)) - _CLOCK_SKEW
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(now + lifetime)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _fingerprint(public_key: ec.EllipticCurvePublicKey) -> NodeId:
    der = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return NodeId(hashlib.sha256(der).hexdigest()[:32])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all, readable by its owner only from its first moment on."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ShoalError(
            f"Cannot write {path}: {error.strerror}.", hint="Free some space there or choose another directory."
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"Cannot read {path}: {error.strerror}.", hint="Give the directory of a swarm that was created here."
        ) from error


def _read_private(path: Path) -> bytes:
    data = _read(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise UsageError(f"The key {path} can be read by others (mode {mode:o}).", hint=f"chmod 600 {path}")
    return data


@contextlib.contextmanager
def _damage_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, IndexError, x509.ExtensionNotFound, Refused) as error:
        raise UsageError(
            f"The identity in {directory} is damaged: {error}", hint="Delete the directory and create it again."
        ) from error
