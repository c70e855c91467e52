"""A server on a borrowed machine, as a process beside a program of its owner's; and what an idle server costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.machines import directories
from support.organisation import Organisation
from support.swarm import DEMO, Ask, Process, answers, until

pytestmark = pytest.mark.long

TICKS = os.sysconf("SC_CLK_TCK")
WATCHED_S = 5.0


@pytest.fixture(scope="module")
def organisation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Organisation]:
    organisation = Organisation(tmp_path_factory.mktemp("bank"), blocks=("0:8",))
    try:
        yield organisation
    finally:
        organisation.stop()


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def share_used(process: Process) -> float:
    """Share of one processor that it uses while nobody asks it for anything."""
    before, began = cpu_s(process.pid), time.monotonic()
    until(lambda: time.monotonic() - began > WATCHED_S, "time has passed")
    return (cpu_s(process.pid) - before) / (time.monotonic() - began)


def state_of(organisation: Organisation, node: str) -> tuple[str, str]:
    found = [server for server in organisation.status()["servers"] if server["id"] == node]
    return (found[0]["state"], found[0]["reason"]) if found else ("", "")


def test_a_server_that_nobody_asks_costs_next_to_nothing_also_with_several_threads(organisation: Organisation) -> None:
    """Numerical libraries let their threads spin by default: then an idle server would use whole processors."""
    (machine,) = directories(organisation.office.folder.parent / "idle", 1)
    told = organisation.join(machine, "0:8", threads="2")
    process = organisation.servers[told["id"]]
    other = next(node for node in organisation.servers if node != told["id"])
    assert len(answers(organisation, [Ask("In SQLite, a", 40)] * 4)) == 4
    assert {server["threads"] for server in organisation.status()["servers"]} == {1, 2}
    assert share_used(process) < 0.05
    assert share_used(organisation.servers[other]) < 0.05


def test_it_rests_while_its_owner_works_and_comes_back(organisation: Organisation) -> None:
    (machine,) = directories(organisation.office.folder.parent / "desk", 1)
    token = organisation.invite()
    options = ("--serve", str(DEMO), "--memory", "1GiB", "--idle-only", "--back-after", "3", "--json")
    process = organisation.start(machine, "join", token, *options)
    deadline = time.monotonic() + 60.0
    resting = "nothing"

    def decided() -> bool:
        nonlocal resting
        found = [s for s in organisation.status()["servers"] if s["pid"] == process.pid]
        resting = found[0]["reason"] if found else resting
        return bool(found and found[0]["state"] == "online") or time.monotonic() > deadline

    until(decided, "the machine is quiet, or is not")
    if time.monotonic() > deadline:
        pytest.skip(f"this machine is in use by others, so a borrower rightly rests: {resting}")
    node = json.loads(process.line())["id"]
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os\nfor _ in range(os.cpu_count() - 1):\n  if not os.fork(): break\nwhile True: pass",
        ],
        start_new_session=True,
    )
    try:
        until(lambda: state_of(organisation, node)[0] == "resting", "it gives the machine back")
        assert "other programs use" in state_of(organisation, node)[1]
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 10
        assert len(answers(organisation, [Ask("In SQLite, a", 40)])) == 1, "the others go on"
    finally:
        os.killpg(owner.pid, 9)
        owner.wait()
    until(lambda: state_of(organisation, node)[0] == "online", "it comes back")
