"""Every port of a running swarm's servers: without a certificate of this swarm nobody gets a byte of it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest
from support.swarm import PATIENCE_S, Swarm

from shoal.errors import Refused
from shoal.net.identity import Authority, create_ca, issue_node
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address
from shoal.wire import codec
from shoal.wire.frames import FrameWriter
from shoal.wire.messages import PROTOCOL_VERSION, Hello

pytestmark = pytest.mark.slow


@pytest.fixture
def ports(swarm: Swarm) -> list[Address]:
    """Where the servers and the registry listen."""
    addresses = [address for server in swarm.servers() for address in server["addresses"]]
    return [Address.parse(address) for address in [*addresses, swarm.seed]]


def hello(swarm: str) -> bytes:
    writer = FrameWriter()
    kind, meta = codec.encode(Hello(PROTOCOL_VERSION, swarm, "a" * 32, "gateway"))
    writer.push(kind, meta)
    buffers = writer.next_frame()
    assert buffers is not None
    return b"".join(buffers)


def answer(sock: socket.socket, said: bytes) -> bytes:
    """Everything the other side sends after `said`, until it hangs up."""
    heard = b""
    try:
        sock.sendall(said)
        while data := sock.recv(4096):
            heard += data
    except (ssl.SSLError, ConnectionError):
        pass
    return heard


def reach(port: Address) -> socket.socket:
    return socket.create_connection((port.host, port.port), timeout=PATIENCE_S)


def test_not_in_plaintext(ports: list[Address], swarm: Swarm) -> None:
    swarm_id = Authority.load(swarm.dir / "ca").swarm
    for port in ports:
        with reach(port) as sock:
            heard = answer(sock, hello(swarm_id))
        # At most a TLS alert (record type 21): nothing that shoal itself says.
        assert heard == b"" or (heard[0] == 21 and len(heard) <= 7), heard


def test_not_without_a_certificate(ports: list[Address], swarm: Swarm) -> None:
    swarm_id = Authority.load(swarm.dir / "ca").swarm
    context = ssl.create_default_context(cafile=str(swarm.dir / "ca" / "ca.pem"))
    context.check_hostname = False
    for port in ports:
        with reach(port) as sock, context.wrap_socket(sock) as tls:
            assert answer(tls, hello(swarm_id)) == b""


def test_not_with_a_certificate_of_another_swarm_of_the_same_name(
    ports: list[Address], swarm: Swarm, tmp_path: Path
) -> None:
    stranger = issue_node(create_ca("local"), "gateway")
    swarm_id = Authority.load(swarm.dir / "ca").swarm
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the stranger does not mind whom it talks to
    stranger.save(tmp_path)
    context.load_cert_chain(tmp_path / "node.pem", tmp_path / "node.key")
    for port in ports:
        with reach(port) as sock, context.wrap_socket(sock) as tls:
            assert answer(tls, hello(swarm_id)) == b""


def test_the_same_door_opens_for_a_member(ports: list[Address], swarm: Swarm) -> None:
    """The control: what keeps the others out is their certificate, and nothing else."""
    member = issue_node(Authority.load(swarm.dir / "ca"), "client")
    stranger = issue_node(create_ca("local"), "client")

    async def visit() -> None:
        for port in ports:
            conn = await TlsTransport(member).dial([str(port)])
            assert conn.is_open
            await conn.close()
            with pytest.raises(Refused):
                await TlsTransport(stranger).dial([str(port)])

    asyncio.run(visit())
