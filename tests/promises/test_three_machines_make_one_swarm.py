"""The walk of docs/guides/three-machines.md: an admin and gateway on one machine, block servers on two others."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.machines import Machine, directories, may_make_networks, namespaces
from support.reference import Reference
from support.swarm import DEMO, Process, until

pytestmark = pytest.mark.slow

PROMPT = "In SQLite, a"
TOKENS = 400


class Walk:
    """What the person typed, machine by machine."""

    def __init__(self, machines: list[Machine]) -> None:
        self.one, self.two, self.three = machines
        self.processes: list[Process] = []
        port = self.one.port()
        self.one.run("init", "--name", "bank")
        self.admin = self.start(self.one, "admin", "--listen", f"tcp://{self.one.address}:{port}", "--json")
        self.admin.line()

    def start(self, machine: Machine, *command: str) -> Process:
        process = machine.start("shoal", *command)
        self.processes.append(process)
        return process

    def invite(self, *flags: str) -> str:
        return str(json.loads(self.one.run("invite", *flags, "--json"))["token"])

    def join(self, machine: Machine, *flags: str) -> tuple[Process, dict[str, Any]]:
        """A server on this machine, once it is online."""
        options = ("--serve", str(DEMO), "--memory", "1GiB", "--threads", "1", "--exact", "--json", *flags)
        process = self.start(machine, "join", self.invite("--role", "server"), *options)
        return process, json.loads(process.line())

    def gateway(self) -> None:
        key = json.loads(self.one.run("keys", "create", "alice", "--json"))["key"]
        options = ("--serve", f"demo={DEMO}", "--listen", "127.0.0.1:0", "--exact", "--json")
        process = self.start(self.one, "gateway", *options)
        self.api = ["--api", json.loads(process.line())["api"], "--key", key]

    def covered(self) -> bool:
        return bool(self.status()["covered"])

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.one.run("status", *self.api, "--json", code=None)))

    def generate(self) -> Process:
        return self.start(self.one, "generate", "--prompt", PROMPT, "--max-tokens", str(TOKENS), *self.api, "--json")

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()


@pytest.fixture(params=["namespaces", "directories"])
def walk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Walk]:
    if request.param == "directories":
        walk = Walk(directories(tmp_path, 3))
        try:
            yield walk
        finally:
            walk.stop()
        return
    if not may_make_networks():
        pytest.skip("network namespaces need root and the tool `ip`")
    with namespaces(tmp_path, 3) as machines:
        walk = Walk(machines)
        try:
            yield walk
        finally:
            walk.stop()


def test_three_machines_answer_as_one_and_lose_admin_and_servers_without_a_changed_word(
    walk: Walk, reference: Reference
) -> None:
    walk.join(walk.two, "--blocks", "0:4")
    walk.join(walk.three, "--blocks", "4:8")
    walk.gateway()
    until(walk.covered, "every block is covered")

    # A spare on the first machine chooses for itself what it hosts; one machine can hold all of this model.
    walk.join(walk.one)
    until(lambda: len(walk.status()["servers"]) == 3, "the gateway knows the spare")

    answer = walk.generate()
    until(lambda: walk.status()["driver"]["running"], "the answer has begun")
    walk.admin.kill()
    walk.processes[1].signal(signal.SIGKILL)
    told_text = json.loads(answer.rest())
    assert told_text["finish_reason"] == "length"
    reference.check(PROMPT, TOKENS, told_text["text"])
