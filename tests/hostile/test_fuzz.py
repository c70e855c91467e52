"""The fuzzer finds what it is there to find, and nothing in shoal: the part of `make fuzz` that every run repeats."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import msgspec
import pytest
from support.sources import REPOSITORY

from shoal.errors import UsageError
from shoal.hostile import http
from shoal.hostile.fuzz import Run, fuzz, kept, seeds_of
from shoal.hostile.structures import Maker, damaged
from shoal.hostile.targets import Target
from shoal.hostile.worker import GROWTH_BYTES, Attack, all_targets, target_of
from shoal.wire import codec

CORPUS = REPOSITORY / "tests" / "fuzz"
TARGETS = {target.name: target for target in all_targets()}


def planted(run: object, *, name: str = "planted") -> Target:
    return Target(name, 100, lambda seed: seed.to_bytes(8, "little"), run)  # type: ignore[arg-type]


def test_no_kept_input_does_harm_again() -> None:
    attack = Attack(list(TARGETS.values()))
    files = list(kept(CORPUS))
    assert {target for target, _ in files} == set(TARGETS), "each target has inputs of its own"
    harm = [found for target, file in files for found in attack.run(TARGETS[target], file.read_bytes())[0]]
    assert not harm, harm[:3]


def test_six_thousand_new_inputs_do_no_harm_and_reach_many_outcomes() -> None:
    attack = Attack(list(TARGETS.values()))
    harm = [found for seed in range(6_000) for found in attack.once(seed)[0]]
    assert not harm, harm[:3]
    reached = {target: sum(1 for name, _ in attack.outcomes if name == target) for target in TARGETS}
    # Inputs that are all refused at the door, or all let through, test nothing.
    assert all(count >= 3 for count in reached.values()), reached
    assert reached["frames"] > 100


def test_a_seed_always_makes_the_same_input_for_the_same_target() -> None:
    for seed in range(300):
        target = target_of(seed, list(TARGETS.values()))
        assert target.make(seed) == target.make(seed)
    assert sum(target.share for target in TARGETS.values()) == 100


@pytest.mark.parametrize("kind", sorted(codec.KINDS))
def test_every_kind_of_message_is_made_from_its_type_and_mostly_valid(kind: int) -> None:
    rng = random.Random(kind)
    valid = 0
    for _ in range(50):
        meta = msgspec.msgpack.encode(Maker(rng, wild=0.0).make(codec.KINDS[kind]))
        try:
            msgspec.msgpack.decode(meta, type=codec.KINDS[kind])
        except msgspec.ValidationError:
            continue
        valid += 1
    assert valid >= 40


def test_every_path_of_the_gateway_that_takes_a_body_is_fuzzed(tmp_path: Path) -> None:
    app, accounts = http.application(tmp_path)
    accounts.close()
    assert set(http.posts(app)) == set(http.BODIES)


def test_damage_changes_most_inputs_and_survives_empty_ones() -> None:
    rng = random.Random(3)
    changed = sum(damaged(rng, b"0123456789") != b"0123456789" for _ in range(200))
    assert changed > 180
    assert isinstance(damaged(rng, b""), bytes)


def test_an_input_that_raises_is_a_crash() -> None:
    def run(data: bytes) -> str:
        raise KeyError("planted")

    (found,), _ = Attack([planted(run)]).once(7)
    assert (found.kind, found.seed, found.data) == ("crash", 7, (7).to_bytes(8, "little"))
    assert "KeyError: 'planted'" in found.why


def test_an_input_that_is_slow_each_time_is_found_and_one_slow_moment_is_not() -> None:
    times = iter([0.0, 3.0, 3.0, 6.0, 6.0, 9.0, 10.0, 13.0, 13.0, 13.1, 13.1, 13.2])
    attack = Attack([planted(lambda data: "fine")], clock=lambda: next(times))
    (found,), _ = attack.once(0)
    assert (found.kind, found.why) == ("slow", "3.0 s")
    assert attack.once(1)[0] == []


def test_memory_that_grows_is_found_again_only_when_it_grows_as_much_again() -> None:
    held = iter([10, 10, 10 + GROWTH_BYTES + 1, 10 + GROWTH_BYTES + 5])
    attack = Attack([planted(lambda data: "fine")], resident=lambda: next(held), warm_up=100)
    kinds = [[found.kind for found in attack.once(seed)[0]] for seed in range(800)]
    assert [number for number, found in enumerate(kinds) if found] == [599]
    assert kinds[599] == ["growth"]


def test_a_process_that_dies_is_a_finding_with_its_seed_and_the_run_goes_on(tmp_path: Path) -> None:
    run = fuzz(5, 8, corpus=tmp_path, python=("sh", "-c", "kill -9 $$"))
    assert [(found.kind, found.seed) for found in run.findings] == [("died", 5), ("died", 6), ("died", 7)]
    assert len(list(kept(tmp_path))) == 3


def test_a_process_that_says_nothing_is_killed_and_found(tmp_path: Path) -> None:
    run = fuzz(0, 1, corpus=tmp_path, python=("sh", "-c", "exec sleep 60"), hung_s=0.05)
    assert [(found.kind, found.seed) for found in run.findings] == [("hung", 0)]


def test_a_range_runs_to_its_end_in_a_process_of_its_own_and_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[int] = []
    run = fuzz(100, 300, corpus=tmp_path, grow=True, on_progress=lambda run: told.append(run.done))
    assert isinstance(run, Run)
    assert (run.executions, run.findings) == (200, [])
    assert told[-1] == 300
    assert run.outcomes >= len(list(kept(tmp_path))) > 20


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "9:5", "-1:5", "a:b"])
def test_what_is_no_range_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no range"):
        seeds_of(text)


def test_a_range_of_seeds_is_read() -> None:
    assert seeds_of("400000:1000000") == (400_000, 1_000_000)


def test_the_worker_names_an_error_of_its_own() -> None:
    with pytest.raises(Exception, match="cannot start"):
        fuzz(0, 10, python=(sys.executable, "-c", "raise ValueError('broken')"))
