"""Generates text over the swarm: embedding, chain, head and sampling for many generations at once.

    prompt -> embed -> Sessions.feed ------> servers ------> rows of the last block
                            ^                                      |
                            +-- embedding of the next token <- sample <- head, for all rows that wait

One compute thread embeds, applies the head and samples for every generation whose row has arrived, then embeds the
chosen tokens in the same visit; the event loop only moves messages.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from shoal.client.checks import CheckConfig, Checks, Found
from shoal.client.sessions import Handle, OnHost, Sessions
from shoal.compute.activations import to_numpy, to_torch
from shoal.compute.facts import ModelFacts
from shoal.compute.head import HeadEngine
from shoal.compute.sampling import Sampler
from shoal.errors import ContextTooLong, NotFinite, ShoalError, UsageError
from shoal.net.directory import Directory
from shoal.net.transport import Transport
from shoal.net.worker import Worker
from shoal.spec.sampling import Constraint, Sampled, SamplingParams
from shoal.swarm.balance import name_in_use
from shoal.swarm.honesty import Reputation
from shoal.swarm.session import Recovered, SessionConfig
from shoal.swarm.trust import Zones
from shoal.wire import messages as msg
from shoal.wire import rows as wire_rows
from shoal.wire import tensors
from shoal.wire.encoder import Encoder

log = logging.getLogger("shoal.client")

_Choice = tuple[Sampled, wire_rows.Rows] | BaseException
"""A generation's next token with its embedding, or why there is none."""

Pooling = Literal["last", "mean"]
"""How the states of a text's tokens become one vector."""

ACTIVE_S = 2.0
"""A generation that got a token within this time counts when batches are sized."""


@dataclass(frozen=True, slots=True)
class DriverConfig:
    wire: msg.WireType = "f32"
    chunk_rows: int = 256
    """Prompt rows per step: small enough that the stages of a chain overlap, large enough for efficient products."""
    session: SessionConfig = field(default_factory=SessionConfig)
    checks: CheckConfig = field(default_factory=partial(CheckConfig, rate=0.0))
    """How servers are compared; by default they are not."""


@dataclass(slots=True, eq=False)
class _Run:
    """One generation."""

    prompt: list[int]
    sampler: Sampler
    max_tokens: int
    eos_ids: frozenset[int]
    handle: Handle | None = None
    out: asyncio.Queue[Sampled | ShoalError | None] = field(default_factory=asyncio.Queue)
    produced: int = 0
    admitted: bool = False
    finished: bool = False
    ended: bool = False
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
        worker: Worker,
        labels: Sequence[str] = (),
        reputation: Reputation | None = None,
        on_recovered: Callable[[Recovered], None] = lambda recovered: None,
        on_found: Callable[[Found], None] = lambda found: None,
        on_dropped: Callable[[str], None] = lambda cause: None,
    ) -> None:
        """`labels` are those in this node's own certificate: a trust zone may demand one of the embedding and head.
        `reputation` is what this node knows of servers, shared by the drivers of all its models; `on_found` hears how
        every check of a server ended, `on_dropped` why one came to nothing."""
        self.facts = facts
        self.tokens = 0
        self.embedding_size = head.embedding_size
        self._head = head
        self._config = config or DriverConfig()
        self._worker = worker
        self._directory = directory
        self._encoder = Encoder()
        self.sessions = Sessions(
            facts.name,
            facts.num_blocks,
            node=node,
            transport=transport,
            directory=directory,
            wire=self._config.wire,
            config=self._config.session,
            labels=labels,
            reputation=(reputation := reputation or Reputation()),
            on_recovered=on_recovered,
            on_frame_end=self._kick,
        )
        self.reputation = reputation
        self.checks = Checks(
            self.sessions,
            directory,
            reputation,
            num_blocks=facts.num_blocks,
            config=self._config.checks,
            on_found=on_found,
            on_dropped=on_dropped,
        )
        self._runs: set[_Run] = set()
        self._texts: set[asyncio.Queue[wire_rows.Rows | ShoalError]] = set()
        """Where those wait whose text is being embedded."""
        self._rows: deque[tuple[_Run, wire_rows.Rows]] = deque()
        self._sampling: list[_Run] = []
        """The generations whose next tokens are being chosen now."""

    def start(self) -> None:
        self.sessions.start()
        self.checks.start()

    async def close(self) -> None:
        """End every generation (those who wait for a token hear an error) and connection."""
        for run in self._runs:
            run.out.put_nowait(ShoalError("The driver was closed while an answer was running."))
        for text in self._texts:
            text.put_nowait(ShoalError("The driver was closed while a text was being embedded."))
        await self.checks.close()
        await self.sessions.close()

    def view_changed(self) -> None:
        """The registry changed: generations that wait for servers look again.

        The first server named the model after its own directory; whatever ours is called, theirs is the name to ask
        for."""
        name = name_in_use(self.facts.name, self._directory.live())
        if name is not None and name != self.facts.name:
            self.facts = replace(self.facts, name=name)
            self.sessions.model = name
        self.sessions.view_changed()

    # --- one generation --------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        eos_ids: frozenset[int] = frozenset(),
        request_id: str = "",
        constraint: Constraint | None = None,
        zones: Sequence[Zones] = (),
        on_host: OnHost | None = None,
    ) -> AsyncGenerator[Sampled | None, None]:
        """Yield None once the session is admitted, then every token, the end token included.

        Only servers that `zones` allow are used; `on_host` hears of each before it gets its first input.

        Raises ContextTooLong, Full, SwarmIncomplete or PolicyUnmet; gateway/served.py says when. UsageError for an
        empty prompt or max_tokens below 1.
        """
        if not prompt or max_tokens < 1:
            raise UsageError(f"{max_tokens} new tokens after a prompt of {len(prompt)}: both must be at least 1.")
        if len(prompt) + max_tokens > self.facts.context_length:
            raise ContextTooLong(
                f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the model's"
                f" {self.facts.context_length} tokens of context.",
                hint="Shorten the prompt or ask for fewer tokens.",
            )
        sampler = Sampler(params, vocab_size=self._head.ends.vocab_size, constraint=constraint)
        run = _Run(list(prompt), sampler, max_tokens, eos_ids)
        await self.sessions.scouted()
        run.handle = self.sessions.open(
            # The last token is never fed: nothing is predicted from it.
            len(run.prompt) + max_tokens - 1,
            results_from=len(run.prompt) - 1,
            on_rows=partial(self._on_rows, run),
            on_live=partial(self._on_live, run),
            on_failed=run.out.put_nowait,
            name=request_id,
            zones=zones,
            on_host=on_host,
        )
        self._runs.add(run)
        try:
            await self._feed_prompt(run.prompt, run.handle)
            while not (run.finished and run.out.empty()):
                item = await run.out.get()
                if isinstance(item, ShoalError):
                    raise item
                yield item
        finally:
            run.ended = True
            self._runs.discard(run)
            self.sessions.end(run.handle)

    async def _feed_prompt(self, prompt: Sequence[int], handle: Handle) -> None:
        step = self._config.chunk_rows
        for at in range(0, len(prompt), step):
            ids = prompt[at : at + step]
            rows = await self._worker.call(self._embed, ids, range(at, at + len(ids)))
            if handle.session.ended:
                return  # its owner was told why
            self.sessions.feed(handle, rows)
            self.sessions.flush()

    def _on_live(self, run: _Run) -> None:
        if not run.admitted:
            run.admitted = True
            run.out.put_nowait(None)

    def _on_rows(self, run: _Run, position: int, rows: wire_rows.Rows) -> None:
        if position <= run.wanted < position + rows.count:
            row = run.wanted - position
            self._offer(run, rows[row : row + 1])

    def _offer(self, run: _Run, row: wire_rows.Rows) -> None:
        """Let `row` be sampled, once it is known what its constraint allows: usually that was computed while the
        servers computed the row. Nobody else waits for a constraint that takes longer."""
        constraint = run.sampler.constraint
        if constraint is None or constraint.ready(partial(self._worker.report, self._on_mask, run, row)):
            self._rows.append((run, row))

    def _on_mask(self, run: _Run, row: wire_rows.Rows) -> None:
        self._rows.append((run, row))
        self._kick()

    # --- one embedding ---------------------------------------------------------------------------------------

    async def embed(
        self,
        prompt: Sequence[int],
        *,
        pooling: Pooling = "last",
        request_id: str = "",
        zones: Sequence[Zones] = (),
        on_host: OnHost | None = None,
    ) -> list[float]:
        """What the model makes of a whole text: its last hidden state, of the last token or the mean over all, as a
        vector of length 1 with `embedding_size` values.

        Raises ContextTooLong, Full, SwarmIncomplete, PolicyUnmet; UsageError for an empty prompt; NotFinite for broken
        numbers.
        """
        if not 1 <= len(prompt) <= self.facts.context_length:
            raise (ContextTooLong if prompt else UsageError)(
                f"A text of {len(prompt)} tokens cannot be embedded: 1 to {self.facts.context_length} can."
            )
        arrived: asyncio.Queue[wire_rows.Rows | ShoalError] = asyncio.Queue()
        first = 0 if pooling == "mean" else len(prompt) - 1
        handle = self.sessions.open(
            len(prompt),
            results_from=first,
            on_rows=lambda position, rows: arrived.put_nowait(rows[max(0, first - position) :]),
            on_failed=arrived.put_nowait,
            name=request_id,
            zones=zones,
            on_host=on_host,
        )
        self._texts.add(arrived)
        try:
            await self._feed_prompt(prompt, handle)
            total, missing = None, len(prompt) - first
            while missing > 0:
                rows = await arrived.get()
                if isinstance(rows, ShoalError):
                    raise rows
                missing -= rows.count
                part = await self._worker.call(self._final_sum, rows)
                total = part if total is None else total + part
            return _unit(total)
        finally:
            self._texts.discard(arrived)
            self.sessions.end(handle)

    def _final_sum(self, rows: wire_rows.Rows) -> torch.Tensor:
        """The compute thread's part: the sum of the final states of some rows, float32 [E]."""
        ends = self._head.ends
        hidden = to_torch(tensors.decode_native(rows.tensor, rows.data), ends.dtype, ends.device)
        return self._head.final(hidden).sum(0)

    # --- head and sampling -----------------------------------------------------------------------------------

    def _kick(self) -> None:
        """Sample the rows that wait, if the compute thread is not sampling already."""
        if self._sampling or not (batch := self._take_rows()):
            return
        self._sampling = [run for run, _ in batch]
        self._worker.submit(
            self._choose,
            [rows for _, rows in batch],
            [run.sampler for run in self._sampling],
            [run.wanted + 1 for run in self._sampling],
            done=self._on_chosen,
        )

    def _on_chosen(self, result: list[_Choice] | None, error: BaseException | None) -> None:
        runs, self._sampling = self._sampling, []
        self._kick()
        choices: list[_Choice] = [error or RuntimeError("no choice")] * len(runs) if result is None else result
        for run, choice in zip(runs, choices, strict=True):
            if isinstance(choice, BaseException):
                run.out.put_nowait(_told(choice))
            else:
                self._advance(run, *choice)
        self.sessions.flush()
        for run in runs:
            if run.finished and run.handle is not None:
                self.sessions.end(run.handle)  # now, however slowly the last tokens are taken

    def _take_rows(self) -> list[tuple[_Run, wire_rows.Rows]]:
        """The rows to sample together: at most the active generations divided by the stages, like the servers' batches,
        so that a chain of servers keeps several batches under way."""
        now = time.monotonic()
        active, stages = 0, 1
        for run in self._runs:
            if now - run.sampled_at <= ACTIVE_S and run.handle is not None:
                active += 1
                stages = max(stages, len(run.handle.session.chain))
        limit = max(1, -(-active // stages))
        batch: list[tuple[_Run, wire_rows.Rows]] = []
        while self._rows and len(batch) < limit:
            run, rows = self._rows.popleft()
            if not run.ended:
                run.sampled_at = now
                batch.append((run, rows))
        return batch

    def _advance(self, run: _Run, choice: Sampled, embedded: wire_rows.Rows) -> None:
        if run.ended or run.handle is None:
            return
        run.produced += 1
        self.tokens += 1
        run.finished = choice.token in run.eos_ids or run.produced >= run.max_tokens
        run.out.put_nowait(choice)
        if not run.finished:
            self.sessions.feed(run.handle, embedded)

    # --- the compute thread's work ---------------------------------------------------------------------------

    def _embed(self, ids: Sequence[int], positions: Sequence[int]) -> wire_rows.Rows:
        hidden = self._head.embed(ids, positions)
        return self._encoder.encode(to_numpy(hidden), self._config.wire)

    def _choose(
        self, rows: Sequence[wire_rows.Rows], samplers: Sequence[Sampler], positions: Sequence[int]
    ) -> list[_Choice]:
        """Head, sampling, and the embedding of the chosen tokens at their positions."""
        sampled = self._sample(rows, samplers)
        good = [row for row, choice in enumerate(sampled) if isinstance(choice, Sampled)]
        tokens = [choice.token for choice in sampled if isinstance(choice, Sampled)]
        embedded = self._embed(tokens, [positions[row] for row in good]) if good else None
        choices: list[_Choice] = []
        for choice in sampled:
            if isinstance(choice, Sampled):
                assert embedded is not None
                place = sum(isinstance(earlier, tuple) for earlier in choices)
                choices.append((choice, embedded[place : place + 1].copy()))
            else:
                choices.append(choice)
        return choices

    def _sample(self, rows: Sequence[wire_rows.Rows], samplers: Sequence[Sampler]) -> list[Sampled | BaseException]:
        """The next token of every row, or why it has none: one server's broken rows fail alone."""
        ends = self._head.ends
        try:
            arrays = [tensors.decode_native(part.tensor, part.data) for part in rows]
            hidden = torch.cat([to_torch(array, ends.dtype, ends.device) for array in arrays])
            return [*self._head.sample(hidden, samplers)]
        except (ShoalError, RuntimeError, ValueError) as error:
            if len(rows) == 1:
                return [error]
        # A batch that fails has moved no sampler (compute/sampling.py), so its rows can be tried again one by one.
        return [self._sample([row], [sampler])[0] for row, sampler in zip(rows, samplers, strict=True)]

    # --- looking ---------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return self._head.ends.vocab_size

    def chain_in_use(self) -> list[str]:
        """Nodes, in order, that the running generation longest under way goes through; empty when none runs."""
        chains = self.sessions.chains()
        return [hop.node for hop in chains[0]] if chains else []

    def statistics(self) -> dict[str, Any]:
        counters = self.sessions.counters
        return {
            "running": len(self._runs),
            "sessions": counters.opened,
            "tokens": self.tokens,
            "failovers": dict(counters.failovers),
            "wire": self._config.wire,
            "wire_error": self._encoder.error,
            "replayed_rows": counters.replayed_rows,
            "last_stall_ms": round(counters.last_stall_s * 1e3, 1),
            "checks": self.checks.statistics(),
            "rtt_ms": {node: round(ms, 3) for node, ms in self.sessions.rtts_ms().items()},
        }


def _unit(vector: torch.Tensor | None) -> list[float]:
    """The vector [E] brought to length 1. Raises NotFinite when it has no direction."""
    length = 0.0 if vector is None else float(vector.norm())
    if vector is None or not 0.0 < length < math.inf:  # also refuses NaN
        raise NotFinite("The final hidden state of a text is zero or not finite.")
    return (vector / length).tolist()


def _told(error: BaseException) -> ShoalError:
    """What the caller hears. Anything unexpected goes to the log; it holds numbers and shapes, never text."""
    if isinstance(error, ShoalError):
        return error
    log.error("choosing the next token failed", exc_info=error)
    return ShoalError("Choosing the next token failed; see the log.")
