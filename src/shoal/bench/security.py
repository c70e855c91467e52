"""`shoal bench security`: what attacks come to, each figure against the bar it must reach.

A part is a function that measures and returns figures; a new one is a line in PARTS.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from shoal.bench.figures import Figure, at_least, at_most
from shoal.hostile.edits import check_edits
from shoal.hostile.fleets import check_fleets
from shoal.hostile.fuzz import Run
from shoal.hostile.fuzz import fuzz as run_fuzz
from shoal.hostile.removal import NODES, removal_s
from shoal.hostile.routes import attempts
from shoal.hostile.slow import SLOW, measure
from shoal.hostile.worker import GROWTH_BYTES, SLOW_S

INPUTS = 1_000_000
FLEETS = 100_000
EDITS = 10_000
REMOVALS = 5
Progress = Callable[[str], None]
SAY_EVERY_S = 10.0


async def run(progress: Progress, only: tuple[str, ...] = (), *, inputs: int = INPUTS) -> list[Figure]:
    """Measure all figures, or those whose part is named in `only`, in a fixed order."""
    figures: list[Figure] = []
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        progress(f"{name} ...")
        start = time.monotonic()
        found = await part(progress, inputs)
        figures += found
        for figure in found:
            progress(f"  {figure}")
        progress(f"  {name} took {time.monotonic() - start:.0f} s")
    return figures


async def fuzz(progress: Progress, inputs: int) -> list[Figure]:
    """Hostile frames, certificates, tokens and HTTP requests."""
    said_at = time.monotonic()

    def say(run: Run) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > SAY_EVERY_S:
            said_at = time.monotonic()
            progress(f"  {run.done:,} of {run.last:,} inputs, {len(run.findings)} findings")

    found = await asyncio.to_thread(run_fuzz, 0, inputs, on_progress=say)
    rate = found.executions / found.seconds
    clean = found.executions - len(found.findings)
    return [
        at_least(
            f"hostile inputs taken without a crash or {SLOW_S:g} s of silence",
            clean,
            inputs,
            unit="inputs",
            peer=f"{len(found.findings)} findings, {found.outcomes} different outcomes, {rate:,.0f} inputs a second",
        ),
        at_most(
            "memory that grew meanwhile",
            found.grown_bytes / 2**20,
            GROWTH_BYTES / 2**20,
            unit="MB",
            peer="the same process when it was warm",
        ),
    ]


async def slow(progress: Progress, inputs: int) -> list[Figure]:
    """A thousand connections that dawdle."""
    return [
        at_most(
            f"{SLOW} slow connections: p95 of a {waits.what}, to that without them",
            waits.ratio,
            1.5,
            unit="x",
            peer=f"calm {waits.calm_s * 1e3:.1f} ms, attacked {waits.attacked_s * 1e3:.1f} ms, {waits.slow} held open",
        )
        for waits in await measure()
    ]


async def routes(progress: Progress, inputs: int) -> list[Figure]:
    """Every route with every credential that must not open it."""
    tried, control = await asyncio.to_thread(attempts)
    unexpected = [attempt for attempt in tried if attempt.unexpected]
    ways = len({attempt.credential.name for attempt in tried})
    paths = {attempt.path for attempt in tried}
    answered = {attempt.path for attempt in control if attempt.status == 200}
    return [
        at_most(
            "routes answered without a key that may use them",
            len(unexpected),
            0,
            unit="answers",
            peer=f"{len(tried):,} requests: {len(paths)} routes, {ways} ways to ask; a good key opens {len(answered)}",
        )
    ]


async def tamper(progress: Progress, inputs: int) -> list[Figure]:
    """Edits of the audit log by somebody without a key."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        found = await asyncio.to_thread(check_edits, Path(folder), EDITS)
    made = found.made.total()
    return [
        at_least(
            "edits of the audit log that were found",
            (made - len(found.unnoticed)) / made,
            1.0,
            unit="share",
            peer=f"{made:,} edits of {len(found.made)} kinds",
        )
    ]


async def zones(progress: Progress, inputs: int) -> list[Figure]:
    """Plans and re-plans over random fleets with trust zones."""
    found = await asyncio.to_thread(check_fleets, range(FLEETS))
    return [
        at_most(
            "plans that broke a trust zone",
            len(found.wrong),
            0,
            unit="plans",
            peer=f"{found.fleets:,} fleets, {found.asked:,} servers asked, {found.refused:,} rightly refused",
        )
    ]


async def removal(progress: Progress, inputs: int) -> list[Figure]:
    """A revoked member and its live connections."""
    times = [await removal_s() for _ in range(REMOVALS)]
    return [
        at_most(
            "a revoked member's last connection is cut after",
            max(times),
            5.0,
            unit="s",
            peer=f"the slowest of {len(times)}, {NODES} nodes; the fastest {min(times):.2f} s",
        )
    ]


async def honesty(progress: Progress, inputs: int) -> list[Figure]:
    """Servers that compute something else than they say."""
    from shoal.bench.honesty import run as run_honesty  # it needs torch, the other parts do not

    return await asyncio.to_thread(run_honesty, progress)


PARTS: dict[str, Callable[[Progress, int], Awaitable[list[Figure]]]] = {
    "fuzz": fuzz,
    "slow": slow,
    "routes": routes,
    "tamper": tamper,
    "zones": zones,
    "removal": removal,
    "honesty": honesty,
}
