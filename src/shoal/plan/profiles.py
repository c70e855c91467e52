"""Constants of engines, from engines.toml: what cannot be derived from shapes, each with unit and meaning."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True)
class Profile:
    """One engine's constants for one kind of estimate."""

    kind: str
    engine: str
    constants: Mapping[str, float]
    low: float
    """Measured over estimated: four of five measurements lie between `low` and `high`."""
    high: float
    provenance: str


@cache
def table() -> dict[str, Any]:
    """The whole file."""
    return tomllib.loads((files(__package__) / "engines.toml").read_text())


def held_out() -> dict[str, Any]:
    """Errors of each kind on rows that the constants were not fitted on, as the fit script found them."""
    found: dict[str, Any] = table().get("held_out", {})
    return found


@cache
def profile(kind: str, engine: str) -> Profile:
    """The profile of an engine; one that the file does not have takes the kind's `default`, with its wider interval."""
    rows = table()["profiles"][kind]
    name = engine if engine in rows else "default"
    row = rows[name]
    told = f"{kind}/{name}, version {table()['version']}, fitted on {row['fitted_on']}"
    if name != engine:
        told += f" ({engine} has no constants of its own)"
    return Profile(kind, name, row["constants"], row["low"], row["high"], told)
