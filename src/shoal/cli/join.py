"""`shoal join`: let this machine host blocks of a model for a swarm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli import output

if TYPE_CHECKING:
    from shoal.net.identity import NodeIdentity
    from shoal.server.node import ServerConfig


@click.command("join")
@click.argument("token", required=False)
@click.option("--serve", "model", required=True, help="Model directory or Hugging Face hub id: whose blocks to host.")
@click.option("--blocks", default=None, help="START:END; default: those that the swarm needs most.")
@click.option(
    "--memory", default=None, help="What weights and cache may take, for example 20GiB; default: a fair share."
)
@click.option("--idle-only", is_flag=True, help="Work only while nobody else uses this machine.")
@click.option(
    "--back-after",
    type=click.IntRange(1, 86_400),
    default=120,
    show_default=True,
    help="With --idle-only: seconds of quiet before the machine is used again.",
)
@click.option("--threads", default="auto", show_default=True, help="Threads to compute with; auto: what measures best.")
@click.option("--listen", default=None, help="HOST:PORT for the other nodes; default: a free port towards the swarm.")
@click.option("--advertise", default=None, help="HOST:PORT at which others reach this machine; default: as --listen.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda:N.")
@click.option("--exact", is_flag=True, help="fp32 numbers that do not depend on other sessions.")
@click.option("--cache-tokens", type=int, default=None, help="Cache for all sessions; default: what memory allows.")
@click.option("--name", default="server", show_default=True, help="This node's name here; for a second one, another.")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="Keep keys here.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON whenever blocks are online.")
def join(token: str | None, model: str, name: str, swarm_dir: Path | None, as_json: bool, **options: Any) -> None:
    """Host blocks of a model for a swarm, until Ctrl-C.

    TOKEN comes from `shoal invite --role server` and is good once; "-" reads it from standard input. A machine that has
    joined before comes back without one, with the certificate it has.
    """
    from shoal.cli import process

    process.block_and_never_spin()
    if options["idle_only"]:
        from shoal.server.neighbour import step_back

        step_back()

    from shoal.compute.facts import describe
    from shoal.compute.weights import fetch_model
    from shoal.launch.local import MEMORY_SHARE, available_memory
    from shoal.net.home import Home, home_path
    from shoal.server.joining import plan
    from shoal.spec.units import parse_bytes

    # All that can be wrong with this machine is found before the token is spent.
    memory = options.pop("memory")
    memory_bytes = int(available_memory() * MEMORY_SHARE) if memory is None else parse_bytes(memory)
    model_dir = fetch_model(model)
    config = plan(model_dir, describe(model_dir), memory_bytes=memory_bytes, **options)
    home = Home(home_path(swarm_dir))
    with process.only_one(home.node_dir(name)):
        identity = _member(token, home, name)
        process.set_up_logging()
        process.run(_serve(home, name, identity, config, as_json))


def _member(token: str | None, home: Any, name: str) -> NodeIdentity:
    """Enter the swarm with a token, or be who we are there already; the admin's own machine needs none."""
    from shoal.admin.own import own_node
    from shoal.cli import process
    from shoal.errors import UsageError
    from shoal.net import enrol
    from shoal.net.home import Home

    assert isinstance(home, Home)
    if token is not None:
        identity = enrol.join(process.secret(token), "server", home, name)
        output.note(f"joined {identity.peer.swarm} as server {identity.peer.node[:8]}")
        return identity
    if home.is_admin:
        return own_node(home, name, "server")
    if not home.has_node(name):
        raise UsageError(
            f"This machine is not yet a server called {name} of a swarm (in {home.path}).",
            hint="Get a token with `shoal invite --role server` on the admin's machine, then: shoal join TOKEN ...",
        )
    identity = home.node(name)
    output.note(f"back in {identity.peer.swarm} as server {identity.peer.node[:8]}")
    return identity


async def _serve(home: Any, name: str, identity: NodeIdentity, config: ServerConfig, as_json: bool) -> None:
    import gc
    from dataclasses import replace

    from shoal.cli import process
    from shoal.net.home import Home
    from shoal.net.renewal import renew_in_background
    from shoal.net.tls import TlsTransport
    from shoal.server.joining import reachable
    from shoal.server.node import BlockServer
    from shoal.spec.ids import BlockRange

    assert isinstance(home, Home)
    seeds = tuple(home.read().seeds)
    listen, advertise = reachable(seeds, config.listen, config.advertise)
    config = replace(config, seeds=seeds, listen=listen, advertise=advertise, labels=identity.peer.labels)
    transport = TlsTransport(identity)
    server = BlockServer(config, identity, transport)

    def announce(hosted: BlockRange) -> None:
        gc.freeze()  # as in server_process.py
        record = server.record
        if as_json:
            output.answer_json(
                {
                    "id": identity.peer.node,
                    "swarm": identity.peer.swarm,
                    "model": record.serves or (record.span.model if record.span else ""),
                    "blocks": str(hosted),
                    "address": record.addresses[0],
                    "reason": record.reason,
                }
            )
        else:
            output.answer(f"serving blocks {hosted} of {model_of(record)} as {identity.peer.node[:8]}: {record.reason}")

    process.on_stop(server.stop, with_parent=False)
    renewing = renew_in_background(home, name, transport, server.directory, seeds)
    try:
        await server.run(on_online=announce)
    finally:
        renewing.cancel()


def model_of(record: Any) -> str:
    """The model's name without its fingerprint."""
    return str(record.span.model).partition("@")[0]
