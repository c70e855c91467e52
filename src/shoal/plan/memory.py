"""Memory of one device: inference, fine-tuning and training, as sums of named terms; sizes of checkpoints.

Letters: s tokens of a sequence, b sequences of a micro-batch, h width, t tensor-parallel, p pipeline stages, D
data-parallel ranks. Activations follow Korthikanti et al. (2205.05198), written for any head and MLP width;
`plan/engines.toml` holds what cannot be derived (an engine's fixed share, how much of the textbook inventory it keeps).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from shoal.errors import UsageError
from shoal.plan.estimate import GIB, Estimate, Term
from shoal.plan.precision import parse_precision, weight_bytes
from shoal.plan.profiles import Profile, profile
from shoal.spec.model import ModelSpec, Parameters

Kind = Literal["inference", "finetune", "train"]
Recompute = Literal["none", "selective", "full"]
QUANTISED_BELOW = 16.0
ADAPTED = ("q", "v")
"""The matrices that LoRA adapts when nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to run, and how it is laid out over devices. Raises UsageError for counts below 1."""

    kind: Kind
    spec: ModelSpec
    engine: str = "default"
    precision: str = "bf16"
    method: str = "full"
    """Fine-tuning: full, lora, qlora, dpo, dpo-lora, dpo-qlora, adapter, adapter_v2. Training: pretrain."""
    lora_rank: int = 8
    seq: int = 0
    output: int = 0
    micro_batch: int = 1
    num_micro_batches: int = 1
    recompute: Recompute = "none"
    seq_parallel: bool = False
    flash: bool = True
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 0
    offload_optimizer: bool = False
    fused_loss: bool = False
    """The loss is computed in pieces and logits are never kept."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "num_micro_batches", "tp", "pp", "vpp", "dp", "cp", "ep", "lora_rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}.", hint=f"{name} must be 1 or more.")
        for name in ("seq", "output", "zero"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}.", hint=f"{name} must be 0 or more.")
        if self.pp > self.spec.num_layers:
            raise UsageError(f"pp is {self.pp}.", hint=f"The model has {self.spec.num_layers} layers to share out.")
        if self.zero > 3:
            raise UsageError(f"zero is {self.zero}.", hint="ZeRO has the stages 0 to 3.")


def estimate(work: Workload, constants: Mapping[str, float] | None = None) -> Estimate:
    """Peak memory of the fullest device. `constants` replaces those of the engine (for fitting)."""
    found = profile(work.kind, work.engine)
    values = {**found.constants, **(constants or {})}
    if work.kind == "inference":
        terms = _inference(work, values)
    elif work.kind == "finetune":
        terms = _finetune(work, values)
    else:
        terms = _training(work, values)
    return _sum(terms, found)


def _sum(terms: list[Term], found: Profile) -> Estimate:
    kept = tuple(term for term in terms if term.value > 0)
    value = sum(term.value for term in kept)
    return Estimate(value, value * found.low, value * found.high, kept, found.provenance)


def inventory(spec: ModelSpec, tp: int = 1, seq_parallel: bool = False) -> float:
    """Bytes per token that the backward pass of one layer reads, at 16 bit, without attention's square matrix.

    10h for norms, inputs and dropout masks that every rank keeps, and 4q + 4kv + 4f (8f gated) that tensor parallelism
    shards; 34h for the classic shape.
    """
    heads, mlp = _sharded_inventory(spec)
    return 10.0 * spec.hidden / (tp if seq_parallel else 1) + (heads + mlp) / tp


def _sharded_inventory(spec: ModelSpec) -> tuple[float, float]:
    """(attention's, the MLP's) bytes per token in one layer."""
    width = spec.ffn or spec.expert_width
    if spec.experts:
        width = spec.experts_per_token * spec.expert_width + spec.shared_ffn
    heads = 4.0 * spec.q_width + 4.0 * (spec.q_width if spec.mla else spec.kv_width)
    return heads, (8.0 if spec.gated_mlp else 4.0) * width


def square(spec: ModelSpec, seq: int, tp: int = 1) -> float:
    """Bytes per token of attention's score matrix, softmax and dropout mask (5as); flash attention has none."""
    return 5.0 * spec.heads * seq / tp


@lru_cache(maxsize=1024)
def lora_parameters(spec: ModelSpec, rank: int, adapted: tuple[str, ...] = ADAPTED) -> int:
    """Values of an adapter of that rank on those matrices of every layer."""
    return sum(
        rank * (weight.rows + weight.columns) * weight.count
        for layer in range(spec.num_layers)
        for weight in spec.layer_weights(layer)
        if weight.name in adapted
    )


def checkpoint(spec: ModelSpec, precision: str, *, optimizer: bool = False, lora_rank: int = 0) -> Estimate:
    """Bytes of a file of weights; with `optimizer` of what training saves: fp32 master weights and both moments."""
    form = parse_precision(precision)
    found = profile("checkpoint", "default")
    if lora_rank:
        values = lora_parameters(spec, lora_rank)
        bits = form.matrix_bits
        return _sum([Term("adapter", values * bits / 8, f"{values} values x {bits:g} bit")], found)
    if optimizer:
        total = spec.parameters().total
        return _sum([Term("master weights and moments", 12.0 * total, "12 B x parameters")], found)
    return _sum(
        [Term("weights", weight_bytes(spec, form), f"layers at {form.matrix_bits:g} bit, the rest apart")], found
    )


def _inference(work: Workload, c: Mapping[str, float]) -> list[Term]:
    spec, form = work.spec, parse_precision(work.precision)
    parts = work.tp * work.pp
    share = weight_bytes(spec, form) / parts
    tokens = work.seq + work.output
    cache = spec.kv_bytes(tokens) * work.micro_batch / parts * c["cache_factor"]
    prompt = work.micro_batch * work.seq
    working = prompt * inventory(spec, work.tp) * c["working_factor"]
    logits = prompt * spec.vocab * c["logit_bytes"] / work.tp
    return [
        Term(
            "weights",
            share * c["weight_copies"],
            f"{form.matrix_bits:g} bit x {c['weight_copies']:g} / {parts} devices",
        ),
        Term("KV cache", cache, f"{tokens} tokens x {work.micro_batch} sequences"),
        Term("prompt activations", working, "tokens x inventory of one layer x working_factor"),
        Term("logits", logits, f"tokens x vocabulary x {c['logit_bytes']:g} B"),
        Term("fixed", c["fixed_gib"] * GIB, "context, kernels, buffers of the engine"),
    ]


def _finetune(work: Workload, c: Mapping[str, float]) -> list[Term]:
    spec = work.spec
    method = work.method.removeprefix("dpo-")
    full = method in ("full", "dpo")
    form = parse_precision(work.precision)
    weights = weight_bytes(spec, form)
    quantised = form.matrix_bits < QUANTISED_BELOW
    if full and quantised:
        raise UsageError(
            f"Weights kept as {work.precision} cannot be trained in full.", hint="Use bf16, or method lora or qlora."
        )
    total = _counts(spec).total
    trained = total if full else _trained(work, method)
    states = trained * (c["state_bytes_full"] if full else c["state_bytes_adapter"])
    sharded = work.zero >= 3 and work.dp > 1
    tokens = work.micro_batch * work.seq * (2 if work.method.startswith("dpo") else 1)
    if work.method == "dpo":  # the frozen reference model; adapters are simply switched off for it
        weights *= 2
    heads, mlp = _sharded_inventory(spec)
    kept = (10.0 * spec.hidden + heads) * c["attention_factor"] + mlp * c["mlp_factor"]
    if quantised:
        kept *= c["quantised_factor"]
    if method == "adapter_v2":  # its scale needs every linear layer's output once more
        kept += 2.0 * sum(w.columns for w in spec.layer_weights(spec.num_layers - 1) if w.is_matrix)
    elif method in ("lora", "qlora"):  # dropout makes a copy of the input for every adapted matrix
        kept += 2.0 * spec.hidden * len(ADAPTED)
    if not work.flash:
        kept += square(spec, work.seq)
    recompute = work.recompute == "full"
    activations = tokens * (2.0 * spec.hidden * spec.num_layers + kept if recompute else kept * spec.num_layers)
    largest = max(w.rows * w.columns for w in spec.layer_weights(spec.num_layers - 1) if w.is_matrix)
    # Sharded weights are gathered layer by layer, one ahead; some engines load the whole model before they shard it.
    gathered = max(weights * c["unsharded_copies"], 2.0 * weights / spec.num_layers)
    held = gathered + weights / work.dp if sharded else weights
    return [
        Term(
            "weights",
            held,
            f"{form.matrix_bits:g} bit" + (f", 1/{work.dp} and what is gathered" if sharded else ""),
        ),
        Term("gradients and optimizer", states / (work.dp if sharded else 1), f"{trained} trained values"),
        Term("activations", activations, f"{tokens} tokens" + (", recomputed" if recompute else "")),
        Term(
            "logits", 0.0 if work.fused_loss else tokens * spec.vocab * c["logit_bytes"], f"{c['logit_bytes']:g} B each"
        ),
        Term("dequantised layer", 2.0 * largest if quantised else 0.0, "largest matrix at 16 bit"),
        Term("fixed", c["fixed_gib"] * GIB, "context, kernels, buffers"),
    ]


def _trained(work: Workload, method: str) -> int:
    spec = work.spec
    if method in ("lora", "qlora"):
        return lora_parameters(spec, work.lora_rank)
    if method == "adapter":  # ten prompt vectors and a gate in all layers but the first two
        return (spec.num_layers - 2) * 10 * spec.hidden + spec.num_layers * spec.heads
    if method == "adapter_v2":  # also a scale and a bias for every output of a linear layer
        outputs = sum(w.columns * w.count for i in range(spec.num_layers) for w in spec.layer_weights(i) if w.is_matrix)
        return (spec.num_layers - 2) * 10 * spec.hidden + 2 * outputs
    raise UsageError(
        f"Unknown method {method!r}.", hint="Known: full, lora, qlora, adapter, adapter_v2, dpo, dpo-lora."
    )


@lru_cache(maxsize=1024)
def _counts(spec: ModelSpec) -> Parameters:
    return spec.parameters()


def states_per_rank(work: Workload, c: Mapping[str, float], stage: str = "first") -> float:
    """Bytes of weights, gradients and optimizer of a rank in the first or last pipeline stage."""
    spec, counts = work.spec, _counts(work.spec)
    layers = math.ceil(spec.num_layers / work.pp)
    deepest = counts.layers[-layers:] if stage == "last" else counts.layers[:layers]
    experts = sum(
        w.parameters
        for i in range(layers if spec.experts else 0)
        for w in spec.layer_weights(spec.num_layers - 1 - i if stage == "last" else i)
        if w.part == "experts"
    )
    values = (sum(deepest) - experts + experts / work.ep) / work.tp
    table = counts.embedding / work.tp
    if work.pp == 1:
        values += table + counts.head / work.tp + counts.positions
    else:
        values += table + (counts.positions if stage == "first" else 0)  # the last stage holds head or tied copy
    d = work.dp
    weights, grads, optimizer = 2.0, c["gradient_bytes"], 12.0 if not work.offload_optimizer else 0.0
    if work.zero >= 1:
        optimizer /= d
    if work.zero >= 2:
        grads /= d
    if work.zero >= 3:
        weights /= d
    gathered = 2 * 2.0 * max(counts.layers) / work.tp if work.zero >= 3 and d > 1 else 0.0
    return values * (weights + grads + optimizer) + gathered


def activations_per_rank(work: Workload, c: Mapping[str, float], stage: str = "first") -> tuple[float, float]:
    """(bytes kept for all micro-batches under way, bytes of the layer at work when activations are recomputed)."""
    spec = work.spec
    tokens = work.micro_batch * work.seq / work.cp
    one = inventory(spec, work.tp, work.seq_parallel)
    whole = one + (0.0 if work.flash else square(spec, work.seq, work.tp))
    layers = spec.num_layers / work.pp if work.vpp > 1 else math.ceil(spec.num_layers / work.pp)
    flying = min(work.num_micro_batches, work.pp) if stage == "first" else 1
    if work.vpp > 1 and stage == "first":
        flying = flying * (1 + (work.pp - 1) / (work.pp * work.vpp))  # type: ignore[assignment]
    if work.recompute == "full":
        per_layer = 2.0 * spec.hidden / (work.tp if work.seq_parallel else 1)
        return tokens * per_layer * layers * flying, tokens * whole * c["working_factor"]
    return tokens * (one if work.recompute == "selective" else whole) * layers * flying, 0.0


def _training(work: Workload, c: Mapping[str, float]) -> list[Term]:
    spec = work.spec
    found: list[list[Term]] = []
    for stage in ("first", "last") if work.pp > 1 else ("first",):
        kept, working = activations_per_rank(work, c, stage)
        tokens = work.micro_batch * work.seq / work.cp
        has_head = work.pp == 1 or stage == "last"
        logits = tokens * spec.vocab / work.tp * c["logit_bytes"] if has_head and not work.fused_loss else 0.0
        found.append(
            [
                Term(
                    "weights, gradients, optimizer", states_per_rank(work, c, stage), f"{stage} stage, ZeRO-{work.zero}"
                ),
                Term("activations", kept, f"{stage} stage, recompute {work.recompute}"),
                Term("layer at work", working, "inventory of one layer"),
                Term("logits", logits, f"{c['logit_bytes']:g} B x tokens x vocabulary / t"),
                Term("fixed", c["fixed_gib"] * GIB, "context, kernels, communication buffers"),
            ]
        )
    return max(found, key=lambda terms: sum(term.value for term in terms))
