"""The client's end of the compute path: embedding, final norm, head and sampling for all sessions at once.

Eight single heads cost twice one batched head, and the head is a tenth to a half of a small model, so rows of all
sessions that are ready go through one call.

Letters: R rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.compute.sampling import Sampled, Sampler, sample_batch
from shoal.compute.split import Ends

EXACT_TILE_ROWS = 8
"""Rows per head call in exact mode, always filled up: fp32 products give a row the same bits in tiles of one size."""


class HeadEngine:
    """Embeds tokens and chooses the next ones, for many sessions in one call.

    With `exact`, a row's logits do not depend on how many rows are sampled beside it (see BlockEngine). Not
    thread-safe: one compute thread owns it.
    """

    def __init__(self, ends: Ends, *, exact: bool = False) -> None:
        self.ends = ends
        self.exact = exact

    @torch.inference_mode()
    def embed(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Hidden states that enter the first block: token ids[i] at positions[i] -> [R, H].

        Rows of several sessions may be mixed. Raises ValueError for an id outside the vocabulary or lists of different
        length, before anything is computed.
        """
        if len(ids) != len(positions):
            raise ValueError(f"{len(ids)} token ids came with {len(positions)} positions.")
        if ids and not (min(ids) >= 0 and max(ids) < self.ends.vocab_size):
            raise ValueError(f"Token ids must lie in 0 to {self.ends.vocab_size - 1}.")
        device = self.ends.device
        return self.ends.embed(torch.tensor([ids], device=device), torch.tensor([positions], device=device))[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: hidden [R, H] -> [R, V]."""
        hidden = hidden.to(device=self.ends.device, dtype=self.ends.dtype)
        if not self.exact:
            return self.ends.logits(hidden.unsqueeze(0))[0]
        tiles = []
        for tile in hidden.split(EXACT_TILE_ROWS):
            rows = tile.shape[0]
            filled = tile[[index % rows for index in range(EXACT_TILE_ROWS)]]
            tiles.append(self.ends.logits(filled.unsqueeze(0))[0, :rows])
        return torch.cat(tiles)

    @torch.inference_mode()
    def sample(self, hidden: Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
        """The next token of every session from its last row: hidden [R, H], one sampler per row -> R choices.

        Raises BadLogits when the model's numbers are broken, naming the rows.
        """
        return sample_batch(self.logits(hidden), samplers)
