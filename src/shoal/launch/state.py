"""Where running swarms leave their addresses for other commands of the same user: a small private file for each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.errors import UsageError
from shoal.manifest.files import write_private
from shoal.net.home import Home, home_path


@dataclass(frozen=True, slots=True)
class Running:
    """How to reach the swarm that one `shoal up` started."""

    api: str
    key: str
    swarm_dir: str
    pid: int


def state_path() -> Path:
    """$XDG_STATE_HOME/shoal, by default ~/.local/state/shoal. It need not exist."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "shoal"


def state_dir() -> Path:
    """`state_path`, made private to the user."""
    path = state_path()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def remember(running: Running) -> None:
    """Write the file of this process, readable by this user only. Files of processes that were killed go."""
    for path in _files():
        pid = path.name.split(".")[1]
        if pid.isdigit() and not is_running(int(pid)):
            path.unlink(missing_ok=True)
    write_private(_file(running.pid), json.dumps(asdict(running)).encode())


def forget(pid: int) -> None:
    """Remove the file of this process."""
    _file(pid).unlink(missing_ok=True)


def running() -> list[Running]:
    """Every `shoal up` of this user that lives, the newest first. Raises UsageError for a damaged file."""
    found = [(path, path.stat().st_mtime_ns) for path in _files() if path.exists()]
    newest_first = sorted(found, key=lambda each: each[1], reverse=True)
    return [read for path, _ in newest_first if (read := _read(path)) is not None]


def find(
    api: str | None = None, key: str | None = None, *, on_several: Callable[[str], None] = lambda text: None
) -> tuple[str, str]:
    """(api, key) of the swarm to talk to: what was given, else SHOAL_API and SHOAL_KEY, else the newest running
    `shoal up`; on_several hears which one that is, when there are others.

    Raises UsageError when there is none.
    """
    api = api or os.environ.get("SHOAL_API")
    key = key or os.environ.get("SHOAL_KEY")
    if api and key:
        return api, key
    found = running()
    if api:
        # A key goes to the gateway that made it, and to no other.
        found = [each for each in found if each.api.rstrip("/") == api.rstrip("/")] or found
    if not found:
        raise UsageError(
            "No swarm of this user runs on this machine.",
            hint="Start one with `shoal up`, or name one with SHOAL_API and SHOAL_KEY.",
        )
    if len(found) > 1:
        others = ", ".join(each.api for each in found[1:])
        on_several(f"{len(found)} swarms run; this is the newest, {found[0].api} (SHOAL_API names another: {others})")
    return api or found[0].api, key or found[0].key


def find_home(given: Path | None = None, *, on_several: Callable[[str], None] = lambda text: None) -> Home:
    """The swarm directory that a command is about: the one that was named (see net.home.home_path), else the one of the
    newest running `shoal up`. Raises UsageError when there is none."""
    home = Home(home_path(given))
    if home.exists or given is not None or os.environ.get("SHOAL_SWARM_DIR"):
        home.read()
        return home
    found = running()
    if not found:
        home.read()  # says what is missing, and what to do
    if len(found) > 1:
        on_several(f"{len(found)} swarms run; this is the newest, {found[0].swarm_dir} (--swarm-dir names another)")
    return Home(Path(found[0].swarm_dir))


def _file(pid: int) -> Path:
    return state_dir() / f"running.{pid}.json"


def _files() -> list[Path]:
    return list(state_dir().glob("running.*.json"))


def _read(path: Path) -> Running | None:
    try:
        found = Running(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UsageError(f"Cannot read {path}: {error}", hint="Remove that file and start the swarm again.") from error
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
