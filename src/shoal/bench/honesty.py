"""How far honest and lying servers are apart, and how long a lying one lasts: figures for `shoal bench security`.

Both sides of every comparison are real engines over a random Llama: the checked server takes a prompt in pieces of 256
rows and then row by row, as in a call; the witness takes all of it in pieces of 64, as in a check. What a check would
have seen is kept, and the decisions (swarm.honesty) are then run over it many thousands of times.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shoal.bench.cheats import ANSWERS, F32, WEIGHTS
from shoal.bench.figures import Figure, at_least, at_most
from shoal.client.checks import differences
from shoal.compute.engine import BlockEngine, Work
from shoal.compute.split import Stage
from shoal.spec.ids import BlockRange
from shoal.swarm import honesty
from shoal.wire import tensors
from shoal.wire.messages import WireType
from shoal.wire.rows import Rows

Progress = Callable[[str], None]

HONEST = "honest"
DECODED = 8
RATE = 0.02
CALLS = 500
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}
SPANS = (BlockRange(0, 4), BlockRange(4, 8), BlockRange(7, 8))
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Setting:
    """What the two servers declare, and how rows travel."""

    checked: str
    witness: str
    wire: WireType

    def __str__(self) -> str:
        return f"{self.checked} against {self.witness} over {self.wire}"

    @property
    def within(self) -> honesty.Tolerance:
        return honesty.tolerance([honesty.Declared(self.checked), honesty.Declared(self.witness)], self.wire)


SETTINGS = (
    Setting("float32", "float32", "f32"),
    Setting("float32", "float32", "int8"),
    Setting("bfloat16", "bfloat16", "bf16"),
    Setting("bfloat16", "float32", "bf16"),
    Setting("bfloat16", "bfloat16", "int8"),
    Setting("bfloat16", "float32", "int8"),
)
FULL_PRECISION_ONLY = frozenset({"int8 weights"})
"""Below the noise of the other settings; docs/attacks.md says so."""


@dataclass(slots=True)
class Seen:
    """What checks of one kind of server saw in one setting."""

    checks: list[honesty.Comparison] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    """Of every row, the difference as a share of the tolerance."""
    of_output: list[float] = field(default_factory=list)

    def add(self, found: Sequence[honesty.Difference], within: honesty.Tolerance) -> None:
        self.checks.append(honesty.compare(found, within))
        self.used += [within.used(row) for row in found]
        self.of_output += [row.error / row.output for row in found if row.output]

    @property
    def caught(self) -> float:
        """Share of its checks that find it."""
        return sum(not check.same for check in self.checks) / len(self.checks)


Measured = dict[tuple[str, Setting], Seen]


def run(progress: Progress, *, models: int = 1, prompts: int = 8) -> list[Figure]:
    """Measure and decide; about a minute on one core."""
    torch.set_num_threads(1)  # small matrices: more threads only wait for each other
    measured = measure(models=models, prompts=prompts, progress=progress)
    for line in table(measured):
        progress(line)
    progress("honesty: 1,000 liars and 100,000 honest checks")
    return figures(measured)


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(*, models: int, prompts: int, progress: Progress = lambda text: None) -> Measured:
    """Every kind of server in every setting, over `models` random models, SPANS and `prompts` texts each."""
    measured: Measured = {}
    for seed in range(models):
        model = _random_model(seed)
        for blocks in SPANS:
            progress(f"honesty: model {seed + 1} of {models}, blocks {blocks}")
            _measure_span(model, blocks, seed, prompts, measured)
    return measured


def _random_model(seed: int) -> PreTrainedModel:
    """Matrices of variance 1 / (2 fan-in), as in compute.families.random_model."""
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / math.sqrt(2 * parameter.shape[1]))
    return model


def _measure_span(model: PreTrainedModel, blocks: BlockRange, seed: int, prompts: int, measured: Measured) -> None:
    rng = np.random.default_rng(seed)
    before = BlockEngine(Stage.from_model(model, BlockRange(0, blocks.start))) if blocks.start else None
    engines: dict[str, BlockEngine] = {}
    for name, dtype in TYPES.items():
        engines[name] = BlockEngine(Stage.from_model(copy.deepcopy(model).to(dtype), blocks))
    for kind, change in WEIGHTS.items():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            change(changed, blocks.start)
        engines[kind] = BlockEngine(Stage.from_model(changed, blocks))
    others: dict[Setting, F32] = {}
    for number in range(prompts):
        # The first prompts are short ones: a chat's first line.
        prompt = int(rng.integers(8, 40)) if number % 3 == 0 else int(rng.integers(40, 200))
        ids = torch.from_numpy(rng.integers(3, SHAPE["vocab_size"], prompt + DECODED))
        with torch.inference_mode():
            inputs = model.get_input_embeddings()(ids)
            if before is not None:
                inputs = _through(before, inputs, [len(ids)])
        text = _Text(engines, inputs, prompt)
        for setting in SETTINGS:
            sent = text.sent[setting.wire]
            witness = _rows(text.checked(setting.witness, setting.wire), setting.wire)
            honest = text.called(setting.checked, setting.wire)
            answers: dict[str, Tensor] = {HONEST: honest}
            for kind in WEIGHTS:
                if kind not in FULL_PRECISION_ONLY or (setting.checked, setting.wire) == ("float32", "f32"):
                    # In float32 whatever is declared: without the noise of the declared type it is harder to see.
                    answers[kind] = text.checked(kind, setting.wire)
            x, y = sent.numpy(), honest.float().numpy()
            for kind, wrong in ANSWERS.items():
                other = others.get(setting, y[::-1].copy())
                answers[kind] = torch.from_numpy(np.ascontiguousarray(wrong(x, y, other, rng), np.float32))
            others[setting] = y
            for kind, answer in answers.items():
                found = differences([_rows(sent, "f32")], [_rows(answer, setting.wire)], [witness])
                measured.setdefault((kind, setting), Seen()).add(found, setting.within)


class _Text:
    """One text's inputs of the blocks, and what each engine makes of them; computed once, used in several settings."""

    def __init__(self, engines: dict[str, BlockEngine], inputs: Tensor, prompt: int) -> None:
        wires = dict.fromkeys(setting.wire for setting in SETTINGS)
        self.sent = {wire: _travelled(inputs, wire) for wire in wires}
        self._engines = engines
        self._call = [*_pieces(prompt, 256), *[1] * (len(inputs) - prompt)]
        self._check = _pieces(len(inputs), 64)
        self._known: dict[tuple[str, WireType, bool], Tensor] = {}

    def called(self, engine: str, wire: WireType) -> Tensor:
        """As in a call: the prompt, then row by row."""
        return self._computed(engine, wire, True)

    def checked(self, engine: str, wire: WireType) -> Tensor:
        """As in a check."""
        return self._computed(engine, wire, False)

    def _computed(self, engine: str, wire: WireType, call: bool) -> Tensor:
        key = (engine, wire, call)
        if key not in self._known:
            pieces = self._call if call else self._check
            self._known[key] = _through(self._engines[engine], self.sent[wire], pieces)
        return self._known[key]


def _pieces(rows: int, size: int) -> list[int]:
    return [min(size, rows - at) for at in range(0, rows, size)]


def _through(engine: BlockEngine, inputs: Tensor, pieces: Sequence[int]) -> Tensor:
    """inputs [rows, H] through an engine as one session, in these pieces."""
    session = b"check"
    engine.open(session, engine.stage.blocks, inputs.shape[0])
    outs, at = [], 0
    for rows in pieces:
        outs.append(engine.run([Work(session, at, rows)], inputs[at : at + rows]))
        at += rows
    engine.close(session)
    return torch.cat(outs)


def _rows(values: Tensor, wire: WireType) -> Rows:
    tensor, buffers = tensors.encode(values.float().numpy(), wire)
    return Rows(wire, tensor.width, tensor.rows, buffers[0])


def _travelled(values: Tensor, wire: WireType) -> Tensor:
    """float32 [rows, H] as they come out at the other end."""
    rows = _rows(values, wire)
    return torch.from_numpy(tensors.decode(rows.tensor, rows.data).copy())


# --- deciding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lasted:
    """One liar: how many calls it served until it was in quarantine (None: it never was), and what finding it cost."""

    calls: int | None
    replays: int


def liar(seen: Seen, rng: random.Random, *, calls: int, share: float = 1.0, stages: int = 2) -> Lasted:
    """A server that lies in `share` of its calls, in a chain of `stages`, with two honest replicas."""
    reputation = honesty.Reputation()
    replays = 0
    for call in range(1, calls + 1):
        lies = rng.random() < share
        stage = honesty.draw(stages, RATE, rng)
        if stage is None:
            continue
        replays += 1
        same = stage != 0 or not lies or rng.choice(seen.checks).same
        finding = honesty.judge("liar", "one", same=same)
        if not same:
            replays += 1
            finding = honesty.judge("liar", "one", "two", same=False, third_with_witness=True)
        if reputation.note(finding, float(call)):
            return Lasted(call, replays)
    return Lasted(None, replays)


def false_bans(measured: Measured, rng: random.Random, *, checks: int, servers: int = 100) -> tuple[int, int]:
    """(strikes, bans) of honest servers in so many checks, each of 8 to 256 rows drawn from those that were measured.
    The worst is assumed of the third server: that it always sides with the witness."""
    pools = [seen.used for (kind, _), seen in measured.items() if kind == HONEST]
    reputation = honesty.Reputation()
    strikes = bans = 0
    for check in range(checks):
        rows = rng.choices(rng.choice(pools), k=rng.randint(honesty.MIN_ROWS, 256))
        wrong = sum(share > 1.0 for share in rows)
        same = honesty.Comparison(len(rows), wrong, 0.0).same
        node = f"server{check % servers}"
        finding = honesty.judge(node, "one", "two", same=same, third_with_witness=True)
        strikes += finding.guilty is not None
        bans += len(reputation.note(finding, float(check)))
    return strikes, bans


def figures(measured: Measured, *, liars: int = 1000, honest_checks: int = 100_000) -> list[Figure]:
    """The bars of the issue over what was measured."""
    rng = random.Random(8)
    planted = [
        (kind, setting)
        for kind, setting in measured
        if kind != HONEST and (kind not in FULL_PRECISION_ONLY or setting.wire == "f32")
    ]
    lasted = [liar(measured[planted[number % len(planted)]], rng, calls=CALLS) for number in range(liars)]
    caught = sorted(each.calls for each in lasted if each.calls is not None)
    share = len(caught) / liars
    lazy = [liar(measured[planted[n % len(planted)]], rng, calls=10_000, share=0.1) for n in range(liars // 5)]
    lazy_calls = sorted(each.calls if each.calls is not None else 10_000 for each in lazy)
    strikes, bans = false_bans(measured, rng, checks=honest_checks)
    draws = sum(honesty.draw(2, RATE, rng) is not None for _ in range(honest_checks))
    honest = [seen for (kind, _), seen in measured.items() if kind == HONEST]
    real = sum(len(seen.checks) for seen in honest)
    real_wrong = sum(not check.same for seen in honest for check in seen.checks)
    kinds = len({kind for kind, _ in planted})
    return [
        at_least(
            "lying servers in quarantine within 500 of their calls, 2 % checked",
            share,
            0.99,
            unit="share",
            peer=f"{liars:,} liars of {kinds} kinds in {len(SETTINGS)} settings, simulated over measured deviations",
        ),
        at_most(
            "calls of a lying server until its quarantine, median",
            float(_at(caught, 0.5)),
            150.0,
            unit="calls",
            peer=f"99 % within {_at(caught, 0.99)}; one that lies in a tenth of its calls: {_at(lazy_calls, 0.5)}",
        ),
        at_most(
            f"honest servers in quarantine in {honest_checks:,} checks",
            float(bans),
            0.0,
            unit="servers",
            peer=f"{strikes} strikes; rows drawn from {real:,} real checks, of which {real_wrong} found a difference",
        ),
        at_most(
            "computing that checks add",
            draws / (2 * honest_checks),
            0.021,
            unit="share",
            peer="calls computed again for every call of a server, chains of two; less where calls are cut or dropped",
        ),
        *_deviations(measured),
    ]


def _deviations(measured: Measured) -> Iterator[Figure]:
    """For every kind of server the setting that says least for us."""
    for kind in dict.fromkeys(kind for kind, _ in measured):
        seen = {setting: each for (name, setting), each in measured.items() if name == kind}
        if kind == HONEST:
            worst, found = max(seen.items(), key=lambda item: _quantile(item[1].used, 0.999))
            value = _quantile(found.used, 0.999)
            yield at_most(
                "honest server, 99.9 % of rows below", value, 0.7, unit="of the tolerance", peer=f"in {worst}"
            )
        else:
            worst, found = min(seen.items(), key=lambda item: (item[1].caught, _quantile(item[1].used, 0.5)))
            of_output, used = _quantile(found.of_output, 0.5), _quantile(found.used, 0.9)
            peer = (
                f"of {len(found.checks)} in {worst}, where it is hardest; rows differ by {of_output:.2g} of the output"
                f" (median) and {used:.2g} times what is allowed (90 %)"
            )
            yield at_least(f"{kind}: checks that find it", found.caught, 0.99, unit="share", peer=peer)


def table(measured: Measured) -> list[str]:
    """Lines of a Markdown table: kind, setting, difference as a share of the output and of the tolerance (median, and
    from the least 0.1 % to the largest), share of checks that differ."""
    lines = [
        "| server | setting | rows differ, of the output | of what is allowed | checks that find it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (kind, setting), seen in measured.items():
        columns = [
            f"{_quantile(values, 0.5):.2g} ({_quantile(values, 0.001):.2g} to {_quantile(values, 0.999):.2g})"
            for values in (seen.of_output, seen.used)
        ]
        lines.append(f"| {kind} | {setting} | {' | '.join(columns)} | {seen.caught:.1%} of {len(seen.checks)} |")
    return lines


def _quantile(values: Sequence[float], share: float) -> float:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[min(len(finite) - 1, int(share * len(finite)))] if finite else math.inf


def _at(values: Sequence[int], share: float) -> int:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0
