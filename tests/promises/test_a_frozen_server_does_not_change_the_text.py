"""SIGSTOP in the middle of an answer: the process is there, its connections stand, and nothing comes out of it."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import pytest
from support.disturbed import ALONE, check_text_survives
from support.reference import Reference
from support.swarm import Swarm, is_running, until

pytestmark = pytest.mark.slow


def has_ended(pid: int) -> bool:
    return not is_running(pid)


@pytest.mark.parametrize("stage", [0, 1])
def test_of_an_answer_under_way(swarm: Swarm, reference: Reference, stage: int) -> None:
    frozen: list[int] = []

    def freeze(server: dict[str, Any]) -> None:
        frozen.append(server["pid"])
        os.kill(server["pid"], signal.SIGSTOP)

    try:
        # Only silence can tell, of the server or of the link to it: nothing was closed.
        assert check_text_survives(swarm, reference, ALONE, stage, freeze) <= {"silent", "link"}
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGKILL)
            # A frozen process takes a moment to die; until then it looks like a server of the swarm.
            until(partial(has_ended, pid), f"process {pid} is gone")
