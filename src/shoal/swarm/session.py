"""The driver's side of one session: open a chain, feed it, keep the journal, and rebuild what dies.

Pure: messages and losses come in with `now`, actions go out. The journal holds the inputs of every stage, so any stage
can be rebuilt on another server by replaying them; the stages that lived keep their caches.

    planning --plan found--> opening --all answered--> live --close--> ended
       ^                        |                        |
       +------ lost / denied ---+------------------------+      (no plan for patience_s, or too many tries: ended)

How a lost stage comes back (docs/concepts/lost-server.md tells it as a story):
 1. the lost stage and its neighbours that were not yet rebuilt form a run; other servers are planned for its blocks;
 2. they get Open; once all have opened, the surviving stage before them gets Relink and answers from which position on
    it pushes to them;
 3. everything below that position is replayed from the journal; what the next stage has already is not sent on;
 4. steps that arrive twice are dropped by position, so nobody needs to know exactly how far the dead server came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shoal.errors import Full, NotFinite, ShoalError, SwarmIncomplete
from shoal.spec.ids import BlockRange
from shoal.swarm.journal import Log, Payload
from shoal.swarm.routing import Hop
from shoal.wire import messages as msg

Plan = Callable[[BlockRange, frozenset[str], int, float], Sequence[Hop] | None]
"""plan(blocks, avoid, need_tokens, now) -> hops that cover the blocks in order, or None."""


NOT_FINITE_TRIES = 2
"""So often a session's numbers may turn out infinite or NaN without any progress in between. Once may be a server's
broken memory; twice is the model or its input, and no third server would do better."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    patience_s: float = 10.0
    """How long to wait for servers to appear before the session fails with swarm_incomplete."""
    replan_s: float = 0.5
    """How often to look again meanwhile: servers stop being suspected or full without a word from the registry."""
    open_timeout_s: float = 5.0
    """A server that does not answer Open or Relink within this time is left alone."""
    progress_timeout_s: float = 120.0
    """A live server that owes an output for longer than this is replaced. Generous: pings tell dead from busy."""
    avoid_s: float = 5.0
    """How long this session keeps away from a server that failed it."""
    replay_rows: int = 512
    """Journal rows joined into one replay step."""
    window_chunks: int = 3
    """Prompt chunks under way in the first stage beyond one for every stage."""
    max_replans: int = 24
    """Plans tried without any progress in between before giving up."""


@dataclass(frozen=True, slots=True)
class Tell:
    node: str
    addresses: tuple[str, ...]
    message: msg.Message


@dataclass(frozen=True, slots=True)
class Feed:
    """Send one step to `node`; `parts` are consecutive payloads to be joined by rows."""

    node: str
    item: msg.StepItem
    parts: tuple[Payload, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Output of the last block for positions position..position+rows, each delivered exactly once and in order."""

    position: int
    rows: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Failed:
    error: ShoalError


@dataclass(frozen=True, slots=True)
class Live:
    """Every stage answered: the session is admitted, or its chain stands again."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The first output after a loss has arrived."""

    cause: str
    blocks: tuple[str, ...]
    gone: tuple[str, ...]
    stall_s: float
    """From the last output before the loss was noticed (or from the step then under way) to this output."""
    replayed_rows: int


Action = Tell | Feed | Deliver | Live | Failed | Recovered


@dataclass(slots=True)
class _Stage:
    hop: Hop
    epoch: int
    asked: bool = True
    """Open or Relink was sent for the current plan. A Relink waits until all new servers have opened."""
    answered: bool = False
    """Opened (and relinked, where asked) for the current plan."""
    synced: bool = False
    """Its cache follows the journal: it was replayed, or it lived all along."""
    alive: bool = True
    leaving: bool = False
    """It works, but asked to be replaced."""
    relinking: bool = False
    sent_end: int = 0
    """For stages that we feed: rows sent so far."""
    computed_end: int = 0
    """Positions below this it has certainly computed: it sent us outputs of theirs, or of later ones."""
    relay_until: int = 0
    """Positions below this reach the stage from our journal; those above are pushed by the stage before it."""

    @property
    def node(self) -> str:
        return self.hop.node


@dataclass(slots=True)
class SessionCounters:
    replans: int = 0
    recoveries: int = 0
    replayed_rows: int = 0


@dataclass(slots=True)
class _Loss:
    cause: str
    since: float
    blocks: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    replayed_rows: int = 0


class Session:
    """One session over a chain of servers.

    Call `start` once, then `feed` for every chunk of inputs, and hand in what happens. Every method returns the actions
    to carry out, in order. `wake_at` says when `on_timer` wants to be called next (None: not at all).
    """

    def __init__(
        self,
        id: bytes,
        *,
        model: str,
        num_blocks: int,
        max_tokens: int,
        wire: msg.WireType,
        plan: Plan,
        results_from: int = 0,
        config: SessionConfig | None = None,
    ) -> None:
        """`results_from`: outputs below this position are not wanted (all of a prompt but its last row)."""
        self.id = id
        self.counters = SessionCounters()
        self.ended = False
        self._model = model
        self._blocks = BlockRange(0, num_blocks)
        self._max_tokens = max_tokens
        self._wire: msg.WireType = wire
        self._plan = plan
        self._config = config or SessionConfig()
        self._stages: list[_Stage] = []
        self._epoch = 0
        self._logs: dict[int, Log] = {0: Log()}
        """Inputs by the index of the block that takes them; num_blocks: the outputs of the last block."""
        self._results_from = results_from
        self._result_end = 0
        """How far any last stage has come, wanted outputs or not."""
        self._logs[num_blocks] = Log(results_from, keep=False)
        self._avoid: dict[str, float] = {}
        self._avoid_if_possible: dict[str, float] = {}
        """Reachable from here but not from its neighbour: taken again when there is no other."""
        self._was_live = False
        self._planning_since: float | None = None
        self._planned_at = 0.0
        self._asked_at: float | None = None
        self._progress_at = 0.0
        self._replans_since_progress = 0
        self._not_finite = 0
        self._loss: _Loss | None = None
        self._full_retry_s: float | None = None

    # --- the caller's side -----------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        self._progress_at = now
        return self._replan(now)

    def feed(self, rows: int, payload: Payload, now: float) -> list[Action]:
        """Append `rows` inputs of block 0."""
        if self.ended:
            return []
        log = self._logs[0]
        if log.end + rows > self._max_tokens:
            raise ValueError(f"{log.end + rows} rows exceed the {self._max_tokens} this session reserved")
        if log.end == self._done:
            self._progress_at = now  # nothing was owed until this step: the clock of the chain starts here
        log.add(log.end, rows, payload)
        return self._feed_first()

    def close(self) -> list[Action]:
        """Finished or cancelled: free the caches everywhere."""
        self.ended = True
        return [Tell(stage.node, stage.hop.addresses, msg.Close([self.id])) for stage in self._stages if stage.alive]

    @property
    def chain(self) -> tuple[Hop, ...]:
        return tuple(stage.hop for stage in self._stages)

    @property
    def inputs(self) -> Log:
        """All rows that were fed."""
        return self._logs[self._blocks.start]

    @property
    def results_from(self) -> int:
        """Outputs below this position are not asked for, except of a lone server."""
        return self._results_from

    @property
    def live(self) -> bool:
        """Every stage answered: steps flow."""
        return bool(self._stages) and all(stage.alive and stage.answered for stage in self._stages)

    # --- what happens ----------------------------------------------------------------------------------------

    def on_message(self, node: str, message: msg.Message, now: float) -> list[Action]:
        """Opened, Relinked, Denied or Gone from a server of the chain; anything late is ignored."""
        if self.ended:
            return []
        stage = self._find(node)
        if stage is None:
            return []
        if isinstance(message, msg.Opened) and message.epoch == stage.epoch:
            stage.answered = not stage.relinking
            return self._relink_when_open() + self._maybe_live(now)
        if isinstance(message, msg.Relinked) and message.epoch == self._epoch and stage.relinking:
            stage.relinking = False
            stage.answered = True
            at = self._stages.index(stage)
            if at + 1 < len(self._stages):
                self._stages[at + 1].relay_until = message.position
            return self._maybe_live(now)
        if isinstance(message, msg.Denied) and message.epoch == self._epoch:
            if message.code == "full":
                self._full_retry_s = message.retry_after_s
            return self._lose([stage], message.code, now, reachable=True)
        if isinstance(message, msg.Gone):
            if not stage.answered and message.code != "draining":
                return []  # sent before our Open or Relink was read there: it is about the plan before this one
            if message.code == "next_lost":
                at = self._stages.index(stage)
                after = self._stages[at + 1 : at + 2]
                return self._lose(after, "link", now, reachable=True)
            if message.code == "not_finite":
                self._not_finite += 1
                if self._not_finite >= NOT_FINITE_TRIES:
                    return self._fail_with(
                        NotFinite(
                            f"The numbers of this request are not finite after block {stage.hop.blocks.start}, on"
                            f" {NOT_FINITE_TRIES} attempts: {message.message}",
                            hint="Are the weights intact, and is the type they run in (--dtype) wide enough for them?",
                        )
                    )
            if message.code == "draining" and self.live:
                stage.leaving = True
                return self._hand_over(stage, now)
            return self._lose([stage], message.code, now, reachable=True)
        return []

    def on_journal(self, node: str, block: int, item: msg.StepItem, payload: Payload, now: float) -> list[Action]:
        """A copy of the inputs of `block` that `node` pushed on."""
        log = self._logs.get(block)
        if self.ended or log is None or block in (self._blocks.start, self._blocks.end) or self._beyond(item):
            return []
        self._confirm(node, block, item)
        added = log.add(item.position, item.rows, payload)
        if not added:
            return []
        self._progress_at = now
        actions: list[Action] = []
        for stage in self._stages[1:]:
            if stage.hop.blocks.start == block and self.live:
                actions += self._relay(stage)
        return actions + self._feed_first()

    def on_result(self, node: str, item: msg.StepItem, payload: Payload, now: float) -> list[Action]:
        """Outputs of the last block, from `node`."""
        if self.ended or self._beyond(item):
            return []
        self._confirm(node, self._blocks.end, item)
        self._progress_at = now
        self._result_end = max(self._result_end, item.position + item.rows)
        actions: list[Action] = []
        for position, rows, fresh in self._logs[self._blocks.end].add(item.position, item.rows, payload):
            actions.append(Deliver(position, rows, fresh))
        if not actions:
            return self._feed_first()
        self._replans_since_progress = 0
        self._not_finite = 0
        if self._loss is not None and self.live:
            loss, self._loss = self._loss, None
            self.counters.recoveries += 1
            actions.append(
                Recovered(loss.cause, tuple(loss.blocks), tuple(loss.gone), now - loss.since, loss.replayed_rows)
            )
        return actions + self._feed_first()

    def on_peer_lost(self, node: str, cause: str, now: float) -> list[Action]:
        """Our connection to a server ended (killed, frozen, cut)."""
        stage = self._find(node)
        if self.ended or stage is None or not stage.alive:
            return []
        return self._lose([stage], cause, now, reachable=False)

    def evict(self, node: str, cause: str, now: float) -> list[Action]:
        """Go on without a server that works but may not be used any more."""
        stage = self._find(node)
        if self.ended or stage is None or not stage.alive:
            return []
        return self._lose([stage], cause, now, reachable=True)

    def on_view_changed(self, now: float) -> list[Action]:
        """The registry changed: a waiting session may find its chain now, one on a leaving server another server."""
        if self.ended:
            return []
        if self._planning_since is not None:
            return self._replan(now)
        leaving = next((stage for stage in self._stages if stage.leaving), None)
        return self._hand_over(leaving, now) if leaving is not None and self.live else []

    @property
    def wake_at(self) -> float | None:
        if self.ended:
            return None
        if self._planning_since is not None:
            return min(self._planning_since + self._config.patience_s, self._planned_at + self._config.replan_s)
        if self._asked_at is not None:
            return self._asked_at + self._config.open_timeout_s
        if self._done < self._logs[0].end:
            return self._progress_at + self._config.progress_timeout_s
        return None

    def on_timer(self, now: float) -> list[Action]:
        wake = self.wake_at
        if wake is None or now < wake:
            return []
        if self._planning_since is not None:
            return self._replan(now)
        if self._asked_at is not None:
            silent = [stage for stage in self._stages if stage.asked and not stage.answered]
            return self._lose(silent, "no answer", now, reachable=True)
        return self._lose([self._stuck()], "no progress", now, reachable=True)

    # --- losing and planning ---------------------------------------------------------------------------------

    @property
    def _done(self) -> int:
        """Outputs below this position were delivered, or were never wanted."""
        return self._logs[self._blocks.end].end

    @property
    def _delivered(self) -> int:
        """Like _done, but 0 as long as nothing was delivered."""
        return self._done if self._done > self._results_from else 0

    def _find(self, node: str) -> _Stage | None:
        return next((stage for stage in self._stages if stage.node == node), None)

    def _beyond(self, item: msg.StepItem) -> bool:
        """Outputs of inputs that were never fed: no honest server has them, and a journal must not grow by them."""
        return item.position + item.rows > self._logs[self._blocks.start].end

    def _confirm(self, node: str, block: int, item: msg.StepItem) -> None:
        """An output of a stage proves that it has computed everything up to there."""
        stage = self._find(node)
        if stage is not None and stage.hop.blocks.end == block and stage.answered:
            stage.computed_end = max(stage.computed_end, item.position + item.rows)

    def _stuck(self) -> _Stage:
        """The first stage that owes an output."""
        for stage in self._stages:
            if self._logs[stage.hop.blocks.end].end < self._logs[stage.hop.blocks.start].end:
                return stage
        return self._stages[-1]

    def _lose(self, stages: Sequence[_Stage], cause: str, now: float, *, reachable: bool) -> list[Action]:
        actions: list[Action] = []
        for stage in stages:
            if not stage.alive:
                continue
            stage.alive = False
            avoid = self._avoid_if_possible if cause == "link" else self._avoid
            avoid[stage.node] = now + self._config.avoid_s
            if stage.synced or self._loss is not None:
                if self._loss is None:
                    self._loss = _Loss(cause, self._progress_at if self._done < self._logs[0].end else now)
                self._loss.blocks.append(str(stage.hop.blocks))
                self._loss.gone.append(stage.node)
            if reachable:
                actions.append(Tell(stage.node, stage.hop.addresses, msg.Close([self.id])))
        return actions + self._replan(now)

    def _hand_over(self, stage: _Stage, now: float) -> list[Action]:
        """Replace a server that is leaving but still works. When nobody can take over, it goes on until it is gone."""
        self._avoid[stage.node] = now + self._config.avoid_s
        stage.alive = False
        can = self._plan_runs(now) or self._plan_whole(now)
        stage.alive = True
        return self._lose([stage], "draining", now, reachable=True) if can else []

    def _replan(self, now: float) -> list[Action]:
        if self._stages and all(stage.alive for stage in self._stages):
            return []
        config = self._config
        self._avoid = {node: until for node, until in self._avoid.items() if until > now}
        self._avoid_if_possible = {node: until for node, until in self._avoid_if_possible.items() if until > now}
        planned = self._plan_runs(now) or self._plan_whole(now)
        if planned is None and not self._was_live:
            # By the registry they are full. The servers themselves know better, and when to come back.
            planned = self._plan_whole(now, need_tokens=0)
        if planned is None:
            self._asked_at = None
            self._planned_at = now
            if self._planning_since is None:
                self._planning_since = now
            # Being full is an answer, not an outage: a session that has not begun is told at once.
            full_at_start = self._full_retry_s is not None and not self._was_live
            if full_at_start or now >= self._planning_since + config.patience_s:
                return self._fail()
            return []
        self._planning_since = None
        self.counters.replans += 1
        self._replans_since_progress += 1
        if self._replans_since_progress > config.max_replans:
            return self._fail()
        return self._open(planned, now)

    def _fail(self) -> list[Action]:
        error: ShoalError
        if self._full_retry_s is not None:
            error = Full(
                "Every server that could take this session is full.",
                hint="Try again in a moment, or add servers (shoal up --replicas).",
                retry_after_s=self._full_retry_s,
            )
        else:
            error = SwarmIncomplete(
                f"No live servers cover all blocks of {self._model.partition('@')[0]}"
                f" (waited {self._config.patience_s:.0f} s).",
                hint="See which blocks are missing with: shoal status --explain",
                retry_after_s=self._config.patience_s,
            )
        return self._fail_with(error)

    def _fail_with(self, error: ShoalError) -> list[Action]:
        return [*self.close(), Failed(error)]

    def _plan_runs(self, now: float) -> list[_Stage] | None:
        """Keep the stages that are synced, plan others for the runs between them. None when some run has no plan."""
        kept = [stage for stage in self._stages if stage.alive and stage.synced]
        if not kept:
            return None
        busy = frozenset(stage.node for stage in kept)
        result: list[_Stage] = []
        at = self._blocks.start
        for stage in [*kept, None]:
            until = stage.hop.blocks.start if stage is not None else self._blocks.end
            if at < until:
                hops = self._find_hops(BlockRange(at, until), busy, now)
                if hops is None:
                    return None
                busy |= {hop.node for hop in hops}
                result += [_Stage(hop, self._epoch + 1) for hop in hops]
            if stage is not None:
                result.append(stage)
                at = stage.hop.blocks.end
        return result

    def _plan_whole(self, now: float, need_tokens: int | None = None) -> list[_Stage] | None:
        hops = self._find_hops(self._blocks, frozenset(), now, need_tokens)
        return None if hops is None else [_Stage(hop, self._epoch + 1) for hop in hops]

    def _find_hops(
        self, blocks: BlockRange, busy: frozenset[str], now: float, need_tokens: int | None = None
    ) -> Sequence[Hop] | None:
        need = self._max_tokens if need_tokens is None else need_tokens
        avoid = busy | frozenset(self._avoid)
        hops = self._plan(blocks, avoid | frozenset(self._avoid_if_possible), need, now)
        if hops is None and self._avoid_if_possible:
            hops = self._plan(blocks, avoid, need, now)
        return hops

    def _open(self, stages: list[_Stage], now: float) -> list[Action]:
        """Ask the new servers to open, the survivors before them to relink, and forget servers not used any more."""
        self._epoch += 1
        used = {stage.node for stage in stages}
        actions: list[Action] = [
            Tell(stage.node, stage.hop.addresses, msg.Close([self.id]))
            for stage in self._stages
            if stage.alive and stage.node not in used
        ]
        self._stages = stages
        self._asked_at = now
        for at, stage in enumerate(stages):
            after = stages[at + 1] if at + 1 < len(stages) else None
            start, end = stage.hop.blocks.start, stage.hop.blocks.end
            self._logs.setdefault(start, Log())
            log_after = self._logs.setdefault(end, Log())
            following = msg.Hop(after.node, list(after.hop.addresses)) if after is not None else None
            if stage.epoch == self._epoch:
                actions.append(
                    Tell(
                        stage.node,
                        stage.hop.addresses,
                        msg.Open(
                            session=self.id,
                            epoch=self._epoch,
                            model=self._model,
                            start=start,
                            end=end,
                            stages=len(stages),
                            max_tokens=self._max_tokens,
                            wire=self._wire,
                            next=following,
                            # A lone server reports the whole prompt, because nothing else shows its progress.
                            forward_from=self._processed_by(after) if len(stages) > 1 else self._delivered,
                            journal_from=log_after.end,
                        ),
                    )
                )
            else:
                stage.relinking = after is not None and after.epoch == self._epoch
                stage.answered = not stage.relinking
                stage.asked = False
        # A boundary that no stage of the new chain begins or ends at will never grow again.
        borders = {border for stage in stages for border in (stage.hop.blocks.start, stage.hop.blocks.end)}
        for block in [block for block in self._logs if block not in borders]:
            del self._logs[block]
        return actions + self._maybe_live(now)

    def _relink_when_open(self) -> list[Action]:
        """Once every new server has opened, link the survivors to them. Not before: a survivor pushes on as soon as it
        is told to, and a server that does not know the session yet would drop those rows."""
        if any(stage.epoch == self._epoch and not stage.answered for stage in self._stages):
            return []
        actions: list[Action] = []
        for stage, after in pairwise(self._stages):
            if stage.relinking and not stage.asked:
                stage.asked = True
                following = msg.Hop(after.node, list(after.hop.addresses))
                actions.append(Tell(stage.node, stage.hop.addresses, msg.Relink(self.id, self._epoch, following)))
        return actions

    def _processed_by(self, after: _Stage | None) -> int:
        """Positions that the next stage has certainly computed; None is ourselves, taking results.

        What the journal holds of its outputs proves nothing: a stage that was rebuilt a moment ago may still be
        replaying what an earlier server had computed long before."""
        return self._done if after is None else after.computed_end

    # --- feeding ---------------------------------------------------------------------------------------------

    def _maybe_live(self, now: float) -> list[Action]:
        if not self.live or self._asked_at is None:
            return []
        self._asked_at = None
        self._progress_at = now  # the new chain owes its outputs from now on, however long the planning took
        self._full_retry_s = None
        self._was_live = True
        actions: list[Action] = [Live()]
        for at, stage in enumerate(self._stages):
            if stage.synced:
                continue
            stage.synced = True
            # When the stage before is new as well, its outputs arrive by push and nothing is replayed here.
            if at > 0 and stage.relay_until:
                actions += self._relay(stage)
        return actions + self._feed_first()

    def _relay(self, stage: _Stage) -> list[Action]:
        """Replay the journal into a stage whose predecessor pushes only from relay_until on."""
        actions: list[Action] = []
        log = self._logs[stage.hop.blocks.start]
        if stage.sent_end < min(log.end, stage.relay_until):
            replay = [chunk for chunk in log.since(stage.sent_end) if chunk[0] < stage.relay_until]
            actions += self._steps(stage, replay, join=True)
        return actions

    def _feed_first(self) -> list[Action]:
        """Send the first stage what it has not got, a window of chunks ahead of what it has computed."""
        if not self.live:
            return []
        first = self._stages[0]
        log = self._logs[0]
        if first.sent_end >= log.end:
            return []
        computed = self._result_end if len(self._stages) == 1 else self._logs[first.hop.blocks.end].end
        seen_end = max(computed, self._delivered)
        if first.sent_end < seen_end:
            # A replay: everything that was computed before goes at once, in large steps.
            seen = [chunk for chunk in log.since(first.sent_end) if chunk[0] < seen_end]
            return self._steps(first, seen, join=True) + self._feed_first()
        waiting = log.since(first.sent_end)
        under_way = len(log.since(computed)) - len(waiting)
        room = self._config.window_chunks + len(self._stages) - under_way
        return self._steps(first, waiting[: max(0, room)], join=False)

    def _steps(self, stage: _Stage, chunks: Sequence[tuple[int, int, Payload]], *, join: bool) -> list[Action]:
        actions: list[Action] = []
        at = 0
        while at < len(chunks):
            position, rows, payload = chunks[at]
            parts = [payload]
            at += 1
            while join and at < len(chunks) and rows + chunks[at][1] <= self._config.replay_rows:
                rows += chunks[at][1]
                parts.append(chunks[at][2])
                at += 1
            stage.sent_end = position + rows
            if join:
                self.counters.replayed_rows += rows
                if self._loss is not None:
                    self._loss.replayed_rows += rows
            item = msg.StepItem(self.id, position, rows, stage.hop.blocks.start)
            actions.append(Feed(stage.node, item, tuple(parts)))
        return actions
