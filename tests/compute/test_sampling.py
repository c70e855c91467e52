"""Sampling against oracles: the library's logits processors, and penalties computed by hand in numpy."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from shoal.compute.sampling import NUCLEUS_GUESS, BadLogits, Sampler, sample_batch
from shoal.errors import UsageError
from shoal.spec.sampling import SamplingParams

VOCAB = 40


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def sampler(vocab: int = VOCAB, **options: object) -> Sampler:
    return Sampler(SamplingParams(**options), vocab_size=vocab)  # type: ignore[arg-type]


def draws(logits: torch.Tensor, count: int, **options: object) -> list[int]:
    """Tokens of `count` independent sessions over the same logits [V]."""
    vocab = logits.shape[0]
    batch = [sampler(vocab, seed=seed, **options) for seed in range(count)]
    return [sampled.token for sampled in sample_batch(logits.expand(count, -1), batch)]


def test_temperature_zero_takes_the_largest_logit_and_the_first_of_equal_ones() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, [7, 3]] = 1.0
    assert [s.token for s in sample_batch(logits, [sampler(temperature=0), sampler(temperature=0)])] == [0, 3]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.5), (0.3, 0.95)])
@pytest.mark.parametrize("vocab", [VOCAB, 4 * NUCLEUS_GUESS], ids=["narrow", "wide"])
def test_draws_follow_the_distribution_of_the_library_warpers(temperature: float, top_p: float, vocab: int) -> None:
    logits = logits_of(1, vocab, spread=1.0)
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(-1)[0].numpy()
    count = 4000
    seen = Counter(draws(logits[0], count, temperature=temperature, top_p=top_p))
    assert all(expected[token] > 0 for token in seen)
    for token in np.argsort(-expected)[:10]:
        deviation = math.sqrt(count * expected[token] * (1 - expected[token])) + 1e-9
        assert abs(seen[int(token)] - count * expected[token]) <= 4.5 * deviation + 1


def test_top_p_keeps_exactly_the_tokens_that_the_library_keeps() -> None:
    for seed in range(20):
        logits = logits_of(1, 12, seed=seed)
        kept = TopPLogitsWarper(0.7)(None, logits)[0] > -math.inf
        assert set(draws(logits[0], 600, top_p=0.7)) <= set(kept.nonzero().flatten().tolist())
        # the last token of the nucleus is in it: a uniform number just below 1 draws it
        last = sampler(12, top_p=0.7)
        last.uniform = lambda: 1.0 - 2**-53  # type: ignore[method-assign]
        smallest = int(torch.where(kept, logits[0], math.inf).argmin())
        assert sample_batch(logits, [last])[0].token == smallest


def test_top_p_zero_and_a_tiny_temperature_mean_the_most_likely_token() -> None:
    logits = logits_of(1)
    best = int(logits.argmax())
    assert set(draws(logits[0], 20, top_p=0.0)) == {best}
    assert set(draws(logits[0], 20, temperature=1e-6)) == {best}


def test_penalties_and_bias_equal_the_formula_over_generated_tokens() -> None:
    rng = np.random.default_rng(0)
    session = sampler(temperature=0, presence_penalty=0.7, frequency_penalty=0.4, logit_bias=((5, 1.5), (9, -100.0)))
    counts = np.zeros(VOCAB)
    for _ in range(50):
        logits = rng.normal(size=VOCAB).astype(np.float32)
        adjusted = logits - 0.4 * counts - 0.7 * (counts > 0)
        adjusted[5] += 1.5
        adjusted[9] -= 100.0
        token = sample_batch(torch.from_numpy(logits).unsqueeze(0), [session])[0].token
        assert token == int(adjusted.argmax())
        counts[token] += 1
    assert counts.max() > 1
    assert counts[9] == 0


def test_a_row_is_not_changed_by_its_company() -> None:
    logits = logits_of(4)
    options: list[dict[str, object]] = [
        {"temperature": 0},
        {"seed": 3, "temperature": 0.9, "top_p": 0.9},
        {"seed": 4, "logprobs": 3, "presence_penalty": 1.0},
        {"temperature": 0, "logit_bias": ((1, 50.0),)},
    ]
    together = [sampler(**o) for o in options]
    separate = [sampler(**o) for o in options]
    for _ in range(20):
        expected = [sample_batch(logits[i : i + 1], [s])[0] for i, s in enumerate(separate)]
        assert sample_batch(logits, together) == expected


def test_the_ith_token_depends_on_seed_number_and_logits_only() -> None:
    logits = logits_of(10)
    first, second = sampler(seed=11), sampler(seed=11)
    tokens = [sample_batch(row.unsqueeze(0), [first])[0].token for row in logits]
    for token in tokens[:6]:  # a session rebuilt elsewhere is told what was generated, and goes on
        second.accept(token)
    assert [sample_batch(row.unsqueeze(0), [second])[0].token for row in logits[6:]] == tokens[6:]
    assert len({tuple(draws(logits_of(1, seed=5)[0], 8)), tuple(draws(logits_of(1, seed=5)[0], 8))}) == 1


def test_sessions_without_a_seed_differ() -> None:
    logits = torch.zeros(16, VOCAB)
    assert len({s.token for s in sample_batch(logits, [sampler() for _ in range(16)])}) > 1


def test_logprobs_are_those_of_the_model_before_bias_penalty_and_temperature() -> None:
    logits = logits_of(3)
    batch = [
        sampler(temperature=0, logprobs=4, logit_bias=((2, 100.0),)),
        sampler(temperature=0),
        sampler(temperature=5.0, seed=1, logprobs=0),
    ]
    chosen, plain, bare = sample_batch(logits, batch)
    expected = logits.log_softmax(-1)
    assert chosen.token == 2
    assert chosen.logprob == pytest.approx(float(expected[0, 2]))
    values, tokens = expected[0].topk(4)
    assert [token for token, _ in chosen.top] == tokens.tolist()
    assert [value for _, value in chosen.top] == pytest.approx(values.tolist())
    assert (plain.logprob, plain.top) == (None, ())
    assert bare.logprob == pytest.approx(float(expected[2, bare.token]))
    assert bare.top == ()


def test_bf16_logits_choose_like_fp32_ones() -> None:
    logits = logits_of(2).to(torch.bfloat16)
    for options in ({"temperature": 0.0}, {"seed": 1, "top_p": 0.9, "logprobs": 2}):
        mine = sample_batch(logits, [sampler(**options), sampler(**options)])  # type: ignore[arg-type]
        assert mine == sample_batch(logits.float(), [sampler(**options), sampler(**options)])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 1}])
def test_broken_logits_are_an_error_that_names_the_rows_and_moves_nobody(value: float, options: dict) -> None:
    logits = logits_of(3)
    logits[1, 4] = value
    batch = [sampler(**options) for _ in range(3)]
    with pytest.raises(BadLogits) as caught:
        sample_batch(logits, batch)
    assert caught.value.rows == [1]
    assert [s.drawn for s in batch] == [0, 0, 0]
    sample_batch(logits[[0, 2]], [batch[0], batch[2]])


def test_the_callers_logits_are_left_alone() -> None:
    logits = logits_of(2)
    before = logits.clone()
    sample_batch(logits, [sampler(logit_bias=((1, 5.0),)), sampler(seed=2, top_p=0.5)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 1.1}, {"presence_penalty": 2.1},
        {"frequency_penalty": -3.0}, {"logit_bias": ((1, 101.0),)}, {"logprobs": 21}, {"logit_bias": ((VOCAB, 1.0),)},
        {"logit_bias": ((-1, 1.0),)},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused_with_the_range(options: dict) -> None:
    with pytest.raises(UsageError):
        sampler(**options)


def test_rows_and_samplers_must_match() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        sample_batch(logits_of(2), [sampler()])
    assert sample_batch(torch.zeros(0, VOCAB), []) == []
