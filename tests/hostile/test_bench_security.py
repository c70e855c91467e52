"""`shoal bench security` measures every attack, and says when one succeeds."""

from __future__ import annotations

import asyncio
import json

import pytest

from shoal.bench import security
from shoal.cli import bench_security, main
from shoal.hostile import removal, routes


def test_the_command_and_the_benchmark_know_the_same_parts() -> None:
    assert tuple(security.PARTS) == bench_security.PARTS


def test_its_figures_have_the_form_of_the_other_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bench", "security", "--part", "fuzz", "--inputs", "400", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert {"name", "value", "unit", "peer", "reach", "ok"} == set(figures[0])
    assert figures[0]["value"] == 400


def test_an_attack_that_succeeds_is_told_with_exit_code_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = routes.Credential("no key", {}, routes.HERE, frozenset())
    monkeypatch.setattr(security, "attempts", lambda: ([routes.Attempt("GET", "/secret", nobody, 200)], []))
    assert main.run(["bench", "security", "--part", "routes"]) == 3
    assert "MISSED" in capsys.readouterr().out


def test_a_removed_member_is_cut_off_by_everybody_within_five_seconds() -> None:
    assert asyncio.run(removal.removal_s()) < 5.0
