"""How long does a step's worth of bytes take to a neighbour and back?

Two processes on this machine, 16 KiB there and back (four rows of width 1024 in float32), both ends mutually
authenticated TLS 1.3. Our connection (frames, typed messages, lanes, heartbeats) against a bare asyncio TLS echo of
the same bytes (BufferedProtocol, nothing parsed), in turns within one run so that both meet the same machine. A third
figure is ours while 2 MiB journals flow back on the same connection.

    python benchmarks/transport_roundtrip.py [--rounds 20] [--loop uvloop|asyncio] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path

import numpy as np
import uvloop

from shoal.errors import PeerLost
from shoal.net.identity import NodeIdentity, create_ca, issue_node
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address, Conn
from shoal.wire import tensors
from shoal.wire.messages import Close, Journal, Result, Step, StepItem

PAYLOAD_BYTES = 16 * 1024
PINGS_PER_ROUND = 100
SESSION = bytes(16)
JOURNAL_ROWS = 512
"""2 MiB at width 1024."""


class BareEcho(asyncio.BufferedProtocol):
    """Sends back every PAYLOAD_BYTES it received; on the client's side, wakes whoever waits for them."""

    def __init__(self, *, replies: bool) -> None:
        self._buffer = memoryview(bytearray(PAYLOAD_BYTES))
        self._filled = 0
        self._replies = replies
        self.received: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < PAYLOAD_BYTES:
            return
        self._filled = 0
        if self._replies:
            self.transport.write(bytes(self._buffer))  # type: ignore[attr-defined]
        elif self.received is not None:
            self.received.set_result(None)


async def serve(directory: Path) -> None:
    """The neighbour: echoes over both, and sends journals from a Step of another session until told to stop."""
    identity = NodeIdentity.load(directory)

    async def echo(conn: Conn) -> None:
        bulk: asyncio.Task[None] | None = None
        try:
            while True:
                message, body = await conn.receive()
                if isinstance(message, Step):
                    await conn.send(Result(message.items, message.tensor), body)
                elif isinstance(message, Close) and bulk is None:
                    bulk = asyncio.create_task(send_journals(conn))
                elif isinstance(message, Close) and bulk is not None:
                    bulk.cancel()
                    bulk = None
        finally:
            if bulk is not None:
                bulk.cancel()

    listener = await TlsTransport(identity).listen("tcp://127.0.0.1:0", echo)
    bare = await asyncio.get_running_loop().create_server(
        lambda: BareEcho(replies=True), "127.0.0.1", 0, ssl=identity.server_context()
    )
    print(listener.address, bare.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    bare.close()
    await listener.close()


async def send_journals(conn: Conn) -> None:
    tensor, body = tensors.encode(np.ones((JOURNAL_ROWS, 1024), np.float32), "f32")
    while True:
        await conn.send(Journal(0, [StepItem(SESSION, 0, JOURNAL_ROWS)], tensor), body)


async def measure(rounds: int, loop_name: str) -> dict[str, float | str]:
    ca = create_ca("bench")
    with tempfile.TemporaryDirectory() as directory:
        issue_node(ca, "server").save(Path(directory))
        neighbour = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--serve", directory, "--loop", loop_name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert neighbour.stdout is not None
        assert neighbour.stdin is not None
        address, bare_port = (await neighbour.stdout.readline()).decode().split()
        try:
            return await compare(issue_node(ca, "gateway"), address, int(bare_port), rounds)
        finally:
            neighbour.stdin.close()
            await neighbour.wait()


async def compare(identity: NodeIdentity, address: str, bare_port: int, rounds: int) -> dict[str, float | str]:
    loop = asyncio.get_running_loop()
    conn = await TlsTransport(identity).dial([address])
    transport, bare = await loop.create_connection(
        lambda: BareEcho(replies=False), Address.parse(address).host, bare_port, ssl=identity.client_context()
    )
    values = np.ones((4, 1024), np.float32)
    tensor, buffers = tensors.encode(values, "f32")
    payload = b"".join(buffers)
    assert len(payload) == PAYLOAD_BYTES

    async def ours() -> None:
        await conn.send(Step([StepItem(SESSION, 0, 4)], tensor), payload)
        while not isinstance((await conn.receive())[0], Result):
            pass

    async def plain() -> None:
        bare.received = loop.create_future()
        transport.write(payload)
        await bare.received

    times: dict[str, list[float]] = {"ours": [], "bare": [], "ours_with_journals": []}
    await timed(ours)
    await timed(plain)
    for _ in range(rounds):
        times["ours"] += await timed(ours)
        times["bare"] += await timed(plain)
    await conn.send(Close([SESSION]))
    for _ in range(rounds):
        times["ours_with_journals"] += await timed(ours, pause_s=0.002)
    transport.close()
    try:
        await conn.close()
    except PeerLost:
        print("the neighbour left early", file=sys.stderr)
    result: dict[str, float | str] = {"loop": type(loop).__module__}
    for name, values_s in times.items():
        result[f"{name}_p50_ms"] = round(1000 * statistics.median(values_s), 3)
        result[f"{name}_p99_ms"] = round(1000 * statistics.quantiles(values_s, n=100)[98], 3)
    result["ratio_p50"] = round(statistics.median(times["ours"]) / statistics.median(times["bare"]), 2)
    return result


async def timed(trip: Callable[[], Awaitable[None]], *, pause_s: float = 0.0) -> list[float]:
    times = []
    for _ in range(PINGS_PER_ROUND):
        started = time.perf_counter()
        await trip()
        times.append(time.perf_counter() - started)
        if pause_s:
            await asyncio.sleep(pause_s)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of 100 round trips each (default 20)")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    def run(main: Coroutine[None, None, dict[str, float | str] | None]) -> dict[str, float | str] | None:
        return uvloop.run(main) if args.loop == "uvloop" else asyncio.run(main)

    if args.serve is not None:
        run(serve(args.serve))
        return
    result = run(measure(args.rounds, args.loop))
    assert result is not None
    if args.json:
        print(json.dumps(result))
        return
    for name in ("bare", "ours", "ours_with_journals"):
        print(f"{name:20} p50 {result[name + '_p50_ms']:7.3f} ms   p99 {result[name + '_p99_ms']:7.3f} ms")
    print(f"ours / bare, p50     {result['ratio_p50']}")


if __name__ == "__main__":
    main()
