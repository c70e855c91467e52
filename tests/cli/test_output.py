"""Answers on stdout, everything else on stderr; progress that a log file can bear."""

from __future__ import annotations

import io
import json
import sys

import pytest

from shoal.cli import output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_is_one_line_on_stdout_and_keeps_every_script_readable(capsys: pytest.CaptureFixture[str]) -> None:
    output.answer_json({"model": "Ünïcode", "servers": [1, 2]})

    told = capsys.readouterr()
    assert told.out == '{"model": "Ünïcode", "servers": [1, 2]}\n'
    assert told.err == ""


def test_json_without_a_meaning_in_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        output.answer_json({"value": float("nan")})


def test_notes_leave_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    output.note("starting 3 servers")

    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "starting 3 servers\n"


def test_errors_are_coloured_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert "\x1b[" in output.paint("error:", "red")

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert output.paint("error:", "red") == "error:"


def test_no_color_wins_over_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())

    assert output.paint("error:", "red") == "error:"


def test_away_from_a_terminal_progress_is_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0

    with output.progress("copying", total=40, unit="files", clock=lambda: now) as advance:
        for _ in range(40):
            now += 1.0
            advance(1)

    assert capsys.readouterr().err.splitlines() == [
        "copying: 10 of 40 files",
        "copying: 20 of 40 files",
        "copying: 30 of 40 files",
        "copying: 40 of 40 files",
    ]


def test_progress_without_a_known_end_shows_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("reading", unit="GiB", clock=lambda: 0.0) as advance:
        advance(1.5)

    assert capsys.readouterr().err == "reading: 1.5 GiB\n"


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    with output.progress("copying", total=2) as advance:
        advance(2)

    assert "copying" in terminal.getvalue()


def test_an_error_in_json_leaves_out_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    output.error("No room.", code="full", as_json=True)

    assert json.loads(capsys.readouterr().out) == {"error": {"code": "full", "message": "No room.", "hint": ""}}
