"""Few rows may take another kernel than the general product, but never other numbers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shoal.compute import products

DTYPES = [torch.float32, torch.bfloat16]


def layer(dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(640, 512, bias=bias, dtype=dtype).requires_grad_(False)


def close(found: Tensor, rows: Tensor, of: nn.Linear) -> bool:
    bias = None if of.bias is None else of.bias.double()
    true = linear(rows.double(), of.weight.double(), bias)
    allowed = 1e-5 if rows.dtype == torch.float32 else 1e-2
    return found.shape == true.shape and bool((found - true).abs().max() <= allowed * true.abs().max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_every_kernel_gives_the_general_product_s_numbers(dtype: torch.dtype, bias: bool) -> None:
    of = layer(dtype, bias=bias)
    for count in (1, 2, 5, 32):
        rows = torch.randn(1, count, 640).to(dtype)
        for product in (products._vector, products._weights_first) if count == 1 else (products._weights_first,):
            assert close(product(rows, of.weight, of.bias), rows, of)
            assert products._as_exact(product, rows, of)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_whatever_wins_the_race_gives_the_same_numbers_for_any_number_of_rows(dtype: torch.dtype) -> None:
    of = layer(dtype)
    products.choose([of])
    for shape in ((1, 1, 640), (3, 1, 640), (1, 8, 640), (640,), (1, 40, 640), (0, 640)):
        rows = torch.randn(shape).to(dtype)
        found = of(rows)
        assert found.shape == (*shape[:-1], 512)
        assert not rows.numel() or close(found, rows, of)


@torch.inference_mode()
def test_a_kernel_that_fails_or_rounds_worse_does_not_race() -> None:
    of, rows = layer(torch.float32), torch.randn(1, 4, 640)

    def missing(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise AttributeError("no such kernel")

    def coarse(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(rows.bfloat16(), weight.bfloat16()).float()

    assert not products._as_exact(missing, rows, of)
    assert not products._as_exact(coarse, rows, of)


def other(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(rows, weight, bias) + 1


def test_prompts_gradients_and_plain_layers_use_the_general_product() -> None:
    of = layer(torch.float32)
    of.forward = products._forward(of, [linear, other, other])  # type: ignore[method-assign]
    one, many = torch.randn(1, 1, 640), torch.randn(1, 3, 640)
    with torch.inference_mode():
        assert torch.equal(of(one), linear(one, of.weight) + 1)
        assert torch.equal(of(many), linear(many, of.weight))
    assert torch.equal(of(one), linear(one, of.weight))
    products.plain([of])
    with torch.inference_mode():
        assert torch.equal(of(one), linear(one, of.weight))


def test_small_matrices_and_subclasses_are_left_alone() -> None:
    class Scaled(nn.Linear):
        pass

    small, sub = nn.Linear(64, 64), Scaled(640, 512)
    assert products._eligible([small, sub]) == []
