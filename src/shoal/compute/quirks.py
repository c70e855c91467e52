"""The few families that need a word of their own, each with its reason."""

from __future__ import annotations

from transformers import PretrainedConfig

from shoal.spec.ids import BlockRange


def cannot_split(config: PretrainedConfig) -> str | None:
    """Why a family cannot be cut between layers, or None when it can."""
    return None


def cut_points(config: PretrainedConfig, depth: int) -> list[int]:
    """The borders where a model of this configuration may be cut."""
    return list(range(depth + 1))


def illegal_range(config: PretrainedConfig, blocks: BlockRange) -> str | None:
    """Why a stage of just these blocks would answer wrongly, or None when it would not."""
    return None
