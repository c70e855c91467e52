"""The block engine's own promises: sessions kept apart, checks before effects, exact mode, nothing left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from shoal.compute import packed
from shoal.compute.cache import FIRST_CAPACITY_TOKENS, PAGE_TOKENS, GrowingLayer
from shoal.compute.engine import BlockEngine, Work
from shoal.compute.split import Stage
from shoal.compute.tiles import ROW_TILES
from shoal.errors import CannotSplit, UsageError
from shoal.spec.ids import BlockRange

BLOCKS = BlockRange(0, 4)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def stage() -> Stage:
    torch.manual_seed(0)
    return Stage.from_model(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(), BLOCKS)


@pytest.fixture(scope="module")
def mixture() -> Stage:
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    return Stage.from_model(MixtralForCausalLM(config).eval(), BLOCKS)


def random_rows(rows: int, seed: int = 0, width: int = 64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def alone(stage: Stage, hidden: Tensor) -> Tensor:
    """The stage's own forward over one whole sequence [T, H]."""
    with torch.inference_mode():
        return stage(hidden.unsqueeze(0), position_ids=torch.arange(hidden.shape[0]).unsqueeze(0))[0]


def test_the_self_check_leaves_no_session_and_no_setting_behind(stage: Stage) -> None:
    before = stage.config._attn_implementation
    state = torch.get_rng_state()
    engine = BlockEngine(stage, exact=True)
    assert engine.statistics().sessions == 0
    assert stage.config._attn_implementation == before
    assert torch.equal(torch.get_rng_state(), state)


def test_kv_bytes_per_token_is_what_the_layers_store(stage: Stage) -> None:
    engine = BlockEngine(stage)
    assert engine.packed
    assert engine.kv_bytes_per_token == 4 * 2 * (16 + 16) * 4
    assert engine.state_bytes == 0


def test_statistics_follow_the_sessions_and_close_frees_at_once(stage: Stage) -> None:
    engine = BlockEngine(stage)
    engine.open(b"a", BLOCKS, max_tokens=200)
    engine.open(b"b", BlockRange(1, 3), max_tokens=200)
    assert engine.statistics().allocated_bytes == 0
    engine.run([Work(b"a", 0, PAGE_TOKENS + 1)], random_rows(PAGE_TOKENS + 1))
    statistics = engine.statistics()
    assert (statistics.sessions, statistics.tokens, statistics.used_pages) == (2, PAGE_TOKENS + 1, 2)
    assert statistics.allocated_bytes == FIRST_CAPACITY_TOKENS * engine.kv_bytes_per_token
    engine.close(b"a")
    assert engine.statistics().allocated_bytes == 0
    with pytest.raises(KeyError):
        engine.length(b"a")


def test_the_self_check_finds_wrong_attention_and_falls_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = packed._Core.tile
    monkeypatch.setattr(packed._Core, "tile", lambda *arguments: honest(*arguments) * 1.01)
    engine = BlockEngine(stage)
    assert not engine.packed
    assert "differ by" in engine.packed_reason
    engine.open(b"a", BLOCKS, max_tokens=16)
    rows = random_rows(9)
    torch.testing.assert_close(engine.run([Work(b"a", 0, 9)], rows), alone(stage, rows), atol=1e-5, rtol=0)


def test_a_family_that_cannot_go_on_from_its_cache_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GrowingLayer.update

    def forgetful(layer: GrowingLayer, keys: Tensor, values: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        all_keys, all_values = honest(layer, keys, values)
        all_values[:, :, : -keys.shape[2]] = 0
        return all_keys, all_values

    monkeypatch.setattr(GrowingLayer, "update", forgetful)
    with pytest.raises(CannotSplit, match="continued from its cache"):
        BlockEngine(stage)


def test_sessions_over_different_blocks_share_a_run(stage: Stage) -> None:
    engine = BlockEngine(stage)
    plans = {b"a": BlockRange(0, 4), b"b": BlockRange(1, 3), b"c": BlockRange(3, 4), b"d": BlockRange(1, 3)}
    rows = {session: random_rows(9, seed=index) for index, session in enumerate(plans)}
    for session, blocks in plans.items():
        engine.open(session, blocks, max_tokens=64)
    got = []
    for start, end in ((0, 6), (6, 7), (7, 9)):
        works = [Work(session, start, end - start) for session in plans]
        out = engine.run(works, torch.cat([rows[session][start:end] for session in plans]))
        got.append(out.view(len(plans), end - start, -1))
    for index, (session, blocks) in enumerate(plans.items()):
        ours = torch.cat([part[index] for part in got])
        torch.testing.assert_close(ours, alone(stage.narrow(blocks), rows[session]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_tokens", [400, 10_000])
def test_growth_over_many_steps_changes_nothing(stage: Stage, max_tokens: int) -> None:
    engine = BlockEngine(stage)
    engine.open(b"a", BLOCKS, max_tokens)
    rows = random_rows(400)
    out = [engine.run([Work(b"a", 0, 300)], rows[:300])]
    out += [engine.run([Work(b"a", at, 1)], rows[at : at + 1]) for at in range(300, 400)]
    torch.testing.assert_close(torch.cat(out), alone(stage, rows), atol=1e-5, rtol=0)


def test_a_truncated_session_continues_as_if_the_rest_had_never_been(stage: Stage) -> None:
    engine = BlockEngine(stage)
    engine.open(b"a", BLOCKS, max_tokens=64)
    rows = random_rows(20)
    engine.run([Work(b"a", 0, 15)], rows[:15])
    engine.run([Work(b"a", 15, 5)], random_rows(5, seed=9))
    engine.truncate(b"a", 15)
    out = engine.run([Work(b"a", 15, 5)], rows[15:])
    torch.testing.assert_close(out, alone(stage, rows)[15:], atol=1e-5, rtol=0)
    for wrong in (-1, 21):
        with pytest.raises(ValueError, match="Cannot cut"):
            engine.truncate(b"a", wrong)


def test_every_wrong_call_is_refused_before_anything_changes(stage: Stage) -> None:
    engine = BlockEngine(stage)
    engine.open(b"a", BLOCKS, max_tokens=10)
    engine.open(b"b", BLOCKS, max_tokens=10)
    engine.run([Work(b"a", 0, 4)], random_rows(4))
    good = Work(b"b", 0, 1)
    for works, rows in (
        ([good, Work(b"a", 3, 1)], 2),  # behind the session
        ([good, Work(b"a", 5, 1)], 2),  # ahead of it
        ([good, Work(b"a", 4, 0)], 1),  # no rows
        ([good, Work(b"a", 4, 7)], 8),  # more than reserved
        ([good, good], 2),  # twice
        ([good], 2),  # rows that nobody claims
        ([], 0),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - seven causes, told apart by the cases
            engine.run(works, random_rows(rows))
    with pytest.raises(ValueError, match="announced"):
        engine.run([good], random_rows(1, width=63))
    with pytest.raises(KeyError):
        engine.run([good, Work(b"nobody", 0, 1)], random_rows(2))
    assert (engine.length(b"a"), engine.length(b"b")) == (4, 0)
    with pytest.raises(ValueError, match="open already"):
        engine.open(b"a", BLOCKS, max_tokens=10)
    with pytest.raises(ValueError, match="at least 1"):
        engine.open(b"c", BLOCKS, max_tokens=0)
    with pytest.raises(UsageError):
        engine.open(b"c", BlockRange(2, 5), max_tokens=10)


def test_a_step_that_failed_in_the_middle_can_be_run_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = BlockEngine(stage)
    engine.open(b"a", BLOCKS, max_tokens=64)
    rows = random_rows(6)
    first = engine.run([Work(b"a", 0, 5)], rows[:5])

    def out_of_memory(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(stage.layers[2].mlp, "forward", out_of_memory)
        with pytest.raises(MemoryError):
            engine.run([Work(b"a", 5, 1)], rows[5:])
    out = torch.cat((first, engine.run([Work(b"a", 5, 1)], rows[5:])))
    torch.testing.assert_close(out, alone(stage, rows), atol=1e-5, rtol=0)


def decode_steps(engine: BlockEngine, chosen: list[int], steps: int) -> dict[int, Tensor]:
    """Greedy-like decode of the chosen sessions of eight: each step's output is the next step's input."""
    names = [bytes([index]) for index in range(8)]
    last = {}
    for index in chosen:
        engine.open(names[index], BLOCKS, max_tokens=200)
        last[index] = engine.run([Work(names[index], 0, 5 + 7 * index)], random_rows(5 + 7 * index, seed=index))[-1]
    for _ in range(steps):
        works = [Work(names[index], engine.length(names[index]), 1) for index in chosen]
        out = engine.run(works, torch.stack([last[index] for index in chosen]))
        last = dict(zip(chosen, out, strict=True))
    for index in chosen:
        engine.close(names[index])
    return last


@pytest.mark.parametrize("family", ["stage", "mixture"])
def test_in_exact_mode_a_session_has_the_same_bits_alone_and_with_seven_others(
    family: str, request: pytest.FixtureRequest
) -> None:
    engine = BlockEngine(request.getfixturevalue(family), exact=True)
    assert engine.row_tile in ROW_TILES
    together = decode_steps(engine, list(range(8)), steps=12)
    for index in range(8):
        assert torch.equal(decode_steps(engine, [index], steps=12)[index], together[index])
    fewer = decode_steps(engine, [6, 1, 3], steps=12)
    assert all(torch.equal(fewer[index], together[index]) for index in fewer)


def test_without_exact_mode_company_changes_low_bits(stage: Stage) -> None:
    engine = BlockEngine(stage)
    together = decode_steps(engine, list(range(8)), steps=12)
    alone_bits = {index: decode_steps(engine, [index], steps=12)[index] for index in range(8)}
    assert any(not torch.equal(alone_bits[index], together[index]) for index in range(8))
    for index in range(8):
        torch.testing.assert_close(alone_bits[index], together[index], atol=1e-5, rtol=1e-5)


def test_more_sessions_than_a_tile_holds_are_decoded_in_several(stage: Stage) -> None:
    engine = BlockEngine(stage, exact=True)
    names = [index.to_bytes(2, "big") for index in range(19)]
    rows = {name: random_rows(3, seed=index) for index, name in enumerate(names)}
    for name in names:
        engine.open(name, BLOCKS, max_tokens=16)
    engine.run([Work(name, 0, 2) for name in names], torch.cat([rows[name][:2] for name in names]))
    out = engine.run([Work(name, 2, 1) for name in names], torch.cat([rows[name][2:] for name in names]))
    for name, row in zip(names, out, strict=True):
        torch.testing.assert_close(row, alone(stage, rows[name])[2], atol=1e-5, rtol=0)


def test_a_stage_in_bf16_is_packed_too() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).eval()
    engine = BlockEngine(Stage.from_model(model, BLOCKS))
    assert engine.packed
    engine.open(b"a", BLOCKS, max_tokens=16)
    assert engine.run([Work(b"a", 0, 2)], random_rows(2)).dtype == torch.bfloat16
    assert engine.kv_bytes_per_token == 4 * 2 * (16 + 16) * 2


def test_engines_of_two_threads_may_run_at_the_same_time(stage: Stage) -> None:
    """Two servers in one process, as in tests and notebooks."""
    hidden = random_rows(5)
    engine = BlockEngine(stage)
    engine.open(b"s", BLOCKS, 16)
    under_way = packed.PackedStep([], packed.MaskRules())
    with packed.packed_step(under_way), ThreadPoolExecutor(1) as other:
        out = other.submit(engine.run, [Work(b"s", 0, 5)], hidden).result()
    torch.testing.assert_close(out, alone(stage, hidden), atol=1e-5, rtol=0)
    assert engine.packed
