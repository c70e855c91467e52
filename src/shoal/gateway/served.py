"""What the gateway needs to know about a model: the protocol between HTTP and whatever drives the chains.

The gateway knows prompts, keys and JSON; it does not know servers, blocks or tensors. Anything with these members can
be put behind the API, which is how the tests run the whole gateway without a model.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal.spec.ids import BlockRange
from shoal.spec.sampling import Constraint, Sampled, SamplingParams
from shoal.swarm.trust import Zones


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the gateway uses."""

    all_special_ids: list[int]

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...


class Served(Protocol):
    """One model under one name.

    `created` is in Unix seconds. `context_length` counts prompt and answer together, in tokens. `eos_ids` are the
    tokens that end an answer. The tokenizer may carry a `chat_template`.
    """

    name: str
    tokenizer: Tokenizer
    context_length: int
    created: int
    eos_ids: frozenset[int]
    embedding_size: int
    zones: tuple[Zones, ...]
    """Trust zones that hold for every request to this model; `generate` applies them by itself."""

    def generate(
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
        """The answer, token by token, each one that `constraint` allows.

        Yields, in this order: at most one None, meaning "admitted, the first token is being computed" (optional; it
        lets a stream send its headers and keep-alives during a long prefill); then every token as it is chosen. The
        end token is yielded too, as the last item, unless `ignore_eos`. The generator ends after an end token or
        after `max_tokens` tokens; ending in any other place is a fault, which the gateway reports as one.

        Besides the model's own, `zones` limit which machines may compute this answer. on_host(node, blocks) is called
        before a node is given its first input of this request, also when it takes over from a lost one.

        Raises before the first item: Full, SwarmIncomplete, PolicyUnmet, ContextTooLong. Raises later: SwarmIncomplete
        or PolicyUnmet, when the chain is lost for good. `aclose()`, or cancelling the task that waits for an item,
        frees the session at once.
        """
        ...

    async def embed(
        self,
        prompt: list[int],
        *,
        request_id: str,
        zones: Sequence[Zones] = (),
        on_host: Callable[[str, BlockRange], None] | None = None,
    ) -> list[float]:
        """What the model makes of a whole text: a vector of length 1 with `embedding_size` values.

        `zones` and `on_host` are as for `generate`. Raises as `generate` does before its first item. Cancelling frees
        the session at once.
        """
        ...

    def coverage(self) -> Sequence[tuple[BlockRange, int]]:
        """The model's blocks in order, as ranges of equally many servers that host them; 0: missing."""
        ...

    async def status(self) -> dict[str, Any]:
        """Who hosts what, as JSON. Has "covered": whether every block is hosted."""
        ...


@dataclass(frozen=True, slots=True)
class ReadyState:
    """Whether requests can be answered now; `reason` says in words why not, `models` says it per model."""

    ready: bool
    reason: str = ""
    models: Mapping[str, bool] = field(default_factory=dict)


def ready_state(models: Mapping[str, Served]) -> ReadyState:
    """Ready when every block of every model is hosted."""
    missing = {
        name: [str(span) for span, servers in served.coverage() if not servers] for name, served in models.items()
    }
    reasons = [f"No server hosts blocks {', '.join(spans)} of {name}." for name, spans in missing.items() if spans]
    return ReadyState(not reasons, " ".join(reasons), {name: not spans for name, spans in missing.items()})


async def status_page(models: Mapping[str, Served]) -> dict[str, Any]:
    """Who hosts what: the status of a model that is alone, or of the first one with those of all under "models"."""
    pages = [await served.status() for served in models.values()]
    if len(pages) == 1:
        return pages[0]
    first = pages[0] if pages else {}  # for programs that know one model only
    return {**first, "covered": all(page["covered"] for page in pages), "models": pages}
