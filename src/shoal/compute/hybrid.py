"""A cache for stages of hybrid families, which mix attention layers with state space or linear attention layers.

The family's forward asks the cache of the whole model two things: how many tokens it holds (an attention layer knows)
and whether there is a previous state (a state space layer knows). A stage may hold layers of one kind only, and then
transformers' cache raises instead of answering. This one counts the tokens itself.
"""

from __future__ import annotations

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin


class HybridStageCache(DynamicCache):
    """A DynamicCache that also answers for the kind of layer that its stage does not have.

    Attributes:
        tokens: number of tokens that have passed through the stage; the stage keeps it up to date.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.tokens = 0
        self._attends = any(isinstance(layer, CacheLayerMixin) for layer in self.layers)
        self._has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens, with or without an attention layer in the stage."""
        return super().get_seq_length(layer_idx) if self._attends else self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, offset of the first key), with or without an attention layer in the stage."""
        if self._attends:
            return super().get_mask_sizes(query_length, layer_idx)
        return self.tokens + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether tokens came before, with or without a state space layer in the stage."""
        if self._has_states:
            return super().has_previous_state(layer_idx, state_idx)
        return self.tokens > 0
