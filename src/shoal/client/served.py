"""A model whose blocks are elsewhere, as the gateway sees it: a name, a tokenizer, generate, status."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shoal.client.driver import Driver, Pooling
from shoal.client.sessions import OnHost
from shoal.compute.facts import ModelFacts
from shoal.errors import ModelError
from shoal.net.directory import Directory
from shoal.spec.ids import BlockRange
from shoal.spec.sampling import Constraint, Sampled, SamplingParams
from shoal.swarm.balance import next_move
from shoal.swarm.placement import ModelNeeds
from shoal.swarm.routing import coverage, missing_blocks, policy_unmet
from shoal.swarm.trust import Zones, allowed, ends_unmet, written
from shoal.wire.messages import Record

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory, never running code from it. Raises ModelError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"No usable tokenizer in {model_dir.name}.",
            hint="The directory needs tokenizer.json and tokenizer_config.json, as Hugging Face models have them.",
        ) from error


def read_pooling(model_dir: Path) -> Pooling:
    """How an embedding model makes one vector of a text, as its directory says it (in sentence-transformers' format);
    "last" where it says nothing. Raises ModelError for a way that is not offered."""
    path = model_dir / "1_Pooling" / "config.json"
    try:
        said = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return "last"
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"Cannot read {path}: {error}", hint="Copy or download the model again.") from None
    modes = {name for name, value in said.items() if name.startswith("pooling_mode_") and value is True}
    modes |= {f"pooling_mode_{said['pooling_mode']}"} if "pooling_mode" in said else set()
    if modes <= {"pooling_mode_lasttoken"}:
        return "last"
    if modes <= {"pooling_mode_mean", "pooling_mode_mean_tokens"}:
        return "mean"
    raise ModelError(
        f"{model_dir.name} makes embeddings by {', '.join(sorted(modes))}.",
        hint="Models that take the last token or the mean over all tokens can be served.",
    )


class SwarmModel:
    """Implements gateway.served.Served on a Driver."""

    def __init__(
        self,
        name: str,
        driver: Driver,
        directory: Directory,
        tokenizer: PreTrainedTokenizerFast,
        *,
        eos_ids: frozenset[int],
        placement: list[str] | None = None,
        zones: Sequence[Zones] = (),
        labels: Sequence[str] = (),
        pooling: Pooling = "last",
    ) -> None:
        """`zones` hold for every request to this model; `labels` are this node's own. Raises ModelError when the
        tokenizer is another model's: its ids do not fit the vocabulary."""
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= driver.vocab_size:
            raise ModelError(
                f"The tokenizer of {name} has token ids up to {highest}, but the model's vocabulary ends at"
                f" {driver.vocab_size - 1}.",
                hint="Put the tokenizer that belongs to these weights into the model directory.",
            )
        self.name = name
        self.tokenizer = tokenizer
        self.context_length = driver.facts.context_length
        self.created = int(time.time())
        self.eos_ids = eos_ids
        self.embedding_size = driver.embedding_size
        self.placement_reasons = placement if placement is not None else []
        self.zones = tuple(zones)
        self._labels = tuple(labels)
        self._driver = driver
        self._directory = directory
        self._pooling: Pooling = pooling

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
        on_host: OnHost | None = None,
    ) -> AsyncGenerator[Sampled | None, None]:
        items = self._driver.generate(
            prompt,
            params,
            max_tokens=max_tokens,
            eos_ids=frozenset() if ignore_eos else self.eos_ids,
            request_id=request_id,
            constraint=constraint,
            zones=(*self.zones, *zones),
            on_host=on_host,
        )
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    async def embed(
        self,
        prompt: list[int],
        *,
        request_id: str,
        zones: Sequence[Zones] = (),
        on_host: OnHost | None = None,
    ) -> list[float]:
        return await self._driver.embed(
            prompt,
            pooling=self._pooling,
            request_id=request_id,
            zones=(*self.zones, *zones),
            on_host=on_host,
        )

    def view_changed(self) -> None:
        """The registry changed: generations that wait for servers look again."""
        self._driver.view_changed()

    async def close(self) -> None:
        """End every generation and connection of this model."""
        await self._driver.close()

    @property
    def chats(self) -> bool:
        """The model has a chat template."""
        return self.tokenizer.chat_template is not None

    def coverage(self) -> Sequence[tuple[BlockRange, int]]:
        """The blocks in order, as ranges of equally many online servers."""
        facts = self._driver.facts
        return coverage(self._directory.live(), facts.name, facts.num_blocks)

    def missing(self) -> list[str]:
        """Block ranges that no live server hosts, as "4:8"."""
        facts = self._driver.facts
        return [str(part) for part in missing_blocks(self._directory.live(), facts.name, facts.num_blocks)]

    async def status(self) -> dict[str, Any]:
        """Who hosts what, how fast, how busy, and why there."""
        facts = self._driver.facts
        driven = Counter(hop.node for chain in self._driver.sessions.chains() for hop in chain)
        servers = [
            _describe(record, driven[record.node]) | {"honesty": self._honesty(record)}
            for record in self._directory.live()
            if record.role == "server"
        ]
        missing = self.missing()
        return {
            "model": self.name,
            "swarm_model": facts.name,
            "blocks": facts.num_blocks,
            "covered": not missing,
            "missing": missing,
            "servers": servers,
            "driver": self._driver.statistics(),
            "explain": [
                *self.placement_reasons,
                *self._explain_places(),
                *self._explain_zones(),
                *self._explain_honesty(),
            ],
            "zones": written(self.zones),
            "labels": sorted(self._labels),
            "audit_rolled_back": sorted(self._directory.view.rolled_back),
        }

    def _explain_places(self) -> list[str]:
        """Why each server is where it is, in its own words, and whether one should be elsewhere."""
        facts = self._driver.facts
        records = [
            record
            for record in self._directory.live()
            if record.role == "server"
            and (record.serves == facts.name or (record.span is not None and record.span.model == facts.name))
        ]
        lines = []
        for record in records:
            span = record.span
            place = f"hosts blocks {span.start}:{span.end}" if span is not None and span.end else "hosts nothing"
            if record.reason:
                lines.append(f"{record.node} {place} ({record.state}): {record.reason}")
        if any(record.serves for record in records):
            lines.append(f"balance: {next_move(records, facts.name, _needs(facts, records)).text}")
        return lines

    def _explain_zones(self) -> list[str]:
        """What the model's trust zone leaves to each server, and why it is refused when it cannot be met."""
        if not any(self.zones):
            return []
        facts, records = self._driver.facts, self._directory.live()
        lines = [f"every request to this model is under the trust zone {written(self.zones)}"]
        for record in records:
            if record.role == "server":
                may = allowed(self.zones, record.labels, facts.num_blocks)
                carries = f"carries {', '.join(record.labels)}" if record.labels else "carries no label"
                what = f"may compute blocks {may}" if may is not None else "may compute nothing of this model"
                lines.append(f"{record.node} {carries}: {what}")
        refusals = (
            ends_unmet(self.zones, self._labels),
            policy_unmet(records, facts.name, facts.num_blocks, self.zones),
        )
        return lines + [f"requests are refused: {refusal}" for refusal in refusals if refusal is not None]

    def _honesty(self, record: Record) -> dict[str, Any]:
        """What checks have found about a server; "avoided": other gateways name it."""
        now = time.monotonic()
        standing = self._driver.reputation.standing(record.node, now)
        avoided = record.node in self._driver.reputation.avoid(self._directory.live(), self._directory.node, now)
        level = "avoided" if avoided and standing.level != "quarantined" else standing.level
        return {**asdict(standing), "level": level, "ends_in_s": round(standing.ends_in_s)}

    def _explain_honesty(self) -> list[str]:
        """How servers are compared, where nothing can be, and who is not trusted."""
        checks = self._driver.checks.statistics()
        if not checks["rate"]:
            return ["no server's answers are computed again (--checks 0)"]
        done = ", ".join(f"{count} {result}" for result, count in sorted(checks["results"].items())) or "none yet"
        lines = [f"of each server's calls {checks['rate']:.1%} are computed again elsewhere; so far {done}"]
        if checks["uncompared"]:
            lines.append(f"blocks {', '.join(checks['uncompared'])} have one server: nothing it says can be compared")
        for record in self._directory.live():
            if record.role != "server":
                continue
            found = self._honesty(record)
            if found["level"] == "quarantined":
                hours = found["ends_in_s"] / 3600
                lines.append(
                    f"{record.node} gets nothing for {hours:.1f} h more, it was found wrong: {found['reason']}"
                )
            elif found["level"] == "avoided":
                lines.append(f"{record.node} gets nothing: enough other gateways found it wrong")
            elif found["level"] == "suspected":
                lines.append(
                    f"{record.node} was wrong in {found['strikes']} of its last {found['checks']} checks"
                    f" and is one side of {found['disputes']} that could not be decided"
                )
        return lines


def _needs(facts: ModelFacts, records: Sequence[Record]) -> ModelNeeds:
    """What the blocks take on the servers that are there (the most precise format counts)."""
    itemsize = max((_ITEMSIZE[record.dtype] for record in records), default=4)
    return ModelNeeds(
        block_bytes=tuple(params * itemsize for params in facts.block_params),
        kv_bytes_per_block_token=facts.kv_params_per_token * itemsize,
        legal_cuts=facts.legal_cuts,
    )


def _describe(record: Record, driven: int) -> dict[str, Any]:
    """`driven`: this gateway's own sessions on that server, known at once; the server's word for all comes later."""
    span = record.span
    return {
        "id": record.node,
        "state": record.state,
        "blocks": None if span is None else f"{span.start}:{span.end}",
        "pid": record.pid,
        "addresses": list(record.addresses),
        "dtype": record.dtype,
        "decode_ms_per_block": round(record.decode_ms_per_block, 4),
        "prefill_ms_per_block_token": round(record.prefill_ms_per_block_token, 5),
        "memory_bytes": record.memory_bytes,
        "cache_tokens_free": record.cache_tokens_free,
        "cache_tokens_total": record.cache_tokens_total,
        "queue_rows": record.queue_rows,
        "sessions": record.sessions,
        "driven": driven,
        "labels": list(record.labels),
        "wire_error": record.wire_error,
        "busy": round(record.busy, 3),
        "threads": record.threads,
        "free": bool(record.serves),
        "reason": record.reason,
    }
