"""What every estimate looks like: a value, how far it may be off, and the sum it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = float(1 << 30)
UNITS = {"bytes": 1.0, "MB": 1e6, "GB": 1e9, "MiB": float(1 << 20), "GiB": GIB}


@dataclass(frozen=True, slots=True)
class Term:
    """One summand, in bytes."""

    name: str
    value: float
    formula: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """`value` bytes; four of five measurements should lie between `low` and `high`."""

    value: float
    low: float
    high: float
    terms: tuple[Term, ...]
    provenance: str
    """Which constants were used and what they were fitted on."""

    @property
    def binding(self) -> str:
        """The largest term: what to change first."""
        return max(self.terms, key=lambda term: term.value).name

    def to_object(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "value_bytes": round(self.value),
            "low_bytes": round(self.low),
            "high_bytes": round(self.high),
            "binding": self.binding,
            "terms": [{"name": t.name, "bytes": round(t.value), "formula": t.formula} for t in self.terms],
            "provenance": self.provenance,
        }
