"""Rows of published measurements as workloads: the same code that answers people's questions predicts them."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from shoal.errors import ShoalError, UsageError
from shoal.plan import memory
from shoal.plan.estimate import UNITS, Estimate, Term
from shoal.plan.memory import Workload
from shoal.plan.profiles import profile
from shoal.spec import catalog
from shoal.spec.model import ModelSpec, head_dim_of

Row = Mapping[str, str]
KINDS = ("train_memory", "finetune_memory", "inference_memory", "checkpoint_size")
NEEDED = ("id", "kind", "model", "unit")
OTHERS = "only memory and checkpoint sizes can be predicted so far"
# Tools that print GiB as "GB" (or MiB as "MB"): nvidia-smi, and torch figures divided by 1024.
BINARY_TOOLS = ("Megatron", "AutoAWQ", "ExLlama")
ENGINES = (
    ("megatron-deepspeed", "megatron"),
    ("megatron-lm", "megatron"),
    ("deepspeed", "deepspeed"),
    ("autoawq gemm", "autoawq"),
    ("autoawq", "autoawq"),
    ("exllama", "exllama"),
    ("litgpt", "litgpt"),
    ("peft", "peft"),
)


class Unsupported(ShoalError):
    """A row that says too little, or asks for what cannot be estimated."""

    code = "unsupported"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with the columns of published.csv. Raises UsageError when needed columns are missing."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in NEEDED if name not in (reader.fieldnames or [])]
            if missing:
                raise UsageError(
                    f"{path} lacks the columns {', '.join(missing)}.",
                    hint="Columns: those of published.csv, value may be empty.",
                )
            return [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.", hint="Give a CSV with the columns of published.csv.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"{path} is no CSV in UTF-8 ({error}).", hint="Give a CSV with the columns of published.csv."
        ) from None


def predict(row: Row) -> tuple[Estimate | None, str]:
    """(estimate in bytes or None, why not). `value` is never looked at."""
    if row["kind"] not in KINDS:
        return None, OTHERS
    try:
        unit_bytes(row)
        return _estimate(row), ""
    except (UsageError, Unsupported) as error:
        return None, str(error)


def engine_of(row: Row) -> str:
    """The engine whose constants a row takes."""
    told = f"{row.get('framework', '')} {row.get('gpu', '')}".lower()
    name = next((engine for word, engine in ENGINES if word in told), "default")
    if name == "autoawq" and "cpu" in row.get("precision", ""):
        return "autoawq-cpu"
    if name == "megatron" and row.get("gpu", "").startswith("V100"):
        return "megatron-process"
    return name


def unit_bytes(row: Row) -> float:
    """Bytes of one of the row's units, as the tool that printed it means it. Raises UsageError for another unit."""
    unit = row["unit"].split("/")[0].split(" ")[0]
    if unit not in UNITS:
        raise UsageError(f"Unknown unit {row['unit']!r}.", hint=f"Known: {', '.join(UNITS)}.")
    if row["kind"] != "checkpoint_size" and row.get("framework", "").startswith(BINARY_TOOLS):
        unit = {"GB": "GiB", "MB": "MiB"}.get(unit, unit)
    return UNITS[unit]


def room_bytes(row: Row) -> float | None:
    """Memory of what a row's figure is about: one device, or all of them where an inference figure is their sum.

    None where the row names no device of the catalog, or its figure is a part of the whole.
    """
    if row.get("gpu", "") not in catalog.device_names() or "only" in row["unit"]:
        return None
    together = row["kind"] == "inference_memory" and not row.get("tp")
    return float(catalog.device(row["gpu"]).memory_bytes * (_number(row, "num_gpus", 1) if together else 1))


def workload(row: Row) -> Workload:
    """The workload that a memory row describes. Raises Unsupported with the reason when the row says too little."""
    spec = model_of(row)
    kind = row["kind"].removesuffix("_memory")
    if "offload" in row.get("zero_stage", ""):
        raise Unsupported("weights offloaded to host memory: what stays on the device is not stated")
    micro = _number(row, "micro_batch", 1)
    dp = _number(row, "dp", 0)
    zero = _number(row, "zero_stage", 0)
    if not dp:
        dp = max(1, _number(row, "num_gpus", 1) // (_number(row, "tp", 1) * _number(row, "pp", 1))) if zero else 1
    recompute = row.get("recompute") or ("none" if kind != "train" else "full")
    if engine_of(row) == "litgpt" and zero >= 3:  # its FSDP strategy recomputes every block, whatever the table says
        recompute = "full"
    batch = _number(row, "global_batch", micro * dp)
    seq = _number(row, "seq_len", 0)
    precision = row.get("precision") or "bf16"
    if "mix" in precision:  # PEFT's own default: fp32 weights under autocast
        precision = "fp32"
    rank = row.get("lora_rank", "")
    pp = _number(row, "pp", 1)
    devices = _number(row, "num_gpus", 1)
    if kind == "inference" and pp == 1 and _number(row, "tp", 1) == 1 and devices > 1:
        pp = 1 if engine_of(row) in ("exllama", "autoawq") else devices  # those figures are sums over devices
    return Workload(
        kind=kind,  # type: ignore[arg-type]
        spec=spec,
        engine=engine_of(row),
        precision=precision,
        method=(row.get("method") or "full").lower(),
        lora_rank=int(rank) if rank.isdigit() else 8,
        seq=seq,
        output=_number(row, "output_len", 0),
        micro_batch=micro,
        num_micro_batches=max(1, batch // (micro * dp)),
        recompute=recompute.split("+")[0],  # type: ignore[arg-type]
        seq_parallel="seqpar" in recompute,
        flash=kind != "train" or "Liger" in row.get("framework", ""),
        tp=_number(row, "tp", 1),
        pp=pp,
        vpp=_number(row, "vpp", 1),
        dp=dp,
        cp=_number(row, "cp", 1),
        ep=_number(row, "ep", 1),
        zero=zero,
        offload_optimizer="offload" in row.get("optimizer", ""),
        fused_loss="fused" in row.get("framework", "").lower(),
    )


def _estimate(row: Row) -> Estimate:
    if row["kind"] == "checkpoint_size":
        told = row.get("precision", "")
        rank = row.get("lora_rank", "") if row.get("method") == "lora" else ""
        return memory.checkpoint(
            model_of(row), told, optimizer="optimizer" in told, lora_rank=int(rank) if rank.isdigit() else 0
        )
    work = workload(row)
    unit = row["unit"]
    if "only" not in unit:
        return memory.estimate(work)
    found = profile("train", work.engine)
    if "activations" in unit:
        value = sum(memory.activations_per_rank(work, found.constants))
        name = "activations"
    else:
        value = memory.states_per_rank(work, found.constants)
        name = "weights, gradients, optimizer"
    return Estimate(value, value * 0.9, value * 1.1, (Term(name, value, "by formula alone"),), "no fitted constant")


def model_of(row: Row) -> ModelSpec:
    """The model of a row: from the catalog, or from its shape in the make that its name tells. Raises Unsupported."""
    name = row["model"].lower()
    if name.startswith(("t0", "mt0", "t5", "flan")):
        raise Unsupported("an encoder-decoder; only decoders are described")
    if name in catalog.model_names():
        return catalog.model(name).spec
    shape = {key: _number(row, key, 0) for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "experts")}
    if not all(shape[key] for key in ("layers", "hidden", "vocab")):
        raise Unsupported("neither a known model nor a shape")
    hidden, heads = shape["hidden"], shape["heads"]
    if not heads:  # not stated; only attention's square matrix depends on it
        heads = next((n for n in (hidden // 128, hidden // 64, 1) if n and hidden % n == 0), 1)
    make = _make(name)
    ffn = shape["ffn"] or 4 * hidden
    return ModelSpec(
        name=name,
        num_layers=shape["layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=shape["kv_heads"] or heads,
        head_dim=head_dim_of(name, hidden, heads),
        ffn=ffn,
        vocab=shape["vocab"],
        experts=shape["experts"],
        experts_per_token=min(2, shape["experts"]),
        **make,  # type: ignore[arg-type]
    )


def _make(name: str) -> dict[str, object]:
    """How models of that name are built, where the shape does not tell."""
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    gpt = {"gated_mlp": False, "norm": "layer", "norm_bias": True, "tied_embeddings": True, **biases}
    if name.startswith("bloom"):
        return {**gpt, "positions": "alibi", "embedding_norm": True}
    if re.match(r"gpt|megatron|turing|bigscience", name):
        return {**gpt, "positions": "learned", "position_rows": 2048}
    if name.startswith("mpt"):
        return {"gated_mlp": False, "norm": "layer", "tied_embeddings": True, "positions": "alibi"}
    return {}


def _number(row: Row, key: str, default: int) -> int:
    text = row.get(key, "")
    if not text:
        return default
    try:
        return int(float(text))
    except ValueError:
        raise Unsupported(f"{key} is {text!r}, no number") from None
