"""Runs the gateway: a listening socket, TLS beyond loopback, uvicorn inside the caller's event loop, a polite end."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Literal

import h11
import uvicorn
from cryptography import x509
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from shoal.errors import UsageError
from shoal.gateway.errors import RequestError, error_body
from shoal.gateway.limits import Limits
from shoal.gateway.replies import dumps

# How long the rest of a refused body is read and thrown away. Closing at once would reset the connection, and many
# clients would then never see the answer that says why.
_LINGER_S = 2.0
_MAX_HEAD_BYTES = 32 * 1024


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the gateway can be reached; `port` is the real one, also when 0 was asked for."""

    host: str
    port: int
    scheme: Literal["http", "https"] = "http"

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of the gateway's own HTTPS certificate (with its chain) and key."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raises UsageError when TLS cannot be spoken with these files, before a model is loaded for it."""
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                self.certificate, self.key, password=_no_password
            )
        except ssl.SSLError as error:
            raise UsageError(
                f"{self.certificate} and {self.key} are no certificate and its key: {error.reason or error}.",
                hint="Give PEM files: the certificate with its chain, and the key without a password.",
            ) from error
        except OSError as error:
            raise UsageError(
                f"Cannot read {error.filename or self.certificate}: {error.strerror}.", hint="Give PEM files."
            ) from error

    def names(self) -> list[str]:
        """The DNS names and addresses that the certificate is for: by these, and no others, a browser will come."""
        cert = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        try:
            found = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return []
        addresses = (f"[{each}]" if each.version == 6 else str(each) for each in _addresses(found))
        return [*found.get_values_for_type(x509.DNSName), *addresses]


def _addresses(names: x509.SubjectAlternativeName) -> list[IPv4Address | IPv6Address]:
    return [each for each in names.get_values_for_type(x509.IPAddress) if isinstance(each, IPv4Address | IPv6Address)]


def _no_password() -> str:
    """Asked for an encrypted key's password, say there is none: a server must not wait at a prompt."""
    return ""


@asynccontextmanager
async def serve(
    app: Starlette,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    limits: Limits | None = None,
    tls: TlsFiles | None = None,
) -> AsyncIterator[Listening]:
    """Serve `app` while the block runs. Leaving it stops listening and lets running answers end.

    Answers that take longer than `limits.shutdown_s` to end are told so inside their streams and cut.
    Raises UsageError: a host beyond loopback without TLS (keys and text would be readable on the network), a port in
    use, TLS files that cannot be used.
    """
    limits = limits or Limits()
    if tls is not None:
        tls.check()
    listener = _listen(host, port, encrypted=tls is not None)
    config = uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # a forwarded address must not become a loopback one
        server_header=False,
        timeout_keep_alive=max(1, round(limits.idle_timeout_s)),
        timeout_graceful_shutdown=max(1, round(limits.shutdown_s)),
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else tls.key,
    )
    server = _Server(config)
    address = listener.getsockname()
    silence = _NoQuotes()
    errors = logging.getLogger("uvicorn.error")
    errors.addFilter(silence)
    running = asyncio.create_task(server.serve(sockets=[listener]), name="gateway")
    try:
        yield Listening(address[0], address[1], "http" if tls is None else "https")
    finally:
        server.should_exit = True
        try:
            await running
            # What uvicorn cancelled at the deadline still has to tell its clients and to close its sessions.
            await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
        finally:
            errors.removeFilter(silence)
            listener.close()


def check_exposure(host: str, *, encrypted: bool) -> str:
    """The IP address to listen on for `host`. Raises UsageError for a name, and for one that others can reach while
    nothing would be encrypted."""
    address = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        loopback = ip_address(address).is_loopback
    except ValueError as error:
        raise UsageError(
            f"{host!r} is no IP address to listen on.", hint="Use 127.0.0.1, an address of this machine, or 0.0.0.0."
        ) from error
    if not loopback and not encrypted:
        raise UsageError(
            f"Without TLS the gateway does not listen on {host}: keys and text would be readable on the network.",
            hint="Give --tls-cert and --tls-key, or listen on 127.0.0.1 behind an SSH tunnel or a TLS proxy.",
        )
    return address


def _listen(host: str, port: int, *, encrypted: bool) -> socket.socket:
    address = check_exposure(host, encrypted=encrypted)
    if not 0 <= port <= 65535:
        raise UsageError(f"There is no port {port}.", hint="Choose one from 1 to 65535, or 0 for any free one.")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # The protocol is named because asyncio sets TCP_NODELAY only on sockets that name it; without that, the kernel
    # holds small chunks back for 40 ms, which is every token of a stream.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"Cannot listen on {address} port {port}: {error.strerror}.",
            hint="Stop the program that uses the port, or choose another port (0 takes any free one).",
        ) from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to the program that called `serve`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _NoQuotes(logging.Filter):
    """Takes the messages of unexpected exceptions out of uvicorn's log: they can quote what a user wrote.

    What kind of error it was and where it was raised stays.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            lines = []
            while error is not None:
                lines += [*traceback.format_tb(error.__traceback__), f"{type(error).__name__}\n"]
                error = error.__cause__ or error.__context__
            record.exc_text = "".join(lines).rstrip()
            record.exc_info = None
        return True


def _protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 protocol with the bounds it lacks."""

    class BoundedProtocol(H11Protocol):
        """Adds a bound on connections, a deadline for request heads, and an end for bodies nobody reads any more."""

        _head_timer: asyncio.TimerHandle | None = None
        _linger_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # uvicorn's access lines have query strings, and it writes them, whatever its own setting says, as soon as
            # any handler is installed at the root. The application writes lines of its own.
            self.access_log = False
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._head_timer = self.loop.call_later(limits.head_timeout_s, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # A head that has begun and is not whole runs against a clock that more bytes do not wind up.
            began = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
            if not began:
                self._head_timer = _cancelled(self._head_timer)
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(limits.head_timeout_s, self.transport.close)
            unread = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
            if not unread:
                self._linger_timer = _cancelled(self._linger_timer)
            elif self._linger_timer is None:
                self._linger_timer = self.loop.call_later(_LINGER_S, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_timer = _cancelled(self._head_timer)
            self._linger_timer = _cancelled(self._linger_timer)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """The answer to bytes that are no HTTP request, in the shape of all our errors.

            An answer that is under way already is cut off: the bytes that broke the rules are behind its request.
            """
            head_only = False
            if self.cycle is not None:
                head_only = not self.cycle.response_complete and self.cycle.scope["method"] == "HEAD"
                # Whoever still works on that request would answer into a connection that has had its last word, and
                # leave a traceback in the log for every stranger who likes to see one.
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()
                return
            body = dumps(error_body(RequestError(msg, code="invalid_http")))
            headers: list[tuple[Any, Any]] = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                (b"x-request-id", secrets.token_hex(16).encode()),
            ]
            parts = () if head_only else (h11.Data(data=body),)
            for event in (h11.Response(status_code=400, headers=headers), *parts, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return BoundedProtocol


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer that may not be there, and return what to remember of it: nothing."""
    if timer is not None:
        timer.cancel()
    return None
