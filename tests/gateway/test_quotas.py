"""Limits of a key: requests per minute and tokens per day, exact under concurrency, and what was used stays noted."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gateway import Gateway, Hold, ScriptedModel, byte_level_tokenizer, eventually, running

from shoal.errors import SwarmIncomplete, UsageError
from shoal.gateway.accounts import DAY_S, Account, Accounts, Usage, day_of
from shoal.gateway.audit import Audit
from shoal.gateway.limits import Limits
from shoal.gateway.metrics import Metrics
from shoal.gateway.quotas import QuotaExceeded, Quotas, span

MODEL = "org/chatty:1b"


class Clocks:
    """Time as a test wants it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall = 20_000 * DAY_S + 3600.0


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[Accounts]:
    opened = Accounts(tmp_path / "keys.sqlite")
    yield opened
    opened.close()


def limited(accounts: Accounts, clocks: Clocks, **limits: int) -> tuple[Quotas, Account]:
    _, account = accounts.create("limited", **limits)
    return Quotas(accounts, clock=lambda: clocks.now, wall=lambda: clocks.wall), account


def complete(client: openai.OpenAI, **fields: object) -> openai.types.Completion:
    return client.completions.create(**{"model": MODEL, "prompt": [5, 6], "max_tokens": 4, **fields})


def test_requests_per_minute_are_429_with_retry_after_and_rate_limits(gateway: Gateway) -> None:
    key, _ = gateway.new_key(requests_per_minute=2)
    with gateway.client(key) as client:
        left = [client.completions.with_raw_response.create(model=MODEL, prompt="hi") for _ in range(2)]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in left] == ["1", "0"]
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client)
        headers = caught.value.response.headers
        assert caught.value.code == "rate_limit_exceeded"
        assert 1 <= int(headers["retry-after"]) <= 60
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-reset-requests"].endswith("s")
        assert client.models.list().data, "only what costs something is counted"
    with gateway.client() as other:
        complete(other)


def test_tokens_per_day_are_429_before_anything_is_computed(gateway: Gateway) -> None:
    gateway.chatty.script = lambda call: [40, 41, 42, 43]
    key, account = gateway.new_key(tokens_per_day=10)
    with gateway.client(key) as client:
        answer = client.completions.with_raw_response.create(model=MODEL, prompt=[5, 6], max_tokens=4)
        assert answer.headers["x-ratelimit-limit-tokens"] == "10"
        assert answer.headers["x-ratelimit-remaining-tokens"] == "4"
        gateway.chatty.calls.clear()
        with pytest.raises(openai.RateLimitError, match="has 4 left") as caught:
            complete(client)
        assert caught.value.code == "insufficient_quota"
        assert caught.value.type == "rate_limit_error"
        headers = caught.value.response.headers
        assert 1 <= int(headers["retry-after"]) <= DAY_S
        assert headers["x-should-retry"] == "false", "nobody waits until tomorrow"
        assert not gateway.chatty.calls
        complete(client, max_tokens=2)
    assert gateway.used(account) == Usage(2, 4, 6)


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_day"])
def test_a_limit_holds_exactly_under_forty_requests_at_once(gateway: Gateway, limit: str) -> None:
    hold = Hold()
    gateway.chatty.does(None, hold, 40, 41, 42, 43)
    key, account = gateway.new_key(**{limit: 7 if limit == "requests_per_minute" else 7 * 6 + 5})

    async def one(client: openai.AsyncOpenAI) -> bool:
        try:
            answer = await client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=4)
        except openai.RateLimitError:
            return False
        return answer.usage is not None and answer.usage.total_tokens == 6

    async def all_at_once() -> int:
        async with gateway.async_client(key) as client:
            asking = [asyncio.create_task(one(client)) for _ in range(40)]
            while sum(task.done() for task in asking) < 33:
                await asyncio.sleep(0.005)
            hold.release.set()
            return sum(await asyncio.gather(*asking))

    assert asyncio.run(all_at_once()) == 7
    assert gateway.used(account) == Usage(7, 14, 28)


def test_what_was_used_is_on_the_disk_before_the_answer_ends_and_outlives_a_restart(tmp_path: Path) -> None:
    with running(tmp_path, Limits()) as first:
        first.chatty.script = lambda call: [40, 41, 42, 43]
        key, account = first.new_key(tokens_per_day=30)
        with first.client(key) as client:
            for number in range(1, 4):
                if number % 2:
                    complete(client)
                else:
                    list(complete(client, stream=True))
                assert first.used(account) == Usage(number, 2 * number, 4 * number)
    with running(tmp_path, Limits()) as again:
        again.chatty.script = lambda call: [40, 41, 42, 43]
        with again.client(key) as client:
            complete(client)
            with pytest.raises(openai.RateLimitError, match="has 6 left"):
                complete(client, max_tokens=5)
            complete(client)
        assert again.used(account).tokens == 30


def test_a_broken_or_abandoned_answer_is_charged_what_was_generated(gateway: Gateway) -> None:
    key, account = gateway.new_key(tokens_per_day=1000)
    gateway.chatty.does(40, 41, SwarmIncomplete("nobody"))
    with gateway.client(key) as client:
        with pytest.raises(openai.APIError):
            list(complete(client, stream=True))
        assert gateway.used(account) == Usage(1, 2, 2)
        gateway.chatty.does(SwarmIncomplete("nobody"))
        with pytest.raises(openai.InternalServerError):
            complete(client)
        assert gateway.used(account) == Usage(1, 2, 2), "what was never admitted costs nothing"
        hold = Hold()
        gateway.chatty.does(40, hold, 41)
        stream = complete(client, stream=True)
        next(iter(stream))
        stream.close()
        assert eventually(lambda: gateway.used(account) == Usage(2, 4, 3))
        hold.release.set()
        # Nothing stays reserved.
        gateway.chatty.script = lambda call: [40] * call.max_tokens
        complete(client, max_tokens=400)
        complete(client, max_tokens=400)


def test_every_choice_and_every_prompt_is_charged(gateway: Gateway) -> None:
    gateway.chatty.script = lambda call: [40] * call.max_tokens
    key, account = gateway.new_key(tokens_per_day=100)
    with gateway.client(key) as client:
        complete(client, prompt=[[5, 6], [7]], n=3)
    assert gateway.used(account) == Usage(1, 3, 24)


@given(st.lists(st.floats(0, 40), max_size=60), st.integers(1, 5))
def test_no_sixty_seconds_hold_more_requests_than_the_limit(gaps: list[float], limit: int) -> None:
    clocks = Clocks()
    account = Account(1, "x", "sk", None, 0, requests_per_minute=limit)
    quotas = Quotas(None, clock=lambda: clocks.now)  # type: ignore[arg-type]  # requests are not kept on the disk
    taken: list[float] = []
    for gap in gaps:
        clocks.now += gap
        try:
            quotas.request(account)
        except QuotaExceeded:
            continue
        taken.append(clocks.now)
        assert sum(at > clocks.now - 60 for at in taken) <= limit
    # Whoever waits as long as he was told gets in.
    for _ in range(limit + 1):
        try:
            quotas.request(account)
        except QuotaExceeded as refused:
            clocks.now += (refused.retry_after_s or 0) + 1e-6
            quotas.request(account)


def test_a_new_day_brings_new_tokens_and_a_request_belongs_to_the_day_it_began(accounts: Accounts) -> None:
    clocks = Clocks()
    quotas, account = limited(accounts, clocks, tokens_per_day=100)
    today = day_of(clocks.wall)

    trail = Audit().trail("request", account, ScriptedModel("m", byte_level_tokenizer()))

    async def midnight() -> None:
        with Metrics().request() as meter, quotas.bill(account, meter, 90, trail):
            meter.admitted(30)
            with (
                Metrics().request() as other,
                pytest.raises(QuotaExceeded) as caught,
                quotas.bill(account, other, 11, trail),
            ):
                pass
            assert caught.value.code == "rate_limit_exceeded", "it is only reserved: worth trying again soon"
            clocks.wall += DAY_S
            with Metrics().request() as other, quotas.bill(account, other, 100, trail):
                assert quotas.token_headers(account)["x-ratelimit-remaining-tokens"] == "0"
        assert quotas.token_headers(account)["x-ratelimit-remaining-tokens"] == "100"

    asyncio.run(midnight())
    accounts.write_usage()
    assert accounts.used(account.id, today, today) == Usage(1, 30, 0)
    assert accounts.used(account.id, today + 1) == Usage()


def test_charges_that_come_together_are_written_together(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks()
    quotas, account = limited(accounts, clocks)
    writes = []
    write = accounts.write_usage
    monkeypatch.setattr(accounts, "write_usage", lambda: (writes.append(1), write()))

    async def many() -> None:
        await asyncio.gather(*(quotas.charge(account, 7, Usage(1, 2, 3)) for _ in range(100)))

    asyncio.run(many())
    assert accounts.used(account.id) == Usage(100, 200, 300)
    assert len(writes) <= 2


def test_a_disk_that_takes_no_usage_does_not_stop_answers_and_gets_it_later(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clocks = Clocks()
    quotas, account = limited(accounts, clocks)
    accounts._usage_db.execute("PRAGMA max_page_count = 1")
    accounts._usage_db.execute("PRAGMA query_only = 1")  # as a disk that became read-only
    asyncio.run(_charge(quotas, account))
    assert "usage could not be written" in caplog.text
    assert accounts.used(account.id) == Usage()
    accounts._usage_db.execute("PRAGMA query_only = 0")
    asyncio.run(_charge(quotas, account))
    assert accounts.used(account.id) == Usage(2, 4, 6)


async def _charge(quotas: Quotas, account: Account) -> None:
    await quotas.charge(account, 7, Usage(1, 2, 3))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0ms"), (0.25, "250ms"), (1, "1s"), (12.2, "13s"), (360, "6m0s"), (10921, "3h2m1s")]
)
def test_lengths_of_time_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_limit_that_is_none_is_refused(accounts: Accounts) -> None:
    for limits in ({"requests_per_minute": 0}, {"tokens_per_day": -1}, {"requests_per_minute": 10**9}):
        with pytest.raises(UsageError, match="a limit lies between"):
            accounts.create("x", **limits)
    for name in ("", "x" * 101, "a\nb"):
        with pytest.raises(UsageError, match="printable"):
            accounts.create(name)


def test_a_revoked_key_keeps_its_id_and_its_usage(accounts: Accounts) -> None:
    _, first = accounts.create("alice", zones="all=trusted", tokens_per_day=9)
    accounts.charge(first.id, 3, Usage(1, 2, 3))
    accounts.write_usage()
    accounts.revoke(first.id)
    _, second = accounts.create("bob")
    assert second.id != first.id
    (kept,) = [account for account in accounts.records(revoked=True) if account.revoked]
    assert (kept.id, kept.name, kept.zones, kept.tokens_per_day) == (first.id, "alice", "all=trusted", 9)
    assert accounts.used(first.id, 3, 3) == Usage(1, 2, 3)
    assert accounts.used(first.id, 4) == Usage()


def test_a_key_file_of_an_earlier_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    accounts = Accounts(path)
    key, account = accounts.create("alice", models=["a"])
    accounts.close()
    with sqlite3.connect(path) as old:
        for column in ("zones", "requests_per_minute", "tokens_per_day", "revoked"):
            old.execute(f"ALTER TABLE keys DROP COLUMN {column}")
        old.execute("DROP TABLE usage")
    old.close()
    for _ in range(2):
        again = Accounts(path)
        assert again.check(key) == account
        again.close()


def test_what_ends_after_the_file_was_closed_is_not_written_and_does_no_harm(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / "keys.sqlite")
    accounts.close()
    accounts.charge(1, 2, Usage(1, 1, 1))
    accounts.write_usage()
