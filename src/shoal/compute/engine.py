"""The block engine: the waiting rows of all sessions through one stage, in as few forwards as possible.

A *work* is "the next `rows` hidden states of this session". `run` takes works of many sessions at once and returns
their hidden states behind the stage's last layer:

    engine = BlockEngine(stage)
    engine.open(b"a", stage.blocks, max_tokens=512)
    engine.open(b"b", stage.blocks, max_tokens=512)
    out = engine.run([Work(b"a", 0, 256), Work(b"b", 40, 1)], hidden)      # [257, H] -> [257, H]

Two paths give the same numbers:

- *packed*: all rows in one `[1, rows, H]` forward, attention per session (packed.py). Weights are read once for all
  sessions, which is what makes a busy server cheap.
- *single*: one session at a time with the model library's own cache. For families whose attention does not go through
  the library's interface (BLOOM), or that carry other states than keys and values (Mamba).

Which path a stage takes is not a list of names: at construction both run on random rows, and they must agree.
`packed_reason` says what came of it.

Not thread-safe: one compute thread owns an engine, and a process has only one such thread.

Letters: H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from shoal.compute import products
from shoal.compute.cache import GrowingLayer, SessionKv, SlotShape, cache_bytes, cache_costs, growing_cache, pages
from shoal.compute.packed import (
    ATTENTION_NAME,
    Discovery,
    MaskRules,
    NotPackable,
    PackedStep,
    PassThroughCache,
    Segment,
    packed_step,
)
from shoal.compute.split import Stage
from shoal.compute.tiles import PROBE_ROWS, RowTile, first_that_holds
from shoal.errors import CannotSplit, UsageError
from shoal.spec.ids import BlockRange

# Largest accepted difference between packed and single path in the self-check, relative to what the stage adds to its
# input. In fp32 a wrong mask or position shows as 1e-2 and more, rounding as 1e-6; in 16 bits rounding reaches 1e-2.
SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
SELF_CHECK_TOLERANCE_16_BIT = 5e-2

# What a family's own code may raise when it is run in a way it was not written for.
_FOREIGN_ERRORS = (NotPackable, AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError)


@dataclass(frozen=True, slots=True)
class Work:
    """The next `rows` rows of `session`, the first of which stands at `position` (= tokens stored so far)."""

    session: bytes
    position: int
    rows: int


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What the sessions of an engine hold. Pages are pages of `cache.PAGE_TOKENS` tokens over the session's blocks."""

    sessions: int
    tokens: int
    used_pages: int
    allocated_bytes: int


@dataclass(slots=True)
class _Session:
    """One session's place: the blocks it runs through and what is stored for it (exactly one of `kv`, `cache`)."""

    blocks: BlockRange
    stage: Stage
    max_tokens: int
    kv: SessionKv | None = None
    cache: Cache | None = None
    length: int = 0


@dataclass(slots=True)
class _Forward:
    """Works that share one forward, each with the index of its first row in the caller's `hidden`."""

    stage: Stage
    members: list[tuple[Work, int]] = field(default_factory=list)
    tile: RowTile | None = None


class BlockEngine:
    """Runs sessions through `stage`.

    Raises CannotSplit at construction for a family that gives other numbers when it is continued from its cache than
    in one piece: no serving path would be right.

    Attributes:
        packed: whether rows of several sessions share a forward; `packed_reason` says why (not).
        exact: a decode row's bits do not depend on which other sessions decode beside it, and a prefill chunk runs
            alone. A replayed chunk of other size may still differ in the last bits. Costs about a tenth of a lone
            session's step, nothing at 8 sessions, and a factor of 2.4 at 32 (benchmarks/engine_step.py).
        continues_in_chunks: False for families that continue a cached session only row by row (Mamba, Falcon Mamba: in
            transformers 5.23 a second chunk silently starts from an empty state). Their first chunk runs at once.
        row_tile: how decode rows are grouped in exact mode, None otherwise.
        kv_bytes_per_token: what one token of a session over all blocks of the stage adds to the cache.
        state_bytes: what a session holds besides, whatever its length (recurrent and convolution states).
    """

    def __init__(self, stage: Stage, *, exact: bool = False) -> None:
        self.stage = stage
        self.exact = exact
        self.packed = False
        self.packed_reason = ""
        self.continues_in_chunks = True
        self.row_tile: RowTile | None = None
        self.kv_bytes_per_token = 0
        self.state_bytes = 0
        self._sessions: dict[bytes, _Session] = {}
        self._views: dict[BlockRange, Stage] = {stage.blocks: stage}
        self._rules = MaskRules()
        self._slots: dict[int, SlotShape] = {}
        self._configs = _configs(stage)
        self._rotary = _Rotary(stage)
        (products.plain if exact else products.choose)(stage.layers)
        self._self_check()
        if exact and self.packed:
            self.row_tile = self._find_row_tile()

    # Sessions

    def open(self, session: bytes, blocks: BlockRange, max_tokens: int) -> None:
        """Start a session that runs through `blocks` and stores at most `max_tokens` tokens.

        Takes no cache memory yet. Raises UsageError for blocks outside the stage, ValueError for a session that is open
        already or a `max_tokens` below 1 (both are the caller's mistake).
        """
        if session in self._sessions:
            raise ValueError(f"Session {session.hex()} is open already.")
        if max_tokens < 1:
            raise ValueError(f"A session needs room for at least 1 token, not {max_tokens}.")
        view = self._view(blocks)
        place = _Session(blocks, view, max_tokens)
        if self.packed:
            first = blocks.start - self.stage.blocks.start
            slots = {slot - first: shape for slot, shape in self._slots.items() if first <= slot < first + len(blocks)}
            place.kv = SessionKv(slots, max_tokens=max_tokens, dtype=self.stage.dtype, device=self.stage.device)
        else:
            place.cache = growing_cache(view.new_cache(), max_tokens=max_tokens)
        self._sessions[session] = place

    def close(self, session: bytes) -> None:
        """Forget the session and free its cache at once. Raises KeyError when it is not open."""
        del self._sessions[session]

    def length(self, session: bytes) -> int:
        """Tokens stored for the session. Raises KeyError when it is not open."""
        return self._sessions[session].length

    def truncate(self, session: bytes, length: int) -> None:
        """Cut the session back to its first `length` tokens.

        Raises KeyError for a session that is not open, ValueError for a length it never had, UsageError when the
        family keeps a state that cannot be taken back (then close the session, open it again and replay it).
        """
        place = self._sessions[session]
        if not 0 <= length <= place.length:
            raise ValueError(f"Cannot cut a session of {place.length} tokens to {length}.")
        if length == place.length:
            return
        if place.cache is not None:
            if not all(isinstance(layer, GrowingLayer) for layer in place.cache.layers):
                raise UsageError(
                    "This model family keeps a running state that cannot be taken back to an earlier token.",
                    hint="Open the session anew and replay its inputs.",
                )
            place.cache.crop(length - place.length)
        place.length = length

    def statistics(self) -> CacheStatistics:
        """What all sessions hold now."""
        places = self._sessions.values()
        return CacheStatistics(
            sessions=len(places),
            tokens=sum(place.length for place in places),
            used_pages=sum(pages(place.length) for place in places),
            allocated_bytes=sum(
                place.kv.allocated_bytes if place.kv is not None else cache_bytes(place.cache) for place in places
            ),
        )

    # Steps

    def run(self, works: Sequence[Work], hidden: Tensor) -> Tensor:
        """Run the rows of `works`, which lie in `hidden` [sum of rows, H] in the same order -> [sum of rows, H].

        Raises KeyError for a session that is not open; ValueError when a work does not continue its session
        (`position` != length), exceeds its `max_tokens` or comes twice, or when `hidden` has another shape. All checks
        come first: after an error nothing has changed.
        """
        self._check(works, hidden)
        with torch.inference_mode():
            hidden = hidden.to(device=self.stage.device, dtype=self.stage.dtype)
            if not self.packed:
                outs = []
                for work, rows in zip(works, hidden.split([work.rows for work in works]), strict=True):
                    outs.append(self._run_single(self._sessions[work.session], work, rows))
                return torch.cat(outs)
            forwards = list(self._forwards(works))
            if len(forwards) == 1:
                result = self._run_packed(forwards[0], hidden)
            else:
                result = torch.empty_like(hidden)
                for forward in forwards:
                    rows = torch.tensor([row for work, at in forward.members for row in range(at, at + work.rows)])
                    rows = rows.to(hidden.device)
                    result[rows] = self._run_packed(forward, hidden[rows])
            for work in works:
                self._sessions[work.session].length += work.rows
            return result

    def _check(self, works: Sequence[Work], hidden: Tensor) -> None:
        expected = (sum(work.rows for work in works), self.stage.hidden_size)
        if not works or tuple(hidden.shape) != expected:
            raise ValueError(f"Hidden states of shape {expected} were announced, {tuple(hidden.shape)} came.")
        if len({work.session for work in works}) != len(works):
            raise ValueError("A session has two works in one run; the second depends on the first.")
        for work in works:
            place = self._sessions[work.session]
            if work.rows < 1 or work.position != place.length:
                raise ValueError(
                    f"Session {work.session.hex()} holds {place.length} tokens; "
                    f"{work.rows} rows at position {work.position} do not continue it."
                )
            if work.position + work.rows > place.max_tokens:
                raise ValueError(
                    f"Session {work.session.hex()} was opened for {place.max_tokens} tokens; "
                    f"{work.rows} rows at position {work.position} exceed that."
                )

    def _forwards(self, works: Sequence[Work]) -> Iterator[_Forward]:
        """Which works share a forward: those over the same blocks on the same side of a rotary border."""
        together: dict[tuple[BlockRange, int], _Forward] = {}
        row = 0
        for work in works:
            place = self._sessions[work.session]
            key = (place.blocks, self._rotary.side(work.position + work.rows))
            together.setdefault(key, _Forward(place.stage)).members.append((work, row))
            row += work.rows
        for forward in together.values():
            if self.row_tile is None:
                yield forward
            else:
                yield from self._tiles(forward, self.row_tile)

    def _tiles(self, forward: _Forward, tile: RowTile) -> Iterator[_Forward]:
        """Exact mode: every prefill chunk alone, decode rows in tiles."""
        single_rows = [member for member in forward.members if member[0].rows == 1]
        for member in forward.members:
            if member[0].rows > 1:
                yield _Forward(forward.stage, [member])
        for start in range(0, len(single_rows), tile.rows):
            yield _Forward(forward.stage, single_rows[start : start + tile.rows], tile)

    def _run_packed(self, forward: _Forward, hidden: Tensor) -> Tensor:
        """hidden [rows of the forward, H] -> the same shape. Lengths are advanced by the caller."""
        segments: list[Segment] = []
        positions: list[int] = []
        offset = 0
        for work, _ in forward.members:
            kv = self._sessions[work.session].kv
            assert kv is not None, "sessions of a packed engine store their own keys and values"
            kv.length = work.position
            kv.reserve(work.position + work.rows)
            segments.append(Segment(offset, work.rows, work.position, kv.step_views(work.position, work.rows)))
            positions.extend(range(work.position, work.position + work.rows))
            offset += work.rows
        if forward.tile is not None:  # decode rows only, so row i of the forward is member i
            order = forward.tile.order(offset)
            hidden = hidden[order]
            positions = [positions[row] for row in order]
        position_ids = torch.tensor([positions], device=hidden.device)
        with self._packed_attention(), packed_step(PackedStep(segments, self._rules)):
            out = forward.stage(hidden.unsqueeze(0), position_ids=position_ids, cache=PassThroughCache())
        return out[0, :offset]

    def _run_single(self, place: _Session, work: Work, hidden: Tensor) -> Tensor:
        """hidden [rows, H] -> [rows, H], with the session's own cache."""
        at_once = self.continues_in_chunks or work.position == 0
        outs = []
        for part in (hidden,) if at_once else hidden.split(1):
            self._rotary.forget()
            end = place.length + part.shape[0]
            position_ids = torch.arange(place.length, end, device=hidden.device).unsqueeze(0)
            outs.append(place.stage(part.unsqueeze(0), position_ids=position_ids, cache=place.cache)[0])
            place.length = end
        return torch.cat(outs)

    @contextmanager
    def _packed_attention(self) -> Iterator[None]:
        """Let the stage's layers call our attention and mask functions. Outside of a step the family's own are back,
        so the stage can still be used directly (gradients, the single path)."""
        own = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = ATTENTION_NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, own, strict=True):
                config._attn_implementation_internal = name

    def _view(self, blocks: BlockRange) -> Stage:
        view = self._views.get(blocks)
        if view is None:
            view = self._views[blocks] = self.stage.narrow(blocks)
        return view

    # Self-checks

    def _self_check(self) -> None:
        """Decide the path, by running a few random rows in several ways that must agree."""
        first, second = b"self-check 1", b"self-check 2"
        at_once = [[Work(first, 0, 16)]]
        in_chunks = [[Work(first, 0, 12), Work(second, 0, 5)], [Work(first, 12, 4), Work(second, 5, 1)]]
        generator = torch.Generator().manual_seed(0)
        shape = (22, self.stage.hidden_size)  # 16 rows of the first session, then 6 of the second
        inputs = torch.randn(shape, generator=generator).to(device=self.stage.device, dtype=self.stage.dtype)
        start = {first: 0, second: 16}

        def rows_of(work: Work) -> slice:
            return slice(start[work.session] + work.position, start[work.session] + work.position + work.rows)

        def outcome(plan: list[list[Work]]) -> Tensor:
            out = torch.zeros_like(inputs)
            try:
                for session in (first, second):
                    self.open(session, self.stage.blocks, max_tokens=16)
                for works in plan:
                    result = self.run(works, torch.cat([inputs[rows_of(work)] for work in works]))
                    for work, rows in zip(works, result.split([work.rows for work in works]), strict=True):
                        out[rows_of(work)] = rows
                if not self.packed:
                    self.kv_bytes_per_token, self.state_bytes = cache_costs(self._sessions[first].cache)
                return out
            finally:
                self._sessions.clear()

        whole = outcome(at_once)[:16]
        added = float((whole - inputs[:16]).float().abs().max()) or 1.0
        tolerance = SELF_CHECK_TOLERANCE.get(self.stage.dtype, SELF_CHECK_TOLERANCE_16_BIT)

        def difference(a: Tensor, b: Tensor) -> float:
            return float((a - b).float().abs().max()) / added

        single = outcome(in_chunks)
        if not difference(single[:16], whole) <= tolerance:
            self.continues_in_chunks = False
            single = outcome(in_chunks)
        if not difference(single[:16], whole) <= tolerance:
            raise CannotSplit(
                f"{type(self.stage.model).__name__} cannot be served: continued from its cache, it gives other numbers "
                f"than in one piece ({difference(single[:16], whole):.1e} of what the blocks add)."
            )
        try:
            self._rotary.check()
            self._discover()
            self.packed = True
            apart = difference(outcome(in_chunks), single)
        except _FOREIGN_ERRORS as error:
            self.packed = False
            self.packed_reason = f"one session at a time: {_why(error)}"
            return
        self.packed = apart <= tolerance
        verdict = "packed" if self.packed else "one session at a time"
        self.packed_reason = f"{verdict}: packed and single rows differ by {apart:.1e} of what the blocks add"
        if self.packed:
            numbers = sum(shape.numbers_per_token for shape in self._slots.values())
            self.kv_bytes_per_token = numbers * self.stage.dtype.itemsize

    def _discover(self) -> None:
        """One forward of two rows that stores nothing: which slots does the family's attention use, of what shape?"""
        probe = torch.zeros(1, 2, self.stage.hidden_size, device=self.stage.device, dtype=self.stage.dtype)
        position_ids = torch.zeros(1, 2, dtype=torch.long, device=self.stage.device)
        step = Discovery(self._rules)
        try:
            with torch.inference_mode(), self._packed_attention(), packed_step(step):
                self.stage(probe, position_ids=position_ids, cache=PassThroughCache())
        except _FOREIGN_ERRORS as error:
            if isinstance(error, NotPackable) or step.attended:
                raise
            raise NotPackable("its attention does not go through the library's interface") from error
        if set(step.slots) != set(range(len(self.stage.blocks))):
            raise NotPackable(
                f"{len(step.slots)} of its {len(self.stage.blocks)} layers attend through the library's interface"
            )
        self._slots = step.slots

    def _find_row_tile(self) -> RowTile:
        """The tile under which decode rows of this stage keep their bits in any company, found by trying."""
        sessions = [bytes([index]) * 4 for index in range(PROBE_ROWS)]
        lengths = [1 + index for index in range(PROBE_ROWS)]
        generator = torch.Generator().manual_seed(1)
        prefill = torch.randn(sum(lengths), self.stage.hidden_size, generator=generator)
        rows = torch.randn(PROBE_ROWS, self.stage.hidden_size, generator=generator)

        def decode(tile: RowTile, chosen: Sequence[int]) -> Tensor:
            self.row_tile = tile
            out = self.run([Work(sessions[i], lengths[i], 1) for i in chosen], rows[list(chosen)])
            for i in chosen:
                self.truncate(sessions[i], lengths[i])
            return out

        try:
            for session in sessions:
                self.open(session, self.stage.blocks, max_tokens=16)
            self.run([Work(s, 0, n) for s, n in zip(sessions, lengths, strict=True)], prefill)
            return first_that_holds(decode)
        finally:
            self._sessions.clear()


class _Rotary:
    """The two kinds of rotary tables that depend on the longest position of a call, and what to do about them.

    "longrope" has two sets of frequencies, chosen by whether any position of the call lies beyond the original context:
    sessions on different sides of that border must not share a forward. "dynamic" has one set per length: such a stage
    runs one session at a time, and must not remember the length of another session.
    """

    def __init__(self, stage: Stage) -> None:
        self._dynamic = []
        borders = set()
        for module in stage.model.modules():
            kinds = getattr(module, "rope_type", None)
            kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
            if any(isinstance(kind, str) and "dynamic" in kind for kind in kinds):
                self._dynamic.append(module)
            if "longrope" in kinds:
                parameters = module.config.rope_parameters
                for entry in (parameters, *parameters.values()):
                    if isinstance(entry, dict) and "original_max_position_embeddings" in entry:
                        borders.add(entry["original_max_position_embeddings"])
        self._borders = sorted(borders)

    def check(self) -> None:
        """Raises NotPackable for tables that differ with every length."""
        if self._dynamic:
            raise NotPackable("its rotary frequencies depend on the longest session of a call")

    def side(self, end: int) -> int:
        """On which side of the borders a session of `end` tokens is."""
        return sum(end > border for border in self._borders)

    def forget(self) -> None:
        """Make dynamic tables a function of the coming call's own length alone."""
        for module in self._dynamic:
            module.max_seq_len_cached = 0


def _why(error: Exception) -> str:
    """Our own words where we refused, the family's error otherwise (its code met our marker or the empty cache)."""
    if isinstance(error, NotPackable):
        return str(error)
    return f"its own code does not run on packed rows ({type(error).__name__}: {str(error).splitlines()[0]})"


def _configs(stage: Stage) -> list[PretrainedConfig]:
    """Every configuration object that a module of the stage looks at, once."""
    found: dict[int, PretrainedConfig] = {id(stage.config): stage.config}
    for module in stage.model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found[id(config)] = config
    return list(found.values())
