"""`python -m shoal gateway-process`: registry seed, block planner, driver and HTTP API, started by `shoal up`."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli import output

if TYPE_CHECKING:
    from shoal.client.driver import Driver
    from shoal.net.tls import TlsTransport
    from shoal.net.transport import Conn
    from shoal.wire.messages import Message, WireType


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of a gateway process."""

    swarm_dir: Path
    model: Path
    name: str
    servers: int
    replicas: int
    port: int
    dtype: str
    wire: WireType
    device: str


@click.command("gateway-process")
@click.option("--swarm-dir", type=click.Path(path_type=Path), required=True)
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--name", required=True, help="The model's name in the API.")
@click.option("--servers", type=int, required=True, help="Spans to cut the model into.")
@click.option("--replicas", type=int, required=True, help="Servers for each span.")
@click.option("--port", type=int, default=0)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--wire", type=click.Choice(["f32", "bf16", "int8"]), default="f32")
@click.option("--device", default="cpu")
def gateway_process(**options: Any) -> int:
    """Answer the API for a swarm (started by `shoal up`)."""
    from shoal.cli import process

    process.set_up_logging()
    return process.run(_main(Options(**options)))


async def _main(options: Options) -> None:
    from shoal.cli import process
    from shoal.net.identity import NodeIdentity
    from shoal.net.tls import TlsTransport

    stop = asyncio.Event()
    process.on_stop(stop.set)
    identity = NodeIdentity.load(options.swarm_dir / "nodes" / "gateway")
    transport = TlsTransport(identity)
    seed = Seed(identity.peer.node)
    # Listen before torch is imported, so that the servers start beside us and not after us.
    listener = await transport.listen("tcp://127.0.0.1:0", seed.on_conn)
    output.answer_json({"swarm": listener.address})
    serving = asyncio.create_task(_serve(options, seed, transport, identity.peer.node, stop))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not seed.answering:
        serving.cancel()
    try:
        await serving
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    finally:
        await listener.close()


class Seed:
    """The registry seed: takes the servers' gossip and can send them their assignment."""

    def __init__(self, node: str) -> None:
        from shoal.net.directory import Directory

        self.changed = asyncio.Event()
        self.directory = Directory(node, on_change=self._on_change)
        self.driver: Driver | None = None
        self.answering = False
        self._conns: dict[str, Conn] = {}

    def _on_change(self) -> None:
        self.changed.set()
        if self.driver is not None:
            self.driver.view_changed()

    async def on_conn(self, conn: Conn) -> None:
        """Gossip with one node until its connection ends."""
        from shoal.wire.messages import Sync

        self._conns[conn.peer.node] = conn
        try:
            while True:
                message, _ = await conn.receive()
                if isinstance(message, Sync):
                    answer = self.directory.on_sync(message)
                    if answer is not None:
                        await conn.send(answer)
        finally:
            if self._conns.get(conn.peer.node) is conn:
                del self._conns[conn.peer.node]

    def send(self, node: str, message: Message) -> None:
        """To a server that is connected; one that is not has left, and its lease will say so."""
        if (conn := self._conns.get(node)) is not None:
            conn.send_nowait(message)


async def _serve(options: Options, seed: Seed, transport: TlsTransport, node: str, stop: asyncio.Event) -> None:
    """Load both ends of the model, give out the blocks, answer HTTP until `stop`."""
    import torch

    from shoal.client.driver import Driver, DriverConfig
    from shoal.client.served import SwarmModel, load_tokenizer
    from shoal.compute.facts import describe
    from shoal.compute.head import HeadEngine
    from shoal.compute.split import build_ends
    from shoal.gateway.accounts import Accounts
    from shoal.gateway.app import create_app
    from shoal.gateway.metrics import Metrics
    from shoal.gateway.served import ReadyState
    from shoal.gateway.server import serve
    from shoal.net.coordinator import assign_blocks
    from shoal.swarm.placement import ModelNeeds

    loop = asyncio.get_running_loop()
    compute = ThreadPoolExecutor(1, "head", torch.set_num_threads, (1,))
    dtype: torch.dtype = getattr(torch, options.dtype)
    facts = await loop.run_in_executor(compute, describe, options.model)
    tokenizer = await loop.run_in_executor(compute, load_tokenizer, options.model)
    size = dtype.itemsize
    placing = asyncio.create_task(
        assign_blocks(
            seed.directory,
            seed.changed,
            seed.send,
            model=facts.name,
            needs=ModelNeeds(
                block_bytes=tuple(params * size for params in facts.block_params),
                kv_bytes_per_block_token=facts.kv_params_per_token * size,
                cache_tokens=facts.context_length,
                legal_cuts=facts.legal_cuts,
            ),
            stages=options.servers,
            replicas=options.replicas,
        )
    )
    ends = await loop.run_in_executor(compute, lambda: build_ends(options.model, dtype=dtype, device=options.device))
    metrics = Metrics()
    driver = seed.driver = Driver(
        facts,
        HeadEngine(ends, exact=dtype == torch.float32),
        node=node,
        transport=transport,
        directory=seed.directory,
        config=DriverConfig(wire=options.wire),
        compute=compute,
        on_recovered=lambda recovered: metrics.failover(recovered.cause),
    )
    driver.start()
    placement = await placing
    model = SwarmModel(
        options.name, driver, seed.directory, tokenizer, eos_ids=ends.eos_ids, placement=placement.explain()
    )

    async def ready() -> ReadyState:
        missing = model.missing()
        reason = f"No server hosts blocks {', '.join(missing)}." if missing else ""
        return ReadyState(not missing, reason, {options.name: not missing})

    while model.missing():
        seed.changed.clear()
        await seed.changed.wait()
    accounts = Accounts(options.swarm_dir / "accounts.sqlite")
    key, _ = accounts.create("shoal up")
    app = create_app({options.name: model}, accounts, ready=ready, status=model.status, metrics=metrics)
    try:
        async with serve(app, "127.0.0.1", options.port) as listening:
            seed.answering = True
            output.answer_json({"api": f"{listening.url}/v1", "key": key})
            await stop.wait()
    finally:
        await driver.close()
        accounts.close()
