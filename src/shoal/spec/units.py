"""Sizes as people write them. GiB is 1024**3 bytes and GB is 10**9; shoal never says one and means the other."""

from __future__ import annotations

import re

from shoal.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """ "20GiB" -> 21474836480. Raises UsageError for anything that is not a size."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"Cannot read the size {text!r}.", hint="Write a number and a unit: 20GiB or 800MB.")
    return int(float(match[1]) * unit)


def show_bytes(count: float) -> str:
    """The size in the largest binary unit that leaves at least one whole: 1610612736 -> "1.5 GiB"."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
