"""Rows of many sessions through one forward: attention that keeps them apart.

The engine packs the rows of all waiting sessions, decode rows and prefill chunks alike, into one sequence
`[1, rows, hidden]` with a position per row. Everything in a decoder layer but attention works row by row, so the
family's own forward runs unchanged; only where rows look at each other do we step in, through the two hooks the model
library offers: an attention function (`attend`) and a mask function (`mark`), both registered as "shoal_packed".

- `mark` builds no mask. It returns an empty tensor that carries a `Visible` rule (full, sliding window, chunk), found
  out by asking the family's mask function about a few positions. Which layers use which mask is the family's business:
  the marker travels with the layer's arguments.
- `attend` writes the new keys and values into each session's buffer and attends session by session over views. It
  honours scaling, softcap, attention sinks, grouped heads and value heads of another width. What it does not know
  raises `NotPackable`, and the engine runs the family one session at a time.

A step's context (which rows belong to whom, where their cache lies) cannot be passed through a family's forward, so it
is a module-level variable, set by `packed_step` for the length of one forward. That is sound because a process has a
single compute thread; `packed_step` refuses to nest.

Letters: R rows of the step, H query heads, G key/value heads, K and V widths of keys and values, T rows of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from shoal.compute.cache import SlotShape, SlotViews

ATTENTION_NAME = "shoal_packed"

TILE_ROWS = 128
"""Prefill rows that attend together. A tile skips the keys behind its last row, so a chunk of 512 rows without past
costs 0.73 of one masked call; smaller tiles gain little more and pay more calls (benchmarks/engine_step.py)."""


class NotPackable(Exception):
    """This family's attention asks for something the packed path does not do. Never leaves the engine."""


class Kind(Enum):
    FULL = "full"
    WINDOW = "window"
    CHUNK = "chunk"


@dataclass(frozen=True, slots=True)
class Visible:
    """Which keys the row at position p may see: all up to p; the last `size`, itself included; or those of its chunk
    of `size` positions up to p."""

    kind: Kind = Kind.FULL
    size: int = 0

    def first_key(self, position: int) -> int:
        """Index of the first key that the row at `position` sees."""
        if self.kind is Kind.WINDOW:
            return max(position - self.size + 1, 0)
        if self.kind is Kind.CHUNK:
            return position - position % self.size
        return 0


FULL = Visible()


@dataclass(frozen=True, slots=True)
class Segment:
    """`rows` consecutive rows of the step, starting at row `offset`, that continue one session at `position`.

    `views` says for every layer slot where to write the new keys and values and what to attend to.
    """

    offset: int
    rows: int
    position: int
    views: dict[int, SlotViews]


@dataclass
class PackedStep:
    """What the attention function has to know during one forward.

    Rows beyond those of the segments are padding (exact mode): row i repeats row i modulo the number of real rows,
    stores nothing and gets the attention output of the row it repeats, so that it stays a copy through all layers.
    """

    segments: Sequence[Segment]
    rules: MaskRules
    attended: int = 0
    """Calls of the attention function so far: 0 after a forward means the family does not use the interface."""
    real_rows: int = field(init=False)
    decode_only: bool = field(init=False)

    def __post_init__(self) -> None:
        self.real_rows = sum(segment.rows for segment in self.segments)
        self.decode_only = all(segment.rows == 1 for segment in self.segments)


class Discovery(PackedStep):
    """A step that stores nothing and only notes the shape of every slot's keys and values (each row sees itself)."""

    def __init__(self, rules: MaskRules) -> None:
        super().__init__(segments=(), rules=rules)
        self.slots: dict[int, SlotShape] = {}


class MaskRules:
    """What one stage's masks look like: rules recognised so far, and additive masks for tiles of rows.

    Seen from its end, every tile has the same mask: the last row sees everything up to the end, the row before it one
    key less, and so on. So one base per window serves all tiles of all sessions and layers, as a slice.
    """

    def __init__(self) -> None:
        self._bases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._markers: dict[Visible, Tensor] = {}
        self._recognised: dict[tuple[str, int], Tensor] = {}

    def marker(self, mask_function: Callable[..., Any], local_size: int, device: torch.device | str) -> Tensor:
        """An empty tensor [1, 1, 0, 0] whose attribute `shoal_visible` is the rule behind `mask_function`."""
        key = (_signature(mask_function), local_size)
        marker = self._recognised.get(key)
        if marker is None:
            visible = recognise(mask_function, local_size, device)
            marker = self._markers.setdefault(visible, torch.empty((1, 1, 0, 0)))
            marker.shoal_visible = visible  # type: ignore[attr-defined]
            self._recognised[key] = marker
        return marker

    def tile(self, rows: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, keys] of 0 and -inf for the last `rows` positions of `keys`; `window` 0 means no window."""
        base = self._bases.get((window, dtype, device))
        if base is None or base.shape[1] < keys:
            width = max(keys, 2 * base.shape[1] if base is not None else 8 * TILE_ROWS)
            key = torch.arange(width, device=device)
            row = torch.arange(width - TILE_ROWS, width, device=device).unsqueeze(1)
            hidden = key > row
            if window:
                hidden |= key <= row - window
            base = torch.zeros((TILE_ROWS, width), dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
            self._bases[(window, dtype, device)] = base
        return base[TILE_ROWS - rows :, base.shape[1] - keys :]


class PassThroughCache(Cache):
    """The cache object a family's forward is given on the packed path: it stores nothing and hands k and v through.

    The families call `update` just before the attention function; storing there would not work, because `update` does
    not know which session a row belongs to and must return one tensor for all rows.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given explicitly, so nothing may be derived from a common length."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def _refuse(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotPackable("its layers keep other states than keys and values")

    update_conv_state = update_recurrent_state = get_conv_state = get_recurrent_state = update_indexer = _refuse


_current: ContextVar[PackedStep | None] = ContextVar("the packed step of this thread", default=None)


@contextmanager
def packed_step(step: PackedStep) -> Iterator[PackedStep]:
    """Make `step` the one that `attend` serves, for one forward of this thread. Engines in other threads go on."""
    if _current.get() is not None:
        raise RuntimeError("A packed step is running in this thread already.")
    token = _current.set(step)
    try:
        yield step
    finally:
        _current.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function: query [1, H, R, K], key [1, G, R, K], value [1, G, R, V] -> ([1, R, H, V], None)."""
    step = _current.get()
    if step is None:
        raise RuntimeError("The packed attention function was called outside of a step of the block engine.")
    step.attended += 1
    slot = module.layer_idx
    if not isinstance(slot, int):
        raise NotPackable("its attention layers do not know their cache slot")
    visible = _visible(attention_mask, sliding_window)
    if isinstance(step, Discovery):
        if position_bias is not None or is_causal is False:
            raise NotPackable("its attention uses a position bias or is not causal")
        if slot in step.slots:
            raise NotPackable("two of its attention layers use the same cache slot")
        step.slots[slot] = SlotShape(key.shape[1], key.shape[3], value.shape[3])
        groups = query.shape[1] // key.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None

    core = _Core(scaling, softcap, s_aux, query.shape[1] // key.shape[1])
    if step.decode_only:
        out = _decode(step, slot, visible, core, query, key, value)
    else:
        out = _mixed(step, slot, visible, core, query, key, value)
    return out, None


def _decode(
    step: PackedStep, slot: int, visible: Visible, core: _Core, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """One row per session: the group of query heads that share a key head stand as rows of one small product."""
    _, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    queries = query.transpose(1, 2).reshape(rows, 1, kv_heads, heads // kv_heads, width).unbind(0)
    if rows == 1:
        keys, values = (key,), (value,)
    else:
        keys, values = key.split(1, dim=2), value.split(1, dim=2)
    outs = []
    for index, segment in enumerate(step.segments):
        new_keys, new_values, all_keys, all_values = segment.views[slot]
        new_keys.copy_(keys[index])
        new_values.copy_(values[index])
        first = visible.first_key(segment.position)
        if first:
            all_keys, all_values = all_keys[:, :, first:], all_values[:, :, first:]
        outs.append(core(queries[index], all_keys, all_values, None))
    if rows == 1:
        return outs[0].reshape(1, 1, heads, -1)
    outs.extend(outs[index % step.real_rows] for index in range(step.real_rows, rows))
    return torch.cat(outs).view(1, rows, heads, -1)


def _mixed(
    step: PackedStep, slot: int, visible: Visible, core: _Core, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Prefill chunks, with or without decode rows beside them, tile by tile."""
    _, heads, rows, _ = query.shape
    out = query.new_empty((1, rows, heads, value.shape[3]))
    for segment in step.segments:
        new_keys, new_values, all_keys, all_values = segment.views[slot]
        here = slice(segment.offset, segment.offset + segment.rows)
        new_keys.copy_(key[:, :, here])
        new_values.copy_(value[:, :, here])
        done = 0
        while done < segment.rows:
            position = segment.position + done
            count = min(TILE_ROWS, segment.rows - done)
            if visible.kind is Kind.CHUNK:  # a tile ends where the next chunk begins, so all its rows start alike
                count = min(count, visible.size - position % visible.size)
            first, end = visible.first_key(position), position + count
            tile = slice(segment.offset + done, segment.offset + done + count)
            window = visible.size if visible.kind is Kind.WINDOW else 0
            mask = step.rules.tile(count, end - first, window, query.dtype, query.device) if count > 1 else None
            part = core.tile(query[:, :, tile], all_keys[:, :, first:end], all_values[:, :, first:end], mask)
            out[:, tile] = part.transpose(1, 2)
            done += count
    for row in range(step.real_rows, rows):
        out[:, row] = out[:, row % step.real_rows]
    return out


class _Core:
    """softmax(scale * q k + mask) v for one session, with whatever the family adds to it.

    Softcap and sinks are not known to the fused kernel, so those families take the written-out product.
    """

    __slots__ = ("fused", "groups", "scaling", "sinks", "softcap")

    def __init__(self, scaling: float | None, softcap: float | None, sinks: Tensor | None, groups: int):
        self.scaling = scaling
        self.softcap = softcap
        self.sinks = sinks
        self.groups = groups
        self.fused = softcap is None and sinks is None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [1, G, H/G * T, K], the T rows of a query head together; key [1, G, L, K] -> [1, G, H/G * T, V]."""
        if self.fused:
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        scale = self.scaling if self.scaling is not None else query.shape[-1] ** -0.5
        scores = torch.matmul(query, key.transpose(2, 3)) * scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores + mask
        scores = scores.float()
        if self.sinks is None:
            return torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)
        kv_heads, rows = query.shape[1], query.shape[2] // self.groups
        sinks = (
            self.sinks.float().view(1, kv_heads, self.groups, 1).expand(-1, -1, -1, rows).reshape(1, kv_heads, -1, 1)
        )
        # A sink is one more key whose value is nothing: it takes its share of the softmax and adds no output.
        probabilities = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        return torch.matmul(probabilities.to(value.dtype), value)

    def tile(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [1, H, T, K], key [1, G, L, K], value [1, G, L, V], mask [T, L] -> [1, H, T, V]."""
        if self.fused:
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=self.scaling, enable_gqa=self.groups > 1
            )
        _, heads, rows, width = query.shape
        folded = query.reshape(1, heads // self.groups, self.groups * rows, width)
        repeated = mask.repeat(self.groups, 1) if mask is not None else None
        return self(folded, key, value, repeated).reshape(1, heads, rows, -1)


def mark(
    *,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The mask function: builds nothing, returns the marker of the rule that says which keys a row sees."""
    step = _current.get()
    if step is None:
        raise RuntimeError("The packed mask function was called outside of a step of the block engine.")
    padded = attention_mask is not None and not bool(attention_mask.all())
    if padded or use_vmap:
        raise NotPackable("its forward adds a mask of its own to the causal one")
    return step.rules.marker(mask_function, local_size or 0, device)


def _visible(attention_mask: Tensor | None, sliding_window: int | None) -> Visible:
    """The rule of this layer: from the marker; by the layer's own word when the family makes no mask."""
    if attention_mask is None:
        return Visible(Kind.WINDOW, sliding_window) if sliding_window else FULL
    visible = getattr(attention_mask, "shoal_visible", None)
    if visible is None:
        raise NotPackable("it changes its mask before it reaches the attention function")
    return visible


def _signature(function: Callable[..., Any]) -> str:
    """Names of a mask function and of the functions it was composed from.

    The library composes a fresh function in every forward, so the object itself is no key; asking it about positions
    every time would cost more than the mask did.
    """
    names = [getattr(function, "__qualname__", repr(function))]
    for cell in getattr(function, "__closure__", None) or ():
        for inner in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
            if callable(inner):
                names.append(_signature(inner))
    return " ".join(names)


def recognise(mask_function: Callable[..., Any], local_size: int, device: torch.device | str = "cpu") -> Visible:
    """Ask a family's mask function about positions around one and two local sizes, and compare with our rules.

    Raises NotPackable when it is neither causal, nor a causal sliding window, nor causal within chunks.
    """
    size = local_size or 4
    positions = sorted({0, 1, *(max(base + d, 0) for base in (size, 2 * size) for d in (-2, -1, 0, 1))})
    around = torch.tensor(positions, device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    theirs = mask_function(zero, zero, around.unsqueeze(1), around.unsqueeze(0)).cpu()
    for visible in (FULL, Visible(Kind.WINDOW, size), Visible(Kind.CHUNK, size)):
        ours = torch.tensor([[visible.first_key(row) <= key <= row for key in positions] for row in positions])
        if torch.equal(theirs.expand_as(ours).to(ours), ours):
            return visible
    raise NotPackable("its mask is neither causal, nor a sliding window, nor chunked")


AttentionInterface.register(ATTENTION_NAME, attend)
AttentionMaskInterface.register(ATTENTION_NAME, mark)
