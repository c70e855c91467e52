"""Trust zones: which machines may compute which blocks of a model, by the labels in their certificates.

A zone is a demand: "the first two blocks, the last block and the embedding only on machines labelled `trusted`". A
model may have one, a key may have one, and a request has to meet all that concern it. Nobody relaxes a demand: where
no machine meets it, the request is refused (PolicyUnmet).

    Zones.parse("first=2:trusted,last=1:trusted,embedding=trusted")
    Zones.parse("all=trusted")

What a zone is not: protection of what leaves it. The input of every later block is the text as well, for whoever has
the model (docs/attacks.md). Only `all` keeps a request's contents on labelled machines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.errors import PolicyUnmet, UsageError
from shoal.spec.ids import BlockRange

MAX_TEXT = 256
"""Characters of a policy in writing."""

_LABEL = re.compile(r"[a-z0-9-]{1,32}")
_COUNTED = re.compile(r"([1-9][0-9]{0,4}):([a-z0-9-]{1,32})")
_FORMS = "embedding=LABEL, first=COUNT:LABEL, last=COUNT:LABEL or all=LABEL, separated by commas"


@dataclass(frozen=True, slots=True)
class Zones:
    """Demands on the machines that compute one model; each names the label that a machine must carry.

    `embedding` is about the node that turns tokens into numbers and back, which is the gateway; `first` and `last` are
    (how many blocks, label); `all` is about every block and the gateway. Without any demand every machine will do."""

    embedding: str | None = None
    first: tuple[int, str] | None = None
    last: tuple[int, str] | None = None
    all: str | None = None

    @classmethod
    def parse(cls, text: str) -> Zones:
        """Read a policy as people write it; the empty text demands nothing. Raises UsageError for anything else."""
        if len(text) > MAX_TEXT:
            raise UsageError(f"The policy is longer than {MAX_TEXT} characters.", hint=f"Write {_FORMS}.")
        embedding: str | None = None
        counted: dict[str, tuple[int, str]] = {}
        everything: str | None = None
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name in ("first", "last") and name not in counted and (match := _COUNTED.fullmatch(value)):
                counted[name] = (int(match[1]), match[2])
            elif name == "embedding" and embedding is None and _LABEL.fullmatch(value):
                embedding = value
            elif name == "all" and everything is None and _LABEL.fullmatch(value):
                everything = value
            else:
                raise UsageError(
                    f"Cannot read {part!r} in the policy {text!r}.",
                    hint=f"Write {_FORMS}, each at most once; a label has 1 to 32 of a-z, 0-9 and hyphens.",
                )
        return cls(embedding, counted.get("first"), counted.get("last"), everything)

    def __str__(self) -> str:
        parts = [
            f"embedding={self.embedding}" if self.embedding else "",
            f"first={self.first[0]}:{self.first[1]}" if self.first else "",
            f"last={self.last[0]}:{self.last[1]}" if self.last else "",
            f"all={self.all}" if self.all else "",
        ]
        return ",".join(filter(None, parts))

    def __bool__(self) -> bool:
        """Whether anything is demanded."""
        return self != Zones()

    def allowed(self, labels: Iterable[str], num_blocks: int) -> list[BlockRange]:
        """What a node with these labels may compute: one range of blocks, or none. (A demand forbids a beginning, an
        end or everything, so what remains has no holes.)"""
        labels = frozenset(labels)
        if self.all is not None and self.all not in labels:
            return []
        start, end = 0, num_blocks
        if self.first is not None and self.first[1] not in labels:
            start = min(self.first[0], num_blocks)
        if self.last is not None and self.last[1] not in labels:
            end = max(num_blocks - self.last[0], 0)
        return [BlockRange(start, end)] if start < end else []

    def ends_need(self) -> frozenset[str]:
        """Labels that the node with the embedding and the head must carry."""
        return frozenset(label for label in (self.embedding, self.all) if label is not None)


def allowed(zones: Sequence[Zones], labels: Iterable[str], num_blocks: int) -> BlockRange | None:
    """The blocks that a node with these labels may compute under every one of `zones`; None: none of them."""
    labels = frozenset(labels)
    start, end = 0, num_blocks
    for each in zones:
        for blocks in (ranges := each.allowed(labels, num_blocks)):
            start, end = max(start, blocks.start), min(end, blocks.end)
        if not ranges or start >= end:
            return None
    return BlockRange(start, end)


def permits(zones: Sequence[Zones], labels: Iterable[str], blocks: BlockRange, num_blocks: int) -> bool:
    """Whether a node with these labels may compute all of `blocks`."""
    may = allowed(zones, labels, num_blocks)
    return may is not None and blocks in may


def ends_lack(zones: Sequence[Zones], labels: Iterable[str]) -> list[str]:
    """Labels that the node with the embedding and the head would need and does not carry, in order."""
    needed = frozenset[str]().union(*(each.ends_need() for each in zones))
    return sorted(needed - frozenset(labels))


def ends_unmet(zones: Sequence[Zones], labels: Iterable[str]) -> PolicyUnmet | None:
    """The refusal of a gateway with these labels, which holds embedding and head; None when it may take the request."""
    if not (lack := ends_lack(zones, labels)):
        return None
    return PolicyUnmet(
        f"The trust zone {written(zones)} cannot be met: this gateway does not carry the label {', '.join(lack)}.",
        hint="Ask a gateway that does, or invite this one anew with --label.",
    )


def written(zones: Sequence[Zones]) -> str:
    """All demands in one line, for messages and the audit log; empty when there is none."""
    return " and ".join(str(each) for each in zones if each)
