"""Who gets a certificate, over real TLS: a token is good once, in time, for one role, and only at its own admin."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import secrets
import socket
import ssl
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from support.admission import joined, new_home, serving, token_for
from support.networks import Relay, run

from shoal.admin import joining
from shoal.admin.limits import Attempts
from shoal.admin.service import NOT_ACCEPTED, AdminService
from shoal.errors import PeerLost, ProtocolError, Refused, UsageError
from shoal.net.enrol import join
from shoal.net.home import Home
from shoal.net.identity import (
    Trust,
    certificate_request,
    ders_of,
    issue_node,
    key_of_request,
    new_key,
    peer_of_certificate,
)
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address
from shoal.wire import enrolment
from shoal.wire.enrolment import Answer, AskRoot, Enrol, Enrolled, Question, Rejected, Root, Token

MANY = 50
SHA256 = hashes.SHA256()


@pytest.fixture(autouse=True)
def many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests ask more often than any crowd may."""
    monkeypatch.setattr(joining, "HANDSHAKES_AT_ONCE", 1_000_000)


def plain_context() -> ssl.SSLContext:
    """Trusts anybody: what an attacker uses, who does not mind whom it talks to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def raw(service: AdminService, data: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """Say `data` to the join listener; everything that comes back until it hangs up."""
    target = Address.parse(service.join_address)
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context or plain_context())
    writer.write(data)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.transport.abort()


async def ask(service: AdminService, question: Question) -> Answer:
    data = await raw(service, enrolment.frame(question))
    return enrolment.answer(data[enrolment.LENGTH_BYTES :])


def request() -> bytes:
    return certificate_request(new_key())


def scenario_with(
    tmp_path: Path, body: Callable[[Home, AdminService], Awaitable[None]], **options: object
) -> Callable[[], Awaitable[None]]:
    async def scenario() -> None:
        home = new_home(tmp_path)
        async with serving(home, **options) as service:
            await body(home, service)

    return scenario


@pytest.mark.parametrize("fast_loop", [False, True], ids=["asyncio", "uvloop"])
def test_a_token_makes_a_machine_a_node_with_the_role_and_labels_of_the_invite(tmp_path: Path, fast_loop: bool) -> None:
    async def body(home: Home, service: AdminService) -> None:
        there = Home(tmp_path / "machine")
        node = await joined(token_for(home, "server", ["trusted", "gpu"]), there)
        assert (node.peer.role, node.peer.labels) == ("server", ("gpu", "trusted"))
        assert node.peer.swarm == home.read().swarm == there.read().swarm
        assert there.read().seeds == ["tcp://127.0.0.1:7700"]
        assert there.node("server-0") == node
        assert stat.S_IMODE((there.node_dir("server-0") / "node.key").stat().st_mode) == 0o600
        assert stat.S_IMODE(there.node_dir("server-0").stat().st_mode) == 0o700
        assert sorted(path.name for path in (there.path / "nodes").iterdir()) == ["server-0"]
        assert not there.is_admin
        Trust(home.root_pem).credential(node.chain_der, datetime.datetime.now(datetime.UTC))
        listener = await TlsTransport(home.node("admin")).listen("tcp://127.0.0.1:0", hold)
        conn = await TlsTransport(node).dial([listener.address])
        assert conn.peer.role == "admin"
        await conn.close()
        await listener.close()

    run(scenario_with(tmp_path, body, seeds=lambda: ["tcp://127.0.0.1:7700"]), fast_loop=fast_loop)


async def hold(conn: object) -> None:
    await asyncio.Event().wait()


def test_a_token_is_good_once(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        for attempt in range(MANY):
            token = token_for(home, "client")
            first = await ask(service, Enrol(token.secret, "client", request()))
            assert isinstance(first, Enrolled)
            again = await ask(service, Enrol(token.secret, "client", request()))
            assert again == Rejected(NOT_ACCEPTED), attempt

    run(scenario_with(tmp_path, body))


def test_of_many_that_use_one_token_at_the_same_time_one_gets_in(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        for _ in range(5):
            token = token_for(home, "server")
            asked = [ask(service, Enrol(token.secret, "server", request())) for _ in range(12)]
            answers = await asyncio.gather(*asked)
            assert sum(isinstance(answer, Enrolled) for answer in answers) == 1

    run(scenario_with(tmp_path, body))


def test_a_token_for_another_role_is_refused_and_stays_good_for_its_own(tmp_path: Path) -> None:
    roles = ("server", "client", "gateway")

    async def body(home: Home, service: AdminService) -> None:
        for role in roles:
            for wanted in roles:
                token = token_for(home, role)  # type: ignore[arg-type]
                answer = await ask(service, Enrol(token.secret, wanted, request()))  # type: ignore[arg-type]
                if wanted == role:
                    assert isinstance(answer, Enrolled)
                    assert peer_of_certificate(answer.chain[0]).role == role
                else:
                    assert answer == Rejected(NOT_ACCEPTED)
                    assert isinstance(await ask(service, Enrol(token.secret, role, request())), Enrolled)  # type: ignore[arg-type]

    run(scenario_with(tmp_path, body))


def test_an_expired_token_is_refused(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        for lifetime_s in (0.0, -1.0, -900.0):
            token = token_for(home, "server", lifetime_s=lifetime_s)
            assert await ask(service, Enrol(token.secret, "server", request())) == Rejected(NOT_ACCEPTED)
        late = token_for(home, "server", now=time.time() - 901)
        with pytest.raises(Refused, match="expired"):
            await joined(late, Home(tmp_path / "machine"))

    run(scenario_with(tmp_path, body))


def test_guessed_and_damaged_secrets_are_refused(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        token = token_for(home, "server")
        for bit in range(128):
            secret = bytearray(token.secret)
            secret[bit // 8] ^= 1 << bit % 8
            answer = await ask(service, Enrol(bytes(secret), "server", request()))
            assert answer == Rejected(NOT_ACCEPTED)
        for _ in range(MANY):
            answer = await ask(service, Enrol(secrets.token_bytes(16), "server", request()))
            assert answer == Rejected(NOT_ACCEPTED)
        digest = hashlib.sha256(token.secret).digest()
        assert await ask(service, Enrol(digest[:16], "server", request())) == Rejected(NOT_ACCEPTED)
        assert isinstance(await ask(service, Enrol(token.secret, "server", request())), Enrolled)

    run(scenario_with(tmp_path, body))


def test_the_admins_records_hold_no_secret(tmp_path: Path) -> None:
    home = new_home(tmp_path)
    as_after_a_run(home)
    token = token_for(home, "server")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert token.secret not in data, path
            assert token.secret.hex().encode() not in data, path
            assert str(token).encode() not in data, path
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert token.secret.hex() not in repr(token) + repr(Enrol(token.secret, "server", b"x"))


def as_after_a_run(home: Home) -> None:
    """Invites can be made, as if the admin had run before."""
    home.write(msgspec.structs.replace(home.read(), join="tcp://127.0.0.1:1"))


def test_a_token_of_another_swarm_is_refused_before_its_secret_is_said(tmp_path: Path) -> None:
    async def scenario() -> None:
        bank, shop = new_home(tmp_path, "bank"), new_home(tmp_path, "shop")
        asked: list[Question] = []
        async with serving(bank) as bank_service, serving(shop) as shop_service:
            answer = shop_service._answer

            async def listening(question: Question, address: str) -> Answer:
                asked.append(question)
                return await answer(question, address)

            shop_service._listener._ask = listening  # type: ignore[union-attr]
            token = token_for(bank)
            # The right fingerprint and secret, but somebody else answers at the address.
            moved = Token(shop_service.join_address, token.root_sha256, token.secret)
            with pytest.raises(Refused, match="another fingerprint"):
                await joined(moved, Home(tmp_path / "machine"))
            assert asked == [AskRoot()]
            # The secret of one swarm said at the other.
            assert await ask(shop_service, Enrol(token.secret, "server", request())) == Rejected(NOT_ACCEPTED)
            await joined(token, Home(tmp_path / "machine"))
            with pytest.raises(UsageError, match="belongs to the swarm bank-"):
                await joined(token_for(shop), Home(tmp_path / "machine"))
            assert bank_service.join_address != shop_service.join_address

    run(scenario)


@pytest.mark.parametrize("role", ["server", "client", "gateway"])
def test_a_member_that_poses_as_the_admin_does_not_hear_the_secret(tmp_path: Path, role: str) -> None:
    """It has the root's certificate, as every member has, and a certificate that the root vouches for."""
    asked: list[bytes] = []

    async def scenario() -> None:
        home = new_home(tmp_path)
        as_after_a_run(home)
        member = issue_node(home.issuer(), role)  # type: ignore[arg-type]
        (root_der,) = ders_of(home.root_pem)

        async def pose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                data = await reader.readexactly(enrolment.length(await reader.readexactly(4)))
                asked.append(data)
                writer.write(enrolment.frame(Root(root_der)))
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(pose, "127.0.0.1", 0, ssl=member.enrolment_context())
        port = server.sockets[0].getsockname()[1]
        token = token_for(home)
        with pytest.raises(Refused, match="may not admit anybody"):
            await joined(Token(f"tcp://127.0.0.1:{port}", token.root_sha256, token.secret), Home(tmp_path / "machine"))
        server.close()
        await server.wait_closed()
        assert [enrolment.question(data) for data in asked] == [AskRoot()]
        assert not (tmp_path / "machine").exists() or not Home(tmp_path / "machine").exists

    run(scenario)


def test_a_stranger_between_the_two_that_passes_on_the_root_does_not_hear_the_secret(tmp_path: Path) -> None:
    asked: list[Question] = []

    async def scenario() -> None:
        home, other = new_home(tmp_path, "bank"), new_home(tmp_path, "shop")
        as_after_a_run(home)
        (root_der,) = ders_of(home.root_pem)
        async with serving(other) as impostor:

            async def listening(question: Question, address: str) -> Answer:
                asked.append(question)
                return Root(root_der)

            impostor._listener._ask = listening  # type: ignore[union-attr]
            token = token_for(home)
            with pytest.raises(Refused, match="is not accepted"):
                await joined(Token(impostor.join_address, token.root_sha256, token.secret), Home(tmp_path / "machine"))
        assert asked == [AskRoot()]

    run(scenario)


def test_neither_token_nor_certificate_passes_readable_over_the_wire(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        token = token_for(home)
        relay = Relay(Address.parse(service.join_address))
        relayed = Token(await relay.start(), token.root_sha256, token.secret)
        node = await joined(relayed, Home(tmp_path / "machine"))
        await relay.close()
        assert len(relay.seen) > 2000
        for secret in (token.secret, node.chain_der[0][:64], node.peer.node.encode(), b"shoal://"):
            assert secret not in relay.seen

    run(scenario_with(tmp_path, body))


# Crafted requests


def crafted(key: Any, *extensions: x509.ExtensionType, digest: Any = SHA256) -> bytes:
    """A request for everything one might want to have."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin")])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, digest).public_bytes(serialization.Encoding.DER)


def test_a_request_gets_the_names_that_the_admin_chose_whatever_it_asks_for(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        swarm = home.read().swarm
        asked = crafted(
            key,
            x509.SubjectAlternativeName(
                [
                    x509.UniformResourceIdentifier(f"shoal://{swarm}/admin/{'0' * 32}?labels=trusted"),
                    x509.DNSName("bank.example"),
                ]
            ),
            x509.BasicConstraints(ca=True, path_length=5),
            x509.KeyUsage(True, True, True, True, True, True, True, False, False),
        )
        answer = await ask(service, Enrol(token_for(home, "client").secret, "client", asked))
        assert isinstance(answer, Enrolled)
        cert = x509.load_der_x509_certificate(answer.chain[0])
        peer = peer_of_certificate(answer.chain[0])
        assert (peer.role, peer.labels, peer.swarm) == ("client", (), swarm)
        assert cert.subject.rfc4514_string() == f"CN={peer.node}"
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [name.value for name in names] == [peer.uri]
        assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = cert.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.digital_signature
        assert not usage.key_cert_sign
        assert not usage.crl_sign
        assert len(cert.extensions) == 6
        lifetime = cert.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        assert lifetime <= datetime.timedelta(days=7)
        assert x509.load_der_x509_certificate(answer.chain[1]).subject.rfc4514_string() == f"CN={swarm} issuer"

    run(scenario_with(tmp_path, body))


def signed_with_another_key() -> bytes:
    """The request of somebody else's key, signed with one's own."""
    victim = ec.generate_private_key(ec.SECP256R1())
    thief = ec.generate_private_key(ec.SECP256R1())
    spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    own = crafted(thief)
    return own.replace(thief.public_key().public_bytes(*spki), victim.public_key().public_bytes(*spki))


@pytest.mark.parametrize(
    "asked",
    [
        lambda: crafted(rsa.generate_private_key(65537, 2048)),
        lambda: crafted(ec.generate_private_key(ec.SECP384R1())),
        lambda: crafted(ec.generate_private_key(ec.SECP256K1())),
        lambda: crafted(ec.generate_private_key(ec.SECP521R1())),
        lambda: crafted(ed25519.Ed25519PrivateKey.generate(), digest=None),
        signed_with_another_key,
        lambda: request()[:-1],
        lambda: request() + b"\0",
        lambda: bytes(4096),
        lambda: secrets.token_bytes(300),
        lambda: b"\x30\x84\xff\xff\xff\xff",
        lambda: b"\x30\x80" * 2000,
    ],
    ids=["rsa", "p384", "p256k1", "p521", "ed25519", "stolen", "cut", "longer", "zeros", "noise", "length", "deep"],
)
def test_a_request_that_is_none_gets_nothing_and_costs_no_token(tmp_path: Path, asked: Callable[[], bytes]) -> None:
    async def body(home: Home, service: AdminService) -> None:
        token = token_for(home)
        assert await ask(service, Enrol(token.secret, "server", asked())) == Rejected(NOT_ACCEPTED)
        assert isinstance(await ask(service, Enrol(token.secret, "server", request())), Enrolled)

    run(scenario_with(tmp_path, body))


def test_a_request_with_any_bit_flipped_certifies_no_other_key() -> None:
    asked = bytearray(request())
    key = key_of_request(bytes(asked))
    accepted = []
    for bit in range(len(asked) * 8):
        asked[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(Refused):
            accepted.append(key_of_request(bytes(asked)))
        asked[bit // 8] ^= 1 << bit % 8
    # The number of unused bits behind the signature is not signed, and may be read in two or three ways.
    assert len(accepted) <= 7
    assert all(each == key for each in accepted)


# Bytes that are no question


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff" + bytes(64),
        (16 * 1024 + 1).to_bytes(4, "little") + bytes(16 * 1024 + 1),
        enrolment.frame(Root(b"x")),
        enrolment.frame(Rejected("no")),
        (5).to_bytes(4, "little") + b"\x93\x03\xc4\x01\x00",
        (64).to_bytes(4, "little") + b"\x91" * 64,
    ],
)
def test_bytes_that_are_no_question_get_no_answer_and_others_still_do(tmp_path: Path, data: bytes) -> None:
    async def body(home: Home, service: AdminService) -> None:
        if not data:
            return
        silent = raw(service, data) if len(data) > 5 or data == b"\0\0\0\0" else raw(service, data + b"....")
        assert await silent == b""
        assert isinstance(await ask(service, AskRoot()), Root)

    run(scenario_with(tmp_path, body))


def test_plaintext_and_old_tls_get_no_answer(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        target = Address.parse(service.join_address)
        reader, writer = await asyncio.open_connection(target.host, target.port)
        writer.write(enrolment.frame(AskRoot()))
        with contextlib.suppress(ConnectionResetError):
            assert len(await reader.read()) < 32, "a TLS alert at most"
        writer.transport.abort()
        old = plain_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await raw(service, b"", old)

    run(scenario_with(tmp_path, body))


def test_silent_strangers_are_dropped_and_do_not_keep_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "CONVERSATION_S", 0.3)
    monkeypatch.setattr(joining, "MAX_CONNECTIONS_PER_ADDRESS", 4)

    async def body(home: Home, service: AdminService) -> None:
        target = Address.parse(service.join_address)
        silent = [await asyncio.open_connection(target.host, target.port) for _ in range(8)]
        for reader, writer in silent:
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.transport.abort()
        await joined(token_for(home), Home(tmp_path / "machine"))

    run(scenario_with(tmp_path, body))


# Rate limits


def test_an_address_whose_tokens_were_refused_too_often_has_to_wait_even_with_a_good_one(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        token = token_for(home)
        for _ in range(3):
            answer = await ask(service, Enrol(secrets.token_bytes(16), "server", request()))
            assert answer == Rejected(NOT_ACCEPTED)
        answer = await ask(service, Enrol(token.secret, "server", request()))
        assert isinstance(answer, Rejected)
        assert "wait a minute" in answer.message
        assert 0 < answer.retry_after_s <= 60
        # From elsewhere it is still good.
        assert isinstance(await service._answer(Enrol(token.secret, "server", request()), "192.0.2.9"), Enrolled)

    run(scenario_with(tmp_path, body, failures=Attempts(burst=3, every_s=60)))


def test_an_address_that_connects_too_often_is_cut_without_a_handshake(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        for _ in range(5):
            assert isinstance(await ask(service, AskRoot()), Root)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await ask(service, AskRoot())
        with pytest.raises(PeerLost, match="Cannot reach the swarm's admin"):
            await joined(token_for(home), Home(tmp_path / "machine"))

    run(scenario_with(tmp_path, body, connections=Attempts(burst=5, every_s=60)))


def test_a_crowd_of_addresses_costs_a_bounded_number_of_handshakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "HANDSHAKES_AT_ONCE", 5)
    monkeypatch.setattr(joining, "HANDSHAKE_EVERY_S", 60.0)

    async def body(home: Home, service: AdminService) -> None:
        for _ in range(5):
            assert isinstance(await ask(service, AskRoot()), Root)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await ask(service, AskRoot())

    run(scenario_with(tmp_path, body))


# What the joining side puts up with


def test_nobody_there_is_said_with_what_to_do(tmp_path: Path) -> None:
    home = new_home(tmp_path)
    as_after_a_run(home)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    token = token_for(home)
    with pytest.raises(PeerLost, match="Cannot reach") as caught:
        join(str(Token(f"tcp://127.0.0.1:{port}", token.root_sha256, token.secret)), "server", home, "server-0")
    assert "shoal admin" in caught.value.hint


def test_a_full_disk_costs_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(home: Home, service: AdminService) -> None:
        token = token_for(home)
        (tmp_path / "machine").write_text("a file where the directory should be")
        with pytest.raises(Exception, match="Cannot write"):
            await joined(token, Home(tmp_path / "machine"))
        await joined(token, Home(tmp_path / "elsewhere"))

    run(scenario_with(tmp_path, body))


def test_an_answer_with_another_key_or_role_is_not_taken(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        issuer = home.issuer()

        async def wrong(question: Question, address: str) -> Answer:
            if isinstance(question, AskRoot):
                return Root(service._root_der)
            return Enrolled(list(issue_node(issuer, "server").chain_der), issuer.swarm, [])

        service._listener._ask = wrong  # type: ignore[union-attr]
        with pytest.raises(Refused, match="another key or role"):
            await joined(token_for(home), Home(tmp_path / "machine"))
        assert not Home(tmp_path / "machine").has_node("server-0")

    run(scenario_with(tmp_path, body))


def test_a_second_join_replaces_the_identity_whole(tmp_path: Path) -> None:
    async def body(home: Home, service: AdminService) -> None:
        there = Home(tmp_path / "machine")
        first = await joined(token_for(home), there)
        with pytest.raises(Refused):
            await joined(Token(service.join_address, token_for(home).root_sha256, bytes(16)), there)
        assert there.node("server-0") == first
        second = await joined(token_for(home), there)
        assert there.node("server-0") == second
        assert second.peer.node != first.peer.node
        assert sorted(path.name for path in (there.path / "nodes").iterdir()) == ["server-0"]

    run(scenario_with(tmp_path, body))


@pytest.mark.parametrize(
    "text", ["", "shoal1.", "shoal1.AAAA", "shoal2.AAAA", "hello", "shoal1." + "A" * 5000, "shoal1.é"]
)
def test_what_is_no_token_is_a_usage_error_that_does_not_repeat_it(text: str) -> None:
    with pytest.raises(UsageError, match="no token") as caught:
        Token.parse(text)
    assert not text or text not in str(caught.value)


def test_a_token_survives_copying() -> None:
    token = Token("tcp://10.0.0.1:7701", bytes(range(32)), secrets.token_bytes(16))
    assert Token.parse(f"  {token}\n") == token
    for at in range(len(str(token))):
        cut = str(token)[:at] + str(token)[at + 1 :]
        with contextlib.suppress(UsageError):
            assert Token.parse(cut) != token


def test_answers_that_are_none_are_a_protocol_error() -> None:
    for data in (b"", b"\x91\x09", enrolment.frame(AskRoot())[4:], b"\xc1"):
        with pytest.raises(ProtocolError):
            enrolment.answer(data)
