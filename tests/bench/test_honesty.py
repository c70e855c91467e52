"""The figures about honesty: liars of every kind are told from honest servers by what real engines compute."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from shoal.bench import honesty as bench
from shoal.bench.cheats import ANSWERS, WEIGHTS
from shoal.swarm.honesty import Comparison

SETTINGS = {str(setting): setting for setting in bench.SETTINGS}


@pytest.fixture(scope="module")
def measured() -> Iterator[bench.Measured]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench.measure(models=1, prompts=1)
    torch.set_num_threads(threads)


def test_every_kind_of_liar_is_found_in_every_setting_and_no_honest_server(measured: bench.Measured) -> None:
    for (kind, setting), seen in measured.items():
        assert seen.caught == (0.0 if kind == bench.HONEST else 1.0), f"{kind} in {setting}: {seen.checks}"
    assert {kind for kind, _ in measured} == {bench.HONEST, *ANSWERS, *WEIGHTS}


@pytest.mark.parametrize("setting", SETTINGS)
def test_honest_rows_stay_far_within_the_tolerance(measured: bench.Measured, setting: str) -> None:
    assert max(measured[bench.HONEST, SETTINGS[setting]].used) < 0.75


def test_of_a_thousand_liars_ninety_nine_in_a_hundred_are_found_within_500_calls(measured: bench.Measured) -> None:
    figures = {figure.name.split(",")[0]: figure for figure in bench.figures(measured, honest_checks=20_000)}
    assert figures["lying servers in quarantine within 500 of their calls"].value >= 0.99
    assert all(figure.ok for figure in figures.values()), [str(figure) for figure in figures.values() if not figure.ok]


def test_a_server_that_lies_in_a_tenth_of_its_calls_lasts_ten_times_as_long() -> None:
    wrong = bench.Seen([Comparison(100, 100, 9.0)])
    rng = random.Random(3)
    always = sorted(bench.liar(wrong, rng, calls=5000).calls or 5000 for _ in range(300))
    seldom = sorted(bench.liar(wrong, rng, calls=5000, share=0.1).calls or 5000 for _ in range(300))
    assert 60 < always[150] < 110
    assert 7 < seldom[150] / always[150] < 13
