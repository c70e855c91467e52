"""Embedding, head and sampling of many sessions in one call."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shoal.compute.head import HeadEngine
from shoal.compute.sampling import Sampler
from shoal.compute.split import Ends
from shoal.spec.sampling import SamplingParams

VOCAB = 96
SHAPES = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "pad_token_id": None,
    },
    "gemma2": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "final_logit_softcapping": 2.0,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "word_embed_proj_dim": 64,
    },
}


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPES[family])).eval()


@pytest.mark.parametrize("family", SHAPES)
def test_rows_of_several_sessions_are_embedded_as_each_session_alone(family: str) -> None:
    model = build(family)
    head = HeadEngine(Ends.from_model(model))
    ids, positions = [5, 7, 9, 5, 1], [0, 1, 2, 30, 4]
    with torch.inference_mode():
        states = model(torch.tensor([[5, 7, 9]]), output_hidden_states=True).hidden_states[0][0]
    rows = head.embed(ids, positions)
    torch.testing.assert_close(rows[:3], states, atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[3:4], head.embed([5], [30]), atol=0, rtol=0)


@pytest.mark.parametrize("family", SHAPES)
def test_final_states_are_those_of_the_decoder_itself(family: str) -> None:
    model = build(family)
    head = HeadEngine(Ends.from_model(model))
    ids = torch.randint(0, VOCAB, (1, 11), generator=torch.Generator().manual_seed(0))
    caught: list[torch.Tensor] = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    layers[-1].register_forward_hook(lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        expected = model.base_model(ids).last_hidden_state[0]
    found = head.final(caught[0].reshape(11, -1))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert head.embedding_size == expected.shape[1]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_the_head_gives_the_models_logits_and_its_greedy_choice(family: str, exact: bool) -> None:
    model = build(family)
    head = HeadEngine(Ends.from_model(model), exact=exact)
    ids = torch.randint(0, VOCAB, (1, 11), generator=torch.Generator().manual_seed(0))
    # what leaves the last layer, before the final norm, is caught at the layer itself
    caught: list[torch.Tensor] = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    layers[-1].register_forward_hook(lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        expected = model(ids).logits[0]
    hidden = caught[0].reshape(11, -1)
    torch.testing.assert_close(head.logits(hidden), expected, atol=1e-6, rtol=0)
    samplers = [Sampler(SamplingParams(temperature=0), vocab_size=VOCAB) for _ in range(11)]
    assert [s.token for s in head.sample(hidden, samplers)] == expected.argmax(-1).tolist()


def test_in_exact_mode_a_rows_logits_do_not_depend_on_the_rows_beside_it() -> None:
    head = HeadEngine(Ends.from_model(build("llama")), exact=True)
    hidden = torch.randn(19, 64, generator=torch.Generator().manual_seed(0))
    together = head.logits(hidden)
    for row in range(19):
        assert torch.equal(head.logits(hidden[row : row + 1])[0], together[row])


def test_ids_outside_the_vocabulary_are_refused_before_they_index_anything() -> None:
    head = HeadEngine(Ends.from_model(build("llama")))
    for ids in ([VOCAB], [-1]):
        with pytest.raises(ValueError, match="must lie in"):
            head.embed(ids, [0])
    with pytest.raises(ValueError, match="positions"):
        head.embed([1, 2], [0])
