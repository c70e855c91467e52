"""`shoal drain` in the middle of an answer: the machine hands its sessions over, its process ends well, and nobody who
reads the answer can tell."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from support.organisation import Organisation
from support.reference import Reference
from support.swarm import PATIENCE_S, Answer, Ask, until

pytestmark = pytest.mark.slow

LONG = Ask("In SQLite, a", 400)


@pytest.fixture(scope="module")
def organisation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Organisation]:
    organisation = Organisation(tmp_path_factory.mktemp("bank"), blocks=("0:4", "4:8", "4:8"))
    try:
        yield organisation
    finally:
        organisation.stop()


def test_with_a_replica_it_goes_at_once(organisation: Organisation, reference: Reference) -> None:
    until(lambda: len(organisation.status()["servers"]) == 3, "all three are seen")
    answer = Answer(organisation, LONG).begun()
    used = [server for server in organisation.status()["servers"] if server["driven"]]
    node = next(server["id"] for server in used if server["blocks"] == "4:8")
    assert f"{node} hosts blocks 4:8 (online): these blocks were asked for" in organisation.status()["explain"]
    told = json.loads(organisation.office.run("drain", node[:8], "--json"))
    assert told["node"] == node
    assert told["took_s"] < 20.0
    reference.check(LONG.prompt, LONG.tokens, answer.text())
    assert organisation.status()["driver"]["failovers"] == {"draining": 1}
    process = organisation.servers[node]
    assert process.popen.wait(PATIENCE_S) == 0, process.log.read_text()
    assert organisation.status()["covered"]


def test_without_one_it_finishes_what_it_has_and_takes_nothing_new(
    organisation: Organisation, reference: Reference
) -> None:
    answer = Answer(organisation, LONG).begun()
    node = next(server["id"] for server in organisation.status()["servers"] if server["blocks"] == "0:4")
    impatient = json.loads(organisation.office.run("drain", node, "--within", "1", "--json", code=None))
    assert "node" in impatient or "still holds" in impatient["error"]["message"]
    reference.check(LONG.prompt, LONG.tokens, answer.text())
    assert organisation.servers[node].popen.wait(PATIENCE_S) == 0
    gone = json.loads(organisation.office.run("drain", node, "--json", code=3))
    assert gone["error"]["code"] == "no_such_node"
