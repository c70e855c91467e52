"""`shoal bench load`: a server reads and holds its own blocks, and nothing else.

A random Llama of more than 1 GB is written as sharded safetensors. A child process loads one quarter, one half and all
of its blocks, each in its own process, and says how many bytes it read (counted where the tensors are read, and by the
kernel), and how much resident memory it has beyond the base: the same process with every library imported and no block
loaded. Peak memory is measured too: loading must not hold the weights twice.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODEL_SHAPE = {
    "vocab_size": 16_384,
    "hidden_size": 1_536,
    "intermediate_size": 4_096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
"""326 million parameters: 1.3 GB in fp32."""
SHARES = (1 / 4, 1 / 2, 1)


@dataclass(frozen=True)
class LoadResult:
    """What one process saw. Bytes are whole process figures, ratios are over the blocks' own bytes."""

    blocks: str
    block_bytes: int
    bytes_read: int
    kernel_bytes_read: int
    resident_bytes: int
    peak_bytes: int
    base_bytes: int

    @property
    def read_ratio(self) -> float:
        return self.bytes_read / self.block_bytes

    @property
    def resident_ratio(self) -> float:
        return (self.resident_bytes - self.base_bytes) / self.block_bytes

    @property
    def peak_ratio(self) -> float:
        return (self.peak_bytes - self.base_bytes) / self.block_bytes


def run(model_dir: Path | None = None) -> Iterator[LoadResult]:
    """Measure a quarter, a half and all blocks of the model in `model_dir`, or of a random one written for it."""
    if model_dir is not None:
        yield from _measure(model_dir)
        return
    with tempfile.TemporaryDirectory(prefix="shoal-bench-load-") as folder:
        write_model(Path(folder))
        yield from _measure(Path(folder))


def _measure(model_dir: Path) -> Iterator[LoadResult]:
    count = json.loads((model_dir / "config.json").read_text())["num_hidden_layers"]
    base_bytes = _in_child(model_dir, "")["resident_bytes"]
    for share in SHARES:
        blocks = f"0:{max(1, round(share * count))}"
        yield LoadResult(blocks=blocks, base_bytes=base_bytes, **_in_child(model_dir, blocks))


def _in_child(model_dir: Path, blocks: str) -> dict[str, int]:
    command = [sys.executable, "-m", "shoal.bench.load", str(model_dir), blocks]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer


def write_model(folder: Path, shape: dict[str, int] = MODEL_SHAPE) -> None:
    """Write a random Llama of that shape as fp32 shards with an index, one block at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from shoal.compute.split import build_skeleton

    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    skeleton = build_skeleton(config, torch.float32).state_dict()
    shards: dict[str, list[str]] = {}
    for name in skeleton:
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "ends", []).append(name)
    rng = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: 0.02 * torch.randn(skeleton[name].shape, generator=rng) for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _child(model_dir: str, blocks: str) -> dict[str, int]:
    """Load `blocks` ("" for none, the empty server's base) and say what it took."""
    import torch

    from shoal.compute.split import Stage, build_stage
    from shoal.compute.weights import read_config
    from shoal.spec.ids import BlockRange

    torch.set_num_threads(1)
    # A tiny forward of the same family first: what torch allocates on first use belongs to the base.
    _warm_up()
    read_config(model_dir)
    before = _kernel_bytes_read()
    stage: Stage | None = build_stage(model_dir, BlockRange.parse(blocks)) if blocks else None
    return {
        "block_bytes": sum(tensor.nbytes for layer in stage.layers for tensor in layer.parameters()) if stage else 0,
        "bytes_read": stage.bytes_read if stage else 0,
        "kernel_bytes_read": _kernel_bytes_read() - before,
        "resident_bytes": _resident_bytes(),
        "peak_bytes": _peak_bytes(),
    }


def _warm_up() -> None:
    from shoal.compute.families import random_model
    from shoal.compute.selfcheck import cut, measure

    model = random_model("llama")
    measure(model, cut(model))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak_bytes() -> int:
    # Not getrusage: its maximum starts at what the parent held when it forked.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def _kernel_bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], sys.argv[2])))
