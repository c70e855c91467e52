"""The compute thread: one job after the other, every end heard in the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from support.networks import run

from shoal.net.worker import Worker


def nothing() -> None:
    pass


def test_jobs_run_in_one_thread_of_their_own_in_the_order_they_were_given() -> None:
    async def scenario() -> None:
        ran: list[tuple[int, int]] = []
        begun: list[int] = []
        worker = Worker("w", lambda: begun.append(threading.get_ident()))
        for number in range(5):
            worker.post(lambda number=number: ran.append((number, threading.get_ident())))  # type: ignore[misc]
        thread = await worker.call(threading.get_ident)
        assert ran == [(number, thread) for number in range(5)]
        assert begun == [thread] != [threading.get_ident()]
        worker.close()

    run(scenario)


def test_ends_are_heard_in_the_loop_with_result_or_error() -> None:
    async def scenario() -> None:
        worker = Worker("w", nothing)
        heard: list[tuple[object, object, int]] = []
        both = asyncio.Event()

        def done(result: object, error: BaseException | None) -> None:
            heard.append((result, type(error), threading.get_ident()))
            if len(heard) == 2:
                both.set()

        worker.submit(divmod, 7, 2, done=done)
        worker.submit(divmod, 7, 0, done=done)
        await both.wait()
        here = threading.get_ident()
        assert heard == [((3, 1), type(None), here), (None, ZeroDivisionError, here)]
        with pytest.raises(ZeroDivisionError):
            await worker.call(divmod, 7, 0)
        assert await worker.call(divmod, 7, 2) == (3, 1), "an error ends a job, not the thread"
        worker.close()

    run(scenario)


def test_a_caller_that_gave_up_is_not_told() -> None:
    async def scenario() -> None:
        worker = Worker("w", nothing)
        held = threading.Event()
        call = asyncio.create_task(worker.call(held.wait))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        held.set()
        assert await worker.call(divmod, 7, 2) == (3, 1)
        worker.close()

    run(scenario)


def test_a_failed_change_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        worker = Worker("w", nothing)
        worker.post(divmod, 7, 0)
        await worker.call(nothing)
        worker.close()

    with caplog.at_level(logging.ERROR):
        run(scenario)
    (logged,) = caplog.records
    assert logged.exc_info is not None
    assert logged.exc_info[0] is ZeroDivisionError


def test_closing_lets_queued_jobs_end_and_the_thread_with_them() -> None:
    ran: list[int] = []
    threads: list[threading.Thread] = []

    async def scenario() -> None:
        worker = Worker("w", nothing)
        threads.append(await worker.call(threading.current_thread))
        for number in range(3):
            worker.post(ran.append, number)
        worker.close()

    run(scenario)
    threads[0].join(10)
    assert not threads[0].is_alive()
    assert ran[0] == 0, "what was queued before the close runs, as long as there is a loop to tell"
