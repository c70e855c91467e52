"""Where a running swarm leaves its address for other commands of the same user: one small private file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.errors import UsageError


@dataclass(frozen=True, slots=True)
class Running:
    """How to reach the swarm that `shoal up` started."""

    api: str
    key: str
    swarm_dir: str
    pid: int


def state_dir() -> Path:
    """$XDG_STATE_HOME/shoal, by default ~/.local/state/shoal; made private to the user."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    path = Path(base) / "shoal"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def remember(running: Running) -> None:
    """Write the file, readable by this user only."""
    path = state_dir() / "running.json"
    new = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(asdict(running), stream)
    new.replace(path)


def forget(pid: int) -> None:
    """Remove the file if it is about the swarm of this process."""
    found = _read()
    if found is not None and found.pid == pid:
        (state_dir() / "running.json").unlink(missing_ok=True)


def find(api: str | None = None, key: str | None = None) -> tuple[str, str]:
    """(api, key) of the swarm to talk to: what was given, else SHOAL_API and SHOAL_KEY, else the running `shoal up`.

    Raises UsageError when there is none.
    """
    api = api or os.environ.get("SHOAL_API")
    key = key or os.environ.get("SHOAL_KEY")
    if api and key:
        return api, key
    found = _read()
    if found is None:
        raise UsageError(
            "No swarm of this user runs on this machine.",
            hint="Start one with `shoal up`, or name one with SHOAL_API and SHOAL_KEY.",
        )
    return api or found.api, key or found.key


def _read() -> Running | None:
    try:
        found = Running(**json.loads((state_dir() / "running.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"Cannot read {state_dir() / 'running.json'}: {error}",
            hint="Remove that file and start the swarm again.",
        ) from error
    return found if is_running(found.pid) else None


def is_running(pid: int) -> bool:
    """Whether a process with this id exists, ours or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
