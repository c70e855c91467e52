"""The name under which a swarm knows a model: two servers mean the same one only if it is equal. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def model_name(model_dir: Path) -> str:
    """The directory's name and a fingerprint of what lies in it. Raises OSError, ValueError."""
    return f"{model_dir.resolve().name.lower()[:200]}@{fingerprint(model_dir)}"


SAMPLES = 32
SAMPLE_BYTES = 4096


def fingerprint(model_dir: Path) -> str:
    """12 hex digits over the configuration and every weight file's header, size, and samples of its numbers.

    Tells other models, other precisions and a model's fine-tuned descendants apart without reading gigabytes; it is no
    proof against a forger, who is kept out by certificates.
    """
    digest = hashlib.sha256()
    config = json.loads((model_dir / "config.json").read_text())
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(model_dir.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(size, 64 * 1024 * 1024)))
            end = file.stat().st_size
            for sample in range(SAMPLES):
                stream.seek(8 + size + (end - 8 - size) * sample // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
        digest.update(str(end).encode())
    return digest.hexdigest()[:12]
