"""Generations over block servers in the same event loop, against the whole model in one piece."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from support.inprocess import GREEDY, InProcess
from support.networks import run
from transformers import PreTrainedModel

from shoal.errors import ContextTooLong, Full, SwarmIncomplete

PROMPTS = ([5, 9, 2, 77], [1], list(range(40)))
COUNT = 30


def expected(model: PreTrainedModel, prompt: Sequence[int], count: int = COUNT) -> list[int]:
    """What Hugging Face's own loop generates."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


def test_several_generations_at_once_give_the_tokens_of_the_whole_model(
    model: PreTrainedModel, model_dir: Path
) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:2", "2:5", "5:6")
            answers = await asyncio.gather(*(swarm.tokens(prompt, COUNT) for prompt in PROMPTS))
            assert answers == [expected(model, prompt) for prompt in PROMPTS]
            assert swarm.recovered == []

    run(scenario)


def test_a_model_directory_may_have_another_name_on_every_machine(
    model: PreTrainedModel, model_dir: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "another-name"
    shutil.copytree(model_dir, renamed)

    async def scenario() -> None:
        async with InProcess(renamed) as swarm:
            swarm._model_dir = model_dir  # the servers'
            await swarm.add("0:3", "3:6")
            assert await swarm.tokens(PROMPTS[0], COUNT) == expected(model, PROMPTS[0])

    run(scenario)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_server_that_vanishes_changes_no_token(model: PreTrainedModel, model_dir: Path, stage: int) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:2", "2:5", "5:6", "0:2", "2:5", "5:6")
            tokens = []
            items = swarm.driver.generate(PROMPTS[0], GREEDY, max_tokens=COUNT)
            async for item in items:
                if item is not None:
                    tokens.append(item.token)
                if len(tokens) == COUNT // 2:
                    swarm.unplug(swarm.driver.chain_in_use()[stage])
            assert tokens == expected(model, PROMPTS[0])
            assert len(swarm.recovered) == 1

    run(scenario)


def test_a_bias_and_a_penalty_reach_the_sampler(model: PreTrainedModel, model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:6")
            forced = dataclasses.replace(GREEDY, logit_bias=((7, 100.0),))
            assert await swarm.tokens(PROMPTS[0], 5, forced) == [7] * 5
            first = expected(model, PROMPTS[0], 1)[0]
            banned = dataclasses.replace(GREEDY, logit_bias=((first, -100.0),))
            assert first not in await swarm.tokens(PROMPTS[0], 5, banned)

    run(scenario)


def test_a_seed_gives_the_same_tokens_again_also_when_a_server_vanishes(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            params = dataclasses.replace(GREEDY, temperature=1.0, seed=11, logprobs=2)
            await swarm.add("0:3", "3:6", "3:6")
            first = await swarm.choices(PROMPTS[0], 12, params)
            items = swarm.driver.generate(PROMPTS[0], params, max_tokens=12)
            again = []
            async for item in items:
                if item is not None:
                    again.append(item)
                if len(again) == 6:
                    swarm.unplug(swarm.driver.chain_in_use()[1])
            assert [choice.token for choice in again] == [choice.token for choice in first]
            assert [choice.logprob for choice in again] == pytest.approx([choice.logprob for choice in first], abs=1e-4)
            assert all(len(choice.top) == 2 for choice in first)

    run(scenario)


def test_an_end_token_ends_the_answer_and_is_the_last_one(model: PreTrainedModel, model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:6")
            whole = expected(model, PROMPTS[0])
            stop = whole[COUNT // 2]
            items = swarm.driver.generate(PROMPTS[0], GREEDY, max_tokens=COUNT, eos_ids=frozenset({stop}))
            tokens = [item.token async for item in items if item is not None]
            assert tokens == whole[: whole.index(stop) + 1]

    run(scenario)


def test_an_answer_that_is_left_unread_frees_its_cache_everywhere(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:3", "3:6")
            async with aclosing(swarm.driver.generate(PROMPTS[0], GREEDY, max_tokens=80)) as items:
                await anext(items)
                assert [running.sessions for running in swarm.servers.values()] == [1, 1]
            while any(running.sessions for running in swarm.servers.values()):
                await asyncio.sleep(0.005)

    run(scenario)


def test_more_than_the_context_is_refused_before_anything_is_opened(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            with pytest.raises(ContextTooLong, match="128"):
                await swarm.tokens(PROMPTS[0], 128)

    run(scenario)


def test_servers_that_are_full_say_when_to_come_back(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:6", cache_tokens=64)
            async with aclosing(swarm.driver.generate(PROMPTS[0], GREEDY, max_tokens=50)) as items:
                await anext(items)
                with pytest.raises(Full) as caught:
                    await swarm.tokens(PROMPTS[0], 50)
            assert caught.value.retry_after_s is not None
            assert caught.value.retry_after_s > 0

    run(scenario)


def test_blocks_that_nobody_hosts_are_an_error_after_the_stated_patience(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:3")
            with pytest.raises(SwarmIncomplete) as caught:
                await swarm.tokens(PROMPTS[0], 5)
            assert caught.value.retry_after_s == 1.0

    run(scenario)


def test_an_answer_waits_for_blocks_that_come_within_its_patience(model: PreTrainedModel, model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:3")
            waiting = asyncio.create_task(swarm.tokens(PROMPTS[0], 5))
            await asyncio.sleep(0)
            await swarm.add("3:6")
            assert await waiting == expected(model, PROMPTS[0], 5)

    run(scenario)
