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
        held = {server["id"]: server["cache_tokens_free"] for server in swarm.servers() if server["id"] in chain}
        stream.close()

    assert all(before[node] - free >= asked for node, free in held.items()), "the session had reserved its cache"

    def freed() -> bool:
        return {server["id"]: server["cache_tokens_free"] for server in swarm.servers()} == before

    until(freed, "the cache is free again")
    assert not any(server["sessions"] for server in swarm.servers())
    assert not swarm.status()["driver"]["running"]
    assert swarm.status()["driver"]["tokens"] - tokens < asked, "it was cancelled, not finished"
