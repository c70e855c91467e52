"""A swarm's home, its running admin service, and tokens: for tests of who gets in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from shoal.admin.invites import invite
from shoal.admin.limits import Attempts
from shoal.admin.service import AdminService
from shoal.net.enrol import join
from shoal.net.home import Home
from shoal.net.identity import NodeIdentity, Role
from shoal.net.transport import Address
from shoal.wire.enrolment import Token

ANY_PORT = Address("127.0.0.1", 0)


def new_home(folder: Path, name: str = "bank") -> Home:
    return Home.create(folder / f"{name}-admin", name)


def unlimited() -> Attempts:
    """For tests that ask hundreds of times from one address."""
    return Attempts(burst=1_000_000, every_s=0.001)


@asynccontextmanager
async def serving(home: Home, **options: Any) -> AsyncIterator[AdminService]:
    """The running admin service of `home`."""
    options = {"listen": ANY_PORT, "connections": unlimited(), "failures": unlimited(), **options}
    async with AdminService(home, **options) as service:
        yield service


def token_for(home: Home, role: Role = "server", labels: Sequence[str] = (), **options: Any) -> Token:
    return invite(home, role, labels, **{"now": time.time(), **options})


async def joined(token: Token | str, home: Home, role: Role = "server", name: str = "server-0") -> NodeIdentity:
    """`join` beside the loop on which the service runs."""
    return await asyncio.to_thread(join, str(token), role, home, name, timeout_s=5.0)
