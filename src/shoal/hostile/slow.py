"""A thousand connections that say next to nothing, and how long other users wait meanwhile.

Calm and attack take turns several times, and the pooled 95th percentiles are compared, so that a busy machine hits
both. The attackers are in another process than the victim, and drip: a byte now and then, a new connection for each one
that was closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.net.identity import NodeIdentity, create_ca, issue_node
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address
from shoal.wire.messages import Sync

SLOW = 1_000
ROUNDS = 4
SAMPLES = 150
"""Requests of each kind in each phase."""
SETTLE_S = 1.0
DRIP_S = 1.0
_HTTP_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: " + b"a" * 400
_TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64
"""The beginning of a handshake that never comes to its end."""


@dataclass(frozen=True, slots=True)
class Waits:
    """95th percentiles in seconds, calm and under attack, of one kind of request."""

    what: str
    calm_s: float
    attacked_s: float
    slow: int
    """Connections that the attackers held, on average."""

    @property
    def ratio(self) -> float:
        return self.attacked_s / self.calm_s


class Attackers:
    """Keeps `count` connections to one port, each of which says one byte in `DRIP_S`."""

    def __init__(self, port: int, opening: bytes, count: int) -> None:
        self._port, self._opening, self._count = port, opening, count
        self._tasks: list[asyncio.Task[None]] = []
        self._open = 0
        self.seen: list[int] = []

    async def __aenter__(self) -> Attackers:
        self._tasks = [asyncio.create_task(self._drip(number)) for number in range(self._count)]
        deadline = time.monotonic() + 20
        while self._open < 0.9 * self._count and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def look(self) -> None:
        self.seen.append(self._open)

    async def _drip(self, number: int) -> None:
        rng = random.Random(number)
        await asyncio.sleep(rng.random() * 0.5)
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                await asyncio.sleep(DRIP_S)
                continue
            self._open += 1
            try:
                await self._hold(reader, writer, rng)
            finally:
                self._open -= 1
                writer.transport.abort()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
        ended = asyncio.create_task(reader.read(65_536))
        try:
            for byte in self._opening:
                writer.write(bytes([byte]))
                done, _ = await asyncio.wait([ended], timeout=DRIP_S * rng.uniform(0.5, 1.5))
                if done:
                    return
        except ConnectionError:
            pass
        finally:
            ended.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await ended


@contextlib.asynccontextmanager
async def victim(identity: NodeIdentity) -> AsyncIterator[dict[str, Any]]:
    """A gateway and a swarm port in a process of their own."""
    with tempfile.TemporaryDirectory(prefix="shoal-slow-") as folder:
        identity.save(Path(folder))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "shoal.hostile.victim", folder),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        if process.stdout is None or process.stdin is None:
            raise ShoalError("The attacked process has no pipes.")
        try:
            line = await process.stdout.readline()
            if not line:
                raise ShoalError("The attacked process did not start.", hint="Its own words are above.")
            yield json.loads(line)
        finally:
            process.stdin.close()
            try:
                async with asyncio.timeout(5):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def measure(slow: int = SLOW, *, rounds: int = ROUNDS, samples: int = SAMPLES) -> list[Waits]:
    """What users of the HTTP port and members on the swarm port wait, calm and while `slow` connections dawdle.

    Raises ShoalError when this process may not open that many files.
    """
    allow_files(slow + 256)
    authority = create_ca("slow")
    async with victim(issue_node(authority, "gateway")) as told:
        found = [await _http(told["http"], told["key"], slow, rounds, samples)]
        found += await _swarm(told["swarm"], issue_node(authority, "client"), slow, rounds, samples)
    return found


def allow_files(count: int) -> None:
    """Raise the soft limit of open files if it is lower. Raises ShoalError when the hard one is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ShoalError(
            f"{count} files must be open at once; this process may open {hard}.", hint="Raise it: ulimit -Hn 65536"
        )
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


async def _compare(
    what: str,
    ask: Callable[[], Awaitable[None]],
    attackers: Callable[[], Attackers],
    rounds: int,
    samples: int,
) -> Waits:
    calm: list[float] = []
    attacked: list[float] = []
    held: list[int] = []
    for _ in range(20):
        await ask()  # caches and connections are warm
    for _ in range(rounds):
        calm += [await _timed(ask) for _ in range(samples)]
        async with attackers() as many:
            await asyncio.sleep(SETTLE_S)
            for _ in range(samples):
                attacked.append(await _timed(ask))
                many.look()
            held += many.seen
        await asyncio.sleep(SETTLE_S)
    return Waits(what, _p95(calm), _p95(attacked), round(statistics.mean(held)))


async def _timed(ask: Callable[[], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await ask()
    return time.perf_counter() - start


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


async def _http(port: int, key: str, slow: int, rounds: int, samples: int) -> Waits:
    body = json.dumps({"model": "plain", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode()

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        answer = await reader.read(-1)
        writer.close()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ShoalError(f"The gateway answered {answer[:80]!r} while slow connections were open.")

    return await _compare("HTTP request", ask, lambda: Attackers(port, _HTTP_HEAD, slow), rounds, samples)


async def _swarm(address: str, identity: NodeIdentity, slow: int, rounds: int, samples: int) -> list[Waits]:
    transport = TlsTransport(identity)
    port = Address.parse(address).port

    def attackers() -> Attackers:
        return Attackers(port, _TLS_HELLO, slow)

    conn = await transport.dial([address])
    opening = Sync({}, [], 2)

    async def ask() -> None:
        await conn.send(opening)
        await conn.receive()

    async def join() -> None:
        joined = await transport.dial([address], timeout_s=30)
        joined.abort()

    try:
        return [
            await _compare("member's round trip", ask, attackers, rounds, samples),
            await _compare("member's new connection", join, attackers, rounds, max(1, samples // 5)),
        ]
    finally:
        await conn.close()
