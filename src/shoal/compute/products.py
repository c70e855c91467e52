"""Which kernel multiplies a few rows with a weight matrix: tried on the matrices themselves, not assumed.

The general product packs or reorders a matrix for every call, which pays for hundreds of rows; the few rows of a decode
step are then far from what memory could deliver. Measured (x86-64 with AMX, one thread, 8 layers of width 1024 read
from memory): 4 rows take 48 ms in fp32 by the general product and 37 ms by oneDNN's, 21 and 17 ms in bf16 by the
general product and with the weights as the left factor; one row in bf16 takes 20 and 16 ms by matrix times vector.
Which kernel wins differs with machine, precision, shape and rows, so the candidates race when a part is loaded, and
only those take part that are as exact as the general product. The weights stay as they are; nothing is kept twice.

Racing makes the choice, and with it the last bits of a row, a matter of chance. Exact mode therefore keeps the general
product everywhere (`plain`).

Letters: R rows, N outputs, K inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""product(rows [..., K], weight [N, K], bias [N] or None) -> [..., N]"""

MIN_WEIGHTS = 2**18
"""Smaller matrices stay in the caches, and what is gained would be lost in choosing."""

_CLASSES = ((1, 1), (2, 3), (4, 8), (16, 32))
"""(rows that race, most rows that go the winner's way), ascending. Prompts keep the general product."""

_CHECKED_OUTPUTS = 256
_RACE_BYTES = 128 * 2**20
"""Matrices of one shape that a race runs over, so that none is still in a cache when its turn comes again."""
_RACE_LAPS = 3
_WINS_BELOW = 0.93
"""Share of the general product's time at which another kernel is worth leaving it for. Ties would only add chance."""


def _vector(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row as a vector."""
    vector = rows.reshape(-1)
    out = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
    return out.view(*rows.shape[:-1], -1)


def _weights_first(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ rows^T: the large matrix as the left factor, which kernels read as it lies."""
    out = torch.mm(weight, rows.reshape(-1, rows.shape[-1]).t()).t()
    out = out.contiguous() if bias is None else (out + bias).contiguous()
    return out.view(*rows.shape[:-1], -1)


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product also in fp32, where the general product is another library's. Not in every build of torch."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


def choose(modules: Iterable[nn.Module]) -> None:
    """Let the large plain linear layers in `modules` take the fastest product for each number of rows.

    Takes about as long as fifty decode steps (a second or two). Results differ by rounding only. Only without
    gradients: with them a layer computes as ever.
    """
    alike: dict[tuple[torch.Size, torch.dtype, bool], list[nn.Linear]] = {}
    for layer in _eligible(modules):
        key = (layer.weight.shape, layer.weight.dtype, layer.bias is not None)
        alike.setdefault(key, []).append(layer)
    for layers in alike.values():
        products = _race(layers)
        if any(product is not linear for product in products):
            for layer in layers:
                layer.forward = _forward(layer, products)  # type: ignore[method-assign, assignment]


def plain(modules: Iterable[nn.Module]) -> None:
    """Take back what `choose` did: every layer uses the general product again."""
    for layer in _eligible(modules):
        layer.__dict__.pop("forward", None)


def _eligible(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Ordinary linear layers of the CPU, large enough to matter. A subclass may compute something else."""
    found = {id(layer): layer for module in modules for layer in module.modules() if type(layer) is nn.Linear}
    return [
        layer
        for layer in found.values()
        if layer.weight.device.type == "cpu"
        and layer.weight.dtype in (torch.float32, torch.bfloat16)
        and layer.weight.is_contiguous()
        and layer.weight.numel() >= MIN_WEIGHTS
    ]


def _forward(layer: nn.Linear, products: Sequence[Product]) -> Callable[[Tensor], Tensor]:
    """The layer's forward; products[R] is the product for R rows, the general one beyond the end."""
    most = len(products) - 1
    width = layer.in_features

    def forward(rows: Tensor) -> Tensor:
        count = rows.numel() // width
        if count > most or rows.dim() < 2 or rows.dtype != layer.weight.dtype or torch.is_grad_enabled():
            return linear(rows, layer.weight, layer.bias)
        return products[count](rows, layer.weight, layer.bias)

    return forward


@torch.inference_mode()
def _race(layers: Sequence[nn.Linear]) -> list[Product]:
    """The product for 0, 1, 2, ... rows of layers that are alike."""
    size = layers[0].weight.nbytes
    track = [layer for layer, _ in zip(layers, range(max(1, -(-_RACE_BYTES // size))), strict=False)]
    generator = torch.Generator().manual_seed(0)
    products: list[Product] = [linear]
    for count, most in _CLASSES:
        rows = torch.randn(1, count, layers[0].in_features, generator=generator).to(layers[0].weight.dtype)
        few: Product = _vector if count == 1 else _weights_first
        rivals = [rival for rival in (few, _onednn) if _as_exact(rival, rows, layers[0])]
        seconds: dict[Product, float] = dict.fromkeys([linear, *rivals], float("inf"))
        for _ in range(_RACE_LAPS):
            for product in seconds:
                start = time.perf_counter()
                for layer in track:
                    product(rows, layer.weight, layer.bias)
                seconds[product] = min(seconds[product], time.perf_counter() - start)
        best = min(seconds, key=lambda product: seconds[product])
        winner = best if seconds[best] < _WINS_BELOW * seconds[linear] else linear
        products += [winner] * (most + 1 - len(products))
    return products


def _as_exact(rival: Product, rows: Tensor, layer: nn.Linear) -> bool:
    """Whether `rival` runs here and rounds no worse than adding the K terms one by one in fp32 would, and once at the
    end to the precision of the layer: sums in 16 bits fail."""
    weight, bias = layer.weight, layer.bias
    try:
        found = rival(rows, weight, bias)
    except (RuntimeError, AttributeError, TypeError):
        return False  # this build of torch has no such kernel, or not for this precision
    if found.shape != (*rows.shape[:-1], layer.out_features) or found.dtype != rows.dtype:
        return False
    some = slice(_CHECKED_OUTPUTS)  # a head's whole matrix in float64 would not fit beside it
    true = linear(rows.double(), weight[some].double(), None if bias is None else bias[some].double())
    found = found[..., some]
    allowed = torch.finfo(rows.dtype).eps / 2 + torch.finfo(torch.float32).eps * layer.in_features**0.5 / 5
    return bool((found - true).square().mean().sqrt() <= allowed * true.square().mean().sqrt())
