"""What a Hugging Face config.json means, family by family: names of its fields, and what the family leaves unsaid.

Every line here is tested against the model library: a small model of each family has exactly as many parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shoal.errors import UsageError
from shoal.spec.model import Mla, ModelSpec, head_dim_of

Config = Mapping[str, Any]
Fields = dict[str, Any]

NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"),
}
FOUR_TIMES = frozenset({"bloom", "gpt2", "gptj", "falcon", "mpt", "gpt_bigcode", "gpt_neo"})
"""Families whose MLP is four times as wide as the model when the config does not say otherwise."""
TIED = frozenset(
    {"bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode"}
    | {"gpt_neo", "mpt", "opt", "starcoder2"}
)
"""Families that share embedding and head unless the config denies it."""
LAYER_NORM: Fields = {"norm": "layer", "norm_bias": True}
ALL_BIASES: Fields = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}


def from_config(config: Config, name: str = "") -> ModelSpec:
    """The model that a Hugging Face config.json describes; `name` overrides the config's own.

    Raises UsageError, naming the field, for families it does not know, missing fields and nonsense.
    """
    try:
        return ModelSpec(**_fields(config, name))
    except KeyError as missing:
        raise UsageError(
            f"{name or 'The model'}: config lacks {missing.args[0]}.",
            hint="Models of this family cannot do without it.",
        ) from None
    except (TypeError, ValueError) as wrong:
        raise UsageError(
            f"{name or 'The model'}: config has a field of the wrong type ({wrong}).", hint="Sizes are whole numbers."
        ) from None


def _fields(config: Config, name: str) -> Fields:
    outer = config
    if isinstance(inner := config.get("text_config"), Mapping):  # a model that sees pictures, too: its language part
        config = {"tie_word_embeddings": outer.get("tie_word_embeddings", None), **inner}
        config = {key: value for key, value in config.items() if value is not None}
    family = config.get("model_type") or outer.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(f"config: model_type {family!r} is not known.", hint=f"Known: {known}; or give a shape.")
    name = name or str(outer.get("_name_or_path") or family)
    found: Fields = {"name": name}
    for field, keys in NAMES.items():
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if value is not None:
            found[field] = _whole(name, field, value)
    for field in ("num_layers", "hidden", "heads", "vocab"):
        if field not in found:
            raise UsageError(f"{name}: config has no {field}.", hint=f"Give one of: {', '.join(NAMES[field])}.")
    if "ffn" not in found and family in FOUR_TIMES:
        found["ffn"] = 4 * found["hidden"]
    found["kv_heads"] = _whole(name, "num_key_value_heads", config.get("num_key_value_heads") or found["heads"])
    found["tied_embeddings"] = bool(config.get("tie_word_embeddings", family in TIED))
    found |= FAMILIES[family](config, found)
    if "ffn" not in found:
        raise UsageError(f"{name}: config has no ffn.", hint=f"Give one of: {', '.join(NAMES['ffn'])}.")
    if "head_dim" not in found:
        given = config.get("head_dim")
        found["head_dim"] = given if given is not None else head_dim_of(name, found["hidden"], found["heads"])
    if not found.get("context"):
        found.pop("context", None)
    return found


def _whole(name: str, field: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise UsageError(f"{name}: {field} is {value!r}.", hint=f"{field} must be a whole number, 1 or more.")
    return value


def _llama(config: Config, found: Fields) -> Fields:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _windowed(config: Config, found: Fields) -> Fields:
    return {**_llama(config, found), "sliding_window": config.get("sliding_window") or 0}


def _mixtral(config: Config, found: Fields) -> Fields:
    return {
        **_windowed(config, found),
        "experts": config.get("num_local_experts", config.get("num_experts", 8)),
        "experts_per_token": config.get("num_experts_per_tok", 2),
    }


def _qwen2(config: Config, found: Fields) -> Fields:
    return {"qkv_bias": True}


def _qwen2_moe(config: Config, found: Fields) -> Fields:
    return {
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "experts": config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_ffn": config["moe_intermediate_size"],
        "shared_ffn": config["shared_expert_intermediate_size"],
        "shared_gate": True,
    }


def _qwen3(config: Config, found: Fields) -> Fields:
    return {**_llama(config, found), "qk_norm": "head", "head_dim": config.get("head_dim", 128)}


def _qwen3_moe(config: Config, found: Fields) -> Fields:
    return {
        **_qwen3(config, found),
        "experts": config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_ffn": config["moe_intermediate_size"],
    }


def _gemma(config: Config, found: Fields) -> Fields:
    return {**_llama(config, found), "head_dim": config.get("head_dim", 256)}


def _gemma2(config: Config, found: Fields) -> Fields:
    window = config.get("sliding_window") or 0
    return {**_gemma(config, found), "norms_per_layer": 4, "sliding_window": window, "window_pattern": 2}


def _gemma3(config: Config, found: Fields) -> Fields:
    pattern = config.get("sliding_window_pattern") or 6
    return {**_gemma2(config, found), "qk_norm": "head", "window_pattern": pattern}


def _deepseek(config: Config, found: Fields) -> Fields:
    mla = Mla(
        q_rank=config.get("q_lora_rank") or 0,
        kv_rank=config["kv_lora_rank"],
        rope_dim=config["qk_rope_head_dim"],
        nope_dim=config["qk_nope_head_dim"],
        value_dim=config["v_head_dim"],
    )
    return {
        "mla": mla,
        "head_dim": mla.nope_dim + mla.rope_dim,
        "kv_heads": found["heads"],
        "experts": config["n_routed_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_ffn": config["moe_intermediate_size"],
        "shared_ffn": config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
        "dense_layers": config.get("first_k_dense_replace", 0),
    }


def _deepseek_v3(config: Config, found: Fields) -> Fields:
    return {**_deepseek(config, found), "router_bias": True}


def _glm4_moe(config: Config, found: Fields) -> Fields:
    return {
        "qkv_bias": bool(config.get("attention_bias", False)),
        "qk_norm": "head" if config.get("use_qk_norm") else "none",
        "head_dim": config.get("head_dim", 128),
        "experts": config["n_routed_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_ffn": config["moe_intermediate_size"],
        "shared_ffn": config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
        "dense_layers": config.get("first_k_dense_replace", 0),
        "router_bias": True,
    }


def _glm4(config: Config, found: Fields) -> Fields:
    return {
        "qkv_bias": bool(config.get("attention_bias", False)),
        "norms_per_layer": 4,
        "head_dim": config.get("head_dim", 128),
    }


def _llama4(config: Config, found: Fields) -> Fields:
    return {
        "ffn": config.get("intermediate_size_mlp", found["ffn"]),
        "head_dim": config.get("head_dim", 128),
        "experts": config["num_local_experts"],
        "experts_per_token": config.get("num_experts_per_tok", 1),
        "expert_ffn": found["ffn"],
        "shared_ffn": found["ffn"],
        "moe_every": config.get("interleave_moe_layer_step", 1),
    }


def _gpt_oss(config: Config, found: Fields) -> Fields:
    return {
        **ALL_BIASES,
        "head_dim": config.get("head_dim", 64),
        "attention_sinks": True,
        "experts": config["num_local_experts"],
        "experts_per_token": config.get("num_experts_per_tok", 4),
        "router_bias": True,
        "sliding_window": config.get("sliding_window") or 0,
        "window_pattern": 2,
    }


def _olmo(config: Config, found: Fields) -> Fields:
    return {**_llama(config, found), "norm": "none"}


def _olmo2(config: Config, found: Fields) -> Fields:
    return {**_llama(config, found), "qk_norm": "width"}


def _olmoe(config: Config, found: Fields) -> Fields:
    return {
        **_olmo2(config, found),
        "experts": config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
    }


def _phi(config: Config, found: Fields) -> Fields:
    return {**LAYER_NORM, **ALL_BIASES, "gated_mlp": False, "norms_per_layer": 1, "head_bias": True}


def _phimoe(config: Config, found: Fields) -> Fields:
    bias = bool(config.get("attention_bias", False))
    return {
        **LAYER_NORM,
        "qkv_bias": bias,
        "out_bias": bias,
        "head_bias": bool(config.get("lm_head_bias", False)),
        "experts": config["num_local_experts"],
        "experts_per_token": config.get("num_experts_per_tok", 2),
    }


def _gpt_neox(config: Config, found: Fields) -> Fields:
    bias = bool(config.get("attention_bias", True))
    return {**LAYER_NORM, "qkv_bias": bias, "out_bias": bias, "mlp_bias": True, "gated_mlp": False}


def _falcon(config: Config, found: Fields) -> Fields:
    bias = bool(config.get("bias", False))
    grouped = bool(config.get("new_decoder_architecture", False))
    parallel = bool(config.get("parallel_attn", True))
    kv_heads = (
        config.get("num_kv_heads") or found["heads"]
        if grouped
        else 1
        if config.get("multi_query", True)
        else found["heads"]
    )
    return {
        **LAYER_NORM,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "gated_mlp": False,
        "kv_heads": kv_heads,
        "norms_per_layer": 2 if grouped or not parallel else 1,
        "positions": "alibi" if config.get("alibi") else "rope",
    }


def _opt(config: Config, found: Fields) -> Fields:
    if config.get("word_embed_proj_dim", found["hidden"]) != found["hidden"]:
        raise UsageError(
            f"{found['name']}: word_embed_proj_dim differs from hidden_size.",
            hint="Only OPT models without it are known.",
        )
    rows = found.get("context", 2048) + 2
    return {
        **LAYER_NORM,
        **ALL_BIASES,
        "gated_mlp": False,
        "positions": "learned",
        "position_rows": rows,
        "kv_heads": found["heads"],
    }


def _bloom(config: Config, found: Fields) -> Fields:
    return {**LAYER_NORM, **ALL_BIASES, "gated_mlp": False, "positions": "alibi", "embedding_norm": True}


def _gpt2(config: Config, found: Fields) -> Fields:
    rows = found.get("context", 1024)
    kv = 1 if config.get("multi_query") else found["heads"]
    return {
        **LAYER_NORM,
        **ALL_BIASES,
        "gated_mlp": False,
        "positions": "learned",
        "position_rows": rows,
        "kv_heads": kv,
    }


def _gpt_neo(config: Config, found: Fields) -> Fields:
    return {**_gpt2(config, found), "qkv_bias": False, "kv_heads": found["heads"]}


def _gptj(config: Config, found: Fields) -> Fields:
    return {**LAYER_NORM, "mlp_bias": True, "gated_mlp": False, "norms_per_layer": 1, "head_bias": True}


def _mpt(config: Config, found: Fields) -> Fields:
    biased = not config.get("no_bias", True)
    ratio = config.get("expansion_ratio", 4)
    return {
        "norm": "layer",
        "norm_bias": biased,
        "qkv_bias": biased,
        "out_bias": biased,
        "mlp_bias": biased,
        "gated_mlp": False,
        "ffn": ratio * found["hidden"],
        "positions": "alibi",
    }


def _starcoder2(config: Config, found: Fields) -> Fields:
    bias = bool(config.get("use_bias", True))
    return {
        **LAYER_NORM,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "gated_mlp": False,
        "sliding_window": config.get("sliding_window") or 0,
    }


def _stablelm(config: Config, found: Fields) -> Fields:
    parallel = bool(config.get("use_parallel_residual", False))
    return {**LAYER_NORM, "qkv_bias": bool(config.get("use_qkv_bias", False)), "norms_per_layer": 1 if parallel else 2}


def _cohere(config: Config, found: Fields) -> Fields:
    bias = bool(config.get("attention_bias", False))
    norm = "per-head" if config.get("use_qk_norm") else "none"
    return {"norm": "layer", "norms_per_layer": 1, "qkv_bias": bias, "out_bias": bias, "qk_norm": norm}


def _cohere2(config: Config, found: Fields) -> Fields:
    pattern = config.get("sliding_window_pattern") or 4
    return {**_cohere(config, found), "sliding_window": config.get("sliding_window") or 0, "window_pattern": pattern}


def _dbrx(config: Config, found: Fields) -> Fields:
    attention, mlp = config["attn_config"], config["ffn_config"]
    return {
        "norm": "layer",
        "kv_heads": attention["kv_n_heads"],
        "ffn": mlp["ffn_hidden_size"],
        "experts": mlp["moe_num_experts"],
        "experts_per_token": mlp["moe_top_k"],
    }


def _nemotron(config: Config, found: Fields) -> Fields:
    return {**LAYER_NORM, **_llama(config, found), "gated_mlp": False}


FAMILIES: dict[str, Callable[[Config, Fields], Fields]] = {
    "bloom": _bloom,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "dbrx": _dbrx,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek_v3,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "gptj": _gptj,
    "granite": _llama,
    "granitemoe": _mixtral,
    "kimi_k2": _deepseek_v3,
    "llama": _llama,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "mistral": _windowed,
    "mistral3": _windowed,
    "mixtral": _mixtral,
    "mpt": _mpt,
    "nemotron": _nemotron,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "olmo3": _olmo2,
    "olmoe": _olmoe,
    "opt": _opt,
    "phi": _phi,
    "phi3": _llama,
    "phimoe": _phimoe,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _llama,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
