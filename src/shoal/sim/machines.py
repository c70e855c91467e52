"""Machines of the simulated swarm. They carry out what the real decisions in swarm/ say, and decide nothing themselves.

Machine   a process that can be killed, frozen, thawed and started again; its own clock
Node      + a registry view kept up to date by gossip, and connections to other nodes
Server    + swarm.serving and toy blocks: what server/ does over real sockets
Driver    + swarm.session and toy sampling: what client/ does
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import msgspec

from shoal.errors import ShoalError
from shoal.sim import toy
from shoal.sim.keys import ToyKeys
from shoal.sim.links import Body, End, Network
from shoal.sim.world import Call, World, Wrong
from shoal.spec.ids import BlockRange
from shoal.swarm import gossip, routing, serving, session
from shoal.swarm.estimates import Share
from shoal.swarm.view import View
from shoal.wire import messages as msg

State = Literal["loading", "online", "draining"]
MODEL = "toy"
IDLE_LINK_S = 5.0
"""A connection that gossip needs no more stays for this long after it was made, as in net.directory."""
SUSPECT_S = 3.0
"""How long a driver keeps new chains away from a node whose connection broke."""


class Machine:
    """A process on a machine. Calls scheduled by a process die with it; while it is frozen they pile up."""

    def __init__(self, world: World, network: Network, name: str) -> None:
        self.world = world
        self.network = network
        self.name = name
        self.alive = False
        self.frozen = False
        self.powered = True
        self.freezes = 0
        self.slowness = 1.0
        self._life = 0
        self._pile: list[Call] = []
        self._clock_offset_s = world.rng.uniform(0.0, 1e5)
        network.machines[name] = self

    def now(self) -> float:
        """Own monotonic clock: as fast as everybody's, but comparable with nobody's."""
        return self.world.now + self._clock_offset_s

    def after(self, delay_s: float, call: Call, *, background: bool = False) -> None:
        life = self._life

        def run() -> None:
            if not self.alive or life != self._life:
                return
            if self.frozen:
                self._pile.append(run)
            else:
                call()

        self.world.after(delay_s, run, background=background)

    def start(self) -> None:
        self.alive = True
        self.powered = True
        self._life += 1
        self.world.note(f"{self.name} starts")
        self.on_start()

    def kill(self, *, power_off: bool = False) -> None:
        """SIGKILL, or a pulled plug: then nobody is told."""
        self.world.note(f"{self.name} {'loses power' if power_off else 'is killed'}")
        self.network.process_died(self, silently=power_off)
        self.alive = False
        self.powered = not power_off
        self.frozen = False
        self._pile.clear()

    def freeze(self) -> None:
        self.world.note(f"{self.name} freezes")
        self.frozen = True
        self.freezes += 1
        self.network.machine_froze(self)

    def thaw(self) -> None:
        self.world.note(f"{self.name} thaws")
        self.frozen = False
        pile, self._pile = self._pile, []
        for call in pile:
            self.world.after(0.0, call)

    def on_start(self) -> None:
        """A new process begins with nothing in memory."""

    def accept(self, end: End) -> None:
        """Somebody connected to us."""


class SharingView(View):
    """The registry of a simulated node. All nodes of a run share what they decode: a thousand copies of a thousand
    records would take gigabytes, and records never change."""

    @staticmethod
    @lru_cache(maxsize=1 << 14)
    def _decode_record(payload: bytes) -> msg.Record:
        return View._decode_record(payload)

    @staticmethod
    @lru_cache(maxsize=1 << 14)
    def _decode_beat(payload: bytes) -> msg.Beat:
        return View._decode_beat(payload)


@dataclass(slots=True)
class _Out:
    """A connection we dial; frames wait in `queue` until it stands."""

    end: End | None = None
    queue: list[tuple[msg.Message, Body]] = field(default_factory=list)
    made_at_s: float = 0.0
    gossip_only: bool = True
    """Nothing but gossip went over it: it may be given up when gossip needs it no more."""


class Node(Machine):
    """A member of the swarm: a record of its own, a view of the others, one connection to each node it talks to."""

    role: Literal["server", "client"] = "server"

    def __init__(self, world: World, network: Network, name: str, seeds: Sequence[str]) -> None:
        super().__init__(world, network, name)
        self.seeds = [seed for seed in seeds if seed != name]
        self.mesh = gossip.Mesh(name, [_address(seed) for seed in self.seeds])
        self.keys = ToyKeys(name, self.role)
        self.view: View = SharingView(name, self.keys)
        self._starts = 0

    def on_start(self) -> None:
        self.view = SharingView(self.name, self.keys)
        self.mesh = gossip.Mesh(self.name, [_address(seed) for seed in self.seeds])
        self._outs: dict[str, _Out] = {}
        self._starts += 1
        # Mostly a larger incarnation than last time; sometimes the machine's calendar went back.
        incarnation = max(0, self._starts + (-2 if self.world.rng.random() < 0.2 else 0))
        self.view.put(self.record(incarnation), self.now())
        self._told_at_s = self._renewed_at_s = self.now()
        self.after(self.world.rng.random() * self.mesh.pace.round_s, self._round, background=True)

    def record(self, incarnation: int) -> msg.Record:
        """What this node says about itself now; the view raises its number where needed."""
        return msg.Record(
            node=self.name,
            incarnation=incarnation,
            version=0,
            lease_s=self.mesh.pace.lease_s,
            role=self.role,
            state=self.state(),
            addresses=[_address(self.name)],
            span=self.span(),
            pid=1,
            dtype="float32",
            decode_ms_per_block=self.ms_per_block(),
            prefill_ms_per_block_token=0.1,
            memory_bytes=0,
            cache_tokens_free=self.cache_tokens_free(),
            cache_tokens_total=0,
            queue_rows=0,
            sessions=self.num_sessions(),
            busy=self.busy(),
        )

    def state(self) -> State:
        return "online"

    def span(self) -> msg.Span | None:
        return None

    def ms_per_block(self) -> float:
        return 1.0

    def cache_tokens_free(self) -> int:
        return 0

    def num_sessions(self) -> int:
        return 0

    def busy(self) -> float:
        return 0.0

    # -- connections ------------------------------------------------------------------------------------------------

    def send(self, node: str, message: msg.Message, body: Body = ()) -> None:
        """Send over our connection to `node`, which is dialled when there is none. `on_out_lost` hears of failures."""
        out = self._outs.get(node)
        if out is None:
            out = self._outs[node] = _Out(made_at_s=self.now())
            self.network.dial(self, node, partial(self._dialled, node, out))
        out.gossip_only = out.gossip_only and isinstance(message, msg.Sync)
        if out.end is None:
            out.queue.append((message, body))
        else:
            out.end.send(message, body)

    def end_to(self, node: str) -> End | None:
        """Our end of the connection that we made to `node`."""
        out = self._outs.get(node)
        return None if out is None else out.end

    def _dialled(self, node: str, out: _Out, end: End | None) -> None:
        if end is None:
            if self._outs.get(node) is out:
                self._out_lost(node, out, "unreachable")
            return
        if self._outs.get(node) is not out:
            end.close()  # given up while it was being made
            return
        out.end = end
        end.on_frame = self._frame
        end.on_lost = lambda end, cause: self._out_lost(node, out, cause)
        for message, body in out.queue:
            end.send(message, body)
        out.queue.clear()

    def _out_lost(self, node: str, out: _Out, cause: str) -> None:
        if self._outs.get(node) is out:
            del self._outs[node]
        self.mesh.failed(node, self.now())
        self.on_out_lost(node, cause)

    def accept(self, end: End) -> None:
        end.on_frame = self._frame

    def _frame(self, end: End, message: msg.Message, body: Body) -> None:
        if isinstance(message, msg.Sync):
            before = self.view.changes
            for answer in self.view.on_sync(message, end.peer.name, self.now()):
                end.send(answer)
            if self.view.changes != before:
                self.on_view_changed()
        else:
            self.on_frame(end, message, body)

    def _round(self) -> None:
        """Renew the lease when it is time, and sync with those whom the mesh names."""
        now, pace = self.now(), self.mesh.pace
        own = self.view.get(self.name)
        other_pace = own is not None and own.lease_s != pace.lease_s
        if other_pace or (now - self._told_at_s >= pace.load_s and self._has_changed()):
            self.publish()
        elif now - self._renewed_at_s > pace.renew_s - 0.5 * pace.round_s:
            self._renewed_at_s = now
            self.view.renew(now)
        partners = {_name(target) for target in self.mesh.round(self.view, now, self.world.rng)}
        kept = {target.node for target in self.mesh.kept}
        for node, out in list(self._outs.items()):
            if out.gossip_only and node not in partners | kept and now > out.made_at_s + IDLE_LINK_S:
                del self._outs[node]
                if out.end is not None:
                    out.end.close()
        opening = self.view.sync(now)
        for node in sorted(partners):
            self.send(node, opening)
        self.on_round()
        self.after(pace.round_s * self.world.rng.uniform(0.9, 1.1), self._round, background=True)

    def publish(self) -> None:
        """A new lease, and what has changed."""
        own = self.view.get(self.name)
        self._told_at_s = self._renewed_at_s = self.now()
        self.view.put(self.record(own.incarnation if own is not None else 0), self.now())

    def _has_changed(self) -> bool:
        own = self.view.get(self.name)
        if own is None:
            return True
        return msgspec.structs.replace(self.record(0), incarnation=own.incarnation, version=own.version) != own

    def on_frame(self, end: End, message: msg.Message, body: Body) -> None:
        """Any message but Sync."""

    def on_out_lost(self, node: str, cause: str) -> None:
        """Our connection to `node` ended, or could not be made."""

    def on_view_changed(self) -> None:
        """Somebody came, went, or started anew."""

    def on_round(self) -> None:
        """Once a second."""


class Server(Node):
    """Hosts blocks of the toy model. One batch is computed at a time, as by the compute thread of a real server."""

    def __init__(
        self,
        world: World,
        network: Network,
        name: str,
        seeds: Sequence[str],
        config: serving.ServingConfig,
        step_ms: float,
    ) -> None:
        super().__init__(world, network, name, seeds)
        self.config = config
        self.step_ms = step_ms
        self.serving = serving.Serving(config)
        self.caches: dict[bytes, toy.Cache] = {}

    def on_start(self) -> None:
        self.serving = serving.Serving(self.config)
        self.caches = {}
        self._limits: dict[bytes, int] = {}
        self._drivers: dict[str, End] = {}
        self._computing = False
        self._share = Share()
        super().on_start()

    def state(self) -> State:
        return "draining" if self.serving.draining else "online"

    def span(self) -> msg.Span:
        return msg.Span(self.config.model, self.config.blocks.start, self.config.blocks.end)

    def ms_per_block(self) -> float:
        return self.step_ms

    def cache_tokens_free(self) -> int:
        return self.serving.pool.free_tokens

    def num_sessions(self) -> int:
        return self.serving.sessions

    def busy(self) -> float:
        return self._share.at(self.now())

    # -- network ----------------------------------------------------------------------------------------------------

    def accept(self, end: End) -> None:
        super().accept(end)
        end.on_lost = self._in_lost

    def on_frame(self, end: End, message: msg.Message, body: Body) -> None:
        now, peer = self.now(), end.peer.name
        if isinstance(message, msg.Open | msg.Close | msg.Relink):
            self._adopt(peer, end)
        if isinstance(message, msg.Open):
            self._carry_out(self.serving.on_open(peer, message, now))
        elif isinstance(message, msg.Close):
            self._carry_out(self.serving.on_close(peer, message.sessions, now))
        elif isinstance(message, msg.Relink):
            self._carry_out(self.serving.on_relink(peer, message, now))
        elif isinstance(message, msg.Step):
            self._carry_out(self.serving.on_steps(_split(message.items, body), now))
            self._compute()

    def _adopt(self, driver: str, end: End) -> None:
        """A driver keeps one connection to us. A new one means that it gave the old one up, even if the news of that
        are still on their way: its sessions there are lost."""
        known = self._drivers.get(driver)
        if known is end:
            return
        self._drivers[driver] = end
        if known is not None:
            self._carry_out(self.serving.on_driver_lost(driver, self.now()))

    def _in_lost(self, end: End, cause: str) -> None:
        if self._drivers.get(end.peer.name) is end:
            del self._drivers[end.peer.name]
            self._carry_out(self.serving.on_driver_lost(end.peer.name, self.now()))

    def on_out_lost(self, node: str, cause: str) -> None:
        self._carry_out(self.serving.on_push_lost(node))

    def on_round(self) -> None:
        self._carry_out(self.serving.expire(self.now()))

    def leave(self) -> None:
        """SIGTERM: ask the drivers to move their sessions, tell everybody, be gone within five seconds."""
        self.world.note(f"{self.name} drains")
        self._carry_out(self.serving.drain())
        self.publish()
        for seed in self.seeds:
            self.send(seed, self.view.sync(self.now(), tell=True))

    # -- decisions carried out --------------------------------------------------------------------------------------

    def _carry_out(self, actions: Iterable[serving.Action]) -> None:
        for action in actions:
            if isinstance(action, serving.Reply):
                self._tell(action.node, action.message)
            elif isinstance(action, serving.Emit):
                self._emit(action)
            elif isinstance(action, serving.OpenCache):
                self._open_cache(action)
            else:
                del self.caches[action.session]
                del self._limits[action.session]

    def _open_cache(self, action: serving.OpenCache) -> None:
        if action.session in self.caches:
            raise Wrong(f"{self.name} opens a cache twice")
        self.caches[action.session] = toy.Cache(action.blocks.start, action.blocks.end)
        self._limits[action.session] = action.max_tokens
        if sum(self._limits.values()) > self.config.cache_tokens:
            raise Wrong(f"{self.name} admitted more than its cache holds")

    def _tell(self, driver: str, message: msg.Message, body: Body = ()) -> None:
        end = self._drivers.get(driver)
        if end is not None:
            end.send(message, body)

    def _emit(self, action: serving.Emit) -> None:
        items = [item for item, _ in action.items]
        body = tuple(value for _, rows in action.items for value in rows)
        tensor = msg.Tensor("f32", len(body), 1)
        if action.hop is not None:
            self.send(action.hop.node, msg.Step(items, tensor), body)
        elif action.journal_block is not None:
            self._tell(action.node, msg.Journal(action.journal_block, items, tensor), body)
        else:
            self._tell(action.node, msg.Result(items, tensor), body)

    def _compute(self) -> None:
        if self._computing:
            return
        works = self.serving.next_batch(self.now())
        if not works:
            return
        self._computing = True
        outputs = [self._run(work) for work in works]
        rows = sum(work.item.rows for work in works)
        took_s = self.step_ms / 1000 * len(self.config.blocks) * (1 + 0.05 * rows) * self.slowness
        took_s *= self.world.rng.uniform(0.9, 1.1)

        def finish() -> None:
            self._computing = False
            self._share.add(self.now(), took_s)
            self._carry_out(self.serving.on_computed(works, outputs, self.now()))
            self._compute()

        self.after(took_s, finish)

    def _run(self, work: serving.Work) -> Body:
        cache = self.caches.get(work.session)
        if cache is None or cache.length != work.item.position or len(work.payload) != work.item.rows:
            have = "no cache" if cache is None else f"{cache.length} tokens in the cache"
            raise Wrong(f"{self.name} is to compute {work.item.rows} rows at {work.item.position} with {have}")
        return cache.run(work.payload)


@dataclass(slots=True)
class Generation:
    """One request: what is asked, what one machine alone would answer, and what has come so far."""

    prompt: list[int]
    want: int
    chunk_rows: int
    expected: list[int]
    expected_outputs: list[int]
    outputs: int = 0
    """Positions whose outputs have come. Starts above zero when only the prompt's last output is wanted."""
    tokens: list[int] = field(default_factory=list)
    plans: int = 0
    """Chains that were planned for it, known when it has ended."""
    started_at_s: float = 0.0
    ended_at_s: float | None = None
    error: ShoalError | None = None
    recoveries: list[session.Recovered] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.ended_at_s is not None


class Driver(Node):
    """Runs generations over the swarm: embeds and samples itself, leaves the blocks to the servers."""

    role: Literal["server", "client"] = "client"

    def __init__(
        self,
        world: World,
        network: Network,
        name: str,
        seeds: Sequence[str],
        num_blocks: int,
        config: session.SessionConfig,
    ) -> None:
        super().__init__(world, network, name, seeds)
        self.num_blocks = num_blocks
        self.config = config
        self.generations: list[Generation] = []
        self.replans = 0
        self.replayed_rows = 0

    def on_start(self) -> None:
        self.running: dict[bytes, tuple[session.Session, Generation]] = {}
        self._timers: dict[bytes, float] = {}
        super().on_start()

    def num_sessions(self) -> int:
        return len(self.running)

    def generate(self, generation: Generation) -> None:
        """Start a generation; it is checked against the expected one as it goes."""
        self.generations.append(generation)
        generation.started_at_s = self.world.now
        id = self.world.rng.randbytes(16)
        room = len(generation.prompt) + generation.want - 1  # the last token is never fed
        live = session.Session(
            id,
            model=MODEL,
            num_blocks=self.num_blocks,
            max_tokens=room,
            wire="f32",
            plan=self._plan,
            results_from=generation.outputs,
            config=self.config,
        )
        self.running[id] = (live, generation)
        self._carry_out(id, live.start(self.now()))
        rows = [toy.embed(token) for token in generation.prompt]
        for at in range(0, len(rows), generation.chunk_rows):
            chunk = tuple(rows[at : at + generation.chunk_rows])
            self._carry_out(id, live.feed(len(chunk), chunk, self.now()))

    def _plan(
        self, blocks: BlockRange, avoid: frozenset[str], need_tokens: int, now: float
    ) -> Sequence[routing.Hop] | None:
        chain = routing.route(
            self.view.live(now),
            MODEL,
            self.num_blocks,
            rng=self.world.rng,
            avoid=avoid | self.view.suspects(now),
            need_tokens=need_tokens,
            start=blocks.start,
            end=blocks.end,
        )
        return None if chain is None else chain.hops

    # -- events to sessions -----------------------------------------------------------------------------------------

    def on_frame(self, end: End, message: msg.Message, body: Body) -> None:
        now, node = self.now(), end.peer.name
        if isinstance(message, msg.Result):
            for item, payload in _split(message.items, body):
                self._each([item.session], session.Session.on_result, node, item, payload, now)
        elif isinstance(message, msg.Journal):
            for item, payload in _split(message.items, body):
                self._each([item.session], session.Session.on_journal, node, message.block, item, payload, now)
        elif isinstance(message, msg.Gone):
            self._each(message.sessions, session.Session.on_message, node, message, now)
        elif isinstance(message, msg.Opened | msg.Relinked | msg.Denied):
            self._each([message.session], session.Session.on_message, node, message, now)

    def on_out_lost(self, node: str, cause: str) -> None:
        self.view.suspect(node, self.now(), SUSPECT_S)
        self._each(list(self.running), session.Session.on_peer_lost, node, cause, self.now())

    def on_view_changed(self) -> None:
        self._each(list(self.running), session.Session.on_view_changed, self.now())

    def _each(self, ids: Iterable[bytes], event: Callable[..., list[session.Action]], *about: object) -> None:
        """Tell the sessions that still run what happened, and do what they say."""
        for id in ids:
            known = self.running.get(id)
            if known is not None:
                self._carry_out(id, event(known[0], *about))

    # -- decisions carried out --------------------------------------------------------------------------------------

    def _carry_out(self, id: bytes, actions: Sequence[session.Action]) -> None:
        live, generation = self.running[id]
        work = deque(actions)
        while work:
            action = work.popleft()
            if isinstance(action, session.Tell):
                self.send(action.node, action.message)
            elif isinstance(action, session.Feed):
                body = tuple(value for part in action.parts for value in part)
                self.send(action.node, msg.Step([action.item], msg.Tensor("f32", len(body), 1)), body)
            elif isinstance(action, session.Deliver):
                work.extend(self._deliver(live, generation, action))
            elif isinstance(action, session.Recovered):
                self.world.note(f"{self.name} recovered from {action.cause} of {action.gone} in {action.stall_s:.3f} s")
                generation.recoveries.append(action)
            elif isinstance(action, session.Failed):
                self.world.note(f"{self.name} gives up: {action.error}")
                generation.error = action.error
        if live.ended:
            self._end(id, live, generation)
        else:
            self._set_timer(id, live)

    def _deliver(
        self, live: session.Session, generation: Generation, output: session.Deliver
    ) -> Sequence[session.Action]:
        """Check rows of the last block against what one machine alone computes; sample when the prompt is through."""
        if output.position != generation.outputs:
            raise Wrong(f"{self.name} got the outputs from {output.position} on, {generation.outputs} was next")
        due = generation.expected_outputs[output.position : output.position + output.rows]
        if list(output.payload) != due:
            raise Wrong(f"{self.name} got wrong outputs for positions {output.position}+{output.rows}")
        generation.outputs += output.rows
        if generation.outputs < len(generation.prompt) + len(generation.tokens):
            return []
        token = toy.pick(output.payload[-1])
        generation.tokens.append(token)
        if token != generation.expected[len(generation.tokens) - 1]:
            raise Wrong(f"{self.name} emitted a wrong token")
        if len(generation.tokens) == generation.want:
            return live.close()
        return live.feed(1, (toy.embed(token),), self.now())

    def _end(self, id: bytes, live: session.Session, generation: Generation) -> None:
        del self.running[id]
        self._timers.pop(id, None)
        generation.ended_at_s = self.world.now
        generation.plans = live.counters.replans
        self.replans += live.counters.replans
        self.replayed_rows += live.counters.replayed_rows
        self.world.note(f"{self.name} ends a generation with {len(generation.tokens)} of {generation.want} tokens")

    def _set_timer(self, id: bytes, live: session.Session) -> None:
        wake_at = live.wake_at
        if wake_at is None or self._timers.get(id) == wake_at:
            if wake_at is None:
                self._timers.pop(id, None)
            return
        self._timers[id] = wake_at

        def ring() -> None:
            if self._timers.get(id) == wake_at:
                del self._timers[id]
                self._each([id], session.Session.on_timer, self.now())

        # A microsecond at least: a delay lost in rounding would ring before its time, for ever.
        self.after(max(1e-6, wake_at - self.now()), ring)


def _address(node: str) -> str:
    return f"sim://{node}"


def _name(target: gossip.Target) -> str:
    """The machine behind a target: seeds are known by their address only."""
    return target.node or target.addresses[0].removeprefix("sim://")


def _split(items: Sequence[msg.StepItem], body: Body) -> list[tuple[msg.StepItem, Body]]:
    """Cut a frame's body into the rows of its items."""
    parts, at = [], 0
    for item in items:
        parts.append((item, body[at : at + item.rows]))
        at += item.rows
    return parts
