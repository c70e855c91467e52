"""A thousand connections that say next to nothing leave the waits of everybody else within 1.5 times what they were."""

from __future__ import annotations

import asyncio

import pytest

from shoal.errors import ShoalError
from shoal.hostile import slow

pytestmark = pytest.mark.long

BAR = 5.0
"""Starved users wait for seconds, hundreds of times as long. That it is below 1.5, a loaded machine cannot say:
`shoal bench security --part slow` measures it."""


def test_a_thousand_slow_connections_do_not_starve_other_users() -> None:
    try:
        slow.allow_files(slow.SLOW + 256)
    except ShoalError as error:
        pytest.skip(str(error))
    best: dict[str, float] = {}
    for _ in range(3):  # what else the machine does can only spoil a ratio: one good measurement is enough
        for waits in asyncio.run(slow.measure(rounds=1, samples=60)):
            assert waits.slow >= 0.9 * slow.SLOW, waits
            best[waits.what] = min(waits.ratio, best.get(waits.what, waits.ratio))
        if max(best.values()) <= BAR:
            break
    assert len(best) == 3
    assert all(ratio <= BAR for ratio in best.values()), best
