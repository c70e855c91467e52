"""Bits per weight of the formats that weights are kept in, and of which weights.

Block formats are counted with their scales. Mixed GGUF files follow the rules of llama.cpp's quantiser tensor by tensor
(which tensors get more bits, by layer), so no average per model is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from shoal.errors import UsageError
from shoal.spec.model import ModelSpec

FORMS = (
    "fp32, bf16, fp16, fp8, int8, nf4, nf4-dq, int4-awq-g128, gptq-4bit-g128, exl2-4.0bpw, mxfp4, q40, or a GGUF type"
)

BLOCK_BITS = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q4_K": 4.5, "Q4_0": 4.5,
    "Q5_0": 5.5, "Q3_K": 3.4375, "Q2_K": 2.625, "IQ4_NL": 4.5, "IQ4_XS": 4.25, "IQ3_S": 3.4375, "IQ3_XXS": 3.0625,
    "IQ2_S": 2.5625, "IQ2_XS": 2.3125, "IQ2_XXS": 2.0625, "IQ1_M": 1.75, "IQ1_S": 1.5625,
}  # fmt: skip
"""Bits per weight of one tensor in each GGUF block type, scales included."""

MIX_BASE = {
    "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS",
}  # fmt: skip
"""The block type that most tensors of a file type have, where it is not the file type itself."""

VERY_SMALL = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are kept: the matrices of the layers, and all the rest (embedding, head, vectors)."""

    name: str
    matrix_bits: float
    other_bits: float = 16.0
    head_is_matrix: bool = False
    """Whether the output matrix is kept like those of the layers."""
    gguf: str = ""


def parse_precision(text: str) -> Precision:
    """The format that tools write: "bf16-true", "bnb.nf4-dq", "gptq-4bit-g128", "Q4_K_M". Raises UsageError."""
    name = text.split(" ")[0].strip()
    low = name.lower().removeprefix("bnb.").removesuffix("-true").removeprefix("amp_").split("/")[0]
    upper = name.upper()
    if low in ("fp32", "float32"):
        return Precision(text, 32.0, 32.0)
    if low in ("bf16", "fp16", "float16", "bfloat16"):
        return Precision(text, 16.0)
    if upper in BLOCK_BITS or upper in MIX_BASE:
        return Precision(text, BLOCK_BITS[MIX_BASE.get(upper, upper)], gguf=upper)
    if low in ("fp8", "int8", "llm.int8", "mxfp8"):
        return Precision(text, 8.25 if low == "mxfp8" else 8.0)
    if low in ("nf4", "fp4"):
        return Precision(text, 4.0 + 32 / 64)
    if low in ("nf4-dq", "fp4-dq"):
        return Precision(text, 4.0 + 8 / 64 + 32 / (64 * 256))
    if low in ("mxfp4", "nvfp4"):
        return Precision(text, 4.0 + 8 / (32 if low == "mxfp4" else 16))
    if low == "q40":
        return Precision(text, 4.0 + 16 / 32, 32.0, head_is_matrix=True)
    if match := re.fullmatch(r"(?:int4-)?awq(?:-g(\d+))?|int4-awq-g?(\d+)?|gptq-(\d)bit-g(\d*)-?", low):
        group = int(match[1] or match[2] or match[4] or (0 if low.startswith("gptq") else 128))
        bits = float(match[3] or 4)
        return Precision(text, bits + ((16 + bits) / group if group else 0.0))
    if match := re.fullmatch(r"exl2-(\d+(?:\.\d+)?)bpw", low):
        return Precision(text, float(match[1]))
    raise UsageError(f"Unknown precision {text!r}.", hint=f"Known: {FORMS}.")


@lru_cache(maxsize=1024)
def weight_bytes(spec: ModelSpec, precision: Precision) -> float:
    """Bytes of all weights of a model in that format."""
    if precision.gguf and BLOCK_BITS[MIX_BASE.get(precision.gguf, precision.gguf)] < 16:
        return _gguf_bytes(spec, precision.gguf)
    matrices, others = split_counts(spec)
    head = spec.parameters().head
    if precision.head_is_matrix:
        # Such a file has an output matrix of its own even where the model shares it with the embedding.
        matrices, others = matrices + spec.vocab * spec.hidden, others - head
    return matrices * precision.matrix_bits / 8 + others * max(precision.other_bits, precision.matrix_bits) / 8


@lru_cache(maxsize=1024)
def split_counts(spec: ModelSpec) -> tuple[int, int]:
    """(values in the matrices of the layers, all others)."""
    matrices = sum(
        weight.parameters
        for layer in range(spec.num_layers)
        for weight in spec.layer_weights(layer)
        if weight.is_matrix and weight.part != "router"
    )
    return matrices, spec.parameters().total - matrices


def _gguf_bytes(spec: ModelSpec, mix: str) -> float:
    counts = spec.parameters()
    if spec.tied_embeddings:  # the one table is kept like an output matrix
        bits = counts.embedding * _head_bits(mix)
    else:
        bits = counts.embedding * _embedding_bits(mix) + counts.head * _head_bits(mix)
    bits += 32.0 * (counts.positions + counts.other)
    for layer in range(spec.num_layers):
        for weight in spec.layer_weights(layer):
            plain = not weight.is_matrix or weight.part == "router"
            bits += weight.parameters * (32.0 if plain else BLOCK_BITS[_tensor_type(spec, mix, weight.name, layer)])
    return bits / 8


def _head_bits(mix: str) -> float:
    if mix == "Q8_0":
        return BLOCK_BITS["Q8_0"]
    return BLOCK_BITS["Q5_K" if mix in VERY_SMALL or mix == "IQ3_XXS" else "Q6_K"]


def _embedding_bits(mix: str) -> float:
    if mix in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return BLOCK_BITS["IQ3_S"]
    if mix in VERY_SMALL:
        return BLOCK_BITS["Q2_K"]
    return BLOCK_BITS[MIX_BASE.get(mix, mix)]


def _tensor_type(spec: ModelSpec, mix: str, name: str, layer: int) -> str:
    """The block type of one matrix of a layer, as llama.cpp's quantiser chooses it."""
    base = MIX_BASE.get(mix, mix)
    name = name.removeprefix("expert_").removeprefix("shared_")
    if name == "v":
        return _value_type(spec, mix, base, layer)
    if name == "down":
        return _down_type(spec, mix, base, layer)
    if name == "o":
        if mix in VERY_SMALL:
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(mix, base)
        mixes = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return mixes.get(mix, base)
    if name in ("q", "k"):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix, base)
    inner = spec.num_layers // 8 <= layer < 7 * spec.num_layers // 8
    return "IQ3_XXS" if mix == "IQ3_XS" and inner and name in ("gate", "up") else base


def _value_type(spec: ModelSpec, mix: str, base: str, layer: int) -> str:
    grouped = spec.heads // spec.kv_heads >= 4
    if mix in VERY_SMALL:
        return "Q4_K" if grouped else "IQ3_S" if mix in ("IQ2_S", "IQ2_M") else "Q2_K"
    chosen = base
    if mix in ("Q2_K", "IQ3_XXS"):
        chosen = "Q4_K" if grouped else {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S"}[mix]
    elif mix == "IQ3_M" or (grouped and mix in ("Q2_K_S", "IQ3_XS", "IQ3_S")):
        chosen = "Q4_K"
    elif mix == "Q3_K_M":
        chosen = "Q5_K" if layer < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (grouped and mix in ("IQ4_NL", "IQ4_XS")) or (mix == "Q4_K_S" and layer < 4):
        chosen = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(spec, layer):
        chosen = "Q6_K"
    # With eight query heads to a value head the matrix is so small that more bits cost next to nothing.
    return "Q5_K" if spec.num_layers == 80 and chosen in ("Q3_K", "Q4_K") else chosen


def _down_type(spec: ModelSpec, mix: str, base: str, layer: int) -> str:
    first = layer < spec.num_layers // 8
    if mix in VERY_SMALL:
        return ("IQ3_S" if mix in ("IQ2_S", "IQ2_M") else "Q2_K") if first else base
    if mix == "Q3_K_M":
        return "Q5_K" if layer < spec.num_layers // 16 else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(spec, layer) else base
    if mix == "IQ3_XXS":
        return "Q4_K" if first else base
    always = {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}
    if mix in always:
        return always[mix]
    at_first = {"Q2_K_S": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_S": "Q5_K"}
    return at_first.get(mix, base) if first else base


def _more_bits(spec: ModelSpec, layer: int) -> bool:
    eighth = spec.num_layers // 8
    return layer < eighth or layer >= 7 * spec.num_layers // 8 or (layer - eighth) % 3 == 2
