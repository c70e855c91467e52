"""The files in which running swarms leave their addresses."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.errors import UsageError
from shoal.launch.state import Running, find, find_home, forget, remember, running
from shoal.net.home import Home

ME = Running(api="http://127.0.0.1:1/v1", key="sk-1", swarm_dir="/somewhere", pid=os.getpid())


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("SHOAL_API", raising=False)
    monkeypatch.delenv("SHOAL_KEY", raising=False)
    monkeypatch.delenv("SHOAL_SWARM_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "shoal" / f"running.{os.getpid()}.json"


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


def test_files_of_the_dead_go_when_another_swarm_starts(file: Path) -> None:
    dead = pid_of_the_dead()
    remember(Running(ME.api, ME.key, ME.swarm_dir, dead))
    remember(ME)
    assert list(file.parent.iterdir()) == [file]


@pytest.fixture
def second(tmp_path: Path, file: Path) -> Iterator[Running]:
    """Another living `shoal up` of the same user, that started after ME."""
    remember(ME)
    os.utime(file, ns=(1, 1))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        newer = Running("http://127.0.0.1:2/v1", "sk-2", str(tmp_path / "second"), process.pid)
        remember(newer)
        yield newer
        process.communicate(b"\n")


def test_of_several_swarms_the_newest_is_meant_and_the_person_is_told(second: Running) -> None:
    said: list[str] = []
    assert find(on_several=said.append) == (second.api, second.key)
    assert said == [f"2 swarms run; this is the newest, {second.api} (SHOAL_API names another: {ME.api})"]
    assert [each.pid for each in running()] == [second.pid, ME.pid]


def test_the_end_of_one_swarm_leaves_the_others_to_be_found(second: Running) -> None:
    said: list[str] = []
    forget(second.pid)
    assert find(on_several=said.append) == (ME.api, ME.key)
    assert not said


def test_a_swarm_that_is_named_gets_its_own_key_and_not_the_newest_ones(second: Running) -> None:
    assert find(ME.api + "/") == (ME.api + "/", ME.key)


def test_the_home_is_the_one_named_else_the_users_else_that_of_the_newest_swarm(
    second: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert find_home(on_several=said.append).path == tmp_path / "second"
    assert "--swarm-dir" in said[0]
    with pytest.raises(UsageError, match="holds no swarm"):
        find_home(tmp_path / "nothing")
    own = Home.create(tmp_path / "data" / "shoal" / "swarm", "bank")
    assert find_home().path == own.path
    named = Home.create(tmp_path / "named", "shop")
    assert find_home(named.path).path == named.path
    monkeypatch.setenv("SHOAL_SWARM_DIR", str(named.path))
    assert find_home().path == named.path


def test_no_home_anywhere_is_said_with_what_to_do() -> None:
    with pytest.raises(UsageError, match="holds no swarm") as caught:
        find_home()
    assert "shoal init" in caught.value.hint


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
    with pytest.raises(UsageError, match=r"running\.\d+\.json"):
        find()
