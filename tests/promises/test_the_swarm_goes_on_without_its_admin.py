"""SIGKILL of `shoal admin`, the only registry seed of the swarm: running answers end as they should, new ones are
answered, and when it is back it lets machines in again, with the root's key in a safe all the while."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.machines import Machine
from support.organisation import Organisation
from support.reference import Reference
from support.swarm import Answer, Ask, is_running, until

pytestmark = pytest.mark.slow

LONG = Ask("In SQLite, a", 400)
SHORT = Ask("Once upon a time", 16)


@pytest.fixture
def organisation(tmp_path: Path) -> Iterator[Organisation]:
    """Certificates last 75 s here, so that they are renewed within the test."""
    organisation = Organisation(tmp_path, "--certificate-hours", str(75 / 3600))
    try:
        yield organisation
    finally:
        organisation.stop()


def certificate_of(machine: Machine) -> bytes:
    return next(machine.folder.rglob("nodes/server/node.pem")).read_bytes()


def test_killed_in_the_middle_of_an_answer(organisation: Organisation, reference: Reference, tmp_path: Path) -> None:
    Path(organisation.told["root_key"]).rename(tmp_path / "in a safe")
    server = organisation.machines[0]
    first = certificate_of(server)
    answer = Answer(organisation, LONG).begun()
    organisation.admin.kill()
    killed_at = time.monotonic()
    reference.check(LONG.prompt, LONG.tokens, answer.text())
    reference.check(SHORT.prompt, SHORT.tokens, Answer(organisation, SHORT).text())
    # Longer than any lease: the registry lives on in the members.
    until(lambda: time.monotonic() > killed_at + 8, "leases that nobody renews have ended")
    status = organisation.status()
    assert status["covered"]
    assert len(status["servers"]) == 2
    reference.check(SHORT.prompt, SHORT.tokens, Answer(organisation, SHORT).text())
    organisation.start_admin()
    until(lambda: certificate_of(server) != first, "the server's certificate is renewed")
    spare = Machine(tmp_path / "spare", "127.0.0.1")
    told = organisation.join(spare, "0:4")
    until(lambda: len(organisation.status()["servers"]) == 3, "the machine that joined is seen")
    members = json.loads(organisation.office.run("admin", "--members", "--json"))["members"]
    assert told["id"] in {member["node"] for member in members}
    reference.check(SHORT.prompt, SHORT.tokens, Answer(organisation, SHORT).text())
    assert all(is_running(process.pid) for process in organisation.servers.values())
