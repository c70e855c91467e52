"""A model as a person names it: catalog name, config.json, directory with one, or shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from shoal.errors import ModelError, UsageError
from shoal.spec import catalog
from shoal.spec.families import from_config
from shoal.spec.model import SHAPE_FORM, ModelSpec, parse_shape

MAX_CONFIG_BYTES = 1 << 20


class Read(NamedTuple):
    """A model, its family and where its sizes come from."""

    spec: ModelSpec
    family: str
    source: str


def read_model(text: str) -> Read:
    """The model that `text` names. Raises UsageError with the accepted forms, ModelError for a bad file."""
    if "=" in text:
        return Read(parse_shape(text), "shape", "the given shape")
    path = Path(text)
    if path.is_dir() or path.suffix == ".json":
        return _read_config(path / "config.json" if path.is_dir() else path)
    try:
        known = catalog.model(text)
    except UsageError as error:
        raise UsageError(str(error), hint=f"{error.hint} Form of a shape: {SHAPE_FORM}") from None
    return Read(known.spec, known.family, f"config of {known.source}")


def _read_config(path: Path) -> Read:
    if not path.is_file():
        raise ModelError(f"There is no file {path}.", hint="Give a config.json, or the directory that holds one.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path} is larger than any config.json.", hint="Give a model's config.json.")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        raise ModelError(f"{path} is not JSON.", hint="Give a model's config.json.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object.", hint="Give a model's config.json.")
    name = path.resolve().parent.name
    return Read(from_config(config, name), str(config.get("model_type")), str(path))
