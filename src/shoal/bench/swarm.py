"""`shoal bench swarm`: what the swarm costs and what it survives, each figure against a peer measured beside it.

Every process computes on one thread. Peer and swarm take turns inside one figure, and medians are compared, so that a
busy neighbour hits both. Absolute times are in the `peer` text; the figures are ratios wherever a ratio says more.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch

from shoal.bench import peer, placing
from shoal.bench.figures import Figure, at_least, at_most
from shoal.bench.rig import Rig
from shoal.client.driver import Driver
from shoal.compute.engine import BlockEngine, Work
from shoal.compute.split import build_stage
from shoal.spec.ids import BlockRange
from shoal.spec.sampling import SamplingParams
from shoal.wire import rows as wire_rows
from shoal.wire import tensors

GREEDY = SamplingParams(temperature=0.0)
CONTEXT = 256
Progress = Callable[[str], None]


async def run(progress: Progress, demo_model: Path, only: tuple[str, ...] = ()) -> list[Figure]:
    """Measure all figures (or those whose part is named in `only`) and return them in a fixed order."""
    torch.set_num_threads(1)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        folder = Path(scratch)
        for name, part in PARTS.items():
            if only and name not in only:
                continue
            progress(f"{name} ...")
            start = time.monotonic()
            found = await part(folder, demo_model)
            figures += found
            for figure in found:
                progress(f"  {figure}")
            progress(f"  {name} took {time.monotonic() - start:.0f} s")
    return figures


# --- helpers -------------------------------------------------------------------------------------------------


def _model(folder: Path, layers: int = peer.LAYERS) -> Path:
    """The benchmark's random model, written once per run."""
    path = folder / f"llama-{layers}"
    return path if path.is_dir() else peer.write_model(path, layers=layers)


def _prompts(count: int, length: int) -> list[list[int]]:
    rng = random.Random(length)
    return [[rng.randrange(peer.VOCAB) for _ in range(length)] for _ in range(count)]


async def _tokens(driver: Driver, prompt: list[int], count: int) -> AsyncIterator[tuple[int, float]]:
    """(token, time it arrived) of a greedy generation."""
    async with aclosing(driver.generate(prompt, GREEDY, max_tokens=count)) as items:
        async for item in items:
            if item is not None:
                yield item.token, time.perf_counter()


async def _timed(driver: Driver, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    tokens, times = [], []
    async for token, at in _tokens(driver, prompt, count):
        tokens.append(token)
        times.append(at)
    return tokens, times


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


async def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run the peer beside the event loop, which keeps answering pings."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


# --- speed ---------------------------------------------------------------------------------------------------


async def decode(folder: Path, demo_model: Path) -> list[Figure]:
    """One stream through one and two servers against `generate`, fp32."""
    model_dir, rounds, tokens = _model(folder), 7, 16
    whole = await _in_thread(peer.load, model_dir, torch.float32)
    prompt = _prompts(1, CONTEXT)[0]
    figures = []
    async with Rig(model_dir, folder / "decode", dtype=torch.float32) as rig:
        for spans, reach in ((["0:16"], 0.95), (["0:8", "8:16"], 0.90)):
            nodes = await rig.add(*spans)
            ours, theirs = [], []
            for turn in range(rounds):
                gaps = (await _in_thread(peer.generate, whole, [prompt], tokens))[1]
                _, times = await _timed(rig.driver, prompt, tokens)
                if turn:  # the first turn warms both
                    theirs += gaps
                    ours += _gaps(times)
            step, base = statistics.median(ours), statistics.median(theirs)
            figures.append(
                at_least(
                    f"decode, {len(spans)} server{'s' * (len(spans) > 1)}, fp32, share of generate's speed",
                    base / step,
                    reach,
                    peer=f"generate {base * 1e3:.1f} ms per token, swarm {step * 1e3:.1f} ms",
                )
            )
            await rig.remove(*nodes)
    return figures


async def overhead(folder: Path, demo_model: Path) -> list[Figure]:
    """What a server adds to one step of a one-layer span, over the same layer in this process."""
    model_dir, steps = _model(folder, 1), 300
    stage = await _in_thread(lambda: build_stage(model_dir, BlockRange(0, 1)))
    engine = BlockEngine(stage, exact=True)
    length = CONTEXT + steps
    engine.open(b"local", stage.blocks, length)
    hidden = torch.randn(length, peer.HIDDEN)
    engine.run([Work(b"local", 0, CONTEXT)], hidden[:CONTEXT])
    remote, local = [], []
    async with Rig(model_dir, folder / "overhead", dtype=torch.float32) as rig:
        await rig.add("0:1")
        arrived: asyncio.Queue[int | BaseException] = asyncio.Queue()
        sessions = rig.driver.sessions
        handle = sessions.open(
            length, on_rows=lambda at, rows: arrived.put_nowait(at + rows.count), on_failed=arrived.put_nowait
        )
        for at, until in [(0, CONTEXT), *((at, at + 1) for at in range(CONTEXT, length))]:
            tensor, buffers = tensors.encode(hidden[at:until].numpy(), "f32")
            start = time.perf_counter()
            sessions.feed(handle, wire_rows.Rows("f32", tensor.width, tensor.rows, buffers[0]))
            sessions.flush()
            got = await arrived.get()
            if isinstance(got, BaseException):
                raise got
            took = time.perf_counter() - start
            if until > CONTEXT:
                remote.append(took)
                start = time.perf_counter()
                engine.run([Work(b"local", at, 1)], hidden[at:until])
                local.append(time.perf_counter() - start)
        sessions.end(handle)
    here_ms, there_ms = statistics.median(local) * 1e3, statistics.median(remote) * 1e3
    return [
        at_most(
            "added time per server and step",
            there_ms - here_ms,
            1.0,
            unit="ms",
            peer=f"in-process {here_ms:.2f} ms, over loopback {there_ms:.2f} ms",
        )
    ]


async def batch(folder: Path, demo_model: Path) -> list[Figure]:
    """N sessions on two servers against one process at batch N; two processes at N/2 each are the limit."""
    model_dir, tokens, rounds = _model(folder), 24, 3
    figures = []
    for dtype, sizes in ((torch.float32, (8,)), (torch.bfloat16, (8, 32))):
        whole = await _in_thread(peer.load, model_dir, dtype)
        name = str(dtype).removeprefix("torch.")
        async with Rig(model_dir, folder / f"batch-{name}", dtype=dtype) as rig:
            await rig.add("0:8", "8:16")
            for size in sizes:
                prompts = _prompts(size, CONTEXT)
                full, half, ours = [], [], []
                for _ in range(rounds):
                    full.append(await _in_thread(peer.step_s, whole, prompts, tokens))
                    ours.append(await _round_s(rig.driver, prompts, 2 * tokens))
                    half.append(await _in_thread(peer.step_s, whole, prompts[: size // 2], tokens))
                step, step_half, round_s = (statistics.median(times) for times in (full, half, ours))
                figures.append(
                    at_least(
                        f"{size} sessions on 2 servers, {name}, share of the limit",
                        step_half / round_s,
                        0.85,
                        peer=f"one process: batch {size} {step * 1e3:.0f} ms, {size // 2} {step_half * 1e3:.0f} ms"
                        f" (limit {step / step_half:.2f}x); swarm {round_s * 1e3:.0f} ms for {size} tokens"
                        f" ({step / round_s:.2f}x)",
                    )
                )
    return figures


async def _round_s(driver: Driver, prompts: list[list[int]], tokens: int) -> float:
    """Time in which every session gets one token, while all of them decode."""
    runs = await asyncio.gather(*(_timed(driver, prompt, tokens) for prompt in prompts))
    begin = max(times[1] for _, times in runs)
    end = min(times[-1] for _, times in runs)
    counted = sum(1 for _, times in runs for at in times if begin < at <= end)
    return (end - begin) / counted * len(prompts)


async def prefill(folder: Path, demo_model: Path) -> list[Figure]:
    """A prompt of 2,048 tokens through two servers against one process."""
    model_dir, rounds = _model(folder), 4
    whole = await _in_thread(peer.load, model_dir, torch.float32)
    prompt = _prompts(1, 2048)[0]
    ours, theirs = [], []
    async with Rig(model_dir, folder / "prefill", dtype=torch.float32) as rig:
        await rig.add("0:8", "8:16")
        for turn in range(rounds):
            first = (await _in_thread(peer.generate, whole, [prompt], 1))[2]
            start = time.perf_counter()
            _, times = await _timed(rig.driver, prompt, 1)
            if turn:
                theirs.append(first)
                ours.append(times[0] - start)
    base, took = statistics.median(theirs), statistics.median(ours)
    return [
        at_least(
            "prefill of 2048 tokens on 2 servers, fp32, against one process",
            base / took,
            1.2,
            peer=f"generate's first token after {base:.2f} s, the swarm's after {took:.2f} s",
        )
    ]


# --- surviving -----------------------------------------------------------------------------------------------


async def stall(folder: Path, demo_model: Path) -> list[Figure]:
    """The gap a reader sees when the server of the second half is killed at 1,000 tokens of context."""
    model_dir = _model(folder)
    prompt = _prompts(1, 1000)[0]
    async with Rig(model_dir, folder / "stall", dtype=torch.float32, memory="4GiB") as rig:
        await rig.add("0:8", "8:16", "8:16")
        gap, before = 0.0, 0.0
        async for _, at in _tokens(rig.driver, prompt, 24):
            gap = max(gap, at - before) if before else 0.0
            before = at
            if rig.driver.tokens == 8:
                rig.kill(rig.in_use()[1])
        recovered = len(rig.recovered)
    prefill_s = await _in_thread(_span_prefill_s, model_dir, BlockRange(8, 16), 1008)
    return [
        at_most(
            "stall at failover, 1000 tokens of context",
            gap if recovered else float("inf"),
            1.0 + 1.2 * prefill_s,
            unit="s",
            peer=f"the span's own prefill of these tokens takes {prefill_s:.2f} s",
        )
    ]


def _span_prefill_s(model_dir: Path, blocks: BlockRange, rows: int) -> float:
    engine = BlockEngine(build_stage(model_dir, blocks), exact=True)
    hidden = torch.randn(rows, peer.HIDDEN)
    times = []
    for turn in range(3):
        session = bytes([turn])
        engine.open(session, blocks, rows)
        start = time.perf_counter()
        for at in range(0, rows, 512):
            part = hidden[at : at + 512]
            engine.run([Work(session, at, part.shape[0])], part)
        times.append(time.perf_counter() - start)
        engine.close(session)
    return statistics.median(times)


async def kills(folder: Path, demo_model: Path) -> list[Figure]:
    """20 generations of the demo model, a random server of each one's chain killed: are the words the same?"""
    count, tokens = 20, 48
    rng = random.Random(20)
    whole = await _in_thread(peer.load, demo_model, torch.float32)
    same, gaps = 0, []
    async with Rig(demo_model, folder / "kills", dtype=torch.float32, memory="1GiB") as rig:
        half = rig.facts.num_blocks // 2
        spans = [f"0:{half}", f"{half}:{rig.facts.num_blocks}"]
        await rig.add(*spans, *spans)
        for _ in range(count):
            prompt = [rng.randrange(5, rig.driver.vocab_size) for _ in range(24)]
            expected = (await _in_thread(peer.generate, whole, [prompt], tokens))[0][0]
            got, times, dead = [], [], ""
            kill_at = rng.randrange(2, tokens - 2)
            async for token, at in _tokens(rig.driver, prompt, tokens):
                got.append(token)
                times.append(at)
                if len(got) == kill_at:
                    dead = rig.kill(rng.choice(rig.in_use()))
            same += got == expected
            gaps.append(max(_gaps(times)))
            await rig.add(dead)
        failovers = len(rig.recovered)
    p95 = sorted(gaps)[int(0.95 * len(gaps))]
    return [
        at_least(
            "kills survived with identical tokens, of 20",
            float(min(same, failovers)),
            float(count),
            unit="generations",
            peer="Hugging Face generate on the whole model, greedy, fp32",
        ),
        at_most(
            "stall at failover, demo model, p95",
            p95,
            2.0,
            unit="s",
            peer=f"median {statistics.median(gaps) * 1e3:.0f} ms",
        ),
    ]


# --- starting ------------------------------------------------------------------------------------------------


async def start(folder: Path, demo_model: Path) -> list[Figure]:
    """From typing `shoal up` to the first streamed token over HTTP, and the cost of `shoal --help`."""
    first_s = await _in_thread(_first_token_s, demo_model)
    ours, bare = _cpu_s(["-m", "shoal", "--help"]), _cpu_s(["-c", "pass"])
    return [
        at_most("from `shoal up` to the first streamed token, demo model", first_s, 60.0, unit="s", peer="goal 20 s"),
        at_most(
            "`shoal --help`, CPU time against bare Python",
            ours / bare,
            10.0,
            unit="x",
            peer=f"python -c pass takes {bare * 1e3:.0f} ms, shoal --help {ours * 1e3:.0f} ms",
        ),
    ]


def _first_token_s(demo_model: Path) -> float:
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "up", "--model", str(demo_model), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        body = {"model": ready["model"], "prompt": "The", "max_tokens": 2, "temperature": 0, "stream": True}
        headers = {"Authorization": f"Bearer {ready['key']}"}
        with (
            httpx.Client(trust_env=False, timeout=60) as client,
            client.stream("POST", f"{ready['api']}/completions", json=body, headers=headers) as response,
        ):
            next(line for line in response.iter_lines() if line.startswith("data: "))
            return time.perf_counter() - begin
    finally:
        process.terminate()
        process.wait(timeout=30)


def _cpu_s(args: list[str]) -> float:
    """Least user + system time of five runs."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *args], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


PARTS = {
    "start": start,
    "kills": kills,
    "overhead": overhead,
    "decode": decode,
    "prefill": prefill,
    "stall": stall,
    "batch": batch,
    "near": placing.near,
    "relieved": placing.relieved,
}
