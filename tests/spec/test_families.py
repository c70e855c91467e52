"""Each family's rule against the model library itself: a small model of it has exactly as many parameters."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.spec.families import FAMILIES, from_config

BASE = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 90,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_group": 2,
    "topk_group": 1,
}
FALCON = {key: value for key, value in BASE.items() if key not in ("intermediate_size", "num_key_value_heads")}
GPT = {"n_layer": 3, "n_embd": 48, "n_head": 4, "vocab_size": 90, "n_positions": 32}

CASES: list[dict[str, Any]] = [
    {"model_type": "llama", **BASE},
    {
        "model_type": "llama",
        **BASE,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 8,
    },
    {"model_type": "mistral", **BASE},
    {"model_type": "mixtral", **BASE, "num_local_experts": 4},
    {"model_type": "qwen2", **BASE},
    {"model_type": "qwen2_moe", **BASE, **EXPERTS, "shared_expert_intermediate_size": 32},
    {"model_type": "qwen3", **BASE, "head_dim": 16},
    {"model_type": "qwen3_moe", **BASE, **EXPERTS, "head_dim": 16},
    {"model_type": "gemma", **BASE, "head_dim": 16},
    {"model_type": "gemma2", **BASE, "head_dim": 16},
    {"model_type": "gemma3_text", **BASE, "head_dim": 16},
    {"model_type": "deepseek_v2", **BASE, **ROUTED, **LATENT, "q_lora_rank": None, "first_k_dense_replace": 1},
    {"model_type": "deepseek_v3", **BASE, **ROUTED, **LATENT, "q_lora_rank": 20, "first_k_dense_replace": 1},
    {"model_type": "glm4", **BASE, "attention_bias": True, "head_dim": 12},
    {"model_type": "glm4_moe", **BASE, **ROUTED, "attention_bias": True, "use_qk_norm": True, "head_dim": 12},
    {"model_type": "olmo", **BASE},
    {"model_type": "olmo2", **BASE},
    {"model_type": "olmo3", **BASE},
    {"model_type": "olmoe", **BASE, "num_experts": 6, "num_experts_per_tok": 2},
    {"model_type": "phi", **BASE},
    {"model_type": "phi3", **BASE},
    {"model_type": "phimoe", **BASE, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    {"model_type": "gpt_neox", **{**BASE, "num_key_value_heads": 4}},
    {"model_type": "falcon", **FALCON, "bias": False},
    {"model_type": "falcon", **FALCON, "bias": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    {"model_type": "falcon", **FALCON, "bias": True, "multi_query": False, "parallel_attn": False, "alibi": True},
    {"model_type": "opt", **BASE, "ffn_dim": 80, "word_embed_proj_dim": 48},
    {"model_type": "bloom", "n_layer": 3, "hidden_size": 48, "n_head": 4, "vocab_size": 90},
    {"model_type": "gpt2", **GPT},
    {"model_type": "gptj", **GPT, "rotary_dim": 4},
    {"model_type": "gpt_bigcode", **GPT, "multi_query": True},
    {
        "model_type": "gpt_neo",
        **{**BASE, "num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
    },
    {"model_type": "mpt", "n_layers": 3, "d_model": 48, "n_heads": 4, "vocab_size": 90},
    {"model_type": "gpt_oss", **BASE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "stablelm", **BASE, "use_qkv_bias": True},
    {"model_type": "starcoder2", **BASE},
    {"model_type": "cohere", **BASE},
    {"model_type": "cohere", **BASE, "use_qk_norm": True},
    {"model_type": "cohere2", **BASE},
    {"model_type": "granite", **BASE},
    {"model_type": "granitemoe", **BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "nemotron", **BASE},
    {"model_type": "smollm3", **BASE},
    {
        "model_type": "llama4_text",
        **BASE,
        "head_dim": 12,
        "intermediate_size_mlp": 100,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
    },
    {
        "model_type": "dbrx",
        "n_layers": 3,
        "d_model": 48,
        "n_heads": 4,
        "vocab_size": 90,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2},
    },
]
# Read like another family, and without a class of their own to compare with here.
SAME_AS_ANOTHER = {"kimi_k2", "mistral3", "gemma3", "llama4"}


def test_every_family_is_compared() -> None:
    assert {case["model_type"] for case in CASES} | SAME_AS_ANOTHER == set(FAMILIES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["model_type"])
def test_a_small_model_of_the_family_has_exactly_as_many_parameters(case: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in case.items() if key != "model_type"}
    config = AutoConfig.for_model(case["model_type"], **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    # The balancing bias of routers is a buffer there; published weights and counts have it.
    balancing = sum(value.numel() for name, value in model.named_buffers() if name.endswith("e_score_correction_bias"))

    spec = from_config({**config.to_dict(), **case})

    assert spec.parameters().total == sum(p.numel() for p in model.parameters()) + balancing
