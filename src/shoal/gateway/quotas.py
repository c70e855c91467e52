"""What each key may still use: requests in any 60 seconds, tokens in a UTC day.

All decisions are made on the gateway's event loop without a pause in between, so limits hold exactly however many
requests come at once. A request reserves the most tokens it may use before it begins and is charged what it used when
it ends; its last byte is sent only after the charge is on the disk, so that what a client has received stays charged
whatever happens to the gateway. Charges that come while the disk is busy go into the next write together.

Limits are those of one gateway process: two over one key file add up correctly on the disk but do not see each other's
running requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.types import Message, Send

from shoal.errors import ShoalError
from shoal.gateway.accounts import DAY_S, Account, Accounts, Usage, day_of
from shoal.gateway.audit import Trail
from shoal.gateway.errors import RequestError
from shoal.gateway.metrics import RequestMeter

logger = logging.getLogger("shoal.gateway")

WINDOW_S = 60.0
_WORTH_WAITING_S = 60.0
"""OpenAI's packages obey `retry-after` up to a minute; what takes longer is not worth their trying again."""


class QuotaExceeded(RequestError):
    """The key has used up what it may use, or would with this request."""

    def __init__(self, message: str, *, code: str, wait_s: float, hint: str, headers: dict[str, str]) -> None:
        if wait_s > _WORTH_WAITING_S:
            headers = {**headers, "x-should-retry": "false"}
        super().__init__(
            message, code=code, status=429, hint=hint, retry_after_s=max(1.0, wait_s), headers=headers
        )  # fmt: skip


@dataclass(slots=True)
class _Day:
    """One key's tokens of one UTC day."""

    number: int
    used: int
    reserved: int = 0


@dataclass(slots=True)
class _Key:
    """What is known of one key since the gateway started."""

    times: deque[float] = field(default_factory=deque)
    """When the requests of the last minute came; kept only for keys with a limit."""
    day: _Day | None = None


class Quotas:
    """The limits of all keys. `clock` counts seconds evenly, `wall` is Unix time."""

    def __init__(
        self,
        accounts: Accounts,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._accounts = accounts
        self._clock = clock
        self._wall = wall
        self._keys: dict[int, _Key] = {}
        self._writer: asyncio.Task[None] | None = None
        self._next_write: asyncio.Future[None] | None = None

    # --- requests per minute ---------------------------------------------------------------------------------

    def request(self, account: Account) -> dict[str, str]:
        """Count a request, and say in headers what is left. Raises QuotaExceeded (429), which counts nothing."""
        limit = account.requests_per_minute
        if limit is None:
            return {}
        times, now = self._key(account).times, self._clock()
        while times and times[0] <= now - WINDOW_S:
            times.popleft()
        if len(times) >= limit:
            # With a limit that was lowered meanwhile, more than one must leave the window.
            wait_s = times[len(times) - limit] + WINDOW_S - now
            raise QuotaExceeded(
                f"This key may send {limit} requests a minute.", code="rate_limit_exceeded", wait_s=wait_s,
                hint=f"Try again in {span(wait_s)}.", headers=_headers("requests", limit, 0, wait_s),
            )  # fmt: skip
        times.append(now)
        return _headers("requests", limit, limit - len(times), times[0] + WINDOW_S - now)

    # --- tokens per day --------------------------------------------------------------------------------------

    @contextmanager
    def bill(self, account: Account, meter: RequestMeter, most_tokens: int, trail: Trail) -> Iterator[Bill]:
        """Reserve `most_tokens` for a request, and charge at the end of the block what `meter` has counted.

        Raises QuotaExceeded (429) before anything begins.
        """
        day = self._today(account)
        limit = account.tokens_per_day
        if limit is not None and day.used + day.reserved + most_tokens > limit:
            raise self._over(day, limit, most_tokens)
        day.reserved += most_tokens
        bill = Bill(self, account, day, meter, most_tokens, trail)
        try:
            yield bill
        finally:
            bill.settle()

    def token_headers(self, account: Account) -> dict[str, str]:
        """What is left of today's tokens, running requests counted with the most they may use."""
        limit = account.tokens_per_day
        if limit is None:
            return {}
        day = self._today(account)
        return _headers("tokens", limit, max(0, limit - day.used - day.reserved), self._until_tomorrow(day))

    def _over(self, day: _Day, limit: int, wanted: int) -> QuotaExceeded:
        left = max(0, limit - day.used)
        soon = day.used + wanted <= limit  # others are running that may not need all they reserved
        wait_s = 1.0 if soon else self._until_tomorrow(day)
        return QuotaExceeded(
            f"This key may use {limit} tokens a day and has {left} left, of which {day.reserved} are reserved by its "
            f"running requests; this request may use {wanted}.",
            code="rate_limit_exceeded" if soon else "insufficient_quota",
            wait_s=wait_s,
            hint=f"Ask for fewer tokens, or try again in {span(wait_s)}.",
            headers=_headers("tokens", limit, max(0, left - day.reserved), wait_s),
        )

    def _today(self, account: Account) -> _Day:
        key, number = self._key(account), day_of(self._wall())
        if key.day is None or key.day.number != number:
            # Requests that began yesterday keep the day they reserved from.
            key.day = _Day(number, self._accounts.used(account.id, number, number).tokens)
        return key.day

    def _until_tomorrow(self, day: _Day) -> float:
        return (day.number + 1) * DAY_S - self._wall()

    def _key(self, account: Account) -> _Key:
        return self._keys.setdefault(account.id, _Key())

    # --- to the disk -----------------------------------------------------------------------------------------

    def charge(self, account: Account, day: int, usage: Usage) -> asyncio.Future[None]:
        """Note what was used. The future is done when it is on the disk, or the disk refused it (the log says so)."""
        self._accounts.charge(account.id, day, usage)
        if self._next_write is None:
            self._next_write = asyncio.get_running_loop().create_future()
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(), name="usage")
        return self._next_write

    async def _write(self) -> None:
        try:
            while (done := self._next_write) is not None:
                self._next_write = None
                try:
                    await asyncio.to_thread(self._accounts.write_usage)
                except ShoalError as error:
                    # Answers go on. The limits of this process stay exact; the disk gets it with the next write.
                    logger.error("usage could not be written: %s", error)
                finally:
                    if not done.done():
                        done.set_result(None)
        finally:
            self._writer = None


class Bill:
    """One request's reservation and, in the end, its charge."""

    def __init__(
        self, quotas: Quotas, account: Account, day: _Day, meter: RequestMeter, reserved: int, trail: Trail
    ) -> None:
        self._quotas = quotas
        self._account = account
        self._day = day
        self._meter = meter
        self._reserved: int | None = reserved
        self._trail = trail
        self._written: asyncio.Future[None] | None = None

    def settle(self) -> None:
        """Give back the reservation and charge what was used. Once; later calls do nothing."""
        if self._reserved is None:
            return
        self._day.reserved -= self._reserved
        self._reserved = None
        if self._meter.was_admitted:
            used = Usage(1, self._meter.prompt_tokens, self._meter.generated_tokens)
            self._day.used += used.tokens
            self._written = self._quotas.charge(self._account, self._day.number, used)

    def before_the_end(self, send: Send) -> Send:
        """`send` that lets the first part of an answer leave only when the log says who computes it, and the last part
        when its charge and its end are on the disk."""

        async def send_settled(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._trail.begun()
            elif not message.get("more_body"):
                self.settle()
                waiting: list[asyncio.Future[None]] = []
                if not self._meter.cut:  # whoever is cut off frees his places on the servers first
                    waiting.append(asyncio.ensure_future(self._trail.end(self._meter)))
                    if self._written is not None:
                        waiting.append(asyncio.shield(self._written))  # others wait for the same write
                await asyncio.gather(*waiting)
            await send(message)

        return send_settled


def span(seconds: float) -> str:
    """A length of time as OpenAI's headers write it: 250ms, 12s, 6m0s, 3h2m1s."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1e3))}ms"
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if whole >= 60 else "") + f"{whole % 60}s"


def _headers(what: str, limit: int, left: int, reset_s: float) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(left),
        f"x-ratelimit-reset-{what}": span(reset_s),
    }
