"""`python -m shoal gateway-process`: registry seed, block planner, driver and HTTP API, started by `shoal up`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli import output

if TYPE_CHECKING:
    from shoal.client.served import SwarmModel
    from shoal.compute.facts import ModelFacts
    from shoal.net.seed import Seed
    from shoal.net.tls import TlsTransport
    from shoal.wire.messages import WireType


OWN_KEY = "shoal up"
"""Name of the key that every run of `shoal up` makes for itself."""


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
    zones: str


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
@click.option("--zones", default="", help="Trust zone for every request.")
def gateway_process(**options: Any) -> None:
    """Answer the API for a swarm (started by `shoal up`)."""
    from shoal.cli import process

    process.block_and_never_spin()
    process.set_up_logging()
    process.run(_main(Options(**options)))


async def _main(options: Options) -> None:
    from shoal.admin.attach import in_good_standing
    from shoal.cli import process
    from shoal.net.home import Home
    from shoal.net.seed import Seed
    from shoal.net.tls import TlsTransport

    stop = asyncio.Event()
    process.on_stop(stop.set)
    home = Home(options.swarm_dir)
    identity = home.node("gateway")
    transport = TlsTransport(identity)
    seed = Seed(identity)
    # Listen before torch is imported, so that the servers start beside us and not after us.
    listener = await transport.listen("tcp://127.0.0.1:0", seed.on_conn)
    output.answer_json({"swarm": listener.address})
    seed.announce([listener.address])
    gossip = asyncio.create_task(seed.directory.rounds(transport), name="gossip")
    try:
        async with in_good_standing(home, "gateway", seed, transport, address=listener.address):
            serving = asyncio.create_task(_serve(options, seed, transport, identity.peer.node))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait([serving, stopped, gossip], return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            serving.cancel()  # stopped: it leaves its own way (streams end, sessions close); ended: no effect
            with suppress(asyncio.CancelledError):
                await serving
    finally:
        gossip.cancel()
        await asyncio.wait([gossip])
        await listener.close()
    if not gossip.cancelled():
        gossip.result()


async def _serve(options: Options, seed: Seed, transport: TlsTransport, node: str) -> None:
    """Load both ends of the model, give out the blocks, answer HTTP until cancelled."""
    from shoal.cli import answering
    from shoal.gateway.accounts import Accounts
    from shoal.net.coordinator import assign_blocks
    from shoal.swarm.placement import ModelNeeds
    from shoal.swarm.trust import Zones

    zones = tuple(filter(None, [Zones.parse(options.zones)]))

    async def place(facts: ModelFacts) -> list[str]:
        itemsize = {"float32": 4, "bfloat16": 2}[options.dtype]
        needs = ModelNeeds(
            block_bytes=tuple(params * itemsize for params in facts.block_params),
            kv_bytes_per_block_token=facts.kv_params_per_token * itemsize,
            cache_tokens=facts.context_length,
            legal_cuts=facts.legal_cuts,
        )
        placement = await assign_blocks(
            seed, facts.name, needs, stages=options.servers, replicas=options.replicas, zones=zones
        )
        return placement.explain()

    def announce(url: str, models: dict[str, SwarmModel]) -> None:
        accounts = Accounts(options.swarm_dir / "accounts.sqlite")
        for account in accounts.records():
            if account.name == OWN_KEY:
                accounts.revoke(account.id)  # of an earlier run over the same directory: it was printed somewhere
        key, _ = accounts.create(OWN_KEY)
        accounts.close()
        output.answer_json({"api": f"{url}/v1", "key": key, "chat": models[options.name].chats})

    plan = answering.Plan(
        home=options.swarm_dir,
        offers=(answering.Offer(options.name, options.model, zones),),
        port=options.port,
        dtype=options.dtype,
        wire=options.wire,
        device=options.device,
        exact=options.exact,
    )
    await answering.answer(plan, seed, transport, node, announce, place=place)
