"""The file in which a running swarm leaves its address."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.errors import UsageError
from shoal.launch.state import Running, find, forget, remember

ME = Running(api="http://127.0.0.1:1/v1", key="sk-1", swarm_dir="/somewhere", pid=os.getpid())


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SHOAL_API", raising=False)
    monkeypatch.delenv("SHOAL_KEY", raising=False)
    return tmp_path / "shoal" / "running.json"


def pid_of_the_dead() -> int:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return child.pid


def test_a_running_swarm_is_found_until_it_is_forgotten(file: Path) -> None:
    remember(ME)
    assert find() == (ME.api, ME.key)
    forget(ME.pid)
    assert not file.exists()
    with pytest.raises(UsageError, match="No swarm"):
        find()


def test_the_file_holds_a_key_and_only_its_owner_may_read_it(file: Path) -> None:
    remember(ME)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert list(file.parent.iterdir()) == [file], "nothing half-written is left beside it"


def test_a_swarm_that_died_without_a_word_is_not_found() -> None:
    remember(Running(ME.api, ME.key, ME.swarm_dir, pid_of_the_dead()))
    with pytest.raises(UsageError, match="No swarm"):
        find()


def test_a_newer_swarm_is_not_forgotten_by_the_end_of_an_older_one(file: Path) -> None:
    remember(ME)
    forget(ME.pid + 1)
    assert file.exists()


def test_what_is_given_wins_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(ME)
    monkeypatch.setenv("SHOAL_API", "http://env")
    assert find() == ("http://env", ME.key)
    monkeypatch.setenv("SHOAL_KEY", "sk-env")
    assert find() == ("http://env", "sk-env")
    assert find("http://given", None) == ("http://given", "sk-env")
    assert find("http://given", "sk-given") == ("http://given", "sk-given")


@pytest.mark.parametrize("text", ["{", "[]", '{"api": "x"}', "null"])
def test_a_damaged_file_is_an_error_that_names_it(file: Path, text: str) -> None:
    remember(ME)
    file.write_text(text)
    with pytest.raises(UsageError, match=r"running\.json"):
        find()
