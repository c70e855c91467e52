"""One machine's block server: connections in, sessions decided by swarm.serving, rows computed by compute.engine.

Two threads. The event loop owns the network and all decisions and is never behind compute, so pings are answered
during a long prefill. The compute thread owns the engine; batches and cache changes reach it in order.

    frame -> cut -> Serving.on_steps -> next_batch --> compute thread: decode, engine.run, encode
                                                       -> Serving.on_computed -> push to next / result / journal

Its life: join, take a place (given, assigned by a planner, or chosen by swarm.balance), serve. A free server leaves its
place for a better one, a borrowed machine when its owner works (swarm.neighbour); both hand their sessions over first.

    joining --> loading --> online --leave--> draining --> loading, resting or gone
                               ^---- sessions that cannot move stay: no move ----+
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
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
from shoal.net.transport import Address, Conn, Transport
from shoal.net.worker import Worker
from shoal.server import probe
from shoal.server.loader import Loaded, load
from shoal.server.neighbour import Machine
from shoal.spec.ids import BlockRange
from shoal.swarm import balance
from shoal.swarm import serving as decide
from shoal.swarm.estimates import Share, Speed
from shoal.swarm.neighbour import Neighbour, NeighbourConfig
from shoal.swarm.placement import ModelNeeds
from shoal.swarm.threads import ThreadTuner
from shoal.wire import messages as msg
from shoal.wire import rows as wire_rows
from shoal.wire import tensors
from shoal.wire.encoder import Encoder

log = logging.getLogger("shoal.server")

HOUSEKEEPING_S = 0.5
REMEASURE_S = 20.0
"""A replica that nobody asks measures itself this often, or it would keep the speed of the crowded moment it started in
and be avoided for ever. A few steps: thousandths of its time."""
LOOK_S = 1.0
"""How often a server looks whether it should be elsewhere, and what its machine's owner does."""
MEET_S = 1.0
"""How long one that joins waits for word of others before it takes itself for the first."""
SETTLE_S = 2.5
"""How long those who join together wait for each other's records before they choose, in turn. More than twice a round
of gossip, in which word of one comes to the other: so either one knows of the other before it chooses, or the other
knows what was chosen. (Should both take the same nevertheless, one moves: see swarm.balance.)"""
PATIENT_DRAIN_S = 900.0
"""A server that an admin drains gives its sessions this long; a stop signal gives them drain_s."""
PLANNED_CACHE_TOKENS = 4096
"""Cache that a chosen span must leave room for, where the model's context is longer and nobody said how much."""
_TUNE_S = 2.0
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
    threads: int | None = 1
    """Threads of the compute thread's numerical libraries; None: as many as measurably help."""
    drain_s: float = 20.0
    """How long a leaving server waits for drivers to move their sessions."""
    advertise: str | None = None
    """Address at which others reach it; None: where it listens."""
    free: bool = False
    """It chooses its blocks itself (with `blocks`: those only to begin with), and leaves them for better ones. Without
    it and without `blocks`, the swarm's planner assigns some."""
    own_directory: bool = False
    """The model directory is this machine's own copy: before it is served, it is compared with what the swarm has."""
    idle_only: bool = False
    """The machine is borrowed: work only while nobody else uses it."""
    balance: balance.BalanceConfig = field(default_factory=balance.BalanceConfig)
    neighbour: NeighbourConfig = field(default_factory=NeighbourConfig)


@dataclass(frozen=True, slots=True)
class _Leave:
    """Why and for what a server gives up its place."""

    reason: str
    to: balance.Choice | None
    """Where it goes; None: it rests."""
    must: bool
    """Also when sessions have nowhere to go."""


class BlockServer:
    """A running server. `run` returns after `stop` (drained) or raises what went wrong."""

    def __init__(self, config: ServerConfig, identity: NodeIdentity, transport: Transport) -> None:
        self._config = config
        self._node = identity.peer.node
        self._transport = transport
        self._directory = Directory(identity)
        self._device = torch.device(config.device)
        self._facts: ModelFacts | None = None
        self._threads = config.threads or 1
        self._tuner = ThreadTuner(processors()) if config.threads is None else None
        self._worker = Worker("compute", partial(torch.set_num_threads, self._threads))
        self._engine: compute.BlockEngine | None = None
        self._serving: decide.Serving | None = None
        self._speed = Speed(0.0, 0.0)
        self._encoder = Encoder()
        self._assigned: asyncio.Future[msg.Assign] = asyncio.get_running_loop().create_future()
        self._running: list[decide.Work] = []
        """The batch in the compute thread now."""
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = asyncio.Event()
        self._leave_by: float | None = None
        self._think_at = 0.0
        self._begun = False
        """It has had a place before."""
        self._busy = Share()
        self._rebalancer = balance.Rebalancer(self._node, config.balance) if config.free else None
        self._machine = Machine() if config.idle_only else None
        self._neighbour = Neighbour(config.neighbour)
        self._drivers: dict[str, Outbox] = {}
        self._pushes: dict[str, Link] = {}

    @property
    def record(self) -> msg.Record:
        """What the registry says of this server. Raises ValueError before it has introduced itself."""
        if self._directory.record is None:
            raise ValueError("nothing was published yet")
        return self._directory.record

    def stop(self) -> None:
        """Leave politely: refuse new sessions, ask drivers to move, end when they have or after drain_s."""
        self._leave_within(self._config.drain_s)

    def _leave_within(self, seconds: float) -> None:
        """Of several wishes to leave the most urgent counts."""
        by = time.monotonic() + seconds
        self._leave_by = by if self._leave_by is None else min(by, self._leave_by)
        self._stopping.set()

    @property
    def directory(self) -> Directory:
        """This node's copy of the registry."""
        return self._directory

    async def run(self, *, on_online: Callable[[BlockRange], None] = lambda blocks: None) -> None:
        """Join the swarm, take a place, serve until stopped. `on_online` hears of every place it has taken."""
        listener = await self._transport.listen(self._config.listen, self._on_conn)
        gossip = asyncio.create_task(
            self._directory.rounds(self._transport, self._config.seeds, self._on_seed_message), name="gossip"
        )
        try:
            address = _reached_at(self._config.advertise, listener.address)
            await self._until_stopped(self._live(address, on_online), gossip)
            if self._serving is not None:
                await self._drain()
            if self._directory.record is not None:
                self._directory.update(state="gone")
                await asyncio.sleep(0.05)  # one turn of gossip, so that others need not wait for the lease to run out
        finally:
            gossip.cancel()
            await asyncio.gather(gossip, return_exceptions=True)
            for link in list(self._pushes.values()):
                await link.close()
            await listener.close()
            self._worker.close()

    async def _live(self, address: str, on_online: Callable[[BlockRange], None]) -> None:
        """Until cancelled: take a place, serve, leave it for another one or for a rest."""
        await self._introduce(address)
        place: balance.Choice | None = None
        while True:
            await self._until_quiet()
            place = place or await self._place()
            await self._take(place)
            on_online(place.blocks)
            while True:
                leave = await self._serve()
                if await self._hand_over(leave):
                    break
                self._publish_load(state="online", reason=place.reason)
            await self._unload()
            place = leave.to

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

    async def _introduce(self, address: str) -> None:
        """Publish what this machine can do."""
        config = self._config
        facts = self._facts = await self._worker.call(describe, config.model_dir)
        rates = await self._worker.call(probe.measure, config.dtype, self._device)
        decode_ms, prefill_ms = rates.block_ms(sum(facts.block_params) // facts.num_blocks)
        self._speed = Speed(decode_ms, prefill_ms)
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

    async def _until_quiet(self) -> None:
        """Rest while the machine's owner uses it."""
        if self._machine is None:
            return
        while not self._neighbour.sample(await self._machine.sample(), time.monotonic()):
            record = self._directory.record
            if record is not None and (record.state != "resting" or record.reason != self._neighbour.reason):
                log.info("resting: %s", self._neighbour.reason)
                self._directory.update(state="resting", span=None, reason=self._neighbour.reason, busy=0.0)
            await asyncio.sleep(LOOK_S)

    async def _place(self) -> balance.Choice:
        """The blocks to host: given, chosen, or assigned by the swarm's planner."""
        facts, config = self._facts, self._config
        assert facts is not None
        if config.blocks is None and not config.free:
            assigned = await self._assigned
            return balance.Choice(BlockRange(assigned.span.start, assigned.span.end), "")
        if config.free or config.own_directory:
            await self._meet()
            facts = self._facts = replace(facts, name=balance.known_as(facts.name, self._directory.live()))
        begun, self._begun = self._begun, True
        if config.blocks is not None and not (config.free and begun):
            if config.free:
                self._directory.update(serves=facts.name)
            return balance.Choice(config.blocks, "these blocks were asked for")
        self._directory.update(state="joining", span=None, serves=facts.name, reason="choosing blocks")
        await asyncio.sleep(SETTLE_S)
        # In a thread: a large swarm takes a while to think about, and pings must be answered meanwhile.
        return await asyncio.to_thread(balance.choose, self._directory.live(), self._node, facts.name, self._needs)

    async def _meet(self) -> None:
        """Wait for the first word of others."""
        deadline = time.monotonic() + MEET_S
        while len(self._directory.live()) < 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    @property
    def _needs(self) -> ModelNeeds:
        assert self._facts is not None
        return needs_of(self._facts, self._config.dtype, self._config.cache_tokens)

    async def _take(self, place: balance.Choice) -> None:
        """Load the blocks of a place and go online."""
        facts, blocks = self._facts, place.blocks
        assert facts is not None
        self._directory.update(
            state="loading", span=msg.Span(facts.name, blocks.start, blocks.end), reason=place.reason
        )
        log.info("loading blocks %s of %s", blocks, facts.name)
        loaded: Loaded = await self._worker.call(self._load, blocks)
        self._engine = loaded.engine
        serving = decide.Serving(decide.ServingConfig(facts.name, blocks, loaded.cache_tokens))
        await self._worker.call(self._measure_blocks, blocks, _PROBE_ROWS)
        self._serving = serving
        self._publish_load(state="online")
        log.info(
            "online: blocks %s, %d bytes read, cache for %d tokens, %s",
            blocks,
            loaded.bytes_read,
            loaded.cache_tokens,
            loaded.engine.packed_reason,
        )

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
        if prompt_rows and self._tuner is not None:
            self._tune(session, blocks)
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

    def _tune(self, session: bytes, blocks: BlockRange) -> None:
        """Find the number of threads before anybody waits; traffic corrects it later."""
        assert self._engine is not None
        assert self._facts is not None
        assert self._tuner is not None
        deadline = time.perf_counter() + _TUNE_S
        hidden = torch.randn(1, self._facts.hidden_size, dtype=self._config.dtype, device=self._device)
        self._engine.open(session, blocks, 128)
        position = 0
        while not self._tuner.settled and time.perf_counter() < deadline:
            if position == 128:
                self._engine.close(session)
                self._engine.open(session, blocks, 128)
                position = 0
            start = time.perf_counter()
            self._engine.run([compute.Work(session, position, 1)], hidden)
            self._note_step(1, len(blocks), (time.perf_counter() - start) * 1e3)
            position += 1
        self._engine.close(session)

    def _note_step(self, rows: int, blocks: int, took_ms: float) -> None:
        """In the compute thread: let a step's time decide with how many threads the next one is computed."""
        if self._tuner is not None:
            threads = self._tuner.measured(rows=rows, blocks=blocks, took_ms=took_ms)
            if threads != self._threads:
                self._threads = threads
                torch.set_num_threads(threads)

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
            busy=self._busy.at(time.monotonic()),
            threads=self._threads,
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
                if isinstance(message, msg.Drain):
                    log.info("asked to leave by %s: %s", conn.peer, message.reason)
                    outbox.put(msg.Draining())
                    self._leave_within(PATIENT_DRAIN_S)
                    continue
                if self._serving is None:
                    if isinstance(message, msg.Open):
                        text = "This server hosts no blocks now."
                        outbox.put(msg.Denied(message.session, message.epoch, "blocks_not_hosted", text, 0.0))
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

    async def _serve(self) -> _Leave:
        """Serve until there is a reason to leave this place; raises what no session can be blamed for."""
        self._kick()
        housekeeping = asyncio.create_task(self._housekeeping(), name="housekeeping")
        try:
            waits: list[asyncio.Future[Any]] = [housekeeping, self._broken]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                self._broken.result()
            return housekeeping.result()
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
            self._busy.add(now, took_ms / 1e3)
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
        took_ms = (time.perf_counter() - start) * 1e3
        self._note_step(sum(work.item.rows for work in works), len(self._engine.stage.blocks), took_ms)
        return outputs, took_ms

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

    async def _housekeeping(self) -> _Leave:
        """Renew what the registry says of this server, forget dead sessions; returns when there is reason to leave."""
        serving = self._serving
        assert serving is not None
        measured_at = looked_at = time.monotonic()
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            now = time.monotonic()
            self._perform(serving.expire(now))
            if serving.sessions:
                measured_at = now  # real traffic tells the speed
            elif now - measured_at > REMEASURE_S:
                measured_at = now
                self._worker.post(self._measure_blocks, serving.config.blocks)
            for link in self._pushes.values():
                if link.rtt_s is not None:
                    self._directory.measured(link.node, link.rtt_s * 1e3)
            self._publish_load()
            if now - looked_at >= LOOK_S:
                looked_at = now
                if (leave := await self._look(now)) is not None:
                    return leave

    async def _look(self, now: float) -> _Leave | None:
        """Whether this server should be here still."""
        if self._machine is not None and not self._neighbour.sample(await self._machine.sample(), now):
            return _Leave(self._neighbour.reason, None, must=True)
        if self._rebalancer is not None and self._facts is not None and now >= self._think_at:
            live, model = self._directory.live(), self._facts.name
            move = await asyncio.to_thread(self._rebalancer.consider, live, model, self._needs, now)
            # At most a twentieth of a processor: in a large and busy swarm this takes most of a second.
            self._think_at = now + 20 * (time.monotonic() - now)
            if move is not None:
                return _Leave(move.reason, balance.Choice(move.blocks, move.reason), must=False)
        return None

    # --- leaving ---------------------------------------------------------------------------------------------

    async def _hand_over(self, leave: _Leave) -> bool:
        """Ask drivers to move their sessions. False when some cannot, and the server therefore stays."""
        serving = self._serving
        assert serving is not None
        log.info("leaving blocks %s: %s", serving.config.blocks, leave.reason)
        await self._empty(serving, leave.reason, lambda: self._config.drain_s)
        if self._broken.done():
            self._broken.result()
        if self._rebalancer is not None:
            self._rebalancer.moved(time.monotonic())
        if serving.sessions and not leave.must:
            log.info("staying: %d sessions have nowhere to go", serving.sessions)
            serving.resume()
            return False
        self._perform(serving.leave(time.monotonic()))
        while self._running:  # the batch under way may be of sessions that are gone by now
            await asyncio.sleep(0.005)
        return True

    async def _unload(self) -> None:
        """Give the memory of weights and caches back."""
        self._serving = None
        await self._worker.call(self._drop_engine)
        # The engine was frozen with all else that was to live as long as the process (cli/server_process.py).
        gc.unfreeze()
        gc.collect()

    def _drop_engine(self) -> None:
        self._engine = None

    async def _drain(self) -> None:
        """Say goodbye: drivers rebuild their sessions elsewhere while we still finish what is under way."""
        serving = self._serving
        assert serving is not None
        since = time.monotonic()
        await self._empty(serving, "leaving the swarm", lambda: (self._leave_by or since) - since)

    async def _empty(self, serving: decide.Serving, reason: str, within_s: Callable[[], float]) -> None:
        """Take no new sessions, and wait until none is left or the time is over. The time may become shorter."""
        self._publish_load(state="draining", reason=reason)
        self._perform(serving.drain())
        since = published_at = time.monotonic()
        while serving.sessions and not self._broken.done() and (now := time.monotonic()) - since < within_s():
            await asyncio.sleep(0.02)
            if now - published_at >= HOUSEKEEPING_S:
                published_at = now
                self._publish_load()


def _reached_at(advertise: str | None, listening: str) -> str:
    """What to tell others: `advertise`, with the port that was really taken when it names none (port 0)."""
    if advertise is None:
        return listening
    wanted = Address.parse(advertise)
    return str(wanted if wanted.port else Address(wanted.host, Address.parse(listening).port))


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def needs_of(facts: ModelFacts, dtype: torch.dtype, cache_tokens: int | None) -> ModelNeeds:
    """What a server of this model must have room for, with `cache_tokens` of cache (None: a usual amount)."""
    return ModelNeeds(
        block_bytes=tuple(params * dtype.itemsize for params in facts.block_params),
        kv_bytes_per_block_token=facts.kv_params_per_token * dtype.itemsize,
        cache_tokens=min(facts.context_length, PLANNED_CACHE_TOKENS) if cache_tokens is None else cache_tokens,
        legal_cuts=facts.legal_cuts,
    )


def _public(error: BaseException) -> str:
    """What a driver may know: the kind of failure, no paths and no internals."""
    return (
        str(error)
        if isinstance(error, NotFinite | ProtocolError)
        else f"Computing failed on this server ({type(error).__name__})."
    )
