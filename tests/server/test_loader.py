"""How much cache fits beside the blocks of a server, and what it says when none does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.compute.families import random_model
from shoal.errors import NotEnoughRoom
from shoal.server.loader import MAX_CACHE_TOKENS, Loaded, load
from shoal.spec.ids import BlockRange


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_model("llama").save_pretrained(path)
    return path


def loaded(model_dir: Path, *, memory_bytes: int, cache_tokens: int | None = None) -> Loaded:
    return load(
        model_dir,
        BlockRange(1, 3),
        dtype=torch.float32,
        device=torch.device("cpu"),
        memory_bytes=memory_bytes,
        cache_tokens=cache_tokens,
        exact=False,
    )


def test_what_the_weights_leave_is_cache(model_dir: Path) -> None:
    ample = loaded(model_dir, memory_bytes=1 << 40)
    assert ample.cache_tokens == MAX_CACHE_TOKENS
    per_token = ample.engine.kv_bytes_per_token
    assert per_token == 2 * 2 * 2 * 16 * 4, "2 blocks of keys and values, 2 heads of 16 values, 4 bytes each"
    weights = ample.bytes_read
    assert loaded(model_dir, memory_bytes=weights + 100 * per_token).cache_tokens == 100
    assert loaded(model_dir, memory_bytes=weights + 100 * per_token, cache_tokens=40).cache_tokens == 40


@pytest.mark.parametrize(("room", "cache_tokens"), [(15, None), (100, 101)])
def test_too_little_memory_is_refused_with_the_sizes(model_dir: Path, room: int, cache_tokens: int | None) -> None:
    ample = loaded(model_dir, memory_bytes=1 << 40)
    memory = ample.bytes_read + room * ample.engine.kv_bytes_per_token
    with pytest.raises(NotEnoughRoom, match=r"blocks 1:3 .* KiB") as caught:
        loaded(model_dir, memory_bytes=memory, cache_tokens=cache_tokens)
    assert "--memory" in caught.value.hint
