"""Activations between torch and numpy, where the wire takes over. bfloat16 crosses as the uint16 bits of its values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_numpy(hidden: torch.Tensor) -> np.ndarray[Any, Any]:
    """[rows, width] float32 or bfloat16 -> float32 or uint16 array; shares memory with a CPU tensor."""
    hidden = hidden.detach().to("cpu").contiguous()
    if hidden.dtype == torch.bfloat16:
        return hidden.view(torch.uint16).numpy()
    return hidden.to(torch.float32).numpy()


def to_torch(array: np.ndarray[Any, Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, width] float32, or uint16 bits of bfloat16 -> a tensor of the model's type on its device.

    A read-only array (a view of immutable bytes) is copied, because torch has no read-only tensors.
    """
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if tensor.dtype == torch.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device=device, dtype=dtype)
