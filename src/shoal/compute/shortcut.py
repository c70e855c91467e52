"""Shorter ways through the ends of a model, taken only where they give the same bits.

A family's own forward prepares masks, rotary tables and outputs that embedding and head do not need. After the pause
between two tokens its code and data have left the caches, so this costs 1 to 2 ms a token, as much as a network hop.
For most families the embedding is a plain table and the end is "norm, then head". Whether that is so for a given model
is not looked up but tried: on random inputs at several positions and scales, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Logits = Callable[[Tensor], Tensor]
Embed = Callable[[Tensor, Tensor], Tensor]

_SCALES = (0.01, 1.0, 100.0)
"""Of the random hidden states: a softcap shows at the large ones, an epsilon at the small ones."""


@torch.no_grad()
def embedding_table(model: PreTrainedModel, embed: Embed, *, vocab_size: int, context_length: int) -> nn.Module | None:
    """The embedding module, if `embed(ids [B, T], position_ids [B, T])` is just that module. None if it is more."""
    table = model.get_input_embeddings()
    device = table.weight.device
    ids = torch.arange(8, device=device).mul(max(1, vocab_size // 8)).clamp(max=vocab_size - 1).unsqueeze(0)
    positions = torch.arange(8, device=device).mul(max(1, context_length // 8)).unsqueeze(0)
    return table if torch.equal(embed(ids, positions), table(ids)) else None


@torch.no_grad()
def norm_and_head(model: PreTrainedModel, decoder: nn.Module, logits: Logits, *, hidden_size: int) -> Logits | None:
    """rows [N, 1, H] -> [N, 1, V] as norm and head alone, if `logits` is just that. None if it is more."""
    head = model.get_output_embeddings()
    norms = [child for child in decoder.children() if _is_norm(child, hidden_size)]
    if head is None or not norms:
        return None
    norm = norms[-1]

    def direct(rows: Tensor) -> Tensor:
        found: Tensor = head(norm(rows))
        return found

    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    for scale in _SCALES:
        for count in (1, 3):
            rows = torch.randn(count, 1, hidden_size, generator=generator).mul(scale)
            rows = rows.to(device=weight.device, dtype=weight.dtype)
            expected = logits(rows)
            found = direct(rows)
            if found.dtype != expected.dtype or not torch.equal(found, expected):
                return None
    return direct


def _is_norm(module: nn.Module, hidden_size: int) -> bool:
    """Parameters over the hidden size and nothing below: a final norm, whatever its name."""
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(p.shape == (hidden_size,) for p in parameters)
