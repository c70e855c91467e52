"""Loads a stage, or the ends, of a model from its directory: only the tensors that part needs.

`Stage` and `Ends` (stage.py) are the parts; this is the front door, which also knows where a family may be cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from shoal.compute.anatomy import Anatomy, examine
from shoal.compute.selfcheck import require_exact
from shoal.compute.stage import (
    Body,
    Ends,
    Stage,
    blank,
    build_skeleton,
    check_range,
    check_splittable,
    cut_points,
    one_builder,
    token_ids,
)
from shoal.compute.weights import Checkpoint, load_into, read_config
from shoal.errors import ModelError
from shoal.spec.ids import BlockRange

__all__ = ["Ends", "Stage", "build_ends", "build_skeleton", "build_stage", "check_splittable", "cut_points"]


def build_stage(
    model_dir: str | Path,
    blocks: BlockRange,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Stage:
    """Load the layers of `blocks` from a model directory, and nothing else.

    Raises ModelError for a directory that cannot be used, CannotSplit for a family or border that cannot be cut,
    UsageError for blocks outside the model.
    """
    config = read_config(model_dir)
    check_splittable(config)
    check_range(config, blocks)
    kept = range(blocks.start, blocks.end)
    with one_builder:
        model, anatomy, checkpoint = _open(model_dir, config, dtype)
        buffers = {name for name, _ in model.named_buffers()}

        def keep(name: str) -> bool:
            # Buffers beside the layers are tables that the forward may use on every server, and small.
            return anatomy.hosts(name, kept) or (name in buffers and anatomy.at_the_ends(name))

        _fill(model, checkpoint, keep, dtype, torch.device(device))
    return Stage(Body(model, anatomy, blocks), blocks, bytes_read=checkpoint.bytes_read)


def build_ends(
    model_dir: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Ends:
    """Load embedding, final norm and head from a model directory, and no layer. Raises like build_stage."""
    config = read_config(model_dir)
    check_splittable(config)
    with one_builder:
        model, anatomy, checkpoint = _open(model_dir, config, dtype)
        _fill(model, checkpoint, anatomy.at_the_ends, dtype, torch.device(device))
    ends = Ends(model, anatomy, bytes_read=checkpoint.bytes_read)
    ends.eos_ids |= _generation_eos_ids(Path(model_dir))
    return ends


def _open(
    model_dir: str | Path, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, Anatomy, Checkpoint]:
    """The model without weights, its anatomy, and where its weights lie."""
    checkpoint = Checkpoint(model_dir)
    model = build_skeleton(config, dtype)
    require_exact(config)
    return model, examine(model), checkpoint


def _fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    keep: Callable[[str], bool],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read what is kept, blank the rest, compute the buffers. Weights of a server are frozen."""
    load_into(model, checkpoint, keep, dtype=dtype, device=device)
    blank(model, keep, device)
    # Rotary frequencies, ALiBi slopes and other buffers are not in checkpoints: the family computes them.
    unread = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    model._move_missing_keys_from_meta_to_device(set(unread), {"": str(device)}, None, None)
    model._initialize_missing_keys(False)
    model.requires_grad_(False)


def _generation_eos_ids(model_dir: Path) -> frozenset[int]:
    """End tokens that only generation_config.json names (chat models often add one there)."""
    path = model_dir / "generation_config.json"
    try:
        return token_ids(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"Cannot read {path}: {error}", hint="Copy or download the model again.") from None
