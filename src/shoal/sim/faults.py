"""What goes wrong, when, and for how long: drawn from the seed, each fault with its end.

Every fault undoes itself after a while; `heal` undoes at once whatever is still broken and stops new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.sim.links import Network
from shoal.sim.machines import Driver, Machine, Server
from shoal.sim.world import Call, World


@dataclass(frozen=True, slots=True)
class FaultConfig:
    """How often faults come and which; weights are relative."""

    every_s: float = 1.0
    """Mean time between two faults."""
    weights: dict[str, float] = field(
        default_factory=lambda: {
            "kill": 3.0,
            "power_off": 1.0,
            "freeze": 2.0,
            "freeze_driver": 0.5,
            "slow": 1.0,
            "cut": 3.0,
            "block": 1.5,
            "isolate": 0.7,
            "drain": 1.0,
        }
    )
    at_most: int = 3
    """Faults at the same time."""


class Faults:
    """Breaks machines and links of a world."""

    def __init__(
        self, world: World, network: Network, servers: Sequence[Server], drivers: Sequence[Driver], config: FaultConfig
    ) -> None:
        self.world = world
        self.network = network
        self.servers = servers
        self.drivers = drivers
        self.config = config
        self.counts: dict[str, int] = {}
        self._undo: dict[int, Call] = {}
        self._number = 0
        self._broken: set[str] = set()
        """Machines with a fault of their own; a second one waits its turn."""
        self._on = False

    def begin(self) -> None:
        self._on = True
        self._schedule()

    def heal(self) -> None:
        """No more faults, and what is broken works again."""
        self.world.note("everything heals")
        self._on = False
        for number in list(self._undo):
            self._end(number)

    def _schedule(self) -> None:
        self.world.after(self.world.rng.expovariate(1 / self.config.every_s), self._strike, background=True)

    def _strike(self) -> None:
        if not self._on:
            return
        if len(self._undo) < self.config.at_most:
            kinds = list(self.config.weights)
            kind = self.world.rng.choices(kinds, [self.config.weights[kind] for kind in kinds])[0]
            if getattr(self, f"_{kind}")():
                self.counts[kind] = self.counts.get(kind, 0) + 1
        self._schedule()

    def _until(self, lasts_s: float, undo: Call) -> bool:
        self._number += 1
        number = self._number
        self._undo[number] = undo
        self.world.after(lasts_s, lambda: self._end(number))
        return True

    def _end(self, number: int) -> None:
        undo = self._undo.pop(number, None)
        if undo is not None:
            undo()

    def _claim(self, machines: Sequence[Machine]) -> Machine | None:
        """A healthy machine, from now on busy with one fault."""
        healthy = [machine for machine in machines if machine.alive and machine.name not in self._broken]
        if not healthy:
            return None
        machine = self.world.rng.choice(healthy)
        self._broken.add(machine.name)
        return machine

    # -- the faults -------------------------------------------------------------------------------------------------

    def _kill(self, *, power_off: bool = False) -> bool:
        machine = self._claim(self.servers)
        if machine is None:
            return False
        machine.kill(power_off=power_off)
        return self._until(self.world.rng.uniform(0.3, 8.0), lambda: self._restart(machine))

    def _power_off(self) -> bool:
        return self._kill(power_off=True)

    def _restart(self, machine: Machine) -> None:
        self._broken.discard(machine.name)
        machine.start()

    def _freeze(self, machines: Sequence[Machine] | None = None) -> bool:
        machine = self._claim(self.servers if machines is None else machines)
        if machine is None:
            return False
        machine.freeze()

        def thaw() -> None:
            self._broken.discard(machine.name)
            machine.thaw()

        return self._until(self.world.rng.uniform(0.2, 6.0), thaw)

    def _freeze_driver(self) -> bool:
        return self._freeze(self.drivers)

    def _slow(self) -> bool:
        machine = self._claim(self.servers)
        if machine is None:
            return False
        self.world.note(f"{machine.name} becomes slow")
        machine.slowness = self.world.rng.uniform(5.0, 50.0)

        def recover() -> None:
            self._broken.discard(machine.name)
            machine.slowness = 1.0

        return self._until(self.world.rng.uniform(0.5, 5.0), recover)

    def _cut(self) -> bool:
        ends = self.network.open_ends()
        if not ends:
            return False
        end = self.world.rng.choice(ends)
        self.world.note(f"the connection {end.owner.name}-{end.peer.name} is cut")
        self.network.cut(end)
        return True

    def _block(self) -> bool:
        """One direction between two machines, or both."""
        a, b = self.world.rng.sample([*self.servers, *self.drivers], 2)
        pairs = [(a.name, b.name)]
        if self.world.rng.random() < 0.5:
            pairs.append((b.name, a.name))
        return self._partition(pairs, self.world.rng.uniform(0.3, 6.0))

    def _isolate(self) -> bool:
        """One machine from all others, in both directions."""
        everyone = [*self.servers, *self.drivers]
        one = self.world.rng.choice(everyone)
        others = [other for other in everyone if other is not one]
        pairs = [(one.name, o.name) for o in others] + [(o.name, one.name) for o in others]
        return self._partition(pairs, self.world.rng.uniform(0.3, 6.0))

    def _partition(self, pairs: Sequence[tuple[str, str]], lasts_s: float) -> bool:
        self.world.note("blocked: " + ", ".join(f"{a}>{b}" for a, b in pairs))
        for a, b in pairs:
            self.network.block(a, b)

        def unblock() -> None:
            self.world.note("open again: " + ", ".join(f"{a}>{b}" for a, b in pairs))
            for a, b in pairs:
                self.network.unblock(a, b)

        return self._until(lasts_s, unblock)

    def _drain(self) -> bool:
        """SIGTERM: a polite end after at most five seconds, then a new process."""
        machine = self._claim(self.servers)
        if not isinstance(machine, Server):
            return False
        machine.leave()

        def restart() -> None:
            machine.kill()
            self._restart(machine)

        return self._until(self.world.rng.uniform(1.0, 5.0), restart)
