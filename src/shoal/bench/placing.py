"""Where sessions and servers go: to the near one of two replicas, and to the blocks that are the bottleneck."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import torch

from shoal.bench import peer
from shoal.bench.delay import Delay
from shoal.bench.figures import Figure, at_least, at_most
from shoal.bench.rig import Rig
from shoal.net.transport import Address
from shoal.spec.ids import BlockRange
from shoal.spec.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
FAR_MS = 25.0
SESSIONS = 60
AT_ONCE = 4
MOVES_WITHIN_S = 60.0


async def near(folder: Path, demo_model: Path) -> list[Figure]:
    """Two replicas of the second half of the demo model, one of them behind FAR_MS: which do sessions take?"""
    counts: Counter[str] = Counter()
    async with Rig(demo_model, folder / "near", dtype=torch.float32, memory="1GiB") as rig:
        half, end = rig.facts.num_blocks // 2, rig.facts.num_blocks
        await rig.add(f"0:{half}")
        (close,) = await rig.add(f"{half}:{end}")
        port = _free_port()
        async with Delay(Address("127.0.0.1", port), FAR_MS) as way:
            options = ("--listen", f"tcp://127.0.0.1:{port}", "--advertise", way.address)
            (far,) = await rig.add(f"{half}:{end}", options=options)
            room = asyncio.Semaphore(AT_ONCE)

            async def one(number: int) -> None:
                async with room:
                    took: set[str] = set()
                    items = rig.driver.generate(
                        [5 + number % 50, 9, 11], GREEDY, max_tokens=8, on_host=lambda node, blocks: took.add(node)
                    )
                    async with aclosing(items):
                        async for _ in items:
                            pass
                    counts["near" if took & {close, far} == {close} else "far"] += 1

            await asyncio.gather(*(one(number) for number in range(SESSIONS)))
            rtts = rig.driver.sessions.rtts_ms()
            await rig.remove(far)
    return [
        at_least(
            f"sessions that take the near one of two replicas, the other behind +{FAR_MS:.0f} ms",
            100 * counts["near"] / SESSIONS,
            95.0,
            unit="%",
            peer=f"{SESSIONS} sessions, {AT_ONCE} at a time, the first ones included; round trips"
            f" {rtts.get(close, 0.0):.1f} and {rtts.get(far, 0.0):.1f} ms",
        )
    ]


async def relieved(folder: Path, demo_model: Path) -> list[Figure]:
    """One server for 12 blocks, two for 4 others, more sessions than the one can take: when has one of the two moved,
    and did every session end whole?"""
    model_dir = peer.write_model(folder / "llama-relieved", layers=16)
    moved_s, whole, ended = float("inf"), 0, 0
    async with Rig(model_dir, folder / "relieved", dtype=torch.float32, memory="3GiB") as rig:
        await rig.add("0:12", "12:16", "12:16", options=("--free",))
        going = True

        async def user(number: int) -> None:
            nonlocal whole, ended
            prompt = [number * 7 + at for at in range(1, 9)]
            while going:
                got = 0
                async with aclosing(rig.driver.generate(prompt, GREEDY, max_tokens=24)) as items:
                    async for item in items:
                        got += item is not None
                ended += 1
                whole += got == 24

        began = time.monotonic()
        users = [asyncio.create_task(user(number)) for number in range(8)]
        try:
            async with asyncio.timeout(2 * MOVES_WITHIN_S):
                while _hosts(rig, BlockRange(0, 12)) < 2:
                    await asyncio.sleep(0.1)
                    for task in users:
                        if task.done():
                            task.result()
            moved_s = time.monotonic() - began
        except TimeoutError:
            pass
        going = False
        await asyncio.gather(*users)
        why = [record.reason for record in rig.seed.directory.live() if "bottleneck" in record.reason]
    return [
        at_most(
            "an idle server has moved to the blocks that are the bottleneck",
            moved_s,
            MOVES_WITHIN_S,
            unit="s",
            peer=f"loading included; it says: {why[0] if why else 'nothing'}",
        ),
        at_least(
            "sessions that ended whole meanwhile",
            100.0 * whole / max(ended, 1),
            100.0,
            unit="%",
            peer=f"{ended} generations of 24 tokens by 8 users",
        ),
    ]


def _hosts(rig: Rig, blocks: BlockRange) -> int:
    """Online servers that host all of `blocks`."""
    spans = [record.span for record in rig.seed.directory.live() if record.state == "online"]
    return sum(span is not None and span.start <= blocks.start and blocks.end <= span.end for span in spans)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
