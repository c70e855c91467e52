"""TLS 1.3 over TCP with certificates on both sides: the transport of every real swarm.

asyncio's BufferedProtocol rather than streams: received bytes go straight to the frame reader in the callback that got
them, without another buffer or a task to wake. With uvloop this takes about two thirds of the CPU.

TLS 1.3 tells a dialer that its handshake succeeded before the listener has seen the dialer's certificate. Only the
listener's Hello, which follows its check, makes a connection.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from shoal.errors import PeerLost, Refused, ShoalError, UsageError
from shoal.net.connection import Conn, ConnProtocol, ConnSettings
from shoal.net.identity import NodeIdentity, Peer, peer_of_certificate
from shoal.net.strangers import Places, WaitingRoom
from shoal.net.transport import Acceptor, Address, OnConn

_BACKLOG = 128
"""Connections that the kernel has accepted and we have not looked at."""
_SHUTDOWN_TIMEOUT_S = 1.0
_ACCEPT_RETRY_S = 0.1
_KERNEL_UNSENT_BYTES = 128 * 1024
_KERNEL_RECEIVE_BYTES = 256 * 1024
"""Enough for 10 Gbit/s at 0.2 ms; a distant peer gets this much per round trip."""
_OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class TlsTransport:
    """One node's way to the others. `identity` is what it proves; the settings hold for all its connections."""

    def __init__(self, identity: NodeIdentity, settings: ConnSettings | None = None) -> None:
        self._settings = settings or ConnSettings()
        self._refused: frozenset[str] = frozenset()
        self._conns: weakref.WeakSet[Conn] = weakref.WeakSet()
        """Every connection that may be alive, in both directions, those being greeted included."""
        self._use(identity)

    def _use(self, identity: NodeIdentity) -> None:
        self._identity = identity
        self._server_context = identity.server_context()
        self._client_context = identity.client_context()

    @property
    def identity(self) -> NodeIdentity:
        return self._identity

    def renew(self, identity: NodeIdentity) -> None:
        """Show another certificate of the same node from the next handshake on. Connections that stand stay."""
        if identity.peer.node != self._identity.peer.node:
            raise ValueError(f"{identity} is another node than {self._identity}")
        self._use(identity)

    def refuse(self, nodes: frozenset[str]) -> None:
        """Speak to none of these nodes any more: connections with them are cut now, new ones refused, in both
        directions. `nodes` replaces the nodes that were refused so far."""
        self._refused = nodes
        for conn in list(self._conns):
            if conn.proven is not None and conn.proven.node in nodes:
                conn.abort(f"{conn.proven} was removed from the swarm.")

    async def listen(self, address: str, on_conn: OnConn) -> TlsListener:
        """See Transport.listen. Port 0 takes a free one."""
        wanted = Address.parse(address)
        return TlsListener(await bind(wanted), wanted.host, self, self._settings, on_conn)

    def accept(self) -> tuple[Conn, asyncio.BaseProtocol, ssl.SSLContext]:
        """What one accepted socket is to be served with, as of now."""
        conn = self._conn(dialed=False)
        return conn, _TlsProtocol(conn, partial(self._prove, conn)), self._server_context

    def _conn(self, *, dialed: bool, expect_node: str | None = None) -> Conn:
        conn = Conn(self._identity.peer, self._settings, dialed=dialed, expect_node=expect_node)
        self._conns.add(conn)
        return conn

    def _prove(self, conn: Conn, transport: asyncio.BaseTransport) -> Peer:
        """Who the other side is, from the certificate that TLS has verified."""
        tls = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True) if tls is not None else None
        if not der:
            raise Refused("The peer showed no certificate.")
        peer = peer_of_certificate(der)
        conn.certificate = der
        if peer.node in self._refused:
            raise Refused(f"{peer} was removed from the swarm.")
        return peer

    async def dial(self, addresses: Sequence[str], *, expect_node: str | None = None, timeout_s: float = 5.0) -> Conn:
        """See Transport.dial."""
        failures: list[str] = []
        deadline = asyncio.get_running_loop().time() + timeout_s
        for address in addresses:
            try:
                async with asyncio.timeout_at(deadline):
                    return await self._dial_one(Address.parse(address), expect_node)
            except TimeoutError:
                failures.append(f"{address}: no answer within {timeout_s:g} s")
            except PeerLost as error:
                failures.append(f"{address}: {error}")
        raise PeerLost(
            f"Cannot reach the node ({'; '.join(failures)}).", hint="Is the other node running?", cause="unreachable"
        )

    async def _dial_one(self, address: Address, expect_node: str | None) -> Conn:
        conn = self._conn(dialed=True, expect_node=expect_node)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: _TlsProtocol(conn, partial(self._prove, conn)),
                address.host,
                address.port,
                ssl=self._client_context,
                ssl_handshake_timeout=self._settings.greeting_timeout_s,
                ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
            )
            await conn.greeted()
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or error.reason or str(error)
            raise Refused(
                f"The certificate at {address} is not accepted: {reason}.",
                hint="Does that node belong to this swarm, and has its certificate not expired?",
            ) from error
        except OSError as error:
            raise PeerLost(error.strerror or str(error), cause="unreachable") from error
        except BaseException:
            # Whoever waits for this dial never gets the connection, so nobody else would close it.
            conn.abort()
            raise
        return conn


class TlsListener:
    """Accepts sockets, bounds how many strangers are in a handshake, and hands greeted connections on."""

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        transport: TlsTransport,
        settings: ConnSettings,
        on_conn: OnConn,
    ) -> None:
        self._sock = sock
        self._address = str(Address(host, sock.getsockname()[1]))
        self._transport = transport
        self._settings = settings
        self._room = WaitingRoom(self._ready, patience_s=settings.greeting_timeout_s)
        self._places = Places()
        self._acceptor = Acceptor(on_conn)
        self._acceptor.spawn(self._accept())

    @property
    def address(self) -> str:
        return self._address

    async def close(self) -> None:
        """See Listener.close."""
        try:
            await self._room.close()
            await self._acceptor.close()
        finally:
            self._sock.close()

    async def _accept(self) -> None:
        while True:
            sock, _ = await accepted(self._sock)
            self._room.enter(sock)

    def _ready(self, sock: socket.socket) -> None:
        if self._acceptor.is_full:
            sock.close()
        else:
            self._acceptor.admit(self._handshake(sock))

    async def _handshake(self, sock: socket.socket) -> Conn:
        begun = False
        try:
            async with self._places:
                begun = True
                return await self._shake(sock)
        finally:
            if not begun:  # from then on the socket is the connection's, which may still have a last word to say
                sock.close()

    async def _shake(self, sock: socket.socket) -> Conn:
        conn, protocol, context = self._transport.accept()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                sock,
                ssl=context,
                ssl_handshake_timeout=self._settings.greeting_timeout_s,
                ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
            )
            # Still a stranger until its Hello fits its certificate.
            await conn.greeted()
        except OSError as error:
            raise Refused("A handshake failed.") from error
        except BaseException:
            conn.abort()
            raise
        return conn


class _TlsProtocol(ConnProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        sock = transport.get_extra_info("socket")
        # asyncio sets this on most paths, uvloop on fewer; Nagle would hold a small frame for up to 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What lies in the kernel's buffers can no longer be overtaken. By default they grow to several MiB, and a
        # decode step behind a flood of journals took 31-38 ms; with these bounds 4-5 ms (transport_roundtrip.py).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_RECEIVE_BYTES)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _KERNEL_UNSENT_BYTES)
        super().connection_made(transport)


async def accepted(sock: socket.socket) -> tuple[socket.socket, tuple[Any, ...]]:
    """The next connection of a listening socket, and where it comes from."""
    while True:
        try:
            return await asyncio.get_running_loop().sock_accept(sock)
        except OSError as error:
            if error.errno not in _OUT_OF_FILES and not isinstance(error, ConnectionError):
                raise
            # The machine has no room for a socket now, or the dialer left again: neither is our end.
            await asyncio.sleep(_ACCEPT_RETRY_S)


async def bind(address: Address) -> socket.socket:
    """A socket that listens at `address`. Raises UsageError when that cannot be had."""
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, sockaddr = infos[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(sockaddr)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise _bind_error(address, error) from error
    return sock


def _bind_error(address: Address, error: OSError) -> ShoalError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(f"{address} is in use by another program.", hint="Choose another port, or 0 for a free one.")
    return UsageError(f"Cannot listen on {address}: {error.strerror}.", hint="Listen on an address of this machine.")
