"""Retries that cost nothing: a POST with an `Idempotency-Key` header is computed and billed once.

    first request   -> the endpoint runs in a task of its own and writes its answer into a recording
    same key again  -> reads the same recording: what is there, then along with what still comes
    with other body -> 400

The endpoint goes on when its client's connection ends: whoever sends such a key means to come back for the answer.
Only whole answers are kept; after a refusal or an error the key is free again. Answers are kept in memory only, for a
limited time and in limited room: text that users write does not go to the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from shoal.gateway.accounts import Account
from shoal.gateway.errors import Interrupted, RequestError
from shoal.gateway.limits import FAREWELL_S, Gate, Limits, patient, read_body, while_connected

logger = logging.getLogger("shoal.gateway")

HEADER = "idempotency-key"

Endpoint = Callable[[Scope, Receive, Send, Account], Awaitable[None]]
_Place = tuple[int, str, str]
"""Key id, path of the route, idempotency key."""

_ENTRY_BYTES = 1024
"""What a recording takes beside the bytes of its answer, so that a budget in bytes bounds their number too."""


class Idempotency:
    """The recordings of one gateway."""

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._gate = Gate(limits.requests)
        self._running: dict[_Place, _Recording] = {}
        self._kept: OrderedDict[_Place, _Recording] = OrderedDict()  # in the order of their ends
        self._kept_bytes: Counter[int] = Counter()  # by key id

    async def run(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send, account: Account) -> None:
        """Answer a request by `endpoint`, or by the recording of an earlier one with the same key.

        Raises what `endpoint` raises, and RequestError (400) for a key that cannot be, or that came with another body.
        """
        key = Headers(scope=scope).get(HEADER)
        if key is None:
            await endpoint(scope, receive, send, account)
            return
        if not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
            raise RequestError(
                "An idempotency key has 1 to 255 printable ASCII characters and no spaces.",
                code="invalid_idempotency_key",
            )
        with self._gate.enter():
            body = await read_body(scope, receive, self._limits)
            place, digest = (account.id, scope["route"].path, key), hashlib.sha256(body).digest()
            # From here to the start of the endpoint nothing waits, so two requests cannot both be the first.
            recording = self._find(place, digest)
            if recording is None:
                recording = self._running[place] = _Recording(digest, self._limits.kept_answer_bytes)
                recording.start(endpoint, scope, body, account, on_end=partial(self._on_end, place, recording))
            else:
                send = _marked(send)
            reader = _Reader(recording, patient(send, self._limits))
            try:
                await while_connected(receive, reader.read())
            except asyncio.CancelledError:
                # The gateway stops. The endpoint tells its clients so; that much they still get.
                recording.stop()
                with suppress(TimeoutError):
                    async with asyncio.timeout(FAREWELL_S):
                        await reader.read()
                raise
            finally:
                recording.readers.remove(reader)

    def _find(self, place: _Place, digest: bytes) -> _Recording | None:
        now = self._clock()
        while self._kept and (oldest := next(iter(self._kept.values()))).ended_at <= now - self._limits.kept_answer_s:
            self._forget(next(place for place, kept in self._kept.items() if kept is oldest))
        found = self._running.get(place) or self._kept.get(place)
        if found is not None and found.digest != digest:
            raise RequestError(
                "This idempotency key came before, with another body.",
                code="idempotency_key_reused",
                hint="Use a new key for a new request.",
            )
        return found

    def _on_end(self, place: _Place, recording: _Recording) -> None:
        """A recording has ended, or is too large to be kept: keep a whole answer, forget the others."""
        if self._running.get(place) is not recording:
            return
        del self._running[place]
        if not recording.whole:
            return
        recording.ended_at = self._clock()
        self._kept[place] = recording
        self._kept_bytes[place[0]] += recording.size
        # Nobody's answers may push out those of everybody else.
        while self._kept_bytes[place[0]] > self._limits.kept_answers_bytes // 4:
            self._forget(next(other for other in self._kept if other[0] == place[0]))
        while self._kept_bytes.total() > self._limits.kept_answers_bytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, place: _Place) -> None:
        self._kept_bytes[place[0]] -= self._kept.pop(place).size
        self._kept_bytes += Counter()  # drops what is zero


class _Recording:
    """One answer as it was sent, part by part, and who is reading it."""

    def __init__(self, digest: bytes, most_bytes: int) -> None:
        self.digest = digest
        self.size = _ENTRY_BYTES
        self.ended_at = 0.0
        self.whole = False
        self.failure: BaseException | None = None
        self.ended = False
        self.begun = False
        self.first = 0
        """Parts before this one are dropped."""
        self.parts: deque[Message] = deque()
        self.grown = asyncio.Event()
        self.readers: list[_Reader] = []
        self._most_bytes = most_bytes
        self._task: asyncio.Task[None] | None = None

    def start(
        self, endpoint: Endpoint, scope: Scope, body: bytes, account: Account, on_end: Callable[[], None]
    ) -> None:
        """Run the endpoint; `on_end` is called when nothing more can be read from the beginning."""
        self._task = asyncio.create_task(self._run(endpoint, scope, body, account, on_end), name="recorded answer")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(
        self, endpoint: Endpoint, scope: Scope, body: bytes, account: Account, on_end: Callable[[], None]
    ) -> None:
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not unread:
                await asyncio.Event().wait()  # this client never leaves
            return unread.pop()

        async def send(message: Message) -> None:
            self._record(message)
            if self.size > self._most_bytes:
                on_end()
                self.drop_what_is_read()
                if not self.readers:
                    self.stop()  # nobody will ever get it

        status = 0
        try:
            await endpoint(scope, receive, send, account)
            status = self.parts[0]["status"] if self.parts and not self.first else 0
            complete = bool(self.parts) and _is_last(self.parts[-1])
            self.whole = 200 <= status < 300 and complete and not scope["state"].get("failed")
        except BaseException as error:  # noqa: BLE001 - not handled here: every reader raises it
            self.failure = error
            if self.begun and isinstance(error, Exception):
                # The answer says so too. The error's own words stay out of the log: they may quote what a user wrote.
                logger.error("request %s: %s in its answer", scope["state"]["request_id"], type(error).__name__)
        finally:
            self.ended = True
            self._wake()
            on_end()

    def _record(self, message: Message) -> None:
        self.begun = True
        self.size += len(message.get("body", b""))
        self.parts.append(message)
        self._wake()

    def _wake(self) -> None:
        self.grown.set()
        self.grown.clear()

    def drop_what_is_read(self) -> None:
        """Forget the parts that every reader has; for a recording that nobody can find any more."""
        if self.size > self._most_bytes:
            reached = min((reader.position for reader in self.readers), default=self.first + len(self.parts))
            while self.first < reached:
                self.parts.popleft()
                self.first += 1


class _Reader:
    """Sends a recording to one client."""

    def __init__(self, recording: _Recording, send: Send) -> None:
        self.position = 0
        self._recording = recording
        self._send = send
        recording.readers.append(self)

    async def read(self) -> None:
        """Send what is there and what comes, to the end. Raises what the endpoint raised before its answer began.

        May be called again after a cancellation, and goes on where it was.
        """
        recording = self._recording
        while True:
            at = self.position - recording.first
            # The last part waits for the end: a client that has it may send its next request before we know the end.
            if at < len(recording.parts) and (recording.ended or not _is_last(recording.parts[at])):
                self.position += 1  # before it is sent: a part that was cut off must not be sent twice
                await self._send(recording.parts[at])
                recording.drop_what_is_read()
            elif recording.ended:
                break
            else:
                await recording.grown.wait()
        if recording.failure is not None and not recording.begun:
            if isinstance(recording.failure, Exception):
                raise recording.failure
            raise Interrupted(type(recording.failure).__name__)


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def _marked(send: Send) -> Send:
    """`send` that says in a header that the answer is not new."""

    async def send_marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"idempotent-replayed", b"true")]}
        await send(message)

    return send_marked
