"""`shoal bench`: the measurements, one command each."""

from __future__ import annotations

from shoal.cli.lazy import Entry, LazyGroup

COMMANDS: dict[str, Entry] = {
    "swarm": Entry(
        "shoal.cli.bench_swarm:swarm",
        "Measure speed and failover of a swarm; exit code 3 when a figure misses its bar.",
    ),
}

bench = LazyGroup(name="bench", table=COMMANDS, help="Measure shoal on this machine.")
