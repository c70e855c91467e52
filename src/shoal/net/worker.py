"""The one thread that computes, beside the event loop that talks.

A decode step crosses from the loop to this thread and back on every server, after milliseconds in which both slept and
their caches went cold, so the way there and back is as short as Python allows: a queue one way, one scheduled callback
the other way. (An executor adds two futures and two more turns of the loop, a few tenths of a millisecond a step.)
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

log = logging.getLogger("shoal.worker")

T = TypeVar("T")
Done = Callable[[Any, BaseException | None], None]
"""done(result, error), called in the event loop."""


class Worker:
    """Runs functions one after the other in a thread of its own. Made and used inside a running event loop."""

    def __init__(self, name: str, begin: Callable[[], None]) -> None:
        """`begin` runs first in the thread: it sets how many threads the numerical library may use there."""
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], Done] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(begin,), name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any, done: Done) -> None:
        """Queue function(*args); its end is reported to `done`."""
        self._jobs.put((function, args, done))

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Queue function(*args) whose result nobody waits for; a failure is logged."""
        self.submit(function, *args, done=_log_failure)

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Queue function(*args) and wait for it. Raises what it raises."""
        answer: asyncio.Future[T] = self._loop.create_future()

        def done(result: T, error: BaseException | None) -> None:
            if answer.cancelled():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        self.submit(function, *args, done=done)
        return await answer

    def report(self, function: Callable[..., Any], *args: Any) -> None:
        """Have function(*args) called in the event loop, from any thread. Nothing happens when the loop is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Let the thread end after what is queued. Does not wait: a long batch must not hold up a leaving process."""
        self._jobs.put(None)

    def _run(self, begin: Callable[[], None]) -> None:
        begin()
        while (job := self._jobs.get()) is not None:
            function, args, done = job
            result, error = None, None
            try:
                result = function(*args)
            except BaseException as raised:  # noqa: BLE001 - not handled here: handed to the loop, whole
                error = raised
            del job, function, args  # the inputs of a batch must not live until the next one comes
            try:
                self._loop.call_soon_threadsafe(done, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody is left to tell


def _log_failure(result: Any, error: BaseException | None) -> None:
    if error is not None:
        log.error("a change in the compute thread failed", exc_info=error)
