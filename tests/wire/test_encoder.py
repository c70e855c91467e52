"""The encoder measures what a lossy format costs, and says nothing was lost where nothing was."""

import numpy as np
import pytest

from shoal.wire.encoder import MEASURE_EVERY, Encoder
from shoal.wire.messages import WireType
from shoal.wire.tensors import bf16_from_f32


def values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 200)).astype(np.float32)


@pytest.mark.parametrize(("wire", "low", "high"), [("bf16", 1e-4, 5e-3), ("int8", 1e-3, 2e-2)])
def test_a_lossy_format_shows_its_error(wire: WireType, low: float, high: float) -> None:
    encoder = Encoder()
    encoder.encode(values(), wire)
    assert low < encoder.error < high


def test_a_lossless_format_shows_none() -> None:
    encoder = Encoder()
    encoder.encode(values(), "f32")
    encoder.encode(bf16_from_f32(values()), "bf16")
    assert encoder.error == 0.0


def test_the_error_is_measured_again_now_and_then() -> None:
    encoder = Encoder()
    encoder.encode(values(), "int8")
    first = encoder.error
    for turn in range(MEASURE_EVERY):
        encoder.encode(values(turn + 1), "int8")
    assert encoder.error != first
