"""What a command prints: answers and JSON on stdout, everything said about them on stderr.

So `shoal ... --json | jq` and `shoal generate ... > file` always hold just the answer. Colours appear on a terminal
only, and never when NO_COLOR is set.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import click

PROGRESS_EVERY_S = 10.0
"""Away from a terminal (a log file, CI) progress is one line in this many seconds."""


def answer(text: str, *, end: str = "\n") -> None:
    """Print a part of the answer itself on stdout, at once."""
    _write_stdout(text + end)


def answer_json(value: object) -> None:
    """Print `value` as one line of JSON on stdout. Raises ValueError for NaN and infinity, which JSON does not have."""
    _write_stdout(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def note(text: str) -> None:
    """Tell the person at the terminal something about the work, on stderr."""
    print(text, file=sys.stderr, flush=True)


def error(
    message: str, *, code: str, hint: str = "", retry_after_s: float | None = None, as_json: bool = False
) -> None:
    """Print why a command failed and what to do next: two lines on stderr, or one JSON object on stdout."""
    if as_json:
        body: dict[str, object] = {"code": code, "message": message, "hint": hint}
        if retry_after_s is not None:
            body["retry_after_s"] = retry_after_s
        answer_json({"error": body})
        return
    note(f"{paint('error:', 'red')} {message}")
    if hint:
        note(f"{paint('hint:', 'cyan')} {hint}")


def paint(text: str, colour: str) -> str:
    """`text` in a colour when stderr is a terminal that wants colours, else unchanged."""
    return click.style(text, fg=colour) if _wants_colour(sys.stderr) else text


def paint_answer(text: str, colour: str) -> str:
    """The same for text on stdout."""
    return click.style(text, fg=colour) if _wants_colour(sys.stdout) else text


@contextmanager
def progress(
    label: str, *, total: float | None = None, unit: str = "", clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[float], None]]:
    """Show how far a long piece of work is, on stderr: a bar on a terminal, else a line now and then.

    Yields `advance(amount)`. `total` and amounts are in `unit`; with `total=None` only the amount done is shown.
    """
    with _bar(label, total) if sys.stderr.isatty() else _lines(label, total, unit, clock) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: float | None) -> Iterator[Callable[[float], None]]:
    # Imported here because rich costs more time than all of `shoal --help`.
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True, no_color=not _wants_colour(sys.stderr)), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda amount: bar.advance(task, amount)


@contextmanager
def _lines(label: str, total: float | None, unit: str, clock: Callable[[], float]) -> Iterator[Callable[[float], None]]:
    done, said, next_line_at = 0.0, -1.0, clock() + PROGRESS_EVERY_S

    def say() -> None:
        nonlocal said, next_line_at
        said, next_line_at = done, clock() + PROGRESS_EVERY_S
        amount = f"{done:g}" if total is None else f"{done:g} of {total:g}"
        note(f"{label}: {amount} {unit}".rstrip())

    def advance(amount: float) -> None:
        nonlocal done
        done += amount
        if clock() >= next_line_at:
            say()

    yield advance
    if said != done:
        say()


def _wants_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def _write_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`shoal status | head -1`): nobody is left to tell. Python would complain once more when
        # it flushes stdout at exit, so give it a place to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
