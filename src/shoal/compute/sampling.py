"""From logits to tokens, for the rows of many sessions at once.

The options mean what they mean in the OpenAI API, applied in this order:

    logits + logit_bias - presence_penalty * [token was generated] - frequency_penalty * times generated
    -> -inf for tokens that the session's constraint does not allow
    -> argmax (temperature 0)  or  softmax(. / temperature), cut to the top_p nucleus, one draw

Log-probabilities are those of the model itself: the log-softmax of the logits before bias, penalties, constraint,
temperature and nucleus, so they can be compared between requests.

A draw takes one uniform number that depends on the session's seed and on how many tokens it has drawn, and on nothing
else: neither on which sessions share the batch nor on a server that was replaced in between. The same logits and the
same seed give the same token.

Letters: R rows (one per session), V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.errors import ShoalError, UsageError
from shoal.spec.sampling import Constraint, Sampled, SamplingParams

MAX_TOP_LOGPROBS = 20

NUCLEUS_GUESS = 256
"""Most nuclei hold fewer tokens than this. A partial sort of so many is tried first; only rows with a wider nucleus pay
for sorting the whole vocabulary (128k entries: 8 ms a row)."""


class BadLogits(ShoalError):
    """The model produced NaN or infinite logits; `rows` are the rows of the batch that have them.

    No sampler of the batch has moved, so the other rows can be sampled again without them.
    """

    code = "bad_logits"

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            f"The model's logits are not numbers in {len(rows)} row(s) of the batch ({rows}).",
            hint="A server computes garbage, or the weights overflow this dtype: try --dtype float32.",
        )
        self.rows = rows


def check(params: SamplingParams, *, vocab_size: int) -> None:
    """Raises UsageError, with the range, for a parameter that the sampler has no meaning for.

    temperature 0..100, top_p 0..1, both penalties -2..2, biases -100..100 on tokens of the vocabulary, logprobs 0..20.
    """
    _within("temperature", params.temperature, 0.0, 100.0)
    _within("top_p", params.top_p, 0.0, 1.0)
    _within("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _within("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    for token, bias in params.logit_bias:
        _within("logit_bias", bias, -100.0, 100.0)
        if not 0 <= token < vocab_size:
            raise UsageError(
                f"logit_bias names token {token}, which does not exist.",
                hint=f"This model's tokens are 0 to {vocab_size - 1}.",
            )
    if params.logprobs is not None:
        _within("logprobs", params.logprobs, 0, MAX_TOP_LOGPROBS)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} is {value}, outside {low:g} to {high:g}.")


class Sampler:
    """State of one session: its parameters, how often it has generated which token, how many tokens it has drawn, and
    the constraint on what it may generate, if there is one.

    Raises UsageError for parameters out of range: caught here, where it concerns one request, and not in a batch with
    others.
    """

    def __init__(self, params: SamplingParams, *, vocab_size: int, constraint: Constraint | None = None) -> None:
        check(params, vocab_size=vocab_size)
        self.params = params
        self.constraint = constraint
        self.vocab_size = vocab_size
        self.drawn = 0
        self._counts: dict[int, int] = {}
        self._seed = secrets.randbits(63) if params.seed is None else params.seed

    @property
    def greedy(self) -> bool:
        """Whether the next token is the largest logit, so that no draw is needed."""
        return self.params.temperature == 0 or self.params.top_p == 0

    def adjustments(self) -> dict[int, float]:
        """What bias and penalties add to the logits of the next token."""
        added = dict(self.params.logit_bias)
        presence, frequency = self.params.presence_penalty, self.params.frequency_penalty
        if presence or frequency:
            for token, count in self._counts.items():
                added[token] = added.get(token, 0.0) - presence - frequency * count
        return added

    def uniform(self) -> float:
        """A number in [0, 1) for the next draw, a function of seed and number of draws only."""
        digest = hashlib.blake2b(f"{self._seed}:{self.drawn}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / (1 << 53)

    def accept(self, token: int) -> None:
        """Count `token` as generated. `sample_batch` does this for the tokens it chooses."""
        self.drawn += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.constraint is not None:
            self.constraint.accept(token)


def sample_batch(logits: Tensor, samplers: Sequence[Sampler]) -> list[Sampled]:
    """Choose the next token of every session. logits [R, V], one sampler per row -> R choices.

    Greedy rows share one argmax, sampled rows one softmax and one draw; a constraint changes only its own row. Raises
    BadLogits for NaN or infinite logits (also where a constraint allows nothing else), what a constraint raises, and
    ValueError when rows and samplers do not match; no sampler has moved then.
    """
    if logits.dim() != 2 or logits.shape[0] != len(samplers):
        raise ValueError(f"Logits of shape {tuple(logits.shape)} do not fit {len(samplers)} samplers.")
    if not samplers:
        return []
    adjusted = _adjusted(logits, samplers)
    best, tokens = adjusted.max(dim=-1)  # the first of equal ones, like argmax; NaN wins every comparison
    _check_finite(range(len(samplers)), best)
    chosen = tokens.tolist()
    fitting = _fitting(adjusted, samplers)
    for row, logits_left in fitting.items():
        # The whole row was looked at as well: NaN where nothing is allowed would go unnoticed.
        best, likeliest = logits_left.max(dim=-1)
        _check_finite([row], best.unsqueeze(0))
        chosen[row] = int(likeliest)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawing:
        rows = adjusted if len(drawing) == len(samplers) and not fitting else adjusted[drawing]
        for place, row in enumerate(drawing):
            if row in fitting:
                rows[place] = fitting[row]
        for row, token in zip(drawing, _draw(rows, [samplers[row] for row in drawing]), strict=True):
            chosen[row] = token
    results = _with_logprobs(logits, samplers, chosen)
    for sampler, token in zip(samplers, chosen, strict=True):
        sampler.accept(token)
    return results


def _check_finite(rows: Sequence[int], best: Tensor) -> None:
    """Raises BadLogits naming those of `rows` whose largest logit is not a number."""
    bad = [row for row, value in zip(rows, best.tolist(), strict=True) if not math.isfinite(value)]
    if bad:
        raise BadLogits(bad)


def _fitting(logits: Tensor, samplers: Sequence[Sampler]) -> dict[int, Tensor]:
    """The rows that have a constraint now: their logits [V] with -inf for every token that it does not allow."""
    fitting = {}
    for row, sampler in enumerate(samplers):
        mask = None if sampler.constraint is None else sampler.constraint.mask()
        if mask is not None:
            bits = np.unpackbits(~np.frombuffer(mask, dtype=np.uint8), bitorder="little")[: logits.shape[1]]
            forbidden = torch.from_numpy(bits).view(torch.bool).to(logits.device)
            fitting[row] = logits[row].clone()
            fitting[row][: len(bits)].masked_fill_(forbidden, -math.inf)
            fitting[row][len(bits) :] = -math.inf
    return fitting


def _adjusted(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """logits [R, V] with bias and penalties of all rows, in fp32; the caller's tensor is not changed."""
    entries = [
        (row, token, added) for row, sampler in enumerate(samplers) for token, added in sampler.adjustments().items()
    ]
    if not entries:
        return logits if all(sampler.greedy for sampler in samplers) else logits.float()
    rows, tokens, added = zip(*entries, strict=True)
    index = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
    values = torch.tensor(added, dtype=torch.float32, device=logits.device)
    return logits.float().index_put(index, values, accumulate=True)


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token per row of logits [R, V] by inverting the distribution function at the session's uniform number."""
    device = logits.device
    temperature = torch.tensor([s.params.temperature for s in samplers], device=device).unsqueeze(1)
    top_p = torch.tensor([s.params.top_p for s in samplers], dtype=torch.float64, device=device).unsqueeze(1)
    uniform = torch.tensor([s.uniform() for s in samplers], dtype=torch.float64, device=device).unsqueeze(1)
    # The largest logit is taken off first: a tiny temperature would overflow otherwise.
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)

    guess = min(NUCLEUS_GUESS, probabilities.shape[-1])
    ordered, order = probabilities.topk(guess, dim=-1)
    if bool((ordered.double().sum(dim=-1, keepdim=True) < torch.where(top_p < 1, top_p, 2.0)).any()):
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    reached = ordered.double().cumsum(dim=-1)
    # A token belongs to the nucleus when those before it do not reach top_p; the first always does.
    # One without probability never does: a constraint may forbid it.
    kept = ((reached - ordered) < top_p) & (ordered > 0)
    reached = torch.where(kept, reached, 0.0).cummax(dim=-1).values
    total = reached[:, -1:]
    place = torch.searchsorted(reached, uniform * total, right=True)
    place = torch.minimum(place, kept.sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, place).squeeze(1).tolist()


def _with_logprobs(logits: Tensor, samplers: Sequence[Sampler], chosen: Sequence[int]) -> list[Sampled]:
    """The chosen tokens with log-probabilities for the rows that asked."""
    asked = [row for row, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
    if not asked:
        return [Sampled(token) for token in chosen]
    logprobs = logits[asked].float().log_softmax(dim=-1)
    picked = (
        logprobs.gather(1, torch.tensor([[chosen[row]] for row in asked], device=logits.device)).squeeze(1).tolist()
    )
    most = max(samplers[row].params.logprobs or 0 for row in asked)
    values, tokens = logprobs.topk(min(most, logits.shape[1]), dim=-1)
    reports = {
        row: (
            picked[i],
            tuple(zip(tokens[i].tolist(), values[i].tolist(), strict=True))[: samplers[row].params.logprobs],
        )
        for i, row in enumerate(asked)
    }
    return [Sampled(token, *reports[row]) if row in reports else Sampled(token) for row, token in enumerate(chosen)]
