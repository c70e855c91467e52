"""`shoal bench gossip`: what the registry costs in swarms of several sizes, and how fast it learns."""

from __future__ import annotations

import click

from shoal.cli import output

SIZES = (8, 100, 1000)


@click.command("gossip")
@click.option(
    "--nodes",
    "sizes",
    multiple=True,
    type=click.IntRange(4, 1500),
    help="Only this size; may be repeated. Default: 8, 100 and 1000.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same course of events.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON with all figures.")
def gossip(sizes: tuple[int, ...], seed: int, as_json: bool) -> int:
    """Simulate the registry of swarms of several sizes; exit code 3 when a figure misses its bar.

    Runs the real registry code on a virtual clock: a join, silent deaths, an old calendar, the death of every seed, a
    partition, and liars all the while; a shorter course for swarms of more than 200. Signatures are priced with real
    keys. Ten seconds for 8 and 100 nodes, about four minutes for 1,000.
    """
    from shoal.bench import gossip as bench
    from shoal.sim.scenarios import registry

    cost = bench.prices()
    figures = []
    for nodes in sizes or SIZES:
        output.note(f"Simulating {nodes} nodes.")
        found = bench.figures(registry.lifetime(seed, num_nodes=nodes).figures, cost)
        figures += found
        if not as_json:
            for figure in found:
                output.answer(str(figure))
    if as_json:
        output.answer_json({"figures": [figure.as_json() for figure in figures]})
    return 0 if all(figure.ok for figure in figures) else 3
