"""The shape of a decoder language model, and every weight that follows from it.

One list of weights per layer (`layer_weights`) is the only description; parameter counts, bytes under quantisation,
LoRA sizes and shards are sums over it. Counts are exact: tests compare them with the model library and with published
totals.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from shoal.errors import UsageError

Part = Literal["attention", "mlp", "experts", "router", "norm"]
MAX_COUNT = 1 << 40
"""No width, depth or vocabulary is larger; a number beyond it is a slip of the keyboard."""


@dataclass(frozen=True, slots=True)
class Weight:
    """`count` tensors of `rows` x `columns` values in one layer; a vector (bias, norm) has one column."""

    name: str
    part: Part
    rows: int
    columns: int = 1
    count: int = 1

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.count

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix multiplied with activations: what gets quantised, sharded and adapted."""
        return self.columns > 1


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek V2, V3, Kimi): keys and values are kept as one latent vector per token."""

    q_rank: int
    """Width of the query's latent; 0: the query is projected directly."""
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name, least in (("q_rank", 0), ("kv_rank", 1), ("rope_dim", 0), ("nope_dim", 1), ("value_dim", 1)):
            if type(value := getattr(self, name)) is not int or not least <= value <= MAX_COUNT:
                raise _nonsense("Latent attention", name, value, f"a whole number, {least} or more")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of one model. `active` are those that one token uses: all but the experts it is not routed to."""

    total: int
    active: int
    embedding: int
    head: int
    """The output matrix when it is not the embedding itself, with its bias."""
    positions: int
    layers: tuple[int, ...]
    other: int
    """Final and embedding norms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What decides the size of a decoder: widths, depth, and which of the usual variants it has.

    Raises UsageError, naming the field, for values that no model can have.
    """

    name: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Inner width of a dense MLP; of one expert when `experts` and no `expert_ffn` is given."""
    vocab: int
    context: int = 0
    """Longest sequence it was made for, in tokens; 0: not known."""
    gated_mlp: bool = True
    """Three matrices (SwiGLU, GeGLU) instead of two."""
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm: Literal["rms", "layer", "none"] = "rms"
    """`none`: a norm without weights (OLMo 1)."""
    norm_bias: bool = False
    norms_per_layer: int = 2
    qk_norm: Literal["none", "head", "width", "per-head"] = "none"
    """Norms on queries and keys: of one head's size, of the whole width, or of the whole width without a key's own."""
    embedding_norm: bool = False
    positions: Literal["rope", "alibi", "learned"] = "rope"
    position_rows: int = 0
    attention_sinks: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Inner width of all shared experts together."""
    shared_gate: bool = False
    router_bias: bool = False
    dense_layers: int = 0
    """Leading layers without experts."""
    moe_every: int = 1
    """Every how many layers has experts (after the leading dense ones)."""
    mla: Mla | None = None
    sliding_window: int = 0
    window_pattern: int = 1
    """One layer in so many sees everything, the others only the window; 1 with a window: all have the window."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in ("int",) and (type(value) is not int or not 0 <= value <= MAX_COUNT):
                raise _nonsense(self.name, each.name, value, "a whole number, not negative")
        for name in ("num_layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "moe_every", "window_pattern"):
            if getattr(self, name) < 1:
                raise _nonsense(self.name, name, getattr(self, name), "1 or more")
        if self.num_layers > 10_000:
            raise _nonsense(self.name, "num_layers", self.num_layers, "at most 10000")
        if self.heads % self.kv_heads:
            raise _nonsense(self.name, "kv_heads", self.kv_heads, f"a divisor of heads ({self.heads})")
        if self.ffn < 1 and not (self.experts and self.expert_ffn):
            raise _nonsense(self.name, "ffn", self.ffn, "1 or more")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise _nonsense(self.name, "experts_per_token", self.experts_per_token, f"1 to experts ({self.experts})")
        if not self.experts and (self.experts_per_token or self.expert_ffn or self.shared_ffn):
            raise _nonsense(self.name, "experts", 0, "the number of experts, since other fields speak of them")
        if self.dense_layers > self.num_layers:
            raise _nonsense(self.name, "dense_layers", self.dense_layers, f"at most num_layers ({self.num_layers})")

    @property
    def q_width(self) -> int:
        """Columns of the query projection."""
        return self.heads * (self.mla.nope_dim + self.mla.rope_dim if self.mla else self.head_dim)

    @property
    def kv_width(self) -> int:
        """Columns of the key (or the value) projection."""
        return self.kv_heads * self.head_dim

    @property
    def expert_width(self) -> int:
        """Inner width of one expert."""
        return self.expert_ffn or self.ffn

    def has_experts(self, layer: int) -> bool:
        """Whether this layer (counted from 0) routes tokens to experts."""
        return bool(self.experts) and layer >= self.dense_layers and (layer + 1) % self.moe_every == 0

    def layer_weights(self, layer: int) -> tuple[Weight, ...]:
        """Every weight of one layer."""
        moe = self.has_experts(layer)
        return (*self._attention(), *(self._experts() if moe else self._dense_mlp()), *self._norms())

    def parameters(self) -> Parameters:
        """Exact counts."""
        embedding = self.vocab * self.hidden
        head = (0 if self.tied_embeddings else embedding) + (self.vocab if self.head_bias else 0)
        positions = self.position_rows * self.hidden if self.positions == "learned" else 0
        norms = 1 + self.embedding_norm
        other = norms * sum(each.parameters for each in self._norm("final"))
        dense, moe = self._layer_total(False), self._layer_total(True) if self.experts else 0
        layers = tuple(moe if self.has_experts(layer) else dense for layer in range(self.num_layers))
        total = embedding + head + positions + other + sum(layers)
        per_expert = self._expert_parameters()
        moe_layers = sum(self.has_experts(layer) for layer in range(self.num_layers))
        idle = moe_layers * (self.experts - self.experts_per_token) * per_expert
        return Parameters(total, total - idle, embedding, head, positions, layers, other)

    def kv_values_per_token(self) -> int:
        """Values that the cache holds for one token in all layers, windows aside."""
        if self.mla:
            return self.num_layers * (self.mla.kv_rank + self.mla.rope_dim)
        return 2 * self.num_layers * self.kv_width

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> float:
        """Bytes that the cache holds for one token in all layers, windows aside."""
        return self.kv_values_per_token() * bytes_per_value

    def kv_bytes(self, tokens: int, bytes_per_value: float = 2.0) -> float:
        """Bytes of one sequence's cache; layers with a sliding window keep no more than the window."""
        full = self.num_layers // self.window_pattern if self.window_pattern > 1 else 0
        if not self.sliding_window:
            full = self.num_layers
        kept = full * tokens + (self.num_layers - full) * min(tokens, self.sliding_window or tokens)
        return self.kv_bytes_per_token(bytes_per_value) / self.num_layers * kept

    def _layer_total(self, moe: bool) -> int:
        weights = (*self._attention(), *(self._experts() if moe else self._dense_mlp()), *self._norms())
        return sum(each.parameters for each in weights)

    def _attention(self) -> tuple[Weight, ...]:
        part: Part = "attention"
        if self.mla:
            return self._latent_attention(self.mla)
        q, kv = self.q_width, self.kv_width
        found = [
            Weight("q", part, self.hidden, q),
            Weight("k", part, self.hidden, kv),
            Weight("v", part, self.hidden, kv),
            Weight("o", part, q, self.hidden),
        ]
        if self.qkv_bias:
            found.append(Weight("qkv_bias", part, q + 2 * kv))
        if self.out_bias:
            found.append(Weight("o_bias", part, self.hidden))
        if self.attention_sinks:
            found.append(Weight("sinks", part, self.heads))
        if self.qk_norm == "head":
            found.append(Weight("qk_norm", "norm", 2 * self.head_dim))
        elif self.qk_norm != "none":
            found.append(Weight("qk_norm", "norm", q + kv))
        return tuple(found)

    def _latent_attention(self, mla: Mla) -> tuple[Weight, ...]:
        part: Part = "attention"
        found = [
            Weight("kv_a", part, self.hidden, mla.kv_rank + mla.rope_dim),
            Weight("kv_a_norm", "norm", mla.kv_rank),
            Weight("kv_b", part, mla.kv_rank, self.heads * (mla.nope_dim + mla.value_dim)),
            Weight("o", part, self.heads * mla.value_dim, self.hidden),
        ]
        if mla.q_rank:
            found += [
                Weight("q_a", part, self.hidden, mla.q_rank),
                Weight("q_a_norm", "norm", mla.q_rank),
                Weight("q_b", part, mla.q_rank, self.q_width),
            ]
        else:
            found.append(Weight("q", part, self.hidden, self.q_width))
        return tuple(found)

    def _mlp(self, prefix: str, part: Part, width: int, count: int = 1) -> list[Weight]:
        found = [
            Weight(f"{prefix}up", part, self.hidden, width, count),
            Weight(f"{prefix}down", part, width, self.hidden, count),
        ]
        if self.gated_mlp:
            found.append(Weight(f"{prefix}gate", part, self.hidden, width, count))
        if self.mlp_bias:
            found.append(Weight(f"{prefix}bias", part, width * (2 if self.gated_mlp else 1) + self.hidden, 1, count))
        return found

    def _dense_mlp(self) -> tuple[Weight, ...]:
        return tuple(self._mlp("", "mlp", self.ffn))

    def _experts(self) -> tuple[Weight, ...]:
        found = [Weight("router", "router", self.hidden, self.experts)]
        if self.router_bias:
            found.append(Weight("router_bias", "router", self.experts))
        found += self._mlp("expert_", "experts", self.expert_width, self.experts)
        if self.shared_ffn:
            found += self._mlp("shared_", "mlp", self.shared_ffn)
        if self.shared_gate:
            found.append(Weight("shared_gate", "router", self.hidden))
        return tuple(found)

    def _expert_parameters(self) -> int:
        return sum(each.parameters for each in self._mlp("", "experts", self.expert_width)) if self.experts else 0

    def _norm(self, name: str, count: int = 1) -> tuple[Weight, ...]:
        if self.norm == "none":
            return ()
        return (Weight(name, "norm", self.hidden * (2 if self.norm_bias else 1), 1, count),)

    def _norms(self) -> tuple[Weight, ...]:
        return self._norm("norms", self.norms_per_layer) if self.norms_per_layer else ()


SHAPE_NAMES = {
    "layers": "num_layers",
    "hidden": "hidden",
    "heads": "heads",
    "kv_heads": "kv_heads",
    "head_dim": "head_dim",
    "ffn": "ffn",
    "vocab": "vocab",
    "context": "context",
    "experts": "experts",
    "experts_per_token": "experts_per_token",
    "expert_ffn": "expert_ffn",
}
SHAPE_FORM = "layers=32,hidden=4096,heads=32,kv_heads=8,ffn=14336,vocab=128256"


def parse_shape(text: str) -> ModelSpec:
    """ "layers=32,hidden=4096,..." -> a model of Llama's make in that shape; `tied` and `ungated` may be added.

    Raises UsageError for a name it does not know, a number it cannot read, or a needed one that is missing.
    """
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, number = (each.strip() for each in item.partition("="))
        if key in ("tied", "ungated") and not equals:
            values["tied_embeddings" if key == "tied" else "gated_mlp"] = key == "tied"
            continue
        if key not in SHAPE_NAMES:
            known = ", ".join(SHAPE_NAMES)
            raise UsageError(
                f"A model's shape has no {key!r}.", hint=f"Known: {known}, tied, ungated. Form: {SHAPE_FORM}"
            )
        if not number.isascii() or not number.isdigit():
            raise UsageError(f"{key}={number} is no whole number.", hint=f"Write it without units: {SHAPE_FORM}")
        values[SHAPE_NAMES[key]] = int(number)
    missing = [key for key in ("layers", "hidden", "heads", "ffn", "vocab") if SHAPE_NAMES[key] not in values]
    if missing:
        raise UsageError(f"The shape lacks {', '.join(missing)}.", hint=f"Form: {SHAPE_FORM}")
    values.setdefault("kv_heads", values["heads"])
    if "head_dim" not in values:
        values["head_dim"] = head_dim_of("the given shape", values["hidden"], values["heads"])
    return ModelSpec(name=text, **values)


def head_dim_of(name: str, hidden: int, heads: int) -> int:
    """The head size that follows from the width. Raises UsageError when the heads do not divide it."""
    if heads < 1 or hidden % heads:
        raise _nonsense(name, "heads", heads, f"a divisor of hidden ({hidden}), or give head_dim")
    return hidden // heads


def _nonsense(model: str, field: str, value: object, accepted: str) -> UsageError:
    return UsageError(f"{model or 'The model'}: {field} is {value!r}.", hint=f"{field} must be {accepted}.")
