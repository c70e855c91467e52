"""`shoal plan predict`: what the planner says about rows of measurements, without looking at what was measured."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TextIO

import click

from shoal.cli import output

COLUMNS = ("id", "predicted", "low", "high", "unit", "supported", "reason")


@click.command("predict")
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="File to write; default: stdout.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all predictions.")
def predict(rows: Path, out: Path | None, as_json: bool) -> int:
    """Predict rows of published measurements (their values are not looked at).

    ROWS is a CSV with the columns of published.csv. Rows of kinds that cannot be predicted yet say so.
    """
    from shoal.plan import rows as planned

    lines: list[dict[str, object]] = []
    for row in planned.read_rows(rows):
        estimate, why = planned.predict(row)
        line: dict[str, object] = {"id": row["id"], "predicted": "", "low": "", "high": "", "unit": row["unit"]}
        if estimate is not None:
            unit = planned.unit_bytes(row)
            line |= {key: f"{getattr(estimate, key) / unit:.6g}" for key in ("low", "high")}
            line["predicted"] = f"{estimate.value / unit:.6g}"
        lines.append({**line, "supported": "false" if estimate is None else "true", "reason": why})
    if as_json:
        output.answer_json({"predictions": lines})
    if out is not None:
        with out.open("w", newline="", encoding="utf-8") as file:
            _write(file, lines)
        supported = sum(line["supported"] == "true" for line in lines)
        output.note(f"{supported} of {len(lines)} rows predicted, written to {out}")
    elif not as_json:
        _write(sys.stdout, lines)
    return 0


def _write(file: TextIO, lines: list[dict[str, object]]) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
