"""The journal of one block's inputs: rows in order of position, whatever order, overlap or repetition they came in."""

from __future__ import annotations

from typing import Any

Payload = Any
"""Rows of activations; anything that can be sliced by rows. Opaque here."""


class Log:
    """Consecutive rows by position, added in any overlap; keeps the chunks as they came."""

    def __init__(self, end: int = 0, *, keep: bool = True) -> None:
        """`keep` False: only count; what was added is handed out once and never asked for again."""
        self.end = end
        self._keep = keep
        self._chunks: list[tuple[int, int, Payload]] = []
        self._early: dict[int, tuple[int, Payload]] = {}

    def add(self, position: int, rows: int, payload: Payload) -> list[tuple[int, int, Payload]]:
        """Add rows; returns the chunks that became part of the gapless beginning, trimmed to what is new."""
        if position > self.end:
            known = self._early.get(position)
            if known is None or known[0] < rows:
                self._early[position] = (rows, payload)
            return []
        added: list[tuple[int, int, Payload]] = []
        self._append(position, rows, payload, added)
        while self._early:
            at = min(self._early)
            if at > self.end:
                break
            more, body = self._early.pop(at)
            self._append(at, more, body, added)
        return added

    def _append(self, position: int, rows: int, payload: Payload, added: list[tuple[int, int, Payload]]) -> None:
        skip = self.end - position
        if skip >= rows:
            return
        chunk = (self.end, rows - skip, payload[skip:] if skip else payload)
        if self._keep:
            self._chunks.append(chunk)
        added.append(chunk)
        self.end += rows - skip

    def since(self, position: int) -> list[tuple[int, int, Payload]]:
        """Chunks from `position` to the end, the first one trimmed."""
        found: list[tuple[int, int, Payload]] = []
        for at, rows, payload in reversed(self._chunks):
            if at + rows <= position:
                break
            skip = max(0, position - at)
            found.append((at + skip, rows - skip, payload[skip:] if skip else payload))
        found.reverse()
        return found
