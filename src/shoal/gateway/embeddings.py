"""POST /v1/embeddings: texts to vectors, each text a session of its own that ends after its prompt."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from shoal.errors import ContextTooLong, Full
from shoal.gateway.accounts import Account
from shoal.gateway.audit import Trail
from shoal.gateway.errors import RequestError
from shoal.gateway.generate import Generator, OfferedModel
from shoal.gateway.limits import patient, read_body, while_connected
from shoal.gateway.metrics import RequestMeter
from shoal.gateway.openai import EmbeddingRequest, ignored_header, read
from shoal.gateway.replies import dumps, send_json
from shoal.gateway.served import Served
from shoal.spec.ids import BlockRange

AT_ONCE = 8
"""Texts of one request that are computed at the same time, so that a long list leaves room for others."""


class Embedder:
    """The embeddings endpoint; it shares models, limits and quotas with the generating ones."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def embed(self, scope: Scope, receive: Receive, send: Send, account: Account) -> None:
        """POST /v1/embeddings."""
        generator = self._generator
        with generator.gate.enter():
            body = await read_body(scope, receive, generator.limits)
            request, ignored = read(body, EmbeddingRequest)
            model = generator.pick(request.model, account)
            request.check(model.vocabulary.size, model.served.embedding_size)
            prompts = await asyncio.to_thread(_prompts, model, request)
            tokens = sum(map(len, prompts))
            headers = {"x-shoal-ignored": ignored_header(ignored)} if ignored else {}
            request_id = scope["state"]["request_id"]
            trail = generator.audit.trail(request_id, account, model.served)
            async with generator.metered(tokens, account, trail, scope) as (meter, bill):
                sending = bill.before_the_end(patient(send, generator.limits))
                work = _answer(model.served, request, prompts, request_id, trail, meter, headers, sending)
                await while_connected(receive, work)


def _prompts(model: OfferedModel, request: EmbeddingRequest) -> list[list[int]]:
    """The inputs as token ids. Raises RequestError for an empty one, ContextTooLong for one that is too long."""
    prompts = []
    for entry in request.inputs():
        prompt = model.encode(entry, "input", add_special_tokens=True) if isinstance(entry, str) else entry
        if not prompt or entry == "":
            raise RequestError("An input is empty.", param="input")
        if len(prompt) > model.served.context_length:
            raise ContextTooLong(
                f"This model's maximum context length is {model.served.context_length} tokens. However, an input has "
                f"{len(prompt)}.",
                hint="Cut the text into parts.",
            )
        prompts.append(prompt)
    return prompts


async def _answer(
    served: Served,
    request: EmbeddingRequest,
    prompts: Sequence[list[int]],
    request_id: str,
    trail: Trail,
    meter: RequestMeter,
    headers: dict[str, str],
    send: Send,
) -> None:
    """Compute every vector, then send one JSON object. Every text that was given to servers is billed, also when the
    client does not wait for the others."""
    data = await _all(served, request, prompts, request_id, trail, meter)
    tokens = sum(map(len, prompts))
    meter.finished("embedded")
    answer = {
        "object": "list",
        "data": data,
        "model": served.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    await send_json(send, answer, headers)


async def _all(
    served: Served,
    request: EmbeddingRequest,
    prompts: Sequence[list[int]],
    request_id: str,
    trail: Trail,
    meter: RequestMeter,
) -> list[dict[str, Any]]:
    """The vectors as entries of the answer, some of them computed at once. Raises what a text raises.

    When the swarm has no room for another text of this request beside those that run, it waits for them; Full is
    raised only when not even one fits.
    """
    entries: list[dict[str, Any]] = [{} for _ in prompts]
    waiting = deque(range(len(prompts)))
    running: dict[asyncio.Task[list[float]], int] = {}
    most = AT_ONCE
    given: set[int] = set()

    def note(place: int) -> None:
        """The text is being computed, or has been."""
        if place not in given:
            if not given:
                meter.admitted(0)
            given.add(place)
            meter.prompt(len(prompts[place]))

    def on_host(place: int, node: str, blocks: BlockRange) -> None:
        note(place)
        trail.on_host(node, blocks)

    try:
        while waiting or running:
            while waiting and len(running) < most:
                place = waiting.popleft()
                work = served.embed(
                    prompts[place],
                    request_id=f"{request_id}-{place}",
                    zones=trail.zones,
                    on_host=partial(on_host, place),
                )
                running[asyncio.create_task(work)] = place
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = running.pop(task)
                try:
                    vector = task.result()
                except Full:
                    if most == 1:
                        raise
                    most = max(1, min(most - 1, len(running)))
                    waiting.appendleft(place)
                    continue
                note(place)
                shown = _shown(shortened(vector, request.dimensions), request.encoding_format)
                entries[place] = {"object": "embedding", "index": place, "embedding": shown}
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return entries


def shortened(vector: Sequence[float], dimensions: int | None) -> Sequence[float]:
    """The first `dimensions` values, brought back to length 1; for models that were trained to be cut so."""
    if dimensions is None or dimensions == len(vector):
        return vector
    kept = vector[:dimensions]
    length = math.sqrt(math.fsum(value * value for value in kept))
    return [value / length for value in kept] if length else kept


def _shown(vector: Sequence[float], encoding: str | None) -> Any:
    """The vector as JSON wants it, encoded at once: a list of Python floats takes several times the room."""
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return msgspec.Raw(dumps(list(vector)))
