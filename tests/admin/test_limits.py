"""Attempts of one address: so many at once, then slowly more; others are not touched."""

from __future__ import annotations

import random

from shoal.admin.limits import MAX_ADDRESSES, Attempts


def test_a_burst_then_one_in_a_while() -> None:
    attempts = Attempts(burst=3, every_s=10.0)
    for _ in range(3):
        assert attempts.wait_s("10.0.0.1", 0.0) == 0
        attempts.charge("10.0.0.1", 0.0)
    assert attempts.wait_s("10.0.0.1", 0.0) == 10.0
    assert attempts.wait_s("10.0.0.1", 4.0) == 6.0
    assert attempts.wait_s("10.0.0.1", 10.0) == 0
    assert attempts.wait_s("10.0.0.2", 0.0) == 0


def test_no_attempts_are_saved_up_beyond_the_burst_and_a_clock_that_steps_back_gives_none() -> None:
    attempts = Attempts(burst=2, every_s=1.0)
    attempts.charge("a", 0.0)
    assert attempts.left("a", 1e9) == 2
    attempts.charge("a", 1e9)
    assert attempts.left("a", 0.0) == 1


def test_one_machine_cannot_take_many_ipv6_addresses_of_its_network() -> None:
    attempts = Attempts(burst=5, every_s=60.0)
    for host in range(5):
        attempts.charge(f"2001:db8::{host:x}", 0.0)
    assert attempts.wait_s("2001:db8::ffff", 0.0) > 0
    assert attempts.wait_s("2001:db8:0:1::1", 0.0) == 0
    attempts.charge("::ffff:10.0.0.1", 0.0)
    assert attempts.left("10.0.0.1", 0.0) == 4
    attempts.charge("fe80::1%eth0", 0.0)
    assert attempts.left("fe80::2%eth1", 0.0) == 4


def test_memory_is_bounded_however_many_addresses_come() -> None:
    attempts, rng = Attempts(burst=1, every_s=60.0), random.Random(0)
    for now in range(3 * MAX_ADDRESSES):
        attempts.charge(".".join(str(rng.randrange(256)) for _ in range(4)), float(now))
    assert len(attempts._left) <= MAX_ADDRESSES
