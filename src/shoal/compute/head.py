"""The client's end of the compute path: embedding, final norm, head and sampling for all sessions at once.

Eight single heads cost twice one batched head, and the head is a tenth to a half of a small model, so rows of all
sessions that are ready go through one call.

Letters: R rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from shoal.compute import products
from shoal.compute.sampling import Sampler, sample_batch
from shoal.compute.split import Ends
from shoal.compute.tiles import PROBE_ROWS, RowTile, first_that_holds
from shoal.spec.sampling import Sampled


class HeadEngine:
    """Embeds tokens and chooses the next ones, for many sessions in one call.

    With `exact`, a row's logits do not depend on how many rows are sampled beside it (tiles.py). Not
    thread-safe: one compute thread owns it.
    """

    def __init__(self, ends: Ends, *, exact: bool = False) -> None:
        self.ends = ends
        self.row_tile: RowTile | None = None
        (products.plain if exact else products.choose)(ends.head)
        if exact:
            probe = torch.randn(PROBE_ROWS, ends.hidden_size, generator=torch.Generator().manual_seed(0))
            probe = probe.to(device=ends.device, dtype=ends.dtype)
            with torch.inference_mode():
                self.row_tile = first_that_holds(lambda tile, chosen: self._tiled(probe[list(chosen)], tile))

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
        if self.row_tile is None:
            return self.ends.logits(hidden.unsqueeze(0))[0]
        return self._tiled(hidden, self.row_tile)

    @torch.inference_mode()
    def final(self, hidden: Tensor) -> Tensor:
        """Final norm without the head, for embeddings: hidden [R, H] -> [R, E] in float32."""
        hidden = hidden.to(device=self.ends.device, dtype=self.ends.dtype)
        return self.ends.final(hidden.unsqueeze(0))[0].float()

    @cached_property
    def embedding_size(self) -> int:
        """Values in a row of `final`."""
        return self.final(torch.zeros(1, self.ends.hidden_size)).shape[1]

    def _tiled(self, hidden: Tensor, tile: RowTile) -> Tensor:
        """Exact mode's head: hidden [R, H] -> [R, V], a tile at a time."""
        parts = []
        for rows in hidden.split(tile.rows):
            filled = rows[tile.order(len(rows))]
            parts.append(self.ends.logits(filled.unsqueeze(0))[0, : len(rows)])
        return torch.cat(parts)

    @torch.inference_mode()
    def sample(self, hidden: Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
        """The next token of every session from its last row: hidden [R, H], one sampler per row -> R choices.

        Raises BadLogits when the model's numbers are broken, naming the rows.
        """
        return sample_batch(self.logits(hidden), samplers)
