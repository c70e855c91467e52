"""API keys: shown once, kept as hashes, readable by their owner only."""

from __future__ import annotations

import hmac
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.errors import ShoalError, UsageError
from shoal.gateway.accounts import Accounts


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(tmp_path / "keys.sqlite")


def test_a_key_opens_its_own_account_and_no_other(accounts: Accounts) -> None:
    first, alice = accounts.create("alice")
    second, bob = accounts.create("bob", models=["m"])
    assert (accounts.check(first), accounts.check(second)) == (alice, bob)
    assert re.fullmatch(r"sk-shoal-[0-9a-f]{64}", first)
    assert first != second


@pytest.mark.parametrize("wrong", ["", "sk-shoal-", "sk-shoal-" + "0" * 64, "x" * 100_000, "\udcff", "ключ"])
def test_a_wrong_key_opens_nothing(accounts: Accounts, wrong: str) -> None:
    key, _ = accounts.create("alice")
    assert accounts.check(wrong) is None
    assert accounts.check(key[:-1]) is None
    assert accounts.check(key[:-1] + ("0" if key[-1] != "0" else "1")) is None


def test_the_file_holds_no_key_and_is_private(accounts: Accounts, tmp_path: Path) -> None:
    key, account = accounts.create("alice")
    assert key.startswith(account.prefix)
    secret = key.removeprefix(account.prefix).encode()
    files = list(tmp_path.iterdir())
    assert len(files) == 3  # SQLite's write-ahead log and its index lie beside the file
    for file in files:
        assert secret not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_secrets_are_compared_in_constant_time(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = accounts.create("alice")
    compared = []

    def compare_digest(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return ours == theirs

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    assert accounts.check(key)
    ((ours, theirs),) = compared
    assert len(ours) == len(theirs) == 32


def test_a_revoked_key_is_refused_at_once_also_by_another_process(accounts: Accounts, tmp_path: Path) -> None:
    key, account = accounts.create("alice")
    elsewhere = Accounts(tmp_path / "keys.sqlite")
    assert elsewhere.check(key) == account
    accounts.revoke(account.id)
    assert elsewhere.check(key) is None
    assert elsewhere.records() == []
    with pytest.raises(UsageError, match="no key"):
        accounts.revoke(account.id)


def test_a_revoked_key_is_refused_however_often_the_file_is_opened_and_closed_beside_the_gateway(
    accounts: Accounts, tmp_path: Path
) -> None:
    # As `shoal up` does it in its gateway's own process, and then the commands in theirs.
    path = tmp_path / "keys.sqlite"
    key, account = accounts.create("alice")
    Accounts(path).close()
    assert accounts.check(key) == account
    for command in ("records()", "create('bob')", f"revoke({account.id})"):
        program = (
            f"from pathlib import Path; from shoal.gateway.accounts import Accounts as A; a = A(Path({str(path)!r}))"
        )
        subprocess.run([sys.executable, "-c", f"{program}; a.{command}; a.close()"], check=True)
        assert (tmp_path / "keys.sqlite-wal").exists(), "the log that this process reads was taken away"
    assert accounts.check(key) is None
    assert [record.name for record in accounts.records()] == ["bob"]


def test_models_may_be_limited(accounts: Accounts) -> None:
    _, everything = accounts.create("alice")
    _, one = accounts.create("bob", models=["a"])
    _, nothing = accounts.create("carol", models=[])
    assert [account.may_use("a") for account in (everything, one, nothing)] == [True, True, False]
    assert [account.may_use("b") for account in (everything, one, nothing)] == [True, False, False]
    assert [account.name for account in accounts.records()] == ["alice", "bob", "carol"]


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    Accounts(path).close()
    path.chmod(0o640)
    with pytest.raises(UsageError, match="Others may read") as caught:
        Accounts(path)
    assert "chmod 600" in caught.value.hint


def test_a_file_that_is_no_key_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 100)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="not a key file"):
        Accounts(path)
    assert path.read_text().startswith("not a database")
    with pytest.raises(UsageError, match="Cannot open"):
        Accounts(tmp_path / "nowhere" / "keys.sqlite")


def test_a_key_file_that_cannot_grow_says_so_and_keeps_its_keys(accounts: Accounts, tmp_path: Path) -> None:
    key, account = accounts.create("alice")
    # SQLite reports this bound as it reports a full disk.
    accounts._db.execute("PRAGMA max_page_count = 1")

    def fill() -> None:
        for place in range(200):
            accounts.create(f"another {place}", models=["m" * 100])

    with pytest.raises(ShoalError, match="cannot be written") as caught:
        fill()
    assert "room" in caught.value.hint
    assert Accounts(tmp_path / "keys.sqlite").check(key) == account


def test_a_link_to_somebody_elses_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(UsageError, match="Cannot open"):
        Accounts(tmp_path / "link")
    assert not (tmp_path / "target").exists()
