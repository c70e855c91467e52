"""Caches of a session: contiguous, growing in place, read through views."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from shoal.compute.cache import (
    FIRST_CAPACITY_TOKENS,
    PAGE_TOKENS,
    GrowingLayer,
    SessionKv,
    SlotShape,
    cache_bytes,
    cache_costs,
    growing_cache,
    grown_capacity,
    pages,
)

SHAPES = {0: SlotShape(2, 4, 4), 1: SlotShape(2, 4, 4), 2: SlotShape(1, 8, 3)}


def new_kv(max_tokens: int = 1000) -> SessionKv:
    return SessionKv(SHAPES, max_tokens=max_tokens, dtype=torch.float32, device=torch.device("cpu"))


def store(kv: SessionKv, rows: int, value: float) -> None:
    kv.reserve(kv.length + rows)
    for new_keys, new_values, _, _ in kv.step_views(kv.length, rows).values():
        new_keys.fill_(value)
        new_values.fill_(-value)
    kv.length += rows


def test_capacity_doubles_so_that_copies_stay_amortised_and_stops_at_the_reservation() -> None:
    capacity, copies = 0, 0
    for tokens in range(1, 4097):
        if tokens > capacity:
            capacity, copies = grown_capacity(capacity, tokens, limit=4096), copies + 1
    assert copies == 7  # 64, 128, ... 4096
    assert grown_capacity(0, 1, limit=1000) == FIRST_CAPACITY_TOKENS
    assert grown_capacity(0, 1, limit=20) == 2 * PAGE_TOKENS
    assert grown_capacity(2048, 2049, limit=3000) == pages(3000) * PAGE_TOKENS


def test_a_page_is_counted_as_soon_as_its_first_token_is_stored() -> None:
    assert [pages(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_stored_tokens_survive_growth() -> None:
    kv = new_kv()
    for value in range(1, 30):
        store(kv, rows=7, value=float(value))
    _, _, keys, values = kv.step_views(kv.length, 0)[1]
    expected = torch.arange(1.0, 30.0).repeat_interleave(7)
    assert torch.equal(keys[0, 1, :, 3], expected)
    assert torch.equal(values[0, 1, :, 3], -expected)


def test_what_attention_reads_is_a_view_of_the_buffer_and_not_a_copy() -> None:
    kv = new_kv()
    store(kv, rows=5, value=1.0)
    new_keys, _, keys, _ = kv.step_views(5, 1)[2]
    new_keys.fill_(9.0)
    assert keys.shape == (1, 1, 6, 8)
    assert torch.equal(keys[0, 0, 5], torch.full((8,), 9.0))
    assert keys.untyped_storage().data_ptr() == new_keys.untyped_storage().data_ptr()


def test_slots_of_different_shape_get_buffers_of_their_own_shape() -> None:
    kv = new_kv()
    kv.reserve(3)
    views = kv.step_views(0, 3)
    assert views[0][2].shape == (1, 2, 3, 4)
    assert views[2][2].shape == (1, 1, 3, 8)
    assert views[2][3].shape == (1, 1, 3, 3)
    assert kv.bytes_per_token == (2 * 2 * 8 + 11) * 4
    assert kv.allocated_bytes == FIRST_CAPACITY_TOKENS * kv.bytes_per_token


@pytest.mark.parametrize("chunks", [(5, 1, 1, 20, 1), (1,) * 30, (40,)])
@pytest.mark.parametrize("config", [LlamaConfig(), MistralConfig(sliding_window=8)])
def test_growing_layers_return_what_the_library_cache_returns(config: LlamaConfig, chunks: tuple[int, ...]) -> None:
    config.num_hidden_layers = 1
    theirs, ours = DynamicCache(config=config), growing_cache(DynamicCache(config=config), max_tokens=64)
    assert isinstance(ours.layers[0], GrowingLayer)
    generator = torch.Generator().manual_seed(0)
    for rows in chunks:
        assert ours.get_mask_sizes(rows, 0) == theirs.get_mask_sizes(rows, 0)
        keys, values = torch.randn(2, 1, 2, rows, 4, generator=generator)
        for mine, other in zip(ours.update(keys, values, 0), theirs.update(keys, values, 0), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_growing_layer_is_written_in_place() -> None:
    cache = growing_cache(DynamicCache(config=LlamaConfig(num_hidden_layers=1)), max_tokens=64)
    row = torch.ones(1, 2, 1, 4)
    first, _ = cache.update(row, row, 0)
    second, _ = cache.update(row, row, 0)
    assert first.data_ptr() == second.data_ptr()


def test_a_cropped_growing_layer_continues_from_the_cut() -> None:
    cache = growing_cache(DynamicCache(config=MistralConfig(num_hidden_layers=1, sliding_window=4)), max_tokens=64)
    rows = torch.arange(10.0).view(1, 1, 10, 1)
    cache.update(rows, rows, 0)
    cache.crop(-4)
    keys, _ = cache.update(torch.full((1, 1, 1, 1), 99.0), torch.zeros(1, 1, 1, 1), 0)
    assert keys.flatten().tolist() == [3.0, 4.0, 5.0, 99.0]


def test_costs_of_a_library_cache_are_told_apart_by_token_and_constant() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    cache = growing_cache(DynamicCache(config=config), max_tokens=64)
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer)
    assert cache_costs(cache) == (2 * 2 * 2 * 4 * 4, 0)
    assert cache_bytes(cache) == FIRST_CAPACITY_TOKENS * 2 * 2 * 2 * 4 * 4
