"""What `shoal up` and `shoal gateway` run: one driver for each model, all behind one HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.client.served import SwarmModel
    from shoal.compute.facts import ModelFacts
    from shoal.gateway.audit import Audit
    from shoal.gateway.metrics import Metrics
    from shoal.gateway.server import TlsFiles
    from shoal.manifest.writer import AuditWriter
    from shoal.net.seed import Seed
    from shoal.net.tls import TlsTransport
    from shoal.net.worker import Worker
    from shoal.swarm.honesty import Reputation
    from shoal.swarm.trust import Zones
    from shoal.wire.messages import WireType

STREAMS_END_S = 3.0
"""Running answers that end by themselves within this time of a stop are whole; the others are told that they are not.
Well below what `shoal up` grants a stopping gateway (launch/local.py): one that was killed can tell nobody."""

Place = Callable[["ModelFacts"], Awaitable[list[str]]]
"""place(facts) -> why the blocks lie where they lie, once every server has been given its own."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that the gateway answers for: its name in the API, and the directory with its tokenizer and both ends."""

    name: str
    model_dir: Path
    zones: tuple[Zones, ...] = ()
    """Trust zones for every request to this model."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a gateway answers, where, and how it computes its part of the models."""

    home: Path
    """The directory with the API keys (accounts.sqlite)."""
    offers: tuple[Offer, ...]
    host: str = "127.0.0.1"
    port: int = 0
    tls: TlsFiles | None = None
    hosts: tuple[str, ...] = ()
    """Names, besides the loopback ones, by which the API may be addressed."""
    origins: tuple[str, ...] = ()
    """Web origins whose pages may read the API's answers."""
    dtype: str = "float32"
    wire: WireType = "f32"
    device: str = "cpu"
    exact: bool = False
    checks: float = 0.02
    """Share of every server's calls that are computed again on another one."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One model at work."""

    model: SwarmModel
    worker: Worker

    async def close(self) -> None:
        await self.model.close()
        self.worker.close()


async def answer(
    plan: Plan,
    seed: Seed,
    transport: TlsTransport,
    node: str,
    announce: Callable[[str, dict[str, SwarmModel]], None],
    *,
    place: Place | None = None,
) -> None:
    """Answer HTTP until cancelled. With `place`, not before every block of every model is hosted.

    `announce(url, models)` is called once requests are taken.
    """
    import gc

    from shoal.gateway.accounts import Accounts
    from shoal.gateway.app import create_app
    from shoal.gateway.audit import Audit
    from shoal.gateway.limits import Limits
    from shoal.gateway.metrics import Metrics
    from shoal.gateway.server import serve
    from shoal.swarm.honesty import Reputation

    metrics = Metrics()
    reputation = Reputation()
    parts: list[_Part] = []
    accounts = Accounts(plan.home / "accounts.sqlite")
    writer = _audit_writer(plan, seed, transport)
    audit = Audit(writer)
    try:
        for offer in plan.offers:
            parts.append(await _start(plan, offer, seed, transport, node, metrics, place, audit, reputation))
        models = {part.model.name: part.model for part in parts}

        def view_changed() -> None:
            for model in models.values():
                model.view_changed()

        seed.on_change = view_changed
        if place is not None:
            await seed.wait_for(lambda records: not any(model.missing() for model in models.values()))
        app = create_app(models, accounts, metrics=metrics, hosts=plan.hosts, origins=plan.origins, audit=audit)
        limits = Limits(shutdown_s=STREAMS_END_S)
        async with serve(app, plan.host, plan.port, limits=limits, tls=plan.tls) as listening:
            gc.freeze()  # as in server_process.py
            announce(listening.url, models)
            await asyncio.Event().wait()  # until cancelled
    finally:
        for part in parts:
            await part.close()
        accounts.close()
        writer.close()


def _audit_writer(plan: Plan, seed: Seed, transport: TlsTransport) -> AuditWriter:
    """The writer of this home's audit log. Where the log stands is in this gateway's own record: others remember it."""
    from shoal.manifest.chain import Head
    from shoal.manifest.writer import AuditWriter
    from shoal.net.auditing import audit_log
    from shoal.net.home import Home
    from shoal.wire.messages import AuditHead

    loop, directory = asyncio.get_running_loop(), seed.directory
    log = audit_log(Home(plan.home), transport.identity, now=lambda: transport.identity)

    def told(head: Head | None) -> AuditHead | None:
        return None if head is None else AuditHead(head.seq, head.hash)

    def on_head(head: Head) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody is left to be told
            loop.call_soon_threadsafe(lambda: directory.update(audit=told(head)))

    if directory.record is None:
        seed.announce([])
    directory.update(audit=told(log.head))
    return AuditWriter(log, on_head=on_head)


async def _start(
    plan: Plan,
    offer: Offer,
    seed: Seed,
    transport: TlsTransport,
    node: str,
    metrics: Metrics,
    place: Place | None,
    audit: Audit,
    reputation: Reputation,
) -> _Part:
    """Load both ends of a model and drive it."""
    from functools import partial

    import torch

    from shoal.client.checks import CheckConfig, Found
    from shoal.client.driver import Driver, DriverConfig
    from shoal.client.served import SwarmModel, load_tokenizer, read_pooling
    from shoal.compute.facts import describe
    from shoal.compute.head import HeadEngine
    from shoal.compute.split import build_ends
    from shoal.gateway.audit import note_check
    from shoal.net.worker import Worker

    def on_found(found: Found) -> None:
        metrics.spotcheck(found.finding.result)
        note_check(audit, offer.name, found)

    worker = Worker(f"head of {offer.name}", partial(torch.set_num_threads, 1))
    dtype: torch.dtype = getattr(torch, plan.dtype)
    facts = await worker.call(describe, offer.model_dir)
    tokenizer = await worker.call(load_tokenizer, offer.model_dir)
    placing = None if place is None else asyncio.ensure_future(place(facts))
    ends = await worker.call(lambda: build_ends(offer.model_dir, dtype=dtype, device=plan.device))
    driver = Driver(
        facts,
        HeadEngine(ends, exact=plan.exact),
        node=node,
        transport=transport,
        directory=seed.directory,
        config=DriverConfig(wire=plan.wire, checks=CheckConfig(rate=plan.checks)),
        worker=worker,
        labels=transport.identity.peer.labels,
        reputation=reputation,
        on_recovered=lambda recovered: metrics.failover(recovered.cause),
        on_found=on_found,
        on_dropped=metrics.spotcheck,
    )
    driver.start()
    reasons = [] if placing is None else await placing
    model = SwarmModel(
        offer.name,
        driver,
        seed.directory,
        tokenizer,
        eos_ids=ends.eos_ids,
        placement=reasons,
        zones=offer.zones,
        labels=transport.identity.peer.labels,
        pooling=read_pooling(offer.model_dir),
    )
    return _Part(model, worker)
