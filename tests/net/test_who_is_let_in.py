"""Every kind of wrong certificate, many times over, against real listeners and real dialers: none is let in. And every
kind of message from every role that may not send it: the connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from support.messages import samples
from support.networks import FAST, authority, identity, issuer, run

from shoal.errors import PeerLost, ProtocolError, ShoalError
from shoal.net import identity as identities
from shoal.net.identity import NodeIdentity, create_issuer, issue_node
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address, Conn
from shoal.wire import codec
from shoal.wire.frames import FrameWriter
from shoal.wire.messages import PROTOCOL_VERSION, Hello

ANY_PORT = "tcp://127.0.0.1:0"
TIMES = 12
OUR = authority().swarm
BOTH = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
Made = tuple[bytes, bytes]
"""(private key, certificates), both PEM."""


def pem(key: Any) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def made(
    key: Any = None,
    *,
    uris: Callable[[str], list[str]] = lambda node: [f"shoal://{OUR}/gateway/{node}"],
    signer: Any = None,
    usages: list[Any] = BOTH,
    begins: datetime.timedelta = datetime.timedelta(minutes=-5),
    ends: datetime.timedelta = datetime.timedelta(days=1),
    ca: bool = False,
) -> Made:
    """A certificate as ours are, except for what is asked for; signed by our own issuer unless by `signer`."""
    signer = signer or issuer()
    key = key or ec.generate_private_key(ec.SECP256R1())
    node = identities._fingerprint(key.public_key())
    above = x509.load_pem_x509_certificate(signer.cert_pem)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]))
        .issuer_name(above.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(identities._key_usage(signs_certificates=ca), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                above.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if names := uris(node):
        general = [x509.UniformResourceIdentifier(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    cert = builder.sign(identities._private_key(signer.key_pem), hashes.SHA256())
    return pem(key), identities._pem(cert) + (signer.cert_pem if signer.root_pem else b"")


def of(node: NodeIdentity) -> Made:
    return node.key_pem, node.cert_pem


def self_signed() -> Made:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, OUR)])
    cert = identities._authority_certificate(
        key.public_key(), name, key, name, datetime.timedelta(days=1), path_length=1
    )
    return pem(key), identities._pem(cert)


def signed_by_a_member() -> Made:
    member = identity("admin")
    return of(issue_node(identities.Authority(OUR, member.key_pem, member.cert_pem, authority().cert_pem), "admin"))


@cache
def imitation() -> identities.Authority:
    """A root of the same name as ours, with its own issuer that claims our swarm's id."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, OUR)])
    key = ec.generate_private_key(ec.SECP256R1())
    cert = identities._authority_certificate(
        key.public_key(), name, key, name, datetime.timedelta(days=1), path_length=1
    )
    return create_issuer(identities.Authority(OUR, pem(key), identities._pem(cert)))


WRONG: dict[str, Callable[[], Made]] = {
    "foreign": lambda: of(identity("gateway", swarm="other")),
    "foreign, under our name": lambda: made(signer=issuer("other")),
    "of a root with our root's name": lambda: made(signer=imitation()),
    "self-signed": self_signed,
    "expired": lambda: made(ends=datetime.timedelta(seconds=-1), begins=datetime.timedelta(days=-1)),
    "not yet valid": lambda: made(begins=datetime.timedelta(hours=1)),
    "signed by a member": signed_by_a_member,
    "signed by an authority below the issuer": lambda: of(
        issue_node(create_issuer(identities.Authority(OUR, issuer().key_pem, issuer().cert_pem)), "gateway")
    ),
    "the issuer's own": lambda: (issuer().key_pem, issuer().cert_pem),
    "the root's own": lambda: (authority().key_pem, authority().cert_pem),
    "without its issuer": lambda: (lambda node: (node.key_pem, identities.pem_of(node.chain_der[:1])))(
        identity("gateway")
    ),
    "no name": lambda: made(uris=lambda node: []),
    "two names": lambda: made(uris=lambda node: [f"shoal://{OUR}/{role}/{node}" for role in ("client", "admin")]),
    "somebody else's id": lambda: made(uris=lambda node: [f"shoal://{OUR}/gateway/{'0' * 32}"]),
    "another swarm's name": lambda: made(uris=lambda node: [f"shoal://other-{'0' * 32}/gateway/{node}"]),
    "a role that is none": lambda: made(uris=lambda node: [f"shoal://{OUR}/root/{node}"]),
    "labels out of order": lambda: made(uris=lambda node: [f"shoal://{OUR}/gateway/{node}?labels=b,a"]),
    "a web server's name": lambda: made(uris=lambda node: [f"https://{OUR}/gateway/{node}"]),
    "RSA key": lambda: made(rsa.generate_private_key(65537, 2048)),
    "P-384 key": lambda: made(ec.generate_private_key(ec.SECP384R1())),
    "for code signing": lambda: made(usages=[ExtendedKeyUsageOID.CODE_SIGNING]),
}


async def forbidden(conn: Conn) -> None:
    raise AssertionError(f"{conn.peer} must not get here")


def contexts(made: Made) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(client's, server's) of somebody who shows this certificate and does not mind whom it talks to."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname = False
    with tempfile.TemporaryDirectory() as folder:
        chain = Path(folder) / "chain.pem"
        chain.write_bytes(made[0] + made[1])
        for context in (client, server):
            context.verify_mode = ssl.CERT_NONE
            context.load_cert_chain(chain)
    return client, server


def greeting(made: Made) -> bytes:
    """A Hello that says what the certificate should say."""
    key = serialization.load_pem_private_key(made[0], None)
    node = identities._fingerprint(key.public_key())  # type: ignore[arg-type]
    writer = FrameWriter()
    writer.push(*codec.encode(Hello(PROTOCOL_VERSION, OUR, node, "gateway")))
    return b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))


async def first_heard(made: Made, address: str) -> bytes:
    """The first that a listener says to a dialer with this certificate, or b"" when it hangs up."""
    target = Address.parse(address)
    writer = None
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port, ssl=contexts(made)[0])
        writer.write(greeting(made))
        return await reader.read(65536)
    except (ConnectionError, ssl.SSLError):
        return b""
    finally:
        if writer is not None:
            writer.transport.abort()


def hellos(heard: bytes) -> bool:
    """Whether a listener answered with its own Hello (kind 1), that is, let the dialer in."""
    return heard[:2] == b"SH" and heard[3] == 1


@pytest.mark.parametrize("kind", WRONG)
def test_a_listener_lets_no_wrong_certificate_in(kind: str) -> None:
    async def scenario() -> None:
        let_in: list[Conn] = []

        async def note(conn: Conn) -> None:
            let_in.append(conn)

        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, note)
        for _ in range(TIMES):
            assert not hellos(await first_heard(WRONG[kind](), listener.address))
        assert not let_in
        for right in (of(identity("gateway")), made()):
            assert hellos(await first_heard(right, listener.address)), "the control: the same with a right one"
        await listener.close()

    run(scenario)


@pytest.mark.parametrize("kind", [kind for kind in WRONG if "name" not in kind or kind == "no name"])
def test_a_dialer_does_not_introduce_itself_to_a_listener_with_a_wrong_certificate(kind: str) -> None:
    async def scenario() -> None:
        heard: list[bytes] = []

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                heard.append(await reader.read(65536))
            writer.transport.abort()

        transport = TlsTransport(identity("gateway"), FAST)
        for _ in range(TIMES // 4):
            _, context = contexts(WRONG[kind]())
            server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ShoalError):
                await transport.dial([f"tcp://127.0.0.1:{port}"])
            server.close()
            await server.wait_closed()
        await asyncio.sleep(0.05)  # asyncio's own servers need a moment to let go
        # To a certificate of our authority that names nobody it says why it leaves (a Fault), to others not a byte.
        assert not any(hellos(data) or OUR.encode() in data for data in heard)

    run(scenario)


def test_a_dialer_takes_no_other_member_for_the_one_it_expects() -> None:
    async def scenario() -> None:
        expected, other = identity("server"), identity("server")
        listener = await TlsTransport(other, FAST).listen(ANY_PORT, forbidden)
        for _ in range(TIMES):
            with pytest.raises(ShoalError, match="was expected at this address"):
                await TlsTransport(identity("gateway"), FAST).dial([listener.address], expect_node=expected.peer.node)
        await listener.close()

    run(scenario)


@pytest.mark.parametrize("role", codec.MAY_SEND)
def test_a_role_is_cut_off_for_every_message_that_is_not_its_own(role: str) -> None:
    """Everything a hostile member can send: its certificate is right, its message is another role's."""
    messages = {type(message): (message, body) for message, body in samples()}

    async def scenario() -> None:
        ended: asyncio.Queue[Exception] = asyncio.Queue()

        async def note(conn: Conn) -> None:
            try:
                while True:
                    await conn.receive()
            except ShoalError as error:
                ended.put_nowait(error)

        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, note)
        member = TlsTransport(identity(role), FAST)  # type: ignore[arg-type]
        forbidden_kinds = [cls for cls in messages if cls not in codec.MAY_SEND[role] and cls is not Hello]
        assert len(forbidden_kinds) >= 6
        for cls in forbidden_kinds:
            conn = await member.dial([listener.address])
            message, body = messages[cls]
            await conn.send(message, body)
            error = await ended.get()
            assert isinstance(error, ProtocolError), (cls, error)
            assert str(error) == f"A {role} may not send {cls.__name__}."
            with contextlib.suppress(PeerLost):
                await conn.receive()
            await conn.close()
        await listener.close()

    run(scenario)
