"""One loss in a swarm with a spare for every span: the answer goes on at once, and nothing is planned twice.

Safety and liveness leave room for detours (a healthy replacement given up for no reason, a wait that a timer ends).
This scenario does not: after one fault there is exactly one new plan, and the gap is what noticing, opening and
replaying take. (A server that is asked to leave and has no spare finishes what it has: no new plan, and no gap.)
"""

from __future__ import annotations

from shoal.sim import toy
from shoal.sim.links import PING_S, SILENT_S, LinkConfig, Network
from shoal.sim.machines import MODEL, Driver, Generation, Server
from shoal.sim.report import Report
from shoal.sim.world import World, Wrong
from shoal.spec.ids import BlockRange
from shoal.swarm.serving import ServingConfig
from shoal.swarm.session import SessionConfig

NUM_BLOCKS = 12
STEP_MS = 1.0
LATENCY_S = (0.0005, 0.005)
NUM_TOKENS = 40
REPLAN_AND_REPLAY_S = 0.5
"""Bound for opening the replacement and replaying: six times one way, and 60 rows of 8 sessions each in its span."""
KINDS = ("kill", "power_off", "freeze", "cut", "cut_push", "drain", "drain_without_spare")


def one_loss(seed: int, *, trace: list[str] | None = None) -> Report:
    """Break one server in use (or a connection of it) in the middle of a generation."""
    world = World(seed, trace=trace)
    rng = world.rng
    network = Network(world, LinkConfig(latency_s=LATENCY_S))
    driver = Driver(world, network, "d0", ["d0"], NUM_BLOCKS, SessionConfig())
    size = NUM_BLOCKS // rng.choice([2, 3, 4])
    kind = rng.choice(KINDS)
    servers: dict[str, Server] = {}
    for start in [*range(0, NUM_BLOCKS, size)] * (1 if kind == "drain_without_spare" else 2):
        offer = ServingConfig(model=MODEL, blocks=BlockRange(start, start + size), cache_tokens=1024)
        name = f"s{len(servers)}"
        servers[name] = Server(world, network, name, ["d0"], offer, STEP_MS)
    for machine in [driver, *servers.values()]:
        machine.start()
    world.run_for(3.0)

    generations = [_begin(driver) for _ in range(rng.choice([1, 1, 3, 8]))]
    generation, enough = generations[0], rng.randint(1, NUM_TOKENS - 1)
    world.run_until(lambda: len(generation.tokens) >= enough, 30.0, "the generation is under way")
    session = next(session for session, owner in driver.running.values() if owner is generation)
    # A push link leads from a stage to the next one, so the last stage has none.
    chain = session.chain
    at = rng.randrange(len(chain) - (kind == "cut_push"))
    _strike(network, servers[chain[at].node], kind, chain[at + 1].node if kind == "cut_push" else driver.name)
    world.run_until(lambda: all(each.ended for each in generations), 30.0, "the generations have finished")
    limit_s = REPLAN_AND_REPLAY_S + (SILENT_S + PING_S if kind in ("freeze", "power_off") else 0.0)
    for each in generations:
        if each.tokens != each.expected:
            raise Wrong(f"{len(each.tokens)} of {NUM_TOKENS} tokens came, then {each.error!r}")
        stall_s = max((recovery.stall_s for recovery in each.recoveries), default=0.0)
        if stall_s > limit_s:
            raise Wrong(f"after a {kind} an answer stood still for {stall_s:.2f} s, more than {limit_s:.2f} s")
        if each.plans > 2 or (each is generation and each.plans != (1 if kind == "drain_without_spare" else 2)):
            raise Wrong(f"one {kind} led to {each.plans - 1} new plans")
    stalls = [recovery.stall_s for each in generations for recovery in each.recoveries]
    figures = {
        "generations": len(generations),
        "recoveries": len(stalls),
        "longest_stall_s": round(max(stalls, default=0.0), 3),
        "replayed_rows": driver.replayed_rows,
    }
    return Report("failover", seed, world.now, world.events, figures, {kind: 1}, trace)


def _begin(driver: Driver) -> Generation:
    rng = driver.world.rng
    prompt = [rng.randrange(toy.VOCABULARY) for _ in range(rng.randint(1, 20))]
    tokens, outputs = toy.generate(prompt, NUM_BLOCKS, NUM_TOKENS)
    generation = Generation(prompt, NUM_TOKENS, 16, tokens, outputs, len(prompt) - 1)
    driver.generate(generation)
    return generation


def _strike(network: Network, server: Server, kind: str, peer: str) -> None:
    """Break `server`, or its connection with `peer`."""
    if kind in ("kill", "power_off"):
        server.kill(power_off=kind == "power_off")
    elif kind == "freeze":
        server.freeze()
    elif kind in ("drain", "drain_without_spare"):
        server.leave()
    else:
        # Between two servers there may also be a connection the other way, for gossip alone.
        pushing = server.end_to(peer) if kind == "cut_push" else None
        network.cut(pushing or next(end for end in reversed(network.ends_of(server)) if end.peer.name == peer))
