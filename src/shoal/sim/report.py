"""What one run showed, in a few lines for people and in plain values for tests."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """Outcome of one seed of one scenario."""

    scenario: str
    seed: int
    virtual_s: float
    """How long the run took on the virtual clock."""
    events: int
    figures: dict[str, float] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    trace: Sequence[str] | None = None

    @property
    def fingerprint(self) -> int:
        """Equal for two runs exactly when their traces are (needs a trace)."""
        if self.trace is None:
            raise ValueError("this run kept no trace")
        return zlib.crc32("\n".join(self.trace).encode())

    def lines(self) -> list[str]:
        figures = ", ".join(f"{name} {value:g}" for name, value in sorted(self.figures.items()))
        faults = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items())) or "none"
        return [
            f"{self.scenario}, seed {self.seed}: {self.virtual_s:.1f} virtual seconds, {self.events} events",
            f"  {figures}",
            f"  faults: {faults}",
        ]
