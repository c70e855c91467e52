"""`shoal bench fuzz`: hostile frames and HTTP requests by the million."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.cli import output

if TYPE_CHECKING:
    from shoal.hostile.fuzz import Run


@click.command("fuzz")
@click.option("--seeds", default="0:1000000", show_default=True, metavar="FROM:TO", help="Which inputs to make.")
@click.option("--corpus", type=click.Path(path_type=Path), default=None, help="Folder that keeps inputs that did harm.")
@click.option("--grow", is_flag=True, help="Also keep one input for every outcome that is new.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fuzz(seeds: str, corpus: Path | None, grow: bool, as_json: bool) -> int:
    """Throw hostile frames and HTTP requests at shoal; exit code 3 when one crashes, hangs or costs memory.

    A seed is one input. An interrupted run names the seeds that are left.
    """
    import sys
    import time

    from shoal.hostile.fuzz import fuzz, seeds_of

    first, last = seeds_of(seeds)
    latest: list[Run] = []
    terminal = sys.stderr.isatty()
    said_at = time.monotonic()

    def show(run: Run) -> None:
        nonlocal said_at
        latest[:] = [run]
        if time.monotonic() - said_at >= (0.5 if terminal else output.PROGRESS_EVERY_S):
            said_at = time.monotonic()
            print(_line(run), end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    try:
        run = fuzz(first, last, corpus=corpus, grow=grow, on_progress=show)
    except KeyboardInterrupt:
        at = latest[0].done if latest else first
        output.note(f"\ninterrupted; the rest is --seeds {at}:{last}")
        raise
    if as_json:
        output.answer_json(
            {
                "first": run.first,
                "last": run.last,
                "executions": run.executions,
                "seconds": round(run.seconds, 1),
                "grown_bytes": run.grown_bytes,
                "outcomes": run.outcomes,
                "findings": [
                    {"target": each.target, "kind": each.kind, "seed": each.seed, "why": each.why}
                    for each in run.findings
                ],
            }
        )
    else:
        output.answer(_line(run))
        for each in run.findings:
            output.answer(f"{each.kind} in {each.target}, seed {each.seed}: {each.why.strip().splitlines()[-1]}")
    return 3 if run.findings or run.executions < last - first else 0


def _line(run: Run) -> str:
    rate = run.executions / run.seconds if run.seconds else 0.0
    left_s = (run.last - run.done) / rate if rate else 0.0
    return (
        f"{run.executions:,} of {run.last - run.first:,} inputs, {len(run.findings)} findings, "
        f"{run.grown_bytes / 2**20:.0f} MB grown, {rate:,.0f} a second, {left_s:.0f} s left"
    )
