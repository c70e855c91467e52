"""Three machines on one: each with directories of its own, and, where the tests run as root, with a network of its own.

Namespaces joined by a bridge are as near to separate hosts as one machine gets: own loopback, own addresses, own ports.
Without root the same walk runs over three directories and free ports on loopback.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.sources import REPOSITORY
from support.swarm import PATIENCE_S, Process

_NET = "10.177.43"
"""A private network that nothing else on a test machine should use."""


class Machine:
    """Where commands run: `prefix` enters its network, `address` is how the others reach it."""

    def __init__(self, folder: Path, address: str, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.address = address
        self._prefix = prefix
        folder.mkdir(parents=True)

    @property
    def environment(self) -> dict[str, str]:
        path = [str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {name: str(self.folder / name.lower()) for name in ("XDG_STATE_HOME", "XDG_DATA_HOME", "HOME")}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        return kept | own | {"PYTHONPATH": os.pathsep.join(path)}

    def port(self) -> int:
        """One that is free now. In a network of its own all are; on loopback the system names one."""
        if self._prefix:
            return 7700
        with socket.socket() as probe:
            probe.bind((self.address, 0))
            return int(probe.getsockname()[1])

    def start(self, *command: str) -> Process:
        """A shoal command that stays in the foreground."""
        return Process(self.folder, *command, prefix=self._prefix, environment=self.environment)

    def run(self, *command: str, code: int | None = 0) -> str:
        """What a shoal command prints; fails with its words when it ends with another exit code (None: any)."""
        done = subprocess.run(
            [*self._prefix, sys.executable, "-m", "shoal", *command],
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=self.folder,
            timeout=PATIENCE_S,
        )
        assert code is None or done.returncode == code, (
            f"{command} ended with {done.returncode}: {done.stdout}\n{done.stderr}"
        )
        return done.stdout


def may_make_networks() -> bool:
    """Whether this process may create network namespaces (root, and the tool is there)."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"shoal-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made


def directories(folder: Path, count: int) -> list[Machine]:
    """Machines that share this machine's loopback."""
    return [Machine(folder / f"machine-{number}", "127.0.0.1") for number in range(1, count + 1)]


@contextmanager
def namespaces(folder: Path, count: int) -> Iterator[list[Machine]]:
    """Machines with a network namespace each, joined by a bridge in one more namespace. Needs root."""
    names = [f"shoal-{os.getpid()}-{number}" for number in range(count + 1)]
    switch, hosts = names[0], names[1:]
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        machines = []
        for number, name in enumerate(hosts, 1):
            _ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", f"port{number}", "master", "bridge0", "up")
            _ip("-n", name, "address", "add", f"{_NET}.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            prefix = ("ip", "netns", "exec", name)
            machines.append(Machine(folder / f"machine-{number}", f"{_NET}.{number}", prefix))
        yield machines
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
