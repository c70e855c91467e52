"""Asks a server to leave, as its swarm's admin, and waits until it has left."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from shoal.errors import NoSuchNode, PeerLost, ProtocolError, ShoalError, UsageError
from shoal.net.directory import Directory
from shoal.net.identity import NodeIdentity
from shoal.net.transport import Transport
from shoal.wire.messages import Drain, Draining, Record

FIND_S = 6.0
"""Word of every live node has come by then, a few rounds of gossip."""
ANSWER_S = 5.0
PROGRESS_S = 0.5
MIN_PREFIX = 4
"""Characters of an id that name a node; fewer are a slip."""

OnProgress = Callable[[Record], None]


async def drain(
    admin: NodeIdentity,
    transport: Transport,
    seeds: Sequence[str],
    prefix: str,
    *,
    reason: str,
    within_s: float,
    on_progress: OnProgress = lambda record: None,
) -> Record:
    """Drain the server whose id begins with `prefix`; returns its last record once it is gone.

    `on_progress` gets its record, with the sessions that are left, when it was asked and about twice a second.

    Raises UsageError (no seed known, an ambiguous prefix, no server), NoSuchNode, PeerLost (it cannot be reached),
    Refused, ShoalError (still there after within_s)."""
    if not seeds:
        raise UsageError(
            "No address of this swarm's registry is known here.",
            hint="Run this where `shoal admin` or `shoal up` runs, or has run.",
        )
    directory = Directory(admin)
    rounds = asyncio.create_task(directory.rounds(transport, seeds), name="gossip")
    try:
        record = await _find(directory, rounds, prefix)
        await _ask(transport, record, reason)
        deadline = time.monotonic() + within_s
        while (now_is := directory.view.get(record.node)) is not None and _is_here(directory, record):
            record = now_is
            on_progress(record)
            if time.monotonic() > deadline:
                raise ShoalError(
                    f"Server {record.node[:8]} still holds {record.sessions} sessions after {within_s:.0f} s.",
                    hint="It takes no new ones and leaves when they have ended. A replica of its blocks would take over"
                    " at once; stopping its process ends them.",
                )
            await asyncio.sleep(PROGRESS_S)
        return record
    finally:
        rounds.cancel()
        await asyncio.gather(rounds, return_exceptions=True)


async def _find(directory: Directory, rounds: asyncio.Task[None], prefix: str) -> Record:
    """The live server that is meant."""
    if len(prefix) < MIN_PREFIX:
        raise UsageError(
            f"{prefix!r} is too short to name a node.", hint=f"Give at least {MIN_PREFIX} characters of its id."
        )
    deadline = time.monotonic() + FIND_S
    while True:
        found = [record for record in directory.live() if record.node.startswith(prefix)]
        if len(found) > 1:
            names = ", ".join(record.node[: len(prefix) + 4] for record in found)
            raise UsageError(f"{prefix} begins the ids of several nodes: {names}.", hint="Give more of the id.")
        if found and found[0].role == "server":
            return found[0]
        if found:
            raise UsageError(
                f"{prefix} is a {found[0].role}; only servers can be drained.",
                hint="Stop its process; `shoal revoke` throws a node out.",
            )
        if rounds.done():
            rounds.result()
        if time.monotonic() > deadline:
            known = ", ".join(record.node[:8] for record in directory.live() if record.role == "server")
            raise NoSuchNode(
                f"No live node of this swarm has an id that begins with {prefix}.",
                hint=f"Servers that live: {known}." if known else "No server lives, or nobody answers at the registry.",
            )
        await asyncio.sleep(0.02)


async def _ask(transport: Transport, record: Record, reason: str) -> None:
    """Tell the server, over a connection to that very node."""
    conn = await transport.dial(record.addresses, expect_node=record.node)
    try:
        await conn.send(Drain(reason))
        async with asyncio.timeout(ANSWER_S):
            answer, _ = await conn.receive()
    except TimeoutError:
        raise PeerLost(
            f"Server {record.node[:8]} did not answer within {ANSWER_S:.0f} s.", hint="Try again, or stop its process."
        ) from None
    finally:
        with contextlib.suppress(ShoalError):
            await conn.close()
    if not isinstance(answer, Draining):
        raise ProtocolError(f"Server {record.node[:8]} answered with something else.")


def _is_here(directory: Directory, record: Record) -> bool:
    """Whether the process that was asked lives: not one that has been started anew since."""
    return any(live.node == record.node and live.pid == record.pid for live in directory.live())
