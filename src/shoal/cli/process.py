"""What every process of a swarm has in common: it logs to stderr, and stops on SIGTERM or when its parent is gone."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from shoal.errors import UsageError

_T = TypeVar("_T")

WAIT_QUIETLY = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Huge pages for large tensors, and no warnings about models that are loaded in part: see launch/children.py.
    "THP_MEM_ALLOC_ENABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What makes the OpenMP libraries block: the standard's own variable, GNU's and Intel's."""
FOR_LIBRARIES = {"THP_MEM_ALLOC_ENABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""As launch/children.py says, for commands that a person starts."""


def set_up_logging() -> None:
    """One line per event on stderr, which the parent sends to a file. Prompts and answers are never logged."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def secret(argument: str) -> str:
    """A secret given as an argument, or with "-" as a line of standard input: arguments are seen by every user of the
    machine, as long as the process runs."""
    return sys.stdin.readline().strip() if argument == "-" else argument


def block_and_never_spin() -> None:
    """Let threads that wait for each other sleep: numerical libraries spin by default, which takes the processors from
    whoever else uses this machine, and makes every step slower when somebody does. Before torch is imported: its
    libraries look once, when they are loaded."""
    os.environ.update(WAIT_QUIETLY)
    for name, value in FOR_LIBRARIES.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the place of the node in `folder`: two processes with one identity would fight over its record. Raises
    UsageError when another one runs."""
    lock = folder.with_name(f".{folder.name}.lock")
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"The node {folder.name} of this machine runs already.",
                hint="Stop that process first, or run a second node beside it with another --name.",
            ) from None
        yield
    finally:
        os.close(descriptor)


def on_stop(stop: Callable[[], None], *, with_parent: bool = True) -> None:
    """Call `stop` in the running loop on SIGTERM or SIGINT; in child processes (`with_parent`) also at the end of
    standard input. A command that a person or a service manager starts may well have none."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if not with_parent:
        return

    def watch_parent() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(stop)

    # A daemon thread, because a blocking read of standard input cannot be interrupted.
    threading.Thread(target=watch_parent, name="parent watch", daemon=True).start()


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a process's main coroutine on uvloop where there is one."""
    # A compute thread holds the interpreter between its kernels; the network loop must get it back within a fraction
    # of a step, not after the default of 5 ms.
    sys.setswitchinterval(0.0005)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
