"""`shoal bench split`: cut against whole, family by family (compute/selfcheck.py says what is compared).

`max_abs_diff` compares the stages themselves: 0.0 on a CPU, where both sides do the same operations in the same order.
On a GPU kernels are chosen by shape, so there rounding is expected; it is printed beside the bar it is held to.
`packed_max_abs_diff` compares what servers really run: three engines, sessions of different lengths in one forward,
prefill in chunks, decode rows among them. It is null for a family whose sessions run one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.compute.engine import BlockEngine, Work
from shoal.compute.families import FAMILIES, random_model, tiny_config
from shoal.compute.selfcheck import (
    FOREIGN_ERRORS,
    WRONG,
    Chain,
    Whole,
    cut,
    difference,
    measure,
    positions,
)
from shoal.compute.stage import check_splittable
from shoal.errors import CannotSplit

PACKED_BAR = 1e-5
DEVICE_BAR = 1e-4
"""Largest rounding accepted where the device chooses kernels by shape."""

# Three sessions: (rows of the prompt that enter in each run); afterwards every run takes one row of each.
_SCHEDULE = ((10, 10, 4), (9, 1, 1), (0, 8, 9))
_DECODE_RUNS = 4


@dataclass(frozen=True)
class SplitResult:
    """What one family showed; the JSON of the command. Differences are None where nothing could be compared."""

    family: str
    max_abs_diff: float | None
    packed_max_abs_diff: float | None
    refused: str | None

    def within(self, bar: float) -> bool:
        """True for a refusal too: refusing is an answer, answering wrongly is not."""
        return self.max_abs_diff is None or (
            self.max_abs_diff <= bar and (self.packed_max_abs_diff or 0.0) <= max(bar, PACKED_BAR)
        )


def run(names: Iterable[str] = (), *, device: torch.device | str = "cpu") -> Iterator[SplitResult]:
    """One result after another, for the named families or all of them. Raises UsageError for an unknown name."""
    for name in list(names) or sorted(FAMILIES):
        yield compare(name, device=device)


def compare(family: str, *, device: torch.device | str = "cpu") -> SplitResult:
    """Cut a tiny random model of `family` in three and compare. Trouble of any kind is a refusal with its reason."""
    config = tiny_config(family)
    try:
        check_splittable(config)
        model = random_model(family, device=device)
        chain = cut(model)
        found = measure(model, chain)
        if found.largest > WRONG:
            raise CannotSplit(f"the pieces differ from the whole model by {found.largest:.1e}")
        with torch.no_grad():
            packed = packed_difference(Whole(model), chain)
    except (CannotSplit, *FOREIGN_ERRORS) as error:
        return SplitResult(family, None, None, str(error))
    return SplitResult(family, found.largest, packed, None)


def packed_difference(whole: Whole, chain: Chain) -> float | None:
    """Three sessions through three engines, against each session's text through the whole model at once.

    None when the engines run one session at a time.
    """
    engines = [BlockEngine(stage) for stage in chain.stages]
    if not all(engine.packed for engine in engines):
        return None
    embedding = whole.model.get_input_embeddings().weight
    rng = torch.Generator().manual_seed(2)
    texts = [
        torch.randint(3, embedding.shape[0], (1, sum(rows) + _DECODE_RUNS), generator=rng).to(embedding.device)
        for rows in zip(*_SCHEDULE, strict=True)
    ]
    names = [bytes([number]) for number in range(len(texts))]
    for engine in engines:
        for name, text in zip(names, texts, strict=True):
            engine.open(name, engine.stage.blocks, text.shape[1])
    answers: list[list[Tensor]] = [[] for _ in texts]
    for rows in (*_SCHEDULE, *[(1,) * len(texts)] * _DECODE_RUNS):
        _one_run(chain, engines, names, texts, rows, answers)
    whole.start(cached=False)
    return max(
        difference(torch.cat(answer, dim=1), whole.logits(text, positions(text)))
        for answer, text in zip(answers, texts, strict=True)
    )


def _one_run(
    chain: Chain,
    engines: list[BlockEngine],
    names: list[bytes],
    texts: list[Tensor],
    rows: tuple[int, ...],
    answers: list[list[Tensor]],
) -> None:
    """Feed the next `rows[i]` tokens of text i, all sessions in one run; append their logits [1, rows, V]."""
    works, parts, owners = [], [], []
    for owner, (name, text, count) in enumerate(zip(names, texts, rows, strict=True)):
        if count == 0:
            continue
        start = engines[0].length(name)
        ids = text[:, start : start + count]
        works.append(Work(name, start, count))
        parts.append(chain.ends.embed(ids, positions(ids, start))[0])
        owners.append(owner)
    hidden = torch.cat(parts)
    for engine in engines:
        hidden = engine.run(works, hidden)
    logits = chain.ends.logits(hidden[None])
    for owner, part in zip(owners, logits.split([work.rows for work in works], dim=1), strict=True):
        answers[owner].append(part)
