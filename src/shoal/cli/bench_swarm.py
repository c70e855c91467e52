"""`shoal bench swarm`: the figures of the README, measured on this machine."""

from __future__ import annotations

import click

from shoal.cli import output

PARTS = ("start", "kills", "overhead", "decode", "prefill", "stall", "batch", "near", "relieved")


@click.command("swarm")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only this part; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON with all figures.")
def swarm(parts: tuple[str, ...], as_json: bool) -> int:
    """Measure speed and failover of a swarm; exit code 3 when a figure misses its bar."""
    import os

    from shoal.launch.children import ENVIRONMENT

    os.environ |= ENVIRONMENT  # before torch is imported: peer and swarm run under the same settings

    from shoal.bench import swarm as bench
    from shoal.cli import process
    from shoal.cli.up import demo_model

    figures = process.run(bench.run(output.note, demo_model(), parts))
    if as_json:
        output.answer_json({"figures": [figure.as_json() for figure in figures]})
    else:
        for figure in figures:
            output.answer(str(figure))
    return 0 if all(figure.ok for figure in figures) else 3
