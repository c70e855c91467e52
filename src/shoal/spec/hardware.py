"""What a device can do, in SI units; spec/catalog holds the known ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, CPU or board. Rates are dense (no sparsity); GeForce cards: fp16 with fp32 accumulation."""

    name: str
    vendor: str
    kind: str
    """gpu, accelerator, tpu, soc or cpu."""
    memory_bytes: int
    """What the maker calls its size, in GiB: cards sold as 80 GB have 80 GiB of chips, a per cent of it unusable."""
    bandwidth_bytes_s: float | None
    flops: Mapping[str, float]
    """FLOP/s by precision: bf16, fp16, fp8, int8 (operations), fp32."""
    achievable_bf16: float | None
    """Best measured matrix-multiply rate in FLOP/s."""
    interconnect: str
    interconnect_bytes_s: float | None
    """Both directions together."""
    tdp_w: float | None
    year: int
    price_usd_h: float | None
    price_source: str
    source: str
    checked: str
    """source: figures read there; recalled: from general knowledge; doubtful: two statements disagree (see notes)."""
    notes: str

    @classmethod
    def from_row(cls, name: str, row: Mapping[str, Any]) -> Device:
        """A device from its row of the catalog, whose units are GiB, GB/s and TFLOP/s."""
        tera = {key: 1e12 * row[f"{key}_t"] for key in ("bf16", "fp16", "fp8", "int8", "fp32") if f"{key}_t" in row}
        best = row.get("achievable_bf16_t")
        return cls(
            name=name,
            vendor=row["vendor"],
            kind=row["kind"],
            memory_bytes=int(row["memory_gib"] * GIB),
            bandwidth_bytes_s=row["bandwidth_gb_s"] * 1e9 if "bandwidth_gb_s" in row else None,
            flops=tera,
            achievable_bf16=None if best is None else 1e12 * best,
            interconnect=row.get("interconnect", "none"),
            interconnect_bytes_s=row["interconnect_gb_s"] * 1e9 if "interconnect_gb_s" in row else None,
            tdp_w=row.get("tdp_w"),
            year=row["year"],
            price_usd_h=row.get("price_usd_h"),
            price_source=row.get("price_source", ""),
            source=row["source"],
            checked=row["checked"],
            notes=row.get("notes", ""),
        )
