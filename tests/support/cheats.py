"""Block servers that lie: the real server with other weights, or with other answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.bench.cheats import ANSWERS
from shoal.server.loader import Loaded, load
from shoal.server.node import BlockServer
from shoal.spec.ids import BlockRange
from shoal.swarm import serving as decide
from shoal.wire import rows as wire_rows
from shoal.wire import tensors


class OtherWeights(BlockServer):
    """Declares one model and computes with the weights of another."""

    weights_dir: Path

    def _load(self, blocks: BlockRange) -> Loaded:
        config = self._config
        return load(
            self.weights_dir,
            blocks,
            dtype=config.dtype,
            device=self._device,
            memory_bytes=config.memory_bytes,
            cache_tokens=config.cache_tokens,
            exact=False,
        )


class OtherAnswers(BlockServer):
    """Computes what it should and sends something else; `kind` is one of shoal.bench.cheats.ANSWERS."""

    kind: str
    only_when_pushed = False
    """Answer rightly when it is the first or the only server of a chain."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._chance = np.random.default_rng(7)
        self._other: np.ndarray[Any, Any] | None = None

    def _compute(self, works: Sequence[decide.Work]) -> list[wire_rows.Rows]:
        outputs = super()._compute(works)
        return [self._changed(work, rows) for work, rows in zip(works, outputs, strict=True)]

    def _changed(self, work: decide.Work, rows: wire_rows.Rows) -> wire_rows.Rows:
        session = self._serving._sessions.get(work.session) if self._serving is not None else None
        if self.only_when_pushed and (session is None or session.next is None):
            return rows
        inputs = tensors.decode(work.payload.tensor, work.payload.data)
        right = tensors.decode(rows.tensor, rows.data)
        other = self._other if self._other is not None else right[::-1]
        wrong = ANSWERS[self.kind](inputs, right, other, self._chance)
        self._other = right.copy()
        return self._encoder.encode(np.ascontiguousarray(wrong, dtype=np.float32), rows.dtype)
