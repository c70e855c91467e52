"""`shoal audit`: who could have read a request, found by request, node, key and time; and whether it is still so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.net.auditing import audit_log
from shoal.net.home import Home

Shoal = Callable[..., tuple[int, str, str]]
A, B = "a" * 32, "b" * 32


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str]) -> Shoal:
    """Runs a command line: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        code = main.run(args)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A swarm directory whose log has two requests, one of them without an end, and a key."""
    monkeypatch.setenv("SHOAL_SWARM_DIR", str(tmp_path / "swarm"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    home = Home.create(tmp_path / "swarm", "bank")
    log = audit_log(home, home.node("admin"))
    log.append("key.create", id=7, name="alice")
    about = {"request": "f00d" * 8, "key": 7, "model": "m", "zones": "all=hq"}
    log.append("request.hosts", **about, hosts=[[A, "0:4"]])
    log.append("request.hosts", **about, hosts=[[B, "0:4"]])
    log.append("request", **about, hosts=[[A, "0:4"], [B, "0:4"]], outcome="ok", prompt_tokens=3, tokens=5)
    log.append("request.hosts", request="beef" * 8, key=8, model="m", zones="", hosts=[[B, "0:4"]])
    return home


def test_a_request_shows_everyone_who_could_have_read_it(shoal: Shoal, home: Home) -> None:
    code, out, _ = shoal("audit", "show", "--request", "f00d")
    assert code == 0
    admin = home.node("admin").peer.node
    title, *readers = out.splitlines()
    assert "request " + "f00d" * 8 + " of key 7 to m: ok, 3 + 5 tokens, under all=hq" in title
    assert [line.split()[0] for line in readers] == [admin[:8], A[:8], B[:8]]
    assert "text itself" in readers[0]
    assert readers[1].endswith("blocks 0:4")


def test_what_is_shown_can_be_chosen_by_node_key_and_time(shoal: Shoal, home: Home) -> None:
    def requests(*options: str) -> list[str]:
        code, out, _ = shoal("audit", "show", "--json", *options)
        assert code == 0
        return [entry["request"][:4] for entry in json.loads(out)["entries"] if entry["kind"] == "request"]

    assert requests() == ["f00d", "beef"]
    assert requests("--node", A[:6]) == ["f00d"]
    assert requests("--node", B) == ["f00d", "beef"]
    assert requests("--key", "8") == ["beef"]
    assert requests("--since", "1h") == ["f00d", "beef"]
    assert requests("--since", "2125-01-01") == []
    assert shoal("audit", "show", "--since", "soon")[0] == 2


def test_a_request_whose_gateway_was_killed_is_shown_without_an_end(shoal: Shoal, home: Home) -> None:
    entry = json.loads(shoal("audit", "show", "--json", "--request", "beef")[1])["entries"][0]
    assert entry["outcome"] == "no end noted"
    assert [reader["node"] for reader in entry["readers"]] == [entry["by"], B]


def test_a_whole_log_is_exit_code_0_and_a_changed_one_3_with_the_entry(shoal: Shoal, home: Home) -> None:
    assert shoal("audit", "verify")[0] == 0
    found = json.loads(shoal("audit", "verify", "--json")[1])
    assert (found["whole"], found["entries"], found["bad"]) == (True, 6, "")
    text = home.audit_log.read_bytes()
    home.audit_log.write_bytes(text.replace(b'"tokens":5', b'"tokens":6'))
    code, out, _ = shoal("audit", "verify")
    assert code == 3
    assert "entry 4 (line 5 of audit.jsonl)" in out
    assert json.loads(shoal("audit", "verify", "--json")[1])["bad_entry"] == 4
    code, out, err = shoal("audit", "show")
    assert code == 3
    assert "f00d" in out
    assert "shown up to there" in err


def test_the_root_to_be_trusted_can_be_brought_along(shoal: Shoal, home: Home, tmp_path: Path) -> None:
    other = Home.create(tmp_path / "other", "bank")
    assert shoal("audit", "verify", "--ca", str(home.ca_dir / "ca.pem"))[0] == 0
    code, out, _ = shoal("audit", "verify", "--ca", str(other.ca_dir / "ca.pem"))
    assert code == 3
    assert "certificates that are not accepted" in out


def test_a_directory_without_a_log_and_a_swarm_that_does_not_run_are_said(
    shoal: Shoal, home: Home, tmp_path: Path
) -> None:
    code, _, err = shoal("audit", "verify", "--swarm")
    assert code == 1
    assert "No member of the swarm can be asked" in err
    Home.create(tmp_path / "other", "bank")
    code, _, err = shoal("audit", "show", "--swarm-dir", str(tmp_path / "other"))
    assert code == 2
    assert "There is no audit log" in err
