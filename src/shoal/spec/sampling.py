"""How the next token is chosen, and what was chosen: the two nouns that gateway, driver and sampler share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a request asks of the sampler. Ranges are checked by whoever accepts the request, not here.

    `temperature` 0 means greedy: the most likely token, and `seed` has no effect. `seed` None means that every run
    may differ; with a seed, the same prompt gives the same tokens.
    `presence_penalty` is subtracted once from the logit of each token generated so far, `frequency_penalty` once per
    occurrence. `logit_bias` holds pairs (token, bias) that are added to the logits.
    `logprobs` None reports nothing, 0 the chosen token's log-probability, k > 0 also the k most likely tokens.
    Log-probabilities are those of the model's own distribution, before temperature, penalties, bias and top_p.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token; `logprob` is natural, `top` the likeliest alternatives (token, logprob), best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What the grammar of one answer allows as its next token. One object per generation, used by one at a time.

    The work of a step is done in a thread of the constraint's own: `accept` starts it and returns at once.
    """

    def ready(self, then: Callable[[], None]) -> bool:
        """True when `mask` will not wait. Otherwise `then` is called once, from another thread, when that is so."""
        ...

    def mask(self) -> bytes | None:
        """One bit per token, the lowest of each byte first: set for a token that may come next. None allows all.

        Tokens beyond its end are not allowed. Waits while the step is being computed. Raises ShoalError when the
        grammar cannot go on.
        """
        ...

    def accept(self, token: int) -> None:
        """`token` was chosen: go on behind it."""
        ...
