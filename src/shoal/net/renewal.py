"""Certificates renew themselves: each node asks, over its own connection, long before the present one ends."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from shoal.errors import PeerLost, Refused, ShoalError
from shoal.net.directory import Directory
from shoal.net.home import Home
from shoal.net.identity import CLOCK_SKEW, NodeIdentity
from shoal.net.tls import TlsTransport
from shoal.net.transport import Transport
from shoal.wire.messages import Fault, Record, Renew, Renewed

DUE_AT_SHARE = 2 / 3
"""Of the lifetime; one third is left for admins that are away."""
_SPREAD = 0.1
"""Nodes that joined together do not all ask in the same second."""
_RETRY_LONGEST_S = 600.0
_RETRY_SHORTEST_S = 0.5
_log = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 10.0

_MAX_ASKED = 16
MAX_SEEDS = 8
NOTE_EVERY_S = 60.0

Ask = Callable[[NodeIdentity], Awaitable[NodeIdentity]]
"""The same node with a new certificate. Raises ShoalError."""


def renewal_due(identity: NodeIdentity) -> float:
    """When a new certificate is wanted, in Unix seconds."""
    issued = (identity.valid_from + CLOCK_SKEW).timestamp()
    return issued + (identity.valid_until.timestamp() - issued) * DUE_AT_SHARE


def next_attempt(due: float, until: float, now: float, failures: int, rng: random.Random) -> float:
    """Seconds to wait before the next attempt. After a failure a tenth of what is left, so attempts get denser towards
    the end, within [0.5 s, 10 min]."""
    if failures == 0:
        return max(0.0, due - now) * (1 - _SPREAD * rng.random())
    return min(_RETRY_LONGEST_S, max(_RETRY_SHORTEST_S, (until - now) / 10)) * (1 + _SPREAD * rng.random())


async def keep_renewed(
    identity: NodeIdentity,
    ask: Ask,
    on_renewed: Callable[[NodeIdentity], None],
    *,
    clock: Callable[[], float] = time.time,
    rng: random.Random | None = None,
) -> None:
    """Renew the certificate of `identity` for ever; every new one goes to on_renewed (see
    `taking_effect`). Raises Refused when the certificate has ended and nobody renewed it."""
    rng = rng or random.Random()
    failures = 0
    while True:
        until = identity.valid_until.timestamp()
        await asyncio.sleep(next_attempt(renewal_due(identity), until, clock(), failures, rng))
        if clock() >= until:
            raise Refused(
                f"This node's certificate ended on {identity.valid_until:%Y-%m-%d %H:%M} UTC and nobody renewed it.",
                hint="Is `shoal admin` running and reachable? This machine has to join again with a new token.",
            )
        try:
            identity = await ask(identity)
            on_renewed(identity)
        except (ShoalError, OSError) as error:
            # A refusal too: whoever answers at the admin's address may be an impostor. A node that was really removed
            # is cut off by everybody else. OSError: TLS reads keys from files, and there may be no room for them.
            failures += 1
            _log.warning("the certificate could not be renewed, which will be tried again: %s", error)
        else:
            failures = 0
            _log.info("the certificate was renewed; it is good until %s UTC", f"{identity.valid_until:%Y-%m-%d %H:%M}")


def ask_over(transport: Transport, addresses: Callable[[], Sequence[str]]) -> Ask:
    """Asks the nodes at `addresses`, in order, over connections of its own, until one renews. The rest of the swarm
    need not know which of them keeps the issuing authority."""

    async def ask(identity: NodeIdentity) -> NodeIdentity:
        failures: list[str] = []
        for address in addresses()[:_MAX_ASKED]:
            try:
                # Checked here, so that a node that answers with nonsense keeps nobody from asking the next one.
                return identity.renewed(await _ask_at(transport, address))
            except ShoalError as error:
                failures.append(f"{address}: {error}")
        raise PeerLost(f"Nobody renewed the certificate ({'; '.join(failures) or 'no address is known'}).")

    return ask


async def _ask_at(transport: Transport, address: str) -> Sequence[bytes]:
    conn = await transport.dial([address])
    try:
        async with asyncio.timeout(_ASK_TIMEOUT_S):
            await conn.send(Renew())
            while True:
                message, _ = await conn.receive()
                if isinstance(message, Renewed):
                    return message.chain
                if isinstance(message, Fault):
                    raise PeerLost(message.message)
    except TimeoutError:
        raise PeerLost(f"no answer within {_ASK_TIMEOUT_S:g} s") from None
    finally:
        await conn.close()


def admin_addresses(seeds: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Where to ask for a renewal: the admins, the seeds, then the gateways, any of which may keep the issuer."""
    admins, gateways = (
        [address for record in records if record.role == role for address in record.addresses]
        for role in ("admin", "gateway")
    )
    return list(dict.fromkeys([*admins, *seeds, *gateways]))


def meeting_places(records: Sequence[Record], first: Sequence[str], known: Sequence[str]) -> list[str]:
    """At most MAX_SEEDS addresses at which the swarm is met: `first`, then live admins, gateways and servers, then
    those that were `known` before. A node that starts anew finds the swarm though some of them are gone."""
    live = [
        record.addresses[0]
        for role in ("admin", "gateway", "server")
        for record in records
        if record.role == role and record.addresses
    ]
    return list(dict.fromkeys([*first, *live, *known]))[:MAX_SEEDS]


def taking_effect(
    home: Home, name: str, transport: TlsTransport, directory: Directory | None = None
) -> Callable[[NodeIdentity], None]:
    """What on_renewed has to do for node `name` of `home`: new handshakes and new records use the certificate, then it
    is saved (last: a full disk takes nothing from a running node)."""

    def renewed(identity: NodeIdentity) -> None:
        transport.renew(identity)
        if directory is not None:
            directory.renewed(identity)
        home.save_node(name, identity)

    return renewed


def renew_in_background(
    home: Home,
    name: str,
    transport: TlsTransport,
    directory: Directory,
    seeds: Sequence[str],
    *,
    ask: Ask | None = None,
) -> asyncio.Task[None]:
    """Keeps node `name` of `home` renewed until cancelled; by default it asks admins, seeds and gateways. When nobody
    renewed it in time that is logged and ends nothing: the connections that stand go on. Meanwhile it notes in the home
    where the swarm is met."""
    asked = ask or ask_over(transport, lambda: admin_addresses(seeds, directory.live()))

    async def note() -> None:
        while True:
            await asyncio.sleep(NOTE_EVERY_S)
            try:
                _note_places(home, directory)
            except ShoalError as error:
                _log.warning("it is not noted where the swarm is met: %s", error)

    async def renew() -> None:
        noting = asyncio.create_task(note())
        try:
            await keep_renewed(transport.identity, asked, taking_effect(home, name, transport, directory))
        except Refused as error:
            _log.error("%s %s", error, error.hint)
            await noting
        finally:
            noting.cancel()

    return asyncio.create_task(renew(), name="renewal")


def _note_places(home: Home, directory: Directory) -> None:
    if home.is_admin:
        return  # the admin's service writes this file
    file = home.read()
    others = [record for record in directory.live() if record.node != directory.node]
    places = meeting_places(others, [], file.seeds)
    if places != file.seeds:
        home.write(msgspec.structs.replace(file, seeds=places))
