"""A swarm as an organisation runs it: `shoal admin`, a gateway, and servers that joined with tokens, each a process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import openai

from support.machines import Machine, directories
from support.swarm import DEMO, PATIENCE_S, Process, until


class Organisation:
    """The first machine has the admin and the gateway, every other one a server. `admin_flags` go to `shoal admin`."""

    model = "demo"

    def __init__(self, folder: Path, *admin_flags: str, blocks: tuple[str, ...] = ("0:4", "4:8")) -> None:
        self.office, *self.machines = directories(folder, 1 + len(blocks))
        self.processes: list[Process] = []
        self.servers: dict[str, Process] = {}
        """Processes of the servers, by node id."""
        self._admin_flags = admin_flags
        try:
            self.told = json.loads(self.office.run("init", "--name", "bank", "--json"))
            self.home = Path(self.told["swarm_dir"])
            self._port = self.office.port()
            self.start_admin()
            for machine, span in zip(self.machines, blocks, strict=True):
                self.join(machine, span)
            key = json.loads(self.office.run("keys", "create", "tests", "--json"))["key"]
            gateway = self.start(
                self.office,
                *("gateway", "--serve", f"{self.model}={DEMO}", "--listen", "127.0.0.1:0", "--exact", "--json"),
            )
            self.gateway = gateway
            api = json.loads(gateway.line())["api"]
            self.http = httpx.Client(
                base_url=api, headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE_S, trust_env=False
            )
            self._api, self._key = api, key
            until(lambda: self.status()["covered"], "every block is covered")
        except BaseException:
            self.stop()
            raise

    def start(self, machine: Machine, *command: str) -> Process:
        process = machine.start("shoal", *command)
        self.processes.append(process)
        return process

    def start_admin(self) -> None:
        """`shoal admin`, ready; again at the same address after it was killed."""
        self.admin = self.start(
            self.office, "admin", "--listen", f"127.0.0.1:{self._port}", *self._admin_flags, "--json"
        )
        self.admin.line()

    def invite(self, role: str = "server", *flags: str) -> str:
        return str(json.loads(self.office.run("invite", "--role", role, *flags, "--json"))["token"])

    def join(self, machine: Machine, blocks: str, *flags: str, threads: str = "1") -> dict[str, Any]:
        """A server on this machine, online."""
        command = (
            "join",
            self.invite(),
            "--serve",
            str(DEMO),
            "--blocks",
            blocks,
            "--memory",
            "1GiB",
            "--threads",
            threads,
            "--json",
            *flags,
        )
        process = self.start(machine, *command)
        told = json.loads(process.line())
        self.servers[told["id"]] = process
        return dict(told)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self._api, api_key=self._key, max_retries=0, timeout=PATIENCE_S)

    def status(self) -> dict[str, Any]:
        return dict(self.http.get("/shoal/status").raise_for_status().json())

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.popen.poll() is None:
                process.signal(signal.SIGKILL)
            process.popen.communicate(timeout=PATIENCE_S)
