"""Servers that lie, among real ones in the same event loop: who is caught, who is left alone, who sees what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cheats import OtherAnswers, OtherWeights
from support.inprocess import GREEDY, InProcess
from support.networks import certified, identity, run
from transformers import PreTrainedModel

from shoal.bench.cheats import ANSWERS, WEIGHTS
from shoal.client import checks
from shoal.client.checks import CheckConfig
from shoal.client.driver import DriverConfig
from shoal.compute.families import random_model
from shoal.errors import SwarmIncomplete
from shoal.net.memory import MemoryTransport
from shoal.net.seed import Seed
from shoal.server.node import BlockServer
from shoal.swarm.honesty import Reputation
from shoal.swarm.session import SessionConfig
from shoal.swarm.trust import Zones
from shoal.wire.messages import WireType

PROMPT = list(range(3, 27))
COUNT = 16


def always(wire: WireType = "f32", **settings: Any) -> DriverConfig:
    """Every call is checked."""
    config = CheckConfig(**{"rate": 1.0, "patience_s": 0.2, **settings})
    return DriverConfig(wire=wire, session=SessionConfig(patience_s=1.0), checks=config)


def lying(kind: str, weights_dir: Path | None = None) -> Callable[..., BlockServer]:
    def make(*arguments: Any) -> BlockServer:
        if weights_dir is not None:
            other = OtherWeights(*arguments)
            other.weights_dir = weights_dir
            return other
        server = OtherAnswers(*arguments)
        server.kind = kind
        return server

    return make


@pytest.fixture(scope="session")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory with the model after one of the cheats of WEIGHTS."""

    def save(kind: str) -> Path:
        model: PreTrainedModel = random_model("llama", seed=3)
        with torch.no_grad():
            WEIGHTS[kind](model, 1)
        path = tmp_path_factory.mktemp("changed")
        model.save_pretrained(path)
        return path

    return save


async def calls(swarm: InProcess, until: Callable[[], bool], at_most: int = 40) -> int:
    """Make calls, each with its check, until something has happened; how many."""
    for count in range(1, at_most + 1):
        await swarm.tokens([count, *PROMPT], COUNT)
        await swarm.driver.checks.settled()
        if until():
            return count
    raise AssertionError(f"not in {at_most} calls: {[found.finding for found in swarm.found]} {swarm.dropped}")


class Hosts:
    """Who was given inputs."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    async def tokens(self, swarm: InProcess, prompt: list[int], count: int, zones: str = "") -> list[int]:
        items = swarm.driver.generate(
            prompt,
            GREEDY,
            max_tokens=count,
            zones=[Zones.parse(zones)],
            on_host=lambda node, blocks: self.told.append((node, str(blocks))),
        )
        return [item.token async for item in items if item is not None]


def banned(swarm: InProcess) -> list[str]:
    return [node for found in swarm.found for node in found.quarantined]


@pytest.mark.parametrize("kind", [*ANSWERS, "4-bit weights", "skipped block"])
def test_a_server_that_lies_is_found_by_the_third_and_gets_no_more_calls(
    model_dir: Path, changed: Callable[[str], Path], kind: str
) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always()) as swarm:
            honest = await swarm.add("0:6", "0:6")
            (liar,) = await swarm.add("0:6", make=lying(kind, changed(kind) if kind in WEIGHTS else None))
            await calls(swarm, lambda: bool(banned(swarm)))
            assert banned(swarm) == [liar]
            assert swarm.driver.reputation.standing(liar, asyncio.get_running_loop().time()).level == "quarantined"
            assert {found.finding.result for found in swarm.found} <= {"agreed", "caught", "witness"}
            hosts = Hosts()
            for _ in range(4):
                await hosts.tokens(swarm, PROMPT, 4)
            await swarm.driver.checks.settled()
            assert {node for node, _ in hosts.told} == set(honest)

    run(scenario)


def test_a_server_in_the_middle_of_a_chain_that_lies_is_heard_and_caught(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always()) as swarm:
            await swarm.add("0:2", "2:4", "4:6", "2:4", "0:2", "4:6")
            (liar,) = await swarm.add("2:4", make=lying("5 % noise"))
            await calls(swarm, lambda: bool(banned(swarm)), at_most=100)
            assert banned(swarm) == [liar]
            assert swarm.driver.reputation.results["disputed"] == 0

    run(scenario)


def test_a_server_that_lies_only_to_what_others_push_is_a_dispute_with_the_one_before_it(model_dir: Path) -> None:
    def make(*arguments: Any) -> BlockServer:
        server = OtherAnswers(*arguments)
        server.kind = "echoed input"
        server.only_when_pushed = True
        return server

    async def scenario() -> None:
        async with InProcess(model_dir, always()) as swarm:
            (first,) = await swarm.add("0:2")
            await swarm.add("2:4", "2:4", "4:6")
            (liar,) = await swarm.add("2:4", make=make)
            await calls(swarm, lambda: swarm.driver.reputation.results["disputed"] >= 2, at_most=100)
            assert banned(swarm) == []
            now = asyncio.get_running_loop().time()
            assert {
                node for node in swarm.servers if swarm.driver.reputation.standing(node, now).level == "suspected"
            } == {first, liar}

    run(scenario)


def test_honest_servers_of_different_precision_agree_over_every_format(model_dir: Path) -> None:
    async def scenario(wire: WireType) -> None:
        async with InProcess(model_dir, always(wire)) as swarm:
            await swarm.add("0:3", "3:6", "0:3", "3:6")
            await swarm.add("0:3", "3:6", dtype=torch.bfloat16)
            for count in range(12):
                await swarm.tokens([count, *PROMPT], COUNT)
                await swarm.driver.checks.settled()
            assert set(swarm.driver.reputation.results) <= {"agreed"}
            assert len(swarm.found) >= 10
            assert all(found.comparison.median < 0.7 for found in swarm.found)

    for wire in ("f32", "bf16", "int8"):
        run(lambda wire=wire: scenario(wire))


def test_two_servers_alone_cannot_be_told_apart_and_nobody_is_banned(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always()) as swarm:
            await swarm.add("0:6")
            await swarm.add("0:6", make=lying("random answer"))
            await calls(swarm, lambda: swarm.driver.reputation.results["disputed"] >= 4)
            assert banned(swarm) == []
            assert swarm.driver.checks.statistics()["uncompared"] == []

    run(scenario)


def test_a_lone_server_is_not_watched_and_status_says_that_nothing_can_be_compared(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always()) as swarm:
            await swarm.add("0:6")
            await swarm.tokens(PROMPT, COUNT)
            assert swarm.dropped == ["alone"]
            assert swarm.driver.checks.statistics()["uncompared"] == ["0:6"]
            assert swarm.driver.checks.statistics()["replayed_rows"] == 0

    run(scenario)


def test_a_witness_must_be_allowed_to_see_the_call_and_stands_in_its_record(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always(), labels=["hq"]) as swarm:
            labelled = await swarm.add("0:6", "0:6", labels=["hq"])
            strangers = await swarm.add("0:6", "0:6", "0:6")
            hosts = Hosts()
            for _ in range(6):
                await hosts.tokens(swarm, PROMPT, COUNT, zones="all=hq")
                await swarm.driver.checks.settled()
            assert swarm.driver.reputation.results == {"agreed": 6}
            assert len(hosts.told) == 12
            assert {node for node, _ in hosts.told} == set(labelled)
            for node in strangers:
                serving = swarm.servers[node].server._serving
                assert serving is not None
                assert serving.counters.rows == 0
            only = Hosts()
            swarm.servers[labelled[1]].server.stop()
            while sum(record.state == "online" for record in live(swarm)) > 4:
                await asyncio.sleep(0.02)
            await only.tokens(swarm, PROMPT, COUNT, zones="all=hq")
            await swarm.driver.checks.settled()
            assert only.told == [(labelled[0], "0:6")]
            assert swarm.dropped == ["alone"]

    run(scenario)


def live(swarm: InProcess) -> list[Any]:
    return swarm._seed.directory.live()


def test_a_call_that_was_cut_off_or_rebuilt_is_checked_as_far_as_it_came(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always()) as swarm:
            await swarm.add("0:6", "0:6", "0:6")
            chosen = 0
            items = swarm.driver.generate(PROMPT, GREEDY, max_tokens=40)
            async for item in items:
                chosen += item is not None
                if chosen == 10:
                    swarm.unplug(swarm.driver.chain_in_use()[0])
                    break
            async for item in items:
                chosen += item is not None
            await swarm.driver.checks.settled()
            assert chosen == 40
            (found,) = swarm.found
            assert found.finding.result == "agreed"
            assert len(PROMPT) <= found.comparison.rows < len(PROMPT) + 39

    run(scenario)


def test_only_the_beginning_of_a_long_call_is_kept(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always(max_rows=100, step_rows=30)) as swarm:
            await swarm.add("0:3", "0:3", "3:6", "3:6")
            for _ in range(6):
                await swarm.tokens(list(range(3, 63)), 60)
                await swarm.driver.checks.settled()
            assert {found.comparison.rows for found in swarm.found} <= {100, 41}
            assert {found.replayed_rows for found in swarm.found} == {100}

    run(scenario)


def test_checks_that_cannot_wait_any_more_are_dropped(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always(waiting=1, watching=2)) as swarm:
            await swarm.add("0:6", "0:6")
            await asyncio.gather(*(swarm.tokens(PROMPT, COUNT) for _ in range(8)))
            await swarm.driver.checks.settled()
            assert swarm.dropped.count("busy") >= 6
            assert 1 <= len(swarm.found) <= 2

    run(scenario)


def test_a_call_for_which_only_servers_in_quarantine_are_left_says_so(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always()) as swarm:
            honest = await swarm.add("0:6", "0:6")
            await swarm.add("0:6", make=lying("echoed input"))
            await calls(swarm, lambda: bool(banned(swarm)))
            for node in honest:
                swarm.servers[node].server.stop()
            while sum(record.state == "online" for record in live(swarm)) > 1:
                await asyncio.sleep(0.02)
            with pytest.raises(SwarmIncomplete, match=r"blocks 0:6 of .* were found wrong and are in quarantine"):
                await swarm.tokens(PROMPT, 4)

    run(scenario)


def test_checks_cost_nothing_when_they_are_switched_off(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:6", "0:6")
            await swarm.tokens(PROMPT, COUNT)
            assert swarm.driver.sessions.observer is None
            assert swarm.driver.checks.statistics()["results"] == {}

    run(scenario)


def test_what_a_gateway_found_stands_in_its_record_until_the_quarantine_ends(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, always()) as swarm:
            swarm._seed.announce([])
            await swarm.add("0:6", "0:6")
            (liar,) = await swarm.add("0:6", make=lying("random answer"))
            await calls(swarm, lambda: bool(banned(swarm)))
            assert swarm.record(swarm._seed.directory.node).quarantined == [liar]
            monkeypatch.setattr(Reputation, "told", lambda self, now: [])
            monkeypatch.setattr(checks, "TELL_S", 0.05)
            await swarm.tokens(PROMPT, COUNT)
            while swarm.record(swarm._seed.directory.node).quarantined:
                await asyncio.sleep(0.02)

    run(scenario)


def test_a_server_that_other_gateways_name_gets_nothing_and_one_word_is_not_enough(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            swarm._seed.announce([])
            accused, other = await swarm.add("0:6", "0:6")
            own = swarm._seed.directory.node
            rounds = []
            for avoided in (set(), set(), {accused}):
                assert swarm.driver.reputation.avoid(live(swarm), own, 0.0) == avoided
                rounds.append(await named_by_another_gateway(swarm, accused))
            hosts = Hosts()
            for _ in range(20):
                await hosts.tokens(swarm, PROMPT, 1)
            assert {node for node, _ in hosts.told} == {other}
            for each in rounds:
                each.cancel()
            await asyncio.gather(*rounds, return_exceptions=True)

    run(scenario)


async def named_by_another_gateway(swarm: InProcess, node: str) -> asyncio.Task[None]:
    """One more gateway in the registry, whose record names `node`."""
    gateway = identity("gateway")
    seed = Seed(gateway)
    seed.announce([])
    seed.directory.update(quarantined=[node])
    transport = MemoryTransport(swarm._network, certified(gateway))
    rounds = asyncio.create_task(seed.directory.rounds(transport, (swarm._listener.address,)))
    while (record := swarm._seed.directory.view.get(gateway.peer.node)) is None or record.quarantined != [node]:
        await asyncio.sleep(0.01)
    return rounds
