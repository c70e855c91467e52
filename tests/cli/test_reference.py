"""The page about the command line says what the commands say."""

from __future__ import annotations

import runpy

from support.sources import REPOSITORY

FOLDER = REPOSITORY / "docs" / "reference"


def test_the_reference_page_is_current() -> None:
    reference = runpy.run_path(str(FOLDER / "generate_cli.py"))["reference"]

    assert (FOLDER / "cli.md").read_text() == reference(), "run: .venv/bin/python docs/reference/generate_cli.py"
