"""`shoal gateway`: the OpenAI-compatible API in front of a swarm, in the foreground."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli import output
from shoal.errors import UsageError

if TYPE_CHECKING:
    from shoal.cli.answering import Plan
    from shoal.client.served import SwarmModel
    from shoal.gateway.server import TlsFiles
    from shoal.net.home import Home
    from shoal.net.identity import NodeIdentity
    from shoal.net.seed import Seed
    from shoal.net.tls import TlsTransport
    from shoal.swarm.trust import Zones
    from shoal.wire.messages import WireType


@click.command("gateway")
@click.argument("token", required=False)
@click.option(
    "--serve",
    "serves",
    multiple=True,
    required=True,
    metavar="[NAME=]MODEL",
    help="Model directory or hub id to answer for, by default under its own name; may be repeated.",
)
@click.option("--listen", default="127.0.0.1:8080", show_default=True, help="HOST:PORT of the API; port 0: any.")
@click.option(
    "--swarm-listen",
    default=None,
    help="HOST:PORT where members may meet; on the admin's machine the gateway is then the admin too.",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), default=None, help="PEM certificate for HTTPS.")
@click.option("--tls-key", type=click.Path(path_type=Path), default=None, help="PEM key of that certificate.")
@click.option("--host", "hosts", multiple=True, help="Name by which the API is addressed; default: the certificate's.")
@click.option("--origin", "origins", multiple=True, help="Web origin whose pages may use the API; may be repeated.")
@click.option(
    "--zones",
    "zones",
    multiple=True,
    metavar="[NAME:]POLICY",
    help="Trust zone of a model (or of all), for example first=2:trusted,embedding=trusted; may be repeated.",
)
@click.option(
    "--label", "labels", multiple=True, help="On the admin's machine: what you vouch for about it; may be repeated."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--wire",
    type=click.Choice(["auto", "f32", "bf16", "int8"]),
    default="auto",
    show_default=True,
    help="How activations travel; auto: as they are computed.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda:N, for embedding and head.")
@click.option("--exact", is_flag=True, help="fp32 numbers that do not depend on other sessions.")
@click.option(
    "--checks",
    type=click.FloatRange(0.0, 1.0),
    default=0.02,
    show_default=True,
    help="Share of every server's calls that is computed again on another one, to find those that lie.",
)
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="Directory of the swarm.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
def gateway(token: str | None, as_json: bool, **options: Any) -> int:
    """Answer the API for a swarm until Ctrl-C."""
    from shoal.cli import process
    from shoal.net.home import Home, home_path

    process.block_and_never_spin()
    home = Home(home_path(options["swarm_dir"]))
    plan = _plan(home, options)
    with process.only_one(home.node_dir("gateway")):
        identity = _identity(home, token, options["labels"])
        process.set_up_logging()
        process.run(_run(home, identity, plan, options["swarm_listen"], as_json))
    return 0


def _plan(home: Home, options: dict[str, Any]) -> Plan:
    """What was asked for, checked before anything is started."""
    from contextlib import closing
    from ipaddress import ip_address

    from shoal.cli.answering import Offer, Plan
    from shoal.cli.up import local_model, model_name
    from shoal.gateway.accounts import Accounts
    from shoal.gateway.server import check_exposure

    host, port = _host_and_port(options["listen"])
    tls = _tls(options["tls_cert"], options["tls_key"])
    address = check_exposure(host, encrypted=tls is not None)
    policies = _policies(options["zones"])
    offers = []
    for text in options["serves"]:
        name, given, model = text.rpartition("=")
        directory = local_model(model)
        name = name if given else model_name(model)
        offers.append(Offer(name, directory, tuple(policies.get("", [])) + tuple(policies.pop(name, []))))
    _check_names([offer.name for offer in offers], policies)
    hosts = [*options["hosts"], *(tls.names() if tls is not None else []), address]
    with closing(Accounts(home.accounts_db)) as accounts:
        if not accounts.records() and not ip_address(address).is_loopback:
            raise UsageError(
                "There is no API key yet: a gateway that others can reach is not started without one.",
                hint="Make one first: shoal keys create NAME.",
            )
    dtype = options["dtype"]
    wire: WireType = options["wire"]
    if options["wire"] == "auto":
        wire = "bf16" if dtype == "bfloat16" else "f32"
    return Plan(
        home=home.path,
        offers=tuple(offers),
        host=address,
        port=port,
        tls=tls,
        hosts=tuple(hosts),
        origins=tuple(options["origins"]),
        dtype=dtype,
        wire=wire,
        device=options["device"],
        exact=options["exact"],
        checks=options["checks"],
    )


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"Cannot read the address {text!r}.", hint="Write HOST:PORT, for example 0.0.0.0:8080.")
    return host, int(port)


def _tls(certificate: Path | None, key: Path | None) -> TlsFiles | None:
    from shoal.gateway.server import TlsFiles

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("HTTPS needs a certificate and its key.", hint="Give both --tls-cert and --tls-key.")
    files = TlsFiles(certificate, key)
    files.check()
    return files


def _policies(texts: tuple[str, ...]) -> dict[str, list[Zones]]:
    """Trust zones by model name; those without a name, which hold for every model, under ""."""
    from shoal.swarm.trust import Zones

    policies: dict[str, list[Zones]] = {}
    for text in texts:
        # A policy has no colon before its first equals sign; a hub id has no equals sign at all.
        before = text.partition("=")[0]
        name, named, _ = before.rpartition(":")
        policy = text[len(name) + 1 :] if named else text
        policies.setdefault(name, []).append(Zones.parse(policy))
    return policies


def _check_names(names: list[str], policies: dict[str, list[Zones]]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            f"Two models would be called {sorted(twice)[0]!r} in the API.", hint="Give them names: --serve NAME=MODEL."
        )
    unknown = set(policies) - {""}
    if unknown:
        raise UsageError(
            f"--zones names {sorted(unknown)[0]!r}, which is not served here.", hint=f"Served are {', '.join(names)}."
        )


def _identity(home: Home, token: str | None, labels: tuple[str, ...]) -> NodeIdentity:
    """This machine's gateway: made with the token, or by the authority that lies here, or the one of an earlier run."""
    from shoal.admin.own import own_node
    from shoal.cli import process
    from shoal.net.enrol import join

    if labels and (token is not None or not home.is_admin):
        raise UsageError(
            "Labels are given by the swarm's admin, not by the gateway itself.",
            hint="On the admin's machine: shoal invite --role gateway --label LABEL.",
        )
    if token is not None:
        return join(process.secret(token), "gateway", home, "gateway")
    if home.is_admin:
        return own_node(home, "gateway", "gateway", labels=labels or None)
    if home.has_node("gateway"):
        return home.node("gateway")
    raise UsageError(
        f"{home.path} has no certificate for a gateway.",
        hint="Ask the swarm's admin for a token (shoal invite --role gateway) and give it: shoal gateway TOKEN ...",
    )


async def _run(home: Home, identity: NodeIdentity, plan: Plan, swarm_listen: str | None, as_json: bool) -> None:
    """Take part in the swarm's registry, and answer, until told to stop."""
    from shoal.cli import answering, process
    from shoal.net.seed import Seed
    from shoal.net.tls import TlsTransport

    def announce(url: str, models: dict[str, SwarmModel]) -> None:
        missing = {name: model.missing() for name, model in models.items()}
        if as_json:
            output.answer_json({"api": f"{url}/v1", "models": list(models), "node": identity.peer.node})
            return
        output.answer(f"The gateway answers at {url}/v1 for {', '.join(models)}; Ctrl-C stops it.")
        for name, parts in missing.items():
            if parts:
                output.note(
                    f"no server hosts blocks {', '.join(parts)} of {name} yet; requests for it get 503 until then"
                )

    stop = asyncio.Event()
    process.on_stop(stop.set, with_parent=False)
    transport = TlsTransport(identity)
    seed = Seed(identity)
    async with _met_at(home, seed, transport, swarm_listen) as seeds:
        work = [
            asyncio.create_task(seed.directory.rounds(transport, seeds), name="gossip"),
            asyncio.create_task(answering.answer(plan, seed, transport, identity.peer.node, announce), name="answers"),
        ]
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([*work, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        for task in work:
            task.cancel()
        for ended in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


@asynccontextmanager
async def _met_at(
    home: Home, seed: Seed, transport: TlsTransport, swarm_listen: str | None
) -> AsyncIterator[Sequence[str]]:
    """Renews the gateway's certificate, and with an address to listen on takes other nodes' gossip; on the admin's
    machine it is then the admin too. Yields the seeds to begin with."""
    from shoal.admin.attach import in_good_standing
    from shoal.net.renewal import renew_in_background
    from shoal.net.transport import Address

    seeds = home.read().seeds
    if swarm_listen is None:
        seed.announce([])  # it takes no connections; what it has to say (the head of its audit log) it says itself
        renewing = renew_in_background(home, "gateway", transport, seed.directory, seeds)
        try:
            yield seeds
        finally:
            renewing.cancel()
        return
    wanted = Address.parse(swarm_listen if swarm_listen.startswith("tcp://") else f"tcp://{swarm_listen}")
    if wanted.is_wildcard:
        raise UsageError(
            f"{swarm_listen} is no address that others could be told.", hint="Give one address of this machine."
        )
    listener = await transport.listen(str(wanted), seed.on_conn)
    others = [address for address in seeds if address != listener.address]
    join = Address(wanted.host, wanted.port + 1) if wanted.port else None
    try:
        seed.announce([listener.address])
        async with in_good_standing(
            home, "gateway", seed, transport, address=listener.address, seeds=others, join=join
        ):
            yield others
    finally:
        await listener.close()
