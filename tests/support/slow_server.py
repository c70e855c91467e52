"""`python -m support.slow_server server-process ...`: a block server like any other, but every step of more than
LONG_ROWS rows keeps its compute thread busy for PREFILL_S. It stands for a long prompt on a weak machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

LONG_ROWS = 64
PREFILL_S = 10.0


def main() -> int:
    """Put the delay in front of the real engine, then be the real command."""
    import torch

    from shoal.cli.main import run
    from shoal.compute.engine import BlockEngine, Work

    compute = BlockEngine.run

    def slow(self: BlockEngine, works: Sequence[Work], hidden: torch.Tensor) -> torch.Tensor:
        if sum(work.rows for work in works) > LONG_ROWS:
            until = time.monotonic() + PREFILL_S
            weights = torch.rand(512, 512)
            while time.monotonic() < until:
                torch.mm(weights, weights)
        return compute(self, works, hidden)

    BlockEngine.run = slow  # type: ignore[method-assign]
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
