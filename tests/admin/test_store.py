"""The admin's records: what is kept, for how long, and what a full disk does."""

from __future__ import annotations

import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from support.networks import identity

from shoal.admin.store import AdminStore
from shoal.errors import DiskFull, Full, ShoalError, UsageError
from shoal.wire.messages import MAX_REVOKED

DAY = 86_400.0


@pytest.fixture
def store(tmp_path: Path) -> AdminStore:
    return AdminStore(tmp_path / "admin.sqlite")


def node(number: int) -> str:
    return f"{number:032x}"


def test_an_invite_is_redeemed_once_in_time_for_its_role(store: AdminStore) -> None:
    store.invite(b"secret", "server", ("trusted",), now=100, lifetime_s=900)
    assert store.redeem(b"other", "server", now=101) is None
    assert store.redeem(b"secret", "gateway", now=101) is None
    assert store.redeem(b"secret", "server", now=1000) is None, "its time is up at the very second"
    granted = store.redeem(b"secret", "server", now=999.9)
    assert granted is not None
    assert (granted.role, granted.labels) == ("server", ("trusted",))
    assert store.redeem(b"secret", "server", now=999.9) is None


def test_two_processes_redeem_one_invite_once(tmp_path: Path) -> None:
    stores = [AdminStore(tmp_path / "admin.sqlite") for _ in range(4)]
    for round_ in range(20):
        secret = b"secret %d" % round_
        stores[0].invite(secret, "server", (), now=0, lifetime_s=900)
        got: list[object] = []
        threads = [
            threading.Thread(target=lambda s=each, x=secret, got=got: got.append(s.redeem(x, "server", now=1)))
            for each in stores
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(granted is not None for granted in got) == 1


def test_old_invites_are_forgotten(store: AdminStore) -> None:
    store.invite(b"old", "server", (), now=0, lifetime_s=900)
    store.invite(b"new", "server", (), now=2 * DAY, lifetime_s=900)
    assert len(store._write("SELECT * FROM invites", ())) == 1


def test_the_version_of_the_list_grows_with_every_change_also_when_the_clock_does_not(store: AdminStore) -> None:
    assert store.revocations() == (0, ())
    versions = []
    for number, now in enumerate([1000.0, 1000.0, 10.0]):
        assert store.revoke(node(number), reason="", not_after=now + DAY, now=now)
        versions.append(store.revocations()[0])
    assert versions == sorted(set(versions))
    assert versions[0] == 1_000_000
    assert not store.revoke(node(0), reason="", not_after=DAY, now=2000), "again: nothing changes"
    assert store.revocations()[0] == versions[-1]
    store.retell(now=3000)
    assert store.revocations()[0] == 3_000_000
    assert set(store.revocations()[1]) == {node(0), node(1), node(2)}


def test_a_list_begun_anew_after_a_loss_is_newer_than_the_lost_one(tmp_path: Path) -> None:
    first, second = AdminStore(tmp_path / "first"), AdminStore(tmp_path / "second")
    for number in range(10):
        first.revoke(node(number), reason="", not_after=DAY, now=1000)
    second.revoke(node(1), reason="", not_after=DAY, now=1001)
    assert second.revocations()[0] > first.revocations()[0]


def test_retelling_an_empty_list_says_nothing(store: AdminStore) -> None:
    store.retell(now=1000)
    assert store.revocations() == (0, ())


def test_an_entry_leaves_the_list_a_day_after_its_certificate_ended_and_a_full_list_says_so(store: AdminStore) -> None:
    store._write("BEGIN", ())
    for number in range(MAX_REVOKED):
        ends = 100.0 if number == 0 else 10 * DAY
        store._write("INSERT INTO revocations VALUES (?, 0, '', ?)", (node(number), ends))
    store._write("COMMIT", ())
    with pytest.raises(Full, match="is full"):
        store.revoke(node(5000), reason="", not_after=DAY, now=DAY)
    assert store.revoke(node(5000), reason="", not_after=10 * DAY, now=DAY + 200)
    listed = store.revocations()[1]
    assert len(listed) == MAX_REVOKED
    assert node(0) not in listed


def test_a_renewal_keeps_when_the_node_joined(store: AdminStore) -> None:
    peer = identity("server", labels=["a"]).peer
    store.certified(peer, 100.0, now=1.0)
    store.certified(peer, 200.0, now=2.0)
    (member,) = store.members()
    assert (member.node, member.labels, member.joined, member.not_after) == (peer.node, ("a",), 1.0, 200.0)


def test_a_full_disk_is_said_as_such_and_spends_no_invite(store: AdminStore) -> None:
    store.invite(b"secret", "server", (), now=0, lifetime_s=900)
    pages = store._write("PRAGMA page_count", ())[0][0]
    store._write(f"PRAGMA max_page_count = {pages}", ())

    def fill() -> None:
        for number in range(5000):
            store.certified(identity("server").peer, 1.0, now=float(number))

    with pytest.raises(DiskFull):
        fill()
    assert store.redeem(b"secret", "server", now=1) is not None


def test_a_file_that_is_not_ours_or_open_to_others_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be looked at as one " * 20)
    (tmp_path / "text").chmod(0o600)
    with pytest.raises(UsageError, match="no file of shoal's admin"):
        AdminStore(tmp_path / "text")
    AdminStore(tmp_path / "own").close()
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600
    (tmp_path / "own").chmod(0o640)
    with pytest.raises(UsageError, match="Others may read"):
        AdminStore(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with pytest.raises(UsageError, match="Cannot open"):
        AdminStore(tmp_path / "link")


def test_a_database_that_somebody_holds_is_an_error_and_no_hang(
    store: AdminStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._write("PRAGMA busy_timeout = 20", ())
    holder = sqlite3.connect(tmp_path / "admin.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ShoalError, match="locked"):
        store.invite(b"secret", "server", (), now=0, lifetime_s=900)
    holder.close()
