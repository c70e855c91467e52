"""`make` on a machine that lacks something says what to install, and leaves nothing half made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.sources import REPOSITORY


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a fresh shell: without what an outer `make test` hands down."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("python", "told"),
    [
        (None, "error: no '{python}' on this machine.\nhint: install Python 3.11 or newer"),
        ("echo Python 3.9.2; exit 1", "error: '{python}' is Python 3.9.2; shoal needs Python 3.11 or newer.\nhint: "),
        ('case "$2" in *ensurepip*) exit 1;; esac', "error: '{python}' has no venv module;"),
    ],
)
def test_a_python_that_will_not_do_is_named_with_the_remedy(tmp_path: Path, python: str | None, told: str) -> None:
    program = tmp_path / "python3"
    if python is not None:
        program.write_text(f"#!/bin/sh\n{python}\n")
        program.chmod(0o755)
    venv = tmp_path / "venv"

    ended = make("test", f"PYTHON={program}", f"VENV={venv}")

    assert ended.returncode != 0
    assert told.format(python=program) in ended.stderr
    assert not venv.exists()


def test_the_torch_that_is_installed_first_is_the_pinned_one() -> None:
    planned = make("--dry-run", "--always-make", "VENV=venv", "venv/.installed").stdout

    (pin,) = {word for line in (REPOSITORY / "pyproject.toml").open() for word in line.split('"') if "torch==" in word}
    installs = [line for line in planned.splitlines() if " -m pip " in line]
    assert installs[0].endswith(f"install {pin}")
    assert installs[1].endswith("'.[dev]'")
