"""The writer's thread: entries that wait together cost one write, and a log that fails tells everyone who waits."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from support.auditlog import log_of, verdict

from shoal.hostile.edits import files_of, put_files
from shoal.manifest.chain import AuditBroken, Head
from shoal.manifest.writer import AuditWriter


def test_entries_of_many_threads_are_all_there_when_their_futures_are_done(tmp_path: Path) -> None:
    heads: list[Head] = []
    writer = AuditWriter(log_of(tmp_path), on_head=heads.append)

    def work(number: int) -> None:
        for i in range(10):
            writer.submit("request", thread=number, i=i).result(20)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    found = verdict(tmp_path)
    assert found.whole, found.bad
    assert found.entries == 81
    assert found.head == heads[-1]
    assert len(heads) < 81  # some shared a write


def test_what_waits_is_written_before_the_writer_ends(tmp_path: Path) -> None:
    writer = AuditWriter(log_of(tmp_path))
    futures = [writer.submit("request", i=i) for i in range(600)]
    writer.close()
    assert all(future.done() for future in futures)
    assert verdict(tmp_path).entries == 601


def test_a_log_that_was_changed_fails_every_entry_that_waits(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.append("a")
    older = files_of(tmp_path)
    log.append("b")
    put_files(tmp_path, older)
    writer = AuditWriter(log)
    for _ in range(2):
        with pytest.raises(AuditBroken):
            writer.submit("c").result(20)
    writer.close()


def test_an_entry_is_what_it_was_when_it_was_submitted(tmp_path: Path) -> None:
    writer = AuditWriter(log_of(tmp_path))
    hosts: list[list[str]] = []
    for i in range(300):
        writer.submit("request", i=i, hosts=hosts)
        hosts.append(["node", f"{i}:{i + 1}"])  # while the writer may be between signing and writing it
    writer.close()
    assert verdict(tmp_path).whole, verdict(tmp_path).bad
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_bytes().splitlines()]
    assert [len(line["data"]["hosts"]) for line in lines if line["kind"] == "request"] == list(range(300))
