"""`shoal bench security`: attacks on shoal, and what they come to."""

from __future__ import annotations

import click

from shoal.cli import output

PARTS = ("fuzz", "slow", "routes", "tamper", "zones", "removal", "honesty")


@click.command("security")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only this part; may be repeated.")
@click.option(
    "--inputs",
    type=click.IntRange(min=1),
    default=1_000_000,
    show_default=True,
    help="Hostile inputs of the part fuzz.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON with all figures.")
def security(parts: tuple[str, ...], inputs: int, as_json: bool) -> int:
    """Attack shoal in many ways and measure what it comes to; exit code 3 when a figure misses its bar."""
    import asyncio

    from shoal.bench import security as bench

    figures = asyncio.run(bench.run(output.note, parts, inputs=inputs))
    if as_json:
        output.answer_json({"figures": [figure.as_json() for figure in figures]})
    else:
        for figure in figures:
            output.answer(str(figure))
    return 0 if all(figure.ok for figure in figures) else 3
