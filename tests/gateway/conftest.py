"""One gateway for all tests of a file; each test finds its models as new."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
from support.gateway import Gateway, running

from shoal.gateway.limits import Limits


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("gateway"), Limits(ping_s=0.05, requests=16)) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    for model in (shared_gateway.chatty, shared_gateway.plain):
        model.as_new()
    return shared_gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with gateway.client() as client:
        yield client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Limits], Gateway]]:
    """Starts a gateway with limits of its own, for one test."""
    with ExitStack() as stack:
        yield lambda limits: stack.enter_context(running(tmp_path, limits))
