"""Drives many sessions over one set of connections: the edge around swarm.session, and the batched head.

    prompt -> embed -> Session.feed -> Step frames ------------> first server -> ... -> last server
                          ^                                                               |
                          +-- next token's embedding <- sample <- head (all rows waiting) <- Result frames

One compute thread embeds, applies the head and samples for every session whose row has arrived, then embeds the chosen
tokens in the same visit; the event loop only moves messages. Steps of sessions that go to the same server leave in one
frame, so that a batch stays a batch along the chain.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from shoal.compute.activations import to_numpy, to_torch
from shoal.compute.facts import ModelFacts
from shoal.compute.head import HeadEngine
from shoal.compute.sampling import Sampler
from shoal.errors import ContextTooLong, ProtocolError, ShoalError
from shoal.net.directory import Directory
from shoal.net.link import Link
from shoal.net.transport import Transport
from shoal.spec.ids import BlockRange
from shoal.spec.sampling import Sampled, SamplingParams
from shoal.swarm import session as decide
from shoal.swarm.estimates import Links
from shoal.swarm.routing import Hop, route
from shoal.wire import messages as msg
from shoal.wire import rows as wire_rows
from shoal.wire import tensors

log = logging.getLogger("shoal.client")

TICK_S = 0.05
SUSPECT_S = 3.0
"""How long a server whose connection broke is avoided; the registry knows better after that."""
ACTIVE_S = 2.0


@dataclass(frozen=True, slots=True)
class DriverConfig:
    wire: msg.WireType = "f32"
    chunk_rows: int = 256
    """Prompt rows per step: small enough that the stages of a chain overlap, large enough for efficient products."""
    session: decide.SessionConfig = field(default_factory=decide.SessionConfig)


@dataclass(slots=True)
class DriverCounters:
    sessions: int = 0
    tokens: int = 0
    failovers: dict[str, int] = field(default_factory=dict)
    replayed_rows: int = 0
    last_stall_s: float = 0.0


@dataclass(slots=True)
class _Run:
    """One generation."""

    session: decide.Session
    prompt: list[int]
    sampler: Sampler
    max_tokens: int
    eos_ids: frozenset[int]
    request_id: str
    out: asyncio.Queue[Sampled | ShoalError | None] = field(default_factory=asyncio.Queue)
    produced: int = 0
    admitted: bool = False
    finished: bool = False
    sampled_at: float = -1e18

    @property
    def wanted(self) -> int:
        """Position whose output decides the next token."""
        return len(self.prompt) - 1 + self.produced


class Driver:
    """Runs generations of one model. `start` before use, `close` after."""

    def __init__(
        self,
        facts: ModelFacts,
        head: HeadEngine,
        *,
        node: str,
        transport: Transport,
        directory: Directory,
        config: DriverConfig | None = None,
        compute: ThreadPoolExecutor | None = None,
        on_recovered: Callable[[decide.Recovered], None] = lambda recovered: None,
    ) -> None:
        self.facts = facts
        self.counters = DriverCounters()
        self._head = head
        self._node = node
        self._transport = transport
        self._directory = directory
        self._config = config or DriverConfig()
        self._on_recovered = on_recovered
        self._compute = compute or ThreadPoolExecutor(1, "head", torch.set_num_threads, (1,))
        self._rng = random.Random(secrets.randbits(64))
        self._links: dict[str, Link] = {}
        self._rtts = Links()
        self._runs: dict[bytes, _Run] = {}
        self._rows: deque[tuple[_Run, wire_rows.Rows]] = deque()
        self._rows_came = asyncio.Event()
        self._feeds: dict[tuple[str, msg.WireType], list[decide.Feed]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._head_loop(), name="head"),
            asyncio.create_task(self._tick_loop(), name="session timers"),
        ]

    async def close(self) -> None:
        """End every generation and connection."""
        for run in list(self._runs.values()):
            self._end(run)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._compute.shutdown(wait=False, cancel_futures=True)

    # --- generating ------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        eos_ids: frozenset[int] = frozenset(),
        request_id: str = "",
    ) -> AsyncGenerator[Sampled | None, None]:
        """Yield None once the session is admitted, then every token, the end token included.

        Raises ContextTooLong, Full or SwarmIncomplete; see gateway/served.py for when.
        """
        prompt = list(prompt)
        total = len(prompt) + max_tokens
        if total > self.facts.context_length:
            raise ContextTooLong(
                f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the model's"
                f" {self.facts.context_length} tokens of context.",
                hint="Shorten the prompt or ask for fewer tokens.",
            )
        run = self._begin(prompt, params, max_tokens, eos_ids, request_id)
        try:
            self._perform(run, run.session.start(time.monotonic()))
            self._flush()
            await self._feed_prompt(run)
            while True:
                item = await run.out.get()
                if isinstance(item, ShoalError):
                    raise item
                yield item
                if run.finished and run.out.empty():
                    return
        finally:
            self._end(run)

    def _begin(
        self, prompt: list[int], params: SamplingParams, max_tokens: int, eos_ids: frozenset[int], request_id: str
    ) -> _Run:
        session = decide.Session(
            secrets.token_bytes(16),
            model=self.facts.name,
            num_blocks=self.facts.num_blocks,
            # The last token is never fed: nothing is predicted from it.
            max_tokens=len(prompt) + max_tokens - 1,
            wire=self._config.wire,
            plan=self._plan,
            results_from=len(prompt) - 1,
            config=self._config.session,
        )
        sampler = Sampler(params, vocab_size=self._head.ends.vocab_size)
        run = _Run(session, prompt, sampler, max_tokens, eos_ids, request_id)
        self._runs[session.id] = run
        self.counters.sessions += 1
        return run

    async def _feed_prompt(self, run: _Run) -> None:
        step = self._config.chunk_rows
        for at in range(0, len(run.prompt), step):
            if run.session.ended:
                return
            ids = run.prompt[at : at + step]
            rows = await asyncio.get_running_loop().run_in_executor(
                self._compute, self._embed, ids, range(at, at + len(ids))
            )
            self._perform(run, run.session.feed(rows.count, rows, time.monotonic()))
            self._flush()

    def _end(self, run: _Run) -> None:
        """Finished, failed or cancelled: free the caches on all servers."""
        if self._runs.pop(run.session.id, None) is not None:
            if not run.session.ended:
                self._perform(run, run.session.close())
            self._flush()

    def _plan(self, blocks: BlockRange, avoid: frozenset[str], need_tokens: int, now: float) -> Sequence[Hop] | None:
        view = self._directory.view
        chain = route(
            view.live(now),
            self.facts.name,
            self.facts.num_blocks,
            rng=self._rng,
            avoid=avoid | view.suspects(now),
            need_tokens=need_tokens,
            start=blocks.start,
            end=blocks.end,
            links=self._rtts,
            source=self._node,
        )
        return None if chain is None else chain.hops

    def view_changed(self) -> None:
        """The registry changed: sessions that wait for servers look again."""
        for run in list(self._runs.values()):
            self._perform(run, run.session.on_view_changed(time.monotonic()))
        self._flush()

    # --- the compute thread's work ---------------------------------------------------------------------------

    def _embed(self, ids: Sequence[int], positions: Sequence[int]) -> wire_rows.Rows:
        return self._encode(self._head.embed(ids, positions))

    def _encode(self, hidden: torch.Tensor) -> wire_rows.Rows:
        tensor, buffers = tensors.encode(to_numpy(hidden), self._config.wire)
        return wire_rows.Rows(tensor.dtype, tensor.width, tensor.rows, buffers[0])

    def _choose(
        self, rows: Sequence[wire_rows.Rows], samplers: Sequence[Sampler], positions: Sequence[int]
    ) -> tuple[list[Sampled], wire_rows.Rows]:
        """Head, sampling, and the embedding of the chosen tokens at their positions."""
        tensor, buffers = wire_rows.join(rows)
        body = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        ends = self._head.ends
        if tensor.dtype == "bf16":
            hidden = to_torch(tensors.decode_bf16(tensor, body), ends.dtype, ends.device)
        else:
            hidden = to_torch(tensors.decode(tensor, body), ends.dtype, ends.device)
        chosen = self._head.sample(hidden, samplers)
        return chosen, self._embed([choice.token for choice in chosen], positions)

    async def _head_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._rows_came.wait()
            self._rows_came.clear()
            while self._rows:
                batch = self._take_rows()
                if not batch:
                    break
                runs = [run for run, _ in batch]
                try:
                    chosen, embedded = await loop.run_in_executor(
                        self._compute,
                        self._choose,
                        [rows for _, rows in batch],
                        [run.sampler for run in runs],
                        [run.wanted + 1 for run in runs],
                    )
                except ShoalError as error:
                    for run in runs:
                        self._fail(run, error)
                    continue
                for index, (run, choice) in enumerate(zip(runs, chosen, strict=True)):
                    self._advance(run, choice, embedded[index : index + 1])
                self._flush()

    def _take_rows(self) -> list[tuple[_Run, wire_rows.Rows]]:
        """The rows to sample together: at most the active sessions divided by the stages, like the servers' batches,
        so that a chain of servers keeps several batches under way."""
        now = time.monotonic()
        active, stages = 0, 1
        for run in self._runs.values():
            if now - run.sampled_at <= ACTIVE_S:
                active += 1
                stages = max(stages, len(run.session.chain))
        limit = max(1, -(-active // stages))
        batch: list[tuple[_Run, wire_rows.Rows]] = []
        while self._rows and len(batch) < limit:
            run, rows = self._rows.popleft()
            if not run.session.ended:
                run.sampled_at = now
                batch.append((run, rows))
        return batch

    def _advance(self, run: _Run, choice: Sampled, embedded: wire_rows.Rows) -> None:
        if run.session.ended:
            return
        run.produced += 1
        self.counters.tokens += 1
        run.finished = choice.token in run.eos_ids or run.produced >= run.max_tokens
        run.out.put_nowait(choice)
        if not run.finished:
            self._perform(run, run.session.feed(1, embedded.copy(), time.monotonic()))

    def _fail(self, run: _Run, error: ShoalError) -> None:
        run.out.put_nowait(error)
        self._perform(run, run.session.close())

    # --- actions out -----------------------------------------------------------------------------------------

    def _perform(self, run: _Run, actions: Sequence[decide.Action]) -> None:
        """Carry out what a session decided. Steps are gathered until `_flush`."""
        for action in actions:
            match action:
                case decide.Feed(node):
                    self._feeds.setdefault((node, self._config.wire), []).append(action)
                case decide.Tell(node, addresses, message):
                    # A session's steps and its control messages must reach a server in the order they were decided.
                    self._flush()
                    if not isinstance(message, msg.Close) or node in self._links:
                        self._link(node, addresses).send(message)
                case decide.Deliver(position, rows, payload):
                    if position <= run.wanted < position + rows:
                        last = run.wanted - position
                        self._rows.append((run, payload[last : last + 1]))
                        self._rows_came.set()
                case decide.Failed(error):
                    run.out.put_nowait(error)
                case decide.Recovered():
                    self._note_recovery(run, action)
        if run.session.live and not run.admitted:
            run.admitted = True
            run.out.put_nowait(None)

    def _note_recovery(self, run: _Run, recovered: decide.Recovered) -> None:
        self.counters.failovers[recovered.cause] = self.counters.failovers.get(recovered.cause, 0) + 1
        self.counters.replayed_rows += recovered.replayed_rows
        self.counters.last_stall_s = recovered.stall_s
        log.warning(
            "request %s: blocks %s were lost (%s) and rebuilt on %s; %d rows replayed, a gap of %.0f ms",
            run.request_id or run.session.id.hex()[:8],
            ", ".join(recovered.blocks),
            recovered.cause,
            ", ".join(hop.node[:8] for hop in run.session.chain),
            recovered.replayed_rows,
            recovered.stall_s * 1e3,
        )
        self._on_recovered(recovered)

    def _flush(self) -> None:
        feeds, self._feeds = self._feeds, {}
        for (node, _), steps in feeds.items():
            link = self._links.get(node)
            if link is None or link.lost:
                continue  # its sessions have heard of the loss, or will in a moment
            for at in range(0, len(steps), msg.MAX_ITEMS):
                part = steps[at : at + msg.MAX_ITEMS]
                tensor, buffers = wire_rows.join([rows for step in part for rows in step.parts])
                link.send(msg.Step([step.item for step in part], tensor), buffers)

    def _link(self, node: str, addresses: Sequence[str]) -> Link:
        link = self._links.get(node)
        if link is None or link.lost:
            link = self._links[node] = Link(
                self._transport, node, addresses, on_message=self._on_message, on_lost=self._on_lost
            )
        return link

    # --- messages in -----------------------------------------------------------------------------------------

    def _on_message(self, node: str, message: msg.Message, body: memoryview) -> None:
        now = time.monotonic()
        match message:
            case msg.Result(items, tensor):
                for item, rows in wire_rows.cut(items, tensor, body):
                    if (run := self._runs.get(item.session)) is not None:
                        self._perform(run, run.session.on_result(node, item, rows, now))
            case msg.Journal(block, items, tensor):
                for item, rows in wire_rows.cut(items, tensor, body):
                    if (run := self._runs.get(item.session)) is not None:
                        kept = rows if len(items) == 1 else rows.copy()
                        self._perform(run, run.session.on_journal(node, block, item, kept, now))
            case msg.Opened() | msg.Relinked() | msg.Denied():
                if (run := self._runs.get(message.session)) is not None:
                    self._perform(run, run.session.on_message(node, message, now))
            case msg.Gone(sessions):
                for id in sessions:
                    if (run := self._runs.get(id)) is not None:
                        self._perform(run, run.session.on_message(node, message, now))
            case msg.Fault(code, text):
                raise ProtocolError(f"Server {node} reported {code}: {text}")
        self._flush()

    def _on_lost(self, node: str, cause: str) -> None:
        now = time.monotonic()
        log.info("connection to server %s lost: %s", node, cause)
        self._links.pop(node, None)
        self._directory.view.suspect(node, now, SUSPECT_S)
        for run in list(self._runs.values()):
            self._perform(run, run.session.on_peer_lost(node, cause, now))
        self._flush()

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for run in list(self._runs.values()):
                wake = run.session.wake_at
                if wake is not None and wake <= now:
                    self._perform(run, run.session.on_timer(now))
            self._flush()
            for node, link in self._links.items():
                if link.rtt_s is not None:
                    self._rtts.measured(self._node, node, link.rtt_s * 1e3)

    # --- looking ---------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        return {
            "running": len(self._runs),
            "sessions": self.counters.sessions,
            "tokens": self.counters.tokens,
            "failovers": dict(self.counters.failovers),
            "replayed_rows": self.counters.replayed_rows,
            "last_stall_ms": round(self.counters.last_stall_s * 1e3, 1),
            "rtt_ms": {n: round(link.rtt_s * 1e3, 3) for n, link in self._links.items() if link.rtt_s is not None},
        }
