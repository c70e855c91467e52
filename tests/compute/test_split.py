"""What a Stage and the Ends promise besides exact numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, Gemma3Config, LlamaConfig, PreTrainedModel

from shoal.compute.anatomy import DEFAULT_CONTEXT
from shoal.compute.families import LAYERS, SPLIT, random_model, tiny_config
from shoal.compute.selfcheck import Chain, Whole, decode_difference, measure, positions
from shoal.compute.split import Ends, Stage, build_ends, build_stage, check_splittable, cut_points
from shoal.errors import CannotSplit, UsageError
from shoal.spec.ids import BlockRange


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    from shoal.compute.device import quiet_libraries

    quiet_libraries()


def hidden_state(rows: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, rows, 64, generator=torch.Generator().manual_seed(5))


def row_numbers(start: int, end: int) -> torch.Tensor:
    return torch.arange(start, end)[None]


# Per-layer lists (gemma2), chunked masks (llama4_text), states instead of keys (qwen3_next), shared indexes (glm).
@pytest.mark.parametrize("family", ["llama", "gemma2", "llama4_text", "qwen3_next", "glm_moe_dsa"])
def test_views_on_one_stage_are_exact_in_any_order(family: str) -> None:
    model = random_model(family)
    stage = Stage.from_model(model, BlockRange(0, LAYERS))
    views = [stage.narrow(blocks) for blocks in (BlockRange(0, 3), BlockRange(3, 5), BlockRange(5, 6))]

    assert measure(model, Chain(Ends.from_model(model), views)).largest == 0.0
    assert measure(model, Chain(Ends.from_model(model), [stage])).largest == 0.0
    assert measure(model, Chain(Ends.from_model(model), views)).largest == 0.0


def test_a_view_can_start_in_the_middle_of_a_span() -> None:
    model = random_model("gemma3_text")
    head = Stage.from_model(model, BlockRange(0, 3))
    tail = Stage.from_model(model, BlockRange(2, 6)).narrow(BlockRange(3, 6))

    assert measure(model, Chain(Ends.from_model(model), [head, tail])).largest == 0.0


def test_two_generations_through_two_views_do_not_disturb_each_other() -> None:
    stage = Stage.from_model(random_model("gemma2"), BlockRange(0, 6))
    view = stage.narrow(BlockRange(1, 4))
    rows = hidden_state(20)
    expected = [part(rows, position_ids=row_numbers(0, 20)) for part in (stage, view)]

    caches = [stage.new_cache(), view.new_cache()]
    pieces: list[list[torch.Tensor]] = [[], []]
    for start, end in ((0, 12), (12, 19), (19, 20)):
        for part, cache, out in zip((stage, view), caches, pieces, strict=True):
            out.append(part(rows[:, start:end], position_ids=row_numbers(start, end), cache=cache))

    for out, whole in zip(pieces, expected, strict=True):
        torch.testing.assert_close(torch.cat(out, dim=1), whole, rtol=0, atol=1e-5)


def test_a_stage_knows_what_it_is() -> None:
    stage = Stage.from_model(random_model("gemma2"), BlockRange(1, 4))

    assert (stage.blocks, stage.hidden_size, stage.dtype) == (BlockRange(1, 4), 64, torch.float32)
    assert stage.device == torch.device("cpu")
    assert len(stage.layers) == stage.config.num_hidden_layers == len(stage.config.layer_types) == 3
    assert len(stage.new_cache().layers) == 3


def test_cutting_leaves_the_model_as_it_was() -> None:
    model = random_model("gemma2")
    whole = Whole(model)
    ids = torch.arange(3, 27)[None]
    before = whole.logits(ids, positions(ids))

    stage = Stage.from_model(model, BlockRange(2, 4))
    stage(hidden_state(3), position_ids=row_numbers(0, 3))

    assert torch.equal(whole.logits(ids, positions(ids)), before)
    assert len(model.config.layer_types) == LAYERS


def test_weights_are_shared_with_the_model_and_not_copied() -> None:
    model = random_model("llama")

    stage = Stage.from_model(model, BlockRange(2, 4))

    assert stage.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[2].mlp.up_proj.weight.data_ptr()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_stage_runs_in_every_gradient_mode(mode: type) -> None:
    stage = Stage.from_model(random_model("llama"), BlockRange(0, 2))
    with mode():
        out = stage(hidden_state(5), position_ids=row_numbers(0, 5), cache=stage.new_cache())

    assert out.shape == (1, 5, 64)


def test_gradients_reach_the_incoming_hidden_state() -> None:
    stage = Stage.from_model(random_model("llama"), BlockRange(2, 5))
    hidden = hidden_state(5).requires_grad_(True)

    stage(hidden, position_ids=row_numbers(0, 5)).square().mean().backward()

    assert bool(hidden.grad.abs().sum() > 0)


@pytest.mark.parametrize("family", ["llama", "ctrl"])  # CTRL scales its embeddings in place
def test_a_stage_never_writes_into_what_it_is_given(family: str) -> None:
    stage = Stage.from_model(random_model(family), BlockRange(0, 3))
    hidden = hidden_state(5)
    given = hidden.clone()

    stage(hidden, position_ids=row_numbers(0, 5))

    assert torch.equal(hidden, given)


def test_any_cache_of_the_library_will_do() -> None:
    stage = Stage.from_model(random_model("llama"), BlockRange(2, 5))
    rows = hidden_state(6)
    caches = [stage.new_cache(), DynamicCache()]

    outs = [
        [
            stage(rows[:, :5], position_ids=row_numbers(0, 5), cache=cache),
            stage(rows[:, 5:], position_ids=row_numbers(5, 6), cache=cache),
        ]
        for cache in caches
    ]

    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))
    assert caches[1].get_seq_length() == 6


def test_further_arguments_reach_the_attention_function() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def attend(*args: object, lamp: str = "", **kwargs: object) -> object:
        seen.append(lamp)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("shoal_test", attend)
    stage = Stage.from_model(random_model("llama"), BlockRange(0, 2))
    stage.model.config._attn_implementation_internal = "shoal_test"

    stage(hidden_state(3), position_ids=row_numbers(0, 3), lamp="lit")

    assert seen == ["lit", "lit"]


def test_after_an_error_a_stage_goes_on_working() -> None:
    stage = Stage.from_model(random_model("llama"), BlockRange(0, 2))
    good = stage(hidden_state(3), position_ids=row_numbers(0, 3))

    with pytest.raises(RuntimeError):
        stage(torch.randn(1, 3, 63), position_ids=row_numbers(0, 3))

    assert torch.equal(stage(hidden_state(3), position_ids=row_numbers(0, 3)), good)


def test_rows_of_different_sessions_are_embedded_at_their_own_positions() -> None:
    ends = Ends.from_model(random_model("gpt2"))  # learned positions are added before layer 0
    ids = torch.tensor([[7, 7, 7]])

    packed = ends.embed(ids, torch.tensor([[0, 9, 4]]))

    for row, position in enumerate((0, 9, 4)):
        assert torch.equal(packed[:, row : row + 1], ends.embed(ids[:, :1], torch.tensor([[position]])))


def test_the_ends_know_context_and_end_tokens() -> None:
    llama, bloom = (Ends.from_model(random_model(family)) for family in ("llama", "bloom"))

    assert (llama.vocab_size, llama.hidden_size, llama.context_length) == (128, 64, 128)
    assert llama.eos_ids == frozenset({2})
    assert bloom.context_length == DEFAULT_CONTEXT


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])  # softcap, logit scale, logit divisor
def test_logits_carry_scale_and_softcap_of_the_family(family: str) -> None:
    model = random_model(family)
    hidden = hidden_state(4)
    bare = model.get_output_embeddings()(model.get_decoder().norm(hidden))

    logits = Ends.from_model(model).logits(hidden)

    assert logits.shape == (1, 4, 128)
    assert not torch.allclose(logits, bare)


def test_a_decode_step_through_three_stages_needs_no_mask_from_the_caller() -> None:
    model = random_model("mistral")
    chain = Chain(Ends.from_model(model), [Stage.from_model(model, BlockRange(0, 6))])
    ids = torch.arange(3, 27)[None]

    with torch.no_grad():
        assert decode_difference(Whole(model), chain, ids) == 0.0


def test_blocks_outside_model_or_stage_are_refused() -> None:
    model = random_model("llama")
    stage = Stage.from_model(model, BlockRange(1, 4))

    with pytest.raises(UsageError, match="which has 6 blocks"):
        Stage.from_model(model, BlockRange(4, 7))
    with pytest.raises(UsageError, match="Blocks 0:2 are not part of this stage, which holds 1:4"):
        stage.narrow(BlockRange(0, 2))


def test_a_layer_that_shares_an_index_may_not_be_cut_from_its_owner() -> None:
    model = random_model("glm_moe_dsa")  # layers 2 and 4 reuse the index of 1 and 3

    assert cut_points(model.config) == [0, 1, 3, 5, 6]
    with pytest.raises(CannotSplit, match="cannot be cut at block 2") as caught:
        Stage.from_model(model, BlockRange(0, 2))
    assert "0, 1, 3, 5, 6" in caught.value.hint
    with pytest.raises(CannotSplit, match="cannot be cut at block 4"):
        Stage.from_model(model, BlockRange(0, 6)).narrow(BlockRange(1, 4))


def test_an_unread_weight_that_is_used_after_all_shows_as_nan() -> None:
    stage = Stage.from_model(random_model("llama"), BlockRange(0, 2))

    assert bool(stage.model.norm(hidden_state(1)).isnan().all())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3n_text", "keys and values"),
        ("gemma4_text", "token ids"),
        ("deepseek_v4", "residual streams"),
        ("t5", "encoder"),
        ("roberta", "both directions"),
        ("rwkv", "state"),
        ("zamba", "shared block"),
    ],
)
def test_the_refusal_names_what_crosses_the_border(family: str, reason: str) -> None:
    with pytest.raises(CannotSplit, match=reason) as caught:
        check_splittable(CONFIG_MAPPING[family]())

    assert "shoal bench split" in caught.value.hint


def test_layers_of_different_shape_are_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2, per_layer_config={1: {"intermediate_size": 7}})

    with pytest.raises(CannotSplit, match="differ in shape"):
        check_splittable(config)


def test_a_text_model_with_a_picture_model_beside_it_is_cut_like_any_other(tmp_path: Path) -> None:
    text = {
        name: getattr(tiny_config("gemma3_text"), name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "sliding_window"),
        )
    }
    pictures = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    pictures |= {"image_size": 28, "patch_size": 14}
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=pictures)).eval()
    model.requires_grad_(False)
    parts = [BlockRange(0, 2), BlockRange(2, 6)]

    shared = Chain(Ends.from_model(model), [Stage.from_model(model, blocks) for blocks in parts])
    assert measure(model, shared).largest == 0.0

    model.save_pretrained(tmp_path)
    loaded = Chain(build_ends(tmp_path), [build_stage(tmp_path, blocks) for blocks in parts])
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        assert decode_difference(Whole(model), loaded, ids) == 0.0
    projector = sum(tensor.nbytes for tensor in model.model.multi_modal_projector.parameters())
    assert loaded.ends.bytes_read == 4 * (128 * 64 + 64) + projector  # nothing of the picture model itself


def test_every_listed_family_may_be_cut_somewhere() -> None:
    assert all(len(cut_points(tiny_config(family))) > 2 for family in SPLIT)


def test_loading_in_several_threads_leaves_the_library_as_it_was(tmp_path: Path) -> None:
    """transformers swaps functions of the whole process while it builds a model."""
    random_model("gemma2").save_pretrained(tmp_path)

    def swapped() -> tuple[object, ...]:
        return PreTrainedModel.tie_weights, torch.linspace, torch.nn.init.normal_, torch.get_default_dtype()

    before = swapped()
    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(build_ends, tmp_path, dtype=torch.bfloat16) for _ in range(16)]:
            future.result()
    assert swapped() == before
