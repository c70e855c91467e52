"""How many threads to compute with: as many as measurably help, found by trying the neighbours of the present number.

More threads are faster until the memory is the limit, or until somebody else wants the processors too; then every step
waits for the slowest thread, and two threads can take several times as long as one. No table knows that, and it changes
while we run. So: measure a while, try another number for as long, keep the better one, and try ever more rarely while
nothing changes.

    settled --pause over--> trying n + step --clearly faster--> settled there, step doubled, next try at once
       ^                        |
       +----- not faster -------+ the other direction next; when both failed, the pause doubles

Pure: steps and their times come in, a number of threads comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.swarm.estimates import DECODE_ROWS, PREFILL_ROWS


@dataclass(frozen=True, slots=True)
class ThreadConfig:
    steps: int = 16
    """Steps measured with a number before it is judged."""
    faster: float = 1.06
    """A number is better when steps take this factor less time; closer than that is noise."""
    much_slower: float = 1.5
    """A trial that shows this after a quarter of its steps is over; and a settled number that becomes this much slower
    than it was is doubted at once."""
    pause_steps: int = 64
    """Steps between trials, at first."""
    most_pause_steps: int = 4096


class ThreadTuner:
    """Use `count` threads for the next step and report every step with `measured`."""

    def __init__(self, most: int, *, start: int = 1, config: ThreadConfig | None = None) -> None:
        """Never more than `most` threads, and at first `start`."""
        self.config = config or ThreadConfig()
        self.most = max(1, most)
        self.count = min(max(1, start), self.most)
        self._settled = self.count
        self._was: dict[str, float] = {}
        """What steps took with the settled number, by kind."""
        self._seen: dict[str, list[float]] = {}
        """What they take now."""
        self._direction = 1
        self._stride = 1
        self._failed = 0
        self._pause = 0
        self._rests = 0

    @property
    def settled(self) -> bool:
        """Neither more nor fewer threads were faster when last tried."""
        return self._failed >= 2 or self.most == 1

    def measured(self, *, rows: int, blocks: int, took_ms: float) -> int:
        """A step of `rows` rows through `blocks` blocks took `took_ms` with `count` threads; the number for the next.

        Batches between a few rows and many tell neither the time of a row nor that of a prompt: they are left out, as
        in swarm.estimates."""
        if rows <= DECODE_ROWS:
            self._seen.setdefault("decode", []).append(took_ms / blocks)
        elif rows >= PREFILL_ROWS:
            self._seen.setdefault("prompt", []).append(took_ms / blocks / rows)
        else:
            return self.count
        if self.most > 1:
            self._judge()
        return self.count

    def _judge(self) -> None:
        config = self.config
        steps = max(map(len, self._seen.values()))
        slowdown = self._slowdown()
        if self.count != self._settled:
            hopeless = steps >= config.steps // 4 and slowdown is not None and slowdown > config.much_slower
            if hopeless or steps >= config.steps:
                self._end_trial(slowdown)
            return
        if steps < config.steps:
            return
        if slowdown is not None and slowdown > config.much_slower:
            # Somebody else wants the processors: fewer threads first, and soon.
            self._pause = self._rests = 0
            self._failed = 0
            self._direction, self._stride = -1, 1
        self._was = {kind: _median(times) for kind, times in self._seen.items()} | {
            kind: before for kind, before in self._was.items() if kind not in self._seen
        }
        self._seen = {}
        self._rests -= config.steps
        if self._rests <= 0:
            self._begin_trial()

    def _begin_trial(self) -> None:
        other = min(self.most, max(1, self._settled + self._direction * self._stride))
        if other == self._settled:
            self._fail()
            other = min(self.most, max(1, self._settled + self._direction * self._stride))
        if self._rests <= 0 and other != self._settled:
            self.count = other

    def _end_trial(self, slowdown: float | None) -> None:
        if slowdown is not None and slowdown * self.config.faster < 1:
            self._settled = self.count
            self._was = {kind: _median(times) for kind, times in self._seen.items()}
            self._stride *= 2
            self._failed = 0
            self._pause = self._rests = 0
        elif self._stride > 1:
            self._stride = 1  # too far, perhaps: the next number in this direction is tried before it is given up
            self._rests = 0
        else:
            self._fail()
        self.count = self._settled
        self._seen = {}

    def _fail(self) -> None:
        """Nothing gained in this direction."""
        self._direction = -self._direction
        self._stride = 1
        self._failed += 1
        if self._failed >= 2:
            config = self.config
            self._pause = min(config.most_pause_steps, max(config.pause_steps, 2 * self._pause))
            self._rests = self._pause

    def _slowdown(self) -> float | None:
        """Time of a step over that with the settled number, by the kind seen most; None when not comparable."""
        kinds = [kind for kind in self._seen if kind in self._was and len(self._seen[kind]) >= self.config.steps // 4]
        if not kinds:
            return None
        kind = max(kinds, key=lambda kind: len(self._seen[kind]))
        return _median(self._seen[kind]) / max(self._was[kind], 1e-9)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
