"""How fast this machine is, measured in a moment before any block is loaded; real traffic corrects it later."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_SIDE = 2048
_ROWS = 128
_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Rates:
    """Milliseconds per million weights: for one row (memory-bound), and per row of a long prompt (compute-bound)."""

    decode_ms_per_mparam: float
    prefill_ms_per_mparam_row: float

    def block_ms(self, params: int) -> tuple[float, float]:
        """(time of one decode row, time per prompt row) of a block with `params` weights."""
        return params / 1e6 * self.decode_ms_per_mparam, params / 1e6 * self.prefill_ms_per_mparam_row


def measure(dtype: torch.dtype, device: torch.device) -> Rates:
    """Time a matrix product of 2048 x 2048 weights with one row and with 128; the best of eight, about 50 ms in all."""
    weights = torch.randn(_SIDE, _SIDE, dtype=dtype, device=device)
    mparams = _SIDE * _SIDE / 1e6
    decode_ms = _time_ms(weights, 1)
    prefill_ms = _time_ms(weights, _ROWS)
    return Rates(decode_ms / mparams, prefill_ms / _ROWS / mparams)


def _time_ms(weights: torch.Tensor, rows: int) -> float:
    hidden = torch.randn(rows, _SIDE, dtype=weights.dtype, device=weights.device)
    times = []
    with torch.inference_mode():
        for _ in range(_REPEATS):
            start = time.perf_counter()
            torch.nn.functional.linear(hidden, weights)
            if weights.device.type == "cuda":
                torch.cuda.synchronize(weights.device)
            times.append((time.perf_counter() - start) * 1e3)
    return min(times)  # what the machine can do; a busy neighbour only ever adds
