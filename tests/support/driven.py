"""A swarm whose driver is in the test's own loop, for what cannot be done from outside a process: cutting one
connection, reading what goes over a link. Servers run in the same loop, or as processes beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from shoal.client.driver import Driver
from shoal.compute.facts import describe
from shoal.compute.head import HeadEngine
from shoal.compute.split import build_ends
from shoal.net.identity import NodeIdentity, create_ca, issue_node
from shoal.net.seed import Seed
from shoal.net.tls import TlsTransport
from shoal.net.transport import Address, Conn, Listener, OnConn
from shoal.net.worker import Worker
from shoal.server.node import BlockServer, ServerConfig
from shoal.spec.ids import BlockRange
from shoal.spec.sampling import SamplingParams
from shoal.swarm.session import Recovered
from shoal.wire.messages import Message
from support.networks import Relay
from support.swarm import DEMO, PATIENCE_S, Process


class Wire(TlsTransport):
    """A node's real transport, whose dialled connections also write down what is sent over them, and whose listener
    can be reached through a relay that can be cut."""

    def __init__(self, identity: NodeIdentity, *, relayed: bool = False) -> None:
        super().__init__(identity)
        self.sent: list[tuple[str, Message]] = []
        """(node, message) in the order of sending, of this node's dialled connections."""
        self.relay: Relay | None = None
        self._relayed = relayed

    async def listen(self, address: str, on_conn: OnConn) -> Listener:
        listener = await super().listen(address, on_conn)
        if not self._relayed:
            return listener
        self.relay = Relay(Address.parse(listener.address))
        return _Relayed(listener, await self.relay.start(), self.relay)

    async def dial(self, addresses: Iterable[str], *, expect_node: str | None = None, timeout_s: float = 5.0) -> Conn:
        conn = await super().dial(list(addresses), expect_node=expect_node, timeout_s=timeout_s)
        push = conn._send

        def written_down(message: Message, *rest: Any) -> None:
            self.sent.append((conn.peer.node, message))
            push(message, *rest)

        conn._send = written_down  # type: ignore[method-assign]
        return conn


class _Relayed:
    """A listener behind its relay."""

    def __init__(self, listener: Listener, address: str, relay: Relay) -> None:
        self.address = address
        self._listener = listener
        self._relay = relay

    async def close(self) -> None:
        await self._listener.close()
        await self._relay.close()


class Driven:
    """Use as an async context manager."""

    def __init__(self, folder: Path, *, model_dir: Path = DEMO) -> None:
        self.recovered: list[Recovered] = []
        self.wires: dict[str, Wire] = {}
        self._folder = folder
        self._model_dir = model_dir
        self._authority = create_ca("test")
        self._servers: dict[str, tuple[BlockServer, asyncio.Task[None]]] = {}
        self._processes: list[Process] = []

    async def __aenter__(self) -> Driven:
        identity = issue_node(self._authority, "gateway")
        self.wire = Wire(identity)
        self._seed = Seed(identity)
        self._listener = await self.wire.listen("tcp://127.0.0.1:0", self._seed.on_conn)
        self._worker = Worker("head", lambda: torch.set_num_threads(1))
        self.driver = Driver(
            describe(self._model_dir),
            HeadEngine(build_ends(self._model_dir, dtype=torch.float32)),
            node=identity.peer.node,
            transport=self.wire,
            directory=self._seed.directory,
            worker=self._worker,
            on_recovered=self.recovered.append,
        )
        self._seed.on_change = self.driver.view_changed
        self.driver.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.driver.close()
        self._worker.close()
        for process in self._processes:
            process.kill()
        for server, _ in self._servers.values():
            server.stop()
        await asyncio.gather(*(task for _, task in self._servers.values()))
        await self._listener.close()

    async def add(self, blocks: str, *, relayed: bool = False) -> str:
        """A server in this loop; its node id once it is online."""
        identity = issue_node(self._authority, "server")
        node = identity.peer.node
        wire = self.wires[node] = Wire(identity, relayed=relayed)
        config = ServerConfig(
            self._model_dir,
            "tcp://127.0.0.1:0",
            (self._listener.address,),
            blocks=BlockRange.parse(blocks),
            memory_bytes=1 << 30,
        )
        server = BlockServer(config, identity, wire)
        self._servers[node] = (server, asyncio.create_task(server.run(), name=f"server {blocks}"))
        await self._online(node)
        return node

    async def add_process(self, blocks: str, module: str = "shoal") -> str:
        """A server in a process of its own, run by `module`; its node id once it is online."""
        identity = issue_node(self._authority, "server")
        node = identity.peer.node
        folder = self._folder / "nodes" / node
        folder.mkdir(parents=True)
        identity.save(folder)
        self._processes.append(
            Process(
                self._folder,
                *(module, "server-process", "--swarm-dir", str(self._folder), "--node", node),
                *("--seed", self._listener.address, "--model", str(self._model_dir)),
                *("--blocks", blocks, "--memory", "1GiB"),
            )
        )
        await self._online(node)
        return node

    async def _online(self, node: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._seed.wait_for(
                lambda records: any(record.node == node and record.state == "online" for record in records)
            )

    async def generate(
        self, prompt: list[int], tokens: int, *, at: Callable[[int], None] = lambda produced: None
    ) -> list[int]:
        """Greedy tokens; `at` is called with how many there are so far, after each."""
        chosen: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            async for item in self.driver.generate(prompt, SamplingParams(temperature=0.0), max_tokens=tokens):
                if item is not None:
                    chosen.append(item.token)
                    at(len(chosen))
        return chosen
