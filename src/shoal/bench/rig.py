"""A swarm for measuring: real block servers as child processes, the driver in this process, no HTTP in between."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from shoal.client.driver import Driver, DriverConfig
from shoal.compute.facts import describe
from shoal.compute.head import HeadEngine
from shoal.compute.split import build_ends
from shoal.launch.children import Child
from shoal.net.identity import create_ca, issue_node
from shoal.net.seed import Seed
from shoal.net.tls import TlsListener, TlsTransport
from shoal.net.worker import Worker
from shoal.spec.ids import BlockRange
from shoal.swarm.session import Recovered

_WIRES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Rig:
    """Use as an async context manager; `add` starts servers, `driver` generates over them."""

    def __init__(self, model_dir: Path, work_dir: Path, *, dtype: torch.dtype, memory: str = "6GiB") -> None:
        self.model_dir = model_dir
        self.dtype = dtype
        self.facts = describe(model_dir)
        self.recovered: list[Recovered] = []
        self.children: dict[str, Child] = {}
        self._dir = work_dir
        self._memory = memory
        self._authority = create_ca("bench")

    async def __aenter__(self) -> Rig:
        identity = issue_node(self._authority, "gateway")
        transport = TlsTransport(identity)
        self.seed = Seed(identity)
        self._listener: TlsListener = await transport.listen("tcp://127.0.0.1:0", self.seed.on_conn)
        self._worker = Worker("head", partial(torch.set_num_threads, 1))
        self.driver = Driver(
            self.facts,
            HeadEngine(build_ends(self.model_dir, dtype=self.dtype)),
            node=identity.peer.node,
            transport=transport,
            directory=self.seed.directory,
            config=DriverConfig(wire=_WIRES[self.dtype]),  # type: ignore[arg-type]
            worker=self._worker,
            on_recovered=self.recovered.append,
        )
        self.seed.on_change = self.driver.view_changed
        self.driver.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.driver.close()
        self._worker.close()
        await asyncio.gather(*(child.stop(grace_s=3.0) for child in self.children.values()))
        await self._listener.close()

    async def add(self, *spans: str, options: Sequence[str] = ()) -> list[str]:
        """Start one server for each span "START:END", with further `options` of server-process, and wait until all are
        online; returns their node ids."""
        nodes: list[str] = []
        for span in spans:
            identity = issue_node(self._authority, "server")
            node = identity.peer.node
            folder = self._dir / "nodes" / node
            folder.mkdir(parents=True)
            identity.save(folder)
            self.children[node] = await Child.start(
                node,
                [
                    "server-process",
                    *("--swarm-dir", str(self._dir), "--node", node, "--seed", self._listener.address),
                    *("--model", str(self.model_dir), "--blocks", str(BlockRange.parse(span))),
                    *("--dtype", str(self.dtype).removeprefix("torch."), "--memory", self._memory),
                    *options,
                ],
                self._dir / f"{node}.log",
            )
            nodes.append(node)
        await asyncio.gather(*(self.children[node].line() for node in nodes))
        await self.seed.wait_for(
            lambda records: set(nodes) <= {record.node for record in records if record.state == "online"}
        )
        return nodes

    async def remove(self, *nodes: str) -> None:
        """Stop servers politely."""
        await asyncio.gather(*(self.children.pop(node).stop(grace_s=3.0) for node in nodes))

    def kill(self, node: str) -> str:
        """SIGKILL; returns the blocks that died."""
        record = self.seed.directory.view.get(node)
        assert record is not None
        assert record.span is not None
        os.kill(self.children.pop(node).pid, signal.SIGKILL)
        return f"{record.span.start}:{record.span.end}"

    def in_use(self) -> list[str]:
        """Nodes of the chain of the only running session, in order."""
        return self.driver.chain_in_use()
