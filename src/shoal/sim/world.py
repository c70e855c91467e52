"""The simulated world: a clock that jumps from event to event, one source of chance, and a trace.

Everything that happens is a function call at a time; calls at the same time run in the order they were scheduled. All
chance comes from `rng`, so a seed replays a run bit for bit, on any machine and Python version.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

Call = Callable[[], None]

MAX_CALLS_PER_SECOND = 100_000
"""More calls than this within one virtual second are a loop: the busiest scenario makes 3,000."""


class Wrong(AssertionError):
    """Something happened that must never happen: a wrong or repeated token, a leak, a broken invariant."""


class Stuck(AssertionError):
    """Something that must happen did not: nothing is scheduled that could bring it about, or it took too long."""


class World:
    """Clock, queue and chance of one run."""

    def __init__(self, seed: int, *, trace: list[str] | None = None) -> None:
        self.seed = seed
        self.now = 0.0
        self.rng = random.Random(seed)
        self.trace = trace
        self.events = 0
        self._queue: list[tuple[float, int, bool, Call]] = []
        self._scheduled = 0
        self._foreground = 0
        self._second = 0
        self._calls_this_second = 0

    def after(self, delay_s: float, call: Call, *, background: bool = False) -> None:
        """Run `call` in `delay_s` seconds. Background calls (gossip rounds, the next fault) go on for ever, so they do
        not count as "something is still going on"."""
        if delay_s < 0:
            raise ValueError(f"cannot schedule {delay_s} s into the past")
        self._scheduled += 1
        self._foreground += not background
        heapq.heappush(self._queue, (self.now + delay_s, self._scheduled, background, call))

    def step(self) -> bool:
        """Run the next call; False when there is none. Raises Stuck when time does not get on for all the calls."""
        if not self._queue:
            return False
        self.now, _, background, call = heapq.heappop(self._queue)
        self._foreground -= not background
        self.events += 1
        if int(self.now) != self._second:
            self._second, self._calls_this_second = int(self.now), 0
        self._calls_this_second += 1
        if self._calls_this_second > MAX_CALLS_PER_SECOND:
            raise Stuck(f"a loop at {self.now:.3f} s: {MAX_CALLS_PER_SECOND} calls within a second")
        call()
        return True

    def run_for(self, seconds: float) -> None:
        """Let time pass."""
        end_s = self.now + seconds
        while self._queue and self._queue[0][0] <= end_s:
            self.step()
        self.now = end_s

    def run_until(self, done: Callable[[], bool], limit_s: float, what: str) -> None:
        """Run until `done()`. Raises Stuck after `limit_s` virtual seconds, and at once when nothing but background is
        scheduled: nobody waits for a message, a timer or a computation any more, so `what` cannot come about."""
        end_s = self.now + limit_s
        while not done():
            if self._foreground == 0:
                raise Stuck(f"deadlock at {self.now:.3f} s: nothing is scheduled and still not: {what}")
            if self._queue[0][0] > end_s:
                raise Stuck(f"after {limit_s:.0f} virtual seconds still not: {what}")
            self.step()

    def note(self, text: str) -> None:
        """Write a line of the trace, when one is kept."""
        if self.trace is not None:
            self.trace.append(f"{self.now:10.4f} {text}")
