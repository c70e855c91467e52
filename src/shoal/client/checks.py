"""Compares servers: a small share of calls is computed again elsewhere, after they have ended (swarm.honesty decides).

Never on the critical path. While a call runs, its rows are only kept; when it has ended, one check at a time replays
them in small steps, each sent when the one before it is back, on servers that are not busy. What does not fit into the
bounds below is dropped and counted: checks are a sample anyway.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.client.sessions import Handle, OnHost, Sessions
from shoal.errors import NotFinite, PeerLost, ShoalError
from shoal.net.directory import Directory
from shoal.spec.ids import BlockRange
from shoal.swarm import honesty
from shoal.swarm.journal import Log
from shoal.swarm.routing import coverage
from shoal.swarm.trust import Zones
from shoal.wire import messages as msg
from shoal.wire import rows as wire_rows
from shoal.wire import tensors

log = logging.getLogger("shoal.client")

TELL_S = 10.0
"""How often the own record is brought up to date at least: a quarantine ends without an event."""
_ANSWER_ERRORS = (ShoalError, TimeoutError)


@dataclass(frozen=True, slots=True)
class CheckConfig:
    rate: float = 0.02
    """Share of a server's calls that are computed again; 0: none."""
    max_rows: int = 2048
    """Rows of a call that are compared at most, from its beginning: later ones need the cache of all before them."""
    max_bytes: int = 16 << 20
    """What one call may keep of inputs and outputs together."""
    watching: int = 8
    """Running calls whose rows are kept at the same time."""
    waiting: int = 4
    """Ended calls that may wait for their check."""
    step_rows: int = 64
    """Rows a witness gets at once: a live session's step never waits for more."""
    patience_s: float = 30.0
    """How long to wait for a witness that is not busy."""
    answer_s: float = 30.0
    """How long a witness may take for one step."""


@dataclass(slots=True)
class Watch:
    """One stage of a running call whose rows are kept."""

    node: str
    before: str | None
    """Who pushes this stage its inputs; None: we feed it."""
    blocks: BlockRange
    stages: int
    declared: honesty.Declared
    plans: int
    """The chain's number of plans: with another one, other servers may have done the work."""
    last: bool
    limit_bytes: int
    limit_rows: int
    inputs: Log
    outputs: Log
    begin: int
    """First position whose output can be compared."""

    def take(self, node: str, block: int, item: msg.StepItem, rows: wire_rows.Rows) -> None:
        """Rows that `node` sent us, inputs of `block`: keep them when they are this stage's."""
        limit = min(self.limit_rows, self.limit_bytes // max(1, 2 * tensors.row_bytes(rows.dtype, rows.width)))
        if item.position >= limit:
            return
        rows = rows[: limit - item.position]
        if node == self.before and block == self.blocks.start:
            self.inputs.add(item.position, rows.count, rows)
        elif node == self.node and block == self.blocks.end:
            # Outputs of the last block lie in a frame of many sessions; the journal's have been taken out of theirs.
            self.outputs.add(item.position, rows.count, rows.copy() if self.last else rows)


@dataclass(frozen=True, slots=True)
class Call:
    """One stage of an ended call, ready to be computed again."""

    name: str
    node: str
    before: str | None
    blocks: BlockRange
    stages: int
    declared: honesty.Declared
    zones: tuple[Zones, ...]
    on_host: OnHost | None
    inputs: tuple[wire_rows.Rows, ...]
    """From position 0 up to the end of the outputs."""
    begin: int
    outputs: tuple[wire_rows.Rows, ...]
    """From position `begin`."""

    @property
    def rows(self) -> int:
        return sum(part.count for part in self.inputs)


@dataclass(frozen=True, slots=True)
class Found:
    """What a check came to, for logs, metrics and the audit log."""

    name: str
    finding: honesty.Finding
    blocks: BlockRange
    comparison: honesty.Comparison
    replayed_rows: int
    quarantined: tuple[str, ...]


class Checks:
    """The checks of one model's calls. `start` before use, `close` after. Hears of calls from its Sessions."""

    def __init__(
        self,
        sessions: Sessions,
        directory: Directory,
        reputation: honesty.Reputation,
        *,
        num_blocks: int,
        config: CheckConfig | None = None,
        rng: random.Random | None = None,
        on_found: Callable[[Found], None] = lambda found: None,
        on_dropped: Callable[[str], None] = lambda cause: None,
    ) -> None:
        """`on_found` hears of every check that came to an end, `on_dropped` why one did not."""
        self.replayed_rows = 0
        self._sessions = sessions
        self._directory = directory
        self._reputation = reputation
        self._num_blocks = num_blocks
        self._config = config or CheckConfig()
        # Whoever could foretell it would know which calls to be honest in.
        self._rng = rng or random.SystemRandom()
        self._on_found = on_found
        self._on_dropped = on_dropped
        self._watches: dict[bytes, Watch] = {}
        self._waiting: asyncio.Queue[Call] = asyncio.Queue(self._config.waiting)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._config.rate > 0.0 and self._task is None:
            self._sessions.observer = self
            self._task = asyncio.create_task(self._run(), name="checks")
            self._task.add_done_callback(_report)

    async def close(self) -> None:
        if self._task is not None:
            self._sessions.observer = None
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def settled(self) -> None:
        """Wait until no ended call waits for its check."""
        await self._waiting.join()

    # --- while calls run -------------------------------------------------------------------------------------

    def began(self, handle: Handle) -> None:
        """A call's chain stands for the first time: draw whether it is checked, and which stage of it."""
        chain = handle.session.chain
        stage = honesty.draw(len(chain), self._config.rate, self._rng)
        if stage is None:
            return
        hop = chain[stage]
        record = self._directory.view.get(hop.node)
        if record is None or not self._candidates(hop.blocks, {hop.node}, 1, handle.zones):
            self._drop("alone")
            return
        if len(self._watches) >= self._config.watching:
            self._drop("busy")
            return
        last = stage == len(chain) - 1
        # A lone server reports every row, the last of a chain only what decides tokens.
        begin = handle.session.results_from if last and stage > 0 else 0
        handle.watch = self._watches[handle.session.id] = Watch(
            hop.node,
            chain[stage - 1].node if stage > 0 else None,
            hop.blocks,
            len(chain),
            honesty.Declared.of(record),
            handle.session.counters.replans,
            last,
            self._config.max_bytes,
            self._config.max_rows,
            Log(),
            Log(begin),
            begin,
        )

    def ended(self, handle: Handle) -> None:
        """A watched call has ended, however it did: what has come of it can be checked."""
        handle.watch = None
        watch = self._watches.pop(handle.session.id, None)
        if watch is None:
            return
        inputs = handle.session.inputs if watch.before is None else watch.inputs
        end = min(inputs.end, watch.outputs.end)
        if end - watch.begin < honesty.MIN_ROWS:
            self._drop("short")
            return
        call = Call(
            handle.name,
            watch.node,
            watch.before,
            watch.blocks,
            watch.stages,
            watch.declared,
            handle.zones,
            handle.on_host,
            _parts(inputs, 0, end),
            watch.begin,
            _parts(watch.outputs, watch.begin, end),
        )
        try:
            self._waiting.put_nowait(call)
        except asyncio.QueueFull:
            self._drop("busy")

    def _drop(self, cause: str) -> None:
        self._reputation.count(cause)
        self._on_dropped(cause)

    # --- afterwards ------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(TELL_S):
                    call = await self._waiting.get()
            except TimeoutError:
                self._tell()
                continue
            try:
                cause = await self._check(call)
                if cause is not None:
                    self._drop(cause)
            finally:
                self._waiting.task_done()

    async def _check(self, call: Call) -> str | None:
        """One check; why it came to nothing, if it did."""
        replayed = self.replayed_rows
        witness, answer = await self._ask_another(call, {call.node})
        if witness is None:
            return "busy" if self._candidates(call.blocks, {call.node}, call.rows, call.zones) else "alone"
        comparison = await self._compare(call, call.outputs, answer, witness)
        finding = honesty.judge(call.node, witness.node, same=comparison.same)
        if not comparison.same:
            finding = await self._appeal(call, witness, answer)
        quarantined = self._reputation.note(finding, time.monotonic())
        found = Found(call.name, finding, call.blocks, comparison, self.replayed_rows - replayed, tuple(quarantined))
        if finding.result != "agreed":
            log.warning(
                "blocks %s of session %s were computed again: %s; %d of %d rows differ, %s",
                call.blocks,
                call.name,
                finding.result,
                comparison.wrong,
                comparison.rows,
                finding.reason,
            )
        self._tell()
        if quarantined:
            self._sessions.shun()
        self._on_found(found)
        return None

    async def _appeal(self, call: Call, witness: msg.Record, answer: Sequence[wire_rows.Rows]) -> honesty.Finding:
        """Two servers differ: a third one decides, and where inputs came from another server, the accused is heard."""
        third, other = await self._ask_another(call, {call.node, witness.node})
        if third is None:
            return honesty.judge(call.node, witness.node, same=False)
        with_checked = await self._compare(call, call.outputs, other, third)
        with_witness = await self._compare(call, answer, other, third, witness)
        again_right = False
        if call.before is not None and with_witness.same and not with_checked.same:
            accused = self._directory.view.get(call.node)
            again = await self._ask(accused, call) if accused is not None else None
            again_right = again is not None and (await self._compare(call, again, other, third)).same
        return honesty.judge(
            call.node,
            witness.node,
            third.node,
            same=False,
            third_with_checked=with_checked.same,
            third_with_witness=with_witness.same,
            before=call.before,
            again_right=again_right,
        )

    def _tell(self) -> None:
        """Name those in quarantine in this gateway's record."""
        if self._directory.record is not None:
            self._directory.update(quarantined=self._reputation.told(time.monotonic()))

    # --- witnesses -------------------------------------------------------------------------------------------

    def _candidates(
        self, blocks: BlockRange, without: set[str], need_tokens: int, zones: Sequence[Zones]
    ) -> list[msg.Record]:
        now = time.monotonic()
        view = self._directory.view
        records = view.live(now)
        avoid = self._reputation.avoid(records, self._directory.node, now) | view.suspects(now)
        return honesty.witnesses(
            records,
            self._sessions.model,
            blocks,
            self._num_blocks,
            need_tokens=need_tokens,
            without=without | avoid,
            zones=zones,
        )

    async def _ask_another(
        self, call: Call, without: set[str]
    ) -> tuple[msg.Record, Sequence[wire_rows.Rows]] | tuple[None, Sequence[wire_rows.Rows]]:
        """Any server but those, and what it makes of the call's inputs; of servers that fail two are tried."""
        until = time.monotonic() + self._config.patience_s
        without = set(without)
        tries = 0
        while tries < 2:
            candidates = self._candidates(call.blocks, without, call.rows, call.zones)
            record = honesty.pick(candidates, self._rng)
            if record is None:
                if not candidates or time.monotonic() >= until:
                    break
                await asyncio.sleep(min(1.0, self._config.patience_s))
                continue
            answer = await self._ask(record, call)
            if answer is not None:
                return record, answer
            without.add(record.node)
            tries += 1
        return None, ()

    async def _ask(self, record: msg.Record, call: Call) -> Sequence[wire_rows.Rows] | None:
        """What `record`'s server makes of a call's inputs, rows from `begin` on; None when it does not answer."""
        replay = _Replay(record.node, call.blocks)
        sessions = self._sessions
        sessions.attach(replay.id, replay)
        try:
            async with asyncio.timeout(self._config.answer_s):
                opened = replay.expect()
                sessions.post(
                    record.node,
                    record.addresses,
                    msg.Open(
                        session=replay.id,
                        epoch=1,
                        model=self._sessions.model,
                        start=call.blocks.start,
                        end=call.blocks.end,
                        stages=call.stages,
                        max_tokens=call.rows,
                        wire=sessions.wire,
                        next=None,
                    ),
                )
                await opened
            if call.on_host is not None:
                call.on_host(record.node, call.blocks)  # from here on it is given inputs
            answer: list[wire_rows.Rows] = []
            for at in range(0, call.rows, self._config.step_rows):
                rows = min(self._config.step_rows, call.rows - at)
                parts = _cut(call.inputs, at, rows)
                item = msg.StepItem(replay.id, at, rows, call.blocks.start)
                tensor, buffers = wire_rows.join(parts)
                arrived = replay.expect(at, rows)
                sessions.post(record.node, record.addresses, msg.Step([item], tensor), buffers)
                self.replayed_rows += rows
                async with asyncio.timeout(self._config.answer_s):
                    part = await arrived
                if at + rows > call.begin:
                    answer.append(part[max(0, call.begin - at) :].copy())
            return answer
        except _ANSWER_ERRORS as error:
            log.info("server %s did not compute a call again: %s", record.node[:8], error or type(error).__name__)
            return None
        finally:
            sessions.detach(replay.id)
            sessions.post(record.node, record.addresses, msg.Close([replay.id]))

    async def _compare(
        self,
        call: Call,
        one: Sequence[wire_rows.Rows],
        other: Sequence[wire_rows.Rows],
        second: msg.Record,
        first: msg.Record | None = None,
    ) -> honesty.Comparison:
        """Two answers to a call's inputs, the first from the checked server unless `first` says from whom."""
        declared = call.declared if first is None else honesty.Declared.of(first)
        within = honesty.tolerance([declared, honesty.Declared.of(second)], self._sessions.wire)
        size = sum(part.count for part in one)
        inputs = _cut(call.inputs, call.begin, size)
        return honesty.compare(await asyncio.to_thread(differences, inputs, one, other), within)

    # --- looking ---------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """For `shoal status`: what was checked, and what nobody can be compared with."""
        spans = coverage(self._directory.live(), self._sessions.model, self._num_blocks)
        return {
            "rate": self._config.rate,
            "results": dict(self._reputation.results),
            "replayed_rows": self.replayed_rows,
            "uncompared": [str(blocks) for blocks, servers in spans if servers == 1],
        }


class _Replay:
    """A session beside the chains, on one server, one step at a time (sessions.Guest)."""

    def __init__(self, node: str, blocks: BlockRange) -> None:
        self.id = secrets.token_bytes(16)
        self._node = node
        self._blocks = blocks
        self._expected: tuple[int, int] | None = None
        self._arrives: asyncio.Future[wire_rows.Rows] | None = None

    def expect(self, position: int = -1, rows: int = 0) -> asyncio.Future[wire_rows.Rows]:
        """What comes next: the answer to Open (rows 0), or to the step at `position`."""
        self._expected = position, rows
        self._arrives = asyncio.get_running_loop().create_future()
        return self._arrives

    def on_message(self, node: str, message: msg.Message) -> None:
        if node != self._node or self._arrives is None or self._arrives.done():
            return
        if isinstance(message, msg.Opened):
            if self._expected == (-1, 0):
                self._arrives.set_result(wire_rows.Rows("f32", 1, 0, b""))
        elif isinstance(message, msg.Denied | msg.Gone):
            self._arrives.set_exception(PeerLost(message.message, cause=message.code))

    def on_rows(self, node: str, item: msg.StepItem, rows: wire_rows.Rows) -> None:
        wanted = (item.position, item.rows) == self._expected and item.block == self._blocks.end
        if node == self._node and wanted and self._arrives is not None and not self._arrives.done():
            self._arrives.set_result(rows)

    def on_lost(self, node: str, cause: str) -> None:
        if node == self._node and self._arrives is not None and not self._arrives.done():
            self._arrives.set_exception(PeerLost("The connection was lost.", cause=cause))


def differences(
    inputs: Sequence[wire_rows.Rows], one: Sequence[wire_rows.Rows], other: Sequence[wire_rows.Rows]
) -> list[honesty.Difference]:
    """Row by row, how far two answers to the same inputs are apart: infinitely where numbers are not finite. All three
    have the same number of rows; parts may be cut differently."""
    found: list[honesty.Difference] = []
    total = sum(part.count for part in one)
    for at in range(0, total, 64):
        rows = min(64, total - at)
        try:
            x, a, b = (_array(_cut(parts, at, rows)) for parts in (inputs, one, other))
        except NotFinite:
            found += [honesty.Difference(math.inf, 0.0, 0.0)] * rows
            continue
        error = np.linalg.norm(a - b, axis=1)
        output = np.minimum(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
        added = np.minimum(np.linalg.norm(a - x, axis=1), np.linalg.norm(b - x, axis=1))
        found += [honesty.Difference(*row) for row in zip(error.tolist(), output.tolist(), added.tolist(), strict=True)]
    return found


def _array(parts: Sequence[wire_rows.Rows]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[rows, width] in float64: squares of float32's largest values are no trouble."""
    return np.concatenate([tensors.decode(part.tensor, part.data) for part in parts]).astype(np.float64)


def _parts(log: Log, start: int, end: int) -> tuple[wire_rows.Rows, ...]:
    """The rows start:end of a log."""
    return tuple(rows[: max(0, end - at)] for at, _, rows in log.since(start) if at < end)


def _cut(parts: Sequence[wire_rows.Rows], start: int, count: int) -> list[wire_rows.Rows]:
    """`count` rows from row `start` of parts that follow each other."""
    found: list[wire_rows.Rows] = []
    at = 0
    for part in parts:
        low, high = max(0, start - at), min(part.count, start + count - at)
        if low < high:
            found.append(part[low:high])
        at += part.count
    return found


def _report(task: asyncio.Task[None]) -> None:
    """Checks only end with `close`. Should they fail, calls go on without them, and that must be seen."""
    if not task.cancelled() and task.exception() is not None:
        log.critical("checks of servers have ended", exc_info=task.exception())
