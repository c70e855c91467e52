"""Sizes of models: exact counts, and nonsense answered with the name of the field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UsageError
from shoal.spec import catalog
from shoal.spec.families import from_config
from shoal.spec.model import parse_shape

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
}


def test_published_totals_are_met_to_a_thousandth() -> None:
    known = [catalog.model(name) for name in catalog.model_names()]
    published = [each for each in known if each.published]

    assert len(known) >= 60
    assert len(published) >= 60
    for each in published:
        assert each.spec.parameters().total == pytest.approx(each.published, rel=1e-3), each.spec.name


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 12.9),
        ("deepseek-v2", 21.4),
        ("deepseek-v3", 37.55),
        ("qwen3-235b-a22b", 22.2),
        ("llama-4-scout", 17.2),
        ("llama-4-maverick", 17.2),
        ("kimi-k2", 32.9),
        ("dbrx-132b", 36.5),
    ],
)
def test_active_parameters_of_mixtures_are_those_that_were_announced(name: str, billions: float) -> None:
    assert catalog.model(name).spec.parameters().active / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_cache_of_latent_attention_is_the_latent() -> None:
    # DeepSeek-V3: 61 layers x (512 + 64) values, 70 272 bytes per token at 16 bit.
    assert catalog.model("deepseek-v3").spec.kv_bytes_per_token(2) == 61 * 576 * 2
    assert catalog.model("llama-3-8b").spec.kv_bytes_per_token(2) == 128 * 1024


def test_a_window_bounds_the_cache_of_its_layers_only() -> None:
    spec = catalog.model("gemma-2-9b").spec
    per_layer = spec.kv_bytes_per_token(2) / spec.num_layers

    assert spec.kv_bytes(4096) == spec.num_layers * 4096 * per_layer
    assert spec.kv_bytes(8192) == spec.num_layers // 2 * (8192 + 4096) * per_layer


@given(
    layers=st.integers(1, 40),
    kv_heads=st.integers(1, 8),
    groups=st.integers(1, 8),
    head_dim=st.integers(1, 64),
    ffn=st.integers(1, 4000),
    vocab=st.integers(1, 300_000),
    experts=st.integers(0, 16),
)
def test_the_parts_sum_to_the_whole(
    layers: int, kv_heads: int, groups: int, head_dim: int, ffn: int, vocab: int, experts: int
) -> None:
    heads = kv_heads * groups
    text = f"layers={layers},hidden={heads * head_dim},heads={heads},kv_heads={kv_heads},ffn={ffn},vocab={vocab}"
    spec = parse_shape(text + (f",experts={experts},experts_per_token={min(2, experts)}" if experts else ""))

    counts = spec.parameters()

    by_weight = sum(w.parameters for layer in range(layers) for w in spec.layer_weights(layer))
    assert sum(counts.layers) == by_weight
    assert counts.total == by_weight + counts.embedding + counts.head + counts.positions + counts.other
    assert counts.active <= counts.total


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_attention_heads": 5}, "heads"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"hidden_size": -64}, "hidden"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"vocab_size": 1.5}, "vocab"),
        ({"vocab_size": None}, "vocab"),
        ({"intermediate_size": "96"}, "ffn"),
        ({"head_dim": -1}, "head_dim"),
        ({"head_dim": "8"}, "head_dim"),
        ({"num_hidden_layers": 10**6}, "num_layers"),
        ({"model_type": "perceptron"}, "model_type"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "experts_per_token"),
        ({"model_type": "deepseek_v3"}, "kv_lora_rank"),
    ],
)
def test_nonsense_in_a_config_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(UsageError) as raised:
        from_config({**LLAMA, **change}, "small")

    assert field in str(raised.value)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("layers=2", "hidden"),
        ("layers=2,depth=4", "depth"),
        ("layers=-2,hidden=64,heads=4,ffn=96,vocab=100", "layers"),
        ("layers=2,hidden=64GB,heads=4,ffn=96,vocab=100", "hidden"),
        ("layers=2,hidden=64,heads=5,ffn=96,vocab=100", "heads"),
        ("layers=2,hidden=64,heads=0,ffn=96,vocab=100", "heads"),
    ],
)
def test_nonsense_in_a_shape_is_named(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_shape(text)


def test_an_unknown_model_is_answered_with_near_ones() -> None:
    with pytest.raises(UsageError) as raised:
        catalog.model("llama-3-7b")

    assert "llama-3-8b" in raised.value.hint
