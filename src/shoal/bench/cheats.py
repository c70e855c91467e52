"""Ways for a server to give wrong answers, for measuring and testing whether they are noticed.

Those in WEIGHTS change the model that a server computes with, those in ANSWERS what it makes of a right answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.compute.anatomy import examine

F32 = npt.NDArray[np.float32]
GROUP = 64
"""Weights that share one scale, as in the usual 4-bit formats."""


def coarse(weight: Tensor, bits: int) -> Tensor:
    """`weight` [out, in] rounded to so many bits, symmetrically, one scale for each GROUP of values."""
    highest = 2 ** (bits - 1) - 1
    groups = weight.float().reshape(-1, GROUP)
    scales = groups.abs().amax(dim=1, keepdim=True) / highest
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (torch.round(groups / scales) * scales).reshape(weight.shape).to(weight.dtype)


def _coarse(bits: int) -> Callable[[PreTrainedModel, int], None]:
    def change(model: PreTrainedModel, block: int) -> None:
        for layer in examine(model).layers:
            for parameter in layer.parameters():
                if parameter.ndim == 2 and parameter.numel() % GROUP == 0:
                    parameter.copy_(coarse(parameter, bits))

    return change


def _skip(model: PreTrainedModel, block: int) -> None:
    """Block `block` adds nothing: its last matrices of attention and of the feed-forward part are zero."""
    layer: Any = examine(model).layers[block]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


WEIGHTS: dict[str, Callable[[PreTrainedModel, int], None]] = {
    "int8 weights": _coarse(8),
    "4-bit weights": _coarse(4),
    "skipped block": _skip,
}
"""name -> change(model, block). The skipped block is of Llama's shape."""


def noise(inputs: F32, outputs: F32, other: F32, rng: np.random.Generator) -> F32:
    """5 % of every value."""
    return outputs * (1.0 + 0.05 * rng.standard_normal(outputs.shape)).astype(np.float32)


def echo(inputs: F32, outputs: F32, other: F32, rng: np.random.Generator) -> F32:
    """What came in."""
    return inputs


def stale(inputs: F32, outputs: F32, other: F32, rng: np.random.Generator) -> F32:
    """For every second row the one before it: half of the work."""
    return np.repeat(outputs[::2], 2, axis=0)[: len(outputs)] if len(outputs) > 1 else other[: len(outputs)]


def copied(inputs: F32, outputs: F32, other: F32, rng: np.random.Generator) -> F32:
    """What another session got."""
    return np.resize(other, outputs.shape)


def chance(inputs: F32, outputs: F32, other: F32, rng: np.random.Generator) -> F32:
    """Random numbers as large as the right ones."""
    drawn = rng.standard_normal(outputs.shape).astype(np.float32)
    size = np.linalg.norm(outputs, axis=1, keepdims=True) / np.linalg.norm(drawn, axis=1, keepdims=True)
    return (drawn * size).astype(np.float32)


ANSWERS: dict[str, Callable[[F32, F32, F32, np.random.Generator], F32]] = {
    "5 % noise": noise,
    "echoed input": echo,
    "stale rows": stale,
    "another session's answer": copied,
    "random answer": chance,
}
"""name -> wrong(inputs, outputs, other, rng): the rows [n, H] to send instead of `outputs`; `other` are some rows of
another session."""
