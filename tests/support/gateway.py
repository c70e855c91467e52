"""A whole gateway on a loopback port, with a model that says what a test wants it to say."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from shoal.compute.sampling import Sampler, sample_batch
from shoal.gateway.accounts import Account, Accounts, Usage
from shoal.gateway.app import create_app
from shoal.gateway.audit import Audit
from shoal.gateway.limits import Limits
from shoal.gateway.metrics import Metrics
from shoal.gateway.server import Listening, serve
from shoal.manifest.chain import AuditLog
from shoal.manifest.writer import AuditWriter
from shoal.spec.ids import BlockRange
from shoal.spec.sampling import Constraint, Sampled, SamplingParams
from shoal.swarm.trust import Zones

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PATIENCE_S = 20.0
"""Against hanging only; nothing is expected to take this long."""


def byte_level_tokenizer(
    *, template: str | None = TEMPLATE, special: Sequence[str] = (), eos: str = "</s>"
) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer: every byte is a token, frequent words are merged, special tokens <s>, </s> and others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the whale and the sea and the ship said hello to the world"] * 8, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(list(special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
    fast.chat_template = template
    return fast


class Hold:
    """A step of a script: the model waits here until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.release = threading.Event()

    async def wait(self) -> None:
        self.reached.set()
        while not self.release.is_set():
            await asyncio.sleep(0.002)


@dataclass
class Call:
    """One call of `generate`, as the model saw it."""

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    ignore_eos: bool
    request_id: str
    zones: tuple[Zones, ...] = ()
    on_host: Callable[[str, BlockRange], None] | None = None
    constraint: Constraint | None = None
    steps_done: int = 0
    closed: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Given:
    """A step of a script: a machine is given inputs for these blocks "START:END"."""

    node: str
    blocks: str


Step = int | Sampled | Hold | Given | Exception | None
Script = Callable[[Call], Iterable[Step]]


class ScriptedModel:
    """Stands where a swarm would be. `script` gives the steps of a call; `calls` keeps what was asked."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast, *, context_length: int = 512) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.created = 1_700_000_000
        self.eos_ids = frozenset({tokenizer.eos_token_id})
        self.zones: tuple[Zones, ...] = ()
        self.embedding_size = 8
        self.calls: list[Call] = []
        self.as_new()

    def as_new(self) -> None:
        """Forget what a test has asked and told."""
        self.calls.clear()
        self.replicas = [(BlockRange(0, 4), 2), (BlockRange(4, 6), 1)]
        self.embedding_script: Script = lambda call: ()
        self.says("hello world")

    def says(self, text: str) -> None:
        """Every call answers `text`, token by token, and then ends; with ignore_eos it starts again."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        (eos,) = self.eos_ids

        def script(call: Call) -> Iterator[Step]:
            whole = tokens * (call.max_tokens // len(tokens) + 1) if call.ignore_eos else [*tokens, eos]
            yield from whole[: call.max_tokens]

        self.script: Script = script

    def does(self, *steps: Step) -> None:
        """Every call goes through these steps."""
        self.script = lambda call: steps

    def dreams(self) -> None:
        """Every call takes tokens by chance, through the real sampler: what a grammar forbids is all it keeps to."""
        self.script = lambda call: dreamt_tokens(call, len(self.tokenizer), self.eos_ids)

    def samples(self) -> None:
        """Every call samples from a small fixed distribution, and honours every sampling parameter."""
        self.script = lambda call: sampled_tokens(call, len(self.tokenizer))

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        ignore_eos: bool,
        request_id: str,
        constraint: Constraint | None = None,
        zones: Sequence[Zones] = (),
        on_host: Callable[[str, BlockRange], None] | None = None,
    ) -> AsyncGenerator[Sampled | None, None]:
        call = Call(prompt, params, max_tokens, ignore_eos, request_id, tuple(zones), on_host, constraint)
        self.calls.append(call)
        try:
            for step in self.script(call):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Hold):
                    await step.wait()
                    continue
                if isinstance(step, Given):
                    assert call.on_host is not None
                    call.on_host(step.node, BlockRange.parse(step.blocks))
                    continue
                await asyncio.sleep(0)
                if constraint is not None and step is not None:
                    _keep_to(constraint, step if isinstance(step, int) else step.token)
                call.steps_done += 1
                yield Sampled(step) if isinstance(step, int) else step
        finally:
            call.closed.set()

    async def embed(
        self,
        prompt: list[int],
        *,
        request_id: str,
        zones: Sequence[Zones] = (),
        on_host: Callable[[str, BlockRange], None] | None = None,
    ) -> list[float]:
        """Two different texts have different vectors. Steps of a script are gone through first; tokens among them are
        only counted."""
        call = Call(prompt, SamplingParams(), 0, False, request_id, tuple(zones), on_host)
        self.calls.append(call)
        try:
            for step in self.embedding_script(call):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Given):
                    assert call.on_host is not None
                    call.on_host(step.node, BlockRange.parse(step.blocks))
                    continue
                if isinstance(step, Hold):
                    await step.wait()
            await asyncio.sleep(0)
            rng = random.Random(repr(prompt))
            vector = [rng.gauss(0, 1) for _ in range(self.embedding_size)]
            length = math.sqrt(sum(value * value for value in vector))
            return [value / length for value in vector]
        finally:
            call.closed.set()

    def coverage(self) -> list[tuple[BlockRange, int]]:
        return self.replicas

    async def status(self) -> dict[str, Any]:
        return {"model": self.name, "covered": all(servers for _, servers in self.replicas)}


def _keep_to(constraint: Constraint, token: int) -> None:
    """Fails for a token that the constraint does not allow; goes on behind one that it does."""
    mask = constraint.mask()
    assert mask is None or mask[token // 8] >> token % 8 & 1, f"the grammar does not allow token {token}"
    constraint.accept(token)


def dreamt_tokens(call: Call, vocabulary_size: int, eos_ids: frozenset[int]) -> Iterator[Sampled]:
    """Tokens by chance, as far as the call's constraint and parameters allow; the constraint itself moves on when the
    token is taken (`_keep_to`)."""
    params = replace(call.params, seed=call.params.seed or 0)
    sampler = Sampler(
        params, vocab_size=vocabulary_size, constraint=_Looked(call.constraint) if call.constraint else None
    )
    generator = torch.Generator().manual_seed(params.seed or 0)
    for _ in range(call.max_tokens):
        logits = 2.0 * torch.randn(1, vocabulary_size, generator=generator)
        (sampled,) = sample_batch(logits, [sampler])
        yield sampled
        if sampled.token in eos_ids and not call.ignore_eos:
            return


class _Looked:
    """A constraint that its sampler only looks at."""

    def __init__(self, constraint: Constraint) -> None:
        self.ready, self.mask = constraint.ready, constraint.mask

    def accept(self, token: int) -> None:
        pass


def sampled_tokens(call: Call, vocabulary_size: int) -> Iterator[Sampled]:
    """A toy sampler in the textbook order: penalties, bias, temperature, top_p, draw."""
    params = call.params
    rng = random.Random(params.seed)
    counts: dict[int, int] = {}
    previous = sum(call.prompt)
    bias = dict(params.logit_bias)
    for _ in range(call.max_tokens):
        model = [4.0 * random.Random(previous * 1000 + token).random() for token in range(2, vocabulary_size)]
        total = math.log(sum(math.exp(logit) for logit in model))
        logprobs = {token: logit - total for token, logit in enumerate(model, start=2)}
        logits = {
            token: logit
            - params.presence_penalty * (token in counts)
            - params.frequency_penalty * counts.get(token, 0)
            + bias.get(token, 0.0)
            for token, logit in enumerate(model, start=2)
        }
        best_first = sorted(logits, key=lambda token: -logits[token])
        if params.greedy:
            chosen = best_first[0]
        else:
            weights = [math.exp((logits[token] - logits[best_first[0]]) / params.temperature) for token in best_first]
            kept, mass = 0, 0.0
            while mass < params.top_p * sum(weights) and kept < len(weights):
                mass += weights[kept]
                kept += 1
            chosen = rng.choices(best_first[:kept], weights[:kept])[0]
        counts[chosen] = counts.get(chosen, 0) + 1
        previous = previous * 31 % 100_003 + chosen
        top = sorted(logprobs.items(), key=lambda pair: -pair[1])[: params.logprobs or 0]
        yield Sampled(chosen, None if params.logprobs is None else logprobs[chosen], tuple(top))


class Gateway:
    """A running gateway: two models, its keys, and clients for it."""

    def __init__(
        self, folder: Path, limits: Limits, log: AuditLog | None = None, others: Sequence[ScriptedModel] = ()
    ) -> None:
        """`log` keeps the requests; None: nobody does. `others`: models beside the two that every gateway has."""
        self._log = log
        self.limits = limits
        self.others = {model.name: model for model in others}
        self.chatty = ScriptedModel("org/chatty:1b", byte_level_tokenizer())
        self.plain = ScriptedModel("plain", byte_level_tokenizer(template=None))
        self.metrics = Metrics()
        with_file = Accounts(folder / "keys.sqlite")
        self.key, _ = with_file.create("test")
        self.plain_key, _ = with_file.create("plain only", models=["plain"])
        self.zoned_key, self.zoned = with_file.create("zoned", zones="first=2:hq")
        with_file.close()
        self._folder = folder
        self.listening: Listening
        self._started = threading.Event()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gateway")

    async def _serve(self) -> None:
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        accounts = Accounts(self._folder / "keys.sqlite")
        writer = None if self._log is None else AuditWriter(self._log)
        self.app = create_app(
            {model.name: model for model in (self.chatty, self.plain, *self.others.values())},
            accounts,
            limits=self.limits,
            metrics=self.metrics,
            audit=Audit(writer),
        )
        async with serve(self.app, limits=self.limits) as self.listening:
            self._started.set()
            await self._stop.wait()
        accounts.close()
        if writer is not None:
            writer.close()

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(PATIENCE_S)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def new_key(self, name: str = "limited", **limits: Any) -> tuple[str, Account]:
        """Another key, made as `shoal keys create` makes one beside a running gateway."""
        beside = self.accounts()
        try:
            return beside.create(name, **limits)
        finally:
            beside.close()

    def used(self, account: Account) -> Usage:
        """What the key file says, read as another process would."""
        beside = self.accounts()
        try:
            return beside.used(account.id)
        finally:
            beside.close()

    def accounts(self) -> Accounts:
        return Accounts(self._folder / "keys.sqlite")

    def client(self, key: str | None = None, *, max_retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.listening.url}/v1",
            api_key=key or self.key,
            max_retries=max_retries,
            timeout=PATIENCE_S,
        )

    def async_client(self, key: str | None = None) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.listening.url}/v1", api_key=key or self.key, max_retries=0, timeout=PATIENCE_S
        )

    def http(self, *, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.listening.url, headers=headers, timeout=PATIENCE_S, trust_env=False)


@contextmanager
def running(
    folder: Path,
    limits: Limits | None = None,
    log: AuditLog | None = None,
    others: Sequence[ScriptedModel] = (),
) -> Iterator[Gateway]:
    gateway = Gateway(folder, limits or Limits(), log, others)
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()


def eventually(condition: Callable[[], bool]) -> bool:
    """True as soon as `condition` holds; False when it does not within PATIENCE_S."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if condition():
            return True
        waiting.wait(0.005)
    return False
