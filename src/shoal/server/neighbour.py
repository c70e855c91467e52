"""What a borrowed machine's owner is doing: looks at /proc, at terminals, and asks the login manager.

Only Linux tells all of this without rights of an administrator. Work at a low priority (nice) is nobody's work here: it
gives way by itself, as we do (`step_back`), so two borrowers on one machine do not chase each other away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import UsageError
from shoal.swarm.neighbour import Sample

NICENESS = 10
LOGIN_ASKED_S = 10.0
"""How often the login manager is asked; it answers through a process of its own."""
_LOGIN_ANSWERS_S = 2.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def step_back() -> None:
    """Lower this process's priority for good: what its owner starts goes first even before we have noticed."""
    if os.getpriority(os.PRIO_PROCESS, 0) < NICENESS:
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of processor time so far: the whole machine's, what was at work in the foreground, and our part of it."""

    all: float
    foreground: float
    own: float


class Machine:
    """Samples of this machine. Raises UsageError where it cannot be watched."""

    def __init__(self, proc: Path = Path("/proc"), dev: Path = Path("/dev")) -> None:
        self._proc = proc
        self._dev = dev
        self._nice = os.getpriority(os.PRIO_PROCESS, 0) > 0
        try:
            self._before = self._times()
        except (OSError, ValueError, IndexError) as error:
            raise UsageError(
                "This system does not tell how busy it is (/proc/stat).",
                hint="Leave --idle-only away, or use a Linux machine.",
            ) from error
        self._interrupts = self._keyboard_interrupts()
        self._input_at: float | None = None
        self._login_idle_since: float | None = None
        self._login_asked_at = -1e18

    async def sample(self) -> Sample:
        """What happened since the last sample."""
        now = time.monotonic()
        if now - self._login_asked_at >= LOGIN_ASKED_S:
            self._login_asked_at = now
            self._login_idle_since = await _login_idle_since()
        before, self._before = self._before, self._times()
        passed = self._before.all - before.all
        others = (self._before.foreground - before.foreground) - (self._before.own - before.own)
        share = min(1.0, max(0.0, others / passed)) if passed > 0 else 0.0
        return Sample(share, self._input_idle_s(now))

    def _times(self) -> _Times:
        fields = self._proc.joinpath("stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, idle, iowait, irq, softirq, steal = (int(field) * _TICK_S for field in fields[:8])
        own = os.times()  # this process, all threads, and children that have ended
        own_s = own.system + own.children_system + (0.0 if self._nice else own.user + own.children_user)
        foreground = user + system + irq + softirq
        return _Times(foreground + nice + idle + iowait + steal, foreground, own_s)

    def _input_idle_s(self, now: float) -> float | None:
        """Seconds since the last sign of hands, by the most recent of the sources that this machine has."""
        interrupts = self._keyboard_interrupts()
        if interrupts is not None and interrupts != self._interrupts:
            self._interrupts, self._input_at = interrupts, now
        idle = [now - self._input_at] if self._input_at is not None else []
        wall = time.time()
        for terminal in [*self._dev.glob("pts/[0-9]*"), *self._dev.glob("tty[0-9]*")]:
            with contextlib.suppress(OSError):
                found = terminal.stat()
                if found.st_uid or "pts" in terminal.parts:  # nobody is logged in at a console that is root's
                    idle.append(max(0.0, wall - found.st_atime))
        if self._login_idle_since is not None:
            idle.append(max(0.0, wall - self._login_idle_since))
        return min(idle, default=None)

    def _keyboard_interrupts(self) -> int | None:
        """Interrupts of the built-in keyboard and mouse so far; None on machines without."""
        try:
            lines = self._proc.joinpath("interrupts").read_text().splitlines()
        except OSError:
            return None
        counts = [
            sum(map(int, re.findall(r"\s(\d+)(?=\s)", line))) for line in lines if line.rstrip().endswith("i8042")
        ]
        return sum(counts) if counts else None


async def _login_idle_since() -> float | None:
    """Since when (Unix time) the person at this machine's screen is idle, by systemd's login manager; now when not
    idle; None when there is no such manager or no screen."""
    program = shutil.which("loginctl")
    if program is None or not Path("/run/systemd/seats/seat0").exists():
        return None
    process = await asyncio.create_subprocess_exec(
        *(program, "show-seat", "seat0", "--property=IdleHint", "--property=IdleSinceHint", "--property=ActiveSession"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_LOGIN_ANSWERS_S):
            answer, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    return login_idle_since(answer.decode(errors="replace"), time.time())


def login_idle_since(answer: str, now: float) -> float | None:
    """Read what `loginctl show-seat` printed. `now` is Unix time; IdleSinceHint comes in microseconds of it."""
    fields = dict(line.split("=", 1) for line in answer.splitlines() if "=" in line)
    if not fields.get("ActiveSession"):
        return None  # nobody is logged in at the screen
    if fields.get("IdleHint") == "no":
        return now
    since = fields.get("IdleSinceHint", "")
    return int(since) / 1e6 if since.isdigit() and int(since) > 0 else None
