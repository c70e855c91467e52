"""A stream that nobody reads any more ends on every server, long before its last token."""

from __future__ import annotations

import pytest
from support.swarm import Swarm, until

pytestmark = pytest.mark.slow


def test_on_every_server_of_its_chain(swarm: Swarm) -> None:
    before = {server["id"]: server["cache_tokens_free"] for server in swarm.servers()}
    tokens = swarm.status()["driver"]["tokens"]
    asked = 1900
    with swarm.client() as client:
        stream = client.completions.create(
            model=swarm.model, prompt="Once", max_tokens=asked, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        chain = {swarm.busy(stage)["id"] for stage in (0, 1)}

        def reserved() -> bool:
            free = {server["id"]: server["cache_tokens_free"] for server in swarm.servers()}
            return all(before[node] - free[node] >= asked for node in chain)

        until(reserved, "both servers have told that they keep cache for the answer")
        stream.close()

    def freed() -> bool:
        return {server["id"]: server["cache_tokens_free"] for server in swarm.servers()} == before

    until(freed, "the cache is free again")
    assert not any(server["sessions"] for server in swarm.servers())
    assert not swarm.status()["driver"]["running"]
    assert swarm.status()["driver"]["tokens"] - tokens < asked, "it was cancelled, not finished"
