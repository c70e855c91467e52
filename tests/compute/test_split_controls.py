"""The three ingredients of a cut: with one of them taken out, the comparison with the whole model must fail.

If one of these tests fails, `test_split_families.py` has lost its teeth.
"""

from __future__ import annotations

import pytest
import torch

from shoal.compute import anatomy, stage
from shoal.compute.families import random_model
from shoal.compute.selfcheck import Whole, cut, decode_difference, prefill_difference

MAIN = ("llama", "qwen3", "mistral", "gemma3_text", "mixtral", "bloom", "gpt_neox", "opt", "falcon", "gpt_oss")
VISIBLE = 1e-3


@pytest.fixture(autouse=True)
def quiet() -> None:
    from shoal.compute.device import quiet_libraries

    quiet_libraries()


def difference(family: str, *, cached: bool) -> float:
    model = random_model(family)
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    compare = decode_difference if cached else prefill_difference
    with torch.no_grad():
        return compare(Whole(model), cut(model), ids)


@pytest.fixture
def without_injection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The incoming hidden state is fed as `inputs_embeds`, and nothing replaces what enters the first layer."""
    forward_as_is = stage.Body.run

    def run(self: stage.Body, hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        decoder = self.anatomy.decoder
        handle = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": hidden}), with_kwargs=True
        )
        try:
            return forward_as_is(self, hidden, *rest)
        finally:
            handle.remove()

    monkeypatch.setattr(stage.Body, "run", run)
    monkeypatch.setattr(stage.Body, "_inject", lambda self, layer, args, kwargs: None)


@pytest.mark.usefixtures("without_injection")
@pytest.mark.parametrize("family", ["bloom", "opt", "gpt2"])
def test_without_injection_families_that_change_their_embeddings_break(family: str) -> None:
    assert difference(family, cached=False) > VISIBLE


@pytest.mark.usefixtures("without_injection")
def test_without_injection_a_family_that_only_looks_tokens_up_still_agrees() -> None:
    assert difference("llama", cached=False) == 0.0


@pytest.mark.parametrize("family", MAIN)
def test_without_rebased_layer_numbers_no_family_survives_a_cached_prefill(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anatomy.LayerNumbers, "rebase", lambda self, start: None)

    try:
        found = difference(family, cached=True)
    except (IndexError, AttributeError, ValueError, RuntimeError):
        return
    assert found > VISIBLE


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "cohere2"])
def test_without_sliced_layer_lists_answers_are_silently_wrong(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_depth(self: anatomy.PerLayerConfig, start: int, end: int) -> None:
        for values, name in self._depths:
            values[name] = end - start

    monkeypatch.setattr(anatomy.PerLayerConfig, "show", only_the_depth)

    assert difference(family, cached=False) > VISIBLE
