"""How far predictions are from measurements: per kind and per source, never pooled over kinds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from shoal.errors import UsageError
from shoal.plan.rows import predict, room_bytes, unit_bytes


@dataclass(frozen=True, slots=True)
class Compared:
    """One row: what was measured, and the estimate, in bytes."""

    source: str
    measured: float
    value: float
    low: float
    high: float
    room: float | None
    """Memory of the devices that the figure is about; None when the row does not name one known device."""

    @property
    def error(self) -> float:
        """Per cent of what was measured, positive when the estimate is too large."""
        return 100 * (self.value / self.measured - 1)


def score(rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """Errors of every kind among `rows` that have a value and are not marked SUSPECT."""
    compared: dict[str, list[Compared]] = defaultdict(list)
    reasons: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        if not row.get("value") or row.get("notes", "").startswith("SUSPECT"):
            continue
        kind = row["kind"]
        estimate, why = predict(row)
        if estimate is None:
            reasons[kind][why] += 1
            continue
        measured = _measured(row) * unit_bytes(row)
        compared[kind].append(
            Compared(row.get("source", ""), measured, estimate.value, estimate.low, estimate.high, room_bytes(row))
        )
    return {
        kind: {
            "rows": len(compared[kind]) + sum(reasons[kind].values()),
            "supported": len(compared[kind]),
            "unsupported": dict(reasons[kind]),
            **(_figures(compared[kind], kind) if compared[kind] else {}),
        }
        for kind in sorted({*compared, *reasons})
    }


def quantile(values: Iterable[float], part: float) -> float:
    """The value that `part` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _measured(row: Mapping[str, str]) -> float:
    try:
        value = float(row["value"])
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(
            f"Row {row['id']}: value is {row['value']!r}.", hint="value must be a number above 0, or empty."
        )
    return value


def _figures(rows: list[Compared], kind: str) -> dict[str, Any]:
    by_source: dict[str, list[Compared]] = defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    sources = {source: _errors(group) for source, group in sorted(by_source.items())}
    found = {**_errors(rows), "macro_median_percent": round(mean(s["median_percent"] for s in sources.values()), 2)}
    if kind.endswith("_memory"):
        found["measured_above_value"] = round(mean(row.measured > row.value for row in rows), 3)
        known = [row for row in rows if row.room is not None]
        if known:
            right = mean((row.value <= row.room) == (row.measured <= row.room) for row in known if row.room)
            found["fit_decisions"], found["fit_decided_right"] = len(known), round(right, 3)
        found["measured_above_high"] = round(mean(row.measured > row.high for row in rows), 3)
    return {**found, "sources": sources}


def _errors(rows: list[Compared]) -> dict[str, Any]:
    return {
        "n": len(rows),
        "median_percent": round(median(abs(row.error) for row in rows), 2),
        "p90_percent": round(quantile((abs(row.error) for row in rows), 0.9), 2),
        "bias_percent": round(median(row.error for row in rows), 2),
        "coverage": round(mean(row.low <= row.measured <= row.high for row in rows), 3),
    }
