"""The server's side of sessions: open, order the steps, choose the next batch, say where outputs go, close.

Pure: events come in as method calls with `now`, decisions go out as actions; payloads (tensors on a real server,
integers in the simulator) pass through untouched. States of a session:

    (none) --Open--> open --Close | driver lost | idle too long--> (none)
                      |  step in order: ready -> computing -> pushed on
                      |  step ahead of order: held until the gap closes
                      |  step seen before: dropped (its output went out then); one seen in part: the rest is taken

Because a model's forward pass is a function of its inputs, a step that arrives twice, late, or from a server that
was thought dead carries the same numbers: order by position is all that correctness needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shoal.spec.ids import BlockRange
from shoal.swarm.admission import CachePool
from shoal.wire import messages as msg

Payload = Any
"""Rows of activations. Opaque here: the edge slices, joins and encodes them."""


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """What one server offers and how it batches."""

    model: str
    blocks: BlockRange
    cache_tokens: int
    max_sessions: int = 256
    prefill_rows: int = 512
    """Rows of prompt that one batch may hold besides the decode rows; bounds how long a decode step waits."""
    decode_rows_at_most: int = 64
    held_items: int = 256
    """Steps of one session that may wait for an earlier one."""
    idle_s: float = 900.0
    """A session that neither stepped nor was closed for this long is dropped."""
    active_s: float = 2.0
    """A session that decoded within this time counts as active when batches are sized."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Send `message` to `node` over the connection it opened to us."""

    node: str
    message: msg.Message


@dataclass(frozen=True, slots=True)
class Emit:
    """Send outputs: to the next server (`hop`), or to the driver `node` as Result or Journal (`journal_block`)."""

    items: tuple[tuple[msg.StepItem, Payload], ...]
    wire: msg.WireType
    hop: msg.Hop | None = None
    node: str = ""
    journal_block: int | None = None


@dataclass(frozen=True, slots=True)
class OpenCache:
    session: bytes
    blocks: BlockRange
    max_tokens: int


@dataclass(frozen=True, slots=True)
class DropCache:
    session: bytes


Action = Reply | Emit | OpenCache | DropCache


@dataclass(frozen=True, slots=True)
class Work:
    """One session's part of a batch."""

    session: bytes
    generation: int
    item: msg.StepItem
    payload: Payload
    wire: msg.WireType
    """The format this session agreed on, for what comes in and what goes out."""


@dataclass(slots=True)
class _Session:
    id: bytes
    generation: int
    """Tells a re-opened session from its earlier life while a batch of that life is still computing."""
    driver: str
    epoch: int
    blocks: BlockRange
    stages: int
    max_tokens: int
    wire: msg.WireType
    next: msg.Hop | None
    forward_from: int
    journal_from: int
    opened_at: float
    used_at: float
    decoded_at: float = -1e18
    position: int = 0
    computing: bool = False
    waiting: dict[int, tuple[msg.StepItem, Payload]] = field(default_factory=dict)


@dataclass(slots=True)
class ServingCounters:
    steps: int = 0
    rows: int = 0
    batches: int = 0
    duplicates: int = 0
    unknown: int = 0
    denied: int = 0


class Serving:
    """All sessions of one server. Not thread-safe: the network loop owns it."""

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self.pool = CachePool(config.cache_tokens)
        self.counters = ServingCounters()
        self.draining = False
        self._sessions: dict[bytes, _Session] = {}
        self._ready: dict[bytes, None] = {}  # insertion order = order of arrival
        self._generation = 0

    # --- opening and closing ---------------------------------------------------------------------------------

    def on_open(self, driver: str, message: msg.Open, now: float) -> list[Action]:
        """Admit a session or say why not. Opening again with a higher epoch starts it afresh."""
        known = self._sessions.get(message.session)
        if known is not None and known.driver != driver:
            return [self._deny(driver, message, "unknown_session", "This session id belongs to another driver.")]
        if known is not None and message.epoch < known.epoch:
            return [self._deny(driver, message, "stale_epoch", "A newer plan of this session is known here.")]
        if known is not None and message.epoch == known.epoch:
            return [Reply(driver, msg.Opened(message.session, message.epoch))]
        refusal = self._refusal(message, known)
        if refusal is not None:
            self.counters.denied += 1
            return [self._deny(driver, message, *refusal)]
        actions: list[Action] = []
        if known is not None:
            actions += self._forget(known, now, keep_reservation=True)
        self._generation += 1
        blocks = BlockRange(message.start, message.end)
        self._sessions[message.session] = _Session(
            id=message.session,
            generation=self._generation,
            driver=driver,
            epoch=message.epoch,
            blocks=blocks,
            stages=message.stages,
            max_tokens=message.max_tokens,
            wire=message.wire,
            next=message.next,
            forward_from=message.forward_from,
            journal_from=message.journal_from,
            opened_at=now,
            used_at=now,
        )
        actions.append(OpenCache(message.session, blocks, message.max_tokens))
        actions.append(Reply(driver, msg.Opened(message.session, message.epoch)))
        return actions

    def _refusal(self, message: msg.Open, known: _Session | None) -> tuple[str, str] | None:
        config = self.config
        if self.draining:
            return "draining", "This server is leaving; use another one."
        if message.model != config.model:
            return "unknown_model", f"This server hosts {config.model}."
        if not (config.blocks.start <= message.start < message.end <= config.blocks.end):
            return "blocks_not_hosted", f"This server hosts blocks {config.blocks}."
        if known is None and len(self._sessions) >= config.max_sessions:
            return "full", f"This server holds its limit of {config.max_sessions} sessions."
        if not self.pool.reserve(message.session, message.max_tokens):
            return "full", f"No cache for {message.max_tokens} tokens; {self.pool.free_tokens} are free."
        return None

    def _deny(self, driver: str, message: msg.Open, code: str, text: str) -> Reply:
        # Only "full" passes by itself; the other reasons need another plan, not patience.
        retry = self.pool.retry_after_s() if code == "full" else 0.0
        return Reply(driver, msg.Denied(message.session, message.epoch, code, text, retry))

    def on_close(self, driver: str, sessions: Iterable[bytes], now: float) -> list[Action]:
        actions: list[Action] = []
        for id in sessions:
            session = self._sessions.get(id)
            if session is not None and session.driver == driver:
                actions += self._forget(session, now)
        return actions

    def on_driver_lost(self, driver: str, now: float) -> list[Action]:
        """A driver's connection ended: nobody can use its sessions any more."""
        lost = [session for session in self._sessions.values() if session.driver == driver]
        return [action for session in lost for action in self._forget(session, now)]

    def on_push_lost(self, node: str) -> list[Action]:
        """The link to a next server broke. Caches stay: the driver decides whether we re-dial or push elsewhere."""
        by_driver: dict[str, list[bytes]] = {}
        for session in self._sessions.values():
            if session.next is not None and session.next.node == node:
                by_driver.setdefault(session.driver, []).append(session.id)
        return self._gone(by_driver, "next_lost", f"The connection to {node} broke.")

    def on_failed(
        self, works: Sequence[Work], message: str, now: float, *, code: Literal["failed", "not_finite"] = "failed"
    ) -> list[Action]:
        """Computing a batch failed; its sessions cannot go on here."""
        by_driver: dict[str, list[bytes]] = {}
        actions: list[Action] = []
        for work in works:
            session = self._sessions.get(work.session)
            if session is not None and session.generation == work.generation:
                by_driver.setdefault(session.driver, []).append(session.id)
                actions += self._forget(session, now)
        return self._gone(by_driver, code, message) + actions

    def drain(self) -> list[Action]:
        """Take no new sessions and ask every driver to move its own elsewhere."""
        self.draining = True
        by_driver: dict[str, list[bytes]] = {}
        for session in self._sessions.values():
            by_driver.setdefault(session.driver, []).append(session.id)
        return self._gone(by_driver, "draining", "This server is leaving.")

    def resume(self) -> None:
        """Stay after all: take new sessions again. Those that did not find another server are served on."""
        self.draining = False

    def leave(self, now: float) -> list[Action]:
        """Give up the sessions that are still here; their drivers rebuild them where they can."""
        by_driver: dict[str, list[bytes]] = {}
        actions: list[Action] = []
        for session in list(self._sessions.values()):
            by_driver.setdefault(session.driver, []).append(session.id)
            actions += self._forget(session, now)
        return self._gone(by_driver, "left", "This server has left.") + actions

    def expire(self, now: float) -> list[Action]:
        """Drop sessions that nobody touched for idle_s."""
        old = [s for s in self._sessions.values() if now - s.used_at > self.config.idle_s and not s.computing]
        by_driver: dict[str, list[bytes]] = {}
        actions: list[Action] = []
        for session in old:
            by_driver.setdefault(session.driver, []).append(session.id)
            actions += self._forget(session, now)
        return self._gone(by_driver, "expired", f"Unused for {self.config.idle_s:.0f} s.") + actions

    def _gone(self, by_driver: dict[str, list[bytes]], code: str, text: str) -> list[Action]:
        step = msg.MAX_ITEMS
        return [
            Reply(driver, msg.Gone(ids[at : at + step], code, text))
            for driver, ids in by_driver.items()
            for at in range(0, len(ids), step)
        ]

    def _forget(self, session: _Session, now: float, *, keep_reservation: bool = False) -> list[Action]:
        del self._sessions[session.id]
        self._ready.pop(session.id, None)
        if not keep_reservation:
            self.pool.release(session.id, now - session.opened_at)
        return [DropCache(session.id)]

    # --- links -----------------------------------------------------------------------------------------------

    def on_relink(self, driver: str, message: msg.Relink, now: float) -> list[Action]:
        """Push a session's outputs elsewhere from now on, and say from which position on that holds."""
        session = self._sessions.get(message.session)
        if session is None or session.driver != driver:
            text = "No such session here."
            return [Reply(driver, msg.Denied(message.session, message.epoch, "unknown_session", text, 0.0))]
        if message.epoch < session.epoch:
            text = "A newer plan of this session is known here."
            return [Reply(driver, msg.Denied(message.session, message.epoch, "stale_epoch", text, 0.0))]
        session.epoch = message.epoch
        session.next = message.next
        session.used_at = now
        return [Reply(driver, msg.Relinked(message.session, message.epoch, session.position))]

    # --- steps -----------------------------------------------------------------------------------------------

    def on_steps(self, items: Iterable[tuple[msg.StepItem, Payload]], now: float) -> list[Action]:
        """Take inputs from a driver or an upstream server, in any order, any number of times."""
        actions: list[Action] = []
        for item, payload in items:
            session = self._sessions.get(item.session)
            if session is None:
                # Late pushes for a closed session are normal; the driver knows, because it closed it or lost us.
                self.counters.unknown += 1
            else:
                actions += self._on_item(session, item, payload, now)
        return actions

    def _on_item(self, session: _Session, item: msg.StepItem, payload: Payload, now: float) -> list[Action]:
        if item.block != session.blocks.start:
            # A late push of an earlier chain that was cut elsewhere: right numbers, but of another block.
            self.counters.unknown += 1
            return []
        session.used_at = now
        end = item.position + item.rows
        known = session.waiting.get(item.position)
        if end <= session.position or (known is not None and known[0].rows >= item.rows):
            self.counters.duplicates += 1
            return []
        if end > session.max_tokens or len(session.waiting) >= self.config.held_items:
            reason = f"Step {item.position}:{end} does not fit: at {session.position} of {session.max_tokens} tokens."
            gone = self._gone({session.driver: [session.id]}, "out_of_order", reason)
            return gone + self._forget(session, now)
        session.waiting[item.position] = (item, payload)
        if not session.computing:
            self._make_ready(session)
        return []

    def _make_ready(self, session: _Session) -> None:
        """Queue the session if the step that continues its cache has come."""
        at = session.position
        for position in sorted(position for position in session.waiting if position < at):
            # Replays cut the same rows into other chunks, so a waiting chunk may overlap what is done by now.
            item, payload = session.waiting.pop(position)
            skip = at - position
            known = session.waiting.get(at)
            if item.rows - skip > (known[0].rows if known is not None else 0):
                rest = msg.StepItem(item.session, at, item.rows - skip, item.block)
                session.waiting[at] = (rest, payload[skip:])
        if at in session.waiting:
            self._ready[session.id] = None

    def next_batch(self, now: float) -> list[Work]:
        """The sessions to compute together now, oldest first; empty when nothing is ready.

        Decode rows are limited to the active sessions divided by the stages of their chain: a server that took all
        of them at once would leave the other servers of the chain idle (one convoy walking through the stages).
        """
        if not self._ready:
            return []
        decode_limit = self._decode_limit(now)
        prefill_left = self.config.prefill_rows
        works: list[Work] = []
        decode_rows = 0
        for id in list(self._ready):
            session = self._sessions[id]
            item, payload = session.waiting[session.position]
            if item.rows == 1:
                if decode_rows >= decode_limit:
                    continue
                decode_rows += 1
            else:
                if prefill_left < self.config.prefill_rows and item.rows > prefill_left:
                    continue
                prefill_left -= item.rows
            del self._ready[id]
            del session.waiting[session.position]
            session.computing = True
            if item.rows == 1:
                session.decoded_at = now
            works.append(Work(id, session.generation, item, payload, session.wire))
        return works

    def _decode_limit(self, now: float) -> int:
        active = 0
        stages = 1
        for session in self._sessions.values():
            if now - session.decoded_at <= self.config.active_s or session.id in self._ready:
                active += 1
                stages = max(stages, session.stages)
        return min(self.config.decode_rows_at_most, max(1, -(-active // stages)))

    def on_computed(self, works: Sequence[Work], outputs: Sequence[Payload], now: float) -> list[Action]:
        """Take a batch's outputs: advance the sessions and send the outputs on, one frame per destination."""
        done: list[tuple[_Session, msg.StepItem, Payload]] = []
        self.counters.batches += 1
        for work, output in zip(works, outputs, strict=True):
            session = self._sessions.get(work.session)
            if session is None or session.generation != work.generation:
                continue  # closed or re-opened while it was computing
            session.computing = False
            session.used_at = now
            session.position = work.item.position + work.item.rows
            self.counters.steps += 1
            self.counters.rows += work.item.rows
            self._make_ready(session)
            done.append((session, work.item, output))
        return self._emit(done)

    def _emit(self, done: Iterable[tuple[_Session, msg.StepItem, Payload]]) -> list[Action]:
        pushes: dict[tuple[str, msg.WireType], list[tuple[msg.StepItem, Payload]]] = {}
        hops: dict[str, msg.Hop] = {}
        results: dict[tuple[str, msg.WireType], list[tuple[msg.StepItem, Payload]]] = {}
        journals: dict[tuple[str, msg.WireType, int], list[tuple[msg.StepItem, Payload]]] = {}
        for session, step, output in done:
            item = msg.StepItem(step.session, step.position, step.rows, session.blocks.end)
            end = item.position + item.rows
            if end > session.forward_from:
                if session.next is None:
                    results.setdefault((session.driver, session.wire), []).append((item, output))
                else:
                    hops[session.next.node] = session.next
                    pushes.setdefault((session.next.node, session.wire), []).append((item, output))
            if session.next is not None and end > session.journal_from:
                key = (session.driver, session.wire, session.blocks.end)
                journals.setdefault(key, []).append((item, output))
        actions: list[Action] = []
        # Pushes first: they are the critical path, the journal is not.
        for (node, kind), items in pushes.items():
            actions.append(Emit(tuple(items), kind, hop=hops[node]))
        for (node, kind), items in results.items():
            actions.append(Emit(tuple(items), kind, node=node))
        for (node, kind, block), items in journals.items():
            actions.append(Emit(tuple(items), kind, node=node, journal_block=block))
        return actions

    # --- looking ---------------------------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    @property
    def queue_rows(self) -> int:
        return sum(self._sessions[id].waiting[self._sessions[id].position][0].rows for id in self._ready)

    def position(self, session: bytes) -> int | None:
        """How many tokens of a session are in the cache; None when it is not here."""
        known = self._sessions.get(session)
        return None if known is None else known.position
