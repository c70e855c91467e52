"""SIGTERM in the middle of answers: the server asks for its sessions to be moved, and leaves when they are."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from support.disturbed import ALONE, EIGHT, check_text_survives
from support.reference import Reference
from support.swarm import Ask, Swarm, is_running, until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("asks", "stage"), [(ALONE, 0), (EIGHT, 1)], ids=["alone", "eight"])
def test_of_answers_under_way(swarm: Swarm, reference: Reference, asks: tuple[Ask, ...], stage: int) -> None:
    told: list[int] = []

    def tell_to_stop(server: dict[str, Any]) -> None:
        told.append(server["pid"])
        os.kill(server["pid"], signal.SIGTERM)

    # "draining": they moved because it asked them to, not because it was gone.
    assert check_text_survives(swarm, reference, asks, stage, tell_to_stop) == {"draining"}
    until(lambda: not is_running(told[0]), "the end of a server without sessions")
