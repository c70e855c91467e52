"""What a check of servers leaves behind in the audit log and in the metrics."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from prometheus_client import generate_latest

from shoal.client.checks import Found
from shoal.errors import ShoalError
from shoal.gateway.audit import Audit, note_check
from shoal.gateway.metrics import Metrics
from shoal.spec.ids import BlockRange
from shoal.swarm.honesty import Comparison, Finding


class Writer:
    """An AuditWriter whose disk is a list, or full."""

    def __init__(self, *, full: bool = False) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self._full = full

    def submit(self, kind: str, **data: Any) -> Future[Any]:
        if self._full:
            raise ShoalError("full")
        self.entries.append((kind, data))
        done: Future[Any] = Future()
        done.set_result(None)
        return done


def found(finding: Finding, *quarantined: str) -> Found:
    return Found("request1", finding, BlockRange(0, 4), Comparison(100, 90, 12.0), 100, quarantined)


def test_a_server_that_was_caught_is_in_the_audit_log_with_the_request_and_so_is_its_quarantine() -> None:
    writer = Writer()
    note_check(Audit(writer), "demo", found(Finding("caught", "x", "x", (), "a and b agree against it"), "x"))  # type: ignore[arg-type]
    (check, about), (quarantine, who) = writer.entries
    assert (check, quarantine) == ("check", "quarantine")
    assert about["guilty"] == "x"
    assert (about["request"], about["rows"], about["wrong_rows"]) == ("request1", 100, 90)
    assert (who["node"], who["reason"]) == ("x", "a and b agree against it")


def test_agreement_is_not_worth_an_entry_and_a_full_disk_ends_no_checks() -> None:
    writer = Writer()
    note_check(Audit(writer), "demo", found(Finding("agreed", "x")))  # type: ignore[arg-type]
    assert writer.entries == []
    note_check(Audit(Writer(full=True)), "demo", found(Finding("disputed", "x")))  # type: ignore[arg-type]


def test_checks_are_counted_by_result() -> None:
    metrics = Metrics()
    metrics.spotcheck("agreed")
    metrics.spotcheck("busy")
    text = generate_latest(metrics.registry).decode()
    assert 'shoal_spotchecks_total{result="agreed"} 1.0' in text
    assert 'shoal_spotchecks_total{result="busy"} 1.0' in text
