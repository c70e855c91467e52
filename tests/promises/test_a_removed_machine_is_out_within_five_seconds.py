"""`shoal revoke` of a server in the middle of an answer: its connections are cut, nobody speaks to it again, and the
answer goes on elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.machines import Machine
from support.organisation import Organisation
from support.reference import Reference
from support.swarm import DEMO, Answer, Ask, is_running, until

from shoal.net.home import Home

pytestmark = pytest.mark.slow

LONG = Ask("In SQLite, a", 400)


@pytest.fixture
def organisation(tmp_path: Path) -> Iterator[Organisation]:
    organisation = Organisation(tmp_path, blocks=("0:4", "4:8", "4:8"))
    try:
        yield organisation
    finally:
        organisation.stop()


def test_in_the_middle_of_an_answer(organisation: Organisation, reference: Reference) -> None:
    until(lambda: len(organisation.status()["servers"]) == 3, "all three are seen")
    answer = Answer(organisation, LONG).begun()
    used = [server for server in organisation.status()["servers"] if server["driven"]]
    thief = next(server["id"] for server in used if server["blocks"] == "4:8")
    removed_at = time.monotonic()
    organisation.office.run("revoke", thief, "--reason", "stolen")
    until(lambda: thief not in {server["id"] for server in organisation.status()["servers"]}, "it is out")
    assert time.monotonic() - removed_at < 5.0, "with the start of two commands in it"
    reference.check(LONG.prompt, LONG.tokens, answer.text())
    told = organisation.status()
    assert told["covered"]
    assert sum(told["driver"]["failovers"].values()) >= 1
    process = organisation.servers[thief]
    machine = next(machine for machine in organisation.machines if node_of(machine) == thief)
    # It still has its key and certificate, and comes no further than the greeting.
    until(lambda: not is_running(process.pid) or "removed from the swarm" in process.log.read_text(), "it is told why")
    process.kill()
    again = organisation.start(machine, "join", "--serve", str(DEMO), "--blocks", "4:8", "--threads", "1", "--json")
    refused = json.loads(again.rest().splitlines()[-1])
    assert again.popen.returncode == 4
    assert "removed from the swarm" in refused["error"]["message"]
    members = json.loads(organisation.office.run("admin", "--members", "--json"))["members"]
    assert [member["node"] for member in members if member["removed"]] == [thief]


def node_of(machine: Machine) -> str:
    return Home(next(machine.folder.rglob("swarm.json")).parent).node("server").peer.node
