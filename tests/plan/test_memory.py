"""Memory by formula: published identities, and what must hold whatever the constants are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import UsageError
from shoal.plan.estimate import GIB
from shoal.plan.memory import Workload, activations_per_rank, checkpoint, estimate, inventory, lora_parameters
from shoal.plan.precision import parse_precision, weight_bytes
from shoal.spec import catalog
from shoal.spec.model import ModelSpec, parse_shape

ENGINES = ("default", "litgpt", "peft", "autoawq", "exllama", "megatron", "deepspeed")


def gpt(layers: int, hidden: int, heads: int) -> ModelSpec:
    shape = f"layers={layers},hidden={hidden},heads={heads},ffn={4 * hidden},vocab=51200,ungated,tied"
    return parse_shape(shape)


def test_the_classic_shape_has_the_published_34h_of_activations() -> None:
    assert inventory(gpt(1, 1024, 16)) == 34 * 1024


@pytest.mark.parametrize(
    ("model", "pp", "vpp", "recompute", "gib"),
    [
        (gpt(96, 12288, 96), 8, 3, "selective", 12.35),  # 175B, figure 1 of 2205.05198
        (gpt(105, 20480, 128), 35, 3, "selective", 23.08),  # 530B
        (gpt(105, 20480, 128), 35, 3, "none", 114.02),
        (gpt(128, 25600, 160), 64, 1, "selective", 26.56),  # 1T
    ],
)
def test_activations_of_pipelines_in_flight_are_the_published_ones(
    model: ModelSpec, pp: int, vpp: int, recompute: str, gib: float
) -> None:
    work = Workload(
        kind="train",
        spec=model,
        seq=2048,
        num_micro_batches=512,
        recompute=recompute,  # type: ignore[arg-type]
        seq_parallel=recompute == "selective",
        flash=False,
        tp=8,
        pp=pp,
        vpp=vpp,
    )

    assert sum(activations_per_rank(work, {"working_factor": 1.0})) / GIB == pytest.approx(gib, rel=0.001)


def test_bloom_needs_352_gb_at_16_bit_and_half_at_8_and_nearly_3_tb_to_tune_in_full() -> None:
    bloom = catalog.model("bloom-176b").spec

    assert checkpoint(bloom, "bf16").value == pytest.approx(352e9, rel=0.003)
    assert checkpoint(bloom, "int8").value == pytest.approx(176e9, rel=0.03)
    tuned = estimate(Workload(kind="finetune", spec=bloom, method="full", seq=2048, recompute="full"))
    assert tuned.value == pytest.approx(2.9e12, rel=0.05)


def test_a_checkpoint_of_llama_2_70b_is_129_gib() -> None:
    assert checkpoint(catalog.model("llama-2-70b").spec, "fp16").value / GIB == pytest.approx(128.5, abs=0.1)


def test_a_small_adapter_of_a_7b_model_has_4_194_304_values() -> None:
    spec = catalog.model("llama-2-7b").spec

    assert lora_parameters(spec, 8) == 4_194_304
    assert checkpoint(spec, "fp32", lora_rank=8).value == pytest.approx(16_822_989, rel=0.005)


def test_gguf_files_are_counted_tensor_by_tensor() -> None:
    """Bits per weight of Llama-3-8B files as llama.cpp prints them, to one in a thousand."""
    spec = catalog.model("llama-3-8b").spec
    published = {"Q4_K_M": 4.8944, "Q5_K_M": 5.7036, "Q6_K": 6.5633, "IQ2_XS": 2.5882, "Q2_K": 3.1593, "IQ3_M": 3.7628}

    for name, bits in published.items():
        size = 8 * weight_bytes(spec, parse_precision(name)) / spec.parameters().total
        assert size == pytest.approx(bits, rel=1e-3), name


@given(name=st.sampled_from(catalog.model_names()))
@settings(max_examples=60, deadline=None)
def test_quantising_never_grows_weights(name: str) -> None:
    spec = catalog.model(name).spec
    sizes = [weight_bytes(spec, parse_precision(p)) for p in ("fp32", "bf16", "int8", "nf4", "nf4-dq")]
    gguf = [
        weight_bytes(spec, parse_precision(p)) for p in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
    ]

    assert sizes == sorted(sizes, reverse=True)
    assert gguf == sorted(gguf, reverse=True)


@given(
    name=st.sampled_from(["llama-2-7b", "llama-3-70b", "mixtral-8x7b", "deepseek-v3", "bloom-176b", "gemma-2-27b"]),
    kind=st.sampled_from(["train", "inference"]),
    engine=st.sampled_from(ENGINES),
    axis=st.sampled_from(["tp", "dp", "cp", "ep", "pp"]),
    zero=st.integers(0, 3),
    recompute=st.sampled_from(["none", "selective", "full"]),
    micro_batch=st.integers(1, 8),
    power=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_more_devices_never_need_more_memory_on_each(
    name: str, kind: str, engine: str, axis: str, zero: int, recompute: str, micro_batch: int, power: int
) -> None:
    few = Workload(
        kind=kind,  # type: ignore[arg-type]
        spec=catalog.model(name).spec,
        engine=engine,
        seq=2048,
        micro_batch=micro_batch,
        num_micro_batches=1,
        recompute=recompute,  # type: ignore[arg-type]
        zero=zero,
        dp=2,
        **({axis: 2**power} if axis != "dp" else {}),
    )
    if axis == "dp":
        few = replace(few, dp=2 ** (power + 1))

    more = replace(few, **{axis: 2 * getattr(few, axis)})

    assert estimate(more).value <= estimate(few).value * (1 + 1e-9)


@given(
    name=st.sampled_from(["llama-3-8b", "qwen3-30b-a3b", "phi-2"]),
    engine=st.sampled_from(ENGINES),
    method=st.sampled_from(["full", "lora", "adapter_v2", "dpo", "dpo-lora"]),
    seq=st.integers(1, 100_000),
    batch=st.integers(1, 16),
)
@settings(max_examples=80, deadline=None)
def test_longer_and_more_sequences_never_need_less(name: str, engine: str, method: str, seq: int, batch: int) -> None:
    work = Workload(
        kind="finetune", spec=catalog.model(name).spec, engine=engine, method=method, seq=seq, micro_batch=batch
    )

    assert estimate(replace(work, seq=2 * seq)).value >= estimate(work).value
    assert estimate(replace(work, micro_batch=batch + 1)).value >= estimate(work).value
    assert estimate(replace(work, recompute="full")).value <= estimate(work).value
    found = estimate(work)
    assert found.low <= found.value <= found.high
    assert sum(term.value for term in found.terms) == pytest.approx(found.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tp": 0}, "tp"),
        ({"micro_batch": -1}, "micro_batch"),
        ({"seq": -5}, "seq"),
        ({"pp": 33}, "pp"),
        ({"zero": 4}, "zero"),
        ({"precision": "12bit"}, "precision"),
        ({"method": "full", "precision": "nf4"}, "in full"),
        ({"method": "soft-prompt"}, "method"),
    ],
)
def test_nonsense_is_named(change: dict[str, object], word: str) -> None:
    spec = catalog.model("llama-2-7b").spec
    with pytest.raises(UsageError, match=word) as raised:
        estimate(Workload(kind="finetune", spec=spec, **{"method": "lora", "seq": 128, **change}))  # type: ignore[arg-type]

    assert raised.value.hint
