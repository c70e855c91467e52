"""What the registry costs and how fast it is: figures from simulated swarms, and the price of real signatures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from shoal.bench.figures import Figure, at_most
from shoal.net.directory import Signatures
from shoal.net.identity import create_ca, create_issuer, issue_node
from shoal.wire.messages import Beat

REPEATS = 200
JOIN_S = 5.0
DEAD_S = 10.0
HEALED_S = 10.0
CORE_SHARE = 0.10
"""Of one core, for the signatures of all others."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Milliseconds on this machine, medians."""

    sign_ms: float
    check_ms: float
    """A signature of a node whose certificates are known."""
    first_check_ms: float
    """The first of a node: its certificates too."""


def prices() -> Prices:
    """Measure with real keys and certificates (P-256)."""
    ca = create_issuer(create_ca("bench"))
    one, two = issue_node(ca, "server"), issue_node(ca, "server")
    payload = msgspec.msgpack.encode(Beat(two.peer.node, 1_700_000_000, 1, 2))
    signature = two.sign(payload)
    known = Signatures(one)

    def check(signatures: Signatures) -> None:
        if signatures.writer(payload, signature, two.chain_der) is None:
            raise RuntimeError("a right signature was refused")

    check(known)
    return Prices(
        sign_ms=_median_ms(lambda: two.sign(payload)),
        check_ms=_median_ms(lambda: check(known)),
        first_check_ms=_median_ms(lambda: check(Signatures(one))) - _median_ms(lambda: Signatures(one)),
    )


def bytes_budget(nodes: int) -> float:
    """Bytes per second that a node may send for gossip."""
    return 10_000.0 if nodes <= 32 else 50_000.0 if nodes <= 256 else 200_000.0


def figures(run: Mapping[str, float], cost: Prices) -> list[Figure]:
    """The figures of one simulated swarm (sim.scenarios.registry.lifetime)."""
    nodes = int(run["nodes"])
    checks = run["checks_per_node_s"]
    links = f"{run['connections_per_node']:.1f} connections a node"
    together = "seeds_dead_s" not in run  # the shorter course of a large swarm
    found = [
        at_most(
            f"gossip, {nodes} nodes: sent by a node",
            run["bytes_per_node_s"],
            bytes_budget(nodes),
            unit="bytes/s",
            peer=f"{links}; the busiest seed {run['bytes_seed_s']:.0f} bytes/s; frames with TLS, load changing always",
        ),
        at_most(
            f"gossip, {nodes} nodes: signatures",
            checks * cost.check_ms / 1e3,
            CORE_SHARE,
            unit="cores",
            peer=f"{checks:.0f} checks a second of {cost.check_ms:.3f} ms;"
            f" the first of a node {cost.first_check_ms:.2f} ms, signing {cost.sign_ms:.3f} ms",
        ),
        at_most(
            f"gossip, {nodes} nodes: a newcomer is seen by all and sees all",
            run["join_s"],
            JOIN_S,
            unit="s",
            peer=f"by a seed after {run['join_at_seed_s']:g} s",
        ),
        at_most(
            f"gossip, {nodes} nodes: a dead node is out of every view",
            run["dead_s"],
            DEAD_S,
            unit="s",
            peer=f"lost power{' together with every seed' if together else ''}; its last record replayed all the time",
        ),
        at_most(
            f"gossip, {nodes} nodes: all see all after a partition",
            run["healed_s"],
            HEALED_S,
            unit="s",
            peer=f"longer in two halves than any lease, no seed alive; {run['lies_refused']:.0f} lies refused in all",
        ),
    ]
    if not together:
        found += [
            at_most(
                f"gossip, {nodes} nodes: a dead node is out of every view when every seed is dead",
                run["dead_without_seeds_s"],
                DEAD_S,
                unit="s",
                peer=f"the seeds themselves after {run['seeds_dead_s']:g} s",
            ),
            at_most(
                f"gossip, {nodes} nodes: a node back with yesterday's date is seen by all",
                run["calendar_s"],
                DEAD_S,
                unit="s",
                peer="its old record is still known to all",
            ),
        ]
    return found


def _median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)
