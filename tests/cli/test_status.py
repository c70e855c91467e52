"""`shoal status` of a gateway with one model, and of one with several."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.cli import main
from shoal.cli.api import Api


def page(model: str, *, covered: bool = True) -> dict[str, Any]:
    """What the gateway says of a model on one server."""
    server = {
        "id": "ab" * 32,
        "state": "online",
        "blocks": "0:4",
        "decode_ms_per_block": 0.5,
        "sessions": 1,
        "queue_rows": 0,
        "cache_tokens_free": 10,
        "cache_tokens_total": 20,
        "wire_error": 0.0,
        "honesty": {"level": "clear"},
        "dtype": "float32",
        "memory_bytes": 1 << 30,
    }
    driver = {"running": 1, "sessions": 2, "tokens": 3, "failovers": {}, "last_stall_ms": 0.0, "wire_error": 0.0}
    return {
        "model": model,
        "blocks": 4 if covered else 6,
        "covered": covered,
        "missing": [] if covered else ["4:6"],
        "servers": [server],
        "driver": {**driver, "wire": "f32"},
        "audit_rolled_back": [],
        "explain": [f"why {model} lies there"],
    }


def ask(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], *args: str) -> tuple[int, list[dict[str, str]]]:
    asked: list[dict[str, str]] = []

    def get(self: Api, path: str, query: dict[str, str] | None = None) -> Any:
        asked.append(query or {})
        return answer

    monkeypatch.setattr(Api, "get", get)
    return main.run(["status", "--api", "http://127.0.0.1:1/v1", "--key", "k", *args]), asked


def test_one_model_is_shown_with_its_servers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, asked = ask(monkeypatch, page("alpha"), "--explain")
    told = capsys.readouterr().out
    assert (code, asked) == (0, [{}])
    assert "alpha: 4 blocks, every block is covered" in told
    assert "why alpha lies there" in told


def test_several_models_are_shown_one_after_the_other_and_one_that_lacks_blocks_is_a_no(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [page("alpha"), page("beta", covered=False)]
    answer = {**pages[0], "covered": False, "models": pages}
    code, _ = ask(monkeypatch, answer)
    told = capsys.readouterr().out
    assert code == 3
    assert told.index("alpha: 4 blocks, every block") < told.index("beta: 6 blocks, blocks 4:6 are missing")
    code, _ = ask(monkeypatch, answer, "--json")
    assert (code, json.loads(capsys.readouterr().out)) == (3, answer)
    code, asked = ask(monkeypatch, pages[1], "--model", "beta")
    assert (code, asked) == (3, [{"model": "beta"}])
