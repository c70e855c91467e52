"""Replay a seed: `python -m shoal.sim liveness --seed 17 --trace`, or look for a bad one: `--seeds 1000`."""

from __future__ import annotations

import argparse
import sys

from shoal.sim.scenarios import SCENARIOS, run
from shoal.sim.world import Stuck, Wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shoal.sim", description=__doc__)
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run (default 1)")
    parser.add_argument("--trace", action="store_true", help="print what happened, with virtual times")
    options = parser.parse_args()
    bad = 0
    for seed in range(options.seed, options.seed + options.seeds):
        lines: list[str] = []
        ended = False
        try:
            report = run(options.scenario, seed, trace=lines if options.trace else None)
            print("\n".join([*lines, *report.lines()]))
            ended = True
        except (Wrong, Stuck) as error:
            bad += 1
            print("\n".join([*lines, f"{options.scenario}, seed {seed}: {type(error).__name__}: {error}"]))
            ended = True
        finally:
            if not ended:  # some other exception is on its way: say which seed it was
                print("\n".join([*lines, f"{options.scenario}, seed {seed} broke off"]), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
