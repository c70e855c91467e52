"""The experiment behind several promises: something happens to a server in the middle of answers, and no text
changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from support.reference import Reference
from support.swarm import Answer, Ask, Swarm, answers

ALONE = (Ask("The interpreter reads the file", 400),)
EIGHT = tuple(
    Ask(prompt, 160)
    for prompt in (
        "The interpreter reads the file",
        "When a Python program",
        "ROMEO:\n",
        "A transaction is",
        "This function returns",
        "The index of a table",
        "In SQLite, a",
        "O, what a",
    )
)

Fault = Callable[[dict[str, Any]], None]
"""fault(server): what happens to the busiest server of a stage, as `shoal status` describes it."""


def check_text_survives(
    swarm: Swarm, reference: Reference, asks: tuple[Ask, ...], stage: int, fault: Fault
) -> set[str]:
    """Answer `asks` at the same time while the fault happens; every text must be the undisturbed one, which is what
    Hugging Face generates.

    Returns the causes of the failovers that the fault brought about, at least one.
    """
    undisturbed = _undisturbed(swarm, reference, asks)

    before = swarm.failovers()
    running = [Answer(swarm, ask).begun() for ask in asks]
    fault(swarm.busy(stage, sessions=len(asks)))
    disturbed = [answer.text() for answer in running]
    after = swarm.failovers()

    for ask, text in zip(asks, disturbed, strict=True):
        reference.check(ask.prompt, ask.tokens, text)
    assert disturbed == undisturbed
    causes = {cause for cause, count in after.items() if count > before.get(cause, 0)}
    assert causes, "the answers had ended before the fault"
    return causes


@cache
def _undisturbed(swarm: Swarm, reference: Reference, asks: tuple[Ask, ...]) -> list[str]:
    """The answers of a healthy swarm, generated at the same time as well."""
    texts = answers(swarm, asks)
    for ask, text in zip(asks, texts, strict=True):
        reference.check(ask.prompt, ask.tokens, text)
    return texts
