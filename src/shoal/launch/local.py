"""A private swarm on this machine: authority, certificates, one gateway, N spans of blocks with R servers each."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.admin.own import own_node
from shoal.errors import UsageError
from shoal.launch.children import Child, ChildFailed
from shoal.launch.state import is_running, state_dir
from shoal.manifest.files import make_private
from shoal.net.home import Home

START_TIMEOUT_S = 600.0
"""Loading a large model from a slow disk takes minutes; a process that fails says so long before."""
MEMORY_SHARE = 0.8
"""Of the memory available now, this much is offered by all servers together."""


@dataclass(frozen=True, slots=True)
class SwarmPlan:
    """What to start."""

    model_dir: Path
    model_name: str
    servers: int = 3
    replicas: int = 1
    api_port: int = 0
    dtype: str = "float32"
    wire: str = "f32"
    device: str = "cpu"
    memory_bytes: int | None = None
    """Each server's offer; None: an equal share of what is available."""
    cache_tokens: int | None = None
    exact: bool = False
    zones: str = ""
    """Trust zone for every request, as `swarm.trust.Zones` writes it."""
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Labels of nodes, by name: gateway, server-0, server-1, ..."""
    swarm_dir: Path | None = None
    """Kept when given; else a new private directory, removed at the end."""

    def __post_init__(self) -> None:
        if self.servers < 1 or self.replicas < 1:
            raise UsageError("A swarm needs at least one server and one replica.", hint="Use --servers 3 --replicas 1.")
        if unknown := set(self.labels) - {"gateway", *self.names}:
            raise UsageError(
                f"There is no node {sorted(unknown)[0]!r} to be labelled.",
                hint=f"The nodes are called gateway, {', '.join(self.names)}.",
            )

    @property
    def names(self) -> list[str]:
        """The servers' names."""
        return [f"server-{number}" for number in range(self.servers * self.replicas)]


@dataclass(frozen=True, slots=True)
class RunningServer:
    id: str
    pid: int
    blocks: str


class LocalSwarm:
    """Use as an async context manager: entering starts everything and waits until it answers, leaving stops it."""

    def __init__(self, plan: SwarmPlan, *, on_progress: Callable[[str], None] = lambda text: None) -> None:
        _check_spans(plan)
        if plan.api_port:
            _check_port(plan.api_port)
        self.plan = plan
        self.api = ""
        self.key = ""
        self.chat = False
        """The model has a chat template."""
        self.servers: list[RunningServer] = []
        self._progress = on_progress
        self._children: dict[str, Child] = {}
        self._told: set[str] = set()
        """Children whose end `ended` has told."""
        self._own_dir = plan.swarm_dir is None
        _sweep_keys(state_dir())
        self.swarm_dir = plan.swarm_dir or Path(tempfile.mkdtemp(prefix=f"swarm-{os.getpid()}-", dir=state_dir()))

    async def __aenter__(self) -> LocalSwarm:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._start()
        except TimeoutError:
            await self.stop(failed=True)
            raise ChildFailed(
                f"The swarm was not ready after {START_TIMEOUT_S:.0f} s.", hint=f"Logs are in {self.swarm_dir}/logs."
            ) from None
        except BaseException as error:
            # An interrupted start is no failure: nobody will look for its logs.
            await self.stop(failed=not isinstance(error, asyncio.CancelledError))
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.stop(failed=False)

    async def _start(self) -> None:
        plan = self.plan
        make_private(self.swarm_dir / "logs")
        home = Home(self.swarm_dir)
        if not home.exists:
            home = Home.create(self.swarm_dir, "local")
        own_node(home, "gateway", "gateway", labels=plan.labels.get("gateway", ()))
        identities = {name: own_node(home, name, "server", labels=plan.labels.get(name, ())) for name in plan.names}
        gateway = await self._child("gateway", ["gateway-process", *self._gateway_args()])
        seed = (await gateway.line())["swarm"]
        self._progress(f"gateway up at {seed}; starting {len(identities)} servers")
        for name in identities:
            await self._child(name, ["server-process", *self._server_args(name, seed)])
        names = {identity.peer.node: name for name, identity in identities.items()}
        lines = {name: asyncio.create_task(self._children[name].line()) for name in identities}
        ready = asyncio.create_task(gateway.line())
        try:
            await self._until_ready(ready, lines)
        finally:
            for task in (ready, *lines.values()):
                task.cancel()
            await asyncio.gather(ready, *lines.values(), return_exceptions=True)
        answer = ready.result()
        self.api, self.key, self.chat = answer["api"], answer["key"], answer["chat"]
        self.servers = [
            RunningServer(node, self._children[name].pid, lines[name].result()["blocks"])
            for node, name in names.items()
        ]
        self.servers.sort(key=lambda server: int(server.blocks.split(":")[0]))

    async def _until_ready(
        self, ready: asyncio.Task[dict[str, Any]], lines: dict[str, asyncio.Task[dict[str, Any]]]
    ) -> None:
        """Wait for the gateway and every server; the first one that fails raises."""
        waiting = {ready, *lines.values()}
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            for name, task in lines.items():
                if task in done:
                    self._progress(f"{name} hosts blocks {task.result()['blocks']}")

    async def _child(self, name: str, args: list[str]) -> Child:
        child = await Child.start(name, args, self.swarm_dir / "logs" / f"{name}.log")
        self._children[name] = child
        return child

    def _gateway_args(self) -> list[str]:
        plan = self.plan
        return [
            *("--swarm-dir", str(self.swarm_dir), "--model", str(plan.model_dir), "--name", plan.model_name),
            *("--servers", str(plan.servers), "--replicas", str(plan.replicas)),
            *("--port", str(plan.api_port), "--dtype", plan.dtype, "--wire", plan.wire, "--device", plan.device),
            *(["--exact"] if plan.exact else []),
            *(["--zones", plan.zones] if plan.zones else []),
        ]

    def _server_args(self, name: str, seed: str) -> list[str]:
        plan = self.plan
        share = int(available_memory() * MEMORY_SHARE) // (plan.servers * plan.replicas)
        args = [
            *("--swarm-dir", str(self.swarm_dir), "--node", name, "--seed", seed, "--model", str(plan.model_dir)),
            *("--dtype", plan.dtype, "--device", plan.device, "--memory", str(plan.memory_bytes or share)),
        ]
        if plan.cache_tokens is not None:
            args += ["--cache-tokens", str(plan.cache_tokens)]
        return [*args, "--exact"] if plan.exact else args

    async def ended(self) -> tuple[str, int]:
        """Wait until any process of the swarm ends: (its name, its exit code, negative for a signal). Every end is told
        once, also when several come together. At least one must be left to tell."""
        children = [child for name, child in self._children.items() if name not in self._told]
        waits = {asyncio.create_task(child.process.wait()): child for child in children}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        task = done.pop()
        self._told.add(waits[task].name)
        return waits[task].name, task.result()

    async def stop(self, *, failed: bool) -> None:
        """Stop the gateway, which closes every session, then the servers; after a failure only logs stay."""
        gateway = self._children.get("gateway")
        if gateway is not None:
            await gateway.stop(grace_s=8.0)
        servers = [child for name, child in self._children.items() if name != "gateway"]
        await asyncio.gather(*(child.stop(grace_s=5.0) for child in servers))
        if not self._own_dir:
            return
        if failed:
            _remove_keys(self.swarm_dir)
        else:
            shutil.rmtree(self.swarm_dir, ignore_errors=True)


def _sweep_keys(folder: Path) -> None:
    """Remove the keys of swarms whose `shoal up` was killed before it could; their logs stay."""
    for left in folder.glob("swarm-*-*"):
        pid = left.name.split("-")[1]
        if pid.isdigit() and not is_running(int(pid)):
            _remove_keys(left)


def _remove_keys(swarm_dir: Path) -> None:
    """Everything but the logs."""
    for part in ("ca", "nodes"):
        shutil.rmtree(swarm_dir / part, ignore_errors=True)
    for pattern in ("*.sqlite*", "swarm.json"):
        for path in swarm_dir.glob(pattern):
            path.unlink(missing_ok=True)


def _check_port(port: int) -> None:
    """Refuse a port that is taken before anything is started; the gateway binds it only when the swarm is complete."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"The API cannot listen on port {port} of this machine: {getattr(error, 'strerror', None) or error}.",
                hint="Stop the program that uses the port, or choose another port (0 takes any free one).",
            ) from error


def _check_spans(plan: SwarmPlan) -> None:
    """Refuse more spans than the model has blocks before that many processes are started.

    Only a look at the configuration. What is wrong with a file that cannot be read, and where a family may be cut, the
    gateway says."""
    try:
        config = json.loads((plan.model_dir / "config.json").read_text())
        blocks = config.get("num_hidden_layers") or config.get("text_config", {}).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(blocks, int) and plan.servers > blocks:
        raise UsageError(
            f"{plan.model_name} has {blocks} blocks, so it cannot be cut into {plan.servers} spans.",
            hint=f"Use --servers {blocks} or fewer; --replicas starts more servers for every span.",
        )


def available_memory() -> int:
    """Bytes of memory that new processes can use now."""
    try:
        with open("/proc/meminfo") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
