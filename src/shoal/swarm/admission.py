"""Who gets cache: reservations in pages, made when a session opens, so that an admitted session never runs out.

A server that is full says so with a time to come back; it never evicts a running session and never dies of a new one.
"""

from __future__ import annotations

PAGE_TOKENS = 16
"""Tokens per page, the unit of accounting. Small enough that rounding wastes little, large enough to count cheaply."""


def pages_for(tokens: int) -> int:
    """Pages that `tokens` cached tokens occupy."""
    return -(-tokens // PAGE_TOKENS)


class CachePool:
    """Counts the pages of one server's key/value cache. Bytes are the engine's business; this only counts."""

    def __init__(self, total_tokens: int) -> None:
        self.total_pages = total_tokens // PAGE_TOKENS
        self._held: dict[bytes, int] = {}
        self._used = 0
        self._lifetime_s = 10.0  # a moving mean of how long sessions stay; only feeds retry_after

    @property
    def free_pages(self) -> int:
        return self.total_pages - self._used

    @property
    def free_tokens(self) -> int:
        return self.free_pages * PAGE_TOKENS

    @property
    def total_tokens(self) -> int:
        return self.total_pages * PAGE_TOKENS

    def reserve(self, session: bytes, tokens: int) -> bool:
        """Reserve room for `tokens`, replacing what this session held before. False (nothing changed) when full."""
        pages = pages_for(tokens)
        before = self._held.get(session, 0)
        if pages - before > self.free_pages:
            return False
        self._held[session] = pages
        self._used += pages - before
        return True

    def release(self, session: bytes, lived_s: float | None = None) -> None:
        """Give a session's pages back. Harmless when it holds none."""
        self._used -= self._held.pop(session, 0)
        if lived_s is not None:
            self._lifetime_s += 0.2 * (max(lived_s, 0.0) - self._lifetime_s)

    def retry_after_s(self) -> float:
        """When trying again is likely to help: sessions leave at about (their number / mean lifetime) a second."""
        return min(30.0, max(0.5, self._lifetime_s / max(1, len(self._held))))
