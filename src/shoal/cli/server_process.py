"""`python -m shoal server-process`: one block server, started by `shoal up`."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output


@click.command("server-process")
@click.option("--swarm-dir", type=click.Path(path_type=Path), required=True)
@click.option("--node", required=True, help="Name of this node's folder in the swarm directory.")
@click.option("--seed", "seeds", multiple=True, required=True, help="Address of a registry seed, tcp://HOST:PORT.")
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--blocks", default=None, help="START:END; default: wait for an assignment.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--device", default="cpu")
@click.option("--memory", required=True, help="Memory offered for weights and cache, for example 20GiB.")
@click.option("--cache-tokens", type=int, default=None)
@click.option("--free", is_flag=True, help="Leave these blocks for better ones, as servers do that chose theirs.")
@click.option("--listen", default="tcp://127.0.0.1:0")
@click.option("--advertise", default=None, help="Address at which others reach it; default: where it listens.")
@click.option("--exact", is_flag=True, help="fp32 rows keep their bits in any company.")
def server_process(
    swarm_dir: Path,
    node: str,
    seeds: tuple[str, ...],
    model: Path,
    blocks: str | None,
    dtype: str,
    device: str,
    memory: str,
    cache_tokens: int | None,
    free: bool,
    listen: str,
    advertise: str | None,
    exact: bool,
) -> None:
    """Host some blocks of a model (started by `shoal up`)."""
    import gc

    from shoal.cli import process

    process.block_and_never_spin()

    import torch

    from shoal.net.home import Home
    from shoal.net.renewal import renew_in_background
    from shoal.net.tls import TlsTransport
    from shoal.server.node import BlockServer, ServerConfig
    from shoal.spec.ids import BlockRange
    from shoal.spec.units import parse_bytes

    process.set_up_logging()
    torch.set_num_threads(1)
    home = Home(swarm_dir)
    identity = home.node(node)
    config = ServerConfig(
        model_dir=model,
        listen=listen,
        advertise=advertise,
        free=free,
        seeds=seeds,
        blocks=None if blocks is None else BlockRange.parse(blocks),
        dtype=getattr(torch, dtype),
        device=device,
        memory_bytes=parse_bytes(memory),
        cache_tokens=cache_tokens,
        labels=identity.peer.labels,
        exact=exact,
    )

    async def main() -> None:
        transport = TlsTransport(identity)
        server = BlockServer(config, identity, transport)
        process.on_stop(server.stop)
        renewing = renew_in_background(home, node, transport, server.directory, seeds)
        await server.run(on_online=announce)
        renewing.cancel()

    def announce(hosted: BlockRange) -> None:
        # Hundreds of thousands of objects of the libraries will live as long as the process: a collection that walks
        # through all of them would hold up a step for a tenth of a second.
        gc.freeze()
        output.answer_json({"id": identity.peer.node, "blocks": str(hosted)})

    process.run(main())
