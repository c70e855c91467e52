"""A thread that writes a busy process's audit entries: whatever waits when the disk is ready goes out together.

One entry costs a signature or two and one wait for the disk; a hundred entries that come meanwhile cost the same.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from shoal.errors import ShoalError
from shoal.manifest.canonical import Json
from shoal.manifest.chain import AuditBroken, AuditLog, Head

WAITING = 4096
"""Entries that may wait for the disk. A gateway runs at most a few hundred requests, each with a handful."""
TOGETHER = 256
"""Entries under one signature."""

_Waiting = tuple[str, Mapping[str, Json], "Future[Head]"]


class AuditWriter:
    """Entries from any thread, in the order of `submit`. `close` when done."""

    def __init__(self, log: AuditLog, *, on_head: Callable[[Head], None] = lambda head: None) -> None:
        """`on_head` hears, in the writer's thread, where the log stands after every write."""
        self._log = log
        self._on_head = on_head
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="audit log", daemon=True)
        self._thread.start()

    def submit(self, kind: str, **data: Json) -> Future[Head]:
        """The future is done once the entry is on the disk; it raises what the log raised. Raises AuditBroken when the
        disk is so far behind that no entry can wait any more.

        `data` is taken as it is now: what the caller does to its lists later must not change an entry that waits, or
        one that has just been signed."""
        future: Future[Head] = Future()
        try:
            self._waiting.put_nowait((kind, copy.deepcopy(data), future))
        except queue.Full:
            raise AuditBroken(
                f"The disk of the audit log is {WAITING} entries behind.", hint="See what else uses that disk."
            ) from None
        return future

    def close(self) -> None:
        """Write what waits, then end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            batch: list[_Waiting] = []
            item = self._waiting.get()
            while item is not None:
                batch.append(item)
                if len(batch) == TOGETHER:
                    break
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
            ended = item is None
            if batch:
                self._write(batch)

    def _write(self, batch: list[_Waiting]) -> None:
        try:
            head = self._log.append_all([(kind, data) for kind, data, _ in batch])
        except (ShoalError, OSError, ValueError) as error:
            for _, _, future in batch:
                future.set_exception(error)
            return
        for _, _, future in batch:
            future.set_result(head)
        self._on_head(head)
