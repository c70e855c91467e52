"""`shoal plan devices`: the devices that planning knows by name, and where their figures come from."""

from __future__ import annotations

from typing import Any

import click

from shoal.cli import output
from shoal.spec import catalog


@click.command("devices")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def devices(name: str | None, as_json: bool) -> int:
    """List the devices of the catalog, or show what is known of one."""
    if name is not None:
        row = _object(name)
        if as_json:
            output.answer_json(row)
        else:
            for key, value in row.items():
                if value not in (None, "", {}):
                    shown = (
                        ", ".join(f"{k} {v / 1e12:g} T/s" for k, v in value.items())
                        if isinstance(value, dict)
                        else value
                    )
                    output.answer(f"{key:28}{shown}")
        return 0
    rows = [_object(each) for each in catalog.device_names()]
    if as_json:
        output.answer_json({"devices": rows})
        return 0
    output.answer(f"{'device':28}{'memory':>10}{'bandwidth':>12}{'16 bit':>14}{'power':>8}  figures")
    for row in rows:
        rate = row["flops"].get("bf16") or row["flops"].get("fp16")
        output.answer(
            f"{row['name']:28}{row['memory_gib']:>6g} GiB{_or_dash(row['bandwidth_bytes_s'], 1e9, 'GB/s'):>12}"
            f"{_or_dash(rate, 1e12, 'TFLOP/s'):>14}{_or_dash(row['tdp_w'], 1, 'W'):>8}  {row['checked']}"
        )
    return 0


def _object(name: str) -> dict[str, Any]:
    device = catalog.device(name)
    return {
        "name": device.name,
        "vendor": device.vendor,
        "kind": device.kind,
        "year": device.year,
        "memory_gib": device.memory_bytes / 2**30,
        "bandwidth_bytes_s": device.bandwidth_bytes_s,
        "flops": dict(device.flops),
        "achievable_bf16_flops": device.achievable_bf16,
        "interconnect": device.interconnect,
        "interconnect_bytes_s": device.interconnect_bytes_s,
        "tdp_w": device.tdp_w,
        "price_usd_h": device.price_usd_h,
        "price_source": device.price_source,
        "source": device.source,
        "checked": device.checked,
        "notes": device.notes,
    }


def _or_dash(value: float | None, unit: float, name: str) -> str:
    return "-" if value is None else f"{value / unit:g} {name}"
