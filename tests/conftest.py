"""What holds for every test: one torch thread, nothing from outside this machine, and nothing unpickled by shoal."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before anything of it is imported: its asserts explain themselves like those of tests, and hold under `python -O`.
pytest.register_assert_rewrite("support")

from support import audit  # noqa: E402

# Before anything imports torch: two spinning threads on a busy two-core machine are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that needs a download is a broken test; say so at once and not after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure() -> None:
    audit.start()


@pytest.fixture(autouse=True)
def no_forbidden_events() -> Iterator[None]:
    """Fail a test during which shoal's code unpickled an object, or anything reached for another machine."""
    audit.take()
    yield
    seen = audit.take()
    if seen:
        pytest.fail("Forbidden during this test:\n" + "\n".join(seen), pytrace=False)
