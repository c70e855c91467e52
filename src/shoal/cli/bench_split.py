"""`shoal bench split`: is a cut model the whole model, family by family?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from shoal.cli import output

if TYPE_CHECKING:
    from shoal.bench.split import SplitResult


@click.command()
@click.option("--family", "families", multiple=True, metavar="NAME", help="Only this family; may be repeated.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print one array with all results.")
def split(families: tuple[str, ...], device: str, as_json: bool) -> int:
    """Compare cut models with whole ones, family by family; exit code 3 when one misses its bar.

    Cuts tiny random models of many decoder families in three.
    Exit code 3 when a family is further from the whole model than its bar: 0.0 on a CPU for the stages, 1e-5 for
    sessions packed in one forward.
    """
    from dataclasses import asdict

    import torch

    from shoal.bench.split import DEVICE_BAR, PACKED_BAR, run
    from shoal.compute.device import quiet_libraries, resolve_device
    from shoal.compute.families import ROUNDED_GRADIENTS, check_family

    for name in families:
        check_family(name)
    place = resolve_device(device)
    quiet_libraries()
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits for the first
    bar = 0.0 if place.type == "cpu" else DEVICE_BAR
    results, misses = [], 0
    if not as_json:
        output.note(f"Bars: {bar:g} cut against whole, {max(bar, PACKED_BAR):g} packed. Device: {place}.")
    for result in run(families, device=place):
        results.append(asdict(result))
        missed = not result.within(max(bar, ROUNDED_GRADIENTS.get(result.family, 0.0)))
        misses += missed
        if not as_json:
            output.answer(_line(result) + ("  MISSES ITS BAR" if missed else ""))
    if as_json:
        output.answer_json(results)
    else:
        cut = sum(1 for result in results if result["refused"] is None)
        packed = sum(1 for result in results if result["packed_max_abs_diff"] is not None)
        output.note(f"{cut} families cut, {packed} of them packed, {len(results) - cut} refused, {misses} missed.")
    return 3 if misses else 0


def _line(result: SplitResult) -> str:
    if result.refused is not None:
        return f"{result.family:22} refused: {result.refused}"
    packed = "one at a time" if result.packed_max_abs_diff is None else f"{result.packed_max_abs_diff:.1e}"
    return f"{result.family:22} {result.max_abs_diff:8.1e}   packed {packed}"
