"""The device a process computes on, and what the libraries on it may say."""

from __future__ import annotations

import warnings

import torch
from transformers.utils import logging as transformers_logging

from shoal.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1"). Raises UsageError when this machine has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"There is no device called {name!r}.", hint="Use cpu, cuda or cuda:N.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"This machine offers {count} CUDA devices to torch, so {name!r} cannot be used.",
                hint="Use --device cpu, or install the CUDA build of torch and its driver.",
            )
    elif device.type != "cpu":
        raise UsageError(f"Device {name!r} is not supported.", hint="Use cpu, cuda or cuda:N.")
    return device


def quiet_libraries() -> None:
    """Keep transformers' remarks about toy configurations and progress bars off the terminal."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"transformers\.")
