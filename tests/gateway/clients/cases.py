"""How the programs beside this one report: one line of JSON per case, and no word with any other machine."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Callable
from typing import Any

BASE = os.environ.get("SHOAL_BASE", "")
KEY = os.environ.get("SHOAL_KEY", "")
MODEL = os.environ.get("SHOAL_MODEL", "")


def stay_here() -> None:
    """From now on a connection to another machine fails, before anything is imported that might want one."""

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", None):
            raise PermissionError(f"asked for the address of {arguments[0]}")
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
            if not ipaddress.ip_address(host).is_loopback:
                raise PermissionError(f"connected to {host}")

    sys.addaudithook(listen)


def report(cases: dict[str, Callable[[], Any]]) -> None:
    """Run every case; its result, or the name and text of what it raised, is its line."""
    for name, case in cases.items():
        try:
            line: dict[str, Any] = {"result": case()}
        except Exception as error:  # noqa: BLE001 - what clients raise is what is looked at
            line = {"raised": type(error).__name__, "text": str(error), "code": getattr(error, "code", None)}
        print(json.dumps({"case": name, **line}), flush=True)
