"""The simulated network: connections that keep their order, and everything that can go wrong with them.

Connections behave like TCP with the heartbeat of net/transport: what arrives, arrives in order and once. So loss shows
as delay; a dead process as a reset; a frozen machine, a pulled plug or a blocked direction as silence, which the end
that hears nothing takes for a loss after SILENT_S. Between different connections there is no order at all.

On top of what TCP does, a frame may be delivered twice (`duplicate`), because the protocol promises that a step which
arrives twice is harmless: senders repeat after a reconnect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.sim.world import World
from shoal.wire import messages as msg

if TYPE_CHECKING:
    from shoal.sim.machines import Machine

SILENT_S = 2.0
"""Nothing heard for this long: the peer is lost. Pings go every half second, so it takes up to that much longer."""
PING_S = 0.5
DIAL_TIMEOUT_S = 2.0
RETRANSMIT_S = 0.2
"""A lost packet comes again after this time, then after twice, four times ... as long."""

Body = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """How links behave while nothing is broken."""

    latency_s: tuple[float, float] = (0.001, 0.02)
    """One way, drawn once for every direction of every pair."""
    jitter_s: float = 0.002
    loss: float = 0.0
    """Share of packets lost; one packet per frame."""
    duplicate: float = 0.0
    """Share of Step, Result and Journal frames that arrive twice."""


class End:
    """One side of a connection."""

    def __init__(self, network: Network, owner: Machine, peer: Machine) -> None:
        self.network = network
        self.owner = owner
        self.peer = peer
        self.other: End = self
        self.open = True
        self.on_frame: Callable[[End, msg.Message, Body], None] = _ignore_frame
        self.on_lost: Callable[[End, str], None] = _ignore_loss
        self._last_arrival_s = 0.0
        self._held: list[Callable[[], None]] = []

    def send(self, message: msg.Message, body: Body = ()) -> None:
        """Send a frame; nothing happens when this side is closed (the loss has been or will be told)."""
        if not self.open:
            return
        receiver = self.other
        self.network.on_send(self.owner, message)
        self.network.carry(self, lambda: receiver.arrive(message, body))
        repeatable = isinstance(message, msg.Step | msg.Result | msg.Journal)
        if repeatable and self.network.rng.random() < self.network.config.duplicate:
            late_s = self.network.rng.uniform(0.0, 0.2)
            self.network.world.after(late_s, lambda: self.network.carry(self, lambda: receiver.arrive(message, body)))

    def close(self) -> None:
        """Close politely: the other side is told, after everything sent before."""
        if self.open:
            self.open = False
            receiver = self.other
            self.network.carry(self, lambda: receiver.lose("closed"))

    def arrive(self, message: Any, body: Body) -> None:
        if self.open:
            if self.network.world.trace is not None and not isinstance(message, msg.Sync):
                self.network.world.note(f"{self.peer.name} > {self.owner.name}: {_describe(message)}")
            self.on_frame(self, message, body)

    def lose(self, cause: str) -> None:
        """This side learns that the connection is over."""
        if self.open:
            self.open = False
            self.network.world.note(f"{self.owner.name} loses its connection with {self.peer.name}: {cause}")
            self.on_lost(self, cause)


def _describe(message: msg.Message) -> str:
    """A frame in a line of the trace; sessions by their first two bytes."""
    name = type(message).__name__
    if isinstance(message, msg.Step | msg.Result | msg.Journal):
        block = f" for block {message.block}" if isinstance(message, msg.Journal) else ""
        items = [f"{item.session[:2].hex()} {item.position}+{item.rows}" for item in message.items]
        return f"{name}{block} {', '.join(items)}"
    if isinstance(message, msg.Close | msg.Gone):
        code = f" {message.code}" if isinstance(message, msg.Gone) else ""
        return f"{name}{code} {', '.join(session[:2].hex() for session in message.sessions)}"
    if isinstance(message, msg.Open | msg.Opened | msg.Denied | msg.Relink | msg.Relinked):
        text = f"{name} {message.session[:2].hex()} epoch {message.epoch}"
        if isinstance(message, msg.Open):
            text += f" blocks {message.start}:{message.end}, forward {message.forward_from}"
            text += f", journal {message.journal_from}"
        if isinstance(message, msg.Open | msg.Relink):
            text += f", next {message.next.node if message.next else 'driver'}"
        if isinstance(message, msg.Relinked):
            text += f" from {message.position}"
        if isinstance(message, msg.Denied):
            text += f" {message.code}"
        return text
    return name


def _ignore_frame(end: End, message: msg.Message, body: Body) -> None:
    return None


def _ignore_send(sender: Machine, message: msg.Message) -> None:
    return None


def _ignore_loss(end: End, cause: str) -> None:
    return None


class Network:
    """All links and connections of a world."""

    def __init__(self, world: World, config: LinkConfig) -> None:
        self.world = world
        self.rng = world.rng
        self.config = config
        self.machines: dict[str, Machine] = {}
        self._latency_s: dict[tuple[str, str], float] = {}
        self._blocked: dict[tuple[str, str], int] = {}
        """(from, to) -> how many faults block this direction now."""
        self._islands: dict[str, int] = {}
        """machine -> its side of a partition; empty while there is none."""
        self._ends: list[End] = []
        self.on_send: Callable[[Machine, msg.Message], None] = _ignore_send
        """Hears of every frame, with its sender."""

    def latency_s(self, source: str, target: str) -> float:
        key = (source, target)
        if key not in self._latency_s:
            self._latency_s[key] = self.rng.uniform(*self.config.latency_s)
        return self._latency_s[key]

    # -- what machines do -------------------------------------------------------------------------------------------

    def dial(self, source: Machine, target: str, done: Callable[[End | None], None]) -> None:
        """Connect `source` to the machine named `target`; `done` gets the end, or None when that failed."""
        there = self.machines[target]
        rtt_s = self.latency_s(source.name, target) + self.latency_s(target, source.name)

        def finish() -> None:
            if there.alive and not there.frozen and not self._broken(source.name, target):
                near, far = End(self, source, there), End(self, there, source)
                near.other, far.other = far, near
                self._ends = [end for end in self._ends if end.open or end.other.open]
                self._ends += [near, far]
                there.accept(far)
                done(near)
            elif there.powered and not there.alive and not self._broken(source.name, target):
                done(None)  # the machine is there, the process is not: refused at once
            else:
                source.after(DIAL_TIMEOUT_S, lambda: done(None))

        source.after(1.5 * rtt_s + self._loss_delay_s(), finish)

    def carry(self, sender: End, arrival: Callable[[], None]) -> None:
        """Bring one frame (or a close) to the other end, behind all that was sent before."""
        receiver = sender.other
        if self._blocks(sender.owner.name, receiver.owner.name):
            receiver._held.append(arrival)
            return
        delay_s = self.latency_s(sender.owner.name, receiver.owner.name)
        delay_s += self.rng.random() * self.config.jitter_s + self._loss_delay_s()
        arrival_s = max(self.world.now + delay_s, receiver._last_arrival_s)
        receiver._last_arrival_s = arrival_s
        receiver.owner.after(arrival_s - self.world.now, arrival)

    def _loss_delay_s(self) -> float:
        delay_s, wait_s = 0.0, RETRANSMIT_S
        while self.rng.random() < self.config.loss and wait_s < 4.0:
            delay_s += wait_s
            wait_s *= 2
        return delay_s

    def _broken(self, a: str, b: str) -> bool:
        return self._blocks(a, b) or self._blocks(b, a)

    def _blocks(self, source: str, target: str) -> bool:
        """Does nothing get from `source` to `target` now?"""
        if self._islands and self._islands.get(source) != self._islands.get(target):
            return True
        return bool(self._blocked.get((source, target)))

    # -- what faults do ---------------------------------------------------------------------------------------------

    def block(self, source: str, target: str) -> None:
        """Nothing gets from `source` to `target` any more; the other direction is left as it is."""
        key = (source, target)
        self._blocked[key] = self._blocked.get(key, 0) + 1
        for end in list(self._ends):
            if end.open and end.owner.name == target and end.peer.name == source:
                self._watch(end, lambda: bool(self._blocked.get(key)))

    def unblock(self, source: str, target: str) -> None:
        """Undo one `block`. What was sent in between arrives now, on connections that still live."""
        key = (source, target)
        self._blocked[key] -= 1
        if self._blocked[key]:
            return
        for end in self._ends:
            if end.owner.name == target and end.peer.name == source:
                held, end._held = end._held, []
                for arrival in held:
                    self.carry(end.other, arrival)

    def divide(self, *sides: Sequence[str]) -> None:
        """Partition the network: machines of different sides do not reach each other, until `unite`."""
        self._islands = {name: number for number, side in enumerate(sides) for name in side}
        islands = self._islands
        for end in list(self._ends):
            if end.open and self._blocks(end.peer.name, end.owner.name):
                self._watch(end, lambda: self._islands is islands)

    def unite(self) -> None:
        """Undo `divide`. What was sent in between arrives now, on connections that still live."""
        self._islands = {}
        for end in self._ends:
            if end._held and not self._blocks(end.peer.name, end.owner.name):
                held, end._held = end._held, []
                for arrival in held:
                    self.carry(end.other, arrival)

    def cut(self, end: End) -> None:
        """One connection breaks; both machines live and hear of it."""
        for side in (end, end.other):
            side.owner.after(self.latency_s(side.peer.name, side.owner.name), partial(side.lose, "reset"))

    def process_died(self, machine: Machine, *, silently: bool) -> None:
        """The kernel resets the connections of a dead process; a machine without power says nothing."""
        for end in self.ends_of(machine):
            end.open = False
            far = end.other
            if silently or self._blocks(machine.name, far.owner.name):
                self._watch(far, lambda: True)
            else:
                far.owner.after(self.latency_s(machine.name, far.owner.name), partial(far.lose, "reset"))

    def machine_froze(self, machine: Machine) -> None:
        """Its peers hear nothing from now on; its kernel goes on taking what they send."""
        life = machine.freezes
        for end in self.ends_of(machine):
            self._watch(end.other, lambda: machine.frozen and machine.freezes == life)

    def ends_of(self, machine: Machine) -> list[End]:
        """The open ends that this machine holds."""
        return [end for end in self._ends if end.open and end.owner is machine]

    def open_ends(self) -> list[End]:
        return [end for end in self._ends if end.open]

    def _watch(self, end: End, still_silent: Callable[[], bool]) -> None:
        """Let `end` find out that it hears nothing, unless that is over by then."""

        def check() -> None:
            if end.open and still_silent():
                end.lose("silent")
                receiver = end.other
                self.carry(end, lambda: receiver.lose("closed"))

        end.owner.after(SILENT_S + self.rng.random() * PING_S, check)
