"""`shoal admin`: the swarm's front door, in the foreground."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.cli import output

if TYPE_CHECKING:
    from shoal.net.home import Home
    from shoal.net.transport import Address


@click.command("admin")
@click.option(
    "--listen",
    default="127.0.0.1:7700",
    show_default=True,
    help="HOST:PORT where members meet; others can reach it only when it is an address of your network.",
)
@click.option("--join-listen", default=None, help="HOST:PORT where tokens are taken; default: the port after --listen.")
@click.option("--advertise", default=None, help="Host that others are told; default: the one listened on.")
@click.option(
    "--certificate-hours",
    type=click.FloatRange(min=0, max=24 * 90, min_open=True),
    default=168.0,
    show_default=True,
    help="How long a member's certificate is good; it is renewed when two thirds have passed.",
)
@click.option("--members", is_flag=True, help="List who was admitted and who was removed, then end.")
@click.option("--swarm-dir", type=click.Path(path_type=Path), default=None, help="The swarm's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
def admin(
    listen: str,
    join_listen: str | None,
    advertise: str | None,
    certificate_hours: float,
    members: bool,
    swarm_dir: Path | None,
    as_json: bool,
) -> int:
    """Let machines into the swarm, renew their certificates, spread removals."""
    from shoal.cli import process
    from shoal.errors import UsageError
    from shoal.launch import state
    from shoal.net.home import Home, home_path
    from shoal.net.transport import Address

    if members:
        _list(state.find_home(swarm_dir, on_several=output.note), as_json)
        return 0
    home = Home(home_path(swarm_dir))
    home.issuer()
    swarm = _address(listen)
    join = Address(swarm.host, swarm.port + 1 if swarm.port else 0) if join_listen is None else _address(join_listen)
    if advertise is None and (swarm.is_wildcard or join.is_wildcard):
        raise UsageError(
            f"{listen} is no address that others could be told.",
            hint="Say how they reach this machine: --advertise its name or its address.",
        )
    process.set_up_logging()
    return process.run(_run(home, swarm, join, advertise, certificate_hours, as_json))


def _address(text: str) -> Address:
    from shoal.net.transport import Address

    return Address.parse(text if text.startswith("tcp://") else f"tcp://{text}")


async def _run(
    home: Home, listen: Address, join: Address, advertise: str | None, certificate_hours: float, as_json: bool
) -> int:
    import datetime
    import signal

    from shoal.admin.attach import in_good_standing
    from shoal.admin.own import own_node
    from shoal.net.seed import Seed
    from shoal.net.tls import TlsTransport
    from shoal.net.transport import Address

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    identity = own_node(home, "admin", "admin")
    transport = TlsTransport(identity)
    seed = Seed(identity)
    listener = await transport.listen(str(listen), seed.on_conn)
    taken = Address.parse(listener.address)
    address = str(Address(advertise or taken.host, taken.port))
    known = [seed for seed in home.read().seeds if seed != address]
    try:
        async with in_good_standing(
            home,
            "admin",
            seed,
            transport,
            address=address,
            seeds=known,
            join=join,
            lifetime=datetime.timedelta(hours=certificate_hours),
            must_be_admin=True,
        ):
            seed.announce([address])
            gossip = asyncio.create_task(seed.directory.rounds(transport, known), name="gossip")
            stopped = asyncio.create_task(stop.wait())
            _announce(home, address, as_json)
            await asyncio.wait([gossip, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in (gossip, stopped):
                task.cancel()
            await asyncio.wait([gossip, stopped])
            if not gossip.cancelled():
                gossip.result()
    finally:
        await listener.close()
    return 0


def _announce(home: Home, address: str, as_json: bool) -> None:
    swarm, join_address = home.read().swarm, home.read().join
    if as_json:
        output.answer_json({"swarm": swarm, "address": address, "join": join_address, "swarm_dir": str(home.path)})
        return
    output.answer(
        f"The admin of {swarm} is here.\n\n  members meet at    {address}\n  tokens are taken at {join_address}\n\n"
        "Let a machine in: `shoal invite --role server`. Ctrl-C ends this; the swarm goes on without it, but nobody\n"
        "can join, and certificates are not renewed until it is back."
    )
    remaining = home.issuer().not_after
    if not home.has_root_key:
        output.note(f"The root's key is away. Put it back for a minute before {remaining:%Y-%m-%d}.")


def _list(home: Home, as_json: bool) -> None:
    import time
    from contextlib import closing

    from shoal.admin.store import AdminStore

    home.issuer()
    with closing(AdminStore(home.admin_db)) as store:
        found, removed = store.members(), set(store.revocations()[1])
    if as_json:
        output.answer_json(
            {
                "members": [
                    {
                        "node": member.node,
                        "role": member.role,
                        "labels": list(member.labels),
                        "joined": int(member.joined),
                        "certificate_ends": int(member.not_after),
                        "removed": member.node in removed,
                    }
                    for member in found
                ]
            }
        )
        return
    output.answer(f"  {'node':<34}{'role':<9}{'joined':<18}{'certificate ends':<18}labels")
    for member in found:
        state = "removed" if member.node in removed else "expired" if member.not_after < time.time() else ""
        joined, ends = (time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) for at in (member.joined, member.not_after))
        output.answer(f"  {member.node:<34}{member.role:<9}{joined:<18}{state or ends:<18}{', '.join(member.labels)}")
