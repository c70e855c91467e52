"""What is known without looking anything up: open models and the devices people have. Each row names its source."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from shoal.errors import UsageError
from shoal.spec.families import from_config
from shoal.spec.hardware import Device
from shoal.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Known:
    """One open model of the catalog."""

    spec: ModelSpec
    family: str
    source: str
    published: int | None
    """Values in the published weights; None where only a rounded figure is known."""


@cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = tomllib.loads((files(__name__) / f"{name}.toml").read_text())[name]
    return rows


def model_names() -> list[str]:
    """Every model of the catalog, in its order (by maker)."""
    return list(_table("models"))


@cache
def model(name: str) -> Known:
    """The model of that name, written as the catalog writes it or in other letter case.

    Raises UsageError with the nearest names for one that is not there.
    """
    row = _table("models").get(name.strip().lower())
    if row is None:
        raise _unknown(
            "model", name, model_names(), "`shoal plan models` lists them; a config.json or a shape works, too."
        )
    spec = from_config(row["config"], name.strip().lower())
    return Known(spec, row["config"]["model_type"], row["source"], row.get("published"))


def device_names() -> list[str]:
    """Every device of the catalog."""
    return list(_table("devices"))


@cache
def device(name: str) -> Device:
    """The device of that name: exactly, in other letter case, by a common short form, or by
    parts that only one has.

    Raises UsageError with the nearest names for one that is not there or that several share.
    """
    rows = _table("devices")
    wanted = _plain(COMMON.get(name.strip().lower(), name))
    exact = [each for each in rows if _plain(each) == wanted]
    words = re.findall(r"[A-Za-z0-9+]+", name.lower())
    found = exact or [each for each in rows if words and _has_words(each, words)]
    if len(found) > 1:
        raise UsageError(f"Several devices are called {name!r}.", hint=f"Say which: {', '.join(found)}.")
    if not found:
        raise _unknown("device", name, list(rows), "`shoal plan devices` lists them.")
    return Device.from_row(found[0], rows[found[0]])


COMMON = {
    "a100-80gb": "A100-SXM-80GB",
    "a100-40gb": "A100-SXM-40GB",
    "h100": "H100-SXM-80GB",
    "h100-sxm": "H100-SXM-80GB",
    "h100-80gb": "H100-SXM-80GB",
    "h200": "H200-SXM-141GB",
    "b200": "B200-SXM",
}
"""What somebody means who leaves out the form of the card. V100 and A100 alone stay doubtful: their memory differs."""


def _has_words(name: str, words: list[str]) -> bool:
    parts = re.findall(r"[a-z0-9+]+", name.lower())
    return all(word in parts for word in words)


def _plain(name: str) -> str:
    return "".join(each for each in name.lower() if each.isalnum())


def _unknown(kind: str, name: str, names: list[str], hint: str) -> UsageError:
    near = get_close_matches(name.lower(), [each.lower() for each in names], n=3, cutoff=0.5)
    written = [each for each in names if each.lower() in near]
    return UsageError(
        f"The catalog has no {kind} {name!r}.", hint=f"{'Near: ' + ', '.join(written) + '. ' if written else ''}{hint}"
    )
