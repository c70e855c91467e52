"""What does the block engine cost over the plain model? One process, one thread, no network.

Decode of 1, 8 and 32 sessions and prefill of 2,048 tokens in chunks, `Ends` + `BlockEngine` + `HeadEngine` against the
same Hugging Face model with a DynamicCache and one batch, head and greedy choice included on both sides. Steps of the
two are interleaved and medians compared, because machines are shared and their speed drifts within seconds.

    python benchmarks/engine_step.py [--dtype float32 bfloat16] [--steps 40] [--layers 16] [--exact]

Above 1.00 the engine is the faster one. Last results (2026-11-23, 2 shared cores of an Intel Xeon with AMX, torch 2.13,
transformers 5.23; ratios move by about 0.03 from run to run):

                              float32   float32 exact   bfloat16
    decode against generate      1.03            0.90       1.03
    decode, 1 session            0.99            0.88       1.00
    decode, 8 sessions           1.02            1.03       1.00
    decode, 32 sessions          1.13            0.41       1.06
    prefill by 256               1.12                       1.09
       against one piece         0.97                       0.90
    prefill by 512                                          1.10
       against one piece                                    0.91
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from shoal.compute.engine import BlockEngine, Work
from shoal.compute.head import HeadEngine
from shoal.compute.sampling import Sampler, SamplingParams
from shoal.compute.split import Ends, Stage
from shoal.spec.ids import BlockRange

CONTEXT = 256
PROMPT = 2048


def timed(step: Callable[[], object]) -> float:
    """CPU seconds of this single-threaded process: what it would take on a machine that nobody shares."""
    start = time.process_time()
    step()
    return time.process_time() - start


def report(name: str, ours_s: list[float], theirs_s: list[float]) -> None:
    ours, theirs = statistics.median(ours_s), statistics.median(theirs_s)
    print(
        f"{name:<34} engine {ours * 1e3:8.2f} ms   plain {theirs * 1e3:8.2f} ms   ratio {theirs / ours:5.2f}",
        flush=True,
    )


class Ours:
    """All sessions of one batch through embedding, engine and head."""

    def __init__(self, model: LlamaForCausalLM, *, exact: bool) -> None:
        blocks = BlockRange(0, model.config.num_hidden_layers)
        self.engine = BlockEngine(Stage.from_model(model, blocks), exact=exact)
        self.head = HeadEngine(Ends.from_model(model), exact=exact)
        self.blocks = blocks

    def open(self, count: int) -> None:
        self.sessions = [index.to_bytes(16, "big") for index in range(count)]
        self.samplers = [Sampler(SamplingParams(temperature=0), vocab_size=self.head.ends.vocab_size)] * count
        for session in self.sessions:
            self.engine.open(session, self.blocks, PROMPT + CONTEXT)

    def close(self) -> None:
        for session in self.sessions:
            self.engine.close(session)

    def step(self, ids: list[list[int]]) -> list[int]:
        """The next tokens of every session; ids[i] are the new tokens of session i."""
        works = [
            Work(session, self.engine.length(session), len(new))
            for session, new in zip(self.sessions, ids, strict=True)
        ]
        positions = [position for work in works for position in range(work.position, work.position + work.rows)]
        hidden = self.engine.run(works, self.head.embed([token for new in ids for token in new], positions))
        ends = torch.tensor([work.rows for work in works]).cumsum(0) - 1
        return [sampled.token for sampled in self.head.sample(hidden[ends], self.samplers)]


class Plain:
    """The same sessions as one batch of the plain model."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    def open(self, count: int) -> None:
        self.cache = DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def step(self, ids: list[list[int]]) -> list[int]:
        out = self.model(torch.tensor(ids), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1).tolist()


def decode(ours: Ours, plain: Plain, name: str, count: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 1000, (count, CONTEXT), generator=generator).tolist()
    ours.open(count)
    plain.open(count)
    mine, theirs = ours.step(prompt), plain.step(prompt)
    ours_s: list[float] = []
    theirs_s: list[float] = []
    for _ in range(steps):
        tokens = [[token] for token in mine]
        ours_s.append(timed(lambda tokens=tokens: mine.__setitem__(slice(None), ours.step(tokens))))
        tokens = [[token] for token in theirs]
        theirs_s.append(timed(lambda tokens=tokens: theirs.__setitem__(slice(None), plain.step(tokens))))
    ours.close()
    report(f"{name} decode, {count} sessions", ours_s, theirs_s)


def generate(ours: Ours, plain: Plain, name: str, steps: int) -> None:
    """Single stream against `generate`: whole answers of 32 tokens after the prompt, prefill taken out."""
    prompt = torch.randint(0, 1000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    new = 32

    def run_plain(tokens: int) -> None:
        plain.model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    ours_s, theirs_s = [], []
    for _ in range(max(3, steps // 10)):
        ours.open(1)
        token = ours.step(prompt.tolist())

        def run_ours(token: list[int] = token) -> None:
            for _ in range(new):
                token[:] = ours.step([[token[0]]])

        ours_s.append(timed(run_ours) / new)
        ours.close()
        theirs_s.append((timed(lambda: run_plain(new + 1)) - timed(lambda: run_plain(1))) / new)
    report(f"{name} decode against generate", ours_s, theirs_s)


def prefill(ours: Ours, plain: Plain, name: str, chunk: int, repeats: int) -> None:
    prompt = torch.randint(0, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    chunks = [prompt[0][start : start + chunk] for start in range(0, PROMPT, chunk)]
    ours_s, theirs_s, whole_s = [], [], []
    for _ in range(repeats):
        ours.open(1)
        ours_s.append(timed(lambda: [ours.step([part]) for part in chunks]))
        ours.close()
        plain.open(1)
        theirs_s.append(timed(lambda: [plain.step([part]) for part in chunks]))
        plain.open(1)
        whole_s.append(timed(lambda: plain.step(prompt)))
    report(f"{name} prefill {PROMPT} by {chunk}", ours_s, theirs_s)
    report("   against plain in one piece", ours_s, whole_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--chunks", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--exact", action="store_true", help="run the engine in exact mode")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.dtype:
        config = LlamaConfig(
            hidden_size=1024, num_hidden_layers=arguments.layers, num_attention_heads=16, num_key_value_heads=4,
            intermediate_size=2816, vocab_size=16384, max_position_embeddings=4096,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(getattr(torch, name)).eval()
        ours, plain = Ours(model, exact=arguments.exact), Plain(model)
        print(f"{name}: {ours.engine.packed_reason}; row tile {ours.engine.row_tile}")
        if 1 in arguments.sessions:
            generate(ours, plain, name, arguments.steps)
        for count in arguments.sessions:
            decode(ours, plain, name, count, arguments.steps)
        for chunk in arguments.chunks:
            prefill(ours, plain, name, chunk, max(2, arguments.steps // 20))


if __name__ == "__main__":
    main()
