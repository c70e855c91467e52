"""Who is who: one root authority per swarm, an issuing authority below it, one short-lived certificate per node.

A node is named by its key: the node id is the fingerprint of its public key, so it can be neither chosen nor taken
over. What a certificate proves is in one URI: shoal://SWARM/ROLE/NODE?labels=A,B. The swarm's id ends with the
fingerprint of the root's key, so two swarms of the same name are still two swarms.

Nodes trust the root alone. It signs the issuing authority and then nothing more for months, so its key can lie in a
safe while joins and renewals go on.

P-256 rather than Ed25519: both work with ssl, and companies' own authorities and hardware keys speak P-256.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import re
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeGuard, get_args

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from shoal.errors import Refused, ShoalError, UsageError
from shoal.manifest.files import write_private
from shoal.spec.ids import NodeId

Role = Literal["server", "client", "gateway", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

NODE_LIFETIME = datetime.timedelta(days=7)
ISSUER_LIFETIME = datetime.timedelta(days=90)
AUTHORITY_LIFETIME = datetime.timedelta(days=3650)
MAX_LABELS = 16
CLOCK_SKEW = datetime.timedelta(minutes=5)
"""Certificates are valid from this long before they were made: the clocks of a swarm's machines differ."""

_SWARM_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,22}[a-z0-9])?")
_LABEL = re.compile(r"[a-z0-9-]{1,32}")
_URI = re.compile(
    r"shoal://([a-z0-9-]{1,80})/(server|client|gateway|admin)/([0-9a-f]{32})"
    r"(?:\?labels=([a-z0-9-]{1,32}(?:,[a-z0-9-]{1,32}){0,15}))?"
)
_SIGNED = b"shoal signed 1\0"
"""Stands before everything a node signs, so that no signature of ours passes for one of another protocol (TLS signs
with the same key), nor the other way round."""
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What the library raises for bytes that are no certificate or request it can read."""
_MAX_CHAIN = 2
_MAX_CERTIFICATE_BYTES = 4096


@dataclass(frozen=True)
class Peer:
    """What a node's certificate proves."""

    node: NodeId
    role: Role
    swarm: str
    labels: tuple[str, ...] = ()
    """What the admin vouches for about this machine, sorted, for example ("trusted",)."""

    @property
    def uri(self) -> str:
        labels = f"?labels={','.join(self.labels)}" if self.labels else ""
        return f"shoal://{self.swarm}/{self.role}/{self.node}{labels}"

    @classmethod
    def from_uri(cls, uri: str) -> Peer:
        """Read shoal://SWARM/ROLE/NODE[?labels=A,B]. Raises Refused for anything else."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise Refused("The certificate names no shoal node (its URI is not shoal://SWARM/ROLE/NODE).")
        role = next(role for role in ROLES if role == match[2])
        labels = tuple(match[4].split(",")) if match[4] else ()
        if list(labels) != sorted(set(labels)):
            raise Refused("The certificate names no shoal node (its labels are not in order).")
        return cls(node=NodeId(match[3]), role=role, swarm=match[1], labels=labels)

    def __str__(self) -> str:
        return f"{self.role} {self.node[:8]}"


@dataclass(frozen=True)
class Authority:
    """Signs certificates of nodes. Whoever holds `key_pem` decides who is a member.

    Either the swarm's root, or the issuing authority that the root has signed; then `root_pem` is the root's
    certificate."""

    swarm: str
    key_pem: bytes
    cert_pem: bytes
    root_pem: bytes = b""

    def __repr__(self) -> str:
        return f"Authority(swarm={self.swarm!r}, {'issuer' if self.root_pem else 'root'})"

    @property
    def trusted_pem(self) -> bytes:
        """The root's certificate: what every node of the swarm trusts."""
        return self.root_pem or self.cert_pem

    @cached_property
    def not_after(self) -> datetime.datetime:
        return x509.load_pem_x509_certificate(self.cert_pem).not_valid_after_utc

    def check_valid(self) -> None:
        """Raises ShoalError when its own certificate has ended: what it signed would be accepted by nobody."""
        if self.not_after <= datetime.datetime.now(datetime.UTC):
            raise ShoalError(
                f"The certificate of the swarm's issuing authority expired on {self.not_after:%Y-%m-%d}.",
                hint="Put the root's key (ca.key) back for a moment and start `shoal admin`: it renews the issuer.",
            )

    def save(self, directory: Path) -> None:
        """Write ca.key (0600) and ca.pem, or issuer.key and issuer.pem beside them. Raises ShoalError when the disk
        does not take them."""
        name = "issuer" if self.root_pem else "ca"
        write_private(directory / f"{name}.key", self.key_pem)
        write_private(directory / f"{name}.pem", self.cert_pem)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """The root that `save` wrote. Raises UsageError when it is missing, damaged or readable by others."""
        key_pem, cert_pem = _read_private(directory / "ca.key"), _read(directory / "ca.pem")
        with _damage_named(directory):
            return cls(swarm_of(cert_pem), key_pem, cert_pem)

    @classmethod
    def load_issuer(cls, directory: Path) -> Authority:
        """The issuing authority that `save` wrote; raises like `load`. The root's key may be elsewhere."""
        key_pem = _read_private(directory / "issuer.key")
        cert_pem, root_pem = _read(directory / "issuer.pem"), _read(directory / "ca.pem")
        with _damage_named(directory):
            issuer = cls(swarm_of(root_pem), key_pem, cert_pem, root_pem)
            x509.load_pem_x509_certificate(cert_pem).verify_directly_issued_by(x509.load_pem_x509_certificate(root_pem))
            return issuer


@dataclass(frozen=True)
class NodeIdentity:
    """A node's key and certificate, and the root it trusts. `cert_pem` is the node's own certificate and, behind it,
    that of the issuing authority."""

    peer: Peer
    key_pem: bytes
    cert_pem: bytes
    ca_pem: bytes

    def __repr__(self) -> str:
        return f"NodeIdentity({self.peer.uri})"

    @cached_property
    def chain_der(self) -> tuple[bytes, ...]:
        """The certificates of `cert_pem`, the node's own first."""
        return ders_of(self.cert_pem)

    @property
    def valid_from(self) -> datetime.datetime:
        return self._certificate.not_valid_before_utc

    @property
    def valid_until(self) -> datetime.datetime:
        return self._certificate.not_valid_after_utc

    def sign(self, payload: bytes) -> bytes:
        """A signature (ECDSA P-256, SHA-256, DER) that `Credential.verify` checks."""
        return self._key.sign(_SIGNED + payload, ec.ECDSA(hashes.SHA256()))

    def renewed(self, chain_der: Sequence[bytes]) -> NodeIdentity:
        """The same node with a newer certificate. Raises Refused unless `chain_der` certifies this very key, swarm and
        role, is valid now and lasts longer than the present one."""
        now = datetime.datetime.now(datetime.UTC)
        credential = Trust(self.ca_pem).credential(chain_der, now)
        if dataclasses.replace(credential.peer, labels=self.peer.labels) != self.peer:
            raise Refused("The new certificate is not of this node and role.")
        if credential.not_after <= self.valid_until.timestamp():
            raise Refused("The new certificate does not last longer than the present one.")
        return NodeIdentity(credential.peer, self.key_pem, pem_of(chain_der), self.ca_pem)

    def save(self, directory: Path) -> None:
        """Write node.key (0600), node.pem and ca.pem. Raises ShoalError when the disk does not take them."""
        write_private(directory / "node.key", self.key_pem)
        write_private(directory / "node.pem", self.cert_pem)
        write_private(directory / "ca.pem", self.ca_pem)

    @classmethod
    def load(cls, directory: Path) -> NodeIdentity:
        """Read what `save` wrote. Raises UsageError when it is missing, damaged or readable by others."""
        key_pem = _read_private(directory / "node.key")
        cert_pem, ca_pem = _read(directory / "node.pem"), _read(directory / "ca.pem")
        with _damage_named(directory):
            cert = x509.load_pem_x509_certificates(cert_pem)[0]
            names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            return cls(Peer.from_uri(uris[0] if uris else ""), key_pem, cert_pem, ca_pem)

    @cached_property
    def _certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificates(self.cert_pem)[0]

    @cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey:
        return _private_key(self.key_pem)

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

    def enrolment_context(self) -> ssl.SSLContext:
        """TLS 1.3 only; shows our certificate and asks for none: for those who have none yet."""
        context = self.server_context()
        context.verify_mode = ssl.CERT_NONE
        return context

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
            write_private(chain, self.key_pem + self.cert_pem)
            context.load_cert_chain(chain)
        return context


@dataclass(frozen=True)
class Credential:
    """A certificate that was checked: who its owner is, and what the owner signed."""

    peer: Peer
    not_after: float
    """Unix seconds."""
    public_key: ec.EllipticCurvePublicKey

    def verify(self, payload: bytes, signature: bytes) -> bool:
        """Whether the owner's `NodeIdentity.sign` made `signature` from `payload`."""
        try:
            self.public_key.verify(signature, _SIGNED + payload, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


class Trust:
    """Checks certificates that came as bytes and not through TLS, by the same rules and against the same root."""

    def __init__(self, ca_pem: bytes) -> None:
        self._swarm = swarm_of(ca_pem)
        self._policy = PolicyBuilder().store(Store([x509.load_pem_x509_certificate(ca_pem)])).max_chain_depth(1)

    def credential(self, chain_der: Sequence[bytes], now: datetime.datetime) -> Credential:
        """Who owns `chain_der` (the node's certificate, then its issuer's) at `now` (with a time zone). Raises Refused
        when the chain does not end at our root, is not valid at `now`, or names no node of this swarm."""
        if not 1 <= len(chain_der) <= _MAX_CHAIN or any(len(der) > _MAX_CERTIFICATE_BYTES for der in chain_der):
            raise Refused("The certificates are too many or too long.")
        verifier = self._policy.time(now.astimezone(datetime.UTC).replace(tzinfo=None)).build_client_verifier()
        try:
            leaf, *issuers = (x509.load_der_x509_certificate(der) for der in chain_der)
            verifier.verify(leaf, issuers)
            peer = peer_of_certificate(chain_der[0])
        except (*UNREADABLE, VerificationError) as error:
            raise Refused(f"The certificate is not accepted: {error}") from error
        if peer.swarm != self._swarm:
            raise Refused(f"This is swarm {self._swarm}, the certificate is of swarm {peer.swarm}.")
        key = leaf.public_key()
        if not _is_p256(key):
            raise Refused("The certificate's key is not a P-256 key.")
        return Credential(peer, leaf.not_valid_after_utc.timestamp(), key)


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
    cert = _authority_certificate(key.public_key(), name, key, name, AUTHORITY_LIFETIME, path_length=1)
    return Authority(swarm, _key_pem(key), _pem(cert))


def create_issuer(
    root: Authority, *, key_pem: bytes | None = None, lifetime: datetime.timedelta = ISSUER_LIFETIME
) -> Authority:
    """The issuing authority below `root`: it may certify nodes and no further authority. With `key_pem` the present
    one is signed anew, and the certificates it has signed stay what they are."""
    key = ec.generate_private_key(ec.SECP256R1()) if key_pem is None else _private_key(key_pem)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{root.swarm} issuer")])
    root_cert = x509.load_pem_x509_certificate(root.cert_pem)
    cert = _authority_certificate(
        key.public_key(), name, _private_key(root.key_pem), root_cert.subject, lifetime, path_length=0
    )
    return Authority(root.swarm, _key_pem(key), _pem(cert), root_pem=root.cert_pem)


def issue_node(
    ca: Authority, role: Role, *, labels: Sequence[str] = (), lifetime: datetime.timedelta = NODE_LIFETIME
) -> NodeIdentity:
    """Make a key and let `ca` certify it for `role` and `labels`."""
    key = ec.generate_private_key(ec.SECP256R1())
    cert_pem = certify(ca, role, key.public_key(), labels=labels, lifetime=lifetime)
    return NodeIdentity(peer_of_pem(cert_pem), _key_pem(key), cert_pem, ca.trusted_pem)


def certify(
    ca: Authority,
    role: Role,
    public_key: ec.EllipticCurvePublicKey,
    *,
    labels: Sequence[str] = (),
    lifetime: datetime.timedelta = NODE_LIFETIME,
) -> bytes:
    """Certificates (PEM, a node's own and then the issuer's) of the node that has this key. Everything in them but the
    key is chosen here. Raises UsageError for labels that are none."""
    peer = Peer(_fingerprint(public_key), role, ca.swarm, checked_labels(labels))
    ca.check_valid()
    lifetime = min(lifetime, ca.not_after - datetime.datetime.now(datetime.UTC))
    return _certify(ca, peer, public_key, lifetime) + (ca.cert_pem if ca.root_pem else b"")


def new_key() -> bytes:
    """A new private key (PEM) for a node that will ask to be certified."""
    return _key_pem(ec.generate_private_key(ec.SECP256R1()))


def certificate_request(key_pem: bytes) -> bytes:
    """A request (PKCS #10, DER) for a certificate of this key. It asks for no names: the admin chooses those."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(_private_key(key_pem), hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def key_of_request(der: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request is about, proven to be the sender's; nothing else in it is looked at. Raises Refused."""
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        proven = _is_p256(key) and request.is_signature_valid
    except UNREADABLE as error:
        raise Refused("The certificate request cannot be read.") from error
    if not _is_p256(key) or not proven:
        raise Refused("The certificate request is not one for a P-256 key that its sender holds.")
    return key


def key_of_certificate(der: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a certificate that was verified before. Raises Refused for another kind of key."""
    key = x509.load_der_x509_certificate(der).public_key()
    if not _is_p256(key):
        raise Refused("The certificate's key is not a P-256 key.")
    return key


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """`labels` sorted, each once. Raises UsageError when a certificate cannot carry them."""
    for label in labels:
        if _LABEL.fullmatch(label) is None:
            raise UsageError(f"{label!r} is no label.", hint="Use 1 to 32 lower-case letters, digits and hyphens.")
    if len(set(labels)) > MAX_LABELS:
        raise UsageError(f"A node has at most {MAX_LABELS} labels.")
    return tuple(sorted(set(labels)))


def peer_of_pem(cert_pem: bytes) -> Peer:
    """`peer_of_certificate` of the first certificate in `cert_pem`."""
    return peer_of_certificate(ders_of(cert_pem)[0])


def pem_of(chain_der: Sequence[bytes]) -> bytes:
    """DER certificates as one PEM text. Raises ValueError for what is no certificate."""
    return b"".join(_pem(x509.load_der_x509_certificate(der)) for der in chain_der)


def swarm_of(root_pem: bytes) -> str:
    """The id of the swarm whose root this is. Raises Refused when its name is not that of its key."""
    cert = x509.load_pem_x509_certificate(root_pem)
    name = str(cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    key = cert.public_key()
    if not _is_p256(key) or not name.endswith(f"-{_fingerprint(key)}"):
        raise Refused("The authority's name does not end with the fingerprint of its key.")
    return name


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
    if not _is_p256(key) or peer.node != _fingerprint(key):
        raise Refused("The certificate's node id is not the fingerprint of its key.")
    return peer


def _certify(ca: Authority, peer: Peer, public_key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta) -> bytes:
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
        .sign(_private_key(ca.key_pem), hashes.SHA256())
    )
    return _pem(cert)


def _authority_certificate(
    public_key: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    lifetime: datetime.timedelta,
    *,
    path_length: int,
) -> x509.Certificate:
    issuer_identifier = x509.SubjectKeyIdentifier.from_public_key(issuer_key.public_key())
    return (
        _builder(public_key, subject=subject, issuer=issuer, lifetime=lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )


def _builder(
    public_key: ec.EllipticCurvePublicKey, *, subject: x509.Name, issuer: x509.Name, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    # A lifetime below zero makes a certificate that has expired already (tests need one); its start lies before it.
    start = now + min(lifetime, datetime.timedelta(0)) - CLOCK_SKEW
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


def _is_p256(key: object) -> TypeGuard[ec.EllipticCurvePublicKey]:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _private_key(key_pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("The key is not a P-256 key.", hint="Restore the key file, or create the identity again.")
    return key


def ders_of(cert_pem: bytes) -> tuple[bytes, ...]:
    """The certificates of a PEM text, in order."""
    certificates = x509.load_pem_x509_certificates(cert_pem)
    return tuple(cert.public_bytes(serialization.Encoding.DER) for cert in certificates)


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


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
