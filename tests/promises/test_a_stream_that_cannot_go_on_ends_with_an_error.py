"""Both servers of a span die: nobody can take over. The stream must say so; one that just ends is read as success."""

from __future__ import annotations

import os
import signal

import openai
import pytest
from support.reference import Reference
from support.swarm import Answer, Ask, Swarm, until

pytestmark = pytest.mark.slow


def test_with_an_error_object_and_new_requests_are_told_when_to_come_back(swarm: Swarm, reference: Reference) -> None:
    ask = Ask("The interpreter reads the file", 1500)
    answer = Answer(swarm, ask).begun()
    swarm.busy(1)
    for server in swarm.servers(1):
        os.kill(server["pid"], signal.SIGKILL)

    with swarm.client() as client, pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model=swarm.model, prompt="Hello", max_tokens=2)
    assert refused.value.status_code == 503
    assert refused.value.code == "swarm_incomplete"
    assert int(refused.value.response.headers["retry-after"]) >= 1

    answer.end()
    assert answer.error is not None, "the stream ended as if all was well"
    assert answer.finish_reason is None
    assert answer.error.code == "swarm_incomplete"
    assert 0 < len(answer.chunks) < ask.tokens
    reference.check(ask.prompt, len(answer.chunks), "".join(answer.chunks))  # what came is right

    until(lambda: not swarm.status()["covered"], "the registry knows")
    ready = swarm.http.get(swarm.api.removesuffix("/v1") + "/ready")
    assert ready.status_code == 503

    swarm.repair()
    with swarm.client() as client:
        again = client.completions.create(
            model=swarm.model, prompt=ask.prompt, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
        )
    reference.check(ask.prompt, 20, again.choices[0].text)
