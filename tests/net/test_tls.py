"""TLS: who is let in, who is not and what each hears; what a listener on the open port puts up with."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import socket
import ssl
import struct
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from support import audit
from support.messages import step
from support.networks import FAST, OverTls, Relay, authority, identity, issuer, run

from shoal.errors import PeerLost, ProtocolError, Refused, UsageError
from shoal.net import strangers
from shoal.net.identity import NodeIdentity, certify, issue_node
from shoal.net.tls import TlsTransport
from shoal.net.transport import MAX_CONNECTIONS_PER_MEMBER, Address, Conn, Heartbeat
from shoal.wire import codec
from shoal.wire.frames import FrameReader, FrameWriter
from shoal.wire.messages import PROTOCOL_VERSION, Fault, Hello, Message, Ping

ANY_PORT = "tcp://127.0.0.1:0"


def ders(cert_pem: bytes) -> list[bytes]:
    return [cert.public_bytes(Encoding.DER) for cert in x509.load_pem_x509_certificates(cert_pem)]


async def forbidden(conn: Conn) -> None:
    raise AssertionError(f"{conn.peer} must not get here")


async def hold(conn: Conn) -> None:
    await asyncio.Event().wait()


async def speak(context: ssl.SSLContext | None, address: str, data: bytes) -> bytes:
    """Connect by hand, send `data`, and return all that comes back."""
    target = Address.parse(address)
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context)
    writer.write(data)
    try:
        return await reader.read()
    finally:
        writer.transport.abort()


def framed(message: Message) -> bytes:
    writer = FrameWriter()
    writer.push(*codec.encode(message), lane=codec.lane(message))
    return b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))


def faults(data: bytes) -> list[str]:
    frames = FrameReader(codec.decode).feed(data)
    return [frame.message.message for frame in frames if isinstance(frame.message, Fault)]


def expired(role: str = "gateway") -> NodeIdentity:
    return issue_node(authority(), role, lifetime=datetime.timedelta(seconds=-1))  # type: ignore[arg-type]


def foreign() -> NodeIdentity:
    """Trusts the listener's authority and claims its swarm, but another authority signed its certificate."""
    node = issue_node(dataclasses.replace(authority("other"), swarm=authority().swarm), "gateway")
    return dataclasses.replace(node, ca_pem=authority().cert_pem)


@pytest.mark.parametrize("fast_loop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("dialer", [expired, foreign])
def test_a_dialer_whose_certificate_is_not_accepted_is_refused(
    dialer: Callable[[], NodeIdentity], fast_loop: bool
) -> None:
    async def scenario() -> None:
        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, forbidden)
        with pytest.raises(Refused, match="does not accept this node's certificate") as caught:
            await TlsTransport(dialer(), FAST).dial([listener.address])
        assert "expired" in caught.value.hint
        await listener.close()

    run(scenario, fast_loop=fast_loop)


@pytest.mark.parametrize("fast_loop", [False, True], ids=["asyncio", "uvloop"])
def test_a_dialer_without_certificate_hears_nothing(fast_loop: bool) -> None:
    async def scenario() -> None:
        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, forbidden)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=authority().cert_pem.decode())
        target = Address.parse(listener.address)
        # The handshake seems to succeed: TLS 1.3 tells the dialer before the listener has judged.
        reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context)
        assert await reader.read() == b""
        writer.transport.abort()
        await listener.close()

    run(scenario, fast_loop=fast_loop)


@pytest.mark.parametrize("fast_loop", [False, True], ids=["asyncio", "uvloop"])
def test_a_listener_of_another_swarm_or_with_an_expired_certificate_is_refused(fast_loop: bool) -> None:
    async def scenario() -> None:
        for node, says in (
            (identity("server", swarm="other"), "self-signed|unable to get"),
            (expired("server"), "has expired"),
        ):
            listener = await TlsTransport(node, FAST).listen(ANY_PORT, forbidden)
            with pytest.raises(Refused, match=says):
                await TlsTransport(identity("gateway"), FAST).dial([listener.address])
            await listener.close()

    run(scenario, fast_loop=fast_loop)


def test_plaintext_and_old_tls_get_no_answer() -> None:
    async def scenario() -> None:
        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, forbidden)
        answer = await speak(None, listener.address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in answer
        assert len(answer) < 32, "a TLS alert at most"
        old = identity("gateway").client_context()
        old.minimum_version = ssl.TLSVersion.TLSv1_2
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await speak(old, listener.address, b"")
        await listener.close()

    run(scenario)


def test_another_protocol_version_is_answered_with_both_versions() -> None:
    async def scenario() -> None:
        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, forbidden)
        newer = bytearray(framed(Hello(PROTOCOL_VERSION + 1, "demo", "n", "gateway")))
        newer[2] = PROTOCOL_VERSION + 1
        answer = await speak(identity("gateway").client_context(), listener.address, bytes(newer))
        (text,) = faults(answer)
        assert text == (
            f"The peer speaks protocol version {PROTOCOL_VERSION + 1}, this side speaks version {PROTOCOL_VERSION}."
        )
        await listener.close()

    run(scenario)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (framed(Ping(1)), "The first message, and only the first, must be Hello."),
        (b"GET / HTTP/1.1\r\n\r\n", "The peer does not speak the shoal protocol (wrong first bytes)."),
        (
            struct.pack("<HBBB3sIIIQI", 0x4853, PROTOCOL_VERSION, 13, 0, bytes(3), 2, 0, 1, 2**63, 0),
            "A frame announces a body of",
        ),
    ],
    ids=["no hello", "http", "huge body"],
)
def test_a_member_that_breaks_the_protocol_is_told_and_cut(data: bytes, says: str) -> None:
    async def scenario() -> None:
        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, forbidden)
        (fault,) = faults(await speak(identity("gateway").client_context(), listener.address, data))
        assert fault.startswith(says)
        await listener.close()

    run(scenario)


def test_a_second_hello_ends_the_connection() -> None:
    async def scenario() -> None:
        ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

        async def note(conn: Conn) -> None:
            try:
                await conn.receive()
            except ProtocolError as error:
                ended.set_result(error)

        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, note)
        gateway = identity("gateway")
        writer = FrameWriter()
        for _ in range(2):
            writer.push(*codec.encode(Hello(PROTOCOL_VERSION, gateway.peer.swarm, gateway.peer.node, "gateway")))
        data = b"".join(b"".join(buffers) for buffers in iter(writer.next_frame, None))
        answer = await speak(gateway.client_context(), listener.address, data)
        assert faults(answer) == ["The first message, and only the first, must be Hello."]
        await listener.close()

    run(scenario)


def test_a_member_that_never_reads_its_answers_is_cut() -> None:
    async def scenario() -> None:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def note(conn: Conn) -> None:
            try:
                await conn.receive()
            except PeerLost as error:
                ended.set_result(str(error))

        # Silence must not be what ends it.
        patient = dataclasses.replace(FAST, heartbeat=Heartbeat(ping_after_s=60, silent_after_s=60))
        listener = await TlsTransport(identity("server"), patient).listen(ANY_PORT, note)
        gateway = identity("gateway")
        frames = FrameWriter()
        frames.push(*codec.encode(Hello(PROTOCOL_VERSION, gateway.peer.swarm, gateway.peer.node, "gateway")))
        for nonce in range(40_000):
            frames.push(*codec.encode(Ping(nonce)))
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        target = Address.parse(listener.address)
        sock.connect((target.host, target.port))
        _, writer = await asyncio.open_connection(sock=sock, ssl=gateway.client_context(), server_hostname="")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"".join(b"".join(buffers) for buffers in iter(frames.next_frame, None)))
        assert "does not read what it is sent" in await ended
        writer.transport.abort()
        await listener.close()

    run(scenario)


def test_strangers_that_stall_are_dropped_and_do_not_keep_members_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(strangers, "MAX_HANDSHAKES", 4)
        impatient = dataclasses.replace(FAST, greeting_timeout_s=0.2)
        listener = await TlsTransport(identity("server"), impatient).listen(ANY_PORT, hold)
        target = Address.parse(listener.address)
        silent = [await asyncio.open_connection(target.host, target.port) for _ in range(4)]
        # Members with a certificate that never say Hello count as strangers too.
        context = identity("gateway").client_context()
        mute = [asyncio.ensure_future(speak(context, listener.address, b"")) for _ in range(4)]
        conn = await TlsTransport(identity("gateway"), FAST).dial([listener.address])
        for reader, writer in silent:
            assert await reader.read() == b""
            writer.transport.abort()
        for answer in await asyncio.gather(*mute):
            assert answer == b"" or faults(answer)
        assert conn.is_open
        await conn.close()
        await listener.close()

    run(scenario)


def test_a_thousand_that_dawdle_do_not_hold_up_one_who_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(strangers, "MAX_WAITING", 20)
        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, hold)
        target = Address.parse(listener.address)
        dawdlers = [await asyncio.open_connection(target.host, target.port) for _ in range(60)]
        for _, writer in dawdlers[30:]:
            writer.write(b"\x16\x03\x01\x02\x00half a ClientHello")
        conn = await TlsTransport(identity("gateway"), FAST).dial([listener.address], timeout_s=2.0)
        assert conn.is_open
        # Those who came first had to leave for those who came last.
        assert await dawdlers[0][0].read() == b""
        await conn.close()
        for _, writer in dawdlers:
            writer.transport.abort()
        await listener.close()

    run(scenario)


def test_a_member_cannot_take_the_places_of_all_others() -> None:
    async def scenario() -> None:
        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, hold)
        greedy = TlsTransport(identity("client"), FAST)
        conns = [await greedy.dial([listener.address]) for _ in range(MAX_CONNECTIONS_PER_MEMBER)]
        one_more = await greedy.dial([listener.address])
        with pytest.raises(PeerLost):
            await one_more.receive()
        other = await TlsTransport(identity("client"), FAST).dial([listener.address])
        assert all(conn.is_open for conn in (*conns, other))
        await conns.pop().close()
        again = await greedy.dial([listener.address])
        for conn in (*conns, other, again):
            await conn.close()
        await listener.close()

    run(scenario)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\x00\x00", b"\x17\x03\x03\x00\x01x"]
)
def test_what_is_no_client_hello_is_hung_up_on_at_once(said: bytes) -> None:
    async def scenario() -> None:
        listener = await TlsTransport(identity("server"), FAST).listen(ANY_PORT, hold)
        target = Address.parse(listener.address)
        reader, writer = await asyncio.open_connection(target.host, target.port)
        writer.write(said)
        async with asyncio.timeout(2.0):  # well before the greeting would be given up
            assert await reader.read() == b""
        writer.close()
        await listener.close()

    run(scenario)


def test_a_listener_that_never_says_hello_is_given_up() -> None:
    async def scenario() -> None:
        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(mute, "127.0.0.1", 0, ssl=identity("server").server_context())
        port = server.sockets[0].getsockname()[1]
        impatient = dataclasses.replace(FAST, greeting_timeout_s=0.2)
        with pytest.raises(PeerLost, match=r"No Hello came within 0\.2 s"):
            await TlsTransport(identity("gateway"), impatient).dial([f"tcp://127.0.0.1:{port}"])
        with pytest.raises(PeerLost, match=r"no answer within 0\.1 s"):
            await TlsTransport(identity("gateway"), FAST).dial([f"tcp://127.0.0.1:{port}"], timeout_s=0.1)
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.05)

    run(scenario)


def test_nothing_readable_passes_over_the_wire() -> None:
    async def scenario() -> None:
        network = OverTls()
        received: asyncio.Future[object] = asyncio.get_running_loop().create_future()

        async def receive(conn: Conn) -> None:
            received.set_result((await conn.receive())[1].tobytes())

        node = identity("server")
        listener = await network.transport(node).listen(ANY_PORT, receive)
        relay = Relay(Address.parse(listener.address))
        conn = await network.transport(identity("gateway")).dial([await relay.start()])
        message, body = step(64)
        await conn.send(message, body)
        assert await received == body
        await conn.close()
        await relay.close()
        await listener.close()
        assert len(relay.seen) > len(body)
        for secret in (body[1000:1016], b"SH\x01", node.peer.node.encode(), b"shoal://"):
            assert secret not in relay.seen

    run(scenario)


@pytest.mark.parametrize("dialer", [expired, foreign])
def test_an_address_that_other_machines_reach_asks_for_the_same_certificates(
    dialer: Callable[[], NodeIdentity],
) -> None:
    async def scenario() -> None:
        listener = await TlsTransport(identity("server"), FAST).listen("tcp://0.0.0.0:0", forbidden)
        with pytest.raises(Refused):
            await TlsTransport(dialer(), FAST).dial([f"tcp://127.0.0.1:{Address.parse(listener.address).port}"])
        await listener.close()
        assert audit.take() == ["socket.bind to ('0.0.0.0', 0)"]

    run(scenario)


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    async def scenario() -> None:
        with pytest.raises(UsageError, match="Cannot listen on") as caught:
            await TlsTransport(identity("server")).listen("tcp://192.0.2.1:0", forbidden)
        assert "an address of this machine" in caught.value.hint
        assert audit.take() == ["socket.bind to ('192.0.2.1', 0)"]

    run(scenario)


@pytest.mark.parametrize("fast_loop", [False, True], ids=["asyncio", "uvloop"])
def test_a_renewed_certificate_is_shown_from_then_on_and_connections_stay(fast_loop: bool) -> None:
    async def scenario() -> None:
        short = issue_node(issuer(), "server", lifetime=datetime.timedelta(minutes=5))
        key = x509.load_pem_x509_certificate(short.cert_pem).public_key()
        longer = short.renewed(ders(certify(issuer(), "server", key, labels=["trusted"])))  # type: ignore[arg-type]
        transport = TlsTransport(short, FAST)
        listener = await transport.listen(ANY_PORT, hold)
        old = await TlsTransport(identity("gateway"), FAST).dial([listener.address])
        transport.renew(longer)
        new = await TlsTransport(identity("gateway"), FAST).dial([listener.address], expect_node=short.peer.node)
        assert (old.peer.labels, new.peer.labels) == ((), ("trusted",))
        assert old.is_open
        await old.close()
        await new.close()
        await listener.close()

    run(scenario, fast_loop=fast_loop)


def test_another_nodes_certificate_is_no_renewal() -> None:
    with pytest.raises(ValueError, match="another node"):
        TlsTransport(identity("server")).renew(identity("server"))


@pytest.mark.parametrize("fast_loop", [False, True], ids=["asyncio", "uvloop"])
def test_a_refused_node_loses_its_connections_at_once_and_gets_no_new_one_either_way(fast_loop: bool) -> None:
    async def scenario() -> None:
        listening, dialing, other = identity("server"), identity("gateway"), identity("gateway")
        ends: list[str] = []

        async def note(conn: Conn) -> None:
            try:
                await conn.receive()
            except PeerLost as error:
                ends.append(str(error))
                raise

        server, gateway = TlsTransport(listening, FAST), TlsTransport(dialing, FAST)
        there = await server.listen(ANY_PORT, note)
        here = await gateway.listen(ANY_PORT, note)
        inward = await gateway.dial([there.address])
        outward = await server.dial([here.address])
        kept = await TlsTransport(other, FAST).dial([there.address])
        server.refuse(frozenset({dialing.peer.node}))
        with pytest.raises(PeerLost, match="was removed from the swarm"):
            await outward.receive()
        with pytest.raises(PeerLost):
            await inward.receive()
        assert f"gateway {dialing.peer.node[:8]} was removed from the swarm." in ends
        with pytest.raises(Refused, match="was removed from the swarm"):
            await gateway.dial([there.address])
        with pytest.raises(Refused, match="was removed from the swarm"):
            await server.dial([here.address])
        assert kept.is_open
        server.refuse(frozenset())
        await (await gateway.dial([there.address])).close()
        for conn in (inward, outward, kept):
            await conn.close()
        await here.close()
        await there.close()

    run(scenario, fast_loop=fast_loop)


def test_a_node_that_is_refused_while_it_is_being_greeted_gets_no_further() -> None:
    async def scenario() -> None:
        gateway = identity("gateway")
        transport = TlsTransport(identity("server"), FAST)
        listener = await transport.listen(ANY_PORT, forbidden)
        target = Address.parse(listener.address)
        reader, writer = await asyncio.open_connection(
            target.host, target.port, ssl=gateway.client_context(), server_hostname=""
        )
        while not any(conn.proven for conn in transport._conns):
            await asyncio.sleep(0)
        transport.refuse(frozenset({gateway.peer.node}))
        writer.write(framed(Hello(PROTOCOL_VERSION, gateway.peer.swarm, gateway.peer.node, "gateway")))
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.transport.abort()
        await listener.close()

    run(scenario)
