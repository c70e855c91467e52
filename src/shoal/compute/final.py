"""The decoder's own output for rows of its last block: what an embedding is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.compute.stage import Ends


@torch.inference_mode()
def final_states(ends: Ends, hidden: Tensor) -> Tensor:
    """`last_hidden_state` as the model's family defines it: final norm, and a projection where the family has one.

    hidden [R, H] -> [R, E] in float32; E is H for nearly all families.
    """
    rows = hidden.to(device=ends.device, dtype=ends.dtype).unsqueeze(1)
    ends._doorway.outgoing = rows
    try:
        # The forward wants embeddings to learn shape, dtype and device; positions it makes up itself.
        states: Tensor = ends._decoder(inputs_embeds=torch.zeros_like(rows), use_cache=False)[0]
    finally:
        ends._doorway.outgoing = None
    return states[:, 0].float()


def embedding_size(ends: Ends) -> int:
    """Values in a row of `final_states`."""
    return final_states(ends, torch.zeros(1, ends.hidden_size)).shape[1]
