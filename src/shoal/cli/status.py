"""`shoal status`: who hosts what, is every block covered, how fast, how busy, and why it is so."""

from __future__ import annotations

from typing import Any

import click

from shoal.cli import output


@click.command("status")
@click.option("--model", default=None, help="One of several models; default: all that the key may use.")
@click.option("--explain", is_flag=True, help="Say why the blocks lie where they lie.")
@click.option("--api", default=None, help="Base URL; default: SHOAL_API, else the running `shoal up`.")
@click.option("--key", default=None, envvar="SHOAL_KEY", help="API key; default: SHOAL_KEY, else as for --api.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(model: str | None, explain: bool, api: str | None, key: str | None, as_json: bool) -> int:
    """Show who hosts which blocks; exit code 3 when some are missing."""
    from shoal.cli.api import Api

    with Api.of_running_swarm(api, key) as swarm:
        found = swarm.get("/shoal/status", {} if model is None else {"model": model})
    if as_json:
        output.answer_json(found)
    else:
        for place, each in enumerate(found.get("models", [found])):
            if place:
                output.answer("")
            _show(each, explain)
    return 0 if found["covered"] else 3


def _show(found: dict[str, Any], explain: bool) -> None:
    from shoal.spec.units import show_bytes

    blocks = found["blocks"]
    state = "every block is covered" if found["covered"] else f"blocks {', '.join(found['missing'])} are missing"
    output.answer(f"{found['model']}: {blocks} blocks, {state}\n")
    columns = f"  {'server':<9} {'state':<9} {'blocks':<8} {_bar_title(blocks)}"
    output.answer(f"{columns} ms/block  sessions  queue  cache free")
    for server in sorted(found["servers"], key=lambda s: (_start(s), s["id"])):
        output.answer(
            f"  {server['id'][:8]:<9} {server['state']:<9} {server['blocks'] or '-':<8} {_bar(server, blocks)} "
            f"{server['decode_ms_per_block']:>8.3f}  {server['sessions']:>8}  {server['queue_rows']:>5}  "
            f"{server['cache_tokens_free']} of {server['cache_tokens_total']} tokens"
        )
    driver = found["driver"]
    losses = ", ".join(f"{count} x {cause}" for cause, count in driver["failovers"].items())
    output.answer(
        f"\n{driver['running']} running, {driver['sessions']} sessions so far, {driver['tokens']} tokens"
        + (f"; lost servers replaced: {losses}; last gap {driver['last_stall_ms']:.0f} ms" if losses else "")
    )
    _show_wire(found)
    for server in found["servers"]:
        if server["honesty"]["level"] in ("quarantined", "avoided"):
            output.answer(f"server {server['id'][:8]} was found wrong and gets nothing; --explain says more")
    for node in found["audit_rolled_back"]:
        output.answer(f"the audit log of {node[:8]} was rolled back or replaced; the gateway's log says from where")
    if explain:
        output.answer("\nWhy:")
        for line in found["explain"]:
            for server in found["servers"]:
                line = line.replace(server["id"], server["id"][:8])
            output.answer(f"  {line}")
        for server in found["servers"]:
            memory = show_bytes(server["memory_bytes"])
            output.answer(f"  {server['id'][:8]} offers {memory} and computes in {server['dtype']}")


def _show_wire(found: dict[str, Any]) -> None:
    """How activations travel, and what that costs in accuracy, measured on what was really sent."""
    driver = found["driver"]
    errors = [driver["wire_error"], *(server["wire_error"] for server in found["servers"])]
    same = {"float32": "f32", "bfloat16": "bf16"}
    if all(same.get(server["dtype"]) == driver["wire"] for server in found["servers"]):
        cost = "as they are computed, without loss"
    elif any(errors):
        cost = f"with a relative error of at most {max(errors):.2%} per link, measured"
    else:
        cost = "with a loss that the first request will show"
    output.answer(f"activations travel as {driver['wire']}, {cost}")


def _start(server: dict[str, Any]) -> int:
    return int(server["blocks"].split(":")[0]) if server["blocks"] else 1 << 30


_WIDTH = 32


def _bar_title(blocks: int) -> str:
    width = min(blocks, _WIDTH)
    return f"0{'':<{max(0, width - len(str(blocks)) - 1)}}{blocks}"[: max(width, 4)].ljust(max(width, 4))


def _bar(server: dict[str, Any], blocks: int) -> str:
    """The server's share of the model as a strip, so that holes and overlaps are seen at a glance."""
    width = min(blocks, _WIDTH)
    start, end = (int(part) for part in server["blocks"].split(":")) if server["blocks"] else (0, 0)
    cells = ("#" if start <= cell * blocks // width < end else "." for cell in range(width))
    return "".join(cells).ljust(max(width, 4))
