"""The shorter ways through the ends of a model are taken where they give the same bits, and only there."""

import pytest
import torch

from shoal.compute.families import random_model
from shoal.compute.stage import Ends


def rows(ends: Ends, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(1, 5, ends.hidden_size, generator=torch.Generator().manual_seed(1)) * scale


def ends_of(family: str) -> Ends:
    return Ends.from_model(random_model(family))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "mixtral", "gpt_neox", "olmo2"])
def test_a_plain_family_takes_both(family: str) -> None:
    ends = ends_of(family)
    assert ends._table is not None
    assert ends._direct is not None


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_an_embedding_that_is_more_than_a_table_is_left_to_the_family(family: str) -> None:
    assert ends_of(family)._table is None


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_head_that_scales_or_caps_is_left_to_the_family(family: str) -> None:
    assert ends_of(family)._direct is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "cohere", "gpt_oss", "phi", "deepseek_v3"])
@torch.no_grad()
def test_the_numbers_are_the_family_s_own(family: str) -> None:
    ends = ends_of(family)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    positions = torch.tensor([[0, 1, 2, 3, 9]])
    assert torch.equal(ends.embed(ids, positions), ends._until_layers(ids, positions))
    for scale in (0.1, 10.0):
        hidden = rows(ends, scale)
        assert torch.equal(ends.logits(hidden)[0], ends._after_layers(hidden.reshape(5, 1, -1))[:, 0])
