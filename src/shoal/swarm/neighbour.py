"""When a borrowed machine is its owner's: `shoal join --idle-only` works while nobody else needs the machine.

Two signs of an owner: work that is not ours (share of the processors), and hands (input at a keyboard, mouse or
terminal). Leaving is quick, coming back is slow, and in between nothing changes:

    working --others above `busy` for busy_for_s, or input just now--> resting
    resting --others below `quiet` and no input, both for quiet_for_s--> working

Pure: samples come in, measured by server/neighbour.py; a decision and its reason come out.
"""

from __future__ import annotations

from dataclasses import dataclass

QUIET = 0.12


@dataclass(frozen=True, slots=True)
class NeighbourConfig:
    busy: float = 0.25
    """Share of all processors (0 to 1) that others use: from here on the owner works."""
    quiet: float = QUIET
    """Below this share nobody works: what a desktop does by itself."""
    busy_for_s: float = 3.0
    """A page that loads is not yet work."""
    present_s: float = 10.0
    """Input this short a time ago: somebody sits at the machine."""
    quiet_for_s: float = 120.0
    """How long nobody may have used the machine before it is taken again."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen of the machine since the sample before."""

    others: float
    """Share of all processors that processes other than ours used, 0 to 1."""
    input_idle_s: float | None = None
    """Seconds since the last input by hand; None where this machine does not tell."""


class Neighbour:
    """The state of one borrowed machine. It begins at rest, and works at once when the first sample shows nobody."""

    def __init__(self, config: NeighbourConfig | None = None) -> None:
        self.config = config or NeighbourConfig()
        self.working = False
        self.reason = ""
        self._busy_since: float | None = None
        self._disturbed_at: float | None = None
        """When the machine was last not quiet; None: not since we look."""

    def sample(self, sample: Sample, now: float) -> bool:
        """Take in what was seen; returns whether to work from now on."""
        config = self.config
        hands = sample.input_idle_s is not None and sample.input_idle_s < config.present_s
        self._note_load(sample.others, now)
        if hands or sample.others >= config.quiet:
            self._disturbed_at = now
        if self.working:
            if hands or (self._busy_since is not None and now - self._busy_since >= config.busy_for_s):
                self._rest(_reason(sample, hands))
        elif self._quiet_s(sample, now) >= config.quiet_for_s:
            self.working = True
            self.reason = "nobody else uses this machine"
        elif not self.reason:
            self._rest(_reason(sample, hands))  # not from the first look on: somebody is here
        return self.working

    def _note_load(self, others: float, now: float) -> None:
        if others < self.config.busy:
            self._busy_since = None
        elif self._busy_since is None:
            self._busy_since = now

    def _quiet_s(self, sample: Sample, now: float) -> float:
        """For how long nobody has used the machine, as far as is known."""
        by_load = float("inf") if self._disturbed_at is None else now - self._disturbed_at
        by_hand = float("inf") if sample.input_idle_s is None else sample.input_idle_s
        return min(by_load, by_hand)

    def _rest(self, reason: str) -> None:
        self.working = False
        self.reason = reason


def _reason(sample: Sample, hands: bool) -> str:
    if hands:
        return "somebody uses the keyboard or a terminal of this machine"
    if sample.others < QUIET:
        return "somebody used this machine a short time ago"
    return f"other programs use {sample.others:.0%} of this machine's processors"
