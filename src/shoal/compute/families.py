"""Tiny random models of the decoder families that shoal is checked with.

Every family is its own transformers configuration at toy size: 6 layers, hidden size 64, and a sliding window of 8
tokens where the family has one. `shoal bench split` and the tests cut these models and compare; nothing is downloaded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from shoal.compute.stage import build_skeleton
from shoal.errors import CannotSplit, UsageError

LAYERS = 6
WINDOW = 8
MAX_PARAMETERS = 20_000_000
"""A "tiny" model of an unlisted family that is larger than this has not understood COMMON."""

# Given to every family whose configuration knows the name (aliases such as n_embd are transformers' business).
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "ffn_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 3,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention and its sparse index
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 8,
    # state spaces and linear attention
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

# Latent attention expands to one key per head; its rotary part is what the configuration calls head_dim.
_LATENT = {"num_key_value_heads": 4, "head_dim": COMMON["qk_rope_head_dim"]}
_SCALED = {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
_ATTENTION_EVERY_THIRD = ["linear_attention", "linear_attention", "full_attention"] * 2

# Families that are cut, with what they need beside COMMON.
SPLIT: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": _LATENT,
    "bailing_hybrid": {**_LATENT, "layer_types": _ATTENTION_EVERY_THIRD},
    "bamba": {"attn_layer_indices": [2, 5]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "ctrl": {"dff": 64, "n_positions": 128},
    "cwm": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 128},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": {**_LATENT, "indexer_types": ["full", "full", "shared", "full", "shared", "full"]},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 8},
    "granite": _SCALED,
    "granitemoe": _SCALED,
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "inkling_text": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2},
    "jetmoe": {},
    "kimi_linear": {
        **_LATENT,
        "layer_types": _ATTENTION_EVERY_THIRD,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_expert_group": 1,
    },
    "laguna": {},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "lfm3": {},
    "llama": {},
    "llama4_text": {},
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": _LATENT,
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"] * 2,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {"layer_types": _ATTENTION_EVERY_THIRD},
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_text": {"layer_types": _ATTENTION_EVERY_THIRD},
    "qwen3_5_moe_text": {"layer_types": _ATTENTION_EVERY_THIRD},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": _ATTENTION_EVERY_THIRD},
    "recurrent_gemma": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": {},
    "xglm": {},
    "youtu": _LATENT,
}

# Families that are refused, here so that `shoal bench split` shows the reason.
REFUSED = (
    "bart",
    "bert",
    "deepseek_v4",
    "gemma3n_text",
    "gemma4_text",
    "hy_v4",
    "inkling2_text",
    "minimax",
    "openai-gpt",
    "rwkv",
    "xlstm",
    "zamba",
    "zamba2",
    "zaya",
)

FAMILIES = (*SPLIT, *REFUSED)


# Families whose layers read their input several times over: where a cut makes that input a leaf of the graph, autograd
# adds the same gradients up in another order. Forward passes are exact; this is the rounding seen in gradients.
ROUNDED_GRADIENTS = {"doge": 1e-7, "inkling_text": 1e-7}


def check_family(name: str) -> None:
    """Raise UsageError for a family that transformers does not have."""
    if name not in CONFIG_MAPPING:
        raise UsageError(f"transformers has no family {name!r}.", hint=f"Listed ones: {', '.join(sorted(FAMILIES))}.")


def tiny_config(family: str) -> PretrainedConfig:
    """The toy configuration of a family: exact for listed ones, COMMON alone for others. Raises UsageError."""
    check_family(family)
    cls = CONFIG_MAPPING[family]
    if family in REFUSED:
        return cls()
    known = cls()
    common = {name: value for name, value in COMMON.items() if _settable(known, name)}
    return cls(**{**common, **SPLIT.get(family, {})})


def _settable(config: PretrainedConfig, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    if name == "sliding_window" and getattr(config, name, None) is None:
        return False  # the family can have one, but its published models do not
    return hasattr(config, name)


def random_model(family: str, *, seed: int = 0, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A tiny fp32 model with random weights, the same for the same seed; no parameter asks for a gradient.

    Matrices are drawn with variance 1 / (2 fan-in): at the usual 0.02 all logits of a tiny model are nearly equal, and
    an error in a mask or a window would hide in the rounding.
    """
    config = tiny_config(family)
    if sum(parameter.numel() for parameter in build_skeleton(config, torch.float32).parameters()) > MAX_PARAMETERS:
        raise CannotSplit(f"shoal knows no tiny model of the {family!r} family to check it with")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # some families draw decay rates when they are built
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim >= 2:
                parameter.copy_(noise / math.sqrt(2 * parameter.shape[-1]))
            else:
                parameter.add_(0.1 * noise)
            parameter.requires_grad_(False)
    return model.to(device)
