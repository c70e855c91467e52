"""`shoal join` says what is wrong with this machine before it spends the token, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.swarm import DEMO

from shoal.cli import process
from shoal.cli.main import run
from shoal.errors import UsageError
from shoal.net.home import Home
from shoal.server.joining import number_of_threads, reachable
from shoal.wire.enrolment import SECRET_BYTES, Token

TOKEN = str(Token("tcp://127.0.0.1:1", bytes(32), bytes(SECRET_BYTES)))
"""Of an admin that nobody can reach: whatever is said about this machine was found without it."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in (("XDG_STATE_HOME", "state"), ("XDG_DATA_HOME", "data")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.delenv("SHOAL_SWARM_DIR", raising=False)


def error(capsys: pytest.CaptureFixture[str], *args: str, code: int) -> dict[str, Any]:
    assert run(["join", *args, "--json"]) == code
    return dict(json.loads(capsys.readouterr().out)["error"])


@pytest.mark.parametrize(
    ("options", "code", "name", "words"),
    [
        (("--serve", "/no/such/model"), 2, "model_error", "is not a model directory"),
        (("--serve", str(DEMO), "--memory", "100KiB"), 3, "not_enough_room", "none of the 8 blocks fits"),
        (("--serve", str(DEMO), "--memory", "7MiB", "--blocks", "0:8"), 3, "not_enough_room", "room for 3 blocks"),
        (("--serve", str(DEMO), "--blocks", "4:12"), 2, "invalid_request", "has blocks 0:8, 4:12 was asked for"),
        (("--serve", str(DEMO), "--blocks", "4"), 2, "invalid_request", "Cannot read the block range"),
        (("--serve", str(DEMO), "--threads", "many"), 2, "invalid_request", "is no number of threads"),
        (("--serve", str(DEMO), "--memory", "lots"), 2, "invalid_request", "Cannot read the size"),
        (("--serve", str(DEMO), "--listen", "here"), 2, "invalid_request", "Cannot read the address"),
        (("--serve", str(DEMO)), 1, "peer_lost", "Cannot reach the swarm's admin at tcp://127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(
    options: tuple[str, ...], code: int, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = error(capsys, TOKEN, *options, code=code)
    assert told["code"] == name
    assert words in told["message"]
    assert told["hint"]


def test_without_a_token_it_must_have_joined_before(capsys: pytest.CaptureFixture[str]) -> None:
    told = error(capsys, "--serve", str(DEMO), code=2)
    assert "not yet a server" in told["message"]
    assert "shoal invite --role server" in told["hint"]


def test_a_token_that_is_none_is_refused_without_a_connection(capsys: pytest.CaptureFixture[str]) -> None:
    assert "token" in error(capsys, "shoal1.nonsense", "--serve", str(DEMO), code=2)["message"]


def test_two_processes_do_not_share_one_identity(tmp_path: Path) -> None:
    folder = Home(tmp_path).node_dir("server")
    with process.only_one(folder):
        with pytest.raises(UsageError, match="runs already"), process.only_one(folder):
            pass
        with process.only_one(Home(tmp_path).node_dir("server-2")):
            pass
    with process.only_one(folder):
        pass


def test_a_server_listens_towards_its_swarm_and_tells_an_address_that_others_can_use() -> None:
    assert reachable(("tcp://127.0.0.1:7700",), "", None) == ("tcp://127.0.0.1:0", None)
    everywhere = "tcp://0.0.0.0:7000"
    assert reachable(("tcp://127.0.0.1:7700",), everywhere, None) == (everywhere, "tcp://127.0.0.1:0")
    behind = "tcp://203.0.113.5:7000"
    assert reachable(("tcp://127.0.0.1:7700",), everywhere, behind) == (everywhere, behind)
    with pytest.raises(UsageError, match="No way leads"):
        reachable((), "", None)


def test_threads_are_a_number_or_left_to_measurement() -> None:
    assert number_of_threads("auto") is None
    assert number_of_threads("4") == 4
    with pytest.raises(UsageError):
        number_of_threads("0")
