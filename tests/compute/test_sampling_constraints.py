"""A constraint changes what its own row may become, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch

from shoal.compute.sampling import BadLogits, Sampler, sample_batch
from shoal.errors import ShoalError
from shoal.spec.sampling import Sampled, SamplingParams

VOCAB = 1000


class Only:
    """Allows some tokens; None: all of them."""

    def __init__(self, tokens: Collection[int] | None, bits: int = VOCAB) -> None:
        self.accepted: list[int] = []
        allowed = np.zeros(-(-bits // 32) * 32, dtype=bool)
        allowed[list(tokens or ())] = True
        self._mask = None if tokens is None else np.packbits(allowed, bitorder="little").tobytes()

    def ready(self, then: Callable[[], None]) -> bool:
        return True

    def mask(self) -> bytes | None:
        return self._mask

    def accept(self, token: int) -> None:
        self.accepted.append(token)


class Broken(Only):
    def mask(self) -> bytes | None:
        raise ShoalError("no way on")


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return 2.0 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sampler(constraint: Only | None = None, **options: object) -> Sampler:
    return Sampler(SamplingParams(**options), vocab_size=VOCAB, constraint=constraint)  # type: ignore[arg-type]


PARAMS: list[dict[str, object]] = [
    {"temperature": 0},
    {"seed": 5},
    {"seed": 6, "temperature": 0.7, "top_p": 0.9},
    {"seed": 7, "top_p": 0.3, "presence_penalty": 1.0, "logprobs": 3},
]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_not_allowed_never_comes(params: dict[str, object], dtype: torch.dtype) -> None:
    allowed = [3, 500, 501, VOCAB - 1]
    constraint = Only(allowed)
    held = sampler(constraint, **params)
    for seed in range(200):
        (choice,) = sample_batch(logits_of(1, seed).to(dtype), [held])
        assert choice.token in allowed
    assert len(constraint.accepted) == 200


@pytest.mark.parametrize("params", PARAMS)
def test_the_other_rows_of_the_batch_stay_exactly_what_they_are(params: dict[str, object]) -> None:
    for seed in range(20):
        logits = logits_of(4, seed)
        alone = sample_batch(logits[:3], [sampler(**params) for _ in range(3)])
        rows = torch.cat([logits[:1], logits[3:], logits[1:3]])
        held = sampler(Only([1, 2]), **params)
        together = sample_batch(rows, [sampler(**params), held, sampler(Only(None), **params), sampler(**params)])
        assert [together[0], *together[2:]] == alone
        assert together[1].token in (1, 2)


def test_of_what_is_allowed_the_likeliest_is_taken_and_draws_keep_their_proportions() -> None:
    logits = logits_of(1, 1)
    allowed = [10, 20, 30]
    best = max(allowed, key=lambda token: logits[0, token].item())
    assert sample_batch(logits, [sampler(Only(allowed), temperature=0)])[0].token == best
    count = 4000
    batch = [sampler(Only(allowed), seed=seed) for seed in range(count)]
    seen = [choice.token for choice in sample_batch(logits.expand(count, -1), batch)]
    for token, share in zip(allowed, logits[0, allowed].softmax(-1).tolist(), strict=True):
        assert abs(seen.count(token) / count - share) < 4.5 * math.sqrt(share * (1 - share) / count) + 1e-3


def test_logprobs_stay_those_of_the_models_own_distribution() -> None:
    logits = logits_of(1)
    own = logits.log_softmax(-1)[0]
    (choice,) = sample_batch(logits, [sampler(Only([42]), logprobs=2)])
    assert choice.token == 42
    assert choice.logprob == pytest.approx(own[42].item(), abs=1e-5)
    assert [token for token, _ in choice.top] == own.topk(2).indices.tolist()


def test_a_vocabulary_wider_or_narrower_than_the_mask_is_no_matter() -> None:
    logits = logits_of(1)
    logits[0, 900] = 50.0
    assert sample_batch(logits, [sampler(Only([7], bits=64), temperature=0)])[0].token == 7
    assert sample_batch(logits[:, :40], [sampler(Only([7, 900]), temperature=0)])[0].token == 7


@pytest.mark.parametrize("place", [7, 900])
def test_broken_logits_are_noticed_wherever_they_are(place: int) -> None:
    logits = logits_of(2)
    logits[1, place] = math.nan
    held = [Only([7]), Only([7])]
    with pytest.raises(BadLogits) as caught:
        sample_batch(logits, [sampler(constraint) for constraint in held])
    assert caught.value.rows == [1]
    assert held[0].accepted == []


def test_when_nothing_allowed_has_a_number_the_row_is_named_and_nothing_has_moved() -> None:
    logits = logits_of(2)
    logits[1, 7] = -math.inf
    held = Only([7])
    with pytest.raises(BadLogits) as caught:
        sample_batch(logits, [sampler(temperature=0), sampler(held)])
    assert (caught.value.rows, held.accepted) == ([1], [])


def test_a_constraint_that_cannot_go_on_moves_no_sampler() -> None:
    other = sampler(temperature=0)
    with pytest.raises(ShoalError, match="no way on"):
        sample_batch(logits_of(2), [other, sampler(Broken([]))])
    assert other.drawn == 0
    assert sample_batch(logits_of(1), [other]) == [Sampled(int(logits_of(1).argmax()))]
