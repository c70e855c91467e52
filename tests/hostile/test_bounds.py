"""docs/attacks.md names every bound by its constant, with the value that the code has."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator

import pytest
from support.sources import PACKAGE, REPOSITORY, python_files

ROW = re.compile(r"^\| (?P<what>[^|]+) \| (?P<bound>[^|]+) \| `(?P<constant>[\w.]+)` \| [^|]+ \|$", re.MULTILINE)
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1, "min": 60}
FOLDERS = ("wire", "swarm", "net", "admin", "server", "client", "gateway", "manifest", "compute")
"""Where strangers, members, users and files of others are met."""
SETTINGS = ("wire.frames.Limits", "net.connection.ConnSettings", "gateway.limits.Limits", "swarm.serving.ServingConfig")
"""Classes whose numbers are bounds."""
NO_BOUNDS = {
    "compute.sampling.MAX_TOP_LOGPROBS": "the gateway's own is the one that is met",
    "compute.families.MAX_PARAMETERS": "of the random models of a test bench",
    "manifest.canonical._MAX_NUMBER": "exact integers of JSON, not a size",
    "swarm.view._MAX_COUNT": "exact integers of JSON, not a size",
    "wire.tensors._MAX_SCALE": "follows from MAX_ABS",
    "wire.tensors._MAX_ABS_BITS": "follows from MAX_ABS",
    "net.connection.ConnSettings.close_timeout_s": "of our own farewell",
    "gateway.limits.Limits.default_chat_tokens": "a default",
    "gateway.limits.Limits.ping_s": "a rhythm",
    "gateway.limits.Limits.shutdown_s": "of our own farewell",
    "swarm.serving.ServingConfig.active_s": "a measure of load",
    "swarm.serving.ServingConfig.cache_tokens": "given for each server; MAX_CACHE_TOKENS is the bound",
    "wire.frames.Limits.max_meta_bytes": "MAX_META_BYTES",
}


def table() -> dict[str, str]:
    """Constant -> what the page says of it."""
    page = (REPOSITORY / "docs" / "attacks.md").read_text()
    section = page[page.index("## Bounds\n") + 1 :].partition("\n## ")[0]
    found = [(match["constant"], match["bound"]) for match in ROW.finditer(section)]
    assert len(found) == len(dict(found)), "a constant stands there twice"
    return dict(found)


def number(text: str) -> float:
    """A bound as the page writes it: "64 MiB", "1,024", "15 min"."""
    amount, _, unit = text.partition(" ")
    return float(amount.replace(",", "")) * UNITS[unit]


def value_of(name: str) -> float:
    """The constant below src/shoal: of a module, or the default of a class's field."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            holder = importlib.import_module(".".join(["shoal", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        if len(parts) - cut == 1:
            return float(getattr(holder, parts[-1]))
        (default,) = [
            field.default for field in dataclasses.fields(getattr(holder, parts[cut])) if field.name == parts[-1]
        ]
        return float(default)  # type: ignore[arg-type]
    raise LookupError(name)


@pytest.mark.parametrize(("name", "bound"), table().items())
def test_a_bound_has_the_value_that_the_page_gives(name: str, bound: str) -> None:
    assert number(bound) == pytest.approx(value_of(name))


def constants() -> Iterator[str]:
    """Every constant of those folders that calls itself a maximum, and every number of the classes of settings."""
    for folder in FOLDERS:
        for path in python_files(PACKAGE / folder):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                targets = node.targets if isinstance(node, ast.Assign) else []
                for target in targets:
                    if isinstance(target, ast.Name) and re.match(r"_?MAX_", target.id):
                        yield f"{module}.{target.id}"
    for name in SETTINGS:
        module, _, attribute = name.rpartition(".")
        for field in dataclasses.fields(getattr(importlib.import_module(f"shoal.{module}"), attribute)):
            if field.type in ("int", "float"):
                yield f"{name}.{field.name}"


def test_no_bound_is_missing_from_the_page() -> None:
    missing = [name for name in constants() if name not in table() and name not in NO_BOUNDS]
    assert not missing, "write them into docs/attacks.md, section Bounds:\n" + "\n".join(missing)


def test_what_is_named_as_no_bound_exists() -> None:
    known = set(constants())
    assert set(NO_BOUNDS) <= known


@pytest.mark.parametrize(("text", "value"), [("64 MiB", 64 << 20), ("1,024", 1024), ("15 min", 900), ("0.5", 0.5)])
def test_a_bound_is_read_as_people_write_it(text: str, value: float) -> None:
    assert number(text) == value
