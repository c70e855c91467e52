"""Loads the blocks a server was given, and works out how much cache fits beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.compute.engine import BlockEngine
from shoal.compute.split import build_stage
from shoal.errors import NotEnoughRoom
from shoal.spec.ids import BlockRange
from shoal.spec.units import show_bytes

MAX_CACHE_TOKENS = 1 << 20
_MIN_CACHE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    engine: BlockEngine
    bytes_read: int
    cache_tokens: int


def load(
    model_dir: Path,
    blocks: BlockRange,
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory_bytes: int,
    cache_tokens: int | None,
    exact: bool,
) -> Loaded:
    """Read the blocks' tensors and build their engine. Raises NotEnoughRoom when weights leave no room for a cache."""
    stage = build_stage(model_dir, blocks, dtype=dtype, device=device)
    engine = BlockEngine(stage, exact=exact)
    weights = sum(p.numel() * p.element_size() for layer in stage.layers for p in layer.parameters())
    per_token = engine.kv_bytes_per_token
    fits = (memory_bytes - weights) // per_token if per_token else MAX_CACHE_TOKENS
    wanted = cache_tokens if cache_tokens is not None else min(fits, MAX_CACHE_TOKENS)
    if fits < max(wanted, _MIN_CACHE_TOKENS):
        raise NotEnoughRoom(
            f"Not enough room: blocks {blocks} take {show_bytes(weights)} and {wanted} tokens of cache"
            f" {show_bytes(wanted * per_token)}, this machine offers {show_bytes(memory_bytes)}.",
            hint="Offer more memory (--memory), ask for less cache (--cache-tokens), or use more servers (--servers).",
        )
    return Loaded(engine, stage.bytes_read, wanted)
