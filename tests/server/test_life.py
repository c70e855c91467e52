"""A server's life: it takes a place by itself, leaves it for a better one or for its machine's owner, and is drained;
whoever is in the middle of an answer notices nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.inprocess import InProcess
from support.networks import certified, identity, run

from shoal.compute.facts import describe
from shoal.compute.families import random_model
from shoal.errors import ModelError, NoSuchNode, ShoalError, UsageError
from shoal.net import draining
from shoal.net.memory import MemoryTransport
from shoal.server import node as server_node
from shoal.spec.ids import BlockRange
from shoal.swarm import gossip
from shoal.swarm.balance import BalanceConfig
from shoal.swarm.neighbour import NeighbourConfig, Sample
from shoal.wire import messages as msg

PROMPT = [5, 6, 7, 8]
QUICK = BalanceConfig(settle_s=0.5, settle_missing_s=0.5, named_s=0.2, hot=0.0)
"""Moves at once, and whether anybody is busy or not."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_model("llama", seed=3).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"HOUSEKEEPING_S": 0.02, "LOOK_S": 0.02, "MEET_S": 0.2, "SETTLE_S": 0.3}.items():
        monkeypatch.setattr(server_node, name, seconds)
    monkeypatch.setattr(gossip, "SMALL", replace(gossip.SMALL, round_s=0.1, renew_s=0.1, load_s=0.05))


def room_for(model_dir: Path, blocks: int, cache_tokens: int = 1024) -> int:
    """Memory for so many blocks and the cache, and not one more."""
    facts = describe(model_dir)
    return blocks * (max(facts.block_params) + facts.kv_params_per_token * cache_tokens) * 4


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def hosted(swarm: InProcess) -> list[tuple[int, int]]:
    spans = [record.span for record in swarm._seed.directory.live() if record.state == "online"]
    return sorted((span.start, span.end) for span in spans if span is not None)


def scenario_on(model_dir: Path, steps: Callable[[InProcess, list[int]], Awaitable[None]], tokens: int) -> None:
    """Run steps(swarm, expected), `expected` being what one server alone answers to PROMPT."""

    async def scenario() -> None:
        async with InProcess(model_dir) as alone:
            await alone.add("0:6")
            expected = await alone.tokens(PROMPT, tokens)
        async with InProcess(model_dir) as swarm:
            await steps(swarm, expected)

    run(scenario)


# --- joining -------------------------------------------------------------------------------------------------------


def test_servers_that_join_together_without_blocks_share_the_model_and_say_why(model_dir: Path) -> None:
    async def steps(swarm: InProcess, expected: list[int]) -> None:
        memory = room_for(model_dir, 2)
        nodes = [swarm.start(free=True, memory_bytes=memory) for _ in range(3)]
        await swarm.states(dict.fromkeys(nodes, "online"))
        assert hosted(swarm) == [(0, 2), (2, 4), (4, 6)]
        assert all("2 of these 2 blocks had no server" in swarm.record(node).reason for node in nodes)
        assert await swarm.tokens(PROMPT, 8) == expected

    scenario_on(model_dir, steps, 8)


def test_a_directory_of_another_name_is_the_same_model_and_other_contents_are_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:3")
            copied = tmp_path / "Renamed"
            copied.mkdir()
            for file in model_dir.iterdir():
                (copied / file.name).write_bytes(file.read_bytes())
            swarm._model_dir = copied
            node = swarm.start(free=True, memory_bytes=room_for(model_dir, 3))
            await swarm.states({node: "online"})
            span = swarm.record(node).span
            assert span is not None
            assert (span.model, span.start) == (describe(model_dir).name, 3)

            forged = tmp_path / model_dir.name
            random_model("llama", seed=4).save_pretrained(forged)
            swarm._model_dir = forged  # same configuration, other weights
            stranger = swarm.servers.pop(swarm.start(free=True))
            with pytest.raises(ModelError, match="is not that of the swarm"):
                await stranger.task

    run(scenario)


# --- moving --------------------------------------------------------------------------------------------------------


def test_a_free_server_moves_to_blocks_that_lost_theirs_and_running_answers_go_on(model_dir: Path) -> None:
    async def steps(swarm: InProcess, expected: list[int]) -> None:
        (first,) = await swarm.add("0:3")
        free = swarm.start(free=True, memory_bytes=room_for(model_dir, 3), balance=QUICK)
        await swarm.states({free: "online"})
        await swarm.add("3:6")
        assert hosted(swarm) == [(0, 3), (3, 6), (3, 6)]
        running = asyncio.create_task(swarm.tokens(PROMPT, len(expected)))
        await until(lambda: swarm.driver.tokens > 3)
        swarm.servers[first].server.stop()
        await until(lambda: hosted(swarm) == [(0, 3), (3, 6)] and swarm.record(first).state != "online")
        assert swarm.record(free).reason == "blocks 0:3 had no server; it could be spared"
        assert await running == expected

    scenario_on(model_dir, steps, 100)


def test_a_server_whose_sessions_have_nowhere_to_go_stays(model_dir: Path) -> None:
    async def steps(swarm: InProcess, expected: list[int]) -> None:
        node = swarm.start(free=True, memory_bytes=room_for(model_dir, 6), drain_s=0.05)
        await swarm.states({node: "online"})
        running = asyncio.create_task(swarm.tokens(PROMPT, len(expected)))
        await until(lambda: swarm.driver.tokens > 3)
        server = swarm.servers[node].server
        assert server._serving is not None
        leave = server_node._Leave("a better place", None, must=False)
        assert not await server._hand_over(leave)
        server._publish_load(state="online")
        assert await running == expected
        assert await swarm.tokens(PROMPT, len(expected)) == expected

    scenario_on(model_dir, steps, 110)


# --- being drained -------------------------------------------------------------------------------------------------


def test_an_admin_s_word_drains_a_server_and_answers_move_without_a_changed_token(model_dir: Path) -> None:
    async def steps(swarm: InProcess, expected: list[int]) -> None:
        await swarm.add("0:3")
        ends = await swarm.add("3:6", "3:6")
        running = asyncio.create_task(swarm.tokens(PROMPT, len(expected)))
        await until(lambda: swarm.driver.tokens > 3)
        used = next(node for node in swarm.driver.chain_in_use() if node in ends)
        conn = await swarm.dial("admin", used)
        await conn.send(msg.Drain("for repair"))
        answer, _ = await conn.receive()
        assert isinstance(answer, msg.Draining)
        await swarm.servers.pop(used).task  # ends by itself, without an error
        assert await running == expected
        assert [recovered.cause for recovered in swarm.recovered] == ["draining"]

    scenario_on(model_dir, steps, 100)


def test_a_drained_server_without_a_replica_finishes_what_it_has_and_takes_nothing_new(model_dir: Path) -> None:
    async def steps(swarm: InProcess, expected: list[int]) -> None:
        (node,) = await swarm.add("0:6")
        running = asyncio.create_task(swarm.tokens(PROMPT, len(expected)))
        await until(lambda: swarm.driver.tokens > 3)
        conn = await swarm.dial("admin", node)
        await conn.send(msg.Drain("for repair"))
        await swarm.states({node: "draining"})
        assert await running == expected
        await swarm.servers.pop(node).task

    scenario_on(model_dir, steps, 60)


def test_draining_by_id_waits_for_the_end_and_says_what_it_cannot_do(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "FIND_S", 0.5)
    monkeypatch.setattr(draining, "PROGRESS_S", 0.02)

    async def steps(swarm: InProcess, expected: list[int]) -> None:
        first, second = await swarm.add("0:6", "0:6")
        admin = identity("admin")
        seen: list[int] = []

        async def drain(prefix: str, within_s: float = 20.0) -> msg.Record:
            transport = MemoryTransport(swarm._network, certified(admin))
            return await draining.drain(
                admin,
                transport,
                (swarm._listener.address,),
                prefix,
                reason="test",
                within_s=within_s,
                on_progress=lambda record: seen.append(record.sessions),
            )

        for prefix, error in [("abc", UsageError), ("0" * 32, NoSuchNode), (first[:3], UsageError)]:
            with pytest.raises(error):
                await drain(prefix)
        assert (await drain(first[:8])).node == first
        await swarm.servers.pop(first).task
        running = asyncio.create_task(swarm.tokens(PROMPT, len(expected)))
        await until(lambda: swarm.driver.tokens > 3)
        with pytest.raises(ShoalError, match="still holds"):
            await drain(second[:8], within_s=0.0)
        assert await running == expected
        await swarm.servers.pop(second).task

    scenario_on(model_dir, steps, 100)


# --- borrowed machines ---------------------------------------------------------------------------------------------


class Owner:
    """Stands for server.neighbour.Machine: says what the test wants."""

    def __init__(self) -> None:
        self.others = 0.0

    async def sample(self) -> Sample:
        return Sample(self.others)


def test_a_borrowed_machine_is_given_back_while_its_owner_works_and_taken_again(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Owner()
    monkeypatch.setattr(server_node, "Machine", lambda: owner)
    manners = NeighbourConfig(busy_for_s=0.1, quiet_for_s=0.3)

    async def steps(swarm: InProcess, expected: list[int]) -> None:
        borrowed = swarm.start(free=True, memory_bytes=room_for(model_dir, 6), idle_only=True, neighbour=manners)
        await swarm.states({borrowed: "online"})
        (other,) = await swarm.add("0:6")
        # An answer that certainly goes through the borrowed machine: the other one is not asked.
        swarm.driver.sessions._directory.view.suspect(other, time.monotonic(), 0.3)
        running = asyncio.create_task(swarm.tokens(PROMPT, len(expected)))
        await until(lambda: swarm.driver.tokens > 3)
        assert swarm.driver.chain_in_use() == [borrowed]
        owner.others = 0.9
        await swarm.states({borrowed: "resting"})
        resting = swarm.record(borrowed)
        assert resting.span is None
        assert resting.reason == "other programs use 90% of this machine's processors"
        assert swarm.servers[borrowed].server._engine is None
        assert await running == expected
        owner.others = 0.01
        await swarm.states({borrowed: "online"})

    scenario_on(model_dir, steps, 110)


def test_a_borrowed_machine_in_use_does_not_even_begin(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    owner.others = 0.5
    monkeypatch.setattr(server_node, "Machine", lambda: owner)

    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            node = swarm.start(blocks=BlockRange(0, 6), idle_only=True, neighbour=NeighbourConfig(quiet_for_s=0.2))
            await swarm.states({node: "resting"})
            owner.others = 0.0
            await swarm.states({node: "online"})

    run(scenario)


def test_a_server_at_rest_leaves_without_a_trace_when_told_to(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    owner.others = 0.5
    monkeypatch.setattr(server_node, "Machine", lambda: owner)

    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            node = swarm.start(free=True, idle_only=True)
            await swarm.states({node: "resting"})
            running = swarm.servers.pop(node)
            running.server.stop()
            await running.task
            await until(lambda: swarm.record(node).state == "gone")

    run(scenario)


def test_the_number_of_threads_is_tried_out_and_told(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_node, "processors", lambda: 2)

    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            node = swarm.start(blocks=BlockRange(0, 6), threads=None)
            await swarm.states({node: "online"})
            server = swarm.servers[node].server
            assert server._tuner is not None
            assert swarm.record(node).threads == server._tuner.count
            assert len(await swarm.tokens(PROMPT, 8)) == 8

    run(scenario)
