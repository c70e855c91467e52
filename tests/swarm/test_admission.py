"""The cache pool: pages are reserved before a session starts, so that an admitted one never runs out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal.swarm.admission import PAGE_TOKENS, CachePool, pages_for


@given(st.integers(0, 10_000))
def test_pages_are_the_fewest_that_hold_the_tokens(tokens: int) -> None:
    assert pages_for(tokens) * PAGE_TOKENS >= tokens > (pages_for(tokens) - 1) * PAGE_TOKENS


def test_tokens_that_fill_no_page_are_not_offered() -> None:
    assert CachePool(PAGE_TOKENS * 3 + 5).free_tokens == PAGE_TOKENS * 3


def test_a_session_may_grow_into_its_own_room_when_the_pool_is_full() -> None:
    pool = CachePool(10 * PAGE_TOKENS)
    assert pool.reserve(b"a", 6 * PAGE_TOKENS)
    assert pool.reserve(b"b", 4 * PAGE_TOKENS)
    assert pool.reserve(b"a", 5 * PAGE_TOKENS)
    assert pool.free_pages == 1
    assert not pool.reserve(b"a", 7 * PAGE_TOKENS)
    assert pool.free_pages == 1, "a refusal changes nothing"


def test_when_to_come_back_follows_how_long_sessions_stay_and_how_many_there_are() -> None:
    pool = CachePool(1000 * PAGE_TOKENS)
    pool.reserve(b"one", 1)
    before = pool.retry_after_s()
    for number in range(20):
        pool.reserve(bytes([number]), 1)
    assert pool.retry_after_s() < before, "one of many leaves sooner"
    for number in range(20):
        pool.release(bytes([number]), lived_s=1e6)
    assert pool.retry_after_s() == pytest.approx(30.0), "bounded, however long they stay"
    for _ in range(100):
        pool.release(b"nobody", lived_s=0.0)
    assert pool.retry_after_s() == pytest.approx(0.5), "and never at once"


class Books(RuleBasedStateMachine):
    """Reservations of any size in any order against a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = CachePool(20 * PAGE_TOKENS)
        self.held: dict[bytes, int] = {}

    sessions = st.binary(min_size=1, max_size=1).map(lambda one: bytes([one[0] % 6]))

    @rule(session=sessions, tokens=st.integers(0, 400))
    def reserve(self, session: bytes, tokens: int) -> None:
        others = sum(pages for other, pages in self.held.items() if other != session)
        fits = others + pages_for(tokens) <= 20
        assert self.pool.reserve(session, tokens) == fits
        if fits:
            self.held[session] = pages_for(tokens)

    @rule(session=sessions)
    def release(self, session: bytes) -> None:
        self.pool.release(session)
        self.held.pop(session, None)

    @invariant()
    def nothing_is_lost_or_given_twice(self) -> None:
        assert self.pool.free_pages == 20 - sum(self.held.values()) >= 0


TestBooks = Books.TestCase
