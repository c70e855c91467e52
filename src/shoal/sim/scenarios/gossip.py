"""Registry views alone: they converge, die with their lease, and heal after a partition."""

from __future__ import annotations

from shoal.sim.links import LinkConfig, Network
from shoal.sim.machines import Node
from shoal.sim.report import Report
from shoal.sim.world import World, Wrong

CONVERGED_WITHIN_S = 15.0
"""Fifteen rounds. Push-pull spreads news to n nodes in about log2(n) rounds."""


def converges(seed: int, *, num_nodes: int = 8, trace: list[str] | None = None) -> Report:
    """Nodes that know only one seed node find each other; a partition splits the view in two (each half forgets the
    other with its leases); after it heals, all see all again."""
    world = World(seed, trace=trace)
    network = Network(world, LinkConfig(loss=world.rng.choice([0.0, 0.02, 0.1])))
    names = [f"n{i}" for i in range(num_nodes)]
    nodes = [Node(world, network, name, names[:1]) for name in names]
    for node in nodes:
        world.after(world.rng.uniform(0.0, 2.0), node.start)

    def sees(node: Node) -> set[str]:
        return {record.node for record in node.view.live(node.now())}

    def all_see_all() -> bool:
        return all(node.alive and sees(node) == set(names) for node in nodes)

    def settle(what: str) -> float:
        began_s = world.now
        while not all_see_all():
            world.run_for(0.25)
            if world.now > began_s + CONVERGED_WITHIN_S:
                lacking = {node.name: sorted(set(names) - sees(node)) for node in nodes if sees(node) != set(names)}
                raise Wrong(f"views have not converged {what}: missing {lacking}")
        return world.now - began_s

    first_s = settle("after the start")
    world.rng.shuffle(names)
    left, right = names[: num_nodes // 2], names[num_nodes // 2 :]
    pairs = [(a, b) for a in left for b in right] + [(b, a) for a in left for b in right]
    for pair in pairs:
        network.block(*pair)
    world.run_for(10.0 + CONVERGED_WITHIN_S)
    for node in nodes:
        side = set(left if node.name in left else right)
        if sees(node) != side:
            raise Wrong(f"{node.name} sees {sorted(sees(node))} across a partition, not {sorted(side)}")
    for pair in pairs:
        network.unblock(*pair)
    healed_s = settle("after the partition")
    for node in nodes:
        live = node.view.live(node.now())
        if len({record.node for record in live}) != len(live):
            raise Wrong(f"{node.name} sees a node twice")
    figures = {"nodes": num_nodes, "converged_s": first_s, "healed_s": healed_s}
    return Report("gossip", seed, world.now, world.events, figures, {"partition": 1}, world.trace)
