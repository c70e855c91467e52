"""The serving path gives every family's own numbers: engine against the whole Hugging Face model, fp32, 1e-5.

Sessions of different lengths run interleaved, prefill comes in chunks beside other sessions' decode rows, and contexts
are longer than the sliding window (8) and the attention chunk (8) of the families that have one.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shoal.compute.engine import BlockEngine, Work
from shoal.compute.head import HeadEngine
from shoal.compute.split import Ends, Stage
from shoal.errors import UsageError
from shoal.spec.ids import BlockRange

VOCAB = 96
LAYERS = 4
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
GPT2 = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCAB, "n_positions": 128}
MAMBA = {"hidden_size": 32, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "state_size": 8}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

PACKED = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 8},
    "qwen3": LLAMA | {"head_dim": 16},
    "gemma2": LLAMA | {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": LLAMA | {"head_dim": 16, "sliding_window": 8},
    "gpt_oss": LLAMA | {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": LLAMA
    | {
        "head_dim": 16,
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1,
    },
    "deepseek_v3": LLAMA | MLA,
    "gpt2": GPT2,
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 64,
    },
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
    },
    "phi3": LLAMA
    | {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 20,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    },
}
SINGLE = {
    "bloom": {"hidden_size": 64, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCAB},
    "mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "dynamic_rope": LLAMA
    | {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
}


def build(family: str, options: dict, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama" if family == "dynamic_rope" else family, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "sink" in name:  # initialised to nothing by the library; a test of sinks needs some
            parameter.data.normal_()
        elif parameter.dim() > 1 and "mamba" not in family:
            parameter.data.mul_(3)  # weights of 0.02 would hide a wrong mask behind the residual stream
    return model


# Lengths of the chunks that the three sessions bring to each run; 0: the session sits this run out.
SCHEDULE = [(11, 0, 3), (7, 1, 1), (1, 13, 1), (1, 1, 1), (5, 1, 0), (1, 1, 9), (1, 1, 1)]


def serve(model: PreTrainedModel, prompts: list[list[int]], spans: list[BlockRange]) -> tuple[list[BlockEngine], list]:
    """Logits of every position of every prompt, through one engine per span."""
    engines = [BlockEngine(Stage.from_model(model, blocks)) for blocks in spans]
    head = HeadEngine(Ends.from_model(model))
    names = [bytes([index]) for index in range(len(prompts))]
    for engine in engines:
        for name in names:
            engine.open(name, engine.stage.blocks, max_tokens=64)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for chunks in SCHEDULE:
        works = [Work(names[i], done[i], n) for i, n in enumerate(chunks) if n]
        rows = [(i, p) for i, n in enumerate(chunks) for p in range(done[i], done[i] + n)]
        hidden = head.embed([prompts[i][p] for i, p in rows], [p for _, p in rows])
        for engine in engines:
            hidden = engine.run(works, hidden)
        for (i, _), row in zip(rows, head.logits(hidden), strict=True):
            logits[i].append(row)
        done = [d + n for d, n in zip(done, chunks, strict=True)]
    return engines, [torch.stack(rows) for rows in logits]


def whole(model: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The same by the whole model, each prompt alone.

    In the same chunks, because rotary tables that change with the length make the chunks part of the answer. Mamba's
    own forward cannot continue in chunks, so it sees each prompt at once.
    """
    results = []
    for index, prompt in enumerate(prompts):
        chunks = [chunk[index] for chunk in SCHEDULE if chunk[index]]
        if "mamba" in model.config.model_type:
            chunks = [len(prompt)]
        parts, cache, start = [], None, 0
        for chunk in chunks:
            with torch.inference_mode():
                out = model(torch.tensor([prompt[start : start + chunk]]), past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            parts.append(out.logits[0])
            start += chunk
        results.append(torch.cat(parts))
    return results


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = [sum(chunks[i] for chunks in SCHEDULE) for i in range(3)]
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def largest_difference(model: PreTrainedModel, spans: list[BlockRange]) -> tuple[list[BlockEngine], float]:
    engines, served = serve(model, prompts(), spans)
    expected = whole(model, prompts())
    return engines, max(float((a - b).abs().max()) for a, b in zip(served, expected, strict=True))


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_of_many_sessions_equal_the_whole_model(family: str) -> None:
    engines, difference = largest_difference(build(family, PACKED[family]), [BlockRange(0, 3), BlockRange(3, 4)])
    assert all(engine.packed for engine in engines), engines[0].packed_reason
    assert difference <= 1e-5


@pytest.mark.parametrize("family", SINGLE)
def test_families_that_cannot_be_packed_run_one_session_at_a_time_and_equal_the_whole_model(family: str) -> None:
    engines, difference = largest_difference(build(family, SINGLE[family]), [BlockRange(0, 3), BlockRange(3, 4)])
    assert not engines[0].packed  # the second span of lfm2 is a plain attention layer, and packed
    assert engines[0].packed_reason.startswith("one session at a time: ")
    assert difference <= 1e-5


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_a_running_state_is_not_cut_back_but_refused(family: str) -> None:
    engine = BlockEngine(Stage.from_model(build(family, SINGLE[family]), BlockRange(0, LAYERS)))
    engine.open(b"a", engine.stage.blocks, max_tokens=16)
    engine.run([Work(b"a", 0, 4)], torch.randn(4, engine.stage.hidden_size))
    engine.truncate(b"a", 4)
    with pytest.raises(UsageError, match="running state"):
        engine.truncate(b"a", 3)
    assert engine.length(b"a") == 4


def test_a_single_session_is_cut_back_where_all_its_layers_attend() -> None:
    engine = BlockEngine(Stage.from_model(build("bloom", SINGLE["bloom"]), BlockRange(0, LAYERS)))
    rows = torch.randn(9, engine.stage.hidden_size, generator=torch.Generator().manual_seed(0))
    for session in (b"straight", b"cut"):
        engine.open(session, engine.stage.blocks, max_tokens=16)
    engine.run([Work(b"cut", 0, 6), Work(b"straight", 0, 5)], torch.cat((rows[:6], rows[:5])))
    engine.truncate(b"cut", 5)
    cut, straight = engine.run([Work(b"cut", 5, 4), Work(b"straight", 5, 4)], rows[5:].repeat(2, 1)).split(4)
    assert torch.equal(cut, straight)
