"""`shoal plan models`: the models that planning knows by name, and the sums behind their sizes."""

from __future__ import annotations

from typing import Any

import click

from shoal.cli import output
from shoal.spec import catalog
from shoal.spec.reading import read_model


@click.command("models")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def models(name: str | None, as_json: bool) -> int:
    """List the models of the catalog, or show how one's parameters add up.

    NAME is a model of the catalog, a config.json, a directory with one, or a shape such as
    layers=32,hidden=4096,heads=32,kv_heads=8,ffn=14336,vocab=128256.
    """
    if name is not None:
        found = _object(name)
        if as_json:
            output.answer_json(found)
        else:
            _show(found)
        return 0
    rows = [_object(each) for each in catalog.model_names()]
    if as_json:
        output.answer_json({"models": rows})
        return 0
    output.answer(
        f"{'model':22}{'family':14}{'parameters':>14}{'active':>10}{'layers':>8}{'context':>10}{'cache/token':>13}"
    )
    for row in rows:
        output.answer(
            f"{row['name']:22}{row['family']:14}{_billions(row['parameters']):>14}"
            f"{_billions(row['active_parameters']):>10}{row['layers']:>8}{row['context'] or '-':>10}"
            f"{row['cache_bytes_per_token'] / 1024:>9.1f} KiB"
        )
    return 0


def _object(name: str) -> dict[str, Any]:
    spec, family, source = read_model(name)
    counts = spec.parameters()
    by_part: dict[str, int] = {}
    for layer in range(spec.num_layers):
        for weight in spec.layer_weights(layer):
            by_part[weight.part] = by_part.get(weight.part, 0) + weight.parameters
    return {
        "name": spec.name,
        "family": family,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "layers": spec.num_layers,
        "hidden": spec.hidden,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "vocab": spec.vocab,
        "context": spec.context or None,
        "parts": {
            "embedding": counts.embedding,
            "positions": counts.positions,
            **by_part,
            "other_norms": counts.other,
            "head": counts.head,
        },
        "bytes_16_bit": 2 * counts.total,
        "cache_bytes_per_token": int(spec.kv_bytes_per_token(2)),
        "source": source,
    }


def _show(found: dict[str, Any]) -> None:
    output.answer(f"{found['name']} ({found['family']}), {found['source']}")
    total = found["parameters"]
    for part, count in found["parts"].items():
        if count:
            output.answer(f"  {part:14}{count:>20,}{100 * count / total:>8.2f} %")
    output.answer(f"  {'together':14}{total:>20,}")
    if found["active_parameters"] != total:
        output.answer(f"  {'per token':14}{found['active_parameters']:>20,}")
    output.answer(
        f"{found['layers']} layers, {found['hidden']} wide, {found['heads']} heads, "
        f"{found['kv_heads']} for keys and values"
    )
    output.answer(
        f"16-bit weights: {found['bytes_16_bit'] / 1e9:.1f} GB = {found['bytes_16_bit'] / 2**30:.1f} GiB; "
        f"16-bit cache: {found['cache_bytes_per_token'] / 1024:.1f} KiB per token"
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B"
