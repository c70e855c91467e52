"""SIGKILL in the middle of answers, over HTTP, greedy in fp32."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from support.disturbed import ALONE, EIGHT, check_text_survives
from support.reference import Reference
from support.swarm import Answer, Ask, Swarm, is_running, until

pytestmark = pytest.mark.slow

NOTICED_AT_ONCE = {"closed", "reset", "link", "unreachable"}
"""A killed process closes its connections; nobody waits until it has been silent for long enough."""


def kill(server: dict[str, Any]) -> None:
    os.kill(server["pid"], signal.SIGKILL)
    until(lambda: not is_running(server["pid"]), "the end of a killed server")


@pytest.mark.parametrize("stage", [0, 1])
def test_of_the_only_answer_under_way(swarm: Swarm, reference: Reference, stage: int) -> None:
    assert check_text_survives(swarm, reference, ALONE, stage, kill) <= NOTICED_AT_ONCE


def test_of_eight_answers_at_once(swarm: Swarm, reference: Reference) -> None:
    assert check_text_survives(swarm, reference, EIGHT, 1, kill) <= NOTICED_AT_ONCE


def test_of_a_sampled_answer_with_a_seed(swarm: Swarm) -> None:
    """Greedy text soon repeats itself; this one does not, so a token lost or doubled anywhere would show."""
    ask = Ask("The interpreter reads the file", 400, (("temperature", 0.8), ("seed", 7)))
    undisturbed = Answer(swarm, ask).text()

    answer = Answer(swarm, ask).begun()
    before = sum(swarm.failovers().values())
    kill(swarm.busy(0))

    assert answer.text() == undisturbed
    assert sum(swarm.failovers().values()) > before
