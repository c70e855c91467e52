"""Keeps a registry seed's node in good standing: it renews its certificate, and where the issuing authority lies it is
the swarm's admin too."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from shoal.admin.service import AdminService, AlreadyAdmin
from shoal.net.home import Home
from shoal.net.identity import NODE_LIFETIME, NodeIdentity
from shoal.net.renewal import meeting_places, renew_in_background
from shoal.net.seed import Seed
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address


@asynccontextmanager
async def in_good_standing(
    home: Home,
    name: str,
    seed: Seed,
    transport: TlsTransport,
    *,
    address: str,
    seeds: Sequence[str] = (),
    join: Address | None = None,
    lifetime: datetime.timedelta = NODE_LIFETIME,
    must_be_admin: bool = False,
) -> AsyncIterator[AdminService | None]:
    """While this is entered, node `name` of `home` (whose `seed` and `transport` are given) renews its certificate, and
    is the swarm's admin when `home` is the admin's and no other process is: then the service is yielded, else None.

    `address` is where others reach this node, tcp://HOST:PORT; new members are told it and where else the swarm is met
    (`seeds`, while nobody is known to live). Joins are taken at `join` (default: any free port of the same host) and
    under the host of `address`. With must_be_admin, raises AlreadyAdmin when another process is.
    """
    host = Address.parse(address).host
    async with AsyncExitStack() as stack:
        service = await _serve(home, name, seed, transport, stack, address, seeds, join or Address(host, 0), lifetime)
        if service is None and must_be_admin:
            raise AlreadyAdmin.of(home)
        renewing: asyncio.Task[None] | None = None
        if service is None or name != "admin":  # the service renews the admin itself
            known = list(dict.fromkeys([*seeds, *home.read().seeds]))
            ask = None if service is None else service.renew_own
            renewing = renew_in_background(home, name, transport, seed.directory, known, ask=ask)
        try:
            yield service
        finally:
            seed.renew = None
            if renewing is not None:
                renewing.cancel()
                await asyncio.wait([renewing])


async def _serve(
    home: Home,
    name: str,
    seed: Seed,
    transport: TlsTransport,
    stack: AsyncExitStack,
    address: str,
    seeds: Sequence[str],
    join: Address,
    lifetime: datetime.timedelta,
) -> AdminService | None:
    """The admin's service, entered into `stack`; None when this home or this process is not the one."""
    if not home.is_admin:
        return None

    def renewed(admin: NodeIdentity) -> None:
        if name == "admin":
            transport.renew(admin)
            seed.directory.renewed(admin)

    service = AdminService(
        home,
        listen=join,
        advertise=Address.parse(address).host,
        seeds=lambda: meeting_places(seed.directory.live(), [address], seeds),
        on_revoked=seed.directory.revoke,
        on_renewed=renewed,
        lifetime=lifetime,
    )
    try:
        await stack.enter_async_context(service)
    except AlreadyAdmin:
        return None
    seed.renew = service.renew
    return service
