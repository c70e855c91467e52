"""Watches this process through Python's audit events for what shoal must never do.

* An object is unpickled with a frame of shoal's own code on the call stack, however deep: a library that unpickles for
  itself (multiprocessing between its own processes, torch at import) is not meant, a library that does it on shoal's
  behalf is. Child processes of a test have their own guard, `shoal.cli.unpickling`.
* A socket of this process connects to or listens on an address that is not loopback. Sockets that uvloop opens in C
  raise no audit event, so they are not seen.
"""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path

import shoal

SHOAL_FOLDER = str(Path(shoal.__file__).parent) + "/"

_seen: list[str] = []


def start() -> None:
    """Begin to watch. An audit hook cannot be removed again, so this is called once for a test run."""
    sys.addaudithook(_listen)


def take() -> list[str]:
    """What was seen since the last call, a line each."""
    seen = _seen.copy()
    _seen.clear()
    return seen


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        place = _innermost_frame_under(SHOAL_FOLDER)
        if place:
            _seen.append(f"{place} unpickled {arguments[0]}.{arguments[1]}")
    elif event in ("socket.connect", "socket.bind") and _is_outside(arguments[1]):
        _seen.append(f"{event} to {arguments[1]}")


def _innermost_frame_under(folder: str) -> str | None:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(folder):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _is_outside(address: object) -> bool:
    """True for an internet address beyond this machine (or "", every interface); paths of Unix sockets do not count."""
    if not isinstance(address, tuple) or not isinstance(address[0], str):
        return False
    try:
        return not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    except ValueError:
        return address[0] != "localhost"
