"""`shoal keys`: keys are made, listed and revoked beside a running gateway, and every change is in the audit log."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import main
from shoal.gateway.accounts import Accounts, Usage, day_of
from shoal.net.home import Home

Shoal = Callable[..., tuple[int, str, str]]


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
    """A swarm directory that commands find by themselves."""
    monkeypatch.setenv("SHOAL_SWARM_DIR", str(tmp_path / "swarm"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Home.create(tmp_path / "swarm", "bank")


def audited(home: Home) -> list[dict[str, Any]]:
    return [json.loads(line) for line in home.audit_log.read_text().splitlines()]


def test_a_key_is_shown_once_and_opens_its_account(shoal: Shoal, home: Home) -> None:
    code, out, err = shoal("keys", "create", "alice")
    assert code == 0
    key = out.strip()
    assert key.startswith("sk-shoal-")
    assert key not in err
    accounts = Accounts(home.accounts_db)
    account = accounts.check(key)
    accounts.close()
    assert account is not None
    assert account.name == "alice"
    assert stat.S_IMODE(home.accounts_db.stat().st_mode) == 0o600
    for told in (shoal("keys", "list")[1], shoal("keys", "list", "--json")[1], home.audit_log.read_text()):
        assert key not in told
        assert account.prefix in told


def test_limits_models_and_zones_are_kept_with_the_key(shoal: Shoal, home: Home) -> None:
    code, out, _ = shoal(
        *("keys", "create", "bob", "--model", "b", "--model", "a", "--zones", "first=2:trusted, last=1:trusted"),
        *("--requests-per-minute", "60", "--tokens-per-day", "1000000", "--json"),
    )
    made = json.loads(out)
    assert code == 0
    assert made["models"] == ["a", "b"]
    assert made["zones"] == "first=2:trusted,last=1:trusted"
    accounts = Accounts(home.accounts_db)
    account = accounts.check(made["key"])
    assert account is not None
    assert (account.requests_per_minute, account.tokens_per_day) == (60, 1_000_000)
    accounts.charge(account.id, day_of(0), Usage(1, 10, 5))
    accounts.close()
    (listed,) = json.loads(shoal("keys", "list", "--json")[1])["keys"]
    assert {**listed, "key": made["key"]} == {**made, "today": listed["today"], "total": listed["total"]}
    assert listed["total"] == {"requests": 1, "prompt_tokens": 10, "completion_tokens": 5, "tokens": 15}
    assert listed["today"]["tokens"] == 0
    shown = shoal("keys", "list")[1]
    assert "60 requests a minute; 1000000 tokens a day; models a, b; computed where first=2:trusted" in shown


@pytest.mark.parametrize("by", ["id", "prefix", "key"])
def test_a_revoked_key_is_worthless_at_once(shoal: Shoal, home: Home, by: str) -> None:
    shoal("keys", "create", "first")
    made = json.loads(shoal("keys", "create", "second", "--json")[1])
    gateway = Accounts(home.accounts_db)  # a running one
    assert gateway.check(made["key"])
    code, out, _ = shoal("keys", "revoke", str(made[by]))
    assert (code, made["prefix"] in out) == (0, True)
    assert gateway.check(made["key"]) is None
    gateway.close()
    assert [key["name"] for key in json.loads(shoal("keys", "list", "--json")[1])["keys"]] == ["first"]
    everything = json.loads(shoal("keys", "list", "--all", "--json")[1])["keys"]
    assert [bool(key["revoked"]) for key in everything] == [False, True]
    code, _, err = shoal("keys", "revoke", str(made[by]))
    assert code == 2
    assert "shoal keys list" in err


def test_every_change_is_in_the_audit_log(shoal: Shoal, home: Home) -> None:
    shoal("keys", "create", "alice", "--tokens-per-day", "5")
    shoal("keys", "revoke", "1")
    entries = [entry for entry in audited(home) if entry["kind"].startswith("key.")]
    assert [entry["kind"] for entry in entries] == ["key.create", "key.revoke"]
    assert entries[0]["data"]["tokens_per_day"] == 5
    assert all(entry["data"]["id"] == 1 for entry in entries)


def test_a_key_that_no_log_knows_does_not_exist(shoal: Shoal, home: Home) -> None:
    shoal("keys", "create", "alice")
    lines = home.audit_log.read_text()
    home.audit_log.write_text(lines[: len(lines) // 2])
    code, out, err = shoal("keys", "create", "mallory")
    assert code == 3
    assert "sk-shoal-" not in out
    assert "audit" in err
    home.audit_log.write_text(lines)
    assert [key["name"] for key in json.loads(shoal("keys", "list", "--json")[1])["keys"]] == ["alice"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("keys", "create", "x", "--zones", "first=trusted"), "policy"),
        (("keys", "create", "x", "--tokens-per-day", "0"), "limit"),
        (("keys", "create", ""), "name"),
        (("keys", "create"), "NAME"),
        (("keys", "revoke", "7"), "No keys"),
        (("keys", "revoke", "sk-shoal-"), "No keys"),
        (("keys", "rewoke", "7"), "revoke"),
    ],
)
def test_what_cannot_be_is_two_lines_and_exit_code_2(
    shoal: Shoal, home: Home, args: tuple[str, ...], says: str
) -> None:
    shoal("keys", "create", "someone")
    code, out, err = shoal(*args)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 2


def test_without_a_swarm_a_key_may_be_made_for_one_that_comes(
    shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_SWARM_DIR", str(tmp_path / "later"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert shoal("keys", "list")[0] == 2
    code, out, err = shoal("keys", "create", "alice")
    assert code == 0
    assert out.startswith("sk-shoal-")
    assert "No swarm is in" in err
    assert stat.S_IMODE((tmp_path / "later").stat().st_mode) == 0o700
    assert shoal("keys", "list")[0] == 0
