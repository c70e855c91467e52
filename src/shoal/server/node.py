"""One machine's block server: connections in, sessions decided by swarm.serving, rows computed by compute.engine.

Two threads. The event loop owns the network and all decisions and is never behind compute, so pings are answered
during a long prefill. The compute thread owns the engine; batches and cache changes reach it in order.

    frame -> cut -> Serving.on_steps -> next_batch --> compute thread: decode, engine.run, encode
                                                       -> Serving.on_computed -> push to next / result / journal
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from shoal.compute import engine as compute
from shoal.compute.activations import to_numpy, to_torch
from shoal.compute.facts import ModelFacts, describe
from shoal.errors import NotFinite, ProtocolError, ShoalError
from shoal.net.directory import LEASE_S, Directory
from shoal.net.identity import NodeIdentity
from shoal.net.link import Link
from shoal.net.outbox import Outbox
from shoal.net.transport import Conn, Transport
from shoal.net.worker import Worker
from shoal.server import probe
from shoal.server.loader import Loaded, load
from shoal.spec.ids import BlockRange
from shoal.swarm import serving as decide
from shoal.swarm.estimates import Speed
from shoal.wire import messages as msg
from shoal.wire import rows as wire_rows
from shoal.wire import tensors
from shoal.wire.encoder import Encoder

log = logging.getLogger("shoal.server")

HOUSEKEEPING_S = 0.5
REMEASURE_S = 20.0
"""A replica that nobody asks measures itself this often, or it would keep the speed of the crowded moment it started in
and be avoided for ever. A few steps: thousandths of its time."""
_PROBE_ROWS = 64
_PROBE_STEPS = 4
_BATCH_ERRORS = (ShoalError, RuntimeError, ValueError, LookupError, MemoryError)
"""What computing a batch may raise because of its sessions' numbers or sizes."""
_Output = wire_rows.Rows | BaseException
"""Of one session's part of a batch: the rows to send, or why there are none."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What one block server is started with."""

    model_dir: Path
    listen: str
    """Address to listen on, "tcp://127.0.0.1:0" for any free port."""
    seeds: tuple[str, ...]
    blocks: BlockRange | None = None
    """None: wait until the swarm's planner assigns some."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    memory_bytes: int = 4 << 30
    cache_tokens: int | None = None
    """None: as much as fits into memory_bytes beside the weights."""
    labels: tuple[str, ...] = ()
    """Those of this node's certificate; nobody believes others."""
    exact: bool = False
    """fp32 decode rows run in tiles, so that a session's numbers do not depend on its company."""
    threads: int = 1
    drain_s: float = 20.0
    """How long a leaving server waits for drivers to move their sessions."""


class BlockServer:
    """A running server. `run` returns after `stop` (drained) or raises what went wrong."""

    def __init__(self, config: ServerConfig, identity: NodeIdentity, transport: Transport) -> None:
        self._config = config
        self._node = identity.peer.node
        self._transport = transport
        self._directory = Directory(identity)
        self._device = torch.device(config.device)
        self._facts: ModelFacts | None = None
        self._worker = Worker("compute", partial(torch.set_num_threads, config.threads))
        self._engine: compute.BlockEngine | None = None
        self._serving: decide.Serving | None = None
        self._speed = Speed(0.0, 0.0)
        self._encoder = Encoder()
        self._assigned: asyncio.Future[msg.Assign] = asyncio.get_running_loop().create_future()
        self._running: list[decide.Work] = []
        """The batch in the compute thread now."""
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = asyncio.Event()
        self._drivers: dict[str, Outbox] = {}
        self._pushes: dict[str, Link] = {}

    def stop(self) -> None:
        """Leave politely: refuse new sessions, ask drivers to move, end when they have or after drain_s."""
        self._stopping.set()

    async def run(self, *, on_online: Callable[[BlockRange], None] = lambda blocks: None) -> None:
        """Join the swarm, get blocks, load them, serve until stopped."""
        listener = await self._transport.listen(self._config.listen, self._on_conn)
        gossip = asyncio.create_task(
            self._directory.rounds(self._transport, self._config.seeds, self._on_seed_message), name="gossip"
        )
        try:
            await self._until_stopped(self._become_online(listener.address, on_online), gossip)
            if self._serving is not None:
                await self._until_stopped(self._serve(), gossip)
                await self._drain()
        finally:
            gossip.cancel()
            await asyncio.gather(gossip, return_exceptions=True)
            for link in list(self._pushes.values()):
                await link.close()
            await listener.close()
            self._worker.close()

    async def _until_stopped(self, work: Coroutine[Any, Any, None], gossip: asyncio.Task[None]) -> None:
        """Run `work` until it ends, the server is stopped, or gossip fails (which raises)."""
        main = asyncio.create_task(work)
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([main, stop, gossip], return_when=asyncio.FIRST_COMPLETED)
            if gossip.done():
                gossip.result()
            if main.done():
                main.result()
        finally:
            main.cancel()
            stop.cancel()
            await asyncio.gather(main, stop, return_exceptions=True)

    # --- coming up -------------------------------------------------------------------------------------------

    async def _become_online(self, address: str, on_online: Callable[[BlockRange], None]) -> None:
        config = self._config
        facts = self._facts = await self._worker.call(describe, config.model_dir)
        rates = await self._worker.call(probe.measure, config.dtype, self._device)
        decode_ms, prefill_ms = rates.block_ms(sum(facts.block_params) // facts.num_blocks)
        self._directory.publish(
            msg.Record(
                node=self._node,
                incarnation=Directory.incarnation(),
                version=0,
                lease_s=LEASE_S,
                role="server",
                state="joining",
                addresses=[address],
                span=None,
                pid=os.getpid(),
                dtype=str(config.dtype).removeprefix("torch."),  # type: ignore[arg-type]
                decode_ms_per_block=decode_ms,
                prefill_ms_per_block_token=prefill_ms,
                memory_bytes=config.memory_bytes,
                cache_tokens_free=0,
                cache_tokens_total=0,
                queue_rows=0,
                sessions=0,
                labels=list(config.labels),
            )
        )
        blocks = config.blocks
        if blocks is None:
            span = (await self._assigned).span
            blocks = BlockRange(span.start, span.end)
        span = msg.Span(facts.name, blocks.start, blocks.end)
        self._directory.update(state="loading", span=span)
        log.info("loading blocks %s of %s", blocks, facts.name)
        loaded: Loaded = await self._worker.call(self._load, blocks)
        self._engine = loaded.engine
        self._serving = decide.Serving(decide.ServingConfig(facts.name, blocks, loaded.cache_tokens))
        self._speed = Speed(decode_ms, prefill_ms)
        await self._worker.call(self._measure_blocks, blocks, _PROBE_ROWS)
        self._publish_load(state="online")
        log.info(
            "online: blocks %s, %d bytes read, cache for %d tokens, %s",
            blocks,
            loaded.bytes_read,
            loaded.cache_tokens,
            loaded.engine.packed_reason,
        )
        on_online(blocks)

    def _load(self, blocks: BlockRange) -> Loaded:
        config = self._config
        return load(
            config.model_dir,
            blocks,
            dtype=config.dtype,
            device=self._device,
            memory_bytes=config.memory_bytes,
            cache_tokens=config.cache_tokens,
            exact=config.exact and config.dtype == torch.float32,
        )

    def _measure_blocks(self, blocks: BlockRange, prompt_rows: int = 0) -> None:
        """Run a few random rows through the loaded blocks: warm kernels, and a speed that no traffic has shown yet.

        The best of a few decode steps counts: while a swarm starts, all its processes crowd the machine. With
        `prompt_rows`, a prompt of that many rows comes first.
        """
        assert self._engine is not None
        assert self._facts is not None
        session = b"\0" * 16
        position = 0
        self._engine.open(session, blocks, 128)
        best_ms: dict[int, float] = {}
        for rows in ([prompt_rows] if prompt_rows else []) + [1] * _PROBE_STEPS:
            hidden = torch.randn(rows, self._facts.hidden_size, dtype=self._config.dtype, device=self._device)
            start = time.perf_counter()
            self._engine.run([compute.Work(session, position, rows)], hidden)
            took_ms = (time.perf_counter() - start) * 1e3
            best_ms[rows] = min(took_ms, best_ms.get(rows, took_ms))
            position += rows
        self._engine.close(session)
        for rows, took_ms in best_ms.items():
            self._speed.measured(rows=rows, blocks=len(blocks), took_ms=took_ms)

    def _publish_load(self, **fields: object) -> None:
        serving = self._serving
        assert serving is not None
        self._directory.update(
            decode_ms_per_block=self._speed.decode_ms_per_block,
            prefill_ms_per_block_token=self._speed.prefill_ms_per_block_token,
            cache_tokens_free=serving.pool.free_tokens,
            cache_tokens_total=serving.pool.total_tokens,
            queue_rows=serving.queue_rows,
            sessions=serving.sessions,
            wire_error=self._encoder.error,
            **fields,
        )

    # --- messages in -----------------------------------------------------------------------------------------

    def _on_seed_message(self, node: str, message: msg.Message, body: memoryview) -> None:
        if isinstance(message, msg.Assign) and not self._assigned.done():
            self._assigned.set_result(message)

    async def _on_conn(self, conn: Conn) -> None:
        """Serve one incoming connection, a driver's or an upstream server's, until it ends."""
        node = conn.peer.node
        outbox = Outbox(conn)
        drives = False
        try:
            while True:
                message, body = await conn.receive()
                if isinstance(message, msg.Sync):
                    for answer in self._directory.on_sync(message, node):
                        outbox.put(answer)
                    continue
                if self._serving is None:
                    continue
                if conn.peer.role in ("client", "gateway") and not drives:
                    # Not from the start: who only gossips over this connection may drive sessions over another one.
                    drives = True
                    if node in self._drivers:
                        # A driver keeps one connection to us: it gave the old one up, though that news is on its way.
                        self._perform(self._serving.on_driver_lost(node, time.monotonic()))
                    self._drivers[node] = outbox
                elif drives and self._drivers.get(node) is not outbox:
                    return  # what still came over a connection that was given up would open sessions nobody ends
                self._perform(self._decide(self._serving, node, message, body))
        finally:
            await outbox.close()
            if self._drivers.get(node) is outbox:
                del self._drivers[node]
                if self._serving is not None:
                    self._perform(self._serving.on_driver_lost(node, time.monotonic()))

    def _decide(
        self, serving: decide.Serving, node: str, message: msg.Message, body: memoryview
    ) -> Sequence[decide.Action]:
        now = time.monotonic()
        match message:
            case msg.Step(items, tensor):
                actions = serving.on_steps(wire_rows.cut(items, tensor, body), now)
                self._kick()
                return actions
            case msg.Open():
                return serving.on_open(node, message, now)
            case msg.Relink():
                return serving.on_relink(node, message, now)
            case msg.Close(sessions):
                return serving.on_close(node, sessions, now)
        return ()

    # --- actions out -----------------------------------------------------------------------------------------

    def _perform(self, actions: Sequence[decide.Action]) -> None:
        for action in actions:
            match action:
                case decide.Emit():
                    self._emit(action)
                case decide.Reply(node, message):
                    if (outbox := self._drivers.get(node)) is not None:
                        outbox.put(message)
                case decide.OpenCache(session, blocks, max_tokens):
                    self._worker.post(self._open_cache, session, blocks, max_tokens)
                case decide.DropCache(session):
                    self._worker.post(self._drop_cache, session)

    def _emit(self, emit: decide.Emit) -> None:
        items = [item for item, _ in emit.items]
        tensor, buffers = wire_rows.join([rows for _, rows in emit.items])
        if emit.hop is not None:
            self._push_link(emit.hop).send(msg.Step(items, tensor), buffers)
            return
        outbox = self._drivers.get(emit.node)
        if outbox is None:
            return
        if emit.journal_block is None:
            outbox.put(msg.Result(items, tensor), buffers)
        else:
            outbox.put(msg.Journal(emit.journal_block, items, tensor), buffers)

    def _push_link(self, hop: msg.Hop) -> Link:
        link = self._pushes.get(hop.node)
        if link is None:
            link = self._pushes[hop.node] = Link(
                self._transport,
                hop.node,
                hop.addresses,
                on_message=lambda node, message, body: None,  # a next server answers drivers, never us
                on_lost=self._on_push_lost,
            )
        return link

    def _on_push_lost(self, node: str, cause: str, text: str) -> None:
        log.info("push link to %s lost: %s", node[:8], text)
        self._pushes.pop(node, None)
        if self._serving is not None:
            self._perform(self._serving.on_push_lost(node))

    def _open_cache(self, session: bytes, blocks: BlockRange, max_tokens: int) -> None:
        assert self._engine is not None
        self._engine.open(session, blocks, max_tokens)

    def _drop_cache(self, session: bytes) -> None:
        assert self._engine is not None
        self._engine.close(session)

    # --- computing -------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Serve until cancelled; raises what no session can be blamed for."""
        self._kick()
        housekeeping = asyncio.create_task(self._housekeeping(), name="housekeeping")
        try:
            await asyncio.wait([housekeeping, self._broken], return_when=asyncio.FIRST_COMPLETED)
            for ended in (housekeeping, self._broken):
                if ended.done():
                    ended.result()
        finally:
            housekeeping.cancel()
            await asyncio.gather(housekeeping, return_exceptions=True)

    def _kick(self) -> None:
        """Start the next batch if the compute thread is free and something waits."""
        serving = self._serving
        if serving is None or self._running:
            return
        self._running = serving.next_batch(time.monotonic())
        if self._running:
            self._worker.submit(self._run, self._running, done=self._on_batch)

    def _on_batch(self, result: tuple[list[_Output], float] | None, error: BaseException | None) -> None:
        """A batch ended: start the next one, then send this one's outputs."""
        serving = self._serving
        assert serving is not None
        works, self._running = self._running, []
        now = time.monotonic()
        if result is not None:
            outputs, took_ms = result
            done = [(work, out) for work, out in zip(works, outputs, strict=True) if isinstance(out, wire_rows.Rows)]
            actions = serving.on_computed([work for work, _ in done], [out for _, out in done], now)
            self._kick()  # before sending: the compute thread must not wait for the network
            self._perform(actions)
            for work, out in zip(works, outputs, strict=True):
                if isinstance(out, BaseException):
                    # Its numbers went wrong or memory ran out: this session moves elsewhere, the others go on.
                    log.error("a step of session %s failed", work.session.hex()[:8], exc_info=out)
                    code: Literal["failed", "not_finite"] = "not_finite" if isinstance(out, NotFinite) else "failed"
                    self._perform(serving.on_failed([work], _public(out), now, code=code))
            rows = sum(work.item.rows for work in works)
            self._speed.measured(rows=rows, blocks=len(serving.config.blocks), took_ms=took_ms)
        elif not self._broken.done():
            self._broken.set_exception(error or RuntimeError("a batch ended without a result"))

    def _run(self, works: Sequence[decide.Work]) -> tuple[list[_Output], float]:
        """In the compute thread: each session's output, or why there is none. One that fails takes no other along."""
        assert self._engine is not None
        start = time.perf_counter()
        outputs: list[_Output]
        if self._engine.packed and len(works) > 1:
            try:
                outputs = [*self._compute(works)]
            except _BATCH_ERRORS:
                # Rows of a packed step are stored by position, so running them again does no harm.
                outputs = [self._alone(work) for work in works]
        else:
            outputs = [self._alone(work) for work in works]
        return outputs, (time.perf_counter() - start) * 1e3

    def _alone(self, work: decide.Work) -> _Output:
        assert self._engine is not None
        try:
            if self._engine.packed:
                self._engine.truncate(work.session, work.item.position)
            return self._compute([work])[0]
        except _BATCH_ERRORS as error:
            return error

    def _compute(self, works: Sequence[decide.Work]) -> list[wire_rows.Rows]:
        """Received rows -> engine -> rows to send, in the format they came in."""
        assert self._engine is not None
        arrays = [self._received(work) for work in works]
        hidden = [to_torch(array, self._config.dtype, self._device) for array in arrays]
        batch = [compute.Work(work.session, work.item.position, work.item.rows) for work in works]
        out = self._engine.run(batch, hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        array = to_numpy(out)
        encoded: dict[msg.WireType, wire_rows.Rows] = {}
        outputs = []
        at = 0
        for work in works:
            kind = work.payload.dtype
            if kind not in encoded:
                encoded[kind] = self._encoder.encode(array, kind)
            outputs.append(encoded[kind][at : at + work.item.rows])
            at += work.item.rows
        return outputs

    def _received(self, work: decide.Work) -> np.ndarray[Any, Any]:
        """Raises ProtocolError or NotFinite for rows that do not fit the session or the model."""
        tensor = work.payload.tensor
        assert self._facts is not None
        if (tensor.dtype, tensor.width) != (work.wire, self._facts.hidden_size):
            raise ProtocolError(
                f"Rows of {tensor.width} values came as {tensor.dtype};"
                f" agreed were {self._facts.hidden_size} as {work.wire}."
            )
        return tensors.decode_native(tensor, work.payload.data)

    async def _housekeeping(self) -> None:
        serving = self._serving
        assert serving is not None
        measured_at = time.monotonic()
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            now = time.monotonic()
            self._perform(serving.expire(now))
            if serving.sessions:
                measured_at = now  # real traffic tells the speed
            elif now - measured_at > REMEASURE_S:
                measured_at = now
                self._worker.post(self._measure_blocks, serving.config.blocks)
            self._publish_load()

    # --- leaving ---------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Say goodbye: drivers rebuild their sessions elsewhere while we still finish what is under way."""
        serving = self._serving
        assert serving is not None
        self._directory.update(state="draining")
        self._perform(serving.drain())
        deadline = time.monotonic() + self._config.drain_s
        while serving.sessions and time.monotonic() < deadline and not self._broken.done():
            await asyncio.sleep(0.02)
        self._directory.update(state="gone")
        await asyncio.sleep(0.05)  # one turn of gossip, so that others need not wait for the lease to run out


def _public(error: BaseException) -> str:
    """What a driver may know: the kind of failure, no paths and no internals."""
    return (
        str(error)
        if isinstance(error, NotFinite | ProtocolError)
        else f"Computing failed on this server ({type(error).__name__})."
    )
