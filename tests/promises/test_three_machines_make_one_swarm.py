"""The walk of docs/guides/three-machines.md: an admin and gateway on one machine, block servers on two others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.machines import Machine, directories, may_make_networks, namespaces
from support.reference import Reference
from support.swarm import DEMO, PATIENCE_S, Process, until

pytestmark = pytest.mark.slow

PROMPT = "In SQLite, a"
TOKENS = 400


class Walk:
    """What the person typed, machine by machine."""

    def __init__(self, machines: list[Machine]) -> None:
        self.one, self.two, self.three = machines
        self.processes: list[Process] = []
        self._listen = f"{self.one.address}:{self.one.port()}"
        self.one.run("init", "--name", "bank")
        self.start_admin()

    def start_admin(self) -> None:
        self.admin = self.start(self.one, "admin", "--listen", self._listen, "--json")
        self.admin.line()

    def start(self, machine: Machine, *command: str) -> Process:
        process = machine.start("shoal", *command)
        self.processes.append(process)
        return process

    def invite(self, *flags: str) -> str:
        return str(json.loads(self.one.run("invite", *flags, "--json"))["token"])

    def join(self, machine: Machine, *flags: str, token: str | None = None) -> tuple[Process, dict[str, Any]]:
        """A server on this machine, once it is online."""
        token = token or self.invite("--role", "server")
        options = ("--serve", str(DEMO), "--memory", "1GiB", "--threads", "1", "--exact", "--json", *flags)
        process = self.start(machine, "join", token, *options)
        told = json.loads(process.line())
        assert "error" not in told, told
        return process, told

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

    def check(self, answer: Process, reference: Reference) -> None:
        """Fail unless an answer has all its tokens, and they are those of the whole model."""
        told = json.loads(answer.rest())
        assert told.get("finish_reason") == "length", told
        reference.check(PROMPT, TOKENS, told["text"])

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    """Three networks where this process may make them, else three directories."""
    place = namespaces(tmp_path, 3) if may_make_networks() else nullcontext(directories(tmp_path, 3))
    with place as machines:
        walk = Walk(machines)
        try:
            yield walk
        finally:
            walk.stop()


def test_three_machines_answer_as_one_while_admin_and_servers_go(walk: Walk, reference: Reference) -> None:
    token = walk.invite("--role", "server")
    dead, _ = walk.join(walk.two, "--blocks", "0:4", token=token)
    leaving, told = walk.join(walk.three, "--blocks", "4:8")
    walk.gateway()
    until(walk.covered, "every block is covered")
    # A spare on the first machine chooses for itself what it hosts; one machine can hold all of this model.
    spare, _ = walk.join(walk.one)
    until(lambda: len(walk.status()["servers"]) == 3, "the gateway knows the spare")

    # The admin dies, then a server in the middle of an answer: the words are those of the whole model.
    walk.admin.kill()
    answer = walk.generate()
    until(lambda: walk.status()["driver"]["running"], "the answer has begun")
    dead.kill()
    walk.check(answer, reference)

    # The admin is back. A token is good once, a server that is asked leaves in the middle of another answer, and one
    # that is thrown out is gone within seconds.
    walk.start_admin()
    used = json.loads(walk.two.run("join", token, "--serve", str(DEMO), "--name", "again", "--json", code=4))
    assert used["error"]["code"] == "refused"
    answer = walk.generate()
    until(lambda: walk.status()["driver"]["running"], "the answer has begun")
    walk.one.run("drain", told["id"][:8], "--json")
    assert leaving.popen.wait(PATIENCE_S) == 0
    walk.check(answer, reference)

    (left,) = walk.status()["servers"]
    walk.one.run("revoke", left["id"], "--json")
    until(lambda: not walk.status()["servers"], "the removed server is out of the registry")
    refused = json.loads(walk.one.run("generate", "--prompt", PROMPT, *walk.api, "--json", code=3))
    assert refused["error"]["code"] == "swarm_incomplete"
    spare.kill()
