"""A cache with room for one long answer: a second one is told when to come back, and the first does not notice."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from support.reference import Reference
from support.swarm import Answer, Ask, Swarm

pytestmark = pytest.mark.slow

TOKENS = 800
ROOM = 1024


@pytest.fixture
def small_swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path_factory.mktemp("small"), "--servers", "1", "--cache-tokens", str(ROOM), "--exact")
    try:
        yield swarm
    finally:
        swarm.stop()


def test_a_second_answer_is_refused_while_the_first_goes_on(small_swarm: Swarm, reference: Reference) -> None:
    prompt = "The interpreter reads the file"
    running = Answer(small_swarm, Ask(prompt, TOKENS)).begun()

    with small_swarm.client() as client:
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=small_swarm.model, prompt=prompt, max_tokens=TOKENS)
        assert len(running.chunks) < TOKENS, "the first answer had ended before the second was asked for"
        small = client.completions.create(
            model=small_swarm.model, prompt=prompt, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
        )
    assert refused.value.status_code == 429
    assert refused.value.code == "full"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    reference.check(prompt, 20, small.choices[0].text)  # what fits beside it is served at once

    reference.check(prompt, TOKENS, running.text())
    reference.check(prompt, TOKENS, Answer(small_swarm, Ask(prompt, TOKENS)).text())  # now there is room
    assert small_swarm.failovers() == {}
