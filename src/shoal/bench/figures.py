"""One measured figure, its peer from the same run, and the bar it must reach."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """`peer` is what the figure was measured against in the same run, in words and numbers; `ok` is value against
    `reach`, upwards or downwards as the figure wants."""

    name: str
    value: float
    unit: str
    peer: str
    reach: float
    ok: bool

    def __str__(self) -> str:
        verdict = "ok    " if self.ok else "MISSED"
        return f"{verdict} {self.name}: {self.value:g} {self.unit} (reach {self.reach:g}) - {self.peer}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def at_least(name: str, value: float, reach: float, *, unit: str = "x", peer: str) -> Figure:
    return Figure(name, round(value, 4), unit, peer, round(reach, 4), value >= reach)


def at_most(name: str, value: float, reach: float, *, unit: str, peer: str) -> Figure:
    return Figure(name, round(value, 4), unit, peer, round(reach, 4), value <= reach)
