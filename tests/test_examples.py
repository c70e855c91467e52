"""Every example runs from start to end, as a person would run it, and shows what its docstring promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.sources import REPOSITORY

EXAMPLES = REPOSITORY / "examples"

SHOWN = {
    "ask.py": ("I am the demo model of shoal", "blocks 0:3", "69 tokens, 0 sessions still open."),
    "kill_a_server.py": ("killed ***", "the words are the same", "positions were computed again"),
    "python_client.py": ("> This function returns a pointer", "unsure:", "72 tokens in 3 sessions"),
}
"""Parts of what each example prints. The answers are greedy, so their words and number of tokens are known."""


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_an_example_shows_what_it_promises(name: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout
    for part in SHOWN[name]:
        assert part in ended.stdout
