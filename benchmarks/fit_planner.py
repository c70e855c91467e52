"""Fits the constants in src/shoal/plan/engines.toml and says how well they hold on rows that they were not fitted on.

.venv/bin/python benchmarks/fit_planner.py published.csv            # errors: fitted, 5 folds, sources left out
.venv/bin/python benchmarks/fit_planner.py published.csv --write    # and write engines.toml

Deterministic: the same rows give the same file. Every engine is fitted alone; `default` takes all rows of a kind and is
what engines without rows get. An engine all of whose rows are left out with their source takes the default, too.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from shoal.errors import ShoalError
from shoal.plan import memory
from shoal.plan.rows import engine_of, read_rows, unit_bytes, workload
from shoal.plan.scoring import quantile

TARGET = Path(memory.__file__).with_name("engines.toml")
VERSION = "2026-11-23"
# kind -> constant -> (start, least, most, meaning with unit). Equal least and most: given by the method, not fitted.
MEANINGS: dict[str, dict[str, tuple[float, float, float, str]]] = {
    "inference": {
        "weight_copies": (
            1.0,
            1.0,
            3.0,
            "copies of the weights held at the peak; above 1 where an engine repacks them",
        ),
        "cache_factor": (1.0, 1.0, 3.0, "bytes allocated for the KV cache over bytes needed"),
        "working_factor": (0.5, 0.0, 3.0, "share of one layer's activation inventory held for a prompt"),
        "logit_bytes": (2.0, 0.0, 8.0, "bytes per logit of the prompt"),
        "fixed_gib": (0.4, 0.0, 6.0, "GiB of context, kernels and buffers"),
    },
    "finetune": {
        "state_bytes_full": (8.0, 8.0, 8.0, "bytes of gradient and both moments per trained weight in full tuning"),
        "state_bytes_adapter": (8.0, 8.0, 8.0, "the same, with the adapter's own weight, for adapters"),
        "unsharded_copies": (1.0, 0.0, 1.0, "whole copies of the weights on a device while it shards them"),
        "attention_factor": (1.0, 0.1, 3.0, "share of the norms' and attention's activation inventory that is kept"),
        "mlp_factor": (1.0, 0.1, 3.0, "share of the MLP's activation inventory that is kept"),
        "quantised_factor": (1.0, 0.5, 1.5, "multiple of both factors when the base weights are quantised"),
        "logit_bytes": (6.0, 0.0, 16.0, "bytes per logit: the logits, their gradient and copies in fp32"),
        "fixed_gib": (0.7, 0.0, 6.0, "GiB of context, kernels and buffers"),
    },
    "train": {
        "gradient_bytes": (4.0, 2.0, 6.0, "bytes of gradients per weight, accumulation buffers included"),
        "working_factor": (1.0, 0.5, 3.0, "multiple of one layer's inventory held while it is recomputed"),
        "logit_bytes": (6.0, 0.0, 12.0, "bytes per logit on the last stage"),
        "fixed_gib": (3.0, 0.0, 20.0, "GiB of context, kernels, communication buffers and fragmentation"),
    },
}
# Stated by the method or the tool, so not fitted: PEFT's default keeps fp32 weights, gradients and moments.
GIVEN = {
    ("finetune", "litgpt"): {"state_bytes_full": 6.0, "state_bytes_adapter": 8.0, "unsharded_copies": 1.0},
    ("finetune", "peft"): {
        "state_bytes_full": 12.0,
        "state_bytes_adapter": 16.0,
        "unsharded_copies": 0.0,
        "attention_factor": 1.0,
        "mlp_factor": 1.0,
        "quantised_factor": 1.0,
        "logit_bytes": 6.0,
    },
    ("finetune", "default"): {"state_bytes_full": 14.0, "state_bytes_adapter": 8.0, "unsharded_copies": 0.0},
    ("train", "megatron"): {"gradient_bytes": 4.0},
}
Row = dict[str, str]
FEW = 5
"""Fewer rows than this say little about how far off the next one is."""
Constants = dict[str, float]


def main(path: str, write: bool) -> None:
    rows = [
        row
        for row in read_rows(Path(path))
        if row["value"] and not row["notes"].startswith("SUSPECT") and row["kind"].removesuffix("_memory") in MEANINGS
    ]
    lines = [HEADER]
    for kind in MEANINGS:
        mine = [row for row in rows if row["kind"] == f"{kind}_memory" and usable(row)]
        lines += report_and_lines(kind, mine)
    lines += CHECKPOINT
    if write:
        TARGET.write_text("\n".join(lines))
        print(f"wrote {TARGET.name}")


def usable(row: Row) -> bool:
    """Rows that are predicted, and are not one of the sums that need no constant."""
    try:
        workload(row)
    except ShoalError:
        return False
    return "only" not in row["unit"]


def report_and_lines(kind: str, rows: list[Row]) -> list[str]:
    """Print the errors of a kind; return its part of engines.toml."""
    engines = sorted({engine_of(row) for row in rows})
    fitted = {engine: fit(kind, engine, [row for row in rows if engine_of(row) == engine]) for engine in engines}
    fitted["default"] = fit(kind, "default", rows)
    folds = cross_validate(kind, rows, [{row["id"] for row in rows[i::5]} for i in range(5)] if rows else [])
    sources = sorted({row["source"] for row in rows})
    whole = cross_validate(kind, rows, [{row["id"] for row in rows if row["source"] == source} for source in sources])
    inside = {row["id"]: ratio(kind, row, fitted[engine_of(row)]) for row in rows}
    for name, ratios in (("fitted", inside), ("5 folds", folds), ("sources left out", whole)):
        print(f"{kind:10} {name:18} {summary(list(ratios.values()))}")
    lines = [f"[held_out.{kind}_memory]"]
    for key, ratios in (("five_folds", folds), ("sources_left_out", whole)):
        n, middle, ninth = figures(list(ratios.values()))
        lines.append(f"{key} = {{ n = {n}, median_percent = {middle:.1f}, p90_percent = {ninth:.1f} }}")
    lines.append("")
    for engine, constants in fitted.items():
        if engine == "default":
            low, high, told = *spread(list(whole.values()), least=0.25), f"{len(rows)} rows of {len(sources)} sources"
        else:
            own = [row for row in rows if engine_of(row) == engine]
            low, high = spread([folds[row["id"]] for row in own], least=0.05 if len(own) >= FEW else 0.25)
            told = f"{len(own)} rows of {', '.join(sorted({row['source'] for row in own}))}"
        lines += [f"[profiles.{kind}.{engine}]", f'fitted_on = "{told}"', f"low = {low:.3f}", f"high = {high:.3f}"]
        lines += [f"constants = {{ {', '.join(f'{key} = {value:.4g}' for key, value in constants.items())} }}", ""]
    return lines


def cross_validate(kind: str, rows: list[Row], parts: list[set[str]]) -> dict[str, float]:
    """Measured over predicted of every row, by constants fitted without its part."""
    found = {}
    for part in parts:
        rest = [row for row in rows if row["id"] not in part]
        by_engine: dict[str, list[Row]] = defaultdict(list)
        for row in rest:
            by_engine[engine_of(row)].append(row)
        cache: dict[str, Constants] = {}
        for row in rows:
            if row["id"] in part:
                engine = engine_of(row) if by_engine.get(engine_of(row)) else "default"
                if engine not in cache:
                    cache[engine] = fit(kind, engine, by_engine.get(engine, rest))
                found[row["id"]] = ratio(kind, row, cache[engine])
    return found


def fit(kind: str, engine: str, rows: list[Row]) -> Constants:
    """Constants with the least mean of |log(predicted / measured)|: one constant after the other, ever finer steps."""
    meanings = MEANINGS[kind]
    constants = {name: start for name, (start, _, _, _) in meanings.items()}
    given = GIVEN.get((kind, engine), {})
    constants |= given
    works = [(workload(row), float(row["value"]) * unit_bytes(row)) for row in rows]

    def loss() -> float:
        return sum(abs(math.log(memory.estimate(work, constants).value / value)) for work, value in works) / len(works)

    best = loss()
    for step in (0.25, 0.1, 0.04, 0.015):
        for _ in range(12):
            before = best
            for name, (_, least, most, _) in meanings.items():
                if name in given or least == most:
                    continue
                for sign in (1, -1):
                    old = constants[name]
                    constants[name] = min(most, max(least, old + sign * step * (most - least)))
                    new = loss()
                    if new < best - 1e-9:
                        best = new
                    else:
                        constants[name] = old
            if before - best < 1e-6:
                break
    return constants


def ratio(kind: str, row: Row, constants: Constants) -> float:
    return float(row["value"]) * unit_bytes(row) / memory.estimate(workload(row), constants).value


def spread(ratios: list[float], least: float) -> tuple[float, float]:
    """The tenth and ninetieth hundredth of measured over predicted, at least `least` to either side."""
    ordered = sorted(ratios)
    low, high = (ordered[min(len(ordered) - 1, int(part * len(ordered)))] for part in (0.1, 0.9)) if ordered else (1, 1)
    return min(low, 1 - least), max(high, 1 + least)


def summary(ratios: list[float]) -> str:
    n, middle, ninth = figures(ratios)
    under = sum(each > 1 for each in ratios) / len(ratios) * 100
    return f"n {n:3} median {middle:5.1f} % p90 {ninth:5.1f} % value under-estimated in {under:.0f} %"


def figures(ratios: list[float]) -> tuple[int, float, float]:
    """(rows, median, 90th percentile) of the absolute error in per cent of what was measured."""
    errors = [abs(1 / each - 1) * 100 for each in ratios]
    return len(errors), median(errors), quantile(errors, 0.9)


HEADER = (
    f"""# Constants of engines for memory. Written by benchmarks/fit_planner.py; change them there.
# low and high: measured over estimated of four in five rows that the constants were not fitted on.
version = "{VERSION}"

[meanings]
"""
    + "\n".join(
        f'{kind}_{name} = "{meaning}"' for kind, names in MEANINGS.items() for name, (_, _, _, meaning) in names.items()
    )
    + "\n"
)
CHECKPOINT = [
    "[profiles.checkpoint.default]",
    'fitted_on = "nothing: sizes follow from the formats; the interval allows for GB that mean GiB"',
    "low = 0.93",
    "high = 1.01",
    "constants = {}",
    "",
]

if __name__ == "__main__":
    main(sys.argv[1], "--write" in sys.argv)
