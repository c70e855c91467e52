"""Small types that cannot be mixed up: node and session ids, ranges of blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

from shoal.errors import UsageError

NodeId = NewType("NodeId", str)
"""Fingerprint of a node's public key: lower-case hex, 32 characters."""

SessionId = NewType("SessionId", bytes)
"""16 random bytes made by the client that drives the session."""

_RANGE = re.compile(r"(\d{1,6}):(\d{1,6})")


@dataclass(frozen=True, order=True, slots=True)
class BlockRange:
    """Consecutive transformer blocks `start` (inclusive) to `end` (exclusive)."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise UsageError(
                f"Block range {self.start}:{self.end} is empty or negative.",
                hint="Write START:END with 0 <= START < END, for example 0:12.",
            )

    @classmethod
    def parse(cls, text: str) -> BlockRange:
        """Read "START:END". Raises UsageError for anything else."""
        match = _RANGE.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"Cannot read the block range {text!r}.", hint="Write START:END, for example 0:12.")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __contains__(self, other: object) -> bool:
        """True when `other`, a block index or a range, lies inside."""
        if isinstance(other, BlockRange):
            return self.start <= other.start and other.end <= self.end
        return isinstance(other, int) and self.start <= other < self.end
