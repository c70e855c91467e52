"""A machine that computes with other weights than it says, in processes of its own: found, named, avoided."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.machines import Machine, directories
from support.swarm import DEMO, Process, until

from shoal.compute.fingerprint import SAMPLE_BYTES, SAMPLES, fingerprint

pytestmark = pytest.mark.slow


def forged(folder: Path) -> Path:
    """The demo model with one block that adds nothing, under the same name and fingerprint."""
    copy = folder / DEMO.name
    shutil.copytree(DEMO, copy)
    (file,) = copy.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    looked_at = [begin + (len(data) - begin) * sample // SAMPLES for sample in range(SAMPLES)]
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        start, end = (begin + offset for offset in header[f"model.layers.3.{part}.weight"]["data_offsets"])
        kept = [(at, bytes(data[at : at + SAMPLE_BYTES])) for at in looked_at]
        data[start:end] = bytes(end - start)
        for at, sample in kept:
            data[at : at + SAMPLE_BYTES] = sample
    file.write_bytes(data)
    assert fingerprint(copy) == fingerprint(DEMO)
    return copy


class Swarm:
    """An admin, a gateway that checks every call, and three servers of all blocks, the last of which lies."""

    def __init__(self, machines: list[Machine], lies: Path) -> None:
        self.one, *others = machines
        self.processes: list[Process] = []
        self.one.run("init", "--name", "bank")
        self.start(self.one, "admin", "--listen", f"{self.one.address}:{self.one.port()}", "--json").line()
        self.nodes = [self.join(machine, DEMO) for machine in others[:2]]
        self.liar_at = others[2]
        self.liar = self.join(self.liar_at, lies)
        key = json.loads(self.one.run("keys", "create", "alice", "--json"))["key"]
        options = ("--serve", f"demo={DEMO}", "--listen", "127.0.0.1:0", "--checks", "1.0", "--json")
        self.api = ["--api", json.loads(self.start(self.one, "gateway", *options).line())["api"], "--key", key]

    def start(self, machine: Machine, *command: str) -> Process:
        process = machine.start("shoal", *command)
        self.processes.append(process)
        return process

    def join(self, machine: Machine, model: Path) -> str:
        token = str(json.loads(self.one.run("invite", "--role", "server", "--json"))["token"])
        options = ("--serve", str(model), "--blocks", "0:8", "--memory", "1GiB", "--threads", "1", "--json")
        told = json.loads(self.start(machine, "join", token, *options).line())
        assert "error" not in told, told
        return str(told["id"])

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.one.run("status", *self.api, "--json", code=None)))

    def levels(self) -> dict[str, str]:
        return {server["id"]: server["honesty"]["level"] for server in self.status()["servers"]}

    def call(self) -> None:
        self.one.run("generate", "--prompt", "In SQLite, a", "--max-tokens", "24", *self.api, "--json")

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    swarm = Swarm(directories(tmp_path, 4), forged(tmp_path))
    try:
        yield swarm
    finally:
        swarm.stop()


def test_a_machine_with_a_forged_model_is_found_and_gets_nothing_more(swarm: Swarm) -> None:
    until(lambda: len(swarm.levels()) == 3, "the gateway knows all servers")

    def found() -> bool:
        swarm.call()
        return swarm.levels()[swarm.liar] == "quarantined"

    until(found, "the liar is in quarantine")
    assert [swarm.levels()[node] for node in swarm.nodes] == ["clear", "clear"]
    words = swarm.one.run("status", *swarm.api, "--explain")
    assert f"server {swarm.liar[:8]} was found wrong and gets nothing" in words
    assert f"{swarm.liar[:8]} gets nothing for 4.0 h more" in words
    shown = swarm.one.run("audit", "show", "--json")
    assert '"quarantine"' in shown
    assert swarm.liar in shown
