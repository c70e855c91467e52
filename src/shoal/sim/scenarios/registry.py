"""The registry in a swarm of any size: what it costs, how fast news travels, and what liars achieve.

Real View and Mesh, real encodings of every message, toy signatures as long as real ones. One run goes through all that
happens to a registry: a start, quiet, a join, silent deaths, a start with an older calendar, the death of every seed, a
partition; and all the while somebody replays the record of a dead node, and passes on forged and foreign ones. In a
large swarm, where each virtual second takes seconds of a processor, the course is shorter: the seeds die together with
the first victim, and nobody's calendar goes back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from shoal.sim.keys import ToyKeys
from shoal.sim.links import Body, End, LinkConfig, Network
from shoal.sim.machines import Machine, Node
from shoal.sim.report import Report
from shoal.sim.world import World, Wrong
from shoal.swarm.gossip import pace
from shoal.swarm.view import digest_key
from shoal.wire import codec
from shoal.wire import messages as msg
from shoal.wire.frames import HEADER_BYTES

TLS_BYTES = 22
"""What TLS 1.3 adds to a frame of up to 16 KiB."""
QUIET_S = 10.0
PARTITION_S = 20.0
"""Long enough for every lease across the border to end."""
SHORT_QUIET_S = 6.0
SHORT_PARTITION_S = 14.0
"""In a large swarm. Two renewals of every lease; a lease and a half, for who heard nothing for a while (view.
MAX_SHORTENING), and some."""
LIMIT_S = 40.0
"""Nothing below takes longer, or the run has failed."""
COLD_START_NODES = 200
"""In a larger swarm nobody starts a thousand machines within two seconds: every one would have to hear a thousand
certificates."""
STEP_S = 0.25
"""How exactly times are measured."""


class Member(Node):
    """A node whose record is as large as a real server's, and which counts what gossip costs it."""

    def __init__(self, world: World, network: Network, name: str, seeds: Sequence[str], *, swarm: str = "toy") -> None:
        super().__init__(world, network, name, seeds)
        self.keys = ToyKeys(name, self.role, swarm=swarm)
        self.calendar_s = 1_700_000_000
        """What its calendar shows when it starts."""

    def on_start(self) -> None:
        super().on_start()
        self.publish()

    def record(self, incarnation: int) -> msg.Record:
        pace = self.mesh.pace
        return msg.Record(
            node=self.name,
            incarnation=max(incarnation, self.calendar_s),
            version=0,
            lease_s=pace.lease_s,
            role=self.role,
            state="online",
            addresses=[f"sim://{self.name}"],
            span=msg.Span("llama-3.3-70b-instruct@0123456789ab", 24, 32),
            pid=4242,
            dtype="bfloat16",
            decode_ms_per_block=1.53,
            prefill_ms_per_block_token=0.0721,
            memory_bytes=64 << 30,
            cache_tokens_free=131_072,
            cache_tokens_total=262_144,
            queue_rows=self.world.rng.randrange(100),  # load changes all the time
            sessions=2,
            labels=["trusted"],
            wire_error=0.0017,
            serves="llama-3.3-70b-instruct@0123456789ab",
            reason="Blocks 24:32 had the fewest servers for their demand.",
            rtts=[(f"{number:032x}", 0.25 * number) for number in range(min(pace.rtts, self.mesh.pace.links))],
            busy=0.5,
            threads=8,
            audit=msg.AuditHead(1000, bytes(32)),
        )

    def settle(self, nodes: int) -> None:
        """Go on as if it had been one of so many nodes for long: its renewals and news of its load are due when they
        are, not when everybody's are."""
        self.mesh.pace = pace(nodes)
        self.publish()
        self._renewed_at_s -= self.world.rng.uniform(0.0, self.mesh.pace.renew_s)
        self._told_at_s -= self.world.rng.uniform(0.0, self.mesh.pace.load_s)

    def own(self) -> msg.Record:
        """What it says about itself now."""
        record = self.view.get(self.name)
        if record is None:
            raise Wrong(f"{self.name} has no record")
        return record

    def sees(self) -> set[str]:
        """Nodes that this one takes for alive."""
        return {record.node for record in self.view.live(self.now())}


class Liar(Node):
    """Connects to one node after the other and tells it what it should not believe. No member of its own."""

    def __init__(self, world: World, network: Network, name: str) -> None:
        super().__init__(world, network, name, [])
        self.victims: list[str] = []
        self.lies: list[msg.Signed] = []
        self.told = 0

    def accept(self, end: End) -> None:
        end.close()

    def _frame(self, end: End, message: msg.Message, body: Body) -> None:
        """It listens to nobody."""

    def _round(self) -> None:
        if self.victims and self.lies:
            for victim in self.world.rng.sample(self.victims, min(3, len(self.victims))):
                digest = {digest_key(victim): (2**53 - 1, 0)}
                self.send(victim, msg.Sync(digest, self.lies[:6], 2, more=True))
                self.told += len(self.lies[:6])
        for node, out in list(self._outs.items()):
            if out.end is not None and self.now() > out.made_at_s + 2.0:
                del self._outs[node]
                out.end.close()
        self.after(0.5, self._round, background=True)


class _Run:
    def __init__(self, seed: int, num_nodes: int, trace: list[str] | None) -> None:
        self.world = World(seed, trace=trace)
        self.network = Network(self.world, LinkConfig(loss=0.01))
        self.network.on_send = self._count
        self.sent_bytes: dict[str, int] = {}
        self._sized: tuple[msg.Message | None, int] = (None, 0)
        """The last message and its size: the opening of a round goes to several nodes."""
        names = [f"{self.world.rng.getrandbits(128):032x}" for _ in range(num_nodes)]
        self.seeds = names[: 1 if num_nodes <= 32 else 3]
        self.members = {name: Member(self.world, self.network, name, self.seeds) for name in names}
        self.liar = Liar(self.world, self.network, "liar")
        self.foreign = ToyKeys("f" * 32, swarm="other")

    def _count(self, sender: Machine, message: msg.Message) -> None:
        known, size = self._sized
        if known is not message:
            _, meta = codec.encode(message)
            size = HEADER_BYTES + len(meta)
            size += TLS_BYTES * -(-size // 16_384)
            self._sized = (message, size)
        self.sent_bytes[sender.name] = self.sent_bytes.get(sender.name, 0) + size

    # -- what is asked ----------------------------------------------------------------------------------------------

    def alive(self) -> list[Member]:
        return [member for member in self.members.values() if member.alive]

    def everybody_sees(self, wanted: set[str]) -> bool:
        alive = self.alive()
        if any(member.view.count_live(member.now()) != len(wanted) for member in alive):
            return False  # much cheaper than the names
        return all(member.sees() == wanted for member in alive)

    def until(self, true: Callable[[], bool], what: str) -> float:
        began_s = self.world.now
        while not true():
            if self.world.now > began_s + LIMIT_S:
                raise Wrong(f"after {LIMIT_S:.0f} s still not: {what}")
            self.world.run_for(STEP_S)
            self.check()
        return self.world.now - began_s

    def all_see_all(self, what: str) -> float:
        names = {member.name for member in self.alive()}
        return self.until(lambda: self.everybody_sees(names), what)

    def gone(self, names: Sequence[str], what: str) -> float:
        return self.until(lambda: not any(self._has(member, name) for member in self.alive() for name in names), what)

    def _has(self, member: Member, name: str) -> bool:
        return member.view.is_live(name, member.now())

    def check(self) -> None:
        """Nothing false is believed, ever."""
        for member in self.alive():
            for name in (self.foreign.member.node, "liar"):
                if member.view.get(name) is not None:
                    raise Wrong(f"{member.name} believes in {name}")

    def absences(self) -> int:
        """Living nodes missing from views of living nodes now, over all pairs."""
        alive = {member.name for member in self.alive()}
        # In quiet times nobody has died, so the number is enough; without it a thousand nodes compare a million names.
        return sum(
            len(alive) - len(alive & member.sees())
            for member in self.alive()
            if member.view.count_live(member.now()) != len(alive)
        )

    def start_acquainted(self) -> None:
        """All at once, and each with the records of all others, as if they had joined one by one over the days."""
        for member in self.members.values():
            member.start()
            member.settle(len(self.members))
        records = [member.keys.seal(member.own()) for member in self.members.values()]
        for member in self.members.values():
            member.view.merge(records, member.now())

    def kill(self, member: Member) -> None:
        """Without power, so that nobody is told; its last record is replayed from now on."""
        self.liar.lies.insert(0, member.keys.seal(member.own()))
        member.kill(power_off=True)


def lifetime(seed: int, *, num_nodes: int = 8, trace: list[str] | None = None) -> Report:
    """One swarm from its start to a healed partition; the figures are times in virtual seconds and bytes."""
    with _collecting_less(num_nodes > COLD_START_NODES):
        return _lifetime(seed, num_nodes, trace)


@contextmanager
def _collecting_less(large: bool) -> Iterator[None]:
    """A large swarm holds millions of objects, nearly none of them in cycles; looking for those again and again would
    cost a third of the run."""
    if not large or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _lifetime(seed: int, num_nodes: int, trace: list[str] | None) -> Report:
    short = num_nodes > COLD_START_NODES
    run = _Run(seed, num_nodes, trace)
    world, members = run.world, run.members
    figures: dict[str, float] = {"nodes": num_nodes}
    if not short:
        for member in members.values():
            world.after(world.rng.uniform(0.0, 2.0), member.start)
        world.run_for(2.0)
        figures["started_s"] = run.all_see_all("all see all after the start")
    else:
        run.start_acquainted()
    figures |= _quiet(run, SHORT_QUIET_S if short else QUIET_S)

    victim = run.alive()[-1]
    run.liar.victims = list(members)
    run.liar.lies = _lies(run, victim)
    run.liar.start()

    newcomer = Member(world, run.network, f"{world.rng.getrandbits(128):032x}", run.seeds)
    members[newcomer.name] = newcomer
    newcomer.start()
    seed_node = members[run.seeds[0]]
    figures["join_at_seed_s"] = run.until(lambda: run._has(seed_node, newcomer.name), "a seed sees a newcomer")
    figures["join_s"] = figures["join_at_seed_s"] + run.all_see_all("all see a newcomer, and it sees all")

    figures |= _deaths_together(run, victim) if short else _deaths(run, victim)
    figures |= _partition(run, SHORT_PARTITION_S if short else PARTITION_S)
    replayed = [name for name in members if not members[name].alive]
    if any(run._has(member, name) for member in run.alive() for name in replayed):
        raise Wrong("a replayed record brought a dead node back")
    refused = sum(member.view.refused.total() for member in members.values())
    if not refused or not run.liar.told:
        raise Wrong("no lie was told, or none was counted")
    figures["lies_refused"] = refused
    return Report("registry", seed, world.now, world.events, figures, {"partition": 1, "kill": 2}, world.trace)


def _deaths(run: _Run, victim: Member) -> dict[str, float]:
    """One after the other, with a node in between that comes back with yesterday's date."""
    run.kill(victim)
    figures = {"dead_s": run.gone([victim.name], "a dead node is out of every view")}
    victim.calendar_s -= 86_400
    victim.start()
    figures["calendar_s"] = run.all_see_all("all see a node whose calendar went back")

    for name in run.seeds:
        run.kill(run.members[name])
    figures["seeds_dead_s"] = run.gone(run.seeds, "dead seeds are out of every view")
    second = run.alive()[-1]
    run.kill(second)
    figures["dead_without_seeds_s"] = run.gone([second.name], "a dead node is out of every view, without seeds")
    return figures


def _deaths_together(run: _Run, victim: Member) -> dict[str, float]:
    """The victim and every seed lose power at the same moment, so that one wait shows both."""
    for name in (victim.name, *run.seeds):
        run.kill(run.members[name])
    return {"dead_s": run.gone([victim.name, *run.seeds], "a dead node and all seeds are out of every view")}


def _quiet(run: _Run, quiet_s: float) -> dict[str, float]:
    """What it costs when nothing happens."""
    run.world.run_for(2.0)  # news of the start have settled
    sent_before, checks_before = dict(run.sent_bytes), _checks(run)
    absences = 0
    for _ in range(int(quiet_s)):
        run.world.run_for(1.0)
        absences += run.absences()
    if absences:
        raise Wrong(f"{absences} times a living node was missing from a view while nothing happened")
    sent = [run.sent_bytes[name] - sent_before.get(name, 0) for name in run.members]
    links = len(run.network.open_ends()) / len(run.members)
    return {
        "bytes_per_node_s": sum(sent) / len(sent) / quiet_s,
        "bytes_seed_s": max(run.sent_bytes[name] - sent_before.get(name, 0) for name in run.seeds) / quiet_s,
        "checks_per_node_s": (_checks(run) - checks_before) / len(sent) / quiet_s,
        "connections_per_node": links,
    }


def _checks(run: _Run) -> int:
    return sum(member.keys.checks for member in run.members.values())


def _lies(run: _Run, victim: Member) -> list[msg.Signed]:
    """Forged and foreign records that begin to be told when the swarm stands."""
    own = victim.own()
    honest = victim.keys.seal(own)
    false = ToyKeys("liar").seal(replace(own, version=own.version + 99))
    foreign = run.foreign.seal(replace(own, node=run.foreign.member.node))
    return [false, msg.Signed(false.payload, honest.signature, honest.chain), foreign]


def _partition(run: _Run, seconds: float) -> dict[str, float]:
    names = [member.name for member in run.alive()]
    run.world.rng.shuffle(names)
    left, right = names[: len(names) // 2], names[len(names) // 2 :]
    run.network.divide(left, right)
    run.world.run_for(seconds)
    for side in (left, right):
        for name in side:
            if run.members[name].sees() != set(side):
                raise Wrong(f"{name} does not see exactly its own side of a partition")
    run.network.unite()
    return {"healed_s": run.all_see_all("all see all again after a partition")}
