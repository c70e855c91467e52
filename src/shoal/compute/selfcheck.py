"""Is a model cut in pieces exactly the model in one piece?

Four tests compare a chain of stages with the whole model, both in fp32 and on the same device:

- prefill: 24 tokens at once (three times the tiny models' sliding window);
- decode: a cached prefill and six cached steps;
- padding: a batch whose first sequence is padded on the left, prefill and two cached steps;
- gradients: what reaches the embedding matrix when every stage recomputes its span for the backward pass.

On a CPU the differences are 0.0: the same operations in the same order. Families that shoal is tested with
(families.SPLIT) need no check when they are loaded; any other one is checked on the spot with a tiny random model, and
refused when the pieces do not add up. That takes about a second.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from shoal.compute import families
from shoal.compute.stage import Ends, Stage, cut_points
from shoal.errors import CannotSplit, ShoalError
from shoal.spec.ids import BlockRange

PROMPT_TOKENS = 3 * families.WINDOW
STEPS = 6
PADDING_TOKENS = 5
WANTED_BORDERS = (2, 5)
WRONG = 1e-3
"""From here on a difference is no rounding: logits of the tiny models have a spread of about 1."""
# What a family's own code may raise when it is run in a way it was not written for.
FOREIGN_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Differences:
    """Largest absolute difference between cut and whole, per test."""

    prefill: float
    decode: float
    padding: float
    gradients: float

    @property
    def largest(self) -> float:
        return max(self.prefill, self.decode, self.padding, self.gradients)


class Chain:
    """The ends and stages of one model, run as a swarm runs them: the hidden state of one into the next."""

    def __init__(self, ends: Ends, stages: Sequence[Stage]) -> None:
        self.ends = ends
        self.stages = stages
        self._caches: list[Any] = [None] * len(stages)

    def start(self, *, cached: bool) -> None:
        """Forget everything; with `cached` the next calls continue one another."""
        self._caches = [stage.new_cache() if cached else None for stage in self.stages]

    def logits(self, ids: Tensor, position_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [B, T], position_ids [B, T], mask [B, P + T] -> logits [B, T, V]."""
        hidden = self.ends.embed(ids, position_ids)
        for stage, cache in zip(self.stages, self._caches, strict=True):
            hidden = stage(hidden, position_ids=position_ids, attention_mask=mask, cache=cache)
        return self.ends.logits(hidden)


class Whole:
    """The model in one piece, called as transformers' own `generate` calls it. Same calls as a Chain."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        self._takes_position_ids = "position_ids" in accepted
        self._cache: DynamicCache | None = None

    def start(self, *, cached: bool) -> None:
        self._cache = DynamicCache(config=self.model.config) if cached else None

    def logits(self, ids: Tensor, position_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        arguments: dict[str, Any] = {self._cache_name: self._cache, "use_cache": self._cache is not None}
        if self._takes_position_ids:
            arguments["position_ids"] = position_ids
        if mask is not None:
            arguments["attention_mask"] = mask
        logits: Tensor = self.model(ids, **arguments).logits
        return logits


def ranges(borders: Sequence[int]) -> list[BlockRange]:
    """[0, 2, 5, 6] -> 0:2, 2:5, 5:6."""
    return [BlockRange(start, end) for start, end in itertools.pairwise(borders)]


def borders(config: PretrainedConfig) -> list[int]:
    """Where a tiny model is cut: at 2 and 5, or at the nearest borders the family allows. Raises CannotSplit."""
    allowed = cut_points(config)
    inner = allowed[1:-1]
    if not inner:
        raise CannotSplit(f"A {config.model_type!r} model of this shape has no border to cut at.")
    chosen = {min(inner, key=lambda border: (abs(border - wanted), border)) for wanted in WANTED_BORDERS}
    return sorted({0, *chosen, allowed[-1]})


def cut(model: PreTrainedModel) -> Chain:
    """The chain of stages of an in-memory model. Raises CannotSplit."""
    return Chain(Ends.from_model(model), [Stage.from_model(model, blocks) for blocks in ranges(borders(model.config))])


def measure(model: PreTrainedModel, chain: Chain) -> Differences:
    """All four tests. Leaves `model` without gradients. Raises whatever the family's code raises."""
    whole = Whole(model)
    embedding = model.get_input_embeddings().weight
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(3, embedding.shape[0], (2, PROMPT_TOKENS), generator=rng).to(embedding.device)
    with torch.no_grad():
        prefill = prefill_difference(whole, chain, ids)
        decode = decode_difference(whole, chain, ids)
        padding = padding_difference(whole, chain, ids)
    return Differences(prefill, decode, padding, gradient_difference(whole, chain, ids))


def prefill_difference(whole: Whole, chain: Chain, ids: Tensor) -> float:
    whole.start(cached=False)
    chain.start(cached=False)
    return difference(chain.logits(ids, positions(ids)), whole.logits(ids, positions(ids)))


def decode_difference(whole: Whole, chain: Chain, ids: Tensor) -> float:
    whole.start(cached=True)
    chain.start(cached=True)
    found = []
    position_ids = positions(ids)
    for _ in range(1 + STEPS):
        expected = whole.logits(ids, position_ids)
        found.append(difference(chain.logits(ids, position_ids), expected))
        ids, position_ids = expected[:, -1:].argmax(-1), position_ids[:, -1:] + 1
    return max(found)


def padding_difference(whole: Whole, chain: Chain, ids: Tensor) -> float:
    """Compared where tokens are real: what a model says at padding means nothing."""
    whole.start(cached=True)
    chain.start(cached=True)
    mask = torch.ones_like(ids)
    mask[0, :PADDING_TOKENS] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for _ in range(1 + 2):
        expected = whole.logits(ids, position_ids, mask)
        real = mask[:, -ids.shape[1] :].bool()
        found.append(difference(chain.logits(ids, position_ids, mask)[real], expected[real]))
        ids, position_ids = expected[:, -1:].argmax(-1), position_ids[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
    return max(found)


def gradient_difference(whole: Whole, chain: Chain, ids: Tensor) -> float:
    embedding = whole.model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    whole.start(cached=False)
    logits = whole.logits(ids, positions(ids))
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).reshape(logits.shape)
    (logits * weights).mean().backward()
    expected, embedding.grad = embedding.grad, None

    first = chain.ends.embed(ids, positions(ids))
    inputs = [first.detach()]
    with torch.no_grad():
        for stage in chain.stages:
            inputs.append(stage(inputs[-1], position_ids=positions(ids)))
    last = inputs.pop().requires_grad_(True)
    (chain.ends.logits(last) * weights).mean().backward()
    gradient = last.grad
    for stage, hidden in zip(reversed(chain.stages), reversed(inputs), strict=True):
        hidden.requires_grad_(True)
        stage(hidden, position_ids=positions(ids)).backward(gradient)
        gradient = hidden.grad
    first.backward(gradient)
    found = difference(embedding.grad, expected)
    embedding.grad = None
    embedding.requires_grad_(False)
    return found


def positions(ids: Tensor, start: int = 0) -> Tensor:
    """ids [B, T] -> position_ids [B, T], counting from `start`."""
    return torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape[0], -1)


def difference(ours: Tensor | None, expected: Tensor | None) -> float:
    """Largest absolute difference; infinite when shapes differ, a side is missing or NaN."""
    if ours is None or expected is None or ours.shape != expected.shape:
        return float("inf")
    # max() of a tensor with NaN is NaN, and NaN compares as "not larger".
    return float((ours - expected).abs().max().nan_to_num(nan=float("inf")))


def require_exact(config: PretrainedConfig) -> None:
    """Raise CannotSplit for a family whose pieces are not shown to add up to the whole.

    Listed families are held to it by the test suite; others are measured now, on a tiny random model.
    """
    family = config.get_text_config(decoder=True).model_type
    if family in families.SPLIT:
        return
    hint = "Serve it on one machine, or choose another family (`shoal bench split` lists those that can be cut)."
    try:
        model = families.random_model(family)
        found = measure(model, cut(model))
    except (*FOREIGN_ERRORS, ShoalError) as error:
        raise CannotSplit(
            f"The {family!r} family is not known to be cut correctly, and the check with a tiny model failed: {error}",
            hint=hint,
        ) from error
    if found.largest > WRONG:
        raise CannotSplit(
            f"The {family!r} family gives other results when it is cut (largest difference {found.largest:.1e}).",
            hint=hint,
        )
