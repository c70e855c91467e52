"""Embeddings over block servers in the same event loop, against the whole model in one piece."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.inprocess import GREEDY, InProcess
from support.networks import run
from transformers import PreTrainedModel

from shoal.client.driver import DriverConfig
from shoal.client.served import SwarmModel, read_pooling
from shoal.errors import ContextTooLong, Full, ModelError, PolicyUnmet, ShoalError, SwarmIncomplete, UsageError
from shoal.spec.ids import BlockRange
from shoal.swarm.session import SessionConfig
from shoal.swarm.trust import Zones

TEXTS = ([5, 9, 2, 77], [1], list(range(40)))


def states(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """The model's own last hidden states [T, H]."""
    with torch.inference_mode():
        return model.base_model(torch.tensor([list(prompt)])).last_hidden_state[0].float()


def unit(vector: torch.Tensor) -> list[float]:
    return (vector / vector.norm()).tolist()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_those_of_the_whole_model(model: PreTrainedModel, model_dir: Path, pooling: str) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:2", "2:5", "5:6")
            assert swarm.driver.embedding_size == model.config.hidden_size
            made = await asyncio.gather(*(swarm.driver.embed(text, pooling=pooling) for text in TEXTS))
            for text, vector in zip(TEXTS, made, strict=True):
                whole = states(model, text)
                expected = unit(whole.mean(0) if pooling == "mean" else whole[-1])
                assert vector == pytest.approx(expected, abs=1e-5)
                assert math.sqrt(math.fsum(value * value for value in vector)) == pytest.approx(1, abs=1e-6)
            # Generations go on beside them, and every session is closed.
            await asyncio.gather(swarm.tokens(TEXTS[0], 5), swarm.driver.embed(TEXTS[1]))
            assert len(swarm.driver.sessions) == 0

    run(scenario)


def test_a_long_text_comes_in_several_pieces(model: PreTrainedModel, model_dir: Path) -> None:
    async def scenario() -> None:
        config = DriverConfig(chunk_rows=8, session=SessionConfig(patience_s=1.0))
        async with InProcess(model_dir, config) as swarm:
            await swarm.add("0:3", "3:6")
            for pooling in ("last", "mean"):
                vector = await swarm.driver.embed(TEXTS[2], pooling=pooling)
                whole = states(model, TEXTS[2])
                expected = unit(whole.mean(0) if pooling == "mean" else whole[-1])
                assert vector == pytest.approx(expected, abs=1e-5)

    run(scenario)


def test_a_server_that_vanishes_changes_no_vector(model: PreTrainedModel, model_dir: Path) -> None:
    async def scenario() -> None:
        config = DriverConfig(chunk_rows=2, session=SessionConfig(patience_s=1.0))
        async with InProcess(model_dir, config) as swarm:
            await swarm.add("0:3", "3:6", "3:6")
            given: list[str] = []

            def cut(node: str, blocks: BlockRange) -> None:
                given.append(node)
                if len(given) == 2:  # the last server of the chain, in the middle of the text
                    asyncio.get_running_loop().call_later(0.005, swarm.unplug, node)

            vector = await swarm.driver.embed(TEXTS[2], pooling="mean", on_host=cut)
            assert vector == pytest.approx(unit(states(model, TEXTS[2]).mean(0)), abs=1e-5)
            assert len(given) == 3, "another server took over"

    run(scenario)


def test_what_cannot_be_embedded_says_why(model: PreTrainedModel, model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:3")
            longest = model.config.max_position_embeddings
            with pytest.raises(ContextTooLong):
                await swarm.driver.embed([5] * (longest + 1))
            with pytest.raises(UsageError):
                await swarm.driver.embed([])
            with pytest.raises(SwarmIncomplete, match="3:6"):
                await swarm.driver.embed([5])
            await swarm.add("3:6")
            with pytest.raises(PolicyUnmet):
                await swarm.driver.embed([5], zones=[Zones.parse("all=trusted")])
            assert len(swarm.driver.sessions) == 0
            seen: list[tuple[str, BlockRange]] = []
            await swarm.driver.embed([5], on_host=lambda node, blocks: seen.append((node, blocks)))
            assert [str(blocks) for _, blocks in seen] == ["0:3", "3:6"]

    run(scenario)


def test_a_full_server_refuses_an_embedding_as_it_refuses_an_answer(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            (node,) = await swarm.add("0:6", cache_tokens=64)
            items = swarm.driver.generate([5] * 40, GREEDY, max_tokens=20)
            assert await anext(items) is None
            with pytest.raises(Full):
                await swarm.driver.embed([5] * 40)
            await items.aclose()
            assert node in swarm.servers

    run(scenario)


def test_a_caller_that_gives_up_frees_the_session(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            await swarm.add("0:6")
            asking = asyncio.create_task(swarm.driver.embed([5] * 100))
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert len(swarm.driver.sessions) == 0

    run(scenario)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (None, "last"),
        ({"word_embedding_dimension": 64, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_a_model_says_itself_how_its_vectors_are_made(tmp_path: Path, config: object, pooling: str) -> None:
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert read_pooling(tmp_path) == pooling


@pytest.mark.parametrize(
    "text", ['{"pooling_mode_cls_token": true}', '{"pooling_mode": "weightedmean"}', "{", "[]", '{"pooling_mode": 3}']
)
def test_a_way_that_is_not_offered_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(text)
    with pytest.raises(ModelError):
        read_pooling(tmp_path)


def test_a_tokenizer_with_more_ids_than_the_vocabulary_is_refused_at_the_start() -> None:
    driver = SimpleNamespace(vocab_size=100, embedding_size=8, facts=SimpleNamespace(context_length=64))
    fits = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 99})
    too_many = SimpleNamespace(get_vocab=lambda: {"a": 0, "<extra>": 100})
    SwarmModel("m", driver, None, fits, eos_ids=frozenset())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="ids up to 100, but the model's vocabulary ends at 99") as caught:
        SwarmModel("m", driver, None, too_many, eos_ids=frozenset())  # type: ignore[arg-type]
    assert "tokenizer that belongs to these weights" in caught.value.hint


def test_a_driver_that_closes_tells_those_who_wait_for_a_vector(model_dir: Path) -> None:
    async def scenario() -> None:
        async with InProcess(model_dir) as swarm:
            waiting = asyncio.create_task(swarm.driver.embed(TEXTS[0]))  # there is no server
            await asyncio.sleep(0.1)
            await swarm.driver.close()
            with pytest.raises(ShoalError, match="was closed"):
                async with asyncio.timeout(5):
                    await waiting

    run(scenario)
