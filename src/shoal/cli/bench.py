"""`shoal bench`: the measurements, one command each."""

from __future__ import annotations

from shoal.cli.lazy import Entry, LazyGroup

COMMANDS: dict[str, Entry] = {
    "fuzz": Entry(
        "shoal.cli.bench_fuzz:fuzz",
        "Throw hostile frames and HTTP requests at shoal; exit code 3 when one crashes, hangs or costs memory.",
    ),
    "gossip": Entry(
        "shoal.cli.bench_gossip:gossip",
        "Simulate the registry of swarms of several sizes; exit code 3 when a figure misses its bar.",
    ),
    "load": Entry("shoal.cli.bench_load:load", "What a server reads and holds for its share of a model."),
    "security": Entry(
        "shoal.cli.bench_security:security",
        "Attack shoal in many ways and measure what it comes to; exit code 3 when a figure misses its bar.",
    ),
    "split": Entry(
        "shoal.cli.bench_split:split",
        "Compare cut models with whole ones, family by family; exit code 3 when one misses its bar.",
    ),
    "swarm": Entry(
        "shoal.cli.bench_swarm:swarm",
        "Measure speed and failover of a swarm; exit code 3 when a figure misses its bar.",
    ),
}

bench = LazyGroup(name="bench", table=COMMANDS, help="Measure shoal on this machine.")
