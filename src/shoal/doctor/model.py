"""Looks at a model directory without loading anything: names, sizes and the headers of its weight files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shoal.compute.fingerprint import model_name
from shoal.doctor.facts import Model, Weights

MAX_HEADER_BYTES = 100 * 1024 * 1024
"""The bound that safetensors itself puts on a header."""
MAX_JSON_BYTES = 256 * 1024 * 1024
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def model(name: str) -> Model:
    """The facts of a directory, or of a hub id as far as the hub's cache on this machine has it."""
    path = Path(name).expanduser()
    if not path.is_dir():
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            return Model(name, exists=False)
        cached = _cached(name)
        if cached is None:
            return Model(name, exists=False, in_cache=False, hub_offline=offline)
        path = cached
    config, config_error = _object(path / "config.json")
    index, index_error = _index(path / _INDEX)
    tokenizer = next((each for each in _TOKENIZERS if (path / each).is_file()), "")
    error = ""
    if tokenizer.endswith(".json"):
        error = _object(path / tokenizer)[1]
    kind = config.get("model_type")
    if not config_error and not isinstance(kind, str):
        config_error = f"{path / 'config.json'} names no model_type."
    files = tuple(_weights(file) for file in sorted(path.glob("*.safetensors")))
    return Model(
        str(path),
        config_error=config_error,
        model_type=str(kind),
        quantised=bool(config.get("quantization_config")),
        files=files,
        index=index,
        index_error=index_error,
        pickles=tuple(sorted(file.name for file in path.iterdir() if file.name.endswith(_PICKLES))),
        tokenizer=tokenizer,
        tokenizer_error=error,
        fingerprint=model_name(path) if not config_error and files else "",
    )


def _cached(name: str) -> Path | None:
    """The newest snapshot of a hub id in the hub's cache."""
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.join(Path.home(), ".cache", "huggingface"), "hub"
    )
    snapshots = Path(cache) / f"models--{name.replace('/', '--')}" / "snapshots"
    found = [each for each in snapshots.glob("*") if (each / "config.json").exists()]
    return max(found, key=lambda each: each.stat().st_mtime, default=None)


def _object(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object, and why there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return {}, f"{path} is longer than {MAX_JSON_BYTES >> 20} MiB."
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, f"There is no {path.name} in {path.parent}."
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path} cannot be read: {error}"
    return (found, "") if isinstance(found, dict) else ({}, f"{path} holds no object.")


def _index(path: Path) -> tuple[tuple[tuple[str, str], ...] | None, str]:
    if not path.exists():
        return None, ""
    found, error = _object(path)
    names = found.get("weight_map")
    if error or not isinstance(names, dict):
        return None, error or f"{path} has no weight_map."
    return tuple((str(tensor), str(file)) for tensor, file in names.items()), ""


def _weights(path: Path) -> Weights:
    """Name and size of a weight file, and what its header says of both."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MAX_HEADER_BYTES:
                return Weights(path.name, size, None, error="it does not begin like a safetensors file")
            if size < 8 + length:
                return Weights(path.name, size, 8 + length)
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return Weights(path.name, size, None, error=f"its header cannot be read: {error}")
    return Weights(path.name, size, 8 + length + end, frozenset(tensors))
