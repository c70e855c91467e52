"""Certificates renew themselves: each node asks, over its own connection, long before the present one ends."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from shoal.errors import Refused, ShoalError
from shoal.net.identity import CLOCK_SKEW, NodeIdentity

DUE_AT_SHARE = 2 / 3
"""Of the lifetime; one third is left for admins that are away."""
_SPREAD = 0.1
"""Nodes that joined together do not all ask in the same second."""
_RETRY_LONGEST_S = 600.0
_RETRY_SHORTEST_S = 0.5
_log = logging.getLogger(__name__)

Ask = Callable[[], Awaitable[Sequence[bytes]]]
"""Fetches a new chain (DER) for this node. Raises ShoalError."""


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
    """Renew the certificate of `identity` for ever; every new one goes to on_renewed (which saves it, and gives it to
    the transport). Raises Refused when the certificate has ended and nobody renewed it."""
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
            identity = identity.renewed(await ask())
        except ShoalError as error:
            # A refusal too: whoever answers at the admin's address may be an impostor. A node that was really removed
            # is cut off by everybody else.
            failures += 1
            _log.warning("the certificate could not be renewed, which will be tried again: %s", error)
        else:
            failures = 0
            on_renewed(identity)
            _log.info("the certificate was renewed; it is good until %s UTC", f"{identity.valid_until:%Y-%m-%d %H:%M}")
