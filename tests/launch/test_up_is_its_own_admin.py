"""`shoal up` takes joins too: its gateway is the admin of its swarm."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.swarm import Swarm, until

from shoal.errors import Refused
from shoal.net.enrol import join
from shoal.net.home import Home
from shoal.net.tls import TlsTransport

pytestmark = pytest.mark.slow


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path / "up", "--servers", "1", "--memory", "1GiB")
    try:
        yield swarm
    finally:
        swarm.stop()


def test_it_invites_admits_and_removes_without_being_told_where(swarm: Swarm, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "up"), "XDG_DATA_HOME": str(tmp_path / "none")}

    def typed(*words: str) -> dict[str, object]:
        command = [sys.executable, "-m", "shoal", *words, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    told = typed("invite", "--role", "client")
    assert told["admin_answers"]
    member = join(str(told["token"]), "client", Home(tmp_path / "machine"), "client")
    with pytest.raises(Refused, match="not accepted"):
        join(str(told["token"]), "client", Home(tmp_path / "machine"), "client")

    def dialed() -> bool:
        async def dial() -> bool:
            try:
                conn = await TlsTransport(member).dial([swarm.seed])
            except Refused:
                return False
            await conn.close()
            return True

        return asyncio.run(dial())

    assert dialed()
    assert typed("revoke", member.peer.node)["admin_answers"]
    until(lambda: not dialed(), "the removed member is refused")
    assert swarm.status()["covered"], "and nobody else is"
