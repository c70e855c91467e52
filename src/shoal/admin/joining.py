"""The open door: a TLS listener that anybody may speak to, and that answers two small questions.

Everything a stranger can take here is bounded: connections, time, bytes, attempts.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from shoal.admin.limits import Attempts
from shoal.errors import ProtocolError
from shoal.net.tls import accepted, bind
from shoal.net.transport import Address
from shoal.wire import enrolment
from shoal.wire.enrolment import Answer, Question

MAX_CONNECTIONS = 64
MAX_CONNECTIONS_PER_ADDRESS = 16
HANDSHAKES_AT_ONCE = 200
HANDSHAKE_EVERY_S = 0.02
"""Of all addresses together. A handshake costs 2-3 ms of a process that may carry people's sessions."""
CONVERSATION_S = 10.0
"""From the accepted socket to the end of the answer."""
_log = logging.getLogger(__name__)


class JoinListener:
    """Answers one question per connection. `ask(question, address)` knows the answers."""

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        context: Callable[[], ssl.SSLContext],
        ask: Callable[[Question, str], Awaitable[Answer]],
        *,
        connections: Attempts,
    ) -> None:
        self.address = Address(host, sock.getsockname()[1])
        self._sock = sock
        self._context = context
        self._ask = ask
        self._connections = connections
        self._everybody = Attempts(burst=HANDSHAKES_AT_ONCE, every_s=HANDSHAKE_EVERY_S)
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._here: Counter[str] = Counter()
        self._conversations: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())

    @classmethod
    async def start(
        cls,
        address: Address,
        context: Callable[[], ssl.SSLContext],
        ask: Callable[[Question, str], Awaitable[Answer]],
        *,
        connections: Attempts,
    ) -> JoinListener:
        """Listen at `address`. `context` is called for every connection, so certificates may change. Raises UsageError
        when the address cannot be had."""
        return cls(await bind(address), address.host, context, ask, connections=connections)

    async def close(self) -> None:
        """Stop listening and end every conversation. Raises what the listener died of, if it did."""
        for task in (self._accepting, *self._conversations):
            task.cancel()
        ended = await asyncio.gather(self._accepting, *self._conversations, return_exceptions=True)
        self._sock.close()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _accept(self) -> None:
        while True:
            await self._places.acquire()
            try:
                sock, (host, *_) = await accepted(self._sock)
            except BaseException:
                self._places.release()
                raise
            now = time.monotonic()
            crowded = self._here[host] >= MAX_CONNECTIONS_PER_ADDRESS or self._everybody.wait_s("", now) > 0
            if crowded or self._connections.wait_s(host, now) > 0:
                # Without a word: a handshake would cost more than the attempt is worth.
                sock.close()
                self._places.release()
                continue
            self._everybody.charge("", now)
            self._connections.charge(host, now)
            self._here[host] += 1
            task = asyncio.create_task(self._converse(sock, host))
            self._conversations.add(task)
            task.add_done_callback(self._conversations.discard)

    async def _converse(self, sock: socket.socket, host: str) -> None:
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(CONVERSATION_S):
                reader = asyncio.StreamReader(limit=enrolment.MAX_MESSAGE_BYTES)
                protocol = asyncio.StreamReaderProtocol(reader)
                loop = asyncio.get_running_loop()
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol, sock, ssl=self._context(), ssl_handshake_timeout=CONVERSATION_S
                )
                writer = asyncio.StreamWriter(transport, protocol, reader, loop)
                size = enrolment.length(await reader.readexactly(enrolment.LENGTH_BYTES))
                question = enrolment.question(await reader.readexactly(size))
                writer.write(enrolment.frame(await self._ask(question, host)))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, EOFError, ProtocolError) as error:
            # How conversations with strangers end. Their bytes are not repeated in the log.
            _log.debug("a conversation with %s ended: %s", host, type(error).__name__)
        finally:
            if transport is not None:
                transport.abort()
            else:
                sock.close()
            self._here[host] -= 1
            if not self._here[host]:
                del self._here[host]
            self._places.release()
