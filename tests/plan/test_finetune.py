"""`shoal plan finetune`: fits or not, and hints that hold when they are followed."""

from __future__ import annotations

import json
import re

import pytest

from shoal.cli.main import run
from shoal.plan import finetune
from shoal.spec import catalog
from shoal.spec.fleet import Fleet


def ask(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, object]]:
    code = run(["plan", "finetune", *options, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_small_adapter_fits_on_a_large_card(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = ask(
        capsys,
        "--model",
        "llama-2-7b",
        "--method",
        "qlora",
        "--seq",
        "512",
        "--have",
        "1x A100-80GB",
        "--engine",
        "litgpt",
    )

    assert code == 0
    assert found["fits"] is True
    assert found["hints"] == []


def test_tuning_a_large_model_in_full_on_one_card_does_not_fit_and_says_what_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, found = ask(capsys, "--model", "llama-2-70b", "--method", "full", "--seq", "4096", "--have", "1x A100-80GB")

    assert code == 3
    assert found["verdict"] == "does not fit"
    assert any("A100-SXM-80GB" in hint for hint in found["hints"])  # type: ignore[attr-defined]


def test_a_shorter_sequence_that_is_hinted_at_fits(capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--model", "llama-3-8b", "--method", "lora", "--have", "1x A100-40GB")
    code, found = ask(capsys, *job, "--seq", "8192")
    assert code == 3
    shorter = [re.match(r"sequences of (\d+)", hint) for hint in found["hints"]]  # type: ignore[attr-defined]
    (length,) = [match[1] for match in shorter if match]

    assert ask(capsys, *job, "--seq", length)[0] == 0


def test_another_method_that_is_hinted_at_fits(capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--model", "mistral-7b", "--seq", "256", "--have", "1x RTX-4090")
    code, found = ask(capsys, *job, "--method", "full")
    methods = [re.match(r"method ([\w-]+) instead", hint) for hint in found["hints"]]  # type: ignore[attr-defined]

    assert code == 3
    for match in filter(None, methods):
        assert ask(capsys, *job, "--method", match[1])[0] == 0
    assert any(methods)


def test_more_cards_never_turn_a_yes_into_a_no() -> None:
    spec = catalog.model("llama-2-13b").spec
    verdicts = []
    for count in (1, 2, 4, 8, 16, 32):
        work = finetune.job(spec, "full", 1024, recompute=True, engine="default")
        verdicts.append(finetune.decide(work, Fleet.parse(f"{count}x A100-80GB")).best.verdict == "fits")

    assert verdicts == sorted(verdicts)
    assert verdicts[-1]


def test_the_terminal_shows_the_largest_terms_first(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "finetune", "--model", "phi-2", "--method", "full", "--seq", "1024", "--have", "2x RTX-4090"])

    sizes = [float(each) for each in re.findall(r"(\d+\.\d+) GiB  #", capsys.readouterr().out)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) >= 4


@pytest.mark.parametrize(
    "change", [("--have", "3x ABACUS"), ("--model", "nobody"), ("--seq", "0"), ("--method", "prayer"), ("--rank", "-1")]
)
def test_what_cannot_be_asked_is_a_usage_error(change: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--model": "phi-2", "--seq": "128", "--have": "1x RTX-4090", **dict([change])}

    assert run(["plan", "finetune", *[word for pair in options.items() for word in pair]]) == 2
