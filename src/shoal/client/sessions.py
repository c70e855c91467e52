"""Many sessions over one set of connections: the edge around swarm.session.

Knows links, frames, timers and the registry; does not know tokens. What a session's last block puts out is handed to
`on_rows`; what goes in comes through `feed`. Steps of sessions that go to the same server leave in one frame, so that
a batch stays a batch along the chain.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from shoal.errors import ProtocolError, ShoalError, SwarmIncomplete
from shoal.net.directory import Directory
from shoal.net.link import Link
from shoal.net.transport import Body, Transport
from shoal.spec.ids import BlockRange
from shoal.swarm import session as decide
from shoal.swarm.estimates import Links
from shoal.swarm.honesty import Reputation
from shoal.swarm.routing import Hop, policy_unmet, route, why_no_chain
from shoal.swarm.trust import Zones, ends_unmet, permits
from shoal.wire import messages as msg
from shoal.wire import rows as wire_rows

log = logging.getLogger("shoal.client")

TICK_S = 0.05
SUSPECT_S = 3.0
"""How long a server whose connection broke is avoided; the registry knows better after that."""
POLICY_RETRY_S = 30.0
"""When to come back after a refusal for a trust zone: somebody has to start a machine."""
SCOUT_S = 1.0
"""How often servers that are new here are looked for, and how long a first session waits for their first ping."""
MAX_SCOUTED = 64
"""Servers kept connected for their round trips alone; those that sessions use come on top."""
FRAME_BYTES = 16 * 1024 * 1024
"""Steps that leave together share frames of about this size. The replay of one long session alone may take more than a
frame may hold (wire.messages.MAX_BODY_BYTES)."""


OnHost = Callable[[str, BlockRange], None]
"""on_host(node, blocks): this node is about to be given inputs of these blocks, so its owner can read the text."""


class Keeper(Protocol):
    """Keeps rows of one stage of a running call, to compare them later."""

    plans: int
    """As long as the session has made so many plans, its chain is the one that is watched."""

    def take(self, node: str, block: int, item: msg.StepItem, rows: wire_rows.Rows) -> None:
        """`node` sent these inputs of `block`."""


class Observer(Protocol):
    """Hears of the calls of a Sessions. `began` may give a handle a `watch`."""

    def began(self, handle: Handle) -> None:
        """The call's chain stands for the first time."""

    def ended(self, handle: Handle) -> None:
        """Nothing more comes of it."""


class Guest(Protocol):
    """A session on one server, beside the chains, driven by somebody else over our connections."""

    def on_message(self, node: str, message: msg.Message) -> None:
        """Opened, Denied or Gone."""

    def on_rows(self, node: str, item: msg.StepItem, rows: wire_rows.Rows) -> None:
        """Outputs; they share memory with the frame they came in."""

    def on_lost(self, node: str, cause: str) -> None:
        """A connection to a server has ended."""


@dataclass(slots=True)
class Handle:
    """One open session and whom to tell about it."""

    session: decide.Session
    on_rows: Callable[[int, wire_rows.Rows], None]
    """on_rows(position, rows): outputs of the last block, in order, each once."""
    on_live: Callable[[], None]
    """The chain stands (again)."""
    on_failed: Callable[[ShoalError], None]
    name: str
    zones: tuple[Zones, ...] = ()
    on_host: OnHost | None = None
    hosts: set[tuple[str, BlockRange]] = field(default_factory=set)
    """Who has been given inputs, and of which blocks."""
    begun: bool = False
    """Its chain has stood."""
    watch: Keeper | None = None

    def came(self, node: str, block: int, item: msg.StepItem, rows: wire_rows.Rows) -> None:
        if self.watch is not None and self.session.counters.replans == self.watch.plans:
            self.watch.take(node, block, item, rows)


@dataclass(slots=True)
class SessionCounters:
    opened: int = 0
    failovers: dict[str, int] = field(default_factory=dict)
    replayed_rows: int = 0
    last_stall_s: float = 0.0


class Sessions:
    """All sessions of one model that this node drives. `start` before use, `close` after."""

    def __init__(
        self,
        model: str,
        num_blocks: int,
        *,
        node: str,
        transport: Transport,
        directory: Directory,
        wire: msg.WireType,
        config: decide.SessionConfig | None = None,
        labels: Sequence[str] = (),
        reputation: Reputation | None = None,
        on_recovered: Callable[[decide.Recovered], None] = lambda recovered: None,
        on_frame_end: Callable[[], None] = lambda: None,
    ) -> None:
        """`labels` are this node's own; `reputation` says which servers are in quarantine; `on_frame_end` is called
        after all rows of a frame were handed out."""
        self.counters = SessionCounters()
        self.observer: Observer | None = None
        self._reputation = reputation or Reputation()
        self._guests: dict[bytes, Guest] = {}
        self.wire = wire
        self.model = model
        """As the swarm calls it, name@hash. Sessions that are open keep the name they began with."""
        self._num_blocks = num_blocks
        self._node = node
        self._transport = transport
        self._directory = directory
        self._config = config or decide.SessionConfig()
        self._labels = frozenset(labels)
        self._on_recovered = on_recovered
        self._on_frame_end = on_frame_end
        # Breaks ties between equal routes; nothing secret hangs on it.
        self._rng = random.Random(secrets.randbits(64))
        self._links: dict[str, Link] = {}
        self._rtts = Links()
        self._handles: dict[bytes, Handle] = {}
        self._feeds: dict[str, list[decide.Feed]] = {}
        self._width: int | None = None
        """Values in a row of activations, known from the first that is fed."""
        self._ticker: asyncio.Task[None] | None = None
        self._scouting: dict[str, float] = {}
        """Servers whose round trip is not known yet, and when we first dialled them."""
        self._scouted_at = -1e18

    def start(self) -> None:
        self._ticker = asyncio.create_task(self._tick_loop(), name="session timers")
        self._ticker.add_done_callback(self._on_ticker_end)

    async def close(self) -> None:
        """Close every session and connection."""
        for handle in list(self._handles.values()):
            self.end(handle)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in list(self._links.values())))

    # --- one session -----------------------------------------------------------------------------------------

    def open(
        self,
        max_tokens: int,
        *,
        results_from: int = 0,
        on_rows: Callable[[int, wire_rows.Rows], None],
        on_live: Callable[[], None] = lambda: None,
        on_failed: Callable[[ShoalError], None],
        name: str = "",
        zones: Sequence[Zones] = (),
        on_host: OnHost | None = None,
    ) -> Handle:
        """Open a session for at most `max_tokens` rows; `name` stands for it in logs.

        Only servers that `zones` allow are ever asked, also when a lost one is replaced; `on_host` is told of each,
        once for every range of blocks. Raises PolicyUnmet, before anybody is asked, when the live servers would do but
        for the zones, or when this node itself lacks a label that they demand of the embedding.
        """
        self._check_zones(zones)
        session = decide.Session(
            secrets.token_bytes(16),
            model=self.model,
            num_blocks=self._num_blocks,
            max_tokens=max_tokens,
            wire=self.wire,
            plan=partial(self._plan, tuple(zones)),
            results_from=results_from,
            config=self._config,
        )
        handle = Handle(session, on_rows, on_live, on_failed, name or session.id.hex()[:8], tuple(zones), on_host)
        self._handles[session.id] = handle
        self.counters.opened += 1
        self._perform(handle, session.start(time.monotonic()))
        self.flush()
        return handle

    def feed(self, handle: Handle, rows: wire_rows.Rows) -> None:
        """Append inputs of block 0. They leave with the next `flush`, together with those of other sessions."""
        self._width = rows.width
        self._perform(handle, handle.session.feed(rows.count, rows, time.monotonic()))

    def end(self, handle: Handle) -> None:
        """Finished or cancelled: free the session's caches on all servers."""
        if self._handles.pop(handle.session.id, None) is not None:
            if not handle.session.ended:
                self._perform(handle, handle.session.close())
            self.flush()
            if self.observer is not None:
                self.observer.ended(handle)

    def __len__(self) -> int:
        return len(self._handles)

    # --- sessions beside the chains --------------------------------------------------------------------------

    def attach(self, id: bytes, guest: Guest) -> None:
        """Hand what servers say of session `id` to `guest`, until `detach`."""
        self._guests[id] = guest

    def detach(self, id: bytes) -> None:
        self._guests.pop(id, None)

    def post(self, node: str, addresses: Sequence[str], message: msg.Message, body: Sequence[Body] = ()) -> None:
        """Send a guest's message. Nobody is called only to be told of an end."""
        if not isinstance(message, msg.Close) or node in self._links:
            self._link(node, addresses).send(message, body)

    # --- decisions' helpers ----------------------------------------------------------------------------------

    def _check_zones(self, zones: Sequence[Zones]) -> None:
        records = self._directory.view.live(time.monotonic())
        for unmet in (
            ends_unmet(zones, self._labels),
            policy_unmet(records, self.model, self._num_blocks, zones, retry_after_s=POLICY_RETRY_S),
        ):
            if unmet is not None:
                raise unmet

    def _plan(
        self, zones: tuple[Zones, ...], blocks: BlockRange, avoid: frozenset[str], need_tokens: int, now: float
    ) -> Sequence[Hop] | None:
        view = self._directory.view
        records = view.live(now)
        chain = route(
            records,
            self.model,
            self._num_blocks,
            rng=self._rng,
            avoid=avoid | view.suspects(now) | self._reputation.avoid(records, self._node, now),
            need_tokens=need_tokens,
            start=blocks.start,
            end=blocks.end,
            links=self._rtts,
            source=self._node,
            zones=zones,
        )
        return None if chain is None else chain.hops

    def shun(self) -> None:
        """Take running sessions away from servers in quarantine."""
        now = time.monotonic()
        avoid = self._reputation.avoid(self._directory.view.live(now), self._node, now)
        for handle in list(self._handles.values()) if avoid else ():
            for hop in handle.session.chain:
                if hop.node in avoid:
                    self._perform(handle, handle.session.evict(hop.node, "quarantine", now))
        self.flush()

    # --- distances -------------------------------------------------------------------------------------------

    def scout(self) -> None:
        """Connect to servers of this model that are new here: a route is as good as the distances it is planned with,
        and those must be known before the first session takes a far server for a near one."""
        now = time.monotonic()
        view = self._directory.view
        suspects = view.suspects(now)
        servers = {
            record.node: record
            for record in view.live(now)
            if record.state == "online" and record.span is not None and record.span.model == self.model
        }
        for node, record in servers.items():
            if node not in self._links and node not in suspects and len(self._links) < MAX_SCOUTED:
                self._link(node, record.addresses)
                self._scouting.setdefault(node, now)
        self._scouting = {node: since for node, since in self._scouting.items() if node in servers}
        self._rtts.reported({node: record.rtts for node, record in servers.items() if record.rtts})

    async def scouted(self) -> None:
        """Wait until the servers that are known have answered a first ping; for a new one at most SCOUT_S."""
        self.scout()
        while any(time.monotonic() - since < SCOUT_S for since in self._unmeasured().values()):
            await asyncio.sleep(0.005)

    def _unmeasured(self) -> dict[str, float]:
        """Servers dialled and not pinged yet, and since when."""
        for node in list(self._scouting):
            link = self._links.get(node)
            if link is None or link.rtt_s is not None:
                del self._scouting[node]
                if link is not None and link.rtt_s is not None:
                    self._rtts.measured(self._node, node, link.rtt_s * 1e3)
        return self._scouting

    def view_changed(self) -> None:
        """The registry changed: sessions that wait for servers look again, and none stays with a server that has lost a
        label it needs."""
        now = time.monotonic()
        self.scout()
        for handle in list(self._handles.values()):
            self._perform(handle, handle.session.on_view_changed(now))
            for hop in handle.session.chain if handle.zones else ():
                record = self._directory.view.get(hop.node)
                if record is not None and not permits(handle.zones, record.labels, hop.blocks, self._num_blocks):
                    self._perform(handle, handle.session.evict(hop.node, "label", now))
        self.flush()

    # --- actions out -----------------------------------------------------------------------------------------

    def _perform(self, handle: Handle, actions: Sequence[decide.Action]) -> None:
        """Carry out what a session decided. Steps are gathered until `flush`."""
        was_live = False
        for action in actions:
            match action:
                case decide.Feed(node):
                    self._feeds.setdefault(node, []).append(action)
                case decide.Tell(node, addresses, message):
                    # A session's steps and its control messages must reach a server in the order they were decided.
                    self.flush()
                    if isinstance(message, msg.Relink):
                        self._note_hosts(handle)
                    if not isinstance(message, msg.Close) or node in self._links:
                        self._link(node, addresses).send(message)
                case decide.Live():
                    self._note_hosts(handle)
                    if self.observer is not None and not handle.begun:
                        self.observer.began(handle)
                    handle.begun = True
                    was_live = True
                case decide.Deliver(position, _, payload):
                    handle.on_rows(position, payload)
                case decide.Failed(error):
                    handle.on_failed(self._explained(error, handle.zones))
                case decide.Recovered():
                    self._note_recovery(handle, action)
        if was_live:
            handle.on_live()

    def _note_hosts(self, handle: Handle) -> None:
        """Inputs flow from the moment a chain stands, or a survivor is told to push to the new servers (it begins
        before we hear of it). Whoever was only asked, and refused or died before that, has seen nothing."""
        for hop in handle.session.chain:
            if (hop.node, hop.blocks) not in handle.hosts:
                handle.hosts.add((hop.node, hop.blocks))
                if handle.on_host is not None:
                    handle.on_host(hop.node, hop.blocks)

    def _explained(self, error: ShoalError, zones: Sequence[Zones]) -> ShoalError:
        """A session knows that it found no chain; the registry knows which blocks are missing."""
        if not isinstance(error, SwarmIncomplete):
            return error
        now = time.monotonic()
        view = self._directory.view
        why = why_no_chain(
            view.live(now),
            self.model,
            self._num_blocks,
            avoid=view.suspects(now),
            shunned=self._reputation.avoid(view.live(now), self._node, now),
            retry_after_s=error.retry_after_s,
            zones=zones,
        )
        return why or error

    def _note_recovery(self, handle: Handle, recovered: decide.Recovered) -> None:
        counters = self.counters
        counters.failovers[recovered.cause] = counters.failovers.get(recovered.cause, 0) + 1
        counters.replayed_rows += recovered.replayed_rows
        counters.last_stall_s = recovered.stall_s
        log.warning(
            "session %s: blocks %s were lost (%s) and rebuilt; chain now %s; %d rows replayed, a gap of %.0f ms",
            handle.name,
            ", ".join(recovered.blocks),
            recovered.cause,
            ", ".join(f"{hop.node[:8]} {hop.blocks}" for hop in handle.session.chain),
            recovered.replayed_rows,
            recovered.stall_s * 1e3,
        )
        self._on_recovered(recovered)

    def flush(self) -> None:
        """Send the steps that were fed since the last time, one frame per server."""
        feeds, self._feeds = self._feeds, {}
        for node, steps in feeds.items():
            link = self._links.get(node)
            if link is None:
                continue  # lost since: its sessions have heard of it and were planned anew
            for part in _frames(steps):
                tensor, buffers = wire_rows.join([rows for step in part for rows in step.parts])
                link.send(msg.Step([step.item for step in part], tensor), buffers)

    def _link(self, node: str, addresses: Sequence[str]) -> Link:
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = Link(
                self._transport, node, addresses, on_message=self._on_message, on_lost=self._on_lost
            )
        return link

    # --- messages in -----------------------------------------------------------------------------------------

    def _on_message(self, node: str, message: msg.Message, body: memoryview) -> None:
        now = time.monotonic()
        if isinstance(message, msg.Result | msg.Journal):
            self._check_format(node, message.tensor)
        match message:
            case msg.Result(items, tensor):
                for item, rows in wire_rows.cut(items, tensor, body):
                    if (handle := self._handles.get(item.session)) is not None:
                        handle.came(node, item.block, item, rows)
                        self._perform(handle, handle.session.on_result(node, item, rows, now))
                    elif (guest := self._guests.get(item.session)) is not None:
                        guest.on_rows(node, item, rows)
            case msg.Journal(block, items, tensor):
                for item, rows in wire_rows.cut(items, tensor, body):
                    if (handle := self._handles.get(item.session)) is not None:
                        # The journal lives as long as the session: a slice must not keep its whole frame alive.
                        kept = rows if len(items) == 1 else rows.copy()
                        handle.came(node, block, item, kept)
                        self._perform(handle, handle.session.on_journal(node, block, item, kept, now))
            case msg.Opened() | msg.Relinked() | msg.Denied():
                if (handle := self._handles.get(message.session)) is not None:
                    self._perform(handle, handle.session.on_message(node, message, now))
                elif (guest := self._guests.get(message.session)) is not None:
                    guest.on_message(node, message)
            case msg.Gone(sessions):
                for id in sessions:
                    if (handle := self._handles.get(id)) is not None:
                        self._perform(handle, handle.session.on_message(node, message, now))
                    elif (guest := self._guests.get(id)) is not None:
                        guest.on_message(node, message)
            case msg.Fault(code, text):
                raise ProtocolError(f"Server {node} reported {code}: {text}")
        self._on_frame_end()
        self.flush()

    def _check_format(self, node: str, tensor: msg.Tensor) -> None:
        """Rows that cannot be joined with those of other servers must not get into a journal: a replay would fail."""
        width = self._width or tensor.width
        if (tensor.dtype, tensor.width) != (self.wire, width):
            raise ProtocolError(
                f"Server {node} sent rows of {tensor.width} values as {tensor.dtype};"
                f" {width} as {self.wire} were agreed."
            )

    def _on_lost(self, node: str, cause: str, text: str) -> None:
        now = time.monotonic()
        log.info("server %s lost: %s", node[:8], text)
        self._links.pop(node, None)
        self._directory.view.suspect(node, now, SUSPECT_S)
        for handle in list(self._handles.values()):
            self._perform(handle, handle.session.on_peer_lost(node, cause, now))
        for guest in list(self._guests.values()):
            guest.on_lost(node, cause)
        self.flush()

    def _on_ticker_end(self, ticker: asyncio.Task[None]) -> None:
        """Timers only end with `close`. Should they fail, nobody may wait for them in silence."""
        if ticker.cancelled() or ticker.exception() is None:
            return
        log.critical("session timers failed", exc_info=ticker.exception())
        for handle in list(self._handles.values()):
            handle.on_failed(ShoalError("The driver of this session failed; see the gateway's log."))

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for handle in list(self._handles.values()):
                wake = handle.session.wake_at
                if wake is not None and wake <= now:
                    self._perform(handle, handle.session.on_timer(now))
            self.flush()
            if now - self._scouted_at > SCOUT_S:
                self._scouted_at = now
                self.scout()
                self.shun()
            for node, link in self._links.items():
                if link.rtt_s is not None:
                    self._rtts.measured(self._node, node, link.rtt_s * 1e3)

    # --- looking ---------------------------------------------------------------------------------------------

    def chains(self) -> list[tuple[Hop, ...]]:
        """The chain of every open session, the oldest session first."""
        return [handle.session.chain for handle in self._handles.values()]

    def rtts_ms(self) -> dict[str, float]:
        """Round trip to each connected server."""
        return {node: link.rtt_s * 1e3 for node, link in self._links.items() if link.rtt_s is not None}


def _frames(steps: Sequence[decide.Feed]) -> Iterator[list[decide.Feed]]:
    """The steps in order, cut into what one frame may carry."""
    part: list[decide.Feed] = []
    size = 0
    for step in steps:
        more = sum(len(rows.data) for rows in step.parts)
        if part and (len(part) == msg.MAX_ITEMS or size + more > FRAME_BYTES):
            yield part
            part, size = [], 0
        part.append(step)
        size += more
    if part:
        yield part
