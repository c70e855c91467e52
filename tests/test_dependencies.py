"""pyproject.toml declares what shoal imports, no more and no less."""

from __future__ import annotations

import re
import sys
import tomllib

from support.sources import PACKAGE, REPOSITORY, imports_of, python_files


def test_each_import_has_a_declared_dependency_and_each_dependency_an_import() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", needed)[0].replace("-", "_") for needed in project["dependencies"]}
    imported = {found.name.partition(".")[0] for file in python_files(PACKAGE) for found in imports_of(file, PACKAGE)}
    assert imported - sys.stdlib_module_names - {"shoal"} == declared
