"""Speed and latency learned from measurements. Pure: a measurement comes in, a figure comes out, nothing reads a clock.

Medians over a short window, not means: on a shared machine one step in twenty takes several times as long as the others
(another process, a page fault), and a mean would carry that around for minutes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

WINDOW = 32
"""Measurements that a figure looks back on."""
DECODE_ROWS = 8
"""Up to this many rows a batch takes about as long as one row (the weights are read once): it tells decode speed."""
PREFILL_ROWS = 64
"""From this many rows a batch is bound by arithmetic: its time per row tells prefill speed. What lies between the two
tells neither, and is left out."""
DEFAULT_RTT_MS = 1.0
"""A link nobody has measured yet: a local network."""
MAX_LINKS = 4096


class Window:
    """The last `size` values and their quantiles; `initial` stands in until the first value comes."""

    def __init__(self, initial: float, size: int = WINDOW) -> None:
        self._initial = initial
        self._values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        self._values.append(value)

    def quantile(self, q: float) -> float:
        """The smallest value that at least the share `q` (0 to 1) of the window does not exceed."""
        if not self._values:
            return self._initial
        ordered = sorted(self._values)
        rank = max(0, -int(-q * len(ordered) // 1) - 1)  # ceiling of q * n, counted from zero
        return ordered[rank]

    def median(self) -> float:
        return self.quantile(0.5)

    def __len__(self) -> int:
        return len(self._values)


class Speed:
    """How fast this machine's blocks are: the figures of its Record. Starts from a probe, goes on with real traffic."""

    def __init__(self, decode_ms_per_block: float, prefill_ms_per_block_token: float) -> None:
        self._decode = Window(decode_ms_per_block)
        self._prefill = Window(prefill_ms_per_block_token)

    def measured(self, *, rows: int, blocks: int, took_ms: float) -> None:
        """One batch of `rows` rows went through `blocks` blocks in `took_ms`."""
        if rows <= 0 or blocks <= 0:
            raise ValueError(f"a batch has rows and blocks, not {rows} and {blocks}")
        if rows <= DECODE_ROWS:
            self._decode.add(took_ms / blocks)
        elif rows >= PREFILL_ROWS:
            self._prefill.add(took_ms / blocks / rows)

    @property
    def decode_ms_per_block(self) -> float:
        """Time of one block for one row (or a small batch of rows)."""
        return self._decode.median()

    @property
    def prefill_ms_per_block_token(self) -> float:
        return self._prefill.median()


class Share:
    """Which share of the last `window_s` seconds went into something, for example computing."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._spells: deque[tuple[float, float]] = deque()
        """(begin, end), oldest first."""

    def add(self, now: float, seconds: float) -> None:
        """A spell of `seconds` ended now."""
        self._spells.append((now - max(seconds, 0.0), now))
        self._forget(now)

    def at(self, now: float) -> float:
        """0 to 1. A window that has only begun counts as a whole one: nobody is busy after one step."""
        self._forget(now)
        start = now - self._window_s
        return min(1.0, sum(end - max(begin, start) for begin, end in self._spells) / self._window_s)

    def _forget(self, now: float) -> None:
        while self._spells and self._spells[0][1] <= now - self._window_s:
            self._spells.popleft()


class Links:
    """Round-trip times between pairs of nodes. A link is the same in both directions. What this node measured itself
    (medians over its heartbeats) comes before what the ends of a link say in their records."""

    def __init__(self, default_rtt_ms: float = DEFAULT_RTT_MS) -> None:
        self._default_rtt_ms = default_rtt_ms
        self._windows: dict[tuple[str, str], Window] = {}
        self._reported: dict[str, dict[str, float]] = {}

    def measured(self, a: str, b: str, rtt_ms: float) -> None:
        key = (a, b) if a < b else (b, a)
        window = self._windows.pop(key, None) or Window(self._default_rtt_ms)
        window.add(rtt_ms)
        self._windows[key] = window  # at the end: the link heard of longest ago is forgotten first
        if len(self._windows) > MAX_LINKS:
            del self._windows[next(iter(self._windows))]

    def reported(self, says: Mapping[str, Iterable[tuple[str, float]]]) -> None:
        """What every node says about its links, as (other node, round trip in ms); replaces what was said before."""
        self._reported = {node: dict(rtts) for node, rtts in says.items()}

    def rtt_ms(self, a: str, b: str) -> float:
        """Round trip between two nodes; 0 within one node, the default when nobody has measured it. Where both ends
        say something, the longer time counts: a node does not get work by praising its links."""
        if a == b:
            return 0.0
        window = self._windows.get((a, b) if a < b else (b, a))
        if window is not None:
            return window.median()
        said = [rtts[other] for node, other in ((a, b), (b, a)) if other in (rtts := self._reported.get(node, {}))]
        return max(said, default=self._default_rtt_ms)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._windows)
