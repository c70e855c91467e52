"""One swarm for all promises: two spans of the demo model, two servers for each, as `shoal up` starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.reference import Reference
from support.swarm import DEMO, Swarm


@pytest.fixture(scope="session")
def shared_swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path_factory.mktemp("up"), "--servers", "2", "--replicas", "2", "--exact", "--memory", "1GiB")
    try:
        yield swarm
    finally:
        swarm.stop()


@pytest.fixture
def swarm(shared_swarm: Swarm) -> Swarm:
    """Whole and idle, whatever the test before did to it."""
    shared_swarm.repair()
    return shared_swarm


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(DEMO)
