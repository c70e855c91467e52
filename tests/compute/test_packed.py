"""Packed attention against the formula, written out by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from shoal.compute import packed
from shoal.compute.cache import SessionKv, SlotShape
from shoal.compute.packed import (
    TILE_ROWS,
    Kind,
    MaskRules,
    NotPackable,
    PackedStep,
    Segment,
    Visible,
    attend,
    mark,
    packed_step,
    recognise,
)

HEADS, KV_HEADS, KEY_WIDTH, VALUE_WIDTH = 4, 2, 8, 6
RULES = [Visible(), Visible(Kind.WINDOW, 8), Visible(Kind.CHUNK, 8)]


class Layer(nn.Module):
    layer_idx = 0


def by_hand(
    query: Tensor, keys: Tensor, values: Tensor, position: int, visible: Visible, scaling: float,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """One query row [H, K] over keys [G, L, K], values [G, L, V] -> [H, V], head by head."""
    out = []
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        seen = slice(visible.first_key(position), position + 1)
        scores = keys[group, seen].double() @ query[head].double() * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (sinks[head].double().exp() if sinks is not None else 0.0)
        out.append((weights / total) @ values[group, seen].double())
    return torch.stack(out)


@pytest.mark.parametrize("visible", RULES, ids=lambda rule: rule.kind.value)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("plan", [[(20, 1), (3, 1), (0, 1)], [(20, 30), (3, 1), (0, 5)]], ids=["decode", "mixed"])
def test_every_row_attends_to_its_own_session_as_the_formula_says(
    visible: Visible, softcap: float | None, with_sinks: bool, plan: list[tuple[int, int]]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rules = MaskRules()
    rows = sum(n for _, n in plan)
    query, key, value = random(1, HEADS, rows, KEY_WIDTH), random(1, KV_HEADS, rows, KEY_WIDTH), None
    value = random(1, KV_HEADS, rows, VALUE_WIDTH)
    sinks = random(HEADS) if with_sinks else None
    marker = torch.empty(1, 1, 0, 0)
    marker.shoal_visible = visible  # type: ignore[attr-defined]
    segments, expected, offset = [], [], 0
    for past, n in plan:
        kv = SessionKv(
            {0: SlotShape(KV_HEADS, KEY_WIDTH, VALUE_WIDTH)},
            max_tokens=100, dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        kv.reserve(past + n)
        _, _, keys, values = kv.step_views(0, past + n)[0]
        keys[:, :, :past], values[:, :, :past] = random(*keys[:, :, :past].shape), random(*values[:, :, :past].shape)
        segments.append(Segment(offset, n, past, kv.step_views(past, n)))
        all_keys = torch.cat((keys[0, :, :past], key[0, :, offset : offset + n]), dim=1)
        all_values = torch.cat((values[0, :, :past], value[0, :, offset : offset + n]), dim=1)
        for row in range(n):
            one = query[0, :, offset + row]
            expected.append(by_hand(one, all_keys, all_values, past + row, visible, 0.3, softcap, sinks))
        offset += n
    with packed_step(PackedStep(segments, rules)):
        out, _ = attend(Layer(), query, key, value, marker, scaling=0.3, softcap=softcap, s_aux=sinks)
    torch.testing.assert_close(out[0].double(), torch.stack(expected), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("visible", RULES, ids=lambda rule: rule.kind.value)
@pytest.mark.parametrize("rows", [1, 2, TILE_ROWS - 1, TILE_ROWS])
def test_a_tile_mask_hides_exactly_what_the_rule_hides(visible: Visible, rows: int) -> None:
    if visible.kind is Kind.CHUNK:
        rows = min(rows, visible.size)  # tiles of a chunked layer never cross a chunk
    position = 160
    first = visible.first_key(position)
    keys = position + rows - first
    window = visible.size if visible.kind is Kind.WINDOW else 0
    mask = MaskRules().tile(rows, keys, window, torch.float32, torch.device("cpu"))
    for row in range(rows):
        seen = range(visible.first_key(position + row), position + row + 1)
        expected = [0.0 if first + key in seen else -math.inf for key in range(keys)]
        assert mask[row].tolist() == expected


def test_rules_of_the_library_mask_functions_are_recognised() -> None:
    none_padded = torch.zeros(1, dtype=torch.long)
    assert recognise(causal_mask_function, 0) == Visible()
    assert recognise(sliding_window_causal_mask_function(7), 7) == Visible(Kind.WINDOW, 7)
    assert recognise(chunked_causal_mask_function(7, none_padded), 7) == Visible(Kind.CHUNK, 7)
    # the names of composed functions are equal, so the sizes must come from outside, and are checked
    rules = MaskRules()
    assert rules.marker(sliding_window_causal_mask_function(7), 7, "cpu").shoal_visible == Visible(Kind.WINDOW, 7)
    assert rules.marker(sliding_window_causal_mask_function(9), 9, "cpu").shoal_visible == Visible(Kind.WINDOW, 9)
    assert rules.marker(chunked_causal_mask_function(7, none_padded), 7, "cpu").shoal_visible.kind is Kind.CHUNK
    assert rules.marker(causal_mask_function, 0, "cpu").shoal_visible == Visible()


def test_masks_that_are_not_ours_are_refused() -> None:
    def every_other(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (row - key) % 2 == 0

    for foreign in (bidirectional_mask_function, and_masks(causal_mask_function, every_other)):
        with pytest.raises(NotPackable):
            recognise(foreign, 4)
    with packed_step(PackedStep([], MaskRules())), pytest.raises(NotPackable):
        mark(mask_function=causal_mask_function, attention_mask=torch.tensor([[False, True]]))


def test_a_mask_that_lost_its_marker_is_refused_and_not_ignored() -> None:
    marker = MaskRules().marker(causal_mask_function, 0, "cpu")
    with packed_step(PackedStep([], MaskRules())), pytest.raises(NotPackable):
        attend(Layer(), *torch.zeros(3, 1, 2, 1, 4), marker[:, :, :, :0])


def test_the_context_belongs_to_one_step_and_is_gone_after_it() -> None:
    with (
        packed_step(PackedStep([], MaskRules())),
        pytest.raises(RuntimeError),
        packed_step(PackedStep([], MaskRules())),
    ):
        pass
    assert packed._current.get() is None
    with pytest.raises(RuntimeError):
        attend(Layer(), *torch.zeros(3, 1, 2, 1, 4), None)
