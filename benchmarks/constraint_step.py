"""What does it cost to hold an answer to a grammar, with a vocabulary as large models have it?

A byte-level tokenizer of 128,000 made-up words; grammars as requests bring them; answers by a model that says anything
(the next token is drawn evenly from those allowed, which leads into every corner of a grammar). Printed are the time to
compile, to compute one step's mask (in a thread of its own, while the servers compute their blocks), and what the
sampler takes with and without masks for batches of 1, 8 and 32.

    python benchmarks/constraint_step.py [--words 128000] [--steps 2000]

Last results: docs/guides/tools-and-json.md, "What it costs".
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import statistics
import time
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.compute.sampling import Sampler, sample_batch
from shoal.gateway.calls import DESCRIBED
from shoal.gateway.grammar import Grammars
from shoal.gateway.openai import Callee, Calling
from shoal.gateway.schemas import Schema
from shoal.gateway.shape import Shape
from shoal.gateway.text import Vocabulary
from shoal.spec.sampling import SamplingParams

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "code": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "code"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "mail", "tags", "address"],
    "additionalProperties": False,
}


def synthetic_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges are made up: pairs of what there is, mostly of letters, most words after a space."""
    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(alphabet)}
    pieces = [*(chr(code) for code in range(ord("a"), ord("z") + 1)), *"ĠĠĠĠ", *"ABCXYZ", *'{}[]":,.0123456789_-']
    merges = []
    while len(vocabulary) < words:
        left = rng.choice(pieces)
        right = rng.choice(pieces if rng.random() < 0.97 else alphabet)
        if len(left + right) <= 14 and left + right not in vocabulary and not right.startswith("Ġ"):
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
            pieces.append(left + right)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def shapes() -> dict[str, Shape]:
    calling = Calling([Callee(f"tool_{n}", Schema(PERSON, True, "")) for n in range(8)])
    return {
        "any JSON object": Shape(form=Schema({"type": "object"}, True, "")),
        "a schema": Shape(form=Schema(PERSON, True, "")),
        "8 tools, a call required": Shape(calling=Calling(calling.functions, required=True), calls=DESCRIBED),
        "8 tools, free text": Shape(calling=calling, calls=DESCRIBED),
    }


def walk(grammars: Grammars, eos: int, name: str, shape: Shape, steps: int) -> None:
    rng = random.Random(0)
    compiled_s = []
    for _ in range(5):
        started = time.perf_counter()
        grammar = asyncio.run(shape.grammar(grammars))
        compiled_s.append(time.perf_counter() - started)
    assert grammar is not None
    running, spent_s, length = grammar.start(), [], 0
    for _ in range(steps):
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(running.mask(), np.uint8), bitorder="little"))
        token, length = int(rng.choice(allowed)), length + 1
        if token == eos or length == 400:
            running, length = grammar.start(), 0
            continue
        started = time.perf_counter()
        running.accept(token)
        running.mask()
        spent_s.append(time.perf_counter() - started)
    spent_s.sort()
    print(
        f"{name:<26} compile {statistics.median(compiled_s) * 1e3:5.1f} ms   step: median "
        f"{statistics.median(spent_s) * 1e3:5.2f} ms   mean {statistics.mean(spent_s) * 1e3:5.2f} ms   "
        f"p99 {spent_s[int(len(spent_s) * 0.99)] * 1e3:5.2f} ms   worst {spent_s[-1] * 1e3:5.1f} ms",
        flush=True,
    )


class _Fixed:
    """A constraint that allows every third token, at once."""

    def __init__(self, size: int) -> None:
        bits = np.zeros(-(-size // 32) * 32, dtype=bool)
        bits[::3] = True
        self._mask = np.packbits(bits, bitorder="little").tobytes()

    def ready(self, then: object) -> bool:
        return True

    def mask(self) -> bytes:
        return self._mask

    def accept(self, token: int) -> None:
        pass


def sampling(size: int, rows: int, temperature: float) -> None:
    logits = 2.0 * torch.randn(rows, size, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=temperature, top_p=0.95, seed=1)

    def step_s(constrained: int) -> float:
        samplers = [
            Sampler(params, vocab_size=size, constraint=_Fixed(size) if row < constrained else None)
            for row in range(rows)
        ]
        started = time.process_time()
        sample_batch(logits, samplers)
        return time.process_time() - started

    cases = sorted({0, 1, rows})
    spent_s: dict[int, list[float]] = {constrained: [] for constrained in cases}
    for _ in range(40):  # in turn, because machines are shared and their speed drifts
        for constrained in cases:
            spent_s[constrained].append(step_s(constrained))
    shown = "   ".join(f"{each} held {statistics.median(spent_s[each]) * 1e3:6.2f} ms" for each in cases)
    print(f"sampling {rows:>2} rows, temperature {temperature:g}:   {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, default=128_000)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = synthetic_tokenizer(options.words)
    vocabulary = Vocabulary(tokenizer)
    eos = tokenizer.eos_token_id
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grammars = Grammars(vocabulary, frozenset({eos}))
    started = time.perf_counter()
    grammars.check(Schema({"type": "object"}, True, ""))
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{vocabulary.size} tokens: first grammar after {time.perf_counter() - started:.2f} s, {grown_mib:.0f} MiB")
    for name, shape in shapes().items():
        walk(grammars, eos, name, shape, options.steps)
    for temperature in (0.0, 0.8):
        for rows in (1, 8, 32):
            sampling(vocabulary.size, rows, temperature)


if __name__ == "__main__":
    main()
