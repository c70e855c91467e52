"""`python -m shoal gateway-process`: registry seed, block planner, driver and HTTP API, started by `shoal up`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli import output

if TYPE_CHECKING:
    from shoal.net.seed import Seed
    from shoal.net.tls import TlsTransport
    from shoal.wire.messages import WireType

STREAMS_END_S = 3.0
"""Running answers that end by themselves within this time of a stop are whole; the others are told that they are not.
Well below what `shoal up` grants a stopping gateway (launch/local.py): one that was killed can tell nobody."""


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
    exact: bool


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
@click.option("--exact", is_flag=True)
def gateway_process(**options: Any) -> None:
    """Answer the API for a swarm (started by `shoal up`)."""
    from shoal.cli import process

    process.set_up_logging()
    process.run(_main(Options(**options)))


async def _main(options: Options) -> None:
    from shoal.cli import process
    from shoal.net.identity import NodeIdentity
    from shoal.net.seed import Seed
    from shoal.net.tls import TlsTransport

    stop = asyncio.Event()
    process.on_stop(stop.set)
    identity = NodeIdentity.load(options.swarm_dir / "nodes" / "gateway")
    transport = TlsTransport(identity)
    seed = Seed(identity.peer.node)
    # Listen before torch is imported, so that the servers start beside us and not after us.
    listener = await transport.listen("tcp://127.0.0.1:0", seed.on_conn)
    output.answer_json({"swarm": listener.address})
    serving = asyncio.create_task(_serve(options, seed, transport, identity.peer.node))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    serving.cancel()  # stopped: it leaves its own way (streams end, sessions close); ended by itself: no effect
    try:
        await serving
    except asyncio.CancelledError:
        pass
    finally:
        await listener.close()


async def _serve(options: Options, seed: Seed, transport: TlsTransport, node: str) -> None:
    """Load both ends of the model, give out the blocks, answer HTTP until cancelled."""
    import gc
    from functools import partial

    import torch

    from shoal.client.driver import Driver, DriverConfig
    from shoal.client.served import SwarmModel, load_tokenizer
    from shoal.compute.facts import describe
    from shoal.compute.head import HeadEngine
    from shoal.compute.split import build_ends
    from shoal.gateway.accounts import Accounts
    from shoal.gateway.app import create_app
    from shoal.gateway.limits import Limits
    from shoal.gateway.metrics import Metrics
    from shoal.gateway.served import ReadyState
    from shoal.gateway.server import serve
    from shoal.net.coordinator import assign_blocks
    from shoal.net.worker import Worker
    from shoal.swarm.placement import ModelNeeds

    worker = Worker("head", partial(torch.set_num_threads, 1))
    dtype: torch.dtype = getattr(torch, options.dtype)
    facts = await worker.call(describe, options.model)
    tokenizer = await worker.call(load_tokenizer, options.model)
    needs = ModelNeeds(
        block_bytes=tuple(params * dtype.itemsize for params in facts.block_params),
        kv_bytes_per_block_token=facts.kv_params_per_token * dtype.itemsize,
        cache_tokens=facts.context_length,
        legal_cuts=facts.legal_cuts,
    )
    placing = asyncio.create_task(
        assign_blocks(seed, facts.name, needs, stages=options.servers, replicas=options.replicas)
    )
    ends = await worker.call(lambda: build_ends(options.model, dtype=dtype, device=options.device))
    metrics = Metrics()
    driver = Driver(
        facts,
        HeadEngine(ends, exact=options.exact),
        node=node,
        transport=transport,
        directory=seed.directory,
        config=DriverConfig(wire=options.wire),
        worker=worker,
        on_recovered=lambda recovered: metrics.failover(recovered.cause),
    )
    driver.start()
    seed.on_change = driver.view_changed
    placement = await placing
    model = SwarmModel(
        options.name, driver, seed.directory, tokenizer, eos_ids=ends.eos_ids, placement=placement.explain()
    )

    async def ready() -> ReadyState:
        missing = model.missing()
        reason = f"No server hosts blocks {', '.join(missing)}." if missing else ""
        return ReadyState(not missing, reason, {options.name: not missing})

    await seed.wait_for(lambda records: not model.missing())
    accounts = Accounts(options.swarm_dir / "accounts.sqlite")
    key, _ = accounts.create("shoal up")
    app = create_app({options.name: model}, accounts, ready=ready, status=model.status, metrics=metrics)
    try:
        async with serve(app, "127.0.0.1", options.port, limits=Limits(shutdown_s=STREAMS_END_S)) as listening:
            gc.freeze()  # as in server_process.py
            chat = tokenizer.chat_template is not None
            output.answer_json({"api": f"{listening.url}/v1", "key": key, "chat": chat})
            await asyncio.Event().wait()  # until cancelled
    finally:
        await driver.close()
        worker.close()
        accounts.close()
