"""The tiny models: many, small, the same every time, and with a window where the family has one."""

from __future__ import annotations

import pytest
import torch

from shoal.compute.device import quiet_libraries, resolve_device
from shoal.compute.families import FAMILIES, LAYERS, REFUSED, SPLIT, WINDOW, check_family, random_model, tiny_config
from shoal.compute.split import build_skeleton
from shoal.errors import CannotSplit, UsageError


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    quiet_libraries()


def test_there_are_many_families_and_none_is_in_both_lists() -> None:
    assert len(SPLIT) >= 100
    assert not set(SPLIT) & set(REFUSED)
    assert len(FAMILIES) == len(set(FAMILIES))


@pytest.mark.parametrize("family", sorted(SPLIT))
def test_a_tiny_model_is_tiny_and_has_six_layers(family: str) -> None:
    config = tiny_config(family)
    parameters = sum(parameter.numel() for parameter in build_skeleton(config, torch.float32).parameters())

    assert config.num_hidden_layers == LAYERS
    assert parameters < 8_000_000


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "ministral", "starcoder2"]
)
def test_a_family_with_a_sliding_window_has_a_short_one(family: str) -> None:
    assert tiny_config(family).sliding_window == WINDOW


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "mamba"])
def test_the_same_seed_gives_the_same_model(family: str) -> None:
    one, same, other = (random_model(family, seed=seed).state_dict() for seed in (0, 0, 1))

    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_random_model_leaves_the_random_numbers_of_its_caller_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)

    random_model("llama")

    assert torch.equal(torch.rand(1), expected)


def test_an_unknown_family_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no family 'lama'"):
        check_family("lama")


def test_an_unlisted_family_without_a_tiny_shape_is_not_built_at_full_size() -> None:
    with pytest.raises(CannotSplit, match="no tiny model"):
        random_model("fuyu")


@pytest.mark.parametrize("name", ["tpu7", "meta", "cuda:99"])
def test_a_device_this_machine_does_not_have_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError):
        resolve_device(name)


def test_the_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
