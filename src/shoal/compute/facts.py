"""What placement, routing and the gateway must know about a model before any of its weights is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.compute.anatomy import context_length, depth, examine, text_config
from shoal.compute.fingerprint import model_name
from shoal.compute.split import build_skeleton, cut_points
from shoal.compute.weights import read_config


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts read from a model directory's configuration and the headers of its weight files.

    `name` is the directory's name with a fingerprint: two servers mean the same model only if both agree.
    `block_params` counts the parameters of each block; `kv_params_per_token` is the size of one block's cache for one
    token, in numbers.
    """

    name: str
    num_blocks: int
    hidden_size: int
    context_length: int
    block_params: tuple[int, ...]
    kv_params_per_token: int
    legal_cuts: tuple[int, ...]


def describe(model_dir: str | Path) -> ModelFacts:
    """Read the facts. Raises ModelError or CannotSplit for a directory that cannot be served."""
    model_dir = Path(model_dir)
    config = read_config(model_dir)
    text = text_config(config)
    cuts = cut_points(config)
    anatomy = examine(build_skeleton(config, torch.float32))
    block_params = tuple(sum(p.numel() for p in layer.parameters()) for layer in anatomy.layers)
    query_heads = getattr(text, "num_attention_heads", None) or 1
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    return ModelFacts(
        name=model_name(model_dir),
        num_blocks=depth(config),
        hidden_size=text.hidden_size,
        context_length=context_length(config),
        block_params=block_params,
        kv_params_per_token=2 * heads * head_dim,
        legal_cuts=tuple(cuts),
    )
