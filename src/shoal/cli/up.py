"""`shoal up`: a private swarm on this machine, in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output
from shoal.errors import UsageError


@click.command("up")
@click.option("--model", default=None, help="Model directory or Hugging Face hub id; default: the demo model.")
@click.option("--servers", type=int, default=3, show_default=True, help="Spans the model is cut into.")
@click.option("--replicas", type=int, default=1, show_default=True, help="Servers for every span.")
@click.option("--port", type=int, default=0, help="Port of the API; default: any free one.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="How numbers are held and computed; bfloat16 takes half the memory.",
)
@click.option(
    "--wire",
    type=click.Choice(["auto", "f32", "bf16", "int8"]),
    default="auto",
    show_default=True,
    help="How activations travel between servers; auto: as they are computed.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda:N, for every server.")
@click.option("--memory", default=None, help="Memory each server offers, for example 8GiB; default: a fair share.")
@click.option("--cache-tokens", type=int, default=None, help="Cache of each server; default: what memory allows.")
@click.option(
    "--exact", is_flag=True, help="fp32 numbers that do not depend on other sessions; a lone one is 10 % slower."
)
@click.option(
    "--zones", default="", metavar="POLICY", help="Trust zone of the model, for example first=2:trusted,last=1:trusted."
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NODE=LABEL",
    help="Label for server-0, server-1, ... or gateway, as if it ran elsewhere; may be repeated.",
)
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="Keep keys and logs here.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
def up(
    model: str | None,
    servers: int,
    replicas: int,
    port: int,
    dtype: str,
    wire: str,
    device: str,
    memory: str | None,
    cache_tokens: int | None,
    exact: bool,
    zones: str,
    labels: tuple[str, ...],
    swarm_dir: Path | None,
    as_json: bool,
) -> int:
    """Run a private swarm on this machine until Ctrl-C."""
    import asyncio

    from shoal.launch.local import LocalSwarm, SwarmPlan
    from shoal.spec.units import parse_bytes
    from shoal.swarm.trust import Zones

    model_dir = demo_model() if model is None else local_model(model)
    name = "shoal-demo" if model is None else model_name(model)
    plan = SwarmPlan(
        model_dir=model_dir,
        model_name=name,
        servers=servers,
        replicas=replicas,
        api_port=port,
        dtype=dtype,
        wire={"float32": "f32", "bfloat16": "bf16"}[dtype] if wire == "auto" else wire,
        device=device,
        memory_bytes=None if memory is None else parse_bytes(memory),
        cache_tokens=cache_tokens,
        exact=exact,
        zones=str(Zones.parse(zones)),
        labels=_labels(labels),
        swarm_dir=swarm_dir,
    )
    return asyncio.run(_run(LocalSwarm(plan, on_progress=output.note), as_json))


def _labels(texts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Labels by the name of a node. Raises UsageError."""
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        node, given, label = text.partition("=")
        if not (node and given and label):
            raise UsageError(f"Cannot read the label {text!r}.", hint="Write NODE=LABEL, for example server-0=trusted.")
        found[node] = (*found.get(node, ()), label)
    return found


def demo_model() -> Path:
    """The small model that comes with shoal."""
    import shoal

    return Path(shoal.__file__).parent / "assets" / "demo"


def local_model(model: str) -> Path:
    """A directory as it is; a hub id is fetched once, which needs the model library."""
    if Path(model).is_dir():
        return Path(model)
    from shoal.compute.weights import fetch_model

    return fetch_model(model)


def model_name(model: str) -> str:
    """What a model is called in the API when nobody said otherwise: its hub id, or its directory's name."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


async def _run(swarm: object, as_json: bool) -> int:
    import asyncio
    import os
    import signal

    from shoal.launch import state
    from shoal.launch.local import LocalSwarm

    assert isinstance(swarm, LocalSwarm)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    starting = asyncio.create_task(swarm.__aenter__())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 130
    starting.result()
    try:
        state.remember(state.Running(swarm.api, swarm.key, str(swarm.swarm_dir), os.getpid()))
        _announce(swarm, as_json)
        return await _watch(swarm, stopping)
    finally:
        state.forget(os.getpid())
        await swarm.stop(failed=False)


def _announce(swarm: object, as_json: bool) -> None:
    from shoal.launch.local import LocalSwarm

    assert isinstance(swarm, LocalSwarm)
    name = swarm.plan.model_name
    if as_json:
        output.answer_json(
            {
                "api": swarm.api,
                "key": swarm.key,
                "model": name,
                "servers": [{"id": s.id, "pid": s.pid, "blocks": s.blocks} for s in swarm.servers],
                "swarm_dir": str(swarm.swarm_dir),
            }
        )
        return
    output.answer(f"\nThe swarm answers: {name} on {len(swarm.servers)} servers\n")
    for server in swarm.servers:
        output.answer(f"  blocks {server.blocks:<7} server {server.id[:8]}   pid {server.pid}")
    path, ask = (
        ("chat/completions", '"messages": [{"role": "user", "content": "Who are you?"}]')
        if swarm.chat
        else ("completions", '"prompt": "Once upon a time", "max_tokens": 32')
    )
    body = f'{{"model": "{name}", {ask}, "temperature": 0, "stream": true}}'
    program = _program()
    output.answer(
        f"\n  endpoint  {swarm.api}\n  key       {swarm.key}\n\nTry it from another terminal:\n\n"
        f"  curl -N {swarm.api}/{path} -H 'Authorization: Bearer {swarm.key}' \\\n"
        f"    -H 'Content-Type: application/json' -d '{body}'\n\n"
        f'or: {program} generate --prompt "In SQLite, a"\n    {program} status\n\nCtrl-C stops everything.\n'
    )


def _program() -> str:
    """How to call shoal here, so that printed lines can be copied: `make up` runs .venv/bin/shoal, on nobody's path."""
    import shutil
    import sys

    called = sys.argv[0]
    return called if called.endswith("/shoal") and called != shutil.which("shoal") else "shoal"


async def _watch(swarm: object, stopping: object) -> int:
    """Say when a server dies; end when the person, or the gateway, does."""
    import asyncio

    from shoal.launch.local import LocalSwarm

    assert isinstance(swarm, LocalSwarm)
    assert isinstance(stopping, asyncio.Task)
    while True:
        ended = asyncio.create_task(swarm.ended())
        await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            ended.cancel()
            output.note("stopping")
            return 0
        name, code = ended.result()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        output.note(f"{name} ended ({how}); its log is {swarm.swarm_dir}/logs/{name}.log")
        if name == "gateway":
            return 1
