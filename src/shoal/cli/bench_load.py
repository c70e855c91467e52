"""`shoal bench load`: what a server reads from disk and holds in memory for its blocks."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli import output

GB = 1e9


@click.command()
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Directory of a model to measure."
)
@click.option("--json", "as_json", is_flag=True, help="Print one array with all results.")
def load(model: Path | None, as_json: bool) -> None:
    """What a server reads and holds for its share of a model.

    Loads a quarter, half and all of the model's blocks, each in a fresh process, and compares with their size.
    Without --model a random Llama of 1.3 GB is written to a temporary directory.
    """
    from dataclasses import asdict

    from shoal.bench.load import run

    results = []
    for result in run(model):
        ratios = {name: round(getattr(result, name), 4) for name in ("read_ratio", "resident_ratio", "peak_ratio")}
        results.append(asdict(result) | ratios)
        if not as_json:
            output.answer(
                f"blocks {result.blocks:>5}: {result.block_bytes / GB:.3f} GB of weights; "
                f"read {result.bytes_read / GB:.3f} GB (x{result.read_ratio:.3f}), "
                f"resident beyond the base +{(result.resident_bytes - result.base_bytes) / GB:.3f} GB "
                f"(x{result.resident_ratio:.3f}), at its peak x{result.peak_ratio:.3f}; "
                f"base of an empty server {result.base_bytes / GB:.3f} GB"
            )
    if as_json:
        output.answer_json(results)
