"""`shoal up` announces its swarm in one line, and however it ends, every process that it started ends too."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from support.swarm import Process, Swarm, children_of, command_of, is_running, until

pytestmark = pytest.mark.slow


def all_ended(pids: set[int]) -> None:
    until(lambda: not any(is_running(pid) for pid in pids), "the end of every process")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda end: end.name)
def test_whatever_ends_it(tmp_path: Path, end: signal.Signals) -> None:
    swarm = Swarm(tmp_path, "--servers", "2")
    try:
        told = swarm.told
        assert set(told) == {"api", "key", "model", "servers", "swarm_dir"}
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", told["api"])
        assert Path(told["swarm_dir"]).is_dir()
        assert [set(server) for server in told["servers"]] == [{"id", "pid", "blocks"}] * 2
        assert [server["blocks"] for server in told["servers"]] == ["0:4", "4:8"]

        started = children_of(swarm.up.pid)
        assert len(started) == 3, "two servers and a gateway"
        hosts = {server["pid"] for server in told["servers"]}
        assert hosts < started
        assert all("server-process" in command_of(pid) for pid in hosts)
        reported = {(server["id"], server["pid"], server["blocks"]) for server in swarm.status()["servers"]}
        assert reported == {(server["id"], server["pid"], server["blocks"]) for server in told["servers"]}
        remembered = json.loads(next((tmp_path / "shoal").glob("running.*.json")).read_text())
        assert remembered["api"] == told["api"]
    except BaseException:
        swarm.stop()
        raise
    swarm.http.close()

    swarm.up.signal(end)

    assert swarm.up.rest() == "", "one line on stdout, and nothing more"
    all_ended(started)
    if end != signal.SIGKILL:
        assert swarm.up.popen.returncode == 0
        assert not list((tmp_path / "shoal").glob("running.*"))


def test_when_it_is_stopped_before_it_was_ready(tmp_path: Path) -> None:
    up = Process(tmp_path, "shoal", "up", "--json", "--servers", "2")
    started = until(lambda: len(found := children_of(up.pid)) >= 2 and found, "its first processes")
    os.kill(up.pid, signal.SIGINT)

    assert up.rest() == ""
    assert up.popen.returncode == 130
    all_ended(started)


def test_when_its_gateway_dies(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, "--servers", "1")
    swarm.http.close()
    started = children_of(swarm.up.pid)
    (gateway,) = [pid for pid in started if "gateway-process" in command_of(pid)]
    os.kill(gateway, signal.SIGKILL)

    assert swarm.up.rest() == ""
    assert swarm.up.popen.returncode == 1
    all_ended(started)
