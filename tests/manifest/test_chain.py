"""The audit log: what it keeps, what a crash leaves, and that no change to it goes unnoticed."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytest
from support.auditlog import log_of, verdict
from support.networks import identity, issuer

from shoal.admin.own import reissued
from shoal.errors import Refused, UsageError
from shoal.hostile.edits import EDITS, check_edits, files_of, put_files
from shoal.manifest.chain import AuditBroken, Entry, verify
from shoal.net.identity import issue_node


def test_entries_come_back_as_they_were_written(tmp_path: Path) -> None:
    now_ms = int(time.time()) * 1000 + 500
    log = log_of(tmp_path, clock=lambda: now_ms / 1000)
    log.append("request", request="r1", hosts=[["n1", "0:4"]])
    head = log.append_all([("a", {}), ("b", {"x": None})])
    entries: list[Entry] = []
    found = verdict(tmp_path, on_entry=entries.append)
    assert found.whole, found.bad
    assert found.head == head == log.head
    assert [entry.kind for entry in entries] == ["log.signer", "request", "a", "b"]
    assert entries[1].data == {"request": "r1", "hosts": [["n1", "0:4"]]}
    assert (entries[1].seq, entries[1].at) == (1, now_ms)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_several_writers_of_one_home_make_one_chain(tmp_path: Path) -> None:
    gateway, admin = log_of(tmp_path, identity("gateway")), log_of(tmp_path, identity("admin"))
    for number in range(3):
        gateway.append("request", n=number)
        admin.append("key.create", n=number)
    again = log_of(tmp_path, identity("gateway"))
    again.append("request", n=3)
    found = verdict(tmp_path)
    assert found.whole, found.bad
    assert found.entries == 7 + 3  # and the certificates of three writers, each once


def test_a_writer_repairs_what_another_one_left_when_it_was_killed(tmp_path: Path) -> None:
    ours, other = log_of(tmp_path), log_of(tmp_path, identity("admin"))
    ours.append("a")
    before = files_of(tmp_path)
    other.append_all([("b", {}), ("c", {})])
    after = files_of(tmp_path)
    new = after["audit.jsonl"][len(before["audit.jsonl"]) :]
    with (tmp_path / "audit.jsonl").open("r+b") as file:  # the same file: cut off in the middle of the write
        file.truncate(len(before["audit.jsonl"]) + new.index(b"\n") + 20)
    (tmp_path / "audit.head").write_bytes(before["audit.head"])
    ours.append("d")
    found = verdict(tmp_path)
    assert found.whole, found.bad
    assert "unfinished entries" in found.notes[0]


def test_a_log_goes_on_in_a_new_part_and_stays_one_chain(tmp_path: Path) -> None:
    log = log_of(tmp_path, part_bytes=3000)
    for number in range(30):
        log.append("request", n=number)
    assert len(list(tmp_path.glob("audit-*.jsonl"))) >= 2
    other = log_of(tmp_path, identity("admin"), part_bytes=3000)
    other.append("join", node="x")
    log.append("request", n=30)
    found = verdict(tmp_path)
    assert found.whole, found.bad
    for part in sorted(tmp_path.glob("audit-*.jsonl")):
        data = part.read_bytes()
        part.unlink()
        assert not verdict(tmp_path).whole, f"{part.name} is missing"
        part.touch(mode=0o600)
        part.write_bytes(data)


def test_a_writer_that_outlives_its_certificate_shows_the_renewed_one(tmp_path: Path) -> None:
    node = issue_node(issuer("demo"), "gateway", lifetime=datetime.timedelta(hours=1))
    renewed = reissued(issuer("demo"), node, lifetime=datetime.timedelta(days=1))
    now, seconds = [node], [time.time()]
    log = log_of(tmp_path, node, part_bytes=3000, clock=lambda: seconds[0], renewed=lambda: now[0].chain_der)
    log.append("request", n=-1)
    now[0] = renewed
    seconds[0] += 2 * 3600
    for number in range(30):
        log.append("request", n=number)
    assert list(tmp_path.glob("audit-*.jsonl"))
    found = verdict(tmp_path)
    assert found.whole, found.bad


def test_a_part_that_was_closed_and_not_yet_followed_is_no_break(tmp_path: Path) -> None:
    log = log_of(tmp_path, part_bytes=10)
    log.append("a")
    (tmp_path / "audit.jsonl").rename(tmp_path / "audit-000000000000.jsonl")  # as a crash between the two steps
    assert verdict(tmp_path).whole
    log_of(tmp_path).append("b")
    found = verdict(tmp_path)
    assert found.whole, found.bad
    assert found.parts == 2


def test_what_a_crash_cut_off_is_repaired_and_said(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.append("a")
    whole = files_of(tmp_path)
    log.append_all([("b", {}), ("c", {})])
    longer = files_of(tmp_path)
    new = longer["audit.jsonl"][len(whole["audit.jsonl"]) :]
    for cut in {*range(1, len(new), 9), new.index(b"\n"), new.index(b"\n") + 1}:
        put_files(tmp_path, {**whole, "audit.jsonl": whole["audit.jsonl"] + new[:cut]})
        log_of(tmp_path).append("d")
        found = verdict(tmp_path)
        assert found.whole, f"{cut}: {found.bad}"
        assert len(found.notes) == 1
    # The log was written, and its head was not.
    put_files(tmp_path, {**whole, "audit.jsonl": longer["audit.jsonl"]})
    assert not verdict(tmp_path).whole
    log_of(tmp_path).append("d")
    found = verdict(tmp_path)
    assert found.whole
    assert "head that was behind" in found.notes[0]


def test_a_cut_first_entry_is_begun_anew(tmp_path: Path) -> None:
    log_of(tmp_path).append("a")
    first = files_of(tmp_path)["audit.jsonl"]
    for cut in (1, first.index(b"\n"), first.index(b"\n") + 1, len(first) - 1):
        put_files(tmp_path, {"audit.jsonl": first[:cut]})
        log_of(tmp_path).append("a")
        assert verdict(tmp_path).whole


def test_a_log_that_was_changed_is_not_written_to_any_more(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.append("a")
    older = files_of(tmp_path)
    log.append("b")
    newer = files_of(tmp_path)
    put_files(tmp_path, older)
    with pytest.raises(AuditBroken, match="shorter"):
        log.append("c")
    (tmp_path / "audit.jsonl").rename(tmp_path / "away")
    put_files(tmp_path, older)
    with pytest.raises(AuditBroken, match=r"not what this process wrote|shorter"):  # inodes may be used again
        log.append("c")
    put_files(tmp_path, {"audit.head": newer["audit.head"], "audit.jsonl": older["audit.jsonl"]})
    with pytest.raises(AuditBroken, match=r"audit.head is at entry 2, the log ends at 1"):
        log_of(tmp_path)
    put_files(tmp_path, {"audit.head": newer["audit.head"]})
    with pytest.raises(AuditBroken, match="empty"):
        log_of(tmp_path)


def test_the_first_bad_entry_is_named(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for number in range(6):
        log.append("request", n=number)
    lines = files_of(tmp_path)["audit.jsonl"].split(b"\n")
    lines[4] = lines[4].replace(b'"n":3', b'"n":4')
    put_files(tmp_path, {**files_of(tmp_path), "audit.jsonl": b"\n".join(lines)})
    found = verdict(tmp_path)
    assert (found.bad_seq, found.entries) == (4, 4)
    assert "entry 4 (line 5 of audit.jsonl)" in found.bad


def test_a_rolled_back_log_is_whole_but_lacks_what_others_remember(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    first = log.append("a")
    older = files_of(tmp_path)
    last = log.append("b")
    put_files(tmp_path, older)
    found = verdict(tmp_path, hashes_of=(first.seq, last.seq))
    assert found.whole
    assert found.hashes == {first.seq: first.hash}


def test_certificates_of_strangers_and_of_other_nodes_are_not_taken(tmp_path: Path) -> None:
    stranger = identity("gateway", "other")
    log_of(tmp_path, stranger).append("a")
    assert "certificates that are not accepted" in verdict(tmp_path).bad

    def anyone(chain: object, at: float, node: str) -> object:
        raise Refused("never")

    assert "never" in verify(tmp_path, anyone).bad  # type: ignore[arg-type]


def test_a_file_others_may_read_and_a_missing_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no audit log"):
        verdict(tmp_path)
    log_of(tmp_path).append("a")
    (tmp_path / "audit.jsonl").chmod(0o644)
    with pytest.raises(UsageError, match="Others may read"):
        log_of(tmp_path)


def test_an_entry_that_is_too_large_or_not_plain_is_refused_and_leaves_the_log_whole(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.append("a")
    with pytest.raises(ValueError, match="bytes"):
        log.append("b", text="x" * 300_000)
    with pytest.raises(ValueError, match="canonical"):
        log.append("b", share=0.5)  # type: ignore[arg-type]
    log.append("c")
    assert verdict(tmp_path).whole


# -- random edits ------------------------------------------------------------------------------------------------------


def test_every_one_of_five_hundred_random_edits_is_found(tmp_path: Path) -> None:
    found = check_edits(tmp_path, 500)
    assert found.unnoticed == []
    assert len(found.made) == len(EDITS)


@pytest.mark.slow
def test_every_one_of_ten_thousand_random_edits_is_found(tmp_path: Path) -> None:
    found = check_edits(tmp_path, 10_000)
    assert found.unnoticed == []
    assert min(found.made.values()) > 500
