"""What a machine tells about those who use it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.networks import run

from shoal.errors import UsageError
from shoal.server.neighbour import Machine, login_idle_since

HZ = os.sysconf("SC_CLK_TCK")


def proc(folder: Path, *, user: int = 0, nice: int = 0, idle: int = 0, keyboard: int | None = None) -> Path:
    """A /proc with seconds of processor time."""
    folder.mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {user * HZ} {nice * HZ} 0 {idle * HZ} 0 0 0 0 0 0\ncpu0 1 2 3\n")
    lines = ["           CPU0       CPU1", "  0:   12   34   IO-APIC   2-edge  timer"]
    if keyboard is not None:
        lines.append(f"  1:   {keyboard}   7   IO-APIC   1-edge  i8042")
    (folder / "interrupts").write_text("\n".join(lines) + "\n")
    return folder


def test_work_of_others_is_a_share_of_all_processors_and_nice_work_is_nobodys(tmp_path: Path) -> None:
    async def scenario() -> None:
        machine = Machine(proc(tmp_path / "proc"), tmp_path)
        proc(tmp_path / "proc", user=1000, idle=3000)
        assert (await machine.sample()).others == pytest.approx(0.25, abs=0.01)
        proc(tmp_path / "proc", user=1000, nice=4000, idle=3000)
        assert (await machine.sample()).others == 0.0

    run(scenario)


def test_keys_are_seen_by_their_interrupts_and_typing_in_a_terminal_by_its_access_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        machine = Machine(proc(tmp_path / "proc", keyboard=5), tmp_path)
        machine._login_asked_at = time.monotonic()  # this test machine's own screen does not matter
        assert (await machine.sample()).input_idle_s is None
        proc(tmp_path / "proc", keyboard=6)
        idle_s = (await machine.sample()).input_idle_s
        assert idle_s is not None
        assert idle_s < 1.0
        other = Machine(proc(tmp_path / "proc", keyboard=6), tmp_path)
        other._login_asked_at = time.monotonic()
        (tmp_path / "pts").mkdir()
        terminal = tmp_path / "pts" / "3"
        terminal.touch()
        os.utime(terminal, (time.time() - 500, time.time()))
        assert (await other.sample()).input_idle_s == pytest.approx(500, abs=5)

    run(scenario)


def test_the_login_manager_is_believed_when_somebody_is_logged_in_at_the_screen() -> None:
    here = "IdleHint={}\nIdleSinceHint={}\nActiveSession=2\n"
    assert login_idle_since(here.format("no", 0), 1000.0) == 1000.0
    assert login_idle_since(here.format("yes", 400_000_000), 1000.0) == 400.0
    assert login_idle_since("IdleHint=yes\nIdleSinceHint=400000000\nActiveSession=\n", 1000.0) is None
    assert login_idle_since("Failed to connect\n", 1000.0) is None


def test_a_system_that_tells_nothing_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not tell how busy"):
        Machine(tmp_path, tmp_path)


@pytest.mark.slow
def test_a_real_program_beside_us_is_seen_and_our_own_work_is_not() -> None:
    async def scenario() -> None:
        machine = Machine()
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            began, own_s = time.monotonic(), time.process_time()
            while time.monotonic() < began + 2.0:
                pass
            seen = (await machine.sample()).others
            own = (time.process_time() - own_s) / (time.monotonic() - began) / (os.cpu_count() or 1)
        finally:
            busy.kill()
            busy.wait()
        assert seen > 0.25 / (os.cpu_count() or 1)
        assert seen + own < 1.1, "our part is not counted among the others'"

    run(scenario)
