"""`python -m shoal.hostile.worker FROM TO`: the process that is attacked. It prints what it found, a line of JSON each.

It may crash, hang or be killed for its memory: that is what it is for. The seed it works on stands in a file that
outlives it, so whoever started it knows which input it was.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.hostile.targets import Target

SLOW_S = 1.0
GROWTH_BYTES = 64 * 1024 * 1024
WARM_UP = 2_000
"""Inputs before memory is judged: caches fill and modules are imported by then."""
REPORT_S = 1.0
_LOOK_EVERY = 200
_ALIKE = 32
"""Outcomes that begin with the same letters are of one kind, and one input of each kind is worth keeping."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


def all_targets() -> tuple[Target, ...]:
    """Every surface; the imports are here because they take a second."""
    from shoal.hostile.http import HTTP
    from shoal.hostile.targets import NETWORK

    return NETWORK + HTTP


def target_of(seed: int, targets: Sequence[Target]) -> Target:
    """Which surface a seed is for, by the targets' shares."""
    place = seed * 61 % sum(target.share for target in targets)  # 61: neighbours go to different targets
    for target in targets:
        if place < target.share:
            return target
        place -= target.share
    raise LookupError(seed)


@dataclass(frozen=True, slots=True)
class Finding:
    """One input and what was wrong with how it was taken. `kind`: crash, slow, growth, died, hung."""

    target: str
    kind: str
    seed: int
    data: bytes
    why: str


class Attack:
    """Runs inputs and judges each by what it raised, how long it took and what memory it left behind."""

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        clock: Callable[[], float] = time.perf_counter,
        resident: Callable[[], int] | None = None,
        warm_up: int = WARM_UP,
    ) -> None:
        self.targets = targets
        self.outcomes: set[tuple[str, str]] = set()
        self._kinds: set[tuple[str, str]] = set()
        self._clock = clock
        self._resident = resident or resident_bytes
        self._warm_up = warm_up
        self._done = 0
        self._base = 0

    def once(self, seed: int) -> tuple[list[Finding], bytes | None]:
        """The findings of one seed, and its input when no outcome of its kind was seen before."""
        target = target_of(seed, self.targets)
        data = target.make(seed)
        found, outcome = self.run(target, data, seed)
        if outcome is None or (target.name, outcome) in self.outcomes:
            return found, None
        alike = (target.name, outcome[:_ALIKE])
        new = alike not in self._kinds
        self._kinds.add(alike)
        self.outcomes.add((target.name, outcome))
        return found, data if new else None

    def run(self, target: Target, data: bytes, seed: int = -1) -> tuple[list[Finding], str | None]:
        """The findings of one input of a target, and what came of it."""
        start = self._clock()
        try:
            outcome = target.run(data)
        except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
            return [Finding(target.name, "crash", seed, data, traceback.format_exc(limit=-6))], None
        took_s = self._clock() - start
        if took_s > SLOW_S:
            # On a busy machine a pause proves nothing; an input that is slow is slow each time.
            took_s = min(took_s, *(self._timed(target, data) for _ in range(2)))
            if took_s > SLOW_S:
                return [Finding(target.name, "slow", seed, data, f"{took_s:.1f} s")], outcome
        self._done += 1
        if self._done % _LOOK_EVERY == 0:
            return self._grown(target, data, seed), outcome
        return [], outcome

    def _timed(self, target: Target, data: bytes) -> float:
        start = self._clock()
        target.run(data)
        return self._clock() - start

    def _grown(self, target: Target, data: bytes, seed: int) -> list[Finding]:
        now = self._resident()
        if self._done <= self._warm_up or not self._base:
            self._base = now
        grown = now - self._base
        if grown <= GROWTH_BYTES:
            return []
        self._base = now  # the next finding needs as much again
        return [Finding(target.name, "growth", seed, data, f"{grown >> 20} MB more than after {self._warm_up} inputs")]

    @property
    def grown_bytes(self) -> int:
        """Memory beyond what the process had when it was warm."""
        return max(0, self._resident() - self._base) if self._base else 0


def resident_bytes() -> int:
    """What this process holds in memory now."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * _PAGE


def main(first: int, last: int, place: Path) -> None:
    """Attack with the seeds from `first` up to, not including, `last`; write the current one to the file `place`."""
    logging.disable(logging.WARNING)
    targets = all_targets()
    attack = Attack(targets)
    with place.open("r+b") as file, mmap.mmap(file.fileno(), 8) as at:
        told_at = time.monotonic()
        for seed in range(first, last):
            at[:] = seed.to_bytes(8, "little")
            found, new = attack.once(seed)
            for each in found:
                _say({"finding": _as_json(each)})
            if new is not None:
                _say({"new": {"target": target_of(seed, targets).name, "data": new.hex()}})
            if time.monotonic() - told_at > REPORT_S:
                told_at = time.monotonic()
                _say({"done": seed + 1, "grown_bytes": attack.grown_bytes})
    _say({"done": last, "grown_bytes": attack.grown_bytes, "outcomes": len(attack.outcomes)})
    sys.stdout.flush()
    os._exit(0)  # event loops and sockets of the targets need no polite end


def _as_json(finding: Finding) -> dict[str, object]:
    return {
        "target": finding.target,
        "kind": finding.kind,
        "seed": finding.seed,
        "data": finding.data.hex(),
        "why": finding.why,
    }


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
