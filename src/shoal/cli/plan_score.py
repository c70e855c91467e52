"""`shoal plan score`: how far the planner is from what others measured."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output


@click.command("score")
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every source.")
def score(rows: Path, as_json: bool) -> int:
    """Compare predictions with the values of rows: per kind and source median, 90th percentile, bias, coverage.

    ROWS is a CSV with the columns of published.csv. Besides the errors of the constants as they are, it shows how well
    they held on rows, and on whole sources, that they were not fitted on.
    """
    from shoal.plan import scoring
    from shoal.plan.profiles import held_out
    from shoal.plan.rows import read_rows

    kinds = scoring.score(read_rows(rows))
    if as_json:
        output.answer_json({"kinds": kinds, "held_out": held_out()})
        return 0
    output.answer(f"{'kind':22}{'rows':>6}{'said':>6}{'median':>9}{'p90':>9}{'bias':>9}{'within':>9}{'above':>8}")
    for kind, found in kinds.items():
        if not found["supported"]:
            output.answer(f"{kind:22}{found['rows']:>6}{0:>6}  {next(iter(found['unsupported']))}")
            continue
        above = f"{100 * found['measured_above_high']:.0f} %" if "measured_above_high" in found else "-"
        output.answer(
            f"{kind:22}{found['rows']:>6}{found['supported']:>6}{found['median_percent']:>7.1f} %"
            f"{found['p90_percent']:>7.1f} %{found['bias_percent']:>+7.1f} %{100 * found['coverage']:>7.0f} %{above:>8}"
        )
        for source, part in found["sources"].items():
            output.answer(
                f"  {source[:34]:34}{part['n']:>4}{part['median_percent']:>5.1f} %{part['p90_percent']:>7.1f} %"
                f"{part['bias_percent']:>+7.1f} %{100 * part['coverage']:>7.0f} %"
            )
    output.answer("within: measured between low and high; above: measured above high")
    for kind, parts in held_out().items():
        for name, part in parts.items():
            output.answer(
                f"{kind}, {name.replace('_', ' ')}: median {part['median_percent']:.1f} %, "
                f"p90 {part['p90_percent']:.1f} % of {part['n']} rows that the constants were not fitted on"
            )
    return 0
