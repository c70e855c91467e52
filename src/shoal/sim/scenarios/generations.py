"""Generations over servers that fail: nothing wrong is ever emitted (safety), all end well after healing (liveness).

The driver checks every output against what one machine alone computes, at every position, while it runs; the servers
check every batch against their caches. What is left for the end: that requests end, and that nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import Full, SwarmIncomplete
from shoal.sim import toy
from shoal.sim.faults import FaultConfig, Faults
from shoal.sim.links import LinkConfig, Network
from shoal.sim.machines import MODEL, Driver, Generation, Server
from shoal.sim.report import Report
from shoal.sim.world import World, Wrong
from shoal.spec.ids import BlockRange
from shoal.swarm.serving import ServingConfig
from shoal.swarm.session import SessionConfig

NUM_BLOCKS = 12
FAULTS_S = 20.0
"""How long faults go on before the swarm heals (liveness), or requests keep coming (safety)."""
ENDS_WITHIN_S = 90.0
"""Every request of the safety runs ends by itself within this time, whatever goes on: with its tokens, or with an error
that says why. It is several times the patience of a session, because progress starts patience anew."""
HEALS_WITHIN_S = 60.0
TIMEOUTS_S = ((3.0, 10.0), (1000.0, 1000.0))
"""(open, progress) timeouts of sessions: short ones, and none to speak of. A row or an answer that gets lost must show
here, not be repaired by a timer after a while."""
SETTLES_S = 10.0


@dataclass(slots=True)
class _Swarm:
    world: World
    network: Network
    servers: list[Server]
    drivers: list[Driver]
    faults: Faults


def safety(seed: int, *, trace: list[str] | None = None) -> Report:
    """Faults for as long as requests run. An answer may be cut short by an error that says so, never be wrong."""
    swarm = _build(seed, patience_s=5.0, cache_tokens=(128, 256, 1024), trace=trace)
    requests = _ask(swarm)
    swarm.faults.begin()
    swarm.world.run_for(FAULTS_S)
    done = "every request has ended"
    swarm.world.run_until(lambda: len(requests) == _asked(swarm) and _all_ended(requests), ENDS_WITHIN_S, done)
    for generation in requests:
        if generation.error is not None and not isinstance(generation.error, SwarmIncomplete | Full):
            raise Wrong(f"a generation failed with {generation.error!r}")
    swarm.faults.heal()
    _check_nothing_left(swarm)
    return _report("safety", swarm)


def liveness(seed: int, *, trace: list[str] | None = None) -> Report:
    """Faults, then none: all generations finish with all their tokens, those begun after healing too."""
    swarm = _build(seed, patience_s=120.0, cache_tokens=(1024,), trace=trace)
    requests = _ask(swarm)
    swarm.faults.begin()
    swarm.world.run_for(FAULTS_S)
    swarm.faults.heal()
    healed_at_s = swarm.world.now
    swarm.world.after(SETTLES_S, lambda: requests.append(_begin(swarm, swarm.drivers[0])))
    done = "every generation has finished after healing"
    swarm.world.run_until(lambda: len(requests) == _asked(swarm) + 1 and _all_ended(requests), HEALS_WITHIN_S, done)
    finished_s = swarm.world.now - healed_at_s
    for generation in requests:
        if generation.error is not None or generation.tokens != generation.expected:
            raise Wrong(f"a generation ended with {len(generation.tokens)} tokens and {generation.error!r}")
    _check_nothing_left(swarm)
    report = _report("liveness", swarm)
    report.figures["finished_after_healing_s"] = round(finished_s, 3)
    return report


def _build(seed: int, *, patience_s: float, cache_tokens: tuple[int, ...], trace: list[str] | None) -> _Swarm:
    world = World(seed, trace=trace)
    rng = world.rng
    open_s, progress_s = rng.choice(TIMEOUTS_S)
    config = SessionConfig(patience_s=patience_s, open_timeout_s=open_s, progress_timeout_s=progress_s)
    links = LinkConfig(
        latency_s=rng.choice([(0.0005, 0.002), (0.002, 0.03)]),
        loss=rng.choice([0.0, 0.0, 0.02]),
        duplicate=rng.choice([0.0, 0.05, 0.3]),
    )
    network = Network(world, links)
    names = [f"d{i}" for i in range(rng.randint(1, 2))]
    drivers = [Driver(world, network, name, names, NUM_BLOCKS, config) for name in names]
    servers: list[Server] = []
    for span in _spans(world):
        offer = ServingConfig(
            model=MODEL,
            blocks=span,
            cache_tokens=rng.choice(cache_tokens),
            prefill_rows=rng.choice([4, 16, 512]),
            held_items=rng.choice([8, 256]),
        )
        servers.append(Server(world, network, f"s{len(servers)}", names, offer, step_ms=rng.uniform(0.5, 6.0)))
    for machine in [*drivers, *servers]:
        machine.start()
    world.run_for(3.0)
    return _Swarm(world, network, servers, drivers, Faults(world, network, servers, drivers, FaultConfig()))


def _spans(world: World) -> list[BlockRange]:
    """Two or three hosts for every block: even spans, and some that overlap others in the middle."""
    rng = world.rng
    stages = rng.choice([2, 3, 4])
    size = NUM_BLOCKS // stages
    even = [BlockRange(at, at + size) for at in range(0, NUM_BLOCKS, size)]
    odd = []
    for _ in range(rng.randint(0, 3)):
        start = rng.randrange(NUM_BLOCKS - 1)
        odd.append(BlockRange(start, rng.randint(start + 1, NUM_BLOCKS)))
    return even * rng.choice([1, 2, 2]) + odd


def _asked(swarm: _Swarm) -> int:
    return 3 * len(swarm.drivers)


def _ask(swarm: _Swarm) -> list[Generation]:
    """Three generations per driver, begun at any time while faults go on."""
    requests: list[Generation] = []
    for driver in swarm.drivers:
        for _ in range(3):
            delay_s = swarm.world.rng.uniform(0.0, FAULTS_S * 0.8)
            swarm.world.after(delay_s, lambda driver=driver: requests.append(_begin(swarm, driver)))  # type: ignore[misc]
    return requests


def _begin(swarm: _Swarm, driver: Driver) -> Generation:
    rng = swarm.world.rng
    prompt = [rng.randrange(toy.VOCABULARY) for _ in range(rng.randint(1, 40))]
    want = rng.randint(1, 60)
    tokens, outputs = toy.generate(prompt, NUM_BLOCKS, want)
    results_from = rng.choice([0, len(prompt) - 1])
    generation = Generation(prompt, want, rng.choice([1, 4, 16, 64]), tokens, outputs, results_from)
    # A frozen driver begins when it thaws.
    driver.after(0.0, lambda: driver.generate(generation))
    return generation


def _all_ended(requests: Sequence[Generation]) -> bool:
    return all(generation.ended for generation in requests)


def _check_nothing_left(swarm: _Swarm) -> None:
    """With all requests ended and the network well, no server may keep a session, a cache or a reservation."""
    swarm.world.run_for(SETTLES_S)
    for server in swarm.servers:
        left = (
            server.serving.sessions,
            len(server.caches),
            server.serving.pool.total_pages - server.serving.pool.free_pages,
        )
        if any(left):
            raise Wrong(f"{server.name} still holds {left[0]} sessions, {left[1]} caches, {left[2]} pages")
    for driver in swarm.drivers:
        if driver.running:
            raise Wrong(f"{driver.name} still runs {len(driver.running)} sessions")


def _report(scenario: str, swarm: _Swarm) -> Report:
    generations = [generation for driver in swarm.drivers for generation in driver.generations]
    stalls = [recovery.stall_s for generation in generations for recovery in generation.recoveries]
    counters = [server.serving.counters for server in swarm.servers]
    figures = {
        "servers": len(swarm.servers),
        "generations": len(generations),
        "failed": sum(generation.error is not None for generation in generations),
        "tokens": sum(len(generation.tokens) for generation in generations),
        "recoveries": len(stalls),
        "longest_stall_s": round(max(stalls, default=0.0), 3),
        "replans": sum(driver.replans for driver in swarm.drivers),
        "replayed_rows": sum(driver.replayed_rows for driver in swarm.drivers),
        "duplicates": sum(counter.duplicates for counter in counters),
    }
    world = swarm.world
    return Report(scenario, world.seed, world.now, world.events, figures, dict(swarm.faults.counts), world.trace)
