"""Imports go one way. The table is data; a broken rule is named with its file, line and reason.

When a rule is in the way, change the table in the same commit and say why in docs/design.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.sources import PACKAGE, imports_of, python_files

ALL = "all folders"
CLOCKS_AND_CHANCE = ("time", "datetime", "random", "secrets", "uuid")
NETWORK = ("asyncio", "socket", "ssl", "select", "selectors", "uvloop", "httpx", "starlette", "uvicorn", "cryptography")
INPUT_AND_OUTPUT = (*NETWORK, "threading", "multiprocessing", "concurrent", "subprocess")
HEAVY = ("torch", "transformers", "numpy", "safetensors", "starlette", "uvicorn", "httpx", "rich", "cryptography")


@dataclass(frozen=True)
class Layer:
    """What one folder may import besides itself, `errors` and the standard library."""

    folders: tuple[str, ...] | str
    why: str
    only: tuple[str, ...] | None = None
    """The only packages of others it may import; None means any that `never` does not name."""
    never: tuple[str, ...] = ()
    """Packages it may not import, those of the standard library included."""
    never_at_top: tuple[str, ...] = ()
    """Packages, and folders of shoal, that it may import only inside a function."""


LAYERS = {
    "spec": Layer((), "everyone depends on it", only=()),
    "plan": Layer(
        ("spec",),
        "planning answers at once, on a laptop, for machines that are not there",
        only=(),
        never=(*INPUT_AND_OUTPUT, *CLOCKS_AND_CHANCE),
    ),
    "wire": Layer(
        ("spec",),
        "bytes can be fuzzed and read anywhere, without clock or network",
        only=("numpy", "msgspec"),
        never=(*INPUT_AND_OUTPUT, *CLOCKS_AND_CHANCE),
    ),
    "swarm": Layer(
        ("spec", "wire"),
        "decisions are pure: now and rng are arguments, so sim runs them unchanged",
        only=("msgspec",),
        never=(*INPUT_AND_OUTPUT, *CLOCKS_AND_CHANCE, "numpy"),
    ),
    "compute": Layer(("spec",), "the mathematics is tested alone against a reference", never=NETWORK),
    "manifest": Layer(
        ("spec",),
        "what was signed must be checkable without a swarm",
        only=("cryptography",),
        never=("asyncio", "socket", "ssl"),
    ),
    "net": Layer(
        ("spec", "wire", "swarm", "manifest"), "transport does not care what flows", never=("torch", "transformers")
    ),
    "admin": Layer(
        ("spec", "wire", "swarm", "net", "manifest"), "admission knows no model", never=("torch", "transformers")
    ),
    "server": Layer(("spec", "wire", "swarm", "compute", "net"), "server and client meet only in wire and swarm"),
    "client": Layer(("spec", "wire", "swarm", "compute", "net"), "client and server meet only in wire and swarm"),
    "gateway": Layer(("spec", "swarm", "client", "manifest"), "it is a client with accounts"),
    "sim": Layer(
        ("spec", "wire", "swarm"),
        "no real time, no real bytes",
        only=("msgspec",),
        never=(*INPUT_AND_OUTPUT, "time", "datetime", "secrets", "uuid"),
    ),
    "launch": Layer(
        ("spec", "net", "admin", "manifest"), "the parts it starts are child processes", never=("torch", "transformers")
    ),
    "hostile": Layer(
        ("spec", "wire", "swarm", "manifest", "net", "gateway"),
        "it attacks what strangers and members reach; nothing that serves may need it",
        never=("torch", "transformers"),
    ),
    "doctor": Layer(
        ("spec", "wire", "net", "compute", "manifest"),
        "it looks at what the others leave behind, and starts none of them",
        never=("torch", "transformers"),
    ),
    "bench": Layer(
        ("spec", "wire", "swarm", "compute", "net", "server", "client", "launch", "hostile"),
        "it measures the parts, not the gateway's accounts or the simulation",
    ),
    "cli": Layer(
        ALL,
        "`shoal --help` stays instant: import it inside the command's function",
        never_at_top=(
            *HEAVY,
            *(
                "plan",
                "wire",
                "swarm",
                "compute",
                "manifest",
                "net",
                "admin",
                "server",
                "client",
                "gateway",
                "sim",
                "launch",
                "bench",
                "hostile",
                "doctor",
            ),
        ),
    ),
}
OUTSIDE_THE_FOLDERS = {
    "__init__": Layer((), "importing shoal imports nothing", only=()),
    "errors": Layer((), "everyone depends on it", only=()),
    "__main__": Layer(("cli",), "it only starts the command line", only=()),
}


def broken_rules(package: Path) -> list[str]:
    """One line per import of the package that the table does not allow."""
    problems = []
    for path in python_files(package):
        folder = path.relative_to(package).parts[0].removesuffix(".py")
        layer = {**LAYERS, **OUTSIDE_THE_FOLDERS}.get(folder)
        where = f"{package.name}/{path.relative_to(package)}"
        if layer is None:
            problems.append(f"{where}: the folder {folder} is not in the table")
            continue
        for each in imports_of(path, package):
            rule = _broken_rule(folder, layer, each.name, each.at_top and not each.for_types, package)
            if rule:
                problems.append(f"{where}:{each.line}: {rule} ({layer.why})")
    return problems


def _broken_rule(folder: str, layer: Layer, name: str, at_top: bool, package: Path) -> str | None:
    top, *rest = name.split(".")
    if top != package.name:
        if top in layer.never:
            return f"{folder} may not import {top}"
        if layer.only is not None and top not in layer.only and top not in sys.stdlib_module_names:
            return f"{folder} may not import {top}"
        if at_top and top in layer.never_at_top:
            return f"{folder} may import {top} only inside a function"
        return None
    other = rest[0] if rest else "__init__"
    if other in (folder, "errors") or not _is_module(package, other):
        return None
    if layer.folders != ALL and other not in layer.folders:
        return f"{folder} may not import {package.name}.{other}"
    if at_top and other in layer.never_at_top:
        return f"{folder} may import {package.name}.{other} only inside a function"
    return None


def import_cycle(package: Path) -> list[str]:
    """The modules of one import cycle in order, or nothing. Imports inside functions count, those for types do not."""
    files = {_module_name(path, package): path for path in python_files(package)}
    needs = {
        module: {
            target
            for each in imports_of(path, package)
            if not each.for_types and (target := _module_in(each.name, files)) and target != module
        }
        for module, path in files.items()
    }
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return []
        for need in sorted(needs[module]):
            cycle = visit(need, [*trail, module])
            if cycle:
                return cycle
        finished.add(module)
        return []

    return next((cycle for module in sorted(needs) if (cycle := visit(module, []))), [])


def _is_module(package: Path, name: str) -> bool:
    return (package / name).is_dir() or (package / f"{name}.py").is_file()


def _module_name(path: Path, package: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_in(name: str, files: dict[str, Path]) -> str | None:
    """The module that an imported name lives in: `shoal.spec.ids.NodeId` lives in `shoal.spec.ids`."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or None


def test_every_import_is_one_the_table_allows() -> None:
    problems = broken_rules(PACKAGE)
    assert not problems, "\n" + "\n".join(problems)


def test_no_module_needs_itself() -> None:
    assert not import_cycle(PACKAGE)


def test_the_table_itself_has_no_two_folders_that_may_import_each_other() -> None:
    for folder, layer in LAYERS.items():
        for other in layer.folders if layer.folders != ALL else ():
            assert folder not in LAYERS[other].folders, f"{folder} and {other}"


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("swarm/routing.py", "x = 1\nimport torch\n", "shoal/swarm/routing.py:2: swarm may not import torch"),
        ("swarm/routing.py", "from time import monotonic\n", "swarm may not import time"),
        ("swarm/routing.py", "def f():\n    import random\n", "shoal/swarm/routing.py:2: swarm may not import random"),
        ("wire/frames.py", "import asyncio.streams\n", "wire may not import asyncio"),
        ("wire/frames.py", "import requests\n", "wire may not import requests"),
        ("server/node.py", "from shoal.client import model\n", "server may not import shoal.client"),
        ("server/node.py", "from shoal import client\n", "server may not import shoal.client"),
        ("server/node.py", "from ..client import model\n", "server may not import shoal.client"),
        ("server/node.py", "import_module('shoal.client.model')\n", "server may not import shoal.client"),
        ("cli/up.py", "import torch\n", "cli may import torch only inside a function"),
        ("cli/up.py", "from shoal.launch import local\n", "cli may import shoal.launch only inside a function"),
        ("utils/misc.py", "", "the folder utils is not in the table"),
    ],
)
def test_a_broken_rule_is_named_with_file_and_line(tmp_path: Path, file: str, code: str, expected: str) -> None:
    package = _plant(tmp_path, {"client/model.py": "", "launch/local.py": "", file: code})

    (problem,) = broken_rules(package)

    assert expected in problem


def test_what_the_table_allows_passes(tmp_path: Path) -> None:
    package = _plant(
        tmp_path,
        {
            "wire/frames.py": "import struct\nimport numpy as np\nfrom shoal.errors import ProtocolError\n",
            "swarm/routing.py": "from shoal.wire import frames\nfrom . import view\n",
            "swarm/view.py": "import heapq\n",
            "cli/up.py": "import click\nif TYPE_CHECKING:\n    import torch\n",
            "cli/generate.py": "def generate():\n    import torch\n    from shoal.swarm import view\n",
            "errors.py": "",
        },
    )

    assert broken_rules(package) == []
    assert import_cycle(package) == []


def test_a_cycle_is_shown_as_the_way_around_it(tmp_path: Path) -> None:
    package = _plant(
        tmp_path,
        {
            "swarm/view.py": "from shoal.swarm.routing import chain\n",
            "swarm/routing.py": "def chain():\n    from shoal.swarm import view\n",
        },
    )

    assert import_cycle(package) == ["shoal.swarm.routing", "shoal.swarm.view", "shoal.swarm.routing"]


def test_two_modules_may_know_each_other_s_types(tmp_path: Path) -> None:
    package = _plant(
        tmp_path,
        {
            "swarm/view.py": "if TYPE_CHECKING:\n    from shoal.swarm.routing import chain\n",
            "swarm/routing.py": "from shoal.swarm import view\n",
        },
    )

    assert import_cycle(package) == []


def test_a_type_from_a_forbidden_folder_is_still_forbidden(tmp_path: Path) -> None:
    package = _plant(tmp_path, {"swarm/view.py": "if TYPE_CHECKING:\n    import torch\n"})

    assert broken_rules(package)


def _plant(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "shoal"
    for name, code in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return package
