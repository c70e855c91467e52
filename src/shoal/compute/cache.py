"""Where a session's keys and values lie: contiguous, with room to grow, read through a view.

Two kinds, for the two ways the block engine runs a session:

- `SessionKv` for the packed path: one buffer for all layer slots of a session. The engine writes the new rows in place
  and attention reads `buffer[..., :length, :]`. Nothing is gathered and nothing is concatenated, because a step's
  whole arithmetic for one session costs less than copying its cache (DESIGN.md: view 44 ms, concatenation 84 ms, page
  gather 177 ms per step of 8 sessions at 1,000 tokens).
- `growing_cache` for the one-session-at-a-time path: the model library's own cache object, in which every plain
  attention layer is replaced by one that writes in place. Convolution and recurrent states stay as the library does
  them.

Memory is accounted in pages of `PAGE_TOKENS` tokens. Sliding-window layers keep all their tokens too: it costs memory,
and buys that any session can be cut back to any length (`truncate`) when a step has to be run again.

Letters: S layer slots, G key/value heads, C capacity in tokens, D head width (K for keys, V for values).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

PAGE_TOKENS = 16
"""Unit of accounting. 16 tokens of one fp32 head of width 64 are one page of the operating system."""

FIRST_CAPACITY_TOKENS = 4 * PAGE_TOKENS
"""A short question fits without growing once; at 16 layers of 4 heads of width 64 it is 2 MiB in bf16."""


def pages(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


def grown_capacity(capacity: int, needed: int, limit: int) -> int:
    """Next capacity in tokens: at least `needed`, doubling so that copies stay amortised, never above `limit` pages.

    `limit` is what admission has reserved for the session, so growth inside it needs nobody's permission.
    """
    wanted = max(needed, 2 * capacity, FIRST_CAPACITY_TOKENS)
    return pages(max(needed, min(wanted, limit))) * PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class SlotShape:
    """What one layer slot stores per token: `kv_heads` keys of `key_width` and values of `value_width` numbers."""

    kv_heads: int
    key_width: int
    value_width: int

    @property
    def numbers_per_token(self) -> int:
        return self.kv_heads * (self.key_width + self.value_width)


class SessionKv:
    """Keys and values of one session over some layer slots. One buffer per distinct slot shape, allocated when needed.

    A step takes the views of all slots at once (`step_views`), because one `unbind` over S slots costs about as much as
    one slice, and a model has tens of slots.
    """

    def __init__(self, slots: Mapping[int, SlotShape], *, max_tokens: int, dtype: torch.dtype, device: torch.device):
        self.max_tokens = max_tokens
        self.length = 0
        """Tokens stored. Set by the engine after a whole step has run; rows written beyond it are not there yet."""
        self.capacity = 0
        self._dtype = dtype
        self._device = device
        self._groups: dict[SlotShape, list[int]] = {}
        for slot, shape in slots.items():
            self._groups.setdefault(shape, []).append(slot)
        self._keys: dict[SlotShape, Tensor] = {}  # [S, 1, G, C, K]
        self._values: dict[SlotShape, Tensor] = {}  # [S, 1, G, C, V]
        numbers = sum(shape.numbers_per_token * len(group) for shape, group in self._groups.items())
        self.bytes_per_token = numbers * dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        return self.capacity * self.bytes_per_token

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all; what is stored stays."""
        if tokens <= self.capacity:
            return
        capacity = grown_capacity(self.capacity, tokens, self.max_tokens)
        for shape, group in self._groups.items():
            for buffers, width in ((self._keys, shape.key_width), (self._values, shape.value_width)):
                fresh = torch.empty(
                    (len(group), 1, shape.kv_heads, capacity, width), dtype=self._dtype, device=self._device
                )
                if self.length:
                    fresh[:, :, :, : self.length] = buffers[shape][:, :, :, : self.length]
                buffers[shape] = fresh
        self.capacity = capacity

    def step_views(self, position: int, rows: int) -> dict[int, SlotViews]:
        """Views for a step that stores `rows` rows from `position` on: slot -> where to write, what to attend to."""
        end = position + rows
        views: dict[int, SlotViews] = {}
        for shape, group in self._groups.items():
            keys, values = self._keys[shape], self._values[shape]
            per_slot = zip(
                keys.narrow(3, position, rows).unbind(0),
                values.narrow(3, position, rows).unbind(0),
                keys.narrow(3, 0, end).unbind(0),
                values.narrow(3, 0, end).unbind(0),
                strict=True,
            )
            for slot, (new_keys, new_values, all_keys, all_values) in zip(group, per_slot, strict=True):
                views[slot] = (new_keys, new_values, all_keys, all_values)
        return views

    def truncate(self, length: int) -> None:
        """Forget everything from token `length` on. The room stays reserved."""
        self.length = length


SlotViews = tuple[Tensor, Tensor, Tensor, Tensor]
"""(keys to write [1, G, rows, K], values to write [1, G, rows, V], keys to read [1, G, end, K], values to read)."""


class GrowingLayer(DynamicLayer):
    """An attention layer's cache for one session that writes in place and returns views of the stored tokens."""

    def __init__(self, max_tokens: int):
        super().__init__()
        self._max_tokens = max_tokens
        self._length = 0
        self._key_buffer: Tensor | None = None  # [1, G, C, K]
        self._value_buffer: Tensor | None = None  # [1, G, C, V]

    @property
    def allocated_bytes(self) -> int:
        if self._key_buffer is None or self._value_buffer is None:
            return 0
        return self._key_buffer.nbytes + self._value_buffer.nbytes

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the new rows; returns all keys [1, G, length, K] and values [1, G, length, V] as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[-2]
        self._key_buffer = self._with_room(self._key_buffer, key_states, end)
        self._value_buffer = self._with_room(self._value_buffer, value_states, end)
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self._length = end
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def _with_room(self, buffer: Tensor | None, rows: Tensor, needed: int) -> Tensor:
        capacity = 0 if buffer is None else buffer.shape[2]
        if buffer is not None and needed <= capacity:
            return buffer
        heads, width = rows.shape[1], rows.shape[3]
        fresh = rows.new_empty((1, heads, grown_capacity(capacity, needed, self._max_tokens), width))
        if buffer is not None:
            fresh[:, :, : self._length] = buffer[:, :, : self._length]
        return fresh

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (the library passes a negative number)."""
        self._length -= abs(tokens_to_remove)
        if self._key_buffer is not None and self._value_buffer is not None:
            self.keys = self._key_buffer[:, :, : self._length]
            self.values = self._value_buffer[:, :, : self._length]


class GrowingSlidingLayer(GrowingLayer):
    """The same for a sliding-window (or chunked) layer: stores all tokens, returns those the mask may let through."""

    is_sliding = True

    def __init__(self, max_tokens: int, sliding_window: int):
        super().__init__(max_tokens)
        self.sliding_window = sliding_window

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        _, first = self.get_mask_sizes(key_states.shape[-2])
        keys, values = super().update(key_states, value_states)
        return keys[:, :, first:], values[:, :, first:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys returned by the next update, index of the first of them); the window counts the row itself."""
        first = max(self._length - self.sliding_window + 1, 0)
        return self._length - first + query_length, first


def growing_cache(cache: Cache, *, max_tokens: int) -> Cache:
    """Let the plain attention layers of the library's `cache` write in place. Returns the same object.

    Layers with a state of another kind (convolution, recurrent, indexer) are left as they are.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(max_tokens)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = GrowingSlidingLayer(max_tokens, layer.sliding_window)
    return cache


def _tensors(layer: object) -> list[Tensor]:
    """Tensors a library layer holds, also those it keeps in dictionaries by state number."""
    held: list[Tensor] = []
    for value in vars(layer).values():
        values = value.values() if isinstance(value, dict) else (value,)
        held.extend(tensor for tensor in values if isinstance(tensor, Tensor))
    return held


def cache_bytes(cache: Cache) -> int:
    """Bytes a session's library cache holds now: rooms of growing layers and the tensors of all others."""
    return sum(
        layer.allocated_bytes if isinstance(layer, GrowingLayer) else sum(tensor.nbytes for tensor in _tensors(layer))
        for layer in cache.layers
    )


def cache_costs(cache: Cache) -> tuple[int, int]:
    """(bytes that one more token takes, bytes whatever the length) of a library cache that holds some tokens."""
    per_token = constant = 0
    for layer in cache.layers:
        # What has a token dimension lies under these two names in every attention layer of the library.
        stored = [tensor for name in ("keys", "values") if (tensor := getattr(layer, name, None)) is not None]
        stored = [tensor for tensor in stored if tensor.numel()]
        per_token += sum(tensor[..., 0, :].nbytes for tensor in stored)
        if not isinstance(layer, GrowingLayer):
            constant += sum(tensor.nbytes for tensor in _tensors(layer)) - sum(tensor.nbytes for tensor in stored)
    return per_token, constant
