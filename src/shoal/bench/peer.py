"""The peer of every speed figure: Hugging Face `generate` on the whole model, in this process, on one thread."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, VOCAB = 1024, 16, 16, 4, 2816, 16_000


def write_model(folder: Path, *, layers: int = LAYERS, seed: int = 0) -> Path:
    """Save a random Llama of the benchmark's shape (fp32) with `layers` layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=FFN,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype) -> Any:
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


class _Clock(BaseStreamer):
    """Notes when each token was chosen."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to close."""


def generate(model: Any, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[float], float]:
    """Greedy generation of a batch of equally long prompts.

    Returns the new tokens of every row, the gaps between steps in seconds, and the time to the first token.
    """
    clock = _Clock()
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=clock
        )
    times = clock.times[1:]  # the first call hands over the prompt
    gaps = [after - before for before, after in pairwise(times)]
    return out[:, ids.shape[1] :].tolist(), gaps, times[0] - start


def step_s(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """Median time of one decode step of the whole batch."""
    return statistics.median(generate(model, prompts, tokens)[1])
