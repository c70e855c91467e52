"""A swarm as a user runs it: `shoal up` in a process of its own, its servers, and the openai client.

Nothing here sleeps for a fixed time: whatever has to happen is polled for, with a limit only against hanging.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai

from shoal.net.identity import Authority, issue_node
from support.sources import REPOSITORY

DEMO = REPOSITORY / "src" / "shoal" / "assets" / "demo"
PATIENCE_S = 90.0
"""Against hanging only; nothing is expected to take this long."""

T = TypeVar("T")


def until(look: Callable[[], T], what: str) -> T:
    """The first true answer of `look`. Fails, naming `what` was awaited, when there is none within PATIENCE_S."""
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}"
        pause.wait(0.01)
    return found


def is_running(pid: int) -> bool:
    """False for a process that has ended, also while nobody has asked for its exit code."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def command_of(pid: int) -> list[str]:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def children_of(pid: int) -> set[int]:
    """Every process below `pid`, however deep."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= {child} | children_of(child)
    return found


class Process:
    """A shoal command in a process of its own, its stderr in a file, its private state in `folder`."""

    def __init__(
        self,
        folder: Path,
        *command: str,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`prefix` is a command that runs it somewhere else (another network namespace)."""
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{command[-1 if len(command) == 1 else 0]}.{time.monotonic_ns()}.log"
        path = [str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [*prefix, sys.executable, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment or os.environ | {"XDG_STATE_HOME": str(folder), "PYTHONPATH": os.pathsep.join(path)},
                cwd=folder,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def line(self) -> str:
        """Its next line on stdout; fails with its log when none comes."""
        assert self.popen.stdout is not None
        readable, _, _ = select.select([self.popen.stdout], [], [], PATIENCE_S)
        line = self.popen.stdout.readline() if readable else b""
        assert line, f"no line from {self.popen.args}; its log says:\n{self.log.read_text()}"
        return line.decode()

    def rest(self) -> str:
        """Everything else it prints until it has ended by itself."""
        self.popen.wait(PATIENCE_S)  # before its standard input is closed, which tells a server to stop
        return self.popen.communicate(timeout=PATIENCE_S)[0].decode()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, wherever it stands; waits for its end."""
        self.popen.kill()
        self.popen.communicate(timeout=PATIENCE_S)


class Swarm:
    """`shoal up` on the demo model. Servers that a test takes away are replaced by `repair`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.up = Process(folder, "shoal", "up", "--json", "--swarm-dir", str(folder / "swarm"), *flags)
        self._folder = folder
        self._joined: list[Process] = []
        try:
            self.told: dict[str, Any] = json.loads(self.up.line())
        except BaseException:
            self.up.kill()
            raise
        self.api, self.key, self.model = self.told["api"], self.told["key"], self.told["model"]
        self.dir = Path(self.told["swarm_dir"])
        self.http = httpx.Client(
            base_url=self.api, headers={"authorization": f"Bearer {self.key}"}, timeout=PATIENCE_S, trust_env=False
        )
        self._command = command_of(self.told["servers"][0]["pid"])
        self.seed = self._command[self._command.index("--seed") + 1]
        self._places = sorted(server["blocks"] for server in self.told["servers"])

    def client(self) -> openai.OpenAI:
        """The real client, without retries of its own."""
        return openai.OpenAI(base_url=self.api, api_key=self.key, max_retries=0, timeout=PATIENCE_S)

    def status(self) -> dict[str, Any]:
        return self.http.get("/shoal/status").raise_for_status().json()

    def servers(self, stage: int | None = None) -> list[dict[str, Any]]:
        """Servers that are up, of one stage (0: the first blocks) or of all."""
        spans = sorted(set(self._places), key=lambda blocks: int(blocks.split(":")[0]))
        wanted = set(spans if stage is None else spans[stage : stage + 1])
        return [
            server
            for server in self.status()["servers"]
            if server["state"] == "online" and server["blocks"] in wanted and is_running(server["pid"])
        ]

    def busy(self, stage: int, *, sessions: int = 1) -> dict[str, Any]:
        """Waits until `sessions` sessions go through the servers of a stage; the server that has most of them."""

        def look() -> dict[str, Any] | None:
            servers = self.servers(stage)
            if sum(server["driven"] for server in servers) < sessions:
                return None
            return max(servers, key=lambda server: server["driven"])

        found = until(look, f"{sessions} sessions at stage {stage}")
        assert found is not None
        return found

    def join(self, blocks: str, module: str = "shoal") -> Process:
        """One more server, started with the command line of those that `up` starts, but with a certificate of its own
        and told which blocks to host; `module` runs it."""
        identity = issue_node(Authority.load(self.dir / "ca"), "server")
        node = f"joined-{len(self._joined)}"
        (self.dir / "nodes" / node).mkdir()
        identity.save(self.dir / "nodes" / node)
        command = [module, *self._command[self._command.index("-m") + 2 :]]
        command[command.index("--node") + 1] = node
        process = Process(self._folder, *command, "--blocks", blocks)
        self._joined.append(process)
        return process

    def repair(self) -> None:
        """Wait until nothing of an earlier test is under way, and every place is taken by a live server again."""
        missing = list(self._places)
        for server in self.servers():
            if server["blocks"] in missing:
                missing.remove(server["blocks"])
        for process in [self.join(blocks) for blocks in missing]:
            process.line()

        def whole() -> bool:
            status = self.status()
            servers = self.servers()
            return (
                sorted(server["blocks"] for server in servers) == self._places
                and len(status["servers"]) == len(servers)
                and not any(server["sessions"] for server in servers)
                and not status["driver"]["running"]
            )

        until(whole, "the swarm is whole and idle")

    def failovers(self) -> dict[str, int]:
        """How often a lost server was replaced so far, by cause."""
        return dict(self.status()["driver"]["failovers"])

    def stop(self) -> None:
        self.http.close()
        if self.up.popen.poll() is None:
            self.up.signal(signal.SIGTERM)
        self.up.rest()
        for process in self._joined:
            process.kill()


@dataclass(frozen=True)
class Ask:
    """What to ask of the completions endpoint."""

    prompt: str
    tokens: int
    options: tuple[tuple[str, Any], ...] = (("temperature", 0),)


class Answer:
    """One streamed completion, read in a thread of its own."""

    def __init__(self, swarm: Swarm, ask: Ask) -> None:
        self.ask = ask
        self.chunks: list[str] = []
        self.finish_reason: str | None = None
        self.error: openai.APIError | None = None
        self._swarm = swarm
        self._thread = threading.Thread(target=self._read, name=f"answer to {ask.prompt!r}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with (
                self._swarm.client() as client,
                client.completions.create(
                    model=self._swarm.model,
                    prompt=self.ask.prompt,
                    max_tokens=self.ask.tokens,
                    stream=True,
                    extra_body={"ignore_eos": True},
                    **dict(self.ask.options),
                ) as stream,
            ):
                for chunk in stream:
                    choice = chunk.choices[0]
                    if choice.finish_reason is not None:
                        self.finish_reason = choice.finish_reason
                    self.chunks.append(choice.text)
        except openai.APIError as error:
            self.error = error

    def begun(self) -> Answer:
        """Waits for the first tokens."""
        until(lambda: len(self.chunks) >= 3 or not self._thread.is_alive(), "the first tokens")
        assert self._thread.is_alive() or self.error is None, self.error
        return self

    def end(self) -> Answer:
        """Waits for the end, good or bad."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), f"still no end after {PATIENCE_S:.0f} s and {len(self.chunks)} chunks"
        return self

    def text(self) -> str:
        """The whole text; fails when the stream ended with an error or early."""
        self.end()
        assert self.error is None, f"after {len(self.chunks)} chunks: {self.error}"
        assert self.finish_reason == "length"
        return "".join(self.chunks)


def answers(swarm: Swarm, asks: Sequence[Ask]) -> list[str]:
    """The texts of several answers, generated at the same time."""
    return [answer.text() for answer in [Answer(swarm, ask) for ask in asks]]
