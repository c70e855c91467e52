"""Generations under a trust zone, over real block servers in one event loop: who is given inputs, and who never is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from support.inprocess import GREEDY, InProcess
from support.networks import run

from shoal.errors import PolicyUnmet
from shoal.spec.ids import BlockRange
from shoal.swarm.trust import Zones

PROMPT = [5, 9, 2, 77]
COUNT = 12


class Hosts:
    """Who was given inputs of one request, as "node blocks"."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def __call__(self, node: str, blocks: BlockRange) -> None:
        self.told.append((node, str(blocks)))


async def tokens(swarm: InProcess, policy: str, hosts: Hosts, lose_at: int | None = None) -> list[int]:
    """The answer under `policy`; the first server of the chain vanishes after `lose_at` tokens."""
    chosen: list[int] = []
    items = swarm.driver.generate(
        PROMPT, GREEDY, max_tokens=COUNT, zones=[Zones.parse(policy)], on_host=hosts, request_id="r"
    )
    async for item in items:
        if item is not None:
            chosen.append(item.token)
        if len(chosen) == lose_at:
            swarm.unplug(swarm.driver.chain_in_use()[0])
            lose_at = None
    return chosen


def test_a_zone_sends_the_ends_to_labelled_servers_and_says_who_computed_what(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            (fast,) = await swarm.add("0:6")
            first, last = await swarm.add("0:3", "3:6", labels=["hq"])
            hosts = Hosts()
            answer = await tokens(swarm, "first=1:hq,last=1:hq", hosts)
            assert answer == await swarm.tokens(PROMPT, COUNT)
            ends = dict(hosts.told)
            assert set(ends) <= {fast, first, last}
            assert fast not in ends or ends[fast] == "1:5"
            assert first in ends
            assert last in ends

    run(scenario)


def test_a_replan_stays_in_the_zone_and_the_new_server_is_told_of(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:6")
            labelled = [*await swarm.add("0:6", labels=["hq"]), *await swarm.add("0:6", labels=["hq", "x"])]
            hosts = Hosts()
            with pytest.raises(PolicyUnmet, match="this gateway does not carry the label hq"):
                await tokens(swarm, "all=hq", hosts)
            answer = await tokens(swarm, "first=6:hq", hosts, lose_at=5)
            assert sorted(hosts.told) == sorted((node, "0:6") for node in labelled)
            assert len(answer) == COUNT
            assert len(swarm.recovered) == 1

    run(scenario)


def test_without_a_server_that_may_nobody_is_asked(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, labels=["hq"]) as swarm:
            await swarm.add("0:6")
            hosts = Hosts()
            with pytest.raises(PolicyUnmet, match="no live server of blocks 0:6"):
                await tokens(swarm, "all=hq", hosts)
            assert hosts.told == []
            assert swarm.driver.sessions.counters.opened == 0

    run(scenario)


def test_a_loss_that_the_zone_leaves_no_replacement_for_ends_the_answer_with_the_policy(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, labels=["hq"]) as swarm:
            await swarm.add("0:6", labels=["hq"])
            await swarm.add("0:6")
            hosts = Hosts()
            with pytest.raises(PolicyUnmet):
                await tokens(swarm, "all=hq", hosts, lose_at=3)
            assert len(hosts.told) == 1

    run(scenario)


def test_a_server_that_loses_its_label_loses_the_sessions_that_need_it(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir, labels=["hq"]) as swarm:
            one, two = await swarm.add("0:6", "0:6", labels=["hq"])
            hosts = Hosts()
            chosen = 0
            async for item in swarm.driver.generate(
                PROMPT, GREEDY, max_tokens=40, zones=[Zones.parse("all=hq")], on_host=hosts
            ):
                chosen += item is not None
                if chosen == 5 and len(hosts.told) == 1:
                    using = swarm.servers[swarm.driver.chain_in_use()[0]].server
                    record = using._directory.record
                    assert record is not None
                    using._directory.publish(msgspec.structs.replace(record, version=record.version + 1, labels=[]))
                    while len(hosts.told) == 1:
                        await asyncio.sleep(0.005)
            assert sorted(hosts.told) == sorted([(one, "0:6"), (two, "0:6")])
            assert chosen == 40
            assert swarm.recovered[0].cause == "label"

    run(scenario)
