"""A whole swarm in one event loop: real block servers and a real driver over the memory transport, a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from shoal.client.checks import Found
from shoal.client.driver import Driver, DriverConfig
from shoal.compute.facts import describe
from shoal.compute.head import HeadEngine
from shoal.compute.split import build_ends
from shoal.net.identity import NodeIdentity, Role
from shoal.net.memory import MemoryNetwork, MemoryTransport
from shoal.net.seed import Seed
from shoal.net.transport import Conn, Transport
from shoal.net.worker import Worker
from shoal.server.node import BlockServer, ServerConfig
from shoal.spec.ids import BlockRange
from shoal.spec.sampling import Sampled, SamplingParams
from shoal.swarm.session import Recovered, SessionConfig
from shoal.wire.messages import Record
from support.networks import certified, identity

GREEDY = SamplingParams(temperature=0.0)
ANY_PORT = "tcp://127.0.0.1:0"

Make = Callable[[ServerConfig, NodeIdentity, Transport], BlockServer]


@dataclass
class Running:
    server: BlockServer
    task: asyncio.Task[None]

    @property
    def sessions(self) -> int:
        serving = self.server._serving
        assert serving is not None
        return serving.sessions


class InProcess:
    """Use as an async context manager, then `add` servers."""

    def __init__(self, model_dir: Path, config: DriverConfig | None = None, *, labels: Sequence[str] = ()) -> None:
        """`labels` are the driving gateway's."""
        self.recovered: list[Recovered] = []
        self.found: list[Found] = []
        self.dropped: list[str] = []
        self.servers: dict[str, Running] = {}
        self._model_dir = model_dir
        self._config = config or DriverConfig(session=SessionConfig(patience_s=1.0))
        self._labels = labels
        self._network = MemoryNetwork()

    async def __aenter__(self) -> InProcess:
        gateway = identity("gateway", labels=self._labels)
        transport = MemoryTransport(self._network, certified(gateway))
        self._seed = Seed(gateway)
        self._listener = await transport.listen(ANY_PORT, self._seed.on_conn)
        self._worker = Worker("head", lambda: torch.set_num_threads(1))
        self.driver = Driver(
            describe(self._model_dir),
            HeadEngine(build_ends(self._model_dir, dtype=torch.float32)),
            node=gateway.peer.node,
            transport=transport,
            directory=self._seed.directory,
            config=self._config,
            worker=self._worker,
            labels=gateway.peer.labels,
            on_recovered=self.recovered.append,
            on_found=self.found.append,
            on_dropped=self.dropped.append,
        )
        self._seed.on_change = self.driver.view_changed
        self.driver.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.driver.close()
        self._worker.close()
        for running in self.servers.values():
            running.server.stop()
        await asyncio.gather(*(running.task for running in self.servers.values()))
        await self._listener.close()

    async def add(
        self, *spans: str, cache_tokens: int = 1024, labels: Sequence[str] = (), make: Make = BlockServer, **fields: Any
    ) -> list[str]:
        """Start a server for each span "START:END", with `make`; their node ids, once all are online."""
        fields |= {"cache_tokens": cache_tokens, "labels": tuple(labels), "make": make}
        nodes = [self.start(blocks=BlockRange.parse(span), **fields) for span in spans]
        await self.states(dict.fromkeys(nodes, "online"))
        return nodes

    def start(self, labels: tuple[str, ...] = (), make: Make = BlockServer, **fields: Any) -> str:
        """Start a server with these fields of its ServerConfig; its node id."""
        server = identity("server", labels=labels)
        node = server.peer.node
        values: dict[str, Any] = {"memory_bytes": 1 << 28, "cache_tokens": 1024, "labels": server.peer.labels}
        config = ServerConfig(self._model_dir, ANY_PORT, (self._listener.address,), **(values | fields))
        running = make(config, server, MemoryTransport(self._network, certified(server)))
        self.servers[node] = Running(running, asyncio.create_task(running.run(), name=f"server {node}"))
        return node

    async def states(self, wanted: Mapping[str, str]) -> list[Record]:
        """Wait until these nodes are in these states; the registry then."""
        return await self._seed.wait_for(
            lambda records: wanted.items() <= {record.node: record.state for record in records}.items()
        )

    def record(self, node: str) -> Record:
        """What the registry says of a node."""
        found = self._seed.directory.view.get(node)
        assert found is not None
        return found

    async def dial(self, role: Role, node: str) -> Conn:
        """A connection of a new node of this role to a server."""
        transport = MemoryTransport(self._network, certified(identity(role)))
        return await transport.dial(self.record(node).addresses)

    def unplug(self, node: str) -> None:
        """Take a machine off the network: its connections break and nobody can reach it any more."""
        record = self._seed.directory.view.get(node)
        assert record is not None
        self._network.remove(record.addresses[0])
        for link in self._network.links_of(node):
            link.cut()

    async def tokens(self, prompt: Sequence[int], count: int, params: SamplingParams = GREEDY) -> list[int]:
        """The next tokens of a prompt."""
        return [choice.token for choice in await self.choices(prompt, count, params)]

    async def choices(self, prompt: Sequence[int], count: int, params: SamplingParams = GREEDY) -> list[Sampled]:
        items = self.driver.generate(prompt, params, max_tokens=count)
        return [item async for item in items if item is not None]
