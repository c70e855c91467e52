"""A model in integers whose every output depends on the whole history, so that any mistake shows.

A block keeps one number per session: a hash of all inputs it has seen, in order. An output hashes that number with the
input. A replay that leaves out, repeats, reorders or changes a single row gives other outputs from there on, for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

VOCABULARY = 50_000
_PRIME = 2**61 - 1


def _mix(a: int, b: int) -> int:
    mixed = (a * 6364136223846793005 + b * 3202034522624059733 + 1442695040888963407) % _PRIME
    return mixed ^ (mixed >> 29)


def embed(token: int) -> int:
    """The hidden state of a token before block 0."""
    return _mix(token + 1, 7)


def pick(hidden: int) -> int:
    """The greedy token for an output of the last block."""
    return hidden % VOCABULARY


class Cache:
    """What the blocks start:end remember of one session."""

    def __init__(self, start: int, end: int) -> None:
        self.length = 0
        self._states = {block: block + 1 for block in range(start, end)}

    def run(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Put consecutive rows through the blocks."""
        outputs = []
        for hidden in rows:
            for block, state in self._states.items():
                self._states[block] = state = _mix(state, hidden)
                hidden = _mix(hidden, state)
            outputs.append(hidden)
        self.length += len(rows)
        return tuple(outputs)


def generate(prompt: Sequence[int], num_blocks: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """What one machine alone computes: (tokens, outputs of the last block for every position)."""
    cache = Cache(0, num_blocks)
    outputs = list(cache.run([embed(token) for token in prompt]))
    tokens = [pick(outputs[-1])]
    while len(tokens) < num_tokens:
        outputs += cache.run([embed(tokens[-1])])
        tokens.append(pick(outputs[-1]))
    return tokens, outputs
